"""What a client of the database can make large stays bounded (docs/security.md)."""

import threading
import time

import psutil
import pytest

from flash_celery import on_change, on_message
from flash_celery.column_types import DEEPEST
from flash_celery.errors import ChangeTooLarge
from flash_celery.routing import MOST_FIELDS

from .conftest import shown


def test_a_composite_of_composites_does_not_multiply(flash):
    """A hundred thousand fields, of three types of fifty."""
    flash.database.execute(
        f"CREATE TYPE c AS ({', '.join(f'x{n} int' for n in range(50))})",
        f"CREATE TYPE b AS ({', '.join(f'x{n} c' for n in range(50))})",
        f"CREATE TYPE a AS ({', '.join(f'x{n} b[]' for n in range(50))})",
        "CREATE TYPE pair AS (left_ int, right_ text)",
        "CREATE TABLE items (id int PRIMARY KEY, small pair, large a, list a[], other pair)",
    )
    flash.handler("items").start()
    flash.do(f"INSERT INTO items VALUES (1, '(1,a)', '({',' * 49})', '{{NULL}}', '(2,b)')")
    body = flash.publisher.queues["flash"][0].body
    assert len(body) < 3000
    (change,) = flash.told()
    assert change.new["small"] == {"left_": 1, "right_": "a"}
    assert change.new["other"] == {"left_": 2, "right_": "b"}
    assert change.new["large"] == f"({',' * 49})"
    assert change.new["list"] == "{NULL}"


def test_a_composite_that_is_deep_is_text_further_down(flash):
    levels = DEEPEST + 3
    flash.database.execute(
        "CREATE TYPE level_0 AS (x int)",
        *(f"CREATE TYPE level_{n} AS (x level_{n - 1})" for n in range(1, levels)),
        f"CREATE TABLE items (id int PRIMARY KEY, deep level_{levels - 1})",
    )
    flash.handler("items").start()
    value = "5"
    for n in range(levels):
        value = f"ROW({value})::level_{n}"
    flash.do(f"INSERT INTO items VALUES (1, {value})")
    (change,) = flash.told()
    found, depth = change.new["deep"], 0
    while isinstance(found, dict):
        found, depth = found["x"], depth + 1
    assert depth == DEEPEST
    assert found.startswith("(")


def test_as_many_fields_as_there_may_be_are_told(flash):
    wide = MOST_FIELDS // 2
    columns = ", ".join(f"x{n} int" for n in range(wide))
    flash.database.execute(
        f"CREATE TYPE wide AS ({columns})",
        "CREATE TABLE items (id int PRIMARY KEY, one wide, two wide, three wide)",
    )
    flash.handler("items").start()
    value = f"'({',' * (wide - 1)})'"
    flash.do(f"INSERT INTO items VALUES (1, {value}, {value}, {value})")
    (change,) = flash.told()
    kinds = [type(change.new[name]).__name__ for name in ("one", "two", "three")]
    assert kinds == ["dict", "dict", "str"]


def test_a_change_too_large_ends_it_and_waits_in_the_wal(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
    flash.handler("items").start(flash_max_change_size=1000)
    flash.do("INSERT INTO items VALUES (1, 'a', repeat('x', 900))")
    flash.database.execute("INSERT INTO items VALUES (2, 'b', repeat('x', 1000)), (3, 'c', '')")
    flash.thread.join(20)
    assert isinstance(flash.error, ChangeTooLarge)
    assert str(flash.error).startswith("insert public.items id=2 @")
    assert [change.key["id"] for change in flash.told()] == [1]
    flash.app.tasks["handler"].flash_subscriptions.clear()
    on_change("items", fields=["name"])(flash.app.tasks["handler"])
    flash.error = None
    flash.start()
    flash.do("INSERT INTO items VALUES (4, 'd', '')")
    assert shown(flash.told()) == ["insert b", "insert c", "insert d"]


def test_tables_dropped_and_made_again_leave_nothing_behind(flash):
    """Only what there is now is known, however many there have been."""
    create = "CREATE TABLE items (id int PRIMARY KEY, name text)"
    flash.database.execute(create)
    flash.handler("items").start()
    for number in range(3):
        flash.do(f"INSERT INTO items VALUES ({number}, 'a')")
        flash.database.execute("DROP TABLE items", create)
        oid = flash.database.one("SELECT 'items'::regclass::oid::int8")
        published = f"SELECT count(*) FROM pg_publication_rel WHERE prrelid = {oid}"
        flash.wait(lambda published=published: flash.database.one(published) == 4)
    flash.do("INSERT INTO items VALUES (9, 'a')")
    assert [change.key["id"] for change in flash.told()] == [0, 1, 2, 9]
    record = flash.database.one(
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication "
        "WHERE pubname = 'flash_publication_insert'"
    )
    assert record.count(str(oid)) == 8  # four operations, now and before


@pytest.mark.soak
def test_a_huge_message_that_nobody_handles_passes(flash):
    """It is in memory about four times, and gone."""
    size = 200 << 20
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items")

    @on_message("paid")
    @flash.app.task(name="paid", shared=False)
    def paid(message): ...

    flash.start()
    flash.do("INSERT INTO items VALUES (1)")
    process, most, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, process.memory_info().rss)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    flash.do(
        f"SELECT pg_logical_emit_message(true, 'x', repeat('x', {size}))",
        "INSERT INTO items VALUES (2)",
    )
    done.set()
    watcher.join()
    assert [change.key["id"] for change in flash.told()] == [1, 2]
    assert most - before < 5 * size
