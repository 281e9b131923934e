"""SIGKILL at every step of the replication worker's work: nothing lost, order kept, equal ids."""

import itertools
import json
import random
import signal
import threading
import time

import psutil
import psycopg
import pytest
import redis

from example_project.servers import wait_until
from tests.acceptance.steps import (
    broker_failpoints,
    insert_rows,
    replicate_through,
    start_with_failpoints,
    wait_until_confirmed,
)
from tests.acceptance.writer import Writer, assert_writes_enqueued_once, assert_writes_handled

WORK = ("read", "publish", "half a push", "half a frame", "pushed", "sent", "confirmed")
ACKNOWLEDGING = ("acknowledge", "acknowledged")


def test_sigkill_at_every_step_of_the_work_loses_nothing(any_shop):
    shop = any_shop
    shop.end(shop.replicate())
    with Writer(shop.database, pause=0.05) as writer:
        last = replicate_through(
            shop, *broker_failpoints(shop, *(f"{name}:2" for name in (*WORK, *ACKNOWLEDGING)))
        )
    wait_until_confirmed(shop)
    assert_writes_enqueued_once(shop, writer)
    shop.worker()
    assert_writes_handled(shop, writer)
    assert shop.end(last) == 0


@pytest.mark.soak  # as test_slot.py and test_exactly_once.py do it in short
def test_owner_stopped_while_publishing_sends_at_most_what_it_had_begun(any_shop):
    """Another one takes over; what the first was handing over may still arrive, where the broker
    cannot refuse it, and nothing else."""
    shop = any_shop
    on_redis = shop.broker.url.startswith("redis")
    shop.end(shop.replicate())
    first = start_with_failpoints(shop, "--stop", "half a push:2" if on_redis else "half a frame:2")
    shop.until_said(first, "Replicating the slot")
    second = shop.replicate(wait=False)
    shop.until_said(second, "waiting until it is free")
    insert_rows(shop.database, 1, 100)
    if on_redis:  # where one push may hold everything that has been read
        wait_until_confirmed(shop)
    insert_rows(shop.database, 101, 200)
    wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, "it to stop")
    shop.until_said(second, "Replicating the slot")
    insert_rows(shop.database, 201, 300)
    wait_until_confirmed(shop)
    first.send_signal(signal.SIGCONT)
    shop.until_said(first, "waiting until it is free")
    insert_rows(shop.database, 301, 310)
    wait_until_confirmed(shop)
    if on_redis:
        with redis.Redis.from_url(shop.broker.url) as client:
            assert client.llen("flash") == 310
    shop.worker()
    notes = shop.until_noted(310)
    handled = dict.fromkeys((note["new"]["id"], note["id"], note["task_id"]) for note in notes)
    assert [number for number, *_ in handled] == list(range(1, 311))
    assert shop.end(second) == 0


TABLES = ("items", "bare", "measures")
KINDS = (
    "CREATE TABLE bare (id int, name text)",
    "CREATE TABLE measures (id int, name text, PRIMARY KEY (id, name)) PARTITION BY RANGE (id)",
    "CREATE TABLE measures_1 PARTITION OF measures FOR VALUES FROM (0) TO (1000000)",
)


def test_sigkill_after_every_statement_of_the_start_is_recovered(shop):
    """Publications, identities, the slot, and the note of it: the application can always write."""
    shop.database.execute(*KINDS)
    shop.environment |= {"SHOP_ALSO": "bare,measures", "SHOP_WHERE": "1"}
    steps = "statement done:1+", "slot created:1", "slot noted:1", "started:1"
    with Writer(shop.database, TABLES) as writer:
        last = replicate_through(shop, *steps)
        assert last.log.read_text().count("Killed at statement done") > 6
        since = len(writer.changes)
    wait_until_confirmed(shop)
    shop.worker()
    notes = until_all(shop, writer.changes[-1])
    handled = list(dict.fromkeys((note["operation"], note["key"]["id"]) for note in notes))
    for queue in ({"insert", "update"}, {"delete"}):
        handled_of_queue = [change for change in handled if change[0] in queue]
        wanted = [change for change in writer.changes if change[0] in queue]
        # From the slot's creation on, which was before the last one started, without a gap.
        assert handled_of_queue == wanted[-len(handled_of_queue) :]
        assert len(handled_of_queue) >= len(
            [change for change in writer.changes[since:] if change[0] in queue]
        )


@pytest.mark.soak
def test_sigkill_after_every_statement_of_recreating_a_slot_is_recovered(shop):
    """There is one gap, it has an end, and the changes after its end are delivered."""
    shop.environment["SHOP_CONF"] = json.dumps({"flash_on_lost_slot": "recreate"})
    shop.end(shop.replicate())
    shop.database.execute(f"SELECT pg_drop_replication_slot('{shop.database.slot}')")
    steps = "statement done:1", "slot created:1", "slot noted:1", "statement:1", "started:1"
    with Writer(shop.database) as writer:
        last = replicate_through(shop, *steps)
        since = len(writer.changes)
        wait_until(lambda: len(writer.changes) > since + 10, "more changes")
    wait_until_confirmed(shop)
    shop.worker()
    notes = until_all(shop, writer.changes[-1])
    handled = dict.fromkeys((note["operation"], note["key"]["id"]) for note in notes)
    handled = [change for change in handled if change[0] != "delete"]
    wanted = [change for change in writer.changes if change[0] != "delete"]
    assert handled == wanted[-len(handled) :]
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


def test_sigkill_while_a_transaction_is_spooled_loses_nothing(shop):
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
        replicate_through(shop, "spool:2", "spooled:3", "replayed:1", "replayed:2", "confirmed:1")
    finally:
        ending.set()
        thread.join(60)
    assert not thread.is_alive()
    wait_until_confirmed(shop)
    shop.worker(queues="batches")
    count = next(rows) - 1
    notes = shop.until_noted(count, "many", timeout=120)
    ids = dict.fromkeys((note["new"]["id"], note["id"]) for note in notes)
    assert [row for row, _ in ids] == list(range(1, count + 1))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
def test_sigkill_again_and_again_loses_nothing(any_shop, seed):
    shop, dice = any_shop, random.Random(seed)
    shop.end(shop.replicate())
    failpoints = broker_failpoints(
        shop, *(f"{name}:{n}" for name in (*WORK, *ACKNOWLEDGING) for n in range(1, 9))
    )
    dice.shuffle(failpoints)
    with Writer(shop.database, pause=0.1) as writer:
        last = replicate_through(shop, *failpoints)
    wait_until_confirmed(shop)
    assert_writes_enqueued_once(shop, writer)
    shop.worker()
    assert_writes_handled(shop, writer)
    assert shop.end(last) == 0
