"""`flash backfill`: a handler that applies its changes ends with the state of the table."""

import json
import os
import pty
import random
import re
import select
import signal
import threading
import time
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import amqp
import psycopg
import pytest
import redis

from benchmarks.verify import body_of
from example_project.servers import wait_until
from flash_celery import UNCHANGED, Backfill, BackfillEnd, Operation, Truncate, testing
from flash_celery.backfill import plans, requests
from flash_celery.backfill.chunks import ChunkReader
from flash_celery.changes import payload
from flash_celery.cli.backfill import Progress
from flash_celery.commands import backfill_checks
from flash_celery.errors import ConfigurationError
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.lanes import marks_table
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source
from flash_celery.settings import Settings
from flash_celery.table_name import TableName
from flash_celery.worker.backfills import Backfills
from flash_celery.worker.turns import Turns
from tests.acceptance.steps import replicate_through, start_with_failpoints

DOCS = Path(__file__).parents[2] / "docs"
ROWS = 3000


@pytest.fixture
def mirrored(shop):
    """The project of `mirrored.py`, with rows whose text is kept out of line."""
    return with_rows(shop)


@pytest.fixture(params=["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)])
def any_mirrored(request):
    fixture = "shop" if request.param == "redis" else "rabbit_shop"
    return with_rows(request.getfixturevalue(fixture))


@pytest.fixture
def rabbit_shop(rabbit, make_shop):
    rabbit.empty()
    return make_shop(rabbit)


def with_rows(shop):
    shop.project = "mirrored"
    shop.database.execute(
        "ALTER TABLE items ALTER note SET STORAGE EXTERNAL",
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE keyless (id int)",
        "INSERT INTO items SELECT n, 'name ' || n, repeat(n::text, 700)"
        f" FROM generate_series(1, {ROWS}) n",
    )
    return shop


def flash(shop, *arguments, code=0):
    ran = shop.run("flash", *arguments, timeout=180)
    assert ran.returncode == code, ran.stderr + ran.stdout
    return ran.stdout + ran.stderr


def backfills(shop):
    return json.loads(flash(shop, "backfill", "list", "--json"))


def of_first(shop, column):
    """Ask the database, because the tests ask often, and a command takes a while."""
    return shop.database.one(
        f"SELECT {column} FROM flash_celery_backfills ORDER BY requested_at LIMIT 1"
    )


def state(shop):
    return of_first(shop, "state")


def rows_of(shop):
    return of_first(shop, "row_count")


def error_of(shop):
    return of_first(shop, "coalesce(error, '')")


class Consumer:
    """Takes the messages of a queue in order, as a worker would, so that there is always room."""

    def __init__(self, shop, queue="mirror"):
        self.client, self.queue = None, queue
        if shop.broker.url.startswith("redis"):
            self.client = redis.Redis.from_url(shop.broker.url)
        self.broker, self.bodies, self.ending = shop.broker, [], threading.Event()
        self.thread = threading.Thread(target=self.consume, daemon=True)

    def consume(self):
        deadline = time.monotonic() + 280
        while time.monotonic() < deadline:
            ending = self.ending.is_set()
            taken = list(self.take())
            self.bodies += taken
            if ending and not taken:
                return
            time.sleep(0 if taken else 0.01)

    def take(self):
        if self.client is not None:
            return map(body_of, self.client.rpop(self.queue, 20) or [])
        return self.take_from_rabbit()

    def take_from_rabbit(self):
        with amqp.Connection(host=f"127.0.0.1:{self.broker.port}") as connection:
            channel = connection.channel()
            with suppress(amqp.exceptions.NotFound):
                while message := channel.basic_get(self.queue, no_ack=True):
                    yield message.body

    def lose(self):
        """Have Redis lose what it has, as if nothing that was taken had been handled."""
        self.client.flushall()
        self.bodies.clear()

    def changes(self):
        """All changes, once nothing more is enqueued."""
        self.ending.set()
        self.thread.join(60)
        assert not self.thread.is_alive(), "the queue never becomes empty"
        changes = []
        for body in self.bodies:
            (argument,), _, _ = json.loads(body)
            changes += payload.decode(argument["__value__"])
        return changes

    def close(self):
        self.ending.set()
        self.thread.join(60)
        if self.client is not None:
            self.client.close()


@contextmanager
def consuming(shop, queue="mirror"):
    consumer = Consumer(shop, queue)
    consumer.thread.start()
    try:
        yield consumer
    finally:
        consumer.close()


@pytest.fixture
def consumer(mirrored):
    with consuming(mirrored) as consumer:
        yield consumer


def applied(changes):
    """What a handler has that applies the changes; it must know every value by then."""
    rows = {}
    for change in changes:
        match change.operation.names()[0]:
            case "insert":
                rows[change.key["id"]] = dict(change.new)
            case "update":
                before = rows.pop(change.old["id"] if change.old else change.key["id"], {})
                new = dict(change.new)
                for name, value in new.items():
                    if value is UNCHANGED and name in before:
                        new[name] = before[name]
                rows[change.key["id"]] = new
            case "delete":
                rows.pop(change.key["id"], None)
            case "truncate":
                rows.clear()
    return rows


def table(shop):
    with psycopg.connect(shop.database.dsn) as connection:
        rows = connection.execute("SELECT id, name, note FROM ONLY items").fetchall()
    return {row[0]: dict(zip(("id", "name", "note"), row, strict=True)) for row in rows}


def drained(shop):
    """Whether everything that was committed is on the broker."""
    end = shop.database.one("SELECT pg_current_wal_lsn()")
    reached = f"FROM pg_replication_slots WHERE active AND confirmed_flush_lsn >= '{end}'"
    # The slot is not active while one session follows another.
    count = f"SELECT count(*) {reached}"
    wait_until(lambda: shop.database.one(count), "everything to be confirmed", 60)


def test_backfill_brings_each_row_once_as_an_insert(mirrored, consumer):
    """Rows of a table that inherits belong to that one, as changes of it do."""
    mirrored.database.execute(
        "CREATE TABLE heirs () INHERITS (items)", "INSERT INTO heirs VALUES (-5, 'heir', '')"
    )
    mirrored.replicate()
    mirrored.database.execute("INSERT INTO heirs VALUES (-6, 'heir', '')")
    said = flash(mirrored, "backfill", "mirror", "--chunk", "700", "--wait")
    assert "is requested" in said
    changes = consumer.changes()
    (done,) = backfills(mirrored)
    assert done["state"] == "done"
    assert done["rows"] == ROWS
    assert applied(changes) == table(mirrored)
    assert len({change.id for change in changes}) == len(changes) == ROWS
    assert {change.backfill for change in changes} == {done["id"]}


STATEMENTS = [
    "UPDATE items SET name = name || 'x' WHERE id = %(key)s",
    "UPDATE items SET name = name || 'y' WHERE id / 9 = %(key)s / 9",
    "UPDATE items SET note = repeat('z', 2500) WHERE id = %(key)s",
    "DELETE FROM items WHERE id = %(key)s",
    "INSERT INTO items VALUES (%(key)s, 'new', repeat('n', 3000)) ON CONFLICT DO NOTHING",
    "UPDATE items SET id = %(other)s WHERE id = %(key)s"
    " AND NOT EXISTS (SELECT FROM items WHERE id = %(other)s)",
    "UPDATE items SET id = -id WHERE id = %(key)s",
]


class Writers:
    """Write to the table until the block ends: every kind of change, also of keys."""

    def __init__(self, dsn, count=3, statements=None):
        self.dsn, self.ending = dsn, threading.Event()
        self.statements = STATEMENTS if statements is None else statements
        self.threads = [
            threading.Thread(target=self.write, args=(number,)) for number in range(count)
        ]

    def write(self, number):
        chance = random.Random(number)
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            # The pause leaves time to the worker that reads this on a busy machine.
            while not self.ending.wait(0.01):
                key, other = chance.randint(1, ROWS), chance.randint(ROWS + 1, 9 * ROWS)
                statement = chance.choice(self.statements)
                try:
                    connection.execute(statement, {"key": key, "other": other})
                except (
                    psycopg.errors.UniqueViolation,
                    psycopg.errors.DeadlockDetected,
                    psycopg.errors.SerializationFailure,  # of a row that moved to another partition
                ):
                    continue

    def __enter__(self):
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join(60)


def test_backfill_of_an_ordered_handler_goes_through_its_lanes(shop):
    """With `once=` each row has its effect once, though a worker dies after the commit."""
    shop.project = "ordered"
    shop.database.execute(
        marks_table.CREATE_TABLE,
        "CREATE TABLE effects (id text)",
        "INSERT INTO items SELECT n, n, CASE n WHEN 7 THEN 'kill after' END"
        " FROM generate_series(1, 40) n",
    )
    once = {"SHOP_ENDS": "1", "SHOP_ONCE": "1"}
    conf = {"flash_backfill_ahead": 100, "flash_lane_lease": 3}
    shop.replicate(SHOP_CONF=json.dumps(conf), **once)
    shop.worker("prefork", "flash", SHOP_SLEEP="0.05", SHOP_CONF=json.dumps(conf), **once)
    said = flash(shop, "backfill", "start", "each", "--truncate", "--wait-handled")
    assert "All rows are handled" in said
    shop.database.execute("UPDATE items SET name = '41' WHERE id = 1")
    wait_until(lambda: len(shop.notes("each")) >= 86, "all rows and the update", 60)
    notes = [note for note in shop.notes("each") if note["event"] == "end"]
    first, *inserted, last = [note for note in notes if note["id"].startswith("backfill/")]
    assert (first["operation"], last["operation"]) == ("truncate", "message")
    assert sorted(note["key"]["id"] for note in inserted) == list(range(1, 41))
    assert notes[-1]["operation"] == "update"
    assert list(shop.folder.glob("notes.fixed"))  # the process was killed
    effects = [id for (id,) in shop.database.execute("SELECT id FROM effects")]
    assert sorted(effects) == sorted(note["id"] for note in notes)


@pytest.mark.soak
def test_backfill_with_a_queue_of_its_own_delays_no_change(shop):
    """Also if its handler was paused, and no worker consumes that queue yet."""
    shop.database.execute("INSERT INTO items SELECT n, n FROM generate_series(1, 30) n")
    conf = json.dumps({"flash_backfill_ahead": 100})
    worker = shop.replicate(SHOP_CONF=conf)
    shop.worker(queues="flash,cleanup")
    refused = flash(shop, "backfill", "each", "--queue", "flash.dead", code=2)
    assert "is for dead letters" in refused
    assert backfills(shop) == []
    flash(shop, "pause", "each")
    flash(shop, "backfill", "each", "--queue", "rows", "--truncate", "--wait")
    flash(shop, "resume", "each")
    shop.until_said(worker, "Moved 31 held messages")
    shop.database.execute("UPDATE items SET note = 'new' WHERE id = 7")
    (note,) = shop.until_noted(1)
    assert note["operation"] == "update"
    assert "to the queue rows, which no worker consumes" in flash(shop, "status")
    assert (
        "no worker that answers consumes rows, so backfilled rows wait there"
        in shop.run("flash", "doctor").stdout
    )
    resumed = "SELECT bool_or(obj_description(oid) ~ '\"resuming\": {}') FROM pg_publication"
    wait_until(lambda: shop.database.one(resumed), "the end of the pause to be noted", 60)
    assert "in the queue rows" in flash(shop, "wait", "--timeout", "0.1", code=1)
    shop.worker(queues="rows")
    flash(shop, "wait")
    notes = shop.notes()
    assert notes[1]["operation"] == "truncate"
    assert sorted(note["key"]["id"] for note in notes[2:]) == list(range(1, 31))
    assert all(note["id"].startswith("backfill/") for note in notes[1:])


BY_INDEX = [
    "ALTER TABLE items ALTER name SET NOT NULL",
    "CREATE UNIQUE INDEX by_name ON items (name, id)",
    "ALTER TABLE items REPLICA IDENTITY USING INDEX by_name",
]


@pytest.mark.parametrize("identity", ["default", "using index"])
def test_backfill_among_writers_ends_with_the_state_of_the_table(mirrored, consumer, identity):
    if identity == "using index":
        mirrored.database.execute(*BY_INDEX)
    mirrored.replicate()
    with Writers(mirrored.database.dsn):
        flash(mirrored, "backfill", "mirror", "--chunk", "300", "--wait")
    drained(mirrored)
    changes = consumer.changes()
    assert applied(changes) == table(mirrored)
    positions = [change.commit_lsn for change in changes]
    assert positions == sorted(positions)


def test_truncate_in_the_middle_of_a_backfill_leaves_what_was_written_since(mirrored, consumer):
    mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "500/s")
    for rows, step in ((200, 1), (400, 3)):
        wait_until(lambda rows=rows: rows_of(mirrored) >= rows, "some chunks", 60)
        mirrored.database.execute(
            "TRUNCATE items; INSERT INTO items SELECT n, 'since', repeat(n::text, 700)"
            f" FROM generate_series(1, {ROWS}, {step}) n"
        )
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    drained(mirrored)
    assert applied(consumer.changes()) == table(mirrored)


def test_backfill_into_a_queue_of_the_command_goes_on_after_kills(mirrored):
    mirrored.end(mirrored.replicate())
    flash(mirrored, "backfill", "mirror", "--queue", "rows", "--chunk", "1000")
    with consuming(mirrored, "rows") as rows:
        replicate_through(mirrored, "chunk confirmed:1", "pushed:2")
        wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
        drained(mirrored)
        changes = rows.changes()
    assert applied(changes) == table(mirrored)
    assert len(changes) == ROWS


KILLS = "chunk begun:2", "chunk rows:20", "chunk confirmed:1", "chunk recorded:1"


def test_backfill_goes_on_after_kills(any_mirrored):
    """On Redis no row is enqueued twice, on RabbitMQ at most one chunk for each kill."""
    shop, most = any_mirrored, 1000
    on_redis = shop.broker.url.startswith("redis")
    # Two pushes have a chunk of 4 MB.
    kills = ["pushed:1", "pushed:2", *KILLS] if on_redis else ["sent:3", *KILLS]
    shop.end(shop.replicate())
    flash(shop, "backfill", "mirror", "--chunk", str(5000 if on_redis else most))
    with consuming(shop) as consumer:
        replicate_through(shop, *kills)
        with Writers(shop.database.dsn, 1, STATEMENTS[:5]):  # without rows that move
            wait_until(lambda: state(shop) == "done", "the backfill", 60)
        drained(shop)
        changes = consumer.changes()
    assert applied(changes) == table(shop)
    again = [change.id for change in changes if change.backfill]
    assert len(again) - len(set(again)) <= (0 if on_redis else most * len(kills))


def test_rows_that_are_inserted_between_kills_have_none_enqueued_twice(mirrored, consumer):
    """They push others out of the chunk that is read again. Nor have a migration and a deploy."""
    mirrored.database.execute("DELETE FROM items WHERE id % 3 = 0")
    mirrored.end(mirrored.replicate())
    said = flash(mirrored, "backfill", "mirror", "--chunk", "300")
    assert "No `flash replicate` reads the changes now" in said
    inserts = "INSERT INTO items VALUES (%(key)s / 3 * 3, 'new', '') ON CONFLICT DO NOTHING"
    with Writers(mirrored.database.dsn, 2, [inserts]):
        for identity in ("FULL", "DEFAULT", "FULL"):
            process = start_with_failpoints(mirrored, "--stop", "chunk confirmed:2")
            status = Path(f"/proc/{process.pid}/stat")
            wait_until(lambda status=status: " T " in status.read_text(), "the second chunk", 60)
            mirrored.end(process, signal.SIGKILL)
            mirrored.database.execute(f"ALTER TABLE parted REPLICA IDENTITY {identity}")
        mirrored.replicate(SHOP_DEPLOYED="1")
        wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    drained(mirrored)
    changes = consumer.changes()
    assert applied(changes) == table(mirrored)
    backfilled = [change.id for change in changes if change.backfill]
    assert len(backfilled) == len(set(backfilled))


def test_backfill_begins_again_if_redis_loses_its_rows(mirrored, consumer):
    mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "1500/s")
    wait_until(lambda: rows_of(mirrored) >= 500, "some chunks", 60)
    consumer.lose()
    process = mirrored.processes[0]
    mirrored.until_said(process, "the broker has lost rows that it had confirmed")
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    drained(mirrored)
    changes, chunks = consumer.changes(), of_first(mirrored, "chunks")
    assert applied(changes) == table(mirrored)
    consumer.client.flushall()  # after its end nothing of it is read again
    mirrored.database.execute("DELETE FROM items WHERE id = 1")
    drained(mirrored)
    assert (state(mirrored), of_first(mirrored, "chunks")) == ("done", chunks)


def test_backfill_goes_on_after_its_connection_was_cut(mirrored, consumer):
    mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "1500/s")
    readers = (
        "FROM pg_stat_activity WHERE query LIKE '%flash_celery_backfill%'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    for rows in (300, 900):
        wait_until(lambda rows=rows: rows_of(mirrored) >= rows, "some chunks", 60)
        mirrored.database.execute(f"SELECT pg_terminate_backend(pid) {readers}")
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    assert backfills(mirrored)[0]["error"] is None
    drained(mirrored)
    changes = consumer.changes()
    assert applied(changes) == table(mirrored)
    assert len(changes) == len({change.id for change in changes})


def test_another_worker_takes_a_backfill_over_and_repeats_nothing(mirrored, consumer):
    """After a pause of the handler, a deploy that alters it, and the end of the first worker."""
    mirrored.replicate()
    second = mirrored.replicate(wait=False)
    mirrored.until_said(second, "waiting until it is free")
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "1500/s")
    wait_until(lambda: rows_of(mirrored) >= 500, "some chunks", 60)
    mirrored.end(mirrored.processes[0], signal.SIGKILL)
    mirrored.until_said(second, "Replicating the slot")
    wait_until(lambda: rows_of(mirrored) >= 1000, "more chunks", 60)
    flash(mirrored, "pause", "mirror")
    mirrored.database.execute("UPDATE items SET name = 'while paused' WHERE id % 10 = 0")
    wait_until(lambda: rows_of(mirrored) >= 1500, "more chunks", 60)
    flash(mirrored, "resume", "mirror")
    mirrored.end(second)
    mirrored.replicate(SHOP_DEPLOYED="1")
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    drained(mirrored)
    changes = consumer.changes()
    assert applied(changes) == table(mirrored)
    again = [change.id for change in changes if change.backfill]
    assert len(again) == len(set(again))


def test_new_handler_is_backfilled_once(mirrored, consumer):
    """Also if the worker dies, and the handler is taken out and put back."""
    backfill = {"chunk": 100, "rate": 2000, "truncate": True, "queue": "rows"}
    wish = {"SHOP_BACKFILL": json.dumps(backfill), "SHOP_ENDS": "1"}
    first = mirrored.replicate(**wish)
    wait_until(lambda: [each for each in backfills(mirrored) if each["rows"]], "a chunk", 60)
    mirrored.end(first, signal.SIGKILL)
    second = mirrored.replicate(**wish)
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    mirrored.end(second)
    mirrored.end(mirrored.replicate())
    mirrored.replicate(**wish)
    mirrored.database.execute("DELETE FROM items WHERE id = 7")
    drained(mirrored)
    (done,) = backfills(mirrored)
    with consuming(mirrored, "rows") as rows:
        backfilled = rows.changes()
    changes = [*backfilled, *consumer.changes()]
    assert applied(changes) == table(mirrored)
    assert {change.backfill for change in backfilled} == {done["id"]}
    assert [change.operation.names()[0] for change in backfilled].count("truncate") == 1
    assert isinstance(backfilled[0], Truncate)
    end = backfilled[-1]
    assert isinstance(end, BackfillEnd)
    assert (end.schema, end.table, end.rows) == ("public", "items", ROWS)
    assert [change for change in changes if not change.backfill] == changes[-1:]
    assert all(change.commit_lsn >= end.since for change in backfilled)


def test_lost_slot_is_followed_by_backfills(mirrored, consumer):
    """Also of a table whose backfill had begun: what it had read may have changed."""
    first = mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "500/s")
    wait_until(lambda: rows_of(mirrored) >= 200, "some chunks", 60)
    mirrored.end(first, signal.SIGKILL)
    slot = mirrored.database.one("SELECT slot_name FROM pg_replication_slots")
    drop = f"SELECT pg_drop_replication_slot('{slot}')"
    idle = f"SELECT active_pid IS NULL FROM pg_replication_slots WHERE slot_name = '{slot}'"
    wait_until(lambda: mirrored.database.one(idle), "the slot to be free", 30)
    mirrored.database.execute(
        drop, "UPDATE items SET name = 'lost' WHERE id < 50", "DELETE FROM items WHERE id = 51"
    )
    conf = json.dumps({"flash_on_lost_slot": "backfill"})
    second = mirrored.replicate(SHOP_CONF=conf, SHOP_ENDS="1")
    mirrored.until_said(second, "public.keyless is not backfilled for mirrored.keyless")
    wait_until(
        lambda: (
            [each["state"] for each in backfills(mirrored) if each["handler"] == "mirrored.mirror"]
            == ["stopped", "done"]
        ),
        "the backfill",
        60,
    )
    changes = consumer.changes()
    end = changes[-1]
    assert isinstance(end, BackfillEnd)
    kept = [change for change in changes if change.commit_lsn >= end.since]
    assert applied(kept) == table(mirrored)


def test_backfill_waits_for_a_transaction_that_was_open_before(mirrored, consumer):
    mirrored.replicate()
    with (
        psycopg.connect(mirrored.database.dsn) as connection,
        psycopg.connect(mirrored.database.dsn) as other,
    ):
        connection.execute("INSERT INTO items VALUES (-1, 'open', 'before')")
        other.tpc_begin("prepared")
        other.execute("INSERT INTO items VALUES (-3, 'prepared', 'before')")
        other.tpc_prepare()
        flash(mirrored, "backfill", "mirror")
        wait_until(lambda: "older transaction" in error_of(mirrored), "the wait", 60)
        mirrored.database.execute("UPDATE items SET name = 'meantime' WHERE id = 7")
        drained(mirrored)  # changes do not wait for it
        connection.execute("INSERT INTO items VALUES (-2, 'open', 'after')")
        connection.commit()
        wait_until(lambda: "prepared" in error_of(mirrored), "the wait", 60)
        other.tpc_commit()
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    drained(mirrored)
    assert applied(consumer.changes()) == table(mirrored)


def test_backfill_waits_for_a_transaction_that_was_open_when_its_table_was_published(mirrored):
    """What it wrote before is not in the stream, and not visible yet."""
    mirrored.end(mirrored.replicate())
    mirrored.database.execute("CREATE TABLE late (id int PRIMARY KEY, name text, note text)")
    with psycopg.connect(mirrored.database.dsn) as connection, consuming(mirrored) as consumer:
        connection.execute("INSERT INTO late VALUES (1, 'before', '')")
        mirrored.environment["SHOP_LATE"] = "1"
        mirrored.replicate()
        flash(mirrored, "backfill", "mirror", "--table", "late")
        wait_until(lambda: "older transaction" in error_of(mirrored), "the wait", 60)
        connection.execute("INSERT INTO late VALUES (2, 'after', '')")
        connection.commit()
        wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
        drained(mirrored)
        assert applied(consumer.changes()).keys() == {1, 2}


def test_vacuum_removes_what_is_deleted_during_a_backfill(mirrored, consumer):
    mirrored.database.execute("CREATE TABLE others AS SELECT n FROM generate_series(1, 1000) n")
    mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "25", "--rate", "25/s")
    wait_until(lambda: rows_of(mirrored) >= 50, "some chunks", 60)
    mirrored.database.execute("DELETE FROM others")

    def vacuumed():
        mirrored.database.execute("VACUUM others")
        return mirrored.database.one("SELECT pg_relation_size('others') = 0")

    wait_until(vacuumed, "VACUUM to remove the rows", 30)
    assert state(mirrored) == "running"


def test_backfill_is_paused_resumed_and_stopped(mirrored, consumer):
    mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "500/s")
    (under_way,) = backfills(mirrored)
    wait_until(lambda: rows_of(mirrored) >= 200, "some chunks", 60)
    assert "backfill   public.items for mirrored.mirror: running" in flash(mirrored, "status")
    (shown,) = json.loads(flash(mirrored, "status", "--json"))["backfills"]
    assert shown["id"] == under_way["id"]
    assert "is paused" in flash(mirrored, "backfill", "pause", under_way["id"])
    others = "FROM pg_locks WHERE relation = 'items'::regclass AND pid <> pg_backend_pid()"
    wait_until(lambda: mirrored.database.one(f"SELECT count(*) = 0 {others}"), "no lock", 60)
    refused = flash(mirrored, "backfill", "mirror", code=2)
    assert f"stop it by `flash backfill stop {under_way['id']}`" in refused
    assert "goes on" in flash(mirrored, "backfill", "resume", under_way["id"])
    wait_until(lambda: rows_of(mirrored) >= 400, "more chunks", 60)
    mirrored.database.execute(f"UPDATE items SET id = -id WHERE id > {ROWS // 2}")
    drained(mirrored)
    assert "is stopped" in flash(mirrored, "backfill", "stop", under_way["id"])
    assert mirrored.database.one("SELECT count(*) FROM flash_celery_backfill_moves") == 0
    assert "is stopped" in flash(mirrored, "backfill", "resume", under_way["id"], code=2)
    flash(mirrored, "backfill", "mirror", "--wait")
    drained(mirrored)
    assert applied(consumer.changes()) == table(mirrored)


def test_backfill_that_stands_still_holds_up_no_other_and_goes_on(mirrored):
    """Also after a deploy without its handler, and one that brings it back.

    Redis knows the rows of the last chunks only, and those are of the other by then.
    """
    mirrored.database.execute(*PARTED)
    conf = json.dumps({"flash_backfill_ahead": 40})
    worker = mirrored.replicate(SHOP_CONF=conf)
    flash(mirrored, "backfill", "mirror", "--chunk", "100")
    with consuming(mirrored, "parted"):
        flash(mirrored, "backfill", "parted", "--wait")
    still, other = backfills(mirrored)
    assert (still["state"], still["rows"], other["rows"]) == ("running", 2000, 1604)
    why = "handled what is in mirror (flash_backfill_ahead: 40)"
    wait_until(lambda: error_of(mirrored).endswith(why), "the reason", 60)
    assert other["chunks"] > 60
    mirrored.end(worker)
    worker = mirrored.replicate(SHOP_GONE="1")
    wait_until(lambda: backfills(mirrored)[0]["state"] == "paused", "a pause", 60)
    listed = flash(mirrored, "backfill", "list")
    assert "goes on when mirrored.mirror is one again" in listed
    assert "resume" not in listed
    mirrored.end(worker)
    mirrored.replicate(SHOP_CONF=conf)
    with consuming(mirrored) as consumer:
        wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
        drained(mirrored)
        changes = consumer.changes()
    assert applied(changes) == table(mirrored)
    assert len({change.id for change in changes}) == len(changes)


def test_row_that_moves_while_the_backfill_is_paused_is_delivered_whole(mirrored, consumer):
    """PostgreSQL does not send its text, and the cursor has passed its new key."""
    first = mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "500/s")
    wait_until(lambda: rows_of(mirrored) >= 200, "some chunks", 60)
    (under_way,) = backfills(mirrored)
    flash(mirrored, "backfill", "pause", under_way["id"])
    mirrored.end(first, signal.SIGKILL)
    mirrored.replicate()
    mirrored.database.execute(
        f"UPDATE items SET id = -id WHERE id > {ROWS // 2}",
        "UPDATE items SET id = id - 1000000 WHERE id % 3 = 0 AND id < 0",
    )
    drained(mirrored)
    flash(mirrored, "backfill", "resume", under_way["id"])
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    drained(mirrored)
    assert applied(consumer.changes()) == table(mirrored)


@pytest.mark.soak
def test_backfill_goes_on_after_an_alter_that_no_write_follows(mirrored, consumer):
    mirrored.replicate()
    mirrored.database.execute("UPDATE items SET name = 'first' WHERE id = 1")
    flash(mirrored, "backfill", "mirror", "--chunk", "500", "--rate", "1000/s")
    wait_until(lambda: rows_of(mirrored) >= 500, "a chunk", 60)
    mirrored.database.execute(
        "UPDATE items SET name = 'last' WHERE id IN (1, 2999)",
        "ALTER TABLE items ADD COLUMN added int DEFAULT 7",
    )
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    found = applied(consumer.changes())
    assert {key: row["name"] for key, row in found.items()} == {
        key: row["name"] for key, row in table(mirrored).items()
    }
    assert found[2999]["added"] == 7


@pytest.mark.soak
def test_backfill_begins_again_if_the_key_of_its_table_changes(mirrored, consumer):
    """Also if the keys of rows that have moved are of the type before."""
    process = mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "2000/s")
    wait_until(lambda: rows_of(mirrored) >= 300, "some chunks", 60)
    mirrored.database.execute(
        "INSERT INTO flash_celery_backfill_moves (backfill, table_oid, keys)"
        """ SELECT id, 'items'::regclass, '[{"id": "no number"}]' FROM flash_celery_backfills"""
    )
    mirrored.until_said(process, "its key has another type than before")
    wait_until(lambda: rows_of(mirrored) >= 600, "more chunks", 60)
    mirrored.database.execute(
        "UPDATE items SET name = 'before' WHERE id % 100 = 0",
        *BY_INDEX,
        "UPDATE items SET name = 'after', id = -id WHERE id % 1000 = 1",
    )
    wait_until(lambda: state(mirrored) == "done", "the backfill", 60)
    drained(mirrored)
    assert applied(consumer.changes()) == table(mirrored)


def test_changes_go_on_if_the_tables_of_backfills_are_damaged(mirrored, consumer):
    process = mirrored.replicate()
    flash(mirrored, "backfill", "mirror", "--chunk", "100", "--rate", "100/s")
    wait_until(lambda: rows_of(mirrored) >= 100, "a chunk", 60)
    mirrored.database.execute("ALTER TABLE flash_celery_backfills DROP COLUMN progress")
    for number in (-1, -2):
        mirrored.database.execute(f"INSERT INTO items VALUES ({number}, 'new', '')")
        drained(mirrored)
    mirrored.until_said(process, "Backfills are not done")
    mirrored.database.execute(
        "DROP TABLE flash_celery_backfill_moves", f"UPDATE items SET id = -3 WHERE id = {ROWS}"
    )
    mirrored.until_said(process, "the rows that move cannot be recorded")
    drained(mirrored)
    assert process.poll() is None
    assert applied(consumer.changes()).keys() >= {-1, -2, -3}


def test_keys_are_compared_by_the_operators_of_their_type(mirrored):
    """Those of text would be found, if the schema of citext is not in search_path."""
    mirrored.database.execute(
        "CREATE SCHEMA elsewhere",
        "CREATE EXTENSION citext SCHEMA elsewhere",
        'CREATE TABLE "Wor ds" ("the Key" elsewhere.citext PRIMARY KEY, n int)',
        """INSERT INTO "Wor ds" SELECT CASE n % 2 WHEN 0 THEN 'a' ELSE 'B' END || n, n
           FROM generate_series(1, 60) n""",
    )
    with closing(connect(mirrored.database.dsn)) as connection:
        reader = ChunkReader(connection, TableName("public", "Wor ds"))
        cursor, found = None, []
        for _ in range(20):
            chunk = reader.read(cursor, 7)
            found += chunk.rows
            cursor = chunk.cursor or cursor
            if chunk.is_last:
                break
    assert len(found) == len(set(found)) == 60


def test_plan_refuses_what_the_role_may_not_read(database, new_app):
    """The error has the SQL that grants it, and nothing is recorded; `flash doctor` reports it."""
    database.execute(
        "DROP ROLE IF EXISTS reader",
        "CREATE ROLE reader LOGIN",
        "CREATE TABLE secret (id int PRIMARY KEY, name text)",
        "CREATE TABLE hidden (id int PRIMARY KEY)",
        "ALTER TABLE hidden ENABLE ROW LEVEL SECURITY",
        "CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (9)",
        "GRANT SELECT ON hidden, parts TO reader",
    )
    subscriptions = [
        Subscription("h", TableName("public", name), backfill=Backfill())
        for name in ("secret", "hidden", "parts", "nothing")
    ]
    sentences = [
        "may not read id, name of public.secret: GRANT SELECT ON public.secret TO",
        'rows of public.hidden from this role; let it see all: ALTER ROLE "reader" BYPASSRLS',
        "may not read id of public.parts_1: GRANT SELECT ON public.parts_1 TO",
        "There is no table public.nothing.",
    ]
    dsn = psycopg.conninfo.make_conninfo(database.dsn, user="reader")
    with closing(connect(dsn)) as connection:
        source = Source(connection, Settings(flash_dsn=dsn))
        for each, sentence in zip(subscriptions, sentences, strict=True):
            with pytest.raises(ConfigurationError, match=re.escape(sentence)):
                plans.plan(source, subscriptions, "h", each.table)
        found = list(backfill_checks.findings(source, subscriptions))
        assert not requests.all_of(source)
    assert all(text in each.message for text, each in zip(sentences, found, strict=True))
    database.execute("DROP OWNED BY reader", "DROP ROLE reader")


def test_two_requests_at_once_are_one_backfill(database):
    """A new handler may start while `flash backfill` requests its rows."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    subscription = Subscription("h", TableName("public", "t"))
    refused = []
    with closing(connect(database.dsn)) as first, closing(connect(database.dsn)) as second:
        one, other = (Source(each, Settings(flash_dsn=database.dsn)) for each in (first, second))
        requests.request(one, [requests.Draft("h", "public.other", None, 1, 1)])

        def ask():
            try:
                plans.start(other, plans.plan(other, [subscription], "h"))
            except ConfigurationError as error:
                refused.append(str(error))

        thread = threading.Thread(target=ask)
        with first.transaction():
            plans.start(one, plans.plan(one, [subscription], "h"))
            thread.start()
            waiting = (
                "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            )
            wait_until(lambda: database.one(waiting), "the second to wait", 30)
        thread.join(30)
    assert "of public.t for h is requested; stop it by" in refused[0]


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        show = Progress()
        for state, rows in (("running", 0), ("running", 300), ("running", 600), ("done", 900)):
            show(described(state, rows))
        shown = ""
        while "900/900" not in shown:
            assert select.select([master], [], [], 10)[0], shown
            shown += os.read(master, 10_000).decode()
    os.close(master)
    assert "public.items" in shown
    assert "600/1,000" in shown
    assert "\x1b[?25l" not in shown  # the cursor would stay hidden after Ctrl-C
    assert "rows/s" in shown


def test_progress_is_a_line_a_minute_elsewhere(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    show = Progress()
    for clock[0], rows in ((0.0, 300), (59.0, 400), (60.0, 600)):
        show(described("running", rows))
    first, second = capsys.readouterr().err.splitlines()
    assert "300 of about 1,000 rows" in first
    assert "600 of about 1,000 rows" in second


def described(state, rows):
    now = datetime.now(timezone.utc)
    times = now - timedelta(seconds=rows / 100 + 1), None, now
    counts = 500, 1000, *times, 2, rows
    return requests.RequestedBackfill(
        "b", "s", "h", "public.items", state, None, *counts, {}, None, None
    )


def test_worker_says_that_it_may_not_use_the_tables_of_backfills(database, caplog):
    database.execute(
        requests.CREATE,
        requests.CREATE_MOVES,
        "DROP ROLE IF EXISTS poor",
        "CREATE ROLE poor",
        "GRANT SELECT ON flash_celery_backfills TO poor",
    )
    with closing(connect(database.dsn)) as connection:
        connection.execute("SET ROLE poor")
        source = SimpleNamespace(connection=connection, slot="s")
        backfills = Backfills(source, [], Turns(), lambda *_: None)
        backfills.observe(SimpleNamespace(message=None))
        backfills.begin()
        backfills.start(lambda: None, None)
        assert not backfills.take_turns()
    database.execute("DROP OWNED BY poor", "DROP ROLE poor")
    (record,) = caplog.records
    assert "GRANT SELECT, INSERT, UPDATE, DELETE ON" in record.getMessage()


def test_backfill_of_a_part_reads_the_rows_that_match(mirrored, consumer):
    """However few match, a chunk looks at few rows; a Truncate or an end would be wrong."""
    mirrored.replicate(SHOP_ENDS="1")
    part = ["--where", "id__between=[10, 2500]", "--where", "name__startswith=name 25"]
    flash(mirrored, "backfill", "mirror", *part, "--chunk", "500", "--wait")
    (done,) = backfills(mirrored)
    assert done["chunks"] == 7 + 1
    expected = {25, *range(250, 260), 2500}
    changes = consumer.changes()
    assert {change.key["id"] for change in changes} == expected
    assert done["rows"] == len(changes) == len(expected)


PARTED = [
    "ALTER TABLE parted ADD note text",
    "ALTER TABLE parted ALTER note SET STORAGE EXTERNAL",
    "CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (-10000) TO (1000)",
    "CREATE TABLE parted_empty PARTITION OF parted FOR VALUES FROM (1000) TO (2000)",
    "CREATE TABLE parted_middle PARTITION OF parted FOR VALUES FROM (2000) TO (3000)"
    " PARTITION BY RANGE (id)",
    "CREATE TABLE parted_leaf PARTITION OF parted_middle FOR VALUES FROM (2000) TO (3000)",
    "CREATE TABLE parted_gone PARTITION OF parted FOR VALUES FROM (3000) TO (4000)",
    "CREATE TABLE parted_rest PARTITION OF parted DEFAULT",
    "INSERT INTO parted SELECT n, repeat(n::text, 700) FROM unnest(ARRAY[1, 2000, 3000, 5000]) AS"
    " first, generate_series(first, first + 400) AS n",
]
PARTED_WRITES = [
    "UPDATE parted SET note = repeat('z', 2500) WHERE id = %(key)s",
    "UPDATE parted SET id = %(other)s WHERE id = %(key)s"
    " AND NOT EXISTS (SELECT FROM parted WHERE id = %(other)s)",
    "UPDATE parted SET id = -id WHERE id = %(key)s AND id < 1000",
    "DELETE FROM parted WHERE id = %(key)s",
    "INSERT INTO parted VALUES (%(key)s, repeat('n', 3000)) ON CONFLICT DO NOTHING",
]


def test_backfill_reads_the_leaves_of_a_partitioned_table(mirrored):
    """Among writers that move rows between them, while one is dropped and one is made."""
    mirrored.database.execute(*PARTED)
    with closing(Consumer(mirrored, "parted")) as consumer:
        consumer.thread.start()
        mirrored.replicate(SHOP_ENDS="1")
        with Writers(mirrored.database.dsn, 2, PARTED_WRITES):
            flash(mirrored, "backfill", "parted", "--truncate", "--chunk", "100", "--rate", "800/s")
            wait_until(lambda: rows_of(mirrored) >= 200, "some chunks", 60)
            mirrored.database.execute(
                "DROP TABLE parted_gone",
                "CREATE TABLE parted_new PARTITION OF parted FOR VALUES FROM (90000) TO (91000)",
                "INSERT INTO parted VALUES (90001, 'new')",
            )
            wait_until(lambda: state(mirrored) == "done", "the backfill", 120)
        drained(mirrored)
        changes = consumer.changes()
    backfilled = [change for change in changes if change.backfill]
    assert (backfilled[0].operation, backfilled[0].partition) == (Operation.TRUNCATE, None)
    assert {f"public.{name}" for name in ("parted_low", "parted_leaf", "parted_rest")} <= {
        change.partition for change in backfilled
    }
    with psycopg.connect(mirrored.database.dsn) as connection:
        rows = connection.execute("SELECT id, note FROM parted").fetchall()
    found = {key: row["note"] for key, row in applied(changes).items()}
    # No DELETE tells of the rows of a partition that is dropped.
    assert {key: found[key] for key in found if not 3000 <= key < 4000} == {
        key: note for key, note in rows if not 3000 <= key < 4000
    }


def test_backfill_refuses_what_it_cannot_do(mirrored):
    mirrored.replicate()
    for arguments, sentence in {
        ("added",): "is on insert of public.items without update",
        ("keyless",): "public.keyless has no primary key",
        ("mirror", "--table", "parted"): "is no handler of public.parted",
        ("nothing",): "nothing",
        ("mirror", "--rate", "fast"): "'fast' is not a rate",
        ("mirror", "--where", "id"): "takes a lookup such as status=paid",
        ("mirror", "--where", "id__in=5"): "id__in takes a list of values",
        ("mirror", "--where", "id__in=["): "id__in takes JSON, such as [1, 2]",
        ("mirror", "--where", "id=x"): "invalid input syntax for type integer",
        ("mirror", "--where", "sum=5"): "--where names sum, no column of public.items",
        ("mirror", "--where", "name__icontains=x"): "__icontains is evaluated by the replication",
        ("mirror", "--where", "id=1", "--truncate"): "A Truncate removes also what --where",
    }.items():
        assert sentence in flash(mirrored, "backfill", *arguments, code=2), arguments
    assert backfills(mirrored) == []
    mirrored.database.execute("ANALYZE items")
    dry = flash(mirrored, "backfill", "mirror", "--where", "id__lte=300", "--dry-run")
    (rows,) = re.findall(r"about (\d+) rows", dry)
    assert 250 < int(rows) < 350
    dry = flash(mirrored, "backfill", "mirror", "--dry-run", "--rate", "100/s")
    assert f"{ROWS:,} rows" in dry
    assert "at this rate" in dry
    assert backfills(mirrored) == []


def example(name, app):
    text = (DOCS / "howto/backfill.md").read_text()
    (code,) = re.findall(rf"<!-- run: {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    names = {"app": app}
    exec(code, names)
    return names


def test_copy_loses_what_was_deleted_before_the_backfill(app):
    names = example("backfill end", app)
    handler, copy = names["keep_copy"], names["copy"]
    for id, lsn in ((1, "0/10"), (2, "0/20"), (3, "0/30")):
        at = testing.transaction(commit_lsn=lsn)
        handler(testing.insert("orders", id=id, status="new", transaction=at))
    handler(testing.backfill_end("orders", since="0/20"))
    assert copy.keys() == {2, 3}
    handler(testing.truncate("orders"))
    assert not copy


def test_example_of_the_page_tells_rows_that_were_there(app, capsys):
    names = example("backfill", app)
    names["search_index"](testing.insert("orders", {"id": 1}, backfill="b1"))
    names["search_index"](testing.insert("orders", {"id": 2}))
    assert capsys.readouterr().out == "put 1 (it was there)\nput 2 (it is new)\n"
