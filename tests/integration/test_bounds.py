"""What a client of the database can make large stays bounded (docs/security.md)."""

import threading
import time

import psutil
import pytest

from flash_celery import letters, on_message
from flash_celery.column_types import DEEPEST
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


@pytest.mark.parametrize("options", [{}, {"batch": 10}], ids=["each", "batched"])
def test_a_change_too_large_is_a_dead_letter_and_stops_nobody(flash, options):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
    flash.database.execute("ALTER TABLE items REPLICA IDENTITY FULL")
    flash.handler("items", **options).start(flash_max_change_size=1000)
    flash.do(
        "INSERT INTO items SELECT n, 'a', repeat('x', n * 400) FROM generate_series(1, 4) AS n",
        "UPDATE items SET name = 'b', note = repeat('y', 400) WHERE id = 3",
        "DELETE FROM items WHERE id = 4",
    )
    told = [f"{c.operation.names()[0]} {c.key['id']}" for c in flash.told()]
    assert told == ["insert 1", "insert 2"]
    found = [letters.unseal(sealed.body) for sealed in flash.publisher.queues["flash.dead"]]
    assert [letter.error for letter in found] == ["ChangeTooLarge"] * 4
    assert found[0].message.startswith("insert public.items id=3 @")
    changes = [change for letter in found for change in letters.contents(letter)]
    assert shown(changes) == [
        *("insert 3,a,UNCHANGED", "insert 4,a,UNCHANGED"),
        "update 3,a,UNCHANGED -> 3,b,UNCHANGED",
        "delete 4,a,UNCHANGED",
    ]
    assert [letter.changes for letter in found] == [[change.id] for change in changes]
    assert len({letter.id for letter in found}) == 4


def test_a_message_too_large_is_a_dead_letter(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items")
    on_message("big")(flash.app.tasks["handler"])
    flash.start(flash_max_change_size=1000)
    emit = "SELECT pg_logical_emit_message(true, 'big', repeat('x', {}))"
    flash.do(emit.format(2000), emit.format(10))
    assert [change.content for change in flash.told()] == [b"x" * 10]
    (sealed,) = flash.publisher.queues["flash.dead"]
    (change,) = letters.contents(letters.unseal(sealed.body))
    assert (change.prefix, change.content) == ("big", b"")


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
