"""Ordered handlers in real Celery workers, on Valkey."""

import itertools
import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from contextlib import suppress

import pytest
import redis
from celery import Celery

from example_project.servers import Valkey, wait_until
from tests.acceptance.steps import replicate_through, wait_until_confirmed
from tests.acceptance.writer import Writer
from tests.sentinel import OPTIONS, Replicated


@pytest.fixture
def ordered(shop):
    """The project of `ordered.py`."""
    shop.project = "ordered"
    return shop


def keys_of(note):
    return note["key"].get("id")


def ended(shop, handler="each"):
    return [note for note in shop.notes(handler) if note["event"] == "end"]


def until_ended(shop, count, handler="each", timeout=60.0):
    """The notes of the calls that have ended, once these are so many changes."""

    def enough():
        notes = ended(shop, handler)
        return notes if len({note["id"] for note in notes}) >= count else None

    try:
        return wait_until(enough, f"{count} changes", timeout)
    except TimeoutError as error:
        logs = "\n".join(process.log.read_text()[-3000:] for process in shop.processes)
        raise AssertionError(f"{error}: {len(ended(shop, handler))} notes\n{logs}") from None


def assert_in_order(notes):
    """Each key's changes are in commit order; a repetition is of the last one only."""
    values = defaultdict(list)
    for note in notes:
        if note["new"] is not None:
            values[keys_of(note)].append(int(note["new"]["name"]))
    for key, found in values.items():
        assert found == sorted(found), f"key {key}: {found}"
    return values


def update(shop, keys, first, last):
    for number in range(first, last):
        shop.database.execute(
            *[f"UPDATE items SET name = '{number}' WHERE id = {key}" for key in range(keys)]
        )


def insert(shop, keys):
    rows = ", ".join(f"({key}, '0', NULL)" for key in range(keys))
    shop.database.execute(f"INSERT INTO items VALUES {rows}")


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_lanes_keep_the_order_of_each_key(ordered, pool):
    ordered.replicate()
    workers = [ordered.worker(pool, "flash") for _ in range(2)]
    insert(ordered, 8)
    update(ordered, 8, 1, 20)
    notes = until_ended(ordered, 8 * 20)
    values = assert_in_order(notes)
    assert all(found == list(range(20)) for found in values.values())
    for worker in workers:
        assert ordered.end(worker) == 0
        assert "Traceback" not in worker.log.read_text()


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_lanes_keep_the_order_in_green_threads(ordered, pool):
    keys, versions = 30, 19
    ordered.environment["SHOP_SLEEP"] = "0.01"
    ordered.replicate()
    workers = [ordered.worker(pool, "flash", ("-c", "8")) for _ in range(2)]
    insert(ordered, keys)
    update(ordered, keys, 1, versions)
    for key in range(keys):
        ordered.database.execute(
            f"UPDATE items SET name = '{versions}', note = 'retry' WHERE id = {key}"
        )
    notes = until_ended(ordered, keys * (versions + 1))
    values = assert_in_order(notes)
    assert all(found == list(range(versions + 1)) for found in values.values())
    begun = [note for note in ordered.notes() if note["event"] == "begin"]
    assert len(begun) == keys * (versions + 3)  # two retries of each last change
    assert len({note["pid"] for note in begun}) == 2
    for worker in workers:
        assert ordered.end(worker) == 0
        assert "Traceback" not in worker.log.read_text()


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_lanes_lease_is_renewed_while_a_green_thread_waits(ordered, pool):
    ordered.environment["SHOP_SLEEP"] = "9"  # two leases
    ordered.replicate()
    for _ in range(2):
        ordered.worker(pool, "flash")
    insert(ordered, 1)
    update(ordered, 1, 1, 2)
    until_ended(ordered, 2)
    shown = [(note["event"], note["new"]["name"]) for note in ordered.notes()]
    assert shown == [("begin", "0"), ("end", "0"), ("begin", "1"), ("end", "1")]


def test_lanes_keep_the_order_through_retries(ordered):
    ordered.replicate()
    ordered.worker("prefork", "flash")
    insert(ordered, 4)
    ordered.database.execute(
        "UPDATE items SET name = '1', note = 'retry' WHERE id = 0",
        "UPDATE items SET name = '2', note = '' WHERE id = 0",
        "UPDATE items SET name = '1', note = 'retry quietly' WHERE id = 1",
        "UPDATE items SET name = '2', note = '' WHERE id = 1",
    )
    values = assert_in_order(until_ended(ordered, 8))
    # With throw=False the handler goes on to its end each time.
    assert values == {0: [0, 1, 2], 1: [0, 1, 1, 1, 2], 2: [0], 3: [0]}
    begun = [n for n in ordered.notes() if n["event"] == "begin" and keys_of(n) == 0]
    retried = [note for note in begun if note["new"]["note"] == "retry"]
    assert [note["retries"] for note in retried] == [0, 1, 2]
    assert len({note["task_id"] for note in retried}) == 1


def test_lanes_change_that_fails_for_good_becomes_a_dead_letter(ordered):
    ordered.replicate()
    ordered.worker("prefork", "flash")
    insert(ordered, 2)
    ordered.database.execute(
        "UPDATE items SET name = '1', note = 'raise' WHERE id = 0",
        "UPDATE items SET name = '2', note = '' WHERE id = 0",
    )
    assert assert_in_order(until_ended(ordered, 3)) == {0: [0, 2], 1: [0]}
    (letter,) = json.loads(ordered.run("flash", "dead", "list", "--json").stdout)
    assert (letter["error"], letter["retries"]) == ("ValueError", 0)
    open(f"{ordered.notes_file}.fixed", "w").close()
    assert ordered.run("flash", "dead", "retry", "--all").returncode == 0
    until_ended(ordered, 4)


def test_dead_letters_of_lanes_know_whether_later_changes_superseded_them(ordered, valkey):
    ordered.environment.update(SHOP_BATCH="1")
    ordered.replicate()
    ordered.worker("solo", "flash")
    insert(ordered, 3)
    until_handled_by_both(ordered, 3)
    fixed = f"{ordered.notes_file}.fixed"
    client = redis.Redis(port=valkey.port)

    def fail(*keys):
        for key in keys:
            ordered.database.execute(f"UPDATE items SET note = 'raise' WHERE id = {key}")
        wait_until(lambda: client.llen("flash.dead") == 2 * len(keys), "dead letters")

    def retried(*options):
        open(fixed, "w").close()
        seen = len(ended(ordered)), len(ended(ordered, "many"))
        assert ordered.run("flash", "dead", "retry", "--all", *options).returncode == 0
        assert ordered.run("flash", "wait").returncode == 0
        os.remove(fixed)
        notes = [*ended(ordered)[seen[0] :], *ended(ordered, "many")[seen[1] :]]
        return sorted((note["handler"], keys_of(note), note["superseded"]) for note in notes)

    with client:
        fail(0, 1)
        ordered.database.execute("UPDATE items SET note = '' WHERE id <> 1")
        until_handled_by_both(ordered, 5)
        assert [note["superseded"] for note in ended(ordered)] == [False] * 5
        expected = [(name, key, key == 0) for name in ("each", "many") for key in (0, 1)]
        assert retried("--split") == expected
        assert client.keys("*.dead.*") == []
        fail(2)
        client.delete(*client.keys("*.dead.*"))
        assert retried() == [("each", 2, None), ("many", 2, None)]
        fail(2)
        assert len(client.keys("*.dead.*")) == 2
        assert ordered.run("flash", "dead", "drop", "--all", "--yes").returncode == 0
        assert client.keys("*.dead.*") == []


def until_handled_by_both(shop, count):
    until_ended(shop, count)
    until_ended(shop, count, "many")


def test_lanes_go_on_at_once_when_a_process_dies(ordered):
    ordered.replicate()
    ordered.worker("prefork", "flash", SHOP_CONF='{"flash_lane_lease": 600}')
    insert(ordered, 2)
    ordered.database.execute(
        "UPDATE items SET name = '1', note = 'kill once' WHERE id = 0",
        "UPDATE items SET name = '2', note = '' WHERE id = 0",
    )
    # Not after the lease.
    assert assert_in_order(until_ended(ordered, 4)) == {0: [0, 1, 2], 1: [0]}


def test_lanes_change_that_kills_its_processes_becomes_a_dead_letter(ordered):
    ordered.replicate()
    ordered.worker("prefork", "flash", SHOP_CONF='{"flash_lane_lease": 600}')
    insert(ordered, 2)
    ordered.database.execute(
        "UPDATE items SET name = '1', note = 'kill' WHERE id = 0",
        "UPDATE items SET name = '2', note = '' WHERE id = 0",
    )
    assert assert_in_order(until_ended(ordered, 3)) == {0: [0, 2], 1: [0]}
    (letter,) = json.loads(ordered.run("flash", "dead", "list", "--json").stdout)
    assert (letter["error"], letter["deaths"]) == ("ProcessKilled", 3)


def test_lanes_of_a_killed_worker_go_on_when_its_lease_has_run_out(ordered):
    ordered.replicate()
    worker = ordered.worker("solo", "flash", SHOP_SLEEP="1")
    insert(ordered, 1)
    update(ordered, 1, 1, 3)
    wait_until(lambda: ordered.notes(), "the worker to begin")
    worker.kill()
    ordered.worker("solo", "flash")
    assert assert_in_order(until_ended(ordered, 3)) == {0: [0, 1, 2]}


@pytest.mark.parametrize("messages", ["", "1"])
def test_lanes_barrier_is_handled_after_everything_before_it(ordered, messages):
    ordered.environment.update(SHOP_MESSAGES=messages, SHOP_SLEEP="0.02")
    ordered.replicate()
    ordered.worker("prefork", "flash")
    ordered.worker("threads", "flash")
    barrier = "SELECT pg_logical_emit_message(true, 'said', '')" if messages else "TRUNCATE items"
    insert(ordered, 10)
    ordered.database.execute(barrier)
    if messages:
        update(ordered, 10, 1, 2)
    else:
        insert(ordered, 10)
    until_ended(ordered, 21)
    notes = ordered.notes()
    kinds = [(note["event"], note["operation"]) for note in notes]
    operation = "message" if messages else "truncate"
    begin, end = kinds.index(("begin", operation)), kinds.index(("end", operation))
    assert end == begin + 1
    assert len({n["id"] for n in notes[:begin] if n["event"] == "end"}) == 10
    assert len(notes[end + 1 :]) == 20


def test_lanes_update_of_the_key_waits_for_both_lanes(ordered):
    ordered.environment.update(SHOP_ORDER="column", SHOP_SLEEP="0.3")
    ordered.replicate()
    ordered.worker("prefork", "flash", options=("-c", "4"))
    ordered.database.execute(
        "INSERT INTO items VALUES (1, 'a', NULL), (2, 'b', NULL), (3, 'c', NULL)",
        "UPDATE items SET name = 'b' WHERE id = 1",
        "UPDATE items SET note = 'after' WHERE id = 2",
        "INSERT INTO items VALUES (4, 'a', 'after')",
    )
    until_ended(ordered, 6)
    notes = ordered.notes()
    shown = [(n["event"], n["key"]["id"], n["operation"]) for n in notes]
    moved = shown.index(("begin", 1, "update"))
    assert shown.index(("end", 1, "insert")) < moved
    assert shown.index(("end", 2, "insert")) < moved
    over = shown.index(("end", 1, "update"))
    assert shown.index(("begin", 2, "update")) > over
    assert shown.index(("begin", 4, "insert")) > over


def test_lanes_delete_without_its_old_key_waits_for_what_came_before(ordered):
    """It was written before the replica identity was set, so its lane is unknown."""
    ordered.end(ordered.replicate())
    ordered.database.execute(
        "INSERT INTO items VALUES (1, 'a', NULL)", "DELETE FROM items WHERE id = 1"
    )
    ordered.environment |= {"SHOP_ORDER": "column", "SHOP_SLEEP": "1"}
    ordered.replicate()
    for _ in range(2):
        ordered.worker("prefork", "flash")
    until_ended(ordered, 2)
    seen = [(note["event"], note["operation"]) for note in ordered.notes()]
    assert seen == [(event, kind) for kind in ("insert", "delete") for event in ("begin", "end")]


def test_lanes_time_limits_hold_for_each_change(ordered):
    ordered.environment.update(SHOP_LIMIT="3", SHOP_SLEEP="0.5")
    ordered.replicate()
    ordered.worker("prefork", "flash", SHOP_CONF='{"flash_lane_lease": 600}')
    insert(ordered, 1)
    update(ordered, 1, 1, 6)  # longer than the limit together
    ordered.database.execute("UPDATE items SET note = 'sleep', name = '6'")
    ordered.database.execute("UPDATE items SET note = '', name = '7'")
    assert assert_in_order(until_ended(ordered, 7)) == {0: [0, 1, 2, 3, 4, 5, 7]}
    (letter,) = json.loads(ordered.run("flash", "dead", "list", "--json").stdout)
    assert letter["error"] == "TimeLimitExceeded"


def test_lanes_soft_time_limit_ends_one_change(ordered):
    ordered.environment.update(SHOP_SOFT_LIMIT="2")
    ordered.replicate()
    ordered.worker("prefork", "flash")
    insert(ordered, 1)
    ordered.database.execute("UPDATE items SET note = 'sleep', name = '1'")
    ordered.database.execute("UPDATE items SET note = '', name = '2'")
    assert assert_in_order(until_ended(ordered, 2)) == {0: [0, 2]}
    (letter,) = json.loads(ordered.run("flash", "dead", "list", "--json").stdout)
    assert letter["error"] == "SoftTimeLimitExceeded"


def test_lanes_batches_hold_the_changes_that_wait(ordered):
    ordered.environment.update(SHOP_BATCH="1")
    ordered.replicate()
    insert(ordered, 4)
    update(ordered, 4, 1, 30)
    ordered.worker("prefork", "flash")
    notes = until_ended(ordered, 4 * 30, "many")
    values = assert_in_order(notes)
    assert all(found == list(range(30)) for found in values.values())
    assert max(note["together"] for note in notes) > 10


def summaries(shop):
    return json.loads(shop.run("flash", "status", "--json").stdout)["lanes"]


def summary(shop):
    """How much waits in the lanes of the one handler."""
    found = summaries(shop)
    return found[0] if found else {}


def lanes(shop, *arguments):
    return json.loads(shop.run("flash", "lanes", "list", "--json", *arguments).stdout)


def test_lanes_blocked_by_a_failed_change_go_on_when_an_operator_says_so(ordered):
    ordered.environment.update(SHOP_ORDER="block")
    ordered.replicate()
    ordered.worker("prefork", "flash")
    insert(ordered, 2)
    ordered.database.execute(
        "UPDATE items SET name = '1', note = 'raise' WHERE id = 0",
        "UPDATE items SET name = '2', note = 'raise' WHERE id = 0",
        "UPDATE items SET name = '3', note = '' WHERE id = 0",
        "UPDATE items SET name = '1' WHERE id = 1",
    )

    def blocked():
        found = [lane for lane in lanes(ordered)["ordered.each"] if lane["state"] == "blocked"]
        return found[0] if found else None

    first = wait_until(blocked, "the lane to be blocked")
    assert (first["changes"], first["error"]) == (3, "ValueError: this item cannot be handled")
    until_ended(ordered, 3)  # the other key is not held up
    wrong = ordered.run("flash", "lanes", "skip", "each", str(first["lane"]), "0/1:0")
    assert wrong.returncode == 2
    assert first["first_id"] in wrong.stderr
    status = ordered.run("flash", "status")
    assert "1 blocked" in status.stdout
    assert "failed for good block 1 of ordered.each" in ordered.run("flash", "doctor").stdout
    skip = ordered.run("flash", "lanes", "skip", "each", str(first["lane"]), first["first_id"])
    assert skip.returncode == 0, skip.stderr
    second = wait_until(
        lambda: (found := blocked()) and found["first_id"] != first["first_id"] and found,
        "the next change to block it",
    )
    open(f"{ordered.notes_file}.fixed", "w").close()
    retry = ordered.run("flash", "lanes", "retry", "each", str(second["lane"]), second["first_id"])
    assert retry.returncode == 0, retry.stderr
    assert assert_in_order(until_ended(ordered, 5)) == {0: [0, 2, 3], 1: [0, 1]}
    assert ordered.run("flash", "wait").returncode == 0


def test_lanes_are_waited_for_and_shown(ordered, valkey):
    with redis.Redis(port=valkey.port) as client:  # another server has a slot of the same name
        other = f"_flash.ordered.1.{ordered.database.slot}.ordered.each"
        client.sadd("_flash.ordered", other)
        client.hset(f"{other}.state", mapping={"waiting": 7, "lanes": 16, "b3": "x"})
    ordered.replicate()
    insert(ordered, 3)
    waited = ordered.run("flash", "wait", "--timeout", "3")
    assert waited.returncode == 1
    assert "changes for ordered.each" in waited.stderr
    (status,) = json.loads(ordered.run("flash", "status", "--json").stdout)["lanes"]
    assert (status["waiting"], status["busy"], status["lanes"]) == (3, 0, 16)
    assert status["oldest_seconds"] > 0
    assert "3 waiting in 16 lanes" in ordered.run("flash", "status").stdout
    listed = "flash", "lanes", "list", "each"
    assert "insert public.items id=1" in ordered.run(*listed).stdout
    # Without PostgreSQL it is unknown which lanes on this Redis belong to this database.
    unreachable = ordered.run(*listed, SHOP_DSN="host=127.0.0.1 port=1 dbname=x").stdout
    assert "insert public.items id=1" in unreachable
    ordered.worker("solo", "flash")
    assert ordered.run("flash", "wait").returncode == 0
    assert len(ended(ordered)) == 3
    assert lanes(ordered) == {"ordered.each": []}
    ordered.worker("solo", "flash", SHOP_NAME="ordered.other", options=("-n", "stranger"))

    def warned():
        found = ordered.run("flash", "doctor").stdout.splitlines()
        return [line for line in found if line.startswith("warning  lanes: celery@stranger")]

    (line,) = wait_until(warned, "the doctor to notice the other worker", 30.0)
    assert "consumes flash and does not know ordered.each, so each lane" in line


def test_lanes_of_a_paused_handler_keep_what_they_have(ordered):
    replicate = ordered.replicate()
    ordered.worker("solo", "flash")
    insert(ordered, 1)
    until_ended(ordered, 1)
    paused = ordered.run("flash", "pause", "each")
    assert "its changes wait in its lanes (`flash lanes list`)" in paused.stdout
    ordered.until_said(replicate, "its changes wait in its lanes")
    update(ordered, 1, 1, 3)
    wait_until(lambda: summary(ordered)["waiting"] == 2, "the changes to be in lanes")
    assert summary(ordered)["paused"]
    assert "2 held in its lanes" in ordered.run("flash", "status").stdout
    assert len(ended(ordered)) == 1
    assert ordered.run("flash", "resume", "each").returncode == 0
    assert assert_in_order(until_ended(ordered, 3)) == {0: [0, 1, 2]}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SHOP_ORDER": "none"}, "no longer ordered; workers handle them"),
        ({"SHOP_ORDER": "none", "SHOP_BATCH": "1"}, "no longer ordered; workers handle them"),
        ({"SHOP_NAME": "ordered.new"}, "no longer a task of this project; no worker"),
    ],
    ids=["unordered", "unordered beside another", "removed"],
)
def test_lanes_of_a_paused_handler_that_is_no_longer_ordered_go_on_and_are_shown(
    ordered, environment, reason
):
    first = ordered.replicate()
    insert(ordered, 1)
    assert ordered.run("flash", "pause", "each").returncode == 0
    ordered.until_said(first, "its changes wait")
    update(ordered, 1, 1, 2)
    wait_until(lambda: summary(ordered)["waiting"] == 2, "the changes to be in lanes")
    ordered.end(first)
    ordered.environment |= environment
    second = ordered.replicate()
    ordered.until_said(second, f"2 changes wait in the lanes of ordered.each, which is {reason}")
    found = {lanes["handler"]: lanes for lanes in summaries(ordered)}["ordered.each"]
    assert (found["waiting"], found["paused"]) == (2, False)
    assert [lane["changes"] for lane in lanes(ordered)["ordered.each"]] == [2]
    assert "of a handler that is no longer ordered" in ordered.run("flash", "status").stdout
    doctor = ordered.run("flash", "doctor").stdout
    assert "warning  lanes: 2 changes wait in the lanes of ordered.each, which is no lo" in doctor
    if "SHOP_NAME" not in environment:
        ordered.worker("solo", "flash")
        assert assert_in_order(until_ended(ordered, 2)) == {0: [0, 1]}


def test_lanes_blocked_of_a_handler_that_is_no_longer_ordered_can_be_skipped(ordered):
    ordered.environment.update(SHOP_ORDER="block")
    first = ordered.replicate()
    ordered.worker("solo", "flash")
    ordered.database.execute("INSERT INTO items VALUES (1, '0', 'raise')")

    def blocked():
        found = lanes(ordered).get("ordered.each")
        return found[0] if found and found[0]["state"] == "blocked" else None

    wait_until(blocked, "the lane to be blocked")
    ordered.end(first)
    ordered.environment |= {"SHOP_ORDER": "none"}
    ordered.until_said(ordered.replicate(), "1 change waits in the lanes of ordered.each")
    lane = blocked()
    arguments = "each", str(lane["lane"]), lane["first_id"]
    skip = ordered.run("flash", "lanes", "skip", *arguments)
    assert skip.returncode == 0, skip.stderr
    assert lanes(ordered) == {}


def test_lanes_keep_their_changes_when_the_slot_is_reset(ordered, valkey):
    replicate = ordered.replicate()
    insert(ordered, 3)
    assert ordered.run("flash", "pause", "each").returncode == 0
    ordered.until_said(replicate, "its changes wait")
    wait_until(lambda: summary(ordered)["waiting"] == 3, "the changes to be in lanes")
    ordered.end(replicate)
    reset = ordered.run("flash", "reset", stdin="n\n")
    line = "let workers handle 3 changes that wait in lanes of ordered.each, and end its pause"
    assert line in reset.stdout
    assert summary(ordered)["paused"]
    reset = ordered.run("flash", "reset", "--yes")
    assert reset.returncode == 0, reset.stderr
    with redis.Redis(port=valkey.port) as client:  # as if it was killed after it dropped the slot
        (state,) = client.keys("_flash.ordered.*.state")
        assert client.hset(state, "paused", "1") == 1
    reset = ordered.run("flash", "reset", "--yes")
    assert line in reset.stdout
    worker = ordered.worker("solo", "flash")
    until_ended(ordered, 3)
    ordered.end(worker)
    reset = ordered.run("flash", "reset", "--yes")  # the slot is gone, the empty lanes are not
    assert "remove the keys of empty lanes" in reset.stdout
    with redis.Redis(port=valkey.port) as client:
        assert client.keys("_flash.ordered*") == []
    assert "Nothing to reset" in ordered.run("flash", "reset", "--yes").stdout
    ordered.replicate()
    update(ordered, 3, 1, 2)
    ordered.worker("solo", "flash")
    until_ended(ordered, 6)


def test_lanes_of_another_number_are_filled_when_the_old_ones_are_empty(ordered):
    replicate = ordered.replicate()
    insert(ordered, 5)
    wait_until(lambda: summary(ordered).get("waiting") == 5, "the changes to be in lanes")
    assert ordered.end(replicate) == 0
    ordered.environment.update(SHOP_ORDER="one")
    replicate = ordered.replicate(wait=False)
    ordered.until_said(replicate, "were placed by another ordering key")
    update(ordered, 5, 1, 2)
    ordered.worker("prefork", "flash")
    values = assert_in_order(until_ended(ordered, 10))
    assert all(found == [0, 1] for found in values.values())


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_lanes_keep_the_order_of_rows_whose_table_gets_another_primary_key(ordered, running):
    """The hash of another column is another lane, so the old lanes have to be empty first."""
    keys = 8
    ordered.environment.update(SHOP_SLEEP="0.3")
    replicate = ordered.replicate()
    insert(ordered, keys)
    wait_until(lambda: summary(ordered).get("waiting") == keys, "the changes to be in lanes")
    if not running:
        ordered.end(replicate)
    ordered.database.execute(
        "UPDATE items SET note = 'unique ' || id",
        "ALTER TABLE items ALTER note SET NOT NULL, DROP CONSTRAINT items_pkey, "
        "ADD PRIMARY KEY (note)",
        "UPDATE items SET name = '1'",
    )
    if not running:
        replicate = ordered.replicate(wait=False)
    ordered.until_said(replicate, "were placed by another ordering key")
    ordered.worker("threads", "flash", options=("-c", "8"))
    until_ended(ordered, keys * 3)
    for key in range(keys):
        notes = [n for n in ordered.notes() if n["new"]["id"] == key]
        events = [n["event"] for n in notes]
        assert events == ["begin", "end"] * 3, f"key {key}: {events}"
        assert len({n["id"] for n in notes}) == 3
        assert notes[0]["operation"] == "insert"
    notes = ended(ordered)
    assert [n["key"] for n in notes[-keys:]] == [{"note": n["new"]["note"]} for n in notes[-keys:]]


@pytest.mark.soak
def test_lanes_lose_nothing_to_a_worker_that_discards_their_wakes(ordered):
    """It has a release without lanes. The sweep wakes them again for the workers that follow."""
    ordered.replicate()
    ordered.project = "former"
    former = ordered.worker("solo", "flash")
    ordered.project = "ordered"
    insert(ordered, 8)
    update(ordered, 8, 1, 3)
    ordered.until_said(former, "Received unregistered task of type 'flash_celery.wake'")
    ordered.end(former)
    assert "past its lane" not in former.log.read_text()
    ordered.worker("prefork", "flash")
    values = assert_in_order(until_ended(ordered, 24, timeout=120))
    assert all(found == [0, 1, 2] for found in values.values())


@pytest.mark.parametrize("pool", ["prefork", pytest.param("threads", marks=pytest.mark.soak)])
def test_lanes_keep_the_order_with_everything_else_that_a_handler_may_have(
    shop, new_database, pool
):
    """`into`, `where`, several sources, `bind`, autoretry, `pydantic=True` and results."""
    billing = new_database()
    billing.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text, note text)",
        "ALTER TABLE items REPLICA IDENTITY FULL",
    )
    shop.project = "ordered_kinds"
    shop.environment["SHOP_CONF"] = json.dumps({"flash_sources": {"billing": {"dsn": billing.dsn}}})
    shop.replicate()
    shop.replicate("--source", "billing")
    for database in (shop.database, billing):
        rows = ", ".join(f"({key}, '0', 'in')" for key in range(6))
        database.execute(f"INSERT INTO items VALUES {rows}")
        for number in range(1, 10):
            place = "out" if number in (4, 5) else "in"
            database.execute(
                *[
                    f"UPDATE items SET name = '{number}', note = '{place}' WHERE id = {key}"
                    for key in range(6)
                ]
            )
        database.execute("DELETE FROM items")
    shop.worker(pool, "flash", options=("-c", "4"))
    expected = {
        ("typed", ""): [*map(str, range(10)), "9"],
        ("chosen", ""): ["0", "1", "2", "3", "3", "6", "7", "8", "9", "9"],
        ("both", ""): [*map(str, range(10)), "9"],
        ("both", "billing"): [*map(str, range(10)), "9"],
        ("validated", ""): [*map(str, range(10))],
    }
    handlers = sorted({handler for handler, _ in expected})
    count = 6 * sum(map(len, expected.values()))

    def all_notes():
        notes = [note for handler in handlers for note in shop.notes(handler)]
        return notes if len(notes) >= count else None

    notes = wait_until(all_notes, f"{count} changes", 90.0)
    for (handler, source), names in expected.items():
        for key in range(6):
            mine = (handler, source, key)
            found = [n for n in notes if (n["handler"], n["source"], n["key"]) == mine]
            assert [note["name"] for note in found] == names, mine
    entering = [n["operation"] for n in shop.notes("chosen") if n["key"] == 0]
    assert entering == ["insert", *["update"] * 3, "delete", "insert", *["update"] * 3, "delete"]
    assert {n["retries"] for n in shop.notes("validated") if n["key"] == 3} == {1}
    assert shop.run("flash", "wait").returncode == 0
    results = Celery("results", backend=shop.broker.url, set_as_current=False)
    for noted in shop.notes("validated"):
        assert results.AsyncResult(noted["task_id"]).get(timeout=10) == {"id": noted["id"]}


def test_lanes_keep_the_order_while_processes_and_workers_are_killed(ordered):
    ordered.environment.update(SHOP_SLEEP="0.01", SHOP_CONF='{"flash_max_deaths": 100}')
    ordered.replicate()
    workers = [ordered.worker("prefork", "flash") for _ in range(2)]
    insert(ordered, 12)
    until_ended(ordered, 1)
    kills = 0
    for number in range(1, 40):
        update(ordered, 12, number, number + 1)
        if number % 4 == 0:
            # Most likely it is in a handler just then.
            with suppress(ProcessLookupError):
                os.kill(ordered.notes()[-1]["pid"], signal.SIGKILL)
                kills += 1
        if number in (15, 30):
            workers[number // 30].kill()
            workers.append(ordered.worker("prefork", "flash"))
    notes = until_ended(ordered, 12 * 40, timeout=120)
    assert kills
    values = defaultdict(list)
    for note in notes:
        values[keys_of(note)].append(int(note["new"]["name"]))
    for key, found in values.items():
        assert sorted(set(found)) == list(range(40)), f"key {key}: {found}"
        assert found == sorted(found), f"key {key}: {found}"
    # One at a time: nothing begins between the beginning and the end of another of its key.
    under_way = {}
    for note in ordered.notes():
        key = keys_of(note)
        if note["event"] == "end":
            assert under_way.pop(key, note["pid"]) == note["pid"]
        else:
            other = under_way.get(key)
            assert other is None or other == note["pid"] or not os.path.exists(f"/proc/{other}")
            under_way[key] = note["pid"]


def test_coalesced_changes_are_handled_once_though_their_worker_was_killed(ordered):
    ordered.environment.update(SHOP_ORDER="coalesce")
    ordered.end(ordered.replicate())
    steps = "read:3", "half a push:2", "pushed:2", "confirmed:1", "acknowledge:1", "acknowledged:2"
    with Writer(ordered.database) as writer:
        replicate_through(ordered, *steps)
    wait_until_confirmed(ordered)
    ordered.worker("solo", "flash")
    assert ordered.run("flash", "wait").returncode == 0
    notes = ended(ordered)
    assert len({note["id"] for note in notes}) == len(notes) < len(writer.changes)
    made_of = Counter()
    for note in notes:
        made_of[keys_of(note)] += note["coalesced"]
    for number in {number for _, number in writer.changes}:
        # Of a row that was inserted and deleted nothing is left, unless they came apart.
        assert made_of[number] in ((0, 3) if number % 5 == 0 else (2,)), number
    with ordered.database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO items VALUES (-1, 'a')")
        connection.execute("DELETE FROM items WHERE id = -1")
    wait_until_confirmed(ordered)  # although nothing is enqueued
    assert summary(ordered)["waiting"] == 0


def test_lanes_go_on_while_no_replication_worker_runs(ordered):
    """Workers sweep too: for retries, and for the lanes of killed workers."""
    replicate = ordered.replicate()
    insert(ordered, 1)
    ordered.database.execute("UPDATE items SET name = '1', note = 'retry' WHERE id = 0")
    ordered.database.execute("UPDATE items SET name = '2', note = '' WHERE id = 0")
    wait_until(lambda: summary(ordered).get("waiting") == 3, "the changes to be in lanes")
    assert ordered.end(replicate) == 0
    ordered.worker("prefork", "flash")
    assert assert_in_order(until_ended(ordered, 3)) == {0: [0, 1, 2]}


def test_lanes_with_a_key_prefix_and_priorities(ordered, valkey):
    options = {"global_keyprefix": "shop:", "priority_steps": [0, 3, 6, 9]}
    conf = {
        "broker_transport_options": options,
        "task_annotations": {"ordered.each": {"priority": 6}},
    }
    ordered.environment.update(SHOP_CONF=json.dumps(conf))
    ordered.replicate()
    insert(ordered, 5)
    with redis.Redis(port=valkey.port) as client:
        wait_until(lambda: client.llen("shop:flash\x06\x166"), "wakes of the handler's priority")
        assert all(key.startswith(b"shop:") for key in client.scan_iter())
    update(ordered, 5, 1, 5)
    ordered.worker("prefork", "flash")
    values = assert_in_order(until_ended(ordered, 25))
    assert all(found == [0, 1, 2, 3, 4] for found in values.values())
    assert ordered.run("flash", "wait").returncode == 0
    assert lanes(ordered) == {"ordered.each": []}


def test_lanes_survive_a_restart_of_the_broker(make_shop):
    with Valkey() as own:
        shop = make_shop(own)
        shop.project = "ordered"
        shop.environment.update(SHOP_SLEEP="0.02")
        replicate = shop.replicate()
        for _ in range(2):
            shop.worker("prefork", "flash")
        insert(shop, 8)
        update(shop, 8, 1, 10)
        wait_until(lambda: len(ended(shop)) > 20, "the workers to be at work")
        own.stop(signal.SIGKILL)
        update(shop, 8, 10, 20)
        own.start()
        # As a process manager does: kombu 5.7.0 may end a worker that holds messages when the
        # broker goes away (AttributeError in restore_unacked, on a connection that is closed).
        shop.worker("prefork", "flash")
        values = assert_in_order(until_ended(shop, 8 * 20, timeout=120))
        assert all(set(found) == set(range(20)) for found in values.values())
        shop.until_said(replicate, "the first for the lanes of ordered.each")


def test_lanes_of_a_redis_that_was_emptied_are_set_up_again(make_shop):
    with Valkey() as own, redis.Redis(port=own.port) as client:
        shop = make_shop(own)
        shop.project = "ordered"
        replicate = shop.replicate()
        shop.worker("prefork", "flash")
        insert(shop, 4)
        until_ended(shop, 4)
        client.flushall()
        update(shop, 4, 1, 5)
        shop.until_said(replicate, "Redis has lost")
        values = assert_in_order(until_ended(shop, 20))
        assert all(found[-4:] == [1, 2, 3, 4] for found in values.values())


@pytest.mark.soak
def test_lanes_through_a_sentinel_failover_lose_nothing(make_shop):
    """After a coordinated one, in which the replica has every write; Celery's workers restart."""
    with Replicated() as own:
        shop = make_shop(own)
        shop.project = "ordered"
        conf = {"broker_transport_options": OPTIONS}
        shop.environment.update(SHOP_CONF=json.dumps(conf), SHOP_SLEEP="0.01")
        shop.replicate()
        worker = shop.worker("prefork", "flash")
        insert(shop, 4)
        update(shop, 4, 1, 20)
        finish = own.hand_over()
        update(shop, 4, 20, 40)
        finish()
        worker.kill()
        shop.worker("prefork", "flash")
        values = assert_in_order(until_ended(shop, 4 * 40, timeout=120))
        assert all(set(found) == set(range(40)) for found in values.values())


def test_lanes_get_replayed_changes_in_their_order(ordered):
    ordered.environment.update(SHOP_CONF='{"flash_replay_window": 3600}')
    ordered.replicate()
    worker = ordered.worker("prefork", "flash")
    since = ordered.database.one("SELECT pg_current_wal_insert_lsn()::text")
    insert(ordered, 3)
    update(ordered, 3, 1, 6)
    until_ended(ordered, 18)
    assert ordered.run("flash", "wait").returncode == 0
    replayed = ordered.run("flash", "replay", "--handler", "each", "--since", since, "--yes")
    assert replayed.returncode == 0, replayed.stderr
    assert "18" in replayed.stdout
    wait_until(lambda: len(ended(ordered)) == 36, "the replayed changes")
    for key in range(3):
        found = [int(n["new"]["name"]) for n in ended(ordered) if keys_of(n) == key]
        assert found == [*range(6), *range(6)]
    ids = {(note["id"], note["task_id"]) for note in ended(ordered)}
    assert len(ids) == 18
    assert ordered.end(worker) == 0


def test_lanes_that_are_full_pause_reading(ordered):
    ordered.environment.update(SHOP_CONF='{"flash_max_queue_length": 20}')
    replicate = ordered.replicate()
    first = itertools.count(0, 10)

    def paused():
        """Write more, because all commits that are read at once are one push."""
        start = next(first)
        ordered.database.execute(
            f"INSERT INTO items SELECT n, '0', NULL FROM generate_series({start}, {start + 9}) AS n"
        )
        return "further changes stay in the WAL" in replicate.log.read_text()

    wait_until(paused, "reading to be paused")
    written = next(first)
    assert 20 <= summary(ordered)["waiting"] < written
    ordered.worker("prefork", "flash")
    until_ended(ordered, written)


@pytest.mark.soak
def test_lanes_lose_nothing_and_keep_the_order_through_minutes_of_faults(ordered):
    seed = int(os.environ.get("SEED", random.randrange(1 << 30)))
    chance = random.Random(seed)
    ordered.environment.update(SHOP_SLEEP="0.01", SHOP_CONF='{"flash_max_deaths": 1000}')
    replicate = ordered.replicate()
    workers = [ordered.worker("prefork", "flash") for _ in range(3)]
    keys, number = 20, 0
    insert(ordered, keys)
    until_ended(ordered, keys)
    deadline = time.monotonic() + float(os.environ.get("SECONDS", 120))
    while time.monotonic() < deadline:
        number += 1
        update(ordered, keys, number, number + 1)
        fault = chance.random()
        if fault < 0.15:
            with suppress(ProcessLookupError):
                os.kill(ordered.notes()[-1]["pid"], signal.SIGKILL)
        elif fault < 0.20:
            victim = chance.randrange(len(workers))
            workers[victim].send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            workers[victim] = ordered.worker("prefork", "flash")
        elif fault < 0.22:
            replicate.kill()
            replicate.wait(30)
            replicate = ordered.replicate()
    notes = until_ended(ordered, keys * (number + 1), timeout=120)
    values = assert_in_order(notes)
    for key, found in values.items():
        assert sorted(set(found)) == list(range(number + 1)), f"key {key}, seed {seed}"
