"""Nothing is lost when a process dies or a server restarts."""

import contextlib
import json
import signal
import time

import psutil
import pytest
import redis

from example_project.servers import Postgres, Rabbit, Valkey, wait_until
from tests.acceptance.steps import assert_handled, insert_rows, wait_until_confirmed

ROWS = 10_000


@pytest.mark.parametrize(
    "any_shop", ["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)], indirect=True
)
def test_kill_9_amid_10_000_changes_loses_nothing(any_shop):
    shop = any_shop
    shop.environment["SHOP_BATCH"] = "1"
    shop.end(shop.replicate())
    insert_rows(shop.database, 1, ROWS)
    for pause in (0.05, 0.1, 0.2):
        replicate = shop.replicate()
        time.sleep(pause)
        shop.end(replicate, signal.SIGKILL)
    shop.replicate()
    shop.worker(queues="batches")
    batched = shop.until_noted(ROWS, "many", timeout=180)
    order = list(dict.fromkeys(note["new"]["id"] for note in batched))
    assert order == list(range(1, ROWS + 1))
    wait_until_confirmed(shop)


@pytest.fixture
def own_postgres(request):
    with Postgres(fsync="on") as server:
        yield server


@pytest.fixture
def shop_of_its_own(make_shop, own_postgres, database, valkey):
    """A shop whose PostgreSQL may be stopped."""
    import redis

    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    database.server, shared = own_postgres, database.server
    database.dsn = own_postgres.dsn()
    yield make_shop(valkey)
    database.server, database.dsn = shared, shared.dsn(database.name)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.soak),
        signal.SIGQUIT,
        pytest.param(signal.SIGKILL, marks=pytest.mark.soak),
    ],
    ids=["fast", "immediate", "kill"],
)
def test_postgresql_restart_loses_nothing(shop_of_its_own, own_postgres, number):
    shop = shop_of_its_own
    replicate = shop.replicate()
    shop.worker()
    insert_rows(shop.database, 1, 100)
    own_postgres.stop(number)
    own_postgres.start()
    insert_rows(shop.database, 101, 200)
    assert_handled(shop, 1, 200)
    assert shop.end(replicate) == 0


def test_pg_terminate_backend_of_either_connection_loses_nothing(shop):
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 100)
    for number, kind in enumerate(("walsender", "client backend"), 1):
        assert shop.database.one(
            "SELECT bool_and(pg_terminate_backend(pid)) FROM pg_stat_activity "
            f"WHERE application_name = 'flash_celery' AND datname = '{shop.database.name}' "
            f"AND backend_type = '{kind}'"
        )
        insert_rows(shop.database, number * 100 + 1, number * 100 + 100)
        wait_until_confirmed(shop)
    shop.worker()
    assert_handled(shop, 1, 300)
    assert shop.end(replicate) == 0


def test_celery_worker_killed_in_a_handler_loses_nothing(any_shop):
    """SIGKILL of the parent, its children first or after it; each change is handled by another."""
    shop = any_shop
    options = {
        "visibility_timeout": 10,  # or what is being handled comes again
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
    if shop.broker.url.startswith("redis"):
        shop.environment["SHOP_CONF"] = json.dumps({"broker_transport_options": options})
    replicate = shop.replicate()
    killed = shop.worker("prefork", SHOP_SLEEP="1000")
    insert_rows(shop.database, 1, 10)
    shop.until_noted(2)  # both children have one
    if shop.broker.url.startswith("redis"):
        # Nothing is on its way: a worker loses what it is taking.
        with redis.Redis.from_url(shop.broker.url) as client:
            wait_until(lambda: client.hlen("unacked") + client.llen("flash") == 10, "its queue")
            wait_until(lambda: client.hlen("unacked") == 8, "what it fetches")
    family = psutil.Process(killed.pid).children(recursive=True)
    shop.end(killed, signal.SIGKILL)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    shop.worker()
    wait_until(lambda: len(shop.notes()) == 12, "the changes to come back")
    assert_handled(shop, 1, 10, ordered=False)  # they come back in Celery's order
    assert shop.end(replicate) == 0


def test_valkey_restart_loses_nothing(make_shop):
    with Valkey() as own:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert_rows(shop.database, 1, 500)
        own.stop(signal.SIGKILL)
        insert_rows(shop.database, 501, 1000)
        time.sleep(1)
        own.start()
        insert_rows(shop.database, 1001, 1500)
        wait_until_confirmed(shop)
        shop.worker()
        assert_handled(shop, 1, 1500)
        assert shop.end(replicate) == 0


@pytest.mark.soak  # it boots twice
def test_rabbitmq_restart_loses_nothing(make_shop):
    if not Rabbit.installed():
        from tests.conftest import missing

        missing("RabbitMQ (rabbitmq-server)")
    with Rabbit() as own:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert_rows(shop.database, 1, 100)
        own.stop()
        insert_rows(shop.database, 101, 200)
        own.start()
        insert_rows(shop.database, 201, 300)
        wait_until_confirmed(shop)
        shop.worker()
        assert_handled(shop, 1, 300)
        assert shop.end(replicate) == 0


def test_quorum_queues_deliver_everything(make_shop, rabbit):
    rabbit.empty()
    shop = make_shop(rabbit, SHOP_QUORUM="1")
    shop.replicate()
    shop.worker()
    insert_rows(shop.database, 1, 100)
    assert_handled(shop, 1, 100)


def test_replicate_can_start_before_the_broker_and_the_database(make_shop, own_postgres, database):
    shared = database.server
    database.dsn = own_postgres.dsn()
    with Valkey() as own:
        shop = make_shop(own)
        own.stop()
        own_postgres.stop()
        replicate = shop.replicate(wait=False)
        shop.until_said(replicate, "The connection to PostgreSQL failed")
        own_postgres.start()
        shop.until_said(replicate, "Replicating the slot")
        insert_rows(database, 1, 10)
        shop.until_said(replicate, "Nothing is acknowledged until it works again")
        own.start()
        shop.worker()
        assert_handled(shop, 1, 10)
        assert shop.end(replicate) == 0
    database.dsn = shared.dsn(database.name)


def test_stop_while_the_broker_is_down_ends_in_time_and_loses_nothing(make_shop):
    with Valkey() as own:
        shop = make_shop(own, SHOP_CONF='{"flash_shutdown_timeout": 2}')
        replicate = shop.replicate()
        own.stop()
        insert_rows(shop.database, 1, 10)
        shop.until_said(replicate, "Nothing is acknowledged until it works again")
        started = time.monotonic()
        assert shop.end(replicate) == 0
        assert time.monotonic() - started < 10
        own.start()
        shop.replicate()
        shop.worker()
        assert_handled(shop, 1, 10)


def test_second_signal_ends_replicate_at_once(make_shop):
    with Valkey() as own:
        shop = make_shop(own, SHOP_CONF='{"flash_shutdown_timeout": 600}')
        replicate = shop.replicate()
        insert_rows(shop.database, 1, 10)
        wait_until_confirmed(shop)  # before that, nothing is read that a signal could wait for
        own.stop()
        insert_rows(shop.database, 11, 20)
        shop.until_said(replicate, "Nothing is acknowledged until it works again")
        replicate.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert replicate.poll() is None
        assert shop.end(replicate, signal.SIGTERM, timeout=5) == -signal.SIGTERM


def test_postgresql_shuts_down_fast_while_the_broker_is_down(make_shop, own_postgres, database):
    shared = database.server
    database.dsn = own_postgres.dsn()
    with Valkey() as own:
        shop = make_shop(own, SHOP_CONF='{"flash_shutdown_timeout": 2}')
        replicate = shop.replicate()
        own.stop()
        insert_rows(database, 1, 10)
        shop.until_said(replicate, "Nothing is acknowledged until it works again")
        process = own_postgres.process
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        own_postgres.start()
        own.start()
        shop.worker()
        assert_handled(shop, 1, 10)
    database.dsn = shared.dsn(database.name)


def test_slot_follows_a_server_that_is_busy_elsewhere(shop):
    shop.replicate()
    shop.database.execute(
        "CREATE TABLE other (id int)",
        "INSERT INTO other SELECT generate_series(1, 10000)",
    )
    wait_until_confirmed(shop)


def test_broker_outage_outlasts_wal_sender_timeout(make_shop, database):
    database.execute("ALTER SYSTEM SET wal_sender_timeout = '2s'", "SELECT pg_reload_conf()")
    try:
        with Valkey() as own:
            shop = make_shop(own)
            replicate = shop.replicate()
            own.stop()
            insert_rows(database, 1, 10)
            time.sleep(5)
            log = replicate.log.read_text()
            assert "PostgreSQL failed" not in log
            own.start()
            shop.worker()
            assert_handled(shop, 1, 10)
    finally:
        database.execute("ALTER SYSTEM RESET wal_sender_timeout", "SELECT pg_reload_conf()")
