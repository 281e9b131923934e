"""A full queue keeps the backlog in the WAL, and no process runs out of memory."""

import json
import re
import signal
import time

import amqp
import pytest
import redis
from celery import Celery

from example_project.servers import Valkey, wait_until
from flash_celery.commands import broker_checks
from flash_celery.settings import Settings
from tests.acceptance.steps import assert_handled, insert_rows, wait_until_confirmed

LIMIT = 500


def limited(shop, limit, **conf):
    shop.environment["SHOP_CONF"] = json.dumps({"flash_max_queue_length": limit, **conf})


class RedisQueue:
    """The queue `flash` of a Redis, read as slowly as one likes."""

    def __init__(self, broker):
        self._client = redis.Redis(port=broker.port)

    def depth(self):
        return self._client.llen("flash")

    def take(self, count):
        return [json.loads(json.loads(m)["body"]) for m in self._client.rpop("flash", count) or ()]

    def close(self):
        memory = self._client.info("memory")
        assert memory["used_memory_peak"] < memory["maxmemory"]
        assert "errorstat_OOM" not in self._client.info("errorstats")
        self._client.close()


class RabbitQueue:
    """The same of a RabbitMQ."""

    def __init__(self, broker):
        self._connection = amqp.Connection(host=f"127.0.0.1:{broker.port}")
        self._connection.connect()
        self._channel = self._connection.channel()

    def depth(self):
        return self._channel.queue_declare("flash", passive=True).message_count

    def take(self, count):
        taken = [self._channel.basic_get("flash", no_ack=True) for _ in range(count)]
        return [json.loads(message.body) for message in taken if message is not None]

    def close(self):
        self._connection.close()


@pytest.fixture(params=["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)])
def small_broker(request):
    """A broker with little memory, and what looks into its queue."""
    if request.param == "redis":
        with Valkey(maxmemory="8mb", appendfsync="no") as own:
            yield own, RedisQueue
    else:
        rabbit = request.getfixturevalue("rabbit")
        rabbit.empty()
        yield rabbit, RabbitQueue


@pytest.mark.parametrize(
    "rows", [15_000, pytest.param(1_000_000, marks=pytest.mark.soak)], ids=["15k", "1M"]
)
def test_large_update_cannot_fill_the_broker(make_shop, small_broker, rows):
    broker, kind = small_broker
    shop = make_shop(broker)
    limited(shop, LIMIT)
    shop.database.execute(f"INSERT INTO items SELECT n, 'a' FROM generate_series(1, {rows}) AS n")
    replicate = shop.replicate()
    shop.database.execute("UPDATE items SET name = 'b'")
    shop.until_said(replicate, "Paused:")
    queue = kind(broker)
    taken = 0
    while taken < rows:
        wait_until(queue.depth, "a message")
        assert queue.depth() <= LIMIT
        taken += len(queue.take(LIMIT // 5))
    wait_until_confirmed(shop)
    assert (taken, queue.depth()) == (rows, 0)
    queue.close()
    assert shop.end(replicate) == 0


@pytest.mark.soak
def test_slow_handlers_have_a_short_queue(any_shop):
    shop = any_shop
    limited(shop, 50)
    shop.environment["SHOP_SLEEP"] = "0.005"
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 200)
    shop.until_said(replicate, "50 messages wait in the queue flash")
    status = shop.run("flash", "status").stdout
    assert re.search(r"flash +50 waiting, at most 50: full, reading is paused", status), status
    shop.worker()
    _, order = assert_handled(shop, 1, 200)
    assert order == list(range(1, 201))
    shop.until_said(replicate, "The queue is shorter again; publishing continues")
    assert shop.end(replicate) == 0


def test_stop_with_a_full_queue_ends_in_time_and_loses_nothing(shop):
    limited(shop, 10, flash_shutdown_timeout=2)
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 100)
    shop.until_said(replicate, "Paused:")
    started = time.monotonic()
    assert shop.end(replicate) == 0
    assert time.monotonic() - started < 10
    shop.replicate()
    shop.worker()
    assert_handled(shop, 1, 100)


@pytest.mark.soak
def test_full_queue_outlasts_wal_sender_timeout(shop, database):
    database.execute("ALTER SYSTEM SET wal_sender_timeout = '2s'", "SELECT pg_reload_conf()")
    try:
        limited(shop, 10)
        replicate = shop.replicate()
        insert_rows(database, 1, 100)
        shop.until_said(replicate, "Paused:")
        time.sleep(5)
        log = replicate.log.read_text()
        assert "PostgreSQL failed" not in log
        assert log.count("Paused:") == 1
        shop.worker()
        assert_handled(shop, 1, 100)
        assert shop.end(replicate) == 0
    finally:
        database.execute("ALTER SYSTEM RESET wal_sender_timeout", "SELECT pg_reload_conf()")


def test_full_queue_that_is_deleted_is_declared_again(make_shop, rabbit):
    rabbit.empty()
    shop = make_shop(rabbit)
    limited(shop, 10)
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 15, per_transaction=1)
    shop.until_said(replicate, "Paused:")
    with amqp.Connection(host=f"127.0.0.1:{rabbit.port}") as connection:
        connection.channel().queue_delete("flash")
    shop.until_said(replicate, "no queue flash")
    # The messages in a deleted queue are lost; the rest arrives.
    wait_until_confirmed(shop)
    shop.worker()
    notes = shop.until_noted(5)
    assert [note["new"]["id"] for note in notes] == list(range(11, 16))
    assert shop.end(replicate, signal.SIGTERM) == 0


def test_doctor_warns_that_redis_can_run_out_of_memory():
    with Valkey(maxmemory="64mb") as own:
        app = Celery("shop", broker=own.url, set_as_current=False)
        findings = {
            limit: [
                finding.message
                for finding in broker_checks.findings(
                    app, Settings(flash_max_queue_length=limit), []
                )
                if finding.subject == "broker memory"
            ]
            for limit in (0, 1000)
        }
    assert "maxmemory is 67108864 bytes" in findings[0][0]
    assert findings[1000] == []
