"""Tasks in transactions survive the death of every process; those of rolled back ones never run."""

import json
import random
import shutil
import signal
import subprocess
import sys
from contextlib import closing

import psutil
import pytest
import redis
from kombu import Connection
from psycopg.conninfo import make_conninfo

from example_project.servers import Postgres, wait_until
from flash_celery.changes import payload
from tests.acceptance.steps import wait_until_confirmed
from tests.processes import start_logged_python

#: Orders that each writer writes.
ORDERS = 250


def start_writer(shop, number):
    command = [sys.executable, "-m", "carried", str(number * 10_000 + 1), str(ORDERS)]
    log = shop.folder / f"writer-{number}.log"
    process = start_logged_python(command, log, shop.environment)
    shop.processes.append(process)
    return process


def enqueued(shop):
    """Return the ids of the tasks in the queue, and their arguments, in order."""
    tasks = []
    with Connection(shop.broker.url) as connection, closing(connection.channel()) as channel:
        while (message := channel.basic_get("celery", no_ack=True)) is not None:
            headers = channel.message_to_python(message).headers
            body = json.loads(channel.message_to_python(message).body)
            tasks.append((headers["id"], body[0][0]))
    return tasks


def assert_each_order_has_its_task(shop, once):
    """Compare the tasks with the orders, which were written in the same transactions."""
    wait_until_confirmed(shop)
    tasks = enqueued(shop)
    distinct = list(dict.fromkeys(tasks))
    committed = [row for (row,) in shop.database.execute("SELECT id FROM items")]
    assert sorted(number for _, number in distinct) == sorted(committed)
    assert len({task_id for task_id, _ in distinct}) == len(distinct)
    if once:
        assert tasks == distinct
        for first in {abs(number) // 10_000 for number in committed}:
            written = [n for _, n in tasks if abs(n) // 10_000 == first]
            assert [abs(n) for n in written] == sorted(map(abs, written))


def kill_and_compare(shop, rounds):
    """Kill the application, the replication worker and the broker in the middle of writing."""
    chance = random.Random(1)
    replicate = shop.replicate()
    for number in rounds:
        writer = start_writer(shop, number)
        reached = f"SELECT max(id) > {number * 10_000 + chance.randrange(20, 200)} FROM items"
        wait_until(lambda: shop.database.one(reached), "orders")  # noqa: B023
        if number % 2:
            shop.end(writer, signal.SIGKILL)
        shop.end(replicate, signal.SIGKILL)
        replicate = shop.replicate()
        if number == 2:
            shop.broker.stop(signal.SIGKILL)
            shop.broker.start()
        writer.wait(60)
        assert writer.returncode == (-signal.SIGKILL if number % 2 else 0), writer.log.read_text()
    assert_each_order_has_its_task(shop, once=shop.broker.url.startswith("redis"))


def test_killed_applications_and_replication_workers_lose_no_task(shop):
    shop.project = "carried"
    kill_and_compare(shop, [1, 2])


def test_transactions_of_a_pooler_carry_their_tasks(shop, pooler):
    """PgBouncer gives each transaction another connection of its own, of those to PostgreSQL."""
    shop.project = "carried"
    replicate = shop.replicate()
    shop.environment["SHOP_DSN"] = make_conninfo(shop.database.dsn, port=pooler)
    writers = [start_writer(shop, number) for number in range(2)]
    for writer in writers:
        assert writer.wait(60) == 0, writer.log.read_text()
    assert_each_order_has_its_task(shop, once=True)
    assert shop.end(replicate) == 0


@pytest.mark.soak
def test_many_killed_processes_lose_no_task(any_shop):
    any_shop.project = "carried"
    kill_and_compare(any_shop, range(1, 9))


@pytest.mark.soak
def test_tasks_that_redis_has_lost_are_enqueued_again(shop):
    shop.project = "carried"
    conf = {"flash_on_lost_broker": "refill", "flash_replay_window": 3600}
    shop.environment["SHOP_CONF"] = json.dumps(conf)
    replicate = shop.replicate()
    writer = start_writer(shop, 1)
    with redis.Redis(port=shop.broker.port) as client:
        wait_until(lambda: client.llen("celery") > 50, "tasks")
        client.flushall()
    assert writer.wait(60) == 0
    second = start_writer(shop, 2)
    assert second.wait(60) == 0
    shop.until_said(replicate, "changes again, committed from")
    assert_each_order_has_its_task(shop, once=False)


@pytest.fixture
def shop_with_a_server(make_shop, database, valkey):
    """A shop whose PostgreSQL may fail."""
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    with Postgres(fsync="on", max_prepared_transactions=10) as server:
        database.server, shared = server, database.server
        database.dsn = server.dsn()
        shop = make_shop(valkey)
        shop.project = "carried"
        yield shop
        database.server, database.dsn = shared, shared.dsn(database.name)


def limit_files(server, size):
    """Let no file of a server grow beyond a size, as if the disk were full (EFBIG for ENOSPC)."""
    main = psutil.Process(server.process.pid)
    for process in (main, *main.children()):
        command = ["prlimit", "--pid", str(process.pid), f"--fsize={size}:"]
        # A process may have ended since.
        subprocess.run(command, cwd="/", timeout=60, **server.as_user)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_full_disk_of_postgresql_undoes_the_tasks_of_the_transactions_that_it_undoes(
    shop_with_a_server,
):
    shop = shop_with_a_server
    server = shop.database.server
    replicate = shop.replicate()
    writer = start_writer(shop, 1)
    wait_until(lambda: shop.database.one("SELECT count(*) > 20 FROM items"), "orders")
    # A file of the WAL is longer from the beginning, so PostgreSQL ends.
    limit_files(server, 4 << 20)
    assert writer.wait(60) == 1
    assert "\npsycopg." in writer.log.read_text()
    server.stop(signal.SIGQUIT)
    server.start()
    assert start_writer(shop, 2).wait(60) == 0
    assert_each_order_has_its_task(shop, once=True)
    assert shop.end(replicate) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["fast", "kill"])
@pytest.mark.soak
def test_prepared_transaction_keeps_its_tasks_when_everything_restarts(shop_with_a_server, number):
    shop = shop_with_a_server
    server = shop.database.server
    replicate = shop.replicate()
    command = [sys.executable, "-m", "carried", "prepare"]
    writer = start_logged_python(command, shop.folder / "prepare.log", shop.environment)
    assert writer.wait(60) == 0, writer.log.read_text()
    shop.end(replicate, signal.SIGKILL)
    server.stop(number)
    server.start()
    shop.replicate()
    wait_until_confirmed(shop)
    assert enqueued(shop) == []
    shop.database.execute("COMMIT PREPARED 'kept'", "ROLLBACK PREPARED 'dropped'")
    wait_until_confirmed(shop)
    assert [number for _, number in enqueued(shop)] == [1]


def waiting(shop):
    """Return how many messages are in the queue."""
    with Connection(shop.broker.url) as connection, closing(connection.channel()) as channel:
        try:
            return channel.queue_declare("flash", passive=True).message_count
        except connection.channel_errors:  # it does not exist yet
            return 0


def parts_of(shop):
    """Return the messages in the queue: task id, part, and the keys of its rows."""
    found = []
    with Connection(shop.broker.url) as connection, closing(connection.channel()) as channel:
        while (message := channel.basic_get("flash", no_ack=True)) is not None:
            message = channel.message_to_python(message)
            value = json.loads(message.body)[0][0]["__value__"]
            keys = [change.new["id"] for change in payload.decode(value)]
            found.append((message.headers["id"], value["part"], keys))
    return found


@pytest.mark.soak
def test_parts_of_a_transaction_come_again_with_their_ids(any_shop):
    shop, rows = any_shop, 25_000
    shop.project = "whole"
    replicate = shop.replicate()
    for first in (1, 100_001):
        before = waiting(shop)
        series = f"generate_series({first}, {first + rows - 1})"
        shop.database.execute(f"INSERT INTO items (id) SELECT * FROM {series}")
        wait_until(lambda: waiting(shop) > before, "a part")  # noqa: B023
        shop.end(replicate, signal.SIGKILL)
        replicate = shop.replicate()
    wait_until_confirmed(shop)
    parts = parts_of(shop)
    distinct = {task_id: (part, keys) for task_id, part, keys in parts}
    assert all(distinct[task_id] == (part, keys) for task_id, part, keys in parts)
    assert sorted(part for part, _ in distinct.values()) == sorted([[0, 0], [1, 0], [2, 1]] * 2)
    keys = sorted(key for _, keys in distinct.values() for key in keys)
    assert keys == [first + n for first in (1, 100_001) for n in range(rows)]
    if shop.broker.url.startswith("redis"):
        assert len(parts) == len(distinct)
