"""`flash replay` delivers changes again, under the same ids."""

import json
import sys

import pytest

from example_project.servers import wait_until
from tests.acceptance.steps import broker_failpoints, insert_rows, wait_until_confirmed
from tests.processes import run_python

SLOTS = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
WINDOW = json.dumps({"flash_replay_window": 3600})


def replay(shop, *arguments):
    ran = shop.run("flash", "replay", *arguments)
    return ran.returncode, ran.stdout + ran.stderr


def identities(notes):
    return {(note["id"], note["task_id"], note["operation"], str(note["key"])) for note in notes}


def now(shop):
    return str(shop.database.one("SELECT clock_timestamp()"))


@pytest.mark.parametrize(
    "any_shop", ["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)], indirect=True
)
def test_replay_delivers_changes_again_under_the_same_ids(any_shop):
    shop = any_shop
    shop.environment |= {"SHOP_BATCH": "1", "SHOP_CONF": WINDOW}
    shop.worker()
    first = shop.replicate()
    insert_rows(shop.database, 1, 10)
    wait_until_confirmed(shop)
    since = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")
    with shop.database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO items SELECT n, 'x' FROM generate_series(11, 30) AS n")
        with connection.transaction(force_rollback=True):
            connection.execute("INSERT INTO items SELECT n, 'x' FROM generate_series(31, 40) AS n")
        connection.execute("UPDATE items SET id = id + 100, name = 'b' WHERE id % 3 = 0")
        connection.execute("DELETE FROM items WHERE id % 5 = 0")
    until = now(shop)
    shop.database.execute("INSERT INTO items VALUES (500, 'c')")
    shop.until_noted(47)
    shop.until_noted(31, "many")
    wait_until_confirmed(shop)
    shop.end(first)
    # It comes in the ordinary way.
    shop.database.execute("INSERT INTO items VALUES (501, 'd')")
    shop.replicate()
    notes, many = shop.until_noted(48), shop.until_noted(32, "many")
    of_both = ["--handler", "each", "--since", since, "--until", until]
    code, said = replay(shop, *of_both, "--dry-run")
    assert (code, said[:40]) == (0, "shop.each: 36 changes of 1 transactions,")
    assert len(shop.notes()) == len(notes)
    code, said = replay(shop, *of_both, "--yes")
    assert (code, "36 messages enqueued" in said) == (0, True), said
    wait_until(lambda: len(shop.notes()) == len(notes) + 36, "the changes again")
    (commit,) = {note["id"].partition(":")[0] for note in notes if note["key"]["id"] == 25}
    first_time = [note for note in notes if note["id"].startswith(f"{commit}:")]
    assert identities(shop.notes()[len(notes) :]) == identities(first_time)
    code, said = replay(shop, "--handler", "many", "--since", since, "--yes")
    assert (code, "22 changes of 3 transactions" in said) == (0, True), said
    wait_until(lambda: len(shop.notes("many")) == len(many) + 22, "the batch again")
    again = shop.notes("many")[len(many) :]
    assert {note["together"] for note in again} == {22}
    assert [note["id"] for note in again] == list(dict.fromkeys(n["id"] for n in many))[10:]
    assert shop.database.one(SLOTS) == 2
    code, said = replay(shop, "--handler", "each", "--since", "0/1", "--yes")
    assert (code, "the oldest that can be replayed is" in said) == (2, True)


@pytest.mark.soak
def test_replay_that_was_killed_can_be_repeated(any_shop):
    """It leaves no slot, and what it has enqueued comes twice under its id."""
    shop = any_shop
    shop.environment["SHOP_CONF"] = WINDOW
    shop.worker()
    shop.replicate()
    since = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")
    insert_rows(shop.database, 1, 100)
    notes = shop.until_noted(100)
    wait_until_confirmed(shop)
    (step,) = broker_failpoints(shop, "pushed:1", "sent:1")
    command = [sys.executable, "-m", "tests.acceptance.failpoints", step, "--", "-A", "shop"]
    command += ["flash", "replay", "--handler", "each", "--since", since, "--yes"]
    ran = run_python(command, shop.environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "Killed at" in ran.stdout
    assert "100 messages enqueued" in ran.stdout
    wait_until(lambda: len(shop.notes()) >= 200, "the changes again")
    assert identities(shop.notes()) == identities(notes)
    assert shop.database.one(SLOTS) == 2
