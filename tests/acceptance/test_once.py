"""Handlers with `once=` in real Celery workers: each change has its effect once."""

import json
import os
import random
import signal
from collections import Counter
from contextlib import suppress

import pytest

from example_project.servers import wait_until
from tests.acceptance.steps import wait_until_confirmed
from tests.acceptance.test_lanes import insert, lanes, ordered, update  # noqa: F401 - a fixture

CONF = json.dumps({"flash_replay_window": 3600, "flash_lane_lease": 600})


@pytest.fixture
def once(ordered):  # noqa: F811
    """The project of `ordered.py`, whose handler has `once=`."""
    ordered.environment.update(SHOP_ONCE="1", SHOP_MESSAGES="1", SHOP_CONF=CONF)
    ordered.database.execute("CREATE TABLE effects (id text)")
    return ordered


def effects(shop):
    """How often each change has had its effect."""
    return Counter(text for (text,) in shop.database.execute("SELECT id FROM effects"))


def set_up(shop):
    script = shop.run("flash", "doctor", "--sql").stdout
    statement = script[script.index("CREATE TABLE flash_celery_marks") :]
    shop.database.execute(*statement.strip().rstrip(";").split(";"))


def until_done(shop):
    wait_until(lambda: lanes(shop) == {"ordered.each": []}, "the lanes to be empty", 60)


def replay(shop, *arguments):
    since = "2000-01-01" if not arguments else arguments[0]
    ran = shop.run(
        "flash", "replay", "--handler", "each", "--since", since, "--yes", *arguments[1:]
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_once_has_each_effect_once_whatever_dies(once):
    """Killed before and after the commit, retried, dead and retried, replayed."""
    first = once.replicate()
    once.worker("prefork", "flash")
    since = once.database.one("SELECT pg_current_wal_insert_lsn()::text")
    once.database.execute("INSERT INTO items VALUES (0, '0', NULL), (1, '0', NULL)")
    wait_until(lambda: lanes(once)["ordered.each"], "a change that waits for the table")
    set_up(once)
    once.database.execute(
        "UPDATE items SET name = '1', note = 'kill after' WHERE id = 0",
        "UPDATE items SET name = '2', note = 'retry' WHERE id = 0",
        "UPDATE items SET name = '3', note = 'retry quietly' WHERE id = 1",
        "UPDATE items SET id = 5 WHERE id = 0",
        "DELETE FROM items",
        "BEGIN; SELECT pg_logical_emit_message(true, 'said', 'x'); TRUNCATE items; COMMIT",
    )
    once.until_noted(10)
    until_done(once)
    assert set(effects(once).values()) == {1}
    assert len(effects(once)) == 10
    (fixed,) = once.folder.glob("notes.fixed")  # the process was killed
    fixed.unlink()
    once.database.execute("INSERT INTO items VALUES (7, '0', 'raise')")
    letters = "flash", "dead", "list", "--json"
    wait_until(lambda: json.loads(once.run(*letters).stdout), "the dead letter")
    assert len(effects(once)) == 10
    fixed.touch()
    assert once.run("flash", "dead", "retry", "--all").returncode == 0
    wait_until(lambda: len(effects(once)) == 11, "the dead letter to be handled")
    wait_until_confirmed(once)
    once.end(first)

    code, said = replay(once, since)
    assert (code, "add --again" in said) == (2, True)
    # With another number of lanes, the workers find that out.
    once.environment["SHOP_ORDER"] = "one"
    once.replicate()
    assert replay(once, since)[0] == 0
    until_done(once)
    assert set(effects(once).values()) == {1}
    code, said = replay(once, since)
    assert (code, "add --again" in said) == (2, True)
    assert replay(once, since, "--again")[0] == 0
    until_done(once)
    assert set(effects(once).values()) == {2}
    assert len(effects(once)) == 11


@pytest.mark.soak
def test_once_has_each_effect_once_while_processes_and_workers_are_killed(once):
    once.environment.update(SHOP_CONF=json.dumps({"flash_max_deaths": 100}), SHOP_SLEEP="0.005")
    once.replicate()
    set_up(once)
    workers = [once.worker("prefork", "flash") for _ in range(2)]
    insert(once, 12)
    once.until_noted(1)
    for number in range(1, 60):
        update(once, 12, number, number + 1)
        if number % 3 == 0:
            with suppress(ProcessLookupError):
                os.kill(random.choice(once.notes()[-5:])["pid"], signal.SIGKILL)
        if number in (20, 40):
            workers.pop(0).kill()
            workers.append(once.worker("prefork", "flash"))
    wait_until(lambda: len(effects(once)) == 12 * 60, "all effects", 120)
    until_done(once)
    assert set(effects(once).values()) == {1}
    begun = Counter(note["id"] for note in once.notes() if note["event"] == "begin")
    assert max(begun.values()) > 1  # what a killed process had begun was begun again
