"""Ordered handlers in real Celery workers, on RabbitMQ."""

import json
import os
import signal
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from example_project.servers import Rabbit, wait_until

from .test_lanes import (
    assert_in_order,
    ended,
    insert,
    keys_of,
    lanes,
    summary,
    until_ended,
    update,
)
from .test_once import effects, set_up


@pytest.fixture
def ordered(make_shop, rabbit):
    """The project of `ordered.py`."""
    rabbit.empty()
    shop = make_shop(rabbit, SHOP_OPERATIONS="insert|update|delete")
    shop.project = "ordered"
    return shop


@pytest.mark.parametrize(
    "pool", [pytest.param(pool, marks=pytest.mark.soak) for pool in ("prefork", "threads", "solo")]
)
def test_rabbitmq_lanes_keep_the_order_of_each_key(ordered, pool):
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


def test_rabbitmq_lanes_keep_the_order_through_retries_failures_and_deaths(ordered):
    ordered.replicate()
    ordered.worker("prefork", "flash")
    insert(ordered, 5)
    asked = ["retry", "retry quietly", "kill once", "retry late", "kill"]
    ordered.database.execute(
        *[
            f"UPDATE items SET name = '1', note = '{each}' WHERE id = {key}"
            for key, each in enumerate(asked)
        ],
        *[f"UPDATE items SET name = '2', note = '' WHERE id = {key}" for key in range(5)],
    )
    values = assert_in_order(until_ended(ordered, 14))
    assert values[0] == values[2] == values[3] == [0, 1, 2]
    assert values[1] == [0, 1, 1, 1, 2]  # with throw=False the handler goes on to its end
    assert values[4] == [0, 2]
    begun = [n for n in ordered.notes() if n["event"] == "begin" and n["new"]["name"] == "1"]
    for key, retries in ((0, [0, 1, 2]), (3, [0, 1])):
        assert [n["retries"] for n in begun if keys_of(n) == key] == retries
    letters = json.loads(ordered.run("flash", "dead", "list", "--json").stdout)
    assert [(each["error"], each["deaths"]) for each in letters] == [("ProcessKilled", 3)]


def test_rabbitmq_lanes_are_waited_for_shown_and_paused(ordered):
    ordered.environment.update(SHOP_SLEEP="0.5")
    replicate = ordered.replicate()
    insert(ordered, 3)
    waited = ordered.run("flash", "wait", "--timeout", "3")
    assert waited.returncode == 1
    assert "changes for ordered.each" in waited.stderr
    assert (summary(ordered)["waiting"], summary(ordered)["lanes"]) == (3, 16)
    assert "3 waiting in 16 lanes" in ordered.run("flash", "status").stdout
    assert "waiting, 1 change" in ordered.run("flash", "lanes", "list", "each").stdout
    no_server = {"SHOP_DSN": "host=127.0.0.1 port=1 dbname=x"}  # its queues have its name
    assert "Connection refused" in ordered.run("flash", "lanes", "list", **no_server).stderr
    ordered.worker("solo", "flash")
    assert ordered.run("flash", "wait").returncode == 0
    assert len(ended(ordered)) == 3
    assert lanes(ordered) == {"ordered.each": []}
    assert "none with delivery-limit" in ordered.run("flash", "doctor").stdout
    paused = ordered.run("flash", "pause", "each")
    assert "its changes wait in its lanes (`flash lanes list`)" in paused.stdout
    ordered.until_said(replicate, "its changes wait in its lanes")
    update(ordered, 1, 1, 3)
    wait_until(lambda: summary(ordered)["waiting"] == 2, "the changes to be in lanes")
    assert summary(ordered)["paused"]
    assert "2 held in its lanes" in ordered.run("flash", "status").stdout
    assert len(ended(ordered)) == 3
    assert ordered.run("flash", "resume", "each").returncode == 0
    assert assert_in_order(until_ended(ordered, 5))[0] == [0, 1, 2]


@pytest.mark.soak
def test_rabbitmq_lanes_of_another_number_are_filled_when_the_old_ones_are_empty(ordered):
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
    assert summary(ordered)["lanes"] == 1


@pytest.mark.soak
def test_rabbitmq_lanes_go_on_without_a_replication_worker_after_a_worker_was_killed(ordered):
    ordered.environment.update(SHOP_SLEEP="1")
    replicate = ordered.replicate()
    insert(ordered, 1)
    update(ordered, 1, 1, 3)
    wait_until(lambda: summary(ordered).get("waiting") == 3, "the changes to be in lanes")
    worker = ordered.worker("solo", "flash")
    wait_until(lambda: ordered.notes(), "the worker to begin")
    assert ordered.end(replicate) == 0
    worker.kill()
    ordered.worker("solo", "flash")
    assert assert_in_order(until_ended(ordered, 3)) == {0: [0, 1, 2]}


def assert_repeats_in_order(notes, count, faults):
    """Each key's changes came in order; after a fault the last few may have come again."""
    values = defaultdict(list)
    for note in notes:
        values[keys_of(note)].append(int(note["new"]["name"]))
    repeats = 0
    for key, found in values.items():
        firsts = list(dict.fromkeys(found))
        assert firsts == list(range(count)), f"key {key}: {found}"
        for before, after in pairwise(found):
            repeats += after <= before
            assert before - 5 <= after <= before + 1, f"key {key}: {found}"
    assert repeats <= faults


def overlaps(notes):
    """How often a process ended a call of a key in which another one had begun a call."""
    under_way, count = {}, 0
    for note in notes:
        key = keys_of(note)
        if note["event"] == "begin":
            under_way[key] = note["pid"]
        else:
            count += under_way.pop(key, note["pid"]) != note["pid"]
    return count


def ports_of(process):
    """The local ports of a process's connections."""
    links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    lines = [
        line.split() for line in Path(f"/proc/{process.pid}/net/tcp").read_text().split("\n")[1:-1]
    ]
    return [int(line[1].partition(":")[2], 16) for line in lines if f"socket:[{line[9]}]" in links]


def close_connections(rabbit, besides):
    """Have RabbitMQ close all connections but those of one process."""
    rabbit.evaluate(
        '[rabbit_networking:close_connection(P, "test") || P <- rabbit_networking:connections(), '
        "not lists:member(proplists:get_value(peer_port, rabbit_networking:connection_info("
        f"P, [peer_port])), {ports_of(besides)})]"
    )


@pytest.mark.parametrize("kind", ["classic", pytest.param("quorum", marks=pytest.mark.soak)])
def test_rabbitmq_lanes_keep_the_order_while_processes_workers_and_connections_end(
    ordered, rabbit, kind
):
    keys, rounds = 12, 40
    conf = {"flash_max_deaths": 100, "flash_lane_lease": 15, "task_default_queue_type": kind}
    ordered.environment.update(SHOP_SLEEP="0.01", SHOP_CONF=json.dumps(conf))
    replicate = ordered.replicate()
    workers = [ordered.worker("prefork", "flash") for _ in range(2)]
    insert(ordered, keys)
    until_ended(ordered, 1)
    faults = lost = 0
    for number in range(1, rounds):
        update(ordered, keys, number, number + 1)
        if number % 4 == 0:
            # Most likely it is in a handler just then.
            with suppress(ProcessLookupError):
                os.kill(ordered.notes()[-1]["pid"], signal.SIGKILL)
                faults += 1
        if number in (15, 30):
            workers[number // 30].kill()
            workers.append(ordered.worker("prefork", "flash"))
            faults += 2
        if number in (10, 20):
            close_connections(rabbit, besides=replicate)
            lost += 4
    notes = until_ended(ordered, keys * rounds, timeout=120)
    assert_repeats_in_order(notes, rounds, faults + lost)
    assert overlaps(ordered.notes()) <= lost  # the call under way when a connection was lost


@pytest.mark.soak
def test_rabbitmq_lanes_that_are_empty_are_removed_by_a_reset(ordered, rabbit):
    replicate = ordered.replicate()
    insert(ordered, 2)
    ordered.worker("solo", "flash")
    until_ended(ordered, 2)
    assert ordered.run("flash", "wait").returncode == 0
    assert any(name.startswith("_flash.ordered") for name in rabbit.queues())
    assert ordered.end(replicate) == 0
    reset = ordered.run("flash", "reset", "--yes")
    assert reset.returncode == 0, reset.stderr
    assert not any(name.startswith("_flash.ordered") for name in rabbit.queues())


@pytest.mark.soak
def test_rabbitmq_lanes_time_limits_hold_for_each_change(ordered):
    ordered.environment.update(SHOP_LIMIT="3", SHOP_SLEEP="0.5")
    ordered.replicate()
    ordered.worker("prefork", "flash")
    insert(ordered, 1)
    update(ordered, 1, 1, 6)  # longer than the limit together
    ordered.database.execute("UPDATE items SET note = 'sleep', name = '6'")
    ordered.database.execute("UPDATE items SET note = '', name = '7'")
    assert assert_in_order(until_ended(ordered, 7)) == {0: [0, 1, 2, 3, 4, 5, 7]}
    (letter,) = json.loads(ordered.run("flash", "dead", "list", "--json").stdout)
    assert (letter["error"], letter["deaths"]) == ("TimeLimitExceeded", 0)


@pytest.mark.soak
def test_rabbitmq_lanes_batches_hold_the_changes_that_wait(ordered):
    ordered.environment.update(SHOP_BATCH="1")
    ordered.replicate()
    insert(ordered, 4)
    update(ordered, 4, 1, 30)
    ordered.worker("prefork", "flash")
    notes = until_ended(ordered, 4 * 30, "many")
    values = assert_in_order(notes)
    assert all(found == list(range(30)) for found in values.values())
    assert max(note["together"] for note in notes) > 10


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_rabbitmq_lanes_survive_restarts_of_the_broker(make_shop, kind):
    with Rabbit() as rabbit:
        shop = make_shop(
            rabbit,
            SHOP_OPERATIONS="insert|update|delete",
            SHOP_SLEEP="0.05",
            SHOP_CONF=json.dumps({"task_default_queue_type": kind}),
        )
        shop.project = "ordered"
        shop.replicate()
        for _ in range(2):
            shop.worker("prefork", "flash")
        insert(shop, 4)
        update(shop, 4, 1, 10)
        shop.database.execute(
            "UPDATE items SET note = 'retry late', name = '10' WHERE id = 0",
            "UPDATE items SET note = '' WHERE id = 0",
        )
        wait_until(lambda: summary(shop)["asleep"] == 1, "the retry to wait")
        rabbit.stop(signal.SIGKILL)
        update(shop, 4, 11, 20)
        rabbit.start()
        shop.database.execute("UPDATE items SET note = '', name = '20'")
        wait_until(
            lambda: {int(n["new"]["name"]) for n in ended(shop) if keys_of(n) == 0} >= {20},
            "the last change",
            120,
        )
        assert shop.run("flash", "wait").returncode == 0
        for key in range(4):
            found = [int(n["new"]["name"]) for n in ended(shop) if keys_of(n) == key]
            expected = [n for n in range(21) if n != 10 or key == 0]
            assert list(dict.fromkeys(found)) == expected, f"key {key}: {found}"
        late = [n for n in shop.notes() if n["new"]["note"] == "retry late"]
        begun = [n["retries"] for n in late if n["event"] == "begin"]
        # RabbitMQ 4 shows a message before it has written it: the first call may come again.
        assert begun in ([0, 1], [0, 0, 1])


@pytest.mark.soak
def test_rabbitmq_lanes_of_a_frozen_worker_go_on_and_it_ends_one_call_only(ordered):
    ordered.environment.update(SHOP_SLEEP="0.5", SHOP_CONF='{"flash_lane_lease": 6}')
    ordered.replicate()
    frozen = ordered.worker("solo", "flash")
    insert(ordered, 1)
    update(ordered, 1, 1, 8)
    wait_until(lambda: len(ordered.notes()) >= 3, "the worker to be at work")
    frozen.send_signal(signal.SIGSTOP)
    ordered.worker("solo", "flash")
    until_ended(ordered, 8)
    before = len(ordered.notes())
    frozen.send_signal(signal.SIGCONT)
    update(ordered, 1, 8, 10)
    until_ended(ordered, 10)
    late = [n for n in ordered.notes()[before:] if n["pid"] == frozen.pid]
    assert len([n for n in late if n["event"] == "end" and int(n["new"]["name"]) < 8]) <= 1
    values = [int(n["new"]["name"]) for n in ended(ordered) if n["pid"] != frozen.pid]
    assert values == sorted(values)


@pytest.mark.soak
def test_rabbitmq_lanes_with_once_have_each_effect_once_whatever_ends(ordered, rabbit):
    """Also what the replication worker enqueues again because it has lost its connection."""
    keys, rounds = 12, 40
    conf = {"flash_max_deaths": 100, "flash_lane_lease": 15}
    ordered.environment.update(SHOP_ONCE="1", SHOP_SLEEP="0.005", SHOP_CONF=json.dumps(conf))
    ordered.database.execute("CREATE TABLE effects (id text)")
    replicate = ordered.replicate()
    set_up(ordered)
    ordered.worker("prefork", "flash")
    ordered.worker("prefork", "flash")
    insert(ordered, keys)
    ordered.until_noted(1)
    for number in range(1, rounds):
        update(ordered, keys, number, number + 1)
        if number % 4 == 0:
            with suppress(ProcessLookupError):
                os.kill(ordered.notes()[-1]["pid"], signal.SIGKILL)
        if number % 10 == 0:
            rabbit.control("close_all_connections", "test")
    wait_until(lambda: len(effects(ordered)) == keys * rounds, "all effects", 120)
    assert ordered.run("flash", "wait").returncode == 0
    assert set(effects(ordered).values()) == {1}
    # The marks of another number of lanes begin where those of the last one have ended.
    assert ordered.end(replicate) == 0
    ordered.environment["SHOP_ORDER"] = "one"
    ordered.replicate()
    update(ordered, keys, rounds, rounds + 1)
    wait_until(lambda: len(effects(ordered)) == keys * (rounds + 1), "the last effects", 60)
    assert set(effects(ordered).values()) == {1}
