"""Redis loses what it had confirmed, and `flash_on_lost_broker = "refill"` enqueues it again."""

import json
import re
import signal
import threading
from contextlib import closing, contextmanager

import pytest
import redis

from example_project.servers import wait_until
from flash_celery.postgres.source import publication_names
from flash_celery.postgres.stream import ReplicationConnection
from tests.acceptance.steps import insert_rows, wait_until_confirmed

STARTED = "Enqueuing the changes again that were committed from"
ENDED = "changes again, committed from"
COMMENT = (
    "SELECT obj_description(oid, 'pg_publication') FROM pg_publication "
    "WHERE pubname = 'flash_publication_truncate'"
)


def conf(**settings):
    return {
        "SHOP_CONF": json.dumps(
            {"flash_on_lost_broker": "refill", "flash_replay_window": 3600, **settings}
        )
    }


@pytest.fixture
def refilling(shop):
    shop.environment |= conf()
    return shop


@pytest.fixture
def valkey_client(shop):
    with redis.Redis(port=shop.broker.port) as client:
        yield client


def log(process):
    return process.log.read_text()


def until_handled(shop, last, handler="each"):
    wanted = set(range(1, last + 1))
    try:
        wait_until(
            lambda: {note["key"]["id"] for note in shop.notes(handler)} >= wanted,
            f"the changes up to {last}",
            90,
        )
    except TimeoutError as error:
        raise AssertionError(f"{error}: " + "\n".join(map(log, shop.processes))) from None


def assert_same_ids(shop):
    """Each change has one id and one task id, however often it was enqueued."""
    found = {(note["id"], note["task_id"], note["key"]["id"]) for note in shop.notes()}
    assert len(found) == len({note["key"]["id"] for note in shop.notes()})


def recorded(shop):
    """The record of the replay slot."""
    return json.loads(shop.database.one(COMMENT))["flash_celery_history"]


def enqueue(shop, first, last):
    """Enqueue changes with no worker that would handle them."""
    replicate = shop.replicate()
    insert_rows(shop.database, first, last)
    wait_until_confirmed(shop)
    return replicate


def test_flushall_in_the_middle_of_a_load_ends_with_every_change_handled(refilling, valkey_client):
    shop = refilling
    shop.environment["SHOP_BATCH"] = "1"
    replicate = shop.replicate()
    writer = threading.Thread(target=insert_rows, args=(shop.database, 1, 1000))
    writer.start()
    wait_until(lambda: valkey_client.llen("flash") > 100, "a backlog")
    shop.worker()
    shop.until_noted(50)
    valkey_client.flushall()
    writer.join()
    insert_rows(shop.database, 1001, 1010)
    until_handled(shop, 1010)
    until_handled(shop, 1010, "many")
    assert log(replicate).count(STARTED) == log(replicate).count(ENDED) == 1
    # On a slow machine the queues may have been empty between two of its commits.
    begins = "where (flash_replay_window begins|all queues were seen empty)"
    assert re.search(begins, log(replicate))
    assert_same_ids(shop)
    assert "refill" not in recorded(shop)


def test_flushall_while_no_replication_worker_runs_is_refilled_at_its_start(
    refilling, valkey_client
):
    shop = refilling
    shop.end(enqueue(shop, 1, 100))
    valkey_client.flushall()
    replicate = shop.replicate()
    shop.until_said(replicate, ENDED)
    assert "Redis has no position" in log(replicate)
    assert valkey_client.llen("flash") == 100
    shop.worker()
    insert_rows(shop.database, 101, 110)
    until_handled(shop, 110)


def test_flushall_is_noticed_though_nothing_changes_any_more(refilling, valkey_client):
    shop = refilling
    replicate = enqueue(shop, 1, 100)
    valkey_client.flushall()
    shop.until_said(replicate, ENDED)
    assert valkey_client.llen("flash") == 100
    valkey_client.flushall()
    wait_until(lambda: log(replicate).count(ENDED) == 2, "the second refill")
    assert valkey_client.llen("flash") == 100


@contextmanager
def refill_under_way(shop, client):
    """A worker whose refill waits, because the queue is full."""
    replicate = shop.replicate(**conf(flash_max_queue_length=20))
    shop.until_said(replicate, STARTED)
    # The queue counts as full until a tenth of it is free.
    wait_until(lambda: client.llen("flash") > 18, "a part of the refill")
    yield replicate


def test_refill_that_is_killed_goes_on_where_it_was(refilling, valkey_client):
    shop = refilling
    shop.end(enqueue(shop, 1, 500))
    valkey_client.flushall()
    with refill_under_way(shop, valkey_client) as replicate:
        insert_rows(shop.database, 501, 510)
        assert "refill" in recorded(shop)
        assert "the broker has lost the changes" in shop.run("flash", "doctor").stdout
        shop.end(replicate, signal.SIGKILL)
    assert valkey_client.llen("flash") < 500
    replicate = shop.replicate()
    shop.until_said(replicate, ENDED)
    wait_until(lambda: valkey_client.llen("flash") >= 510, "everything")
    # Each change is there once: the first part was not enqueued again.
    assert valkey_client.llen("flash") == 510
    assert "where an earlier attempt began" in log(replicate)
    shop.worker()
    until_handled(shop, 510)
    assert_same_ids(shop)


def test_second_loss_during_a_refill_is_refilled_too(refilling, valkey_client):
    shop = refilling
    shop.end(enqueue(shop, 1, 500))
    valkey_client.flushall()
    with refill_under_way(shop, valkey_client) as replicate:
        valkey_client.flushall()
        wait_until(lambda: log(replicate).count(STARTED) == 2, "the second refill")
        shop.worker()
        until_handled(shop, 500)
        shop.until_said(replicate, ENDED)
    insert_rows(shop.database, 501, 510)
    until_handled(shop, 510)
    assert_same_ids(shop)


def test_refill_begins_where_all_queues_were_empty(refilling, valkey_client):
    shop = refilling
    shop.environment |= conf(flash_replay_window=20)  # so that it looks once a second
    replicate = shop.replicate()
    worker = shop.worker()
    insert_rows(shop.database, 1, 50)
    until_handled(shop, 50)
    wait_until_confirmed(shop)
    goal = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")
    lsn = "(SELECT '{}'::pg_lsn <= '{}'::pg_lsn)"
    shop.database.execute("SELECT pg_logical_emit_message(true, 'x', repeat('x', 100000))")
    wait_until(
        lambda: (
            "handled" in recorded(shop)
            and shop.database.one("SELECT " + lsn.format(goal, recorded(shop)["handled"]["lsn"]))
        ),
        "the position to be noted",
        90,
    )
    shop.end(worker)
    insert_rows(shop.database, 51, 60)
    wait_until_confirmed(shop)
    valkey_client.flushall()
    insert_rows(shop.database, 61, 61)
    shop.until_said(replicate, ENDED)
    assert "where all queues were seen empty last" in log(replicate)
    assert "Enqueued 10 changes again" in log(replicate)
    shop.worker()
    until_handled(shop, 61)
    assert len(shop.notes()) == 61


def test_refill_says_what_the_window_does_not_reach(refilling, valkey_client):
    shop = refilling
    shop.environment |= conf(flash_replay_window=2)
    replicate = shop.replicate()
    worker = shop.worker()
    insert_rows(shop.database, 1, 10)
    until_handled(shop, 10)
    wait_until(lambda: "handled" in recorded(shop), "the position to be noted", 90)
    shop.end(worker)
    insert_rows(shop.database, 11, 20)
    wait_until_confirmed(shop)
    goal = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")

    def advanced():
        # The slot follows the position of the other slot, which moves when something is written.
        shop.database.execute("SELECT pg_logical_emit_message(true, 'x', repeat('x', 5000))")
        return shop.database.one(
            f"SELECT confirmed_flush_lsn > '{goal}'::pg_lsn FROM pg_replication_slots "
            f"WHERE slot_name = '{shop.database.slot}_history'"
        )

    wait_until(advanced, "the window to leave the rows behind", 90)
    valkey_client.flushall()
    insert_rows(shop.database, 21, 21)
    shop.worker()
    shop.until_said(replicate, "are missing: the broker has lost them, and flash_replay_window")
    wait_until(lambda: 21 in {note["key"]["id"] for note in shop.notes()}, "the next change")
    assert not {note["key"]["id"] for note in shop.notes()} & set(range(11, 21))


def test_refill_reads_a_replay_slot_that_is_being_read(refilling, valkey_client):
    shop = refilling
    shop.end(enqueue(shop, 1, 50))
    valkey_client.flushall()
    with closing(ReplicationConnection(shop.database.dsn)) as stream:
        stream.start_session()
        stream.start(f"{shop.database.slot}_history", publication_names("flash_publication"))
        replicate = shop.replicate()
        shop.until_said(replicate, ENDED)
    assert valkey_client.llen("flash") == 50


def test_lanes_are_refilled_in_order_by_default(shop, valkey_client):
    """With an ordered handler and a window."""
    shop.project = "ordered"
    shop.environment |= {"SHOP_CONF": json.dumps({"flash_replay_window": 3600})}
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 4)
    for name in range(20):
        shop.database.execute(f"UPDATE items SET name = '{name}'")
        if name == 10:
            wait_until_confirmed(shop)
            valkey_client.flushall()
    shop.until_said(replicate, ENDED)
    shop.worker("threads", "flash")
    notes = shop.until_noted(4 * 21)
    for key in range(1, 5):
        names = [note["new"]["name"] for note in notes if note["key"]["id"] == key]
        assert list(dict.fromkeys(names)) == ["a", *map(str, range(20))]


def test_restored_redis_is_refilled_from_its_own_position(refilling, valkey_client):
    shop, client = refilling, valkey_client
    replicate = shop.replicate()
    for first in range(1, 100, 10):  # a write of Redis notes up to where the ones before are
        insert_rows(shop.database, first, first + 9)
        wait_until_confirmed(shop)
    dump = {key: client.dump(key) for key in client.scan_iter()}
    insert_rows(shop.database, 101, 200)
    wait_until_confirmed(shop)
    client.flushall()
    for key, value in dump.items():
        client.restore(key, 0, value)
    insert_rows(shop.database, 201, 210)
    shop.until_said(replicate, ENDED)
    assert "up to where Redis has everything" in log(replicate)
    wait_until(lambda: client.llen("flash") >= 210, "everything")
    assert client.llen("flash") == 210
    shop.worker()
    until_handled(shop, 210)
    assert len(shop.notes()) == 210


def test_lost_broker_ends_the_replication_worker_with_halt(refilling, valkey_client):
    shop = refilling
    shop.environment |= conf(flash_on_lost_broker="halt")
    replicate = enqueue(shop, 1, 10)
    valkey_client.flushall()
    insert_rows(shop.database, 11, 11)
    wait_until(lambda: replicate.poll() is not None, "the end")
    assert replicate.returncode == 2
    assert "Redis has lost the last messages that it had confirmed" in log(replicate)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"flash_on_lost_broker": "continue"}, "since flash_on_lost_broker is no longer 'refill'"),
        (
            {"flash_on_lost_broker": "auto", "flash_replay_window": 0},
            "because flash_replay_window is 0 now",
        ),
    ],
)
def test_refill_that_is_switched_off_under_way_says_what_may_be_missing(
    refilling, valkey_client, settings, reason
):
    shop = refilling
    shop.end(enqueue(shop, 1, 500))
    valkey_client.flushall()
    with refill_under_way(shop, valkey_client) as replicate:
        shop.end(replicate, signal.SIGKILL)
    replicate = shop.replicate(**conf(**settings))
    shop.until_said(replicate, reason)
    assert "enqueuing them again was not completed: they may be missing" in log(replicate)
    wait_until(
        lambda: '"refill"' not in (shop.database.one(COMMENT) or ""), "the range to be forgotten"
    )
