"""A committed row becomes a Celery task: the commands as a user runs them."""

import json
import signal

import pytest

from example_project.servers import wait_until


def test_operations_reach_their_handlers(any_shop):
    any_shop.worker()
    replicate = any_shop.replicate()
    any_shop.database.execute(
        "INSERT INTO items VALUES (1, 'a', 'x')",
        "UPDATE items SET name = 'b' WHERE id = 1",
        "DELETE FROM items WHERE id = 1",
        "TRUNCATE items",
    )
    notes = sorted(any_shop.until_noted(4), key=lambda note: note["id"])
    assert [note["operation"] for note in notes] == ["insert", "update", "delete", "truncate"]
    assert notes[0]["new"] == {"id": 1, "name": "a", "note": "x"}
    assert notes[1]["new"] == {"id": 1, "name": "b", "note": "x"}
    assert notes[2]["key"] == {"id": 1}
    assert len({note["task_id"] for note in notes}) == 4
    assert any_shop.end(replicate) == 0


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_handlers_run_in_workers_of_any_pool(shop, pool):
    shop.worker(pool)
    shop.replicate()
    shop.database.execute("INSERT INTO items SELECT n, 'a' FROM generate_series(1, 50) AS n")
    notes = shop.until_noted(50)
    assert {note["new"]["id"] for note in notes} == set(range(1, 51))


def test_changes_without_a_replication_worker_are_not_lost(shop):
    shop.end(shop.replicate())
    shop.database.execute("INSERT INTO items SELECT n, 'a' FROM generate_series(1, 20) AS n")
    shop.replicate()
    shop.worker()
    assert len(shop.until_noted(20)) == 20


def test_batches_conditions_and_fields_reach_their_handlers(shop):
    shop.environment |= {"SHOP_BATCH": "1", "SHOP_WHERE": "1"}
    shop.worker()
    shop.replicate()
    shop.database.execute(
        "INSERT INTO items SELECT n, 'open', 'x' FROM generate_series(1, 250) AS n",
        "UPDATE items SET name = 'paid' WHERE id = 7",
        "UPDATE items SET note = 'y' WHERE id = 7",
        "UPDATE items SET name = 'void' WHERE id = 7",
    )
    batches = shop.until_noted(250, "many")
    assert [note["new"]["id"] for note in batches] == list(range(1, 251))
    assert max(note["together"] for note in batches) > 1
    # Deletes have a queue of their own here, so they may be handled earlier.
    notes = sorted(shop.until_noted(2, "paid"), key=lambda note: note["id"])
    assert [(note["operation"], note["new"] or note["old"]) for note in notes] == [
        ("insert", {"name": "paid"}),
        ("delete", {"name": "paid"}),
    ]
    assert shop.until_noted(253)


@pytest.mark.parametrize(
    "any_shop", ["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)], indirect=True
)
def test_batch_is_retried_as_a_whole(any_shop):
    any_shop.environment |= {"SHOP_RETRY": "1"}
    any_shop.replicate()
    any_shop.database.execute("INSERT INTO items SELECT n, 'a' FROM generate_series(1, 30) AS n")
    any_shop.worker()
    wait_until(lambda: len(any_shop.notes("stubborn")) >= 90, "three attempts at 30 changes")
    times = {}
    for note in any_shop.notes("stubborn"):
        times.setdefault(note["id"], []).append((note["task_id"], note["together"], note["new"]))
    assert len(times) == 30
    for notes in times.values():
        assert len(notes) == 3
        assert notes[0] == notes[1] == notes[2]


def test_sigterm_and_sigint_end_replicate_with_0_and_repeat_nothing(shop):
    for number in (signal.SIGTERM, signal.SIGINT):
        replicate = shop.replicate()
        shop.database.execute(f"INSERT INTO items VALUES ({int(number)}, 'a')")
        assert shop.end(replicate, number) == 0
    shop.replicate()
    shop.worker()
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    assert len(shop.until_noted(3)) == 3


def test_task_of_a_killed_worker_returns_after_the_visibility_timeout(shop):
    options = {
        "visibility_timeout": 2,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
    shop.environment["SHOP_CONF"] = json.dumps({"broker_transport_options": options})
    shop.replicate()
    killed = shop.worker(SHOP_SLEEP="1000")
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    (first,) = shop.until_noted(1)
    shop.end(killed, signal.SIGKILL)
    shop.worker()
    # Before 5.7 kombu has no such options, and looks every 100 seconds.
    wait_until(lambda: len(shop.notes()) == 2, "the task to come back", 180)
    assert shop.notes()[1] == first


def test_hot_spare_waits_and_takes_over(shop):
    first = shop.replicate()
    second = shop.replicate(wait=False)
    shop.until_said(second, "is active for PID")
    assert "flash_celery" in second.log.read_text()
    assert shop.end(first, signal.SIGKILL) == -signal.SIGKILL
    shop.until_said(second, "Replicating the slot")
    shop.worker()
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    assert len(shop.until_noted(1)) == 1
