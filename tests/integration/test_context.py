"""`change.context`: written with psycopg and SQLAlchemy, in the stream, and against loops."""

import asyncio
import json
import re
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.orm import Session

from flash_celery import Insert, context, on_change
from flash_celery.dead_letters import letters

from .conftest import shown

DOCS = Path(__file__).parents[2] / "docs"

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"
ADD = "INSERT INTO items VALUES ({})"
EMIT = "SELECT pg_logical_emit_message(true, 'flash.context', '{}'::text)"


def contexts(flash, name="handler"):
    """Each delivered row, and the context it came with."""
    return [(change.new["id"], dict(change.context)) for change in flash.delivered(name)]


def test_psycopg_writes_at_once_and_the_context_ends_with_the_block(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as connection:
        with pytest.raises(ValueError, match="autocommit mode and has no transaction"):
            context(connection, user=1).__enter__()
        with connection.transaction():
            connection.execute(ADD.format(1))
            with context(connection, user=7, why="it's %s \\"):
                connection.execute(ADD.format(2))
                with context(connection, why="inner"), connection.transaction():
                    connection.execute(ADD.format(3))
                connection.execute(ADD.format(4))
            connection.execute(ADD.format(5))
        with connection.transaction(), context(connection, user=8):
            connection.execute(ADD.format(6))
        fails = pytest.raises(psycopg.errors.UniqueViolation)
        with fails, connection.transaction(), context(connection, user=9):
            connection.execute(ADD.format(6))

    async def write():
        async with await psycopg.AsyncConnection.connect(flash.database.dsn) as connection:
            with pytest.raises(TypeError, match="async with context"):
                context(connection, user=1).__enter__()
            async with context(connection, user=10):
                await connection.execute(ADD.format(7))
                await connection.commit()
            await connection.execute(ADD.format(8))

    asyncio.run(write())
    flash.do("SELECT 1")
    outer = {"user": 7, "why": "it's %s \\"}
    assert contexts(flash) == [
        *((1, {}), (2, outer), (3, {"user": 7, "why": "inner"}), (4, outer), (5, {})),
        *((6, {"user": 8}), (7, {"user": 10}), (8, {})),
    ]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_sqlalchemy_writes_before_the_first_write(flash, driver):
    flash.database.execute(ITEMS, "CREATE PUBLICATION nothing")
    flash.database.execute("SELECT pg_create_logical_replication_slot('counted', 'pgoutput')")
    flash.handler("items").start()
    address = flash.database
    engine = sqlalchemy.create_engine(
        f"postgresql+{driver}://postgres@127.0.0.1:{address.server.port}/{address.name}"
    )

    def add(target, number):
        target.execute(sqlalchemy.text(ADD.format(number)))

    with engine.connect() as connection:
        with context(connection, user=1):
            connection.execute(sqlalchemy.text("SELECT 1"))
            connection.rollback()
            add(connection, 1)
            add(connection, 2)
            nested = connection.begin_nested()
            add(connection, 3)
            nested.rollback()
            add(connection, 4)
            connection.commit()
            nested = connection.begin_nested()
            add(connection, 5)
            nested.rollback()
            add(connection, 6)
            connection.commit()
            add(connection, 7)
        add(connection, 8)
        connection.commit()
    with Session(engine) as session, context(session, user=2):
        add(session, 9)
        session.commit()
        add(session, 10)
        session.commit()
    automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
    with automatic.connect() as connection, context(connection, user=3):
        add(connection, 11)
    engine.dispose()
    flash.do("SELECT 1")
    one, two = {"user": 1}, {"user": 2}
    assert contexts(flash) == [
        *((1, one), (2, one), (4, one), (6, one), (7, one), (8, {}), (9, two), (10, two), (11, {})),
    ]
    count = (
        "SELECT count(*) FROM pg_logical_slot_get_binary_changes('counted', NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'nothing', 'messages', 'on') "
        "WHERE position('flash.context'::bytea IN data) > 0"
    )
    # One a transaction, and one where the context ends in it; those of savepoints are gone.
    assert flash.database.one(count) == 6
    flash.database.execute("SELECT pg_drop_replication_slot('counted')")


def test_psycopg2_writes_at_once(flash):
    import psycopg2

    flash.database.execute(ITEMS)
    flash.handler("items").start()
    connection = psycopg2.connect(flash.database.dsn)
    with connection, connection.cursor() as cursor:
        cursor.execute(ADD.format(1))
        with context(connection, user=7, why="it's 5 %s"):
            cursor.execute(ADD.format(2))
        cursor.execute(ADD.format(3))
    connection.autocommit = True
    with pytest.raises(ValueError, match="autocommit mode and has no transaction"):
        context(connection, user=1).__enter__()
    connection.close()
    flash.do("SELECT 1")
    assert contexts(flash) == [(1, {}), (2, {"user": 7, "why": "it's 5 %s"}), (3, {})]


def test_asynchronous_sqlalchemy_writes_before_the_first_write(flash):
    pytest.importorskip("greenlet")
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    flash.database.execute(ITEMS)
    flash.handler("items").start()
    address = flash.database
    url = f"postgresql+psycopg://postgres@127.0.0.1:{address.server.port}/{address.name}"

    def statement(number):
        return sqlalchemy.text(ADD.format(number))

    async def write():
        engine = create_async_engine(url)
        async with AsyncSession(engine) as session:
            with context(session, user=1):
                await session.execute(statement(1))
                nested = await session.begin_nested()
                await session.execute(statement(2))
                await nested.rollback()
                await session.execute(statement(3))
                await session.commit()
            await session.execute(statement(4))
            await session.commit()
        async with engine.begin() as connection:
            with context(connection, user=2):
                await connection.execute(statement(5))
        with pytest.raises(TypeError, match="is not open yet"):
            context(engine.connect(), user=3)
        await engine.dispose()

    asyncio.run(write())
    flash.do("SELECT 1")
    one, two = {"user": 1}, {"user": 2}
    assert contexts(flash) == [(1, one), (3, one), (4, {}), (5, two)]


def test_what_does_not_look_like_a_write_has_no_context(flash):
    """The page lists it: a SELECT of a function that writes, and a COPY by the driver."""
    add = "CREATE FUNCTION add(n int) RETURNS void LANGUAGE sql AS 'INSERT INTO items VALUES (n)'"
    flash.database.execute(ITEMS, add)
    flash.handler("items").start()
    address = flash.database
    engine = sqlalchemy.create_engine(
        f"postgresql+psycopg://postgres@127.0.0.1:{address.server.port}/{address.name}"
    )
    with engine.begin() as connection, context(connection, user=1):
        connection.execute(sqlalchemy.text("SELECT add(1)"))
        driver = connection.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy("COPY items (id) FROM STDIN") as copy:
            copy.write_row([2])
        connection.execute(sqlalchemy.text(ADD.format(3)))
        connection.execute(sqlalchemy.text("SELECT add(4)"))
    engine.dispose()
    flash.do("SELECT 1")
    assert contexts(flash) == [(1, {}), (2, {}), (3, {"user": 1}), (4, {"user": 1})]


@pytest.mark.parametrize("streaming", [False, True])
def test_context_holds_for_what_follows_it_in_its_transaction(flash, streaming, caplog):
    flash.database.execute(ITEMS, "ALTER SYSTEM SET logical_decoding_work_mem = '64kB'")
    flash.database.execute("SELECT pg_reload_conf()")
    flash.handler("items", "insert|truncate", batch=1000)
    flash.handler("items", "insert|truncate", name="single")
    flash.start(flash_use_streaming=streaming)
    many = "INSERT INTO items SELECT n, repeat('x', 900) FROM generate_series({0}, {0} + 199) n"
    with flash.database.connect() as connection:
        connection.execute("BEGIN")
        connection.execute(many.format(1000))
        connection.execute(EMIT.format('{"user": 1}'))
        connection.execute(many.format(2000))
        connection.execute("SAVEPOINT a")
        connection.execute(EMIT.format('{"user": 2}'))
        connection.execute(many.format(3000))
        connection.execute("ROLLBACK TO a")
        for nonsense in ("no json", "[]", '{"a": "%s"}' % ("x" * 5000)):
            connection.execute(EMIT.format(nonsense))
        connection.execute(many.format(4000))
        connection.execute(EMIT.format("{}"))
        connection.execute("TRUNCATE items")
        connection.execute("COMMIT")
        connection.execute(ADD.format(1))
    flash.do("SELECT 1")
    expected = [*[{}] * 200, *[{"user": 1}] * 400, {}, {}]
    for name in ("handler", "single"):
        delivered = flash.delivered(name)
        assert [dict(change.context) for change in delivered] == expected
        assert len({change.id for change in delivered}) == len(expected)
    assert caplog.text.count("has a context that is left out: it is no JSON") == 1


def test_example_of_the_page_says_who_cancelled_an_order(flash, capsys):
    text = (DOCS / "howto/who-and-why.md").read_text()
    (example,) = re.findall(r"<!-- run: context -->\n```python\n(.*?)```", text, re.DOTALL)
    flash.database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")
    names = {"app": flash.app, "__name__": "example"}
    exec(example, names)
    flash.start()
    flash.do("INSERT INTO orders VALUES (1, 'new')")
    with flash.database.connect() as connection:
        names["cancel"](connection, 1, "too late")
    flash.do("SELECT 1")
    (change,) = flash.delivered("example.audit")
    names["audit"](change)
    assert capsys.readouterr().out == "order 1: cancelled by ann: too late\n"


def test_loop_of_two_handlers_ends_in_a_dead_letter(flash):
    """Each writes the other's table."""
    flash.database.execute(ITEMS, "CREATE TABLE others (LIKE items INCLUDING ALL)")

    def declare(name, table, other, **options):
        @flash.app.task(name=name, shared=False)
        def handle(change):
            with psycopg.connect(flash.database.dsn) as connection, context(connection):
                connection.execute(f"INSERT INTO {other} VALUES ({change.new['id'] + 1})")

        on_change(table, **options)(handle)
        return handle

    tasks = {
        "first": declare("first", "items", "others"),
        "second": declare("second", "others", "items", batch=1),
    }
    tasks["third"] = declare("third", "items", "items", ignore_own=True)
    flash.start(flash_max_depth=3)
    flash.do(ADD.format(1))
    seen = []
    while any(flash.publisher.queues.get("flash", [])):
        for name, task in tasks.items():
            for change in flash.delivered(name):
                seen.append((name, change.new["id"], change.context.get("depth")))
                if name != "third":
                    task.apply(args=[change], throw=True)
        flash.do("SELECT 1")
    # The tasks of two handlers of one change may come in either order.
    assert sorted(seen, key=lambda each: (each[1], each[0])) == [
        *[("first", 1, None), ("third", 1, None), ("second", 2, 1), ("first", 3, 2)],
        *[("third", 3, 2), ("second", 4, 3)],
    ]
    found = flash.publisher.queues["flash.dead"]
    dead = [letters.decode(message.body) for message in found]
    assert {letter.handler for letter in dead} == {"first", "third"}
    assert {letter.error for letter in dead} == {"HandlerLoop"}
    assert "written by second at depth 4" in dead[0].message
    assert "flash_max_depth is 3" in dead[0].message
    (change,) = letters.changes_of(dead[0])
    assert isinstance(change, Insert)
    assert change.context["handler"] == "second"


def test_context_in_savepoints_begins_and_ends_before_the_next_row(flash):
    """PostgreSQL does not order a message and a row of another savepoint that follows at once."""
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as connection:
        with connection.transaction():
            connection.execute(ADD.format(1))
            with connection.transaction(), context(connection, user=7), connection.transaction():
                connection.execute(ADD.format(2))
        with connection.transaction():
            connection.execute(ADD.format(3))
            with connection.transaction(), context(connection, user=8):
                pass
            connection.execute(ADD.format(4))
    flash.do("SELECT 1")
    assert contexts(flash) == [(1, {}), (2, {"user": 7}), (3, {}), (4, {})]


@pytest.mark.parametrize("kind", ["psycopg", "sqlalchemy"])
def test_handler_with_once_writes_with_its_context(flash, new_app, kind):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    app, dsn, server = new_app(), flash.database.dsn, flash.database.server
    engine = sqlalchemy.create_engine(
        f"postgresql+psycopg://postgres@127.0.0.1:{server.port}/{flash.database.name}"
    )
    once = engine if kind == "sqlalchemy" else lambda: psycopg.connect(dsn, autocommit=True)

    @app.task(name="once", shared=False)
    def handle(change):
        statement = ADD.format(change.new["id"] + 1)
        change.connection.execute(sqlalchemy.text(statement) if kind == "sqlalchemy" else statement)

    on_change("items", ordered=True, once=once)(handle)
    app.finalize()
    flash.do(ADD.format(1))
    (change,) = flash.delivered()
    handle.apply(args=[change], throw=True)
    engine.dispose()
    flash.do("SELECT 1")
    own = {"handler": "once", "change": change.id, "depth": 1}
    assert contexts(flash) == [(2, own)]


def test_handler_does_not_receive_what_it_wrote_itself(flash):
    flash.database.execute(ITEMS)

    @flash.app.task(name="tidy", shared=False)
    def tidy(change):
        with psycopg.connect(flash.database.dsn) as connection, context(connection):
            connection.execute("UPDATE items SET name = upper(name)")

    on_change("items", ignore_own=True)(tidy)
    flash.handler("items").start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    (change,) = flash.delivered("tidy")
    tidy.apply(args=[change], throw=True)
    flash.do("SELECT 1")
    assert flash.delivered("tidy") == []
    delivered = flash.delivered()
    assert shown(delivered)[1].endswith("1,A")
    assert delivered[1].context == {"handler": "tidy", "change": change.id, "depth": 1}
    assert json.loads(delivered[1].transaction.context) == dict(delivered[1].context)
