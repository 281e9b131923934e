"""A broker that is down, full, blocked, or has lost a queue: nothing is acknowledged meanwhile."""

import contextlib
import json
import signal
import time

import pytest
import redis

from example_project.servers import Rabbit, Valkey, wait_until
from tests.acceptance.test_faults import confirmed, handled, insert
from tests.conftest import missing

FAILS = "Nothing is acknowledged until it works again"


def position(shop):
    return shop.database.one(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots "
        f"WHERE slot_name = '{shop.database.slot}'"
    )


@contextlib.contextmanager
def nothing_acknowledged(shop):
    """What is written inside is not acknowledged inside."""
    # What is for nobody moves the slot until the first change waits.
    first = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")
    yield
    behind = f"SELECT '{position(shop)}'::pg_lsn <= '{first}'"
    assert shop.database.one(behind)


@pytest.mark.parametrize("seconds", [3, pytest.param(180, marks=pytest.mark.soak)])
def test_a_broker_that_is_down_for_minutes(make_shop, seconds):
    with Valkey() as own:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert(shop.database, 1, 100)
        confirmed(shop)
        with nothing_acknowledged(shop):
            own.stop(signal.SIGKILL)
            insert(shop.database, 101, 1000)
            shop.until_said(replicate, FAILS)
            time.sleep(seconds)
            found = json.loads(shop.run("flash", "status", "--json").stdout)
            assert "refused" in found["broker_error"]
            assert found["slot"]["active"]
            assert found["slot"]["lag_bytes"] > 50_000
            assert replicate.poll() is None
        # Said at once, and then with the first attempt after each minute.
        times = replicate.log.read_text().count(FAILS)
        assert 1 + seconds // 80 <= times <= 1 + seconds // 60
        own.start()
        confirmed(shop)
        shop.worker()
        handled(shop, 1, 1000)
        assert shop.end(replicate) == 0


def test_a_redis_that_is_full(make_shop):
    with Valkey(**{"maxmemory-policy": "noeviction"}) as own, redis.Redis(port=own.port) as client:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert(shop.database, 1, 100)
        confirmed(shop)
        client.config_set("maxmemory", 1)
        with nothing_acknowledged(shop):
            insert(shop.database, 101, 200)
            shop.until_said(replicate, "command not allowed when used memory")
            time.sleep(1)
        client.config_set("maxmemory", 0)
        confirmed(shop)
        shop.worker()
        handled(shop, 1, 200)
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
def test_an_alarm_of_rabbitmq(rabbit_shop, rabbit, short_of, rows):
    """It is waited for, and said once; not taken for a dead connection again and again."""
    shop = rabbit_shop
    shop.environment["SHOP_BATCH"] = "1"
    shop.environment["SHOP_CONF"] = json.dumps({"flash_status_interval": 1})
    replicate = shop.replicate()
    insert(shop.database, 1, 10)
    confirmed(shop)
    with alarm(rabbit, *short_of), nothing_acknowledged(shop):
        insert(shop.database, 11, rows, per_transaction=1000)
        shop.until_said(replicate, "has blocked publishing")
        time.sleep(5)  # as long as a broker that says nothing has twice over
        log = replicate.log.read_text()
    shop.until_said(replicate, "takes messages again")
    # One connection, for what fits into its buffers; where more was being sent, another.
    assert log.count("has blocked publishing") <= 2
    assert log.count(FAILS) <= (0 if rows == 100 else 1)
    confirmed(shop)
    shop.worker(queues="batches")
    notes = shop.until_noted(rows, "many", timeout=120)
    order = dict.fromkeys((note["new"]["id"], note["id"]) for note in notes)
    assert [row for row, _ in order] == list(range(1, rows + 1))
    assert shop.end(replicate) == 0


def test_a_queue_that_is_deleted_is_declared_again(rabbit_shop, rabbit):
    """Its messages went with it, by somebody's own hand; what comes after is not lost."""
    shop = rabbit_shop
    replicate = shop.replicate()
    insert(shop.database, 1, 10)
    confirmed(shop)
    rabbit.control("delete_queue", "flash")
    insert(shop.database, 11, 100)
    shop.until_said(replicate, "The broker has no queue flash")
    confirmed(shop)
    shop.worker()
    handled(shop, 11, 100)
    assert shop.end(replicate) == 0


def test_a_queue_that_refuses_messages_until_it_has_room(rabbit_shop, rabbit):
    """basic.nack: each is published again until it is taken, and none overtakes it."""
    shop = rabbit_shop
    limit = json.dumps({"max-length": 20, "overflow": "reject-publish"})
    rabbit.control("set_policy", "--apply-to", "queues", "short", "^flash$", limit)
    try:
        replicate = shop.replicate()
        with nothing_acknowledged(shop):
            insert(shop.database, 1, 100, per_transaction=100)
            shop.until_said(replicate, "its queue has no room")
        shop.worker()
        _, order = handled(shop, 1, 100)
        assert order == list(range(1, 101))
        confirmed(shop)
        assert shop.end(replicate) == 0
    finally:
        rabbit.control("clear_policy", "short")


@pytest.mark.soak
def test_a_sigkill_of_rabbitmq(make_shop):
    if not Rabbit.installed():
        missing("RabbitMQ (rabbitmq-server)")
    with Rabbit() as own:
        shop = make_shop(own)
        replicate = shop.replicate()
        insert(shop.database, 1, 100)
        confirmed(shop)
        own.stop(signal.SIGKILL)
        insert(shop.database, 101, 200)
        shop.until_said(replicate, FAILS)
        own.start()
        insert(shop.database, 201, 300)
        confirmed(shop)
        shop.worker()
        handled(shop, 1, 300)
        assert shop.end(replicate) == 0


class Sentinel(Valkey):
    """Watches a Valkey and its replica, and promotes the replica."""

    def __init__(self, primary):
        super().__init__()
        self.primary = primary

    @property
    def command(self):
        configuration = self.folder / "sentinel.conf"
        configuration.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor shop 127.0.0.1 {self.primary.port} 1\n"
            "sentinel down-after-milliseconds shop 1000\n"
            "sentinel failover-timeout shop 5000\n"
        )
        return [*super().command[:1], str(configuration), "--sentinel"]

    @property
    def url(self):
        return f"sentinel://127.0.0.1:{self.port}/0"


@pytest.mark.soak
def test_a_failover_through_sentinel(make_shop):
    replicated = {
        "min-replicas-to-write": 1,
        "min-replicas-max-lag": 2,
        "repl-diskless-sync-delay": 0,
    }
    with (
        Valkey(**replicated) as primary,
        Valkey(replicaof=f"127.0.0.1 {primary.port}") as replica,
        redis.Redis(port=primary.port) as client,
        redis.Redis(port=replica.port) as other,
    ):
        wait_until(lambda: client.info("replication")["connected_slaves"], "the replica")
        wait_until(
            lambda: other.info("replication")["master_link_status"] == "up", "the replica to be fed"
        )
        with Sentinel(primary) as sentinel:
            shop = make_shop(sentinel)
            options = {"master_name": "shop"}
            shop.environment["SHOP_CONF"] = json.dumps({"broker_transport_options": options})
            with redis.Redis(port=sentinel.port) as watching:
                wait_until(lambda: watching.sentinel_slaves("shop"), "Sentinel to know the replica")
            replicate = shop.replicate()
            insert(shop.database, 1, 100)
            confirmed(shop)
            # Replication is asynchronous; this is about what has arrived.
            client.wait(1, 5000)
            with nothing_acknowledged(shop):
                primary.stop(signal.SIGKILL)
                insert(shop.database, 101, 200)
                shop.until_said(replicate, FAILS)
            wait_until(lambda: other.info("replication")["role"] == "master", "the promotion")
            # It has no replica any more, and would refuse writes as the old one did.
            other.config_set("min-replicas-to-write", 0)
            confirmed(shop)
            shop.worker()
            handled(shop, 1, 200)
            assert shop.end(replicate) == 0
