"""SIGKILL at every step of the replication worker's work: nothing lost, order kept, equal ids."""

import itertools
import json
import random
import signal
import sys
import threading
import time

import psutil
import psycopg
import pytest
import redis

from example_project.servers import wait_until
from tests.acceptance.test_faults import confirmed, insert


class Writer:
    """An application that writes all the time, and whose statements must never fail or wait.

    `changes` are what it has committed, in order.
    """

    def __init__(self, database, tables=("items",), pause=0.02):
        self.database = database
        self.tables = tables
        self.pause = pause
        self.changes = []
        self.error = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exit_):
        self.stop()

    def stop(self):
        self._ending.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def _run(self):
        try:
            with self.database.connect() as connection:
                connection.execute("SET lock_timeout = '10s'")
                for number in itertools.count(1):
                    if self._ending.wait(self.pause):
                        break
                    self._write(connection, number)
        except psycopg.Error as error:
            self.error = error

    def _write(self, connection, number):
        for table in self.tables:
            written = [("insert", number), ("update", number)]
            statements = [
                f"INSERT INTO {table} VALUES ({number}, 'a')",
                f"UPDATE {table} SET name = 'b' WHERE id = {number}",
            ]
            if number % 5 == 0:
                written.append(("delete", number))
                statements.append(f"DELETE FROM {table} WHERE id = {number}")
            if number % 3 == 0:
                with connection.transaction():
                    for statement in statements:
                        connection.execute(statement)
            else:
                for statement in statements:
                    connection.execute(statement)
            if table == self.tables[0]:
                self.changes += written


def handled(shop, writer, handler="each", since=0):
    """Every change since then was handled, each queue's in order, a repeated one under its id."""
    wanted = writer.changes[since:]
    notes = shop.until_noted(len(wanted), handler, timeout=300)
    told = {}
    for note in notes:
        change = note["operation"], note["key"]["id"]
        assert told.setdefault(change, (note["id"], note["task_id"])) == (
            note["id"],
            note["task_id"],
        )
    for queue in ({"insert", "update"}, {"delete"}):
        assert [change for change in told if change[0] in queue] == [
            change for change in wanted if change[0] in queue
        ]


def enqueued_once(shop, writer):
    """On Redis nothing is twice, whatever the step at which the process was killed."""
    if shop.broker.url.startswith("redis"):
        with redis.Redis.from_url(shop.broker.url) as client:
            assert client.llen("flash") + client.llen("cleanup") == len(writer.changes)


def start(shop, *failpoints):
    command = shop.command
    shop.command = lambda *arguments: [
        *(sys.executable, "-m", "tests.acceptance.failpoints", *failpoints, "--", "-A", "shop"),
        *arguments,
    ]
    try:
        return shop.start("flash", "replicate")
    finally:
        shop.command = command


def through(shop, *failpoints):
    """Start replication workers that are killed at these steps; the last one is alive."""
    process = start(shop, *failpoints)
    shop.until_said(process, "The last one", timeout=600)
    last = process.log.read_text().rindex("The last one")

    def replicating():
        return "Replicating the slot" in process.log.read_text()[last:]

    deadline = time.monotonic() + 60
    while not replicating():
        assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.05)
    for failpoint in failpoints:
        assert f"Killed at {failpoint}" in process.log.read_text(), failpoint
    return process


def of(shop, *failpoints):
    """Those of the shop's broker."""
    others = {"sent", "half a frame"}
    if shop.broker.url.startswith("amqp"):
        others = {"pushed", "half a push"}
    return [one for one in failpoints if one.partition(":")[0] not in others]


WORK = ("read", "publish", "half a push", "half a frame", "pushed", "sent", "confirmed")
ACKNOWLEDGING = ("acknowledge", "acknowledged")


def test_a_sigkill_at_every_step_of_the_work(any_shop):
    shop = any_shop
    shop.end(shop.replicate())
    with Writer(shop.database, pause=0.05) as writer:
        last = through(shop, *of(shop, *(f"{name}:2" for name in (*WORK, *ACKNOWLEDGING))))
    confirmed(shop)
    enqueued_once(shop, writer)
    shop.worker()
    handled(shop, writer)
    assert shop.end(last) == 0


@pytest.mark.soak  # as test_slot.py and test_exactly_once.py do it in short
def test_an_owner_that_was_stopped_in_the_middle_of_publishing(any_shop):
    """Another one takes over; what the first was handing over may still arrive, where the broker
    cannot refuse it, and nothing else."""
    shop = any_shop
    on_redis = shop.broker.url.startswith("redis")
    shop.end(shop.replicate())
    first = start(shop, "--stop", "half a push:2" if on_redis else "half a frame:2")
    shop.until_said(first, "Replicating the slot")
    second = shop.replicate(wait=False)
    shop.until_said(second, "waiting until it is free")
    insert(shop.database, 1, 100)
    if on_redis:  # where one push may hold everything that has been read
        confirmed(shop)
    insert(shop.database, 101, 200)
    wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, "it to stop")
    shop.until_said(second, "Replicating the slot")
    insert(shop.database, 201, 300)
    confirmed(shop)
    first.send_signal(signal.SIGCONT)
    shop.until_said(first, "waiting until it is free")
    insert(shop.database, 301, 310)
    confirmed(shop)
    if on_redis:
        with redis.Redis.from_url(shop.broker.url) as client:
            assert client.llen("flash") == 310
    shop.worker()
    notes = shop.until_noted(310)
    told = dict.fromkeys((note["new"]["id"], note["id"], note["task_id"]) for note in notes)
    assert [number for number, *_ in told] == list(range(1, 311))
    assert shop.end(second) == 0


TABLES = ("items", "bare", "measures")
KINDS = (
    "CREATE TABLE bare (id int, name text)",
    "CREATE TABLE measures (id int, name text, PRIMARY KEY (id, name)) PARTITION BY RANGE (id)",
    "CREATE TABLE measures_1 PARTITION OF measures FOR VALUES FROM (0) TO (1000000)",
)


def test_a_sigkill_after_every_statement_of_the_start(shop):
    """Publications, identities, the slot, and the note of it: the application can always write."""
    shop.database.execute(*KINDS)
    shop.environment |= {"SHOP_ALSO": "bare,measures", "SHOP_WHERE": "1"}
    steps = "statement done:1+", "slot created:1", "slot noted:1", "started:1"
    with Writer(shop.database, TABLES) as writer:
        last = through(shop, *steps)
        assert last.log.read_text().count("Killed at statement done") > 6
        since = len(writer.changes)
    confirmed(shop)
    shop.worker()
    notes = until_all(shop, writer.changes[-1])
    told = list(dict.fromkeys((note["operation"], note["key"]["id"]) for note in notes))
    for queue in ({"insert", "update"}, {"delete"}):
        found = [change for change in told if change[0] in queue]
        wanted = [change for change in writer.changes if change[0] in queue]
        # From the slot's creation on, which was before the last one started, without a gap.
        assert found == wanted[-len(found) :]
        assert len(found) >= len(
            [change for change in writer.changes[since:] if change[0] in queue]
        )


@pytest.mark.soak
def test_a_sigkill_after_every_statement_of_making_a_lost_slot_anew(shop):
    """There is one gap, it has an end, and what comes after its end is told."""
    shop.environment["SHOP_CONF"] = json.dumps({"flash_on_lost_slot": "recreate"})
    shop.end(shop.replicate())
    shop.database.execute(f"SELECT pg_drop_replication_slot('{shop.database.slot}')")
    steps = "statement done:1", "slot created:1", "slot noted:1", "statement:1", "started:1"
    with Writer(shop.database) as writer:
        last = through(shop, *steps)
        since = len(writer.changes)
        wait_until(lambda: len(writer.changes) > since + 10, "more changes")
    confirmed(shop)
    shop.worker()
    notes = until_all(shop, writer.changes[-1])
    told = dict.fromkeys((note["operation"], note["key"]["id"]) for note in notes)
    told = [change for change in told if change[0] != "delete"]
    wanted = [change for change in writer.changes if change[0] != "delete"]
    assert told == wanted[-len(told) :]
    status = json.loads(shop.run("flash", "status", "--json").stdout)
    (gap,) = status["gaps"]
    assert gap["reason"] == "dropped"
    assert gap["until"] is not None
    assert shop.end(last) == 0


def until_all(shop, last):
    """The notes of items, once the last change is among them and no more come."""
    deadline = time.monotonic() + 120
    while True:
        count = len(shop.notes())
        notes = [note for note in shop.notes() if note["table"] == "items"]
        if any((note["operation"], note["key"]["id"]) == last for note in notes):
            time.sleep(1)
            if len(shop.notes()) == count:
                return notes
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_sigkill_while_a_transaction_is_spooled_and_replayed(shop):
    options = "-c logical_decoding_work_mem=64kB"
    dsn = psycopg.conninfo.make_conninfo(shop.database.dsn, options=options)
    shop.environment |= {
        "SHOP_DSN": dsn,
        "SHOP_BATCH": "only",
        "SHOP_CONF": json.dumps({"flash_use_streaming": True}),
    }
    shop.end(shop.replicate())
    ending = threading.Event()
    rows = itertools.count(1)

    def write():
        """Transactions that stay open for a while, with a savepoint that is rolled back."""
        with shop.database.connect() as connection:
            while not ending.is_set():
                with connection.transaction():
                    for _ in range(2):
                        connection.cursor().executemany(
                            "INSERT INTO items VALUES (%s, 'a', repeat('x', 100))",
                            [(next(rows),) for _ in range(1000)],
                        )
                        ending.wait(0.2)
                    with connection.transaction(force_rollback=True):
                        connection.execute(
                            "INSERT INTO items SELECT -n FROM generate_series(1, 500) AS n"
                        )

    thread = threading.Thread(target=write)
    thread.start()
    try:
        through(shop, "spool:2", "spooled:3", "replayed:1", "replayed:2", "confirmed:1")
    finally:
        ending.set()
        thread.join(60)
    assert not thread.is_alive()
    confirmed(shop)
    shop.worker(queues="batches")
    count = next(rows) - 1
    notes = shop.until_noted(count, "many", timeout=120)
    ids = dict.fromkeys((note["new"]["id"], note["id"]) for note in notes)
    assert [row for row, _ in ids] == list(range(1, count + 1))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
def test_many_sigkills(any_shop, seed):
    shop, dice = any_shop, random.Random(seed)
    shop.end(shop.replicate())
    failpoints = of(shop, *(f"{name}:{n}" for name in (*WORK, *ACKNOWLEDGING) for n in range(1, 9)))
    dice.shuffle(failpoints)
    with Writer(shop.database, pause=0.1) as writer:
        last = through(shop, *failpoints)
    confirmed(shop)
    enqueued_once(shop, writer)
    shop.worker()
    handled(shop, writer)
    assert shop.end(last) == 0
