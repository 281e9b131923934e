"""Nothing is acknowledged while a broker is down, full, blocked or without a queue."""

import contextlib
import json
import signal
import time

import pytest
import redis

from example_project.servers import Rabbit, Valkey, wait_until
from flash_celery.changes import payload
from tests.acceptance.steps import assert_handled, insert_rows, wait_until_confirmed
from tests.conftest import missing
from tests.sentinel import OPTIONS, Replicated

FAILS = "Nothing is acknowledged until it works again"


def position(shop):
    return shop.database.one(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots "
        f"WHERE slot_name = '{shop.database.slot}'"
    )


@contextlib.contextmanager
def nothing_acknowledged(shop):
    """Check that changes written in the block are not acknowledged within it."""
    # Changes without a handler advance the slot until the first change waits.
    first = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")
    yield
    behind = f"SELECT '{position(shop)}'::pg_lsn <= '{first}'"
    assert shop.database.one(behind)


@pytest.mark.parametrize("seconds", [3, pytest.param(180, marks=pytest.mark.soak)])
def test_broker_outage_of_minutes_loses_nothing(make_shop, seconds):
    with Valkey() as own:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert_rows(shop.database, 1, 100)
        wait_until_confirmed(shop)
        with nothing_acknowledged(shop):
            own.stop(signal.SIGKILL)
            insert_rows(shop.database, 101, 1000)
            shop.until_said(replicate, FAILS)
            time.sleep(seconds)
            status = json.loads(shop.run("flash", "status", "--json").stdout)
            assert "refused" in status["broker_error"]
            assert status["slot"]["active"]
            assert status["slot"]["lag_bytes"] > 50_000
            assert replicate.poll() is None
        # Said at once, and then with the first attempt after each minute.
        times = replicate.log.read_text().count(FAILS)
        assert 1 + seconds // 80 <= times <= 1 + seconds // 60
        own.start()
        wait_until_confirmed(shop)
        shop.worker()
        assert_handled(shop, 1, 1000)
        assert shop.end(replicate) == 0


def test_redis_that_is_full_loses_nothing(make_shop):
    with Valkey(**{"maxmemory-policy": "noeviction"}) as own, redis.Redis(port=own.port) as client:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert_rows(shop.database, 1, 100)
        wait_until_confirmed(shop)
        client.config_set("maxmemory", 1)
        with nothing_acknowledged(shop):
            insert_rows(shop.database, 101, 200)
            shop.until_said(replicate, "command not allowed when used memory")
            time.sleep(1)
        client.config_set("maxmemory", 0)
        wait_until_confirmed(shop)
        shop.worker()
        assert_handled(shop, 1, 200)
        assert shop.end(replicate) == 0


@pytest.fixture
def rabbit_shop(make_shop, rabbit):
    rabbit.empty()
    return make_shop(rabbit)


MEMORY = "set_vm_memory_high_watermark", "0.0000001", "0.4"
DISK = "set_disk_free_limit", "1000000000000000", "50000000"


@contextlib.contextmanager
def alarm(rabbit, limit, full, free):
    rabbit.control(limit, full)
    try:
        yield
    finally:
        rabbit.control(limit, free)


@pytest.mark.parametrize(
    ("short_of", "rows"),
    [
        (MEMORY, 100),
        pytest.param(MEMORY, 20_000, marks=pytest.mark.soak),
        pytest.param(DISK, 100, marks=pytest.mark.soak),
    ],
    ids=["memory", "memory, many", "disk"],
)
def test_rabbitmq_alarm_loses_nothing(rabbit_shop, rabbit, short_of, rows):
    """It is waited for, and said once; not taken for a dead connection again and again."""
    shop = rabbit_shop
    shop.environment["SHOP_BATCH"] = "1"
    shop.environment["SHOP_CONF"] = json.dumps({"flash_status_interval": 1})
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 10)
    wait_until_confirmed(shop)
    with alarm(rabbit, *short_of), nothing_acknowledged(shop):
        insert_rows(shop.database, 11, rows, per_transaction=1000)
        shop.until_said(replicate, "has blocked publishing")
        time.sleep(5)  # as long as a broker that says nothing has twice over
        log = replicate.log.read_text()
    shop.until_said(replicate, "takes messages again")
    # One connection, for what fits into its buffers; where more was being sent, another.
    assert log.count("has blocked publishing") <= 2
    assert log.count(FAILS) <= (0 if rows == 100 else 1)
    wait_until_confirmed(shop)
    shop.worker(queues="batches")
    notes = shop.until_noted(rows, "many", timeout=120)
    order = dict.fromkeys((note["new"]["id"], note["id"]) for note in notes)
    assert [row for row, _ in order] == list(range(1, rows + 1))
    assert shop.end(replicate) == 0


def test_deleted_queue_is_declared_again(rabbit_shop, rabbit):
    """The queue was deleted by hand, with its messages; later ones are not lost."""
    shop = rabbit_shop
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 10)
    wait_until_confirmed(shop)
    rabbit.control("delete_queue", "flash")
    insert_rows(shop.database, 11, 100)
    shop.until_said(replicate, "The broker has no queue flash")
    wait_until_confirmed(shop)
    shop.worker()
    assert_handled(shop, 11, 100)
    assert shop.end(replicate) == 0


def test_queue_that_refuses_messages_is_retried_until_it_has_room(rabbit_shop, rabbit):
    """basic.nack: each is published again until it is taken, and none overtakes it."""
    shop = rabbit_shop
    limit = json.dumps({"max-length": 20, "overflow": "reject-publish"})
    rabbit.control("set_policy", "--apply-to", "queues", "short", "^flash$", limit)
    try:
        replicate = shop.replicate()
        with nothing_acknowledged(shop):
            insert_rows(shop.database, 1, 100, per_transaction=100)
            shop.until_said(replicate, "its queue has no room")
        shop.worker()
        _, order = assert_handled(shop, 1, 100)
        assert order == list(range(1, 101))
        wait_until_confirmed(shop)
        assert shop.end(replicate) == 0
    finally:
        rabbit.control("clear_policy", "short")


@pytest.mark.soak
def test_rabbitmq_sigkill_loses_nothing(make_shop):
    if not Rabbit.installed():
        missing("RabbitMQ (rabbitmq-server)")
    with Rabbit() as own:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert_rows(shop.database, 1, 100)
        wait_until_confirmed(shop)
        own.stop(signal.SIGKILL)
        insert_rows(shop.database, 101, 200)
        shop.until_said(replicate, FAILS)
        own.start()
        insert_rows(shop.database, 201, 300)
        wait_until_confirmed(shop)
        shop.worker()
        assert_handled(shop, 1, 300)
        assert shop.end(replicate) == 0


@pytest.mark.soak
def test_sentinel_failover_loses_nothing(make_shop):
    with Replicated(**{"min-replicas-to-write": 1, "min-replicas-max-lag": 2}) as own:
        shop = make_shop(own)
        shop.environment["SHOP_CONF"] = json.dumps({"broker_transport_options": OPTIONS})
        replica = own.replica
        replicate = shop.replicate()
        insert_rows(shop.database, 1, 100)
        wait_until_confirmed(shop)
        with nothing_acknowledged(shop):
            own.kill()
            insert_rows(shop.database, 101, 200)
            shop.until_said(replicate, FAILS)
        wait_until(lambda: own.port == replica.port, "the promotion")
        with redis.Redis(port=replica.port) as client:
            # It has no replica any more, and would refuse writes as the old one did.
            client.config_set("min-replicas-to-write", 0)
        wait_until_confirmed(shop)
        shop.worker()
        assert_handled(shop, 1, 200)
        assert shop.end(replicate) == 0


@pytest.mark.soak
def test_sentinel_coordinated_failover_loses_nothing(make_shop):
    """The primary takes no more writes until the replica has them all: nothing can be lost."""
    with Replicated() as own:
        shop = make_shop(own)
        shop.environment["SHOP_CONF"] = json.dumps({"broker_transport_options": OPTIONS})
        replicate = shop.replicate()
        for first in (1, 2001, 4001):
            mend = own.hand_over()
            insert_rows(shop.database, first, first + 1999)
            mend()
        wait_until_confirmed(shop)
        with redis.Redis(port=own.port) as client:
            bodies = [json.loads(raw)["body"] for raw in client.lrange("flash", 0, -1)][::-1]
        changes = [payload.decode(json.loads(body)[0][0]["__value__"])[0] for body in bodies]
        # In order, and none twice.
        assert [change.new["id"] for change in changes] == list(range(1, 6001))
        assert shop.end(replicate) == 0


@pytest.mark.soak
def test_rabbitmq_that_waits_no_longer_for_a_handler_stops_no_worker(make_shop):
    """It closes the worker's channel after a minute here, and gives the task to a worker again."""
    if not Rabbit.installed():
        missing("RabbitMQ (rabbitmq-server)")
    with Rabbit("consumer_timeout = 60000") as own:
        shop = make_shop(own, SHOP_CONF=json.dumps({"broker_channel_error_retry": True}))
        worker = shop.worker("prefork", options=("-c", "4"))
        shop.replicate()
        shop.database.execute("INSERT INTO items VALUES (1, 'wait and fail')")
        shop.until_said(worker, "PRECONDITION_FAILED - delivery acknowledgement", 180)
        insert_rows(shop.database, 2, 3)
        shop.until_noted(2)
        (shop.folder / "notes.go").touch()
        shop.until_said(worker, "is a dead letter now", 60)
        assert shop.end(worker) == 0
