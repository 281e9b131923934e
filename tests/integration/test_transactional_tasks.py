"""`transactional`: the commit of a transaction enqueues the tasks that were sent in it."""

# Which block an exception leaves is the subject here.
# ruff: noqa: PT012, SIM117

import asyncio
import json
import threading
from contextlib import suppress

import django.conf
import kombu.serialization
import psycopg
import pytest
from celery import signals
from celery.events.event import get_exchange as event_exchange
from celery.exceptions import Ignore, Retry
from django.utils.functional import empty
from kombu import Queue
from kombu.utils.json import loads

from flash_celery import transactional
from flash_celery.changes.rows import Transaction
from flash_celery.commands.doctor import key_finding
from flash_celery.commands.status import (
    DatabaseStatus,
    ProjectStatus,
    StatusReport,
    as_text,
    broker_status,
    database_status,
    gap_lines,
    project_status,
)
from flash_celery.commands.tail import follow, task_as_text
from flash_celery.dead_letters import letters
from flash_celery.dead_letters.queue import DeadLetterQueue
from flash_celery.dead_letters.refused_tasks import RefusedTasks
from flash_celery.errors import ConfigurationError, TaskRefused, TransactionError
from flash_celery.messages.task_options import TaskOptions
from flash_celery.postgres.gaps import Gap
from flash_celery.postgres.source import connected
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import LogicalMessage
from flash_celery.provisioning.record import published_tables
from flash_celery.settings import Settings
from flash_celery.telemetry import Telemetry
from flash_celery.transactional_tasks import blocks, records, signing
from flash_celery.transactional_tasks.signing import Database
from flash_celery.worker.control import Control
from tests.integration.conftest import Flash
from tests.proxy import Proxy, Way

KEY = "a secret of the tests"


@pytest.fixture
def tasks(flash):
    """Starts the replication worker without any handler; `sent` are the tasks it has enqueued."""
    app = flash.app
    app.conf.flash_signing_key = KEY

    @app.task(name="receipt", shared=False)
    def receipt(*args): ...

    flash.receipt = receipt

    def sent():
        """Return the arguments of the tasks in the queue, in order."""
        flash.do("SELECT 1")
        return [
            tuple(loads(message.body)[0]) for message in flash.publisher.queues.get("celery", [])
        ]

    flash.sent = sent
    return flash.start()


def test_commit_enqueues_what_was_sent_and_a_rollback_does_not(tasks):
    with psycopg.connect(tasks.database.dsn) as connection:
        with connection.transaction(), transactional(connection):
            result = tasks.receipt.delay(1)
            tasks.receipt.apply_async((2,), countdown=5)
        with pytest.raises(ZeroDivisionError), connection.transaction():
            with transactional(connection):
                tasks.receipt.delay(3)
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), connection.transaction(), transactional(connection):
            tasks.receipt.delay(4)
            raise ZeroDivisionError
        with transactional(connection):
            tasks.receipt.delay(5)
            with pytest.raises(ZeroDivisionError), connection.transaction():
                tasks.receipt.delay(6)
                raise ZeroDivisionError
            with connection.transaction():
                tasks.receipt.delay(7)
            tasks.receipt.delay(8)
        connection.commit()
    assert tasks.sent() == [(1,), (2,), (5,), (7,), (8,)]
    assert tasks.publisher.queues["celery"][0].id == result.id


def sqlalchemy_engine(tasks, driver="psycopg", **options):
    sqlalchemy = pytest.importorskip("sqlalchemy")
    info = psycopg.conninfo.conninfo_to_dict(tasks.database.dsn)
    url = sqlalchemy.URL.create(
        f"postgresql+{driver}",
        info.get("user"),
        host="",
        database=info["dbname"],
        query={name: str(info[name]) for name in ("host", "port") if name in info},
    )
    return sqlalchemy.create_engine(url, **options)


def test_sqlalchemy_connections_and_sessions_carry_tasks(tasks):
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    engine = sqlalchemy_engine(tasks)
    with engine.begin() as connection, transactional(connection):
        tasks.receipt.delay(1)
        with pytest.raises(ZeroDivisionError), connection.begin_nested():
            tasks.receipt.delay(2)
            raise ZeroDivisionError
        with connection.begin_nested():
            tasks.receipt.delay(3)
        tasks.receipt.delay(4)
    with Session(engine) as session:
        with transactional(session):
            tasks.receipt.delay(5)
            savepoint = session.begin_nested()
            tasks.receipt.delay(6)
            savepoint.rollback()
        session.commit()
        with transactional(session):
            tasks.receipt.delay(7)
        session.rollback()
    scoped = scoped_session(sessionmaker(engine))
    with transactional(scoped):
        tasks.receipt.delay(8)
    scoped.commit()
    scoped.remove()
    other = sqlalchemy_engine(tasks, "psycopg2")
    with other.begin() as connection, transactional(connection):
        tasks.receipt.delay(9)
    engine.dispose()
    other.dispose()
    assert tasks.sent() == [(1,), (3,), (4,), (5,), (8,), (9,)]


def test_asynchronous_connections_of_psycopg_carry_tasks(tasks):
    async def use_psycopg():
        async with await psycopg.AsyncConnection.connect(tasks.database.dsn) as connection:
            async with transactional(connection):
                tasks.receipt.delay(1)
            await connection.commit()
            async with transactional(connection):
                tasks.receipt.delay(2)
            await connection.rollback()
            with pytest.raises(TransactionError, match="open the block in the savepoint"):
                async with connection.transaction(), transactional(connection):
                    tasks.receipt.delay(3)
                    async with connection.transaction():
                        tasks.receipt.delay(4)
            async with connection.transaction():
                with pytest.raises(ZeroDivisionError):
                    async with connection.transaction(), transactional(connection):
                        tasks.receipt.delay(5)
                        raise ZeroDivisionError
                async with connection.transaction(), transactional(connection):
                    tasks.receipt.delay(6)
            with pytest.raises(ConfigurationError, match="async with"):
                with transactional(connection):
                    pass

    asyncio.run(use_psycopg())
    assert tasks.sent() == [(1,), (6,)]


def test_asynchronous_connections_and_sessions_of_sqlalchemy_carry_tasks(tasks):
    pytest.importorskip("greenlet")
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    async def use_sqlalchemy():
        engine = create_async_engine(sqlalchemy_engine(tasks).url)
        async with AsyncSession(engine) as session:
            async with transactional(session):
                tasks.receipt.delay(7)
            await session.commit()
            async with transactional(session):
                tasks.receipt.delay(8)
        async with engine.begin() as connection, transactional(connection):
            tasks.receipt.delay(9)
        await engine.dispose()

    asyncio.run(use_sqlalchemy())
    assert tasks.sent() == [(7,), (9,)]


@pytest.mark.parametrize("kind", ["psycopg", "session", "connection"])
def test_end_of_the_transaction_in_a_block_takes_the_tasks_before_it(tasks, kind):
    send, engine = tasks.receipt.delay, sqlalchemy_engine(tasks)
    if kind == "psycopg":
        opened = psycopg.connect(tasks.database.dsn)
    else:
        from sqlalchemy.orm import Session

        opened = Session(engine) if kind == "session" else engine.connect()
    with opened as connection:
        with transactional(connection), transactional(connection):
            send(1)
            connection.commit()
            send("undone")
            connection.rollback()
            send(2)
            connection.commit()
        with transactional(connection):
            send("undone")
            connection.rollback()
        connection.commit()
        assert not {"commit", "rollback"} & set(vars(connection))
    engine.dispose()
    assert tasks.sent() == [(1,), (2,)]


async def end_in_blocks(tasks, connection, number):
    async with transactional(connection):
        tasks.receipt.delay(number)
        await connection.commit()
        with pytest.raises(TransactionError, match="the transaction has ended"):
            tasks.receipt.delay("later")
    async with transactional(connection):
        tasks.receipt.delay("undone")
        await connection.rollback()
    await connection.commit()


def test_end_of_the_transaction_in_an_asynchronous_block_takes_the_tasks_before_it(tasks):
    async def use_psycopg():
        async with await psycopg.AsyncConnection.connect(tasks.database.dsn) as connection:
            await end_in_blocks(tasks, connection, 1)

    asyncio.run(use_psycopg())
    assert tasks.sent() == [(1,)]


def test_end_of_the_transaction_in_an_asynchronous_block_of_sqlalchemy(tasks):
    pytest.importorskip("greenlet")
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    async def use_sqlalchemy():
        engine = create_async_engine(sqlalchemy_engine(tasks).url)
        async with AsyncSession(engine) as session:
            await end_in_blocks(tasks, session, 1)
        async with engine.connect() as connection:
            await end_in_blocks(tasks, connection, 2)
        await engine.dispose()

    asyncio.run(use_sqlalchemy())
    assert tasks.sent() == [(1,), (2,)]


def test_commit_in_two_phases_takes_the_tasks_before_it(tasks):
    with psycopg.connect(tasks.database.dsn) as connection:
        connection.tpc_begin(connection.xid(1, "a", tasks.database.name))
        with transactional(connection):
            tasks.receipt.delay(1)
            connection.tpc_prepare()
            with pytest.raises(TransactionError, match="prepared"):
                tasks.receipt.delay("too late")
            assert tasks.sent() == []
            connection.tpc_commit()
        for prepared in (True, False):
            connection.tpc_begin(connection.xid(1, "b", tasks.database.name))
            with transactional(connection):
                tasks.receipt.delay("undone")
                if prepared:
                    connection.tpc_prepare()
                connection.tpc_rollback()

    async def use_psycopg():
        async with await psycopg.AsyncConnection.connect(tasks.database.dsn) as there:
            await there.tpc_begin(there.xid(1, "c", tasks.database.name))
            async with transactional(there):
                tasks.receipt.delay(2)
                await there.tpc_commit()

    asyncio.run(use_psycopg())
    engine = sqlalchemy_engine(tasks)
    with engine.connect() as connection:
        for undone in (False, True):
            transaction = connection.begin_twophase()
            with transactional(connection):
                tasks.receipt.delay("undone" if undone else 3)
                transaction.prepare()
                with pytest.raises(TransactionError, match="prepared"):
                    tasks.receipt.delay("too late")
                transaction.rollback() if undone else transaction.commit()
    engine.dispose()
    assert tasks.sent() == [(1,), (2,), (3,)]


@pytest.fixture
def network(tasks):
    """The network between an application and its database; there are orders in it."""
    tasks.do("CREATE TABLE orders (id int)")
    with Proxy(tasks.database.server.port) as proxy:
        proxy.dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/{tasks.database.name}"
        yield proxy


def orders(tasks):
    return tasks.database.execute("SELECT id FROM orders ORDER BY 1")


# Each writes an order with a task. The connection is about to fail where it yields.


def write_with_psycopg(dsn, insert, send):
    with psycopg.connect(dsn) as connection, connection.transaction():
        connection.execute(insert)
        with transactional(connection):
            send()
        yield


def write_with_psycopg_and_commit_in_the_block(dsn, insert, send):
    with psycopg.connect(dsn) as connection:
        connection.execute(insert)
        with transactional(connection):
            send()
            yield
            connection.commit()


def write_with_psycopg2(dsn, insert, send):
    import psycopg2

    connection = psycopg2.connect(dsn)
    with connection, connection.cursor() as cursor:
        cursor.execute(insert)
        with transactional(connection):
            send()
        yield


def write_with_sqlalchemy(dsn, insert, send):
    import sqlalchemy
    from sqlalchemy.orm import Session

    engine = sqlalchemy.create_engine(dsn.replace("postgresql:", "postgresql+psycopg:"))
    with Session(engine) as session:
        session.execute(sqlalchemy.text(insert))
        with transactional(session):
            send()
        yield
        session.commit()


WRITERS = [
    write_with_psycopg,
    write_with_psycopg_and_commit_in_the_block,
    write_with_psycopg2,
    write_with_sqlalchemy,
]


def test_task_shares_the_fate_of_its_order_if_the_connection_is_lost_in_the_commit(tasks, network):
    """The COMMIT is lost, or its answer: the application cannot know, and gets an error."""
    for number, write in enumerate(WRITERS):
        for way in (Way.TO_SERVER, Way.TO_CLIENT):
            order = 2 * number + (way is Way.TO_CLIENT)
            insert = f"INSERT INTO orders VALUES ({order})"
            writer = write(network.dsn, insert, lambda order=order: tasks.receipt.delay(order))
            next(writer)
            network.stall(way)
            threading.Timer(0.3, network.cut).start()
            with pytest.raises(Exception, match=r"connection|reset|closed") as raised:
                next(writer)
            assert type(raised.value).__name__ == "OperationalError"
            network.heal()
    # In a block the tasks are written before the COMMIT, which is not sent then.
    assert orders(tasks) == [(1,), (5,), (7,)]
    assert tasks.sent() == orders(tasks)


def test_task_shares_the_fate_of_a_prepared_transaction_whose_connection_is_lost(tasks, network):
    def prepare(number, stall):
        with psycopg.connect(network.dsn) as connection:
            connection.tpc_begin(f"order {number}")
            connection.execute("INSERT INTO orders VALUES (%s)", [number])
            with transactional(connection):
                tasks.receipt.delay(number)
            if stall:
                network.stall(Way.TO_CLIENT)
                threading.Timer(0.3, network.cut).start()
                connection.tpc_prepare()
            with transactional(connection):
                connection.tpc_prepare()
                network.cut()
                connection.tpc_commit()

    for number, stall in enumerate((False, True, False)):
        with pytest.raises(psycopg.OperationalError):
            prepare(number, stall)
        network.heal()
    assert tasks.sent() == []
    tasks.stop()
    tasks.start()
    with psycopg.connect(tasks.database.dsn) as connection:
        prepared = {xid.gtrid: xid for xid in connection.tpc_recover()}
        assert sorted(prepared) == ["order 0", "order 1", "order 2"]
        assert tasks.sent() == orders(tasks) == []
        connection.tpc_rollback(prepared["order 0"])
        connection.tpc_commit(prepared["order 2"])
        connection.tpc_commit(prepared["order 1"])
    assert tasks.sent() == [(2,), (1,)]
    assert orders(tasks) == [(1,), (2,)]


def test_blocks_of_generators_end_in_any_order(tasks):
    connection = psycopg.connect(tasks.database.dsn)

    def send(name):
        with transactional(connection):
            yield tasks.receipt.delay(name)
            yield tasks.receipt.delay(name)

    first, second = send(1), send(2)
    next(first)
    next(second)
    list(first)
    list(second)
    tasks.receipt.apply_async(("past it",), queue="elsewhere")
    connection.commit()
    connection.close()
    # The first one's second task was sent in the innermost block, that of the second.
    assert sorted(tasks.sent()) == [(1,), (1,), (2,), (2,)]


def test_psycopg2_carries_tasks_and_raw_savepoints_undo_them(tasks):
    psycopg2 = pytest.importorskip("psycopg2")
    connection = psycopg2.connect(tasks.database.dsn)
    with connection, connection.cursor() as cursor, transactional(connection):
        tasks.receipt.delay(1)
        cursor.execute("SAVEPOINT a")
        tasks.receipt.delay(2)
        cursor.execute("ROLLBACK TO a")
        tasks.receipt.delay(3)
    connection.close()
    assert tasks.sent() == [(1,), (3,)]


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def encoded(request, new_database, new_app):
    """A replication worker of a database with an encoding other than UTF-8."""
    options = f"ENCODING '{request.param}' LOCALE 'C' TEMPLATE template0"
    flash = Flash(new_database(options), new_app(flash_signing_key=KEY))
    yield flash
    flash.stop()


def test_databases_of_every_encoding_carry_tasks(encoded):
    import psycopg2

    @encoded.app.task(name="receipt", shared=False)
    def receipt(text): ...

    encoded.start()
    connection = psycopg2.connect(encoded.database.dsn)
    with connection, transactional(connection):
        receipt.delay("psycopg2 \N{OWL}")
    connection.close()
    with psycopg.connect(encoded.database.dsn) as connection, transactional(connection):
        receipt.delay("psycopg \N{OWL}")
    engine = sqlalchemy_engine(encoded, "psycopg2")
    with engine.begin() as connection, transactional(connection):
        receipt.delay("sqlalchemy \N{OWL}")
    engine.dispose()
    queue = encoded.publisher.queues.setdefault("celery", [])
    encoded.wait(lambda: len(queue) == 3)
    assert [loads(message.body)[0] for message in queue] == [
        ["psycopg2 \N{OWL}"],
        ["psycopg \N{OWL}"],
        ["sqlalchemy \N{OWL}"],
    ]


def test_role_that_may_not_ask_for_the_system_identifier_verifies_tasks(tasks):
    """The replication worker knows it from the stream."""
    role = f"{tasks.database.name}_reader"
    tasks.stop()
    tasks.database.execute(
        f"CREATE ROLE {role} LOGIN REPLICATION",
        f"GRANT CREATE ON DATABASE {tasks.database.name} TO {role}",
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC",
    )
    tasks.database.execute(
        *(
            f"ALTER PUBLICATION flash_publication_{name} OWNER TO {role}"
            for name in ("insert", "update", "delete", "truncate")
        )
    )
    try:
        tasks.start(flash_dsn=tasks.database.dsn.replace("postgres@", f"{role}@"))
        with psycopg.connect(tasks.database.dsn) as connection, transactional(connection):
            tasks.receipt.delay(1)
        assert tasks.sent() == [(1,)]
    finally:
        tasks.database.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")


def test_blocks_side_by_side_do_not_mix(tasks):
    """Threads, asyncio tasks, and blocks in blocks on connections of their own."""

    def in_thread(number):
        with psycopg.connect(tasks.database.dsn) as connection, transactional(connection):
            for place in range(5):
                tasks.receipt.delay(number, place)
            if number % 2:
                connection.rollback()
                raise ZeroDivisionError

    def run(number):
        try:
            in_thread(number)
        except ZeroDivisionError:
            assert number % 2

    async def in_task(number):
        connect = psycopg.AsyncConnection.connect
        async with await connect(tasks.database.dsn) as connection:
            async with transactional(connection):
                for place in range(5):
                    tasks.receipt.delay(number, place)
                    await asyncio.sleep(0)
            if number % 2:
                await connection.rollback()

    async def all_tasks():
        await asyncio.gather(*map(in_task, range(10, 14)))

    threads = [threading.Thread(target=run, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    asyncio.run(all_tasks())
    for thread in threads:
        thread.join(30)
    with (
        psycopg.connect(tasks.database.dsn) as outer,
        psycopg.connect(tasks.database.dsn) as inner,
        transactional(outer),
    ):
        tasks.receipt.delay("outer")
        with transactional(inner):
            tasks.receipt.delay("inner")
        tasks.receipt.delay("outer")
        inner.rollback()
    expected = {(number, place) for number in (0, 2, 4, 10, 12) for place in range(5)}
    sent = tasks.sent()
    assert sent[-2:] == [("outer",), ("outer",)]
    assert sorted(sent[:-2]) == sorted(expected)
    for number in (0, 2, 4, 10, 12):
        assert [place for each, place in sent[:-2] if each == number] == [*range(5)]


def test_asyncio_task_that_outlives_its_block_publishes_as_ever(tasks):
    published = []
    tasks.app.send_task_message = None

    async def late(ended):
        await ended.wait()
        tasks.receipt.apply_async(("late",), queue="late")

    async def main():
        ended = asyncio.Event()
        async with await psycopg.AsyncConnection.connect(tasks.database.dsn) as connection:
            async with transactional(connection):
                task = asyncio.create_task(late(ended))
                tasks.receipt.delay("in time")
        ended.set()
        await task

    asyncio.run(main())
    assert tasks.sent() == [("in time",)]
    with tasks.app.connection_for_write() as connection:
        message = connection.default_channel.basic_get("late", no_ack=True)
        published.append(message)
    assert published[0] is not None


@pytest.fixture
def without_django(monkeypatch):
    """Django without settings: other tests in this process may have configured it."""
    if django.conf.settings.configured:
        monkeypatch.setattr(django.conf.settings, "_wrapped", empty)


@pytest.mark.usefixtures("without_django")
def test_errors_are_raised_in_the_transaction(tasks):
    connection = psycopg.connect(tasks.database.dsn, autocommit=True)
    with pytest.raises(TransactionError, match="nothing to join"), transactional(connection):
        tasks.receipt.delay(1)
    with transactional(connection, strict=False):
        tasks.receipt.delay(2)
    with connection.transaction(), transactional(connection):
        with pytest.raises(Exception, match="not JSON serializable"):
            tasks.receipt.delay(object())
        tasks.receipt.delay(3)
    with pytest.raises(ConfigurationError, match="psycopg, psycopg2 or SQLAlchemy, not object"):
        with transactional(object()):
            pass
    with pytest.raises(ConfigurationError, match="needs the connection or session"):
        with transactional():
            pass
    with pytest.raises(ConfigurationError, match="parentheses"):
        transactional(lambda: None)
    connection.close()
    assert tasks.sent() == [(2,), (3,)]


@pytest.fixture
def lonely(database, new_app):
    """An app whose database has no slot; no replication worker runs."""
    app = new_app(
        broker_url="memory://",
        flash_dsn=database.dsn,
        flash_replication_slot=database.slot,
        flash_signing_key=KEY,
    )

    @app.task(name="receipt", shared=False)
    def receipt(*args): ...

    with psycopg.connect(database.dsn) as connection:
        connection.receipt = receipt
        yield app, connection, receipt


def test_database_without_a_reader_is_warned_of_or_refused(lonely, caplog):
    _, connection, receipt = lonely
    for _ in range(2):
        with transactional(connection):
            receipt.delay()
    (record,) = [each for each in caplog.records if "no slot of flash-celery" in each.message]
    assert record.levelname == "WARNING"


def test_strict_database_without_a_reader_is_refused(lonely):
    app, connection, receipt = lonely
    app.conf.flash_transactional_strict = True
    with pytest.raises(TransactionError, match="start `flash replicate` once"):
        with transactional(connection):
            receipt.delay()


@pytest.mark.usefixtures("without_django")
def test_task_without_a_key_or_too_large_is_refused(lonely, new_app):
    app, connection, receipt = lonely
    app.conf.flash_max_change_size = 2_100_000
    with pytest.raises(TransactionError, match="flash_max_change_size"):
        with transactional(connection):
            receipt.delay("x" * 2_200_000)

    # Its JSON is twelve times as long, which the replication worker would refuse.
    kombu.serialization.register("as-is", lambda args: args[0][0], str, "text/plain")
    with pytest.raises(TransactionError, match="has 2401"), transactional(connection):
        receipt.apply_async(("\N{OWL}" * 2_000_000,), serializer="as-is")
    kombu.serialization.unregister("as-is")

    other = new_app("other", broker_url="memory://", flash_dsn=app.conf.flash_dsn)

    @other.task(name="other", shared=False)
    def task(): ...

    with pytest.raises(ConfigurationError, match="set flash_signing_key"):
        with transactional(connection):
            task.delay()
    with pytest.raises(TransactionError, match="another Celery app"), transactional(connection):
        receipt.delay()
        task.delay()


def test_decorator_runs_a_function_in_a_block(tasks):
    connection = psycopg.connect(tasks.database.dsn)

    @transactional(connection)
    def send(number):
        tasks.receipt.delay(number)
        return number

    assert send(1) == 1
    assert send(2) == 2
    connection.commit()

    async def main():
        async with await psycopg.AsyncConnection.connect(tasks.database.dsn) as there:

            @transactional(there)
            async def send_too(number):
                tasks.receipt.delay(number)

            await send_too(3)

    asyncio.run(main())
    connection.close()
    assert tasks.sent() == [(1,), (2,), (3,)]


def test_messages_that_the_application_did_not_sign_are_refused(tasks, caplog):
    """Unsigned, altered, of another key, of another database, too old, and one that is none."""
    with psycopg.connect(tasks.database.dsn, autocommit=True) as connection:
        system, name = connection.execute(
            "SELECT system_identifier::text, current_database() FROM pg_control_system()"
        ).fetchone()
        here, there = Database(system, name), Database(system, "another")
        (key,) = signing.keys_of(tasks.replicator._settings)
        other = signing._derived("another key")
        body = records.encode(
            [records.TaskRecord("receipt", "x", "", "celery", 0, "a", "b", "[]", False, "", "", ())]
        )
        good = signing.sign(key, here, body)
        old = signing._HEAD.pack(1, key.id, 1, signing._signature(key, here, 1, body)) + body
        forged = [
            b"",
            b"secret content",
            good[:-1] + b"x",
            signing.sign(other, here, body),
            signing.sign(key, there, body),
            old,
            signing.sign(key, here, b"no tasks"),
            b"\x02" + good[1:],
        ]
        for content in forged:
            connection.execute(
                "SELECT pg_logical_emit_message(true, 'flash.task', %s::bytea)", [content]
            )
        with transactional(connection, strict=False):
            tasks.receipt.delay("good")
    assert tasks.sent() == [("good",)]
    assert tasks.replicator.telemetry.refused_tasks == len(forged)
    (record,) = [each for each in caplog.records if "refused" in each.message]
    (message,) = tasks.publisher.queues["flash.dead"]
    letter = letters.decode(message.body)
    assert letter.summary.startswith("TaskRefused: 1 message with the prefix flash.task refused")
    assert "secret" not in f"{record.message} {message.body}"
    with pytest.raises(ConfigurationError, match="hold no task; drop them"):
        DeadLetterQueue(tasks.app, "flash.dead").retry([letter], split=False)


def test_status_shows_how_many_messages_were_refused_also_after_a_restart(tasks):
    def forge(content):
        tasks.do(f"SELECT pg_logical_emit_message(true, 'flash.task', '{content}')")

    def status():
        settings = tasks.replicator._settings
        options = TaskOptions(tasks.app, settings, [])
        with connected(settings) as source:
            database = database_status(source)
        broker = broker_status(settings, options, {}, None)
        return StatusReport(project_status(settings, options), database, broker, None)

    assert status().as_json()["refused"] is None
    forge("secret")
    tasks.wait(lambda: status().database.refused is not None)
    forge("secret of its successor")
    tasks.stop()  # before it is due
    assert status().as_json()["refused"]["count"] == 2
    tasks.start()
    forge("secret")
    tasks.wait(lambda: status().database.refused.count == 3)
    (line,) = [line for line in as_text(status()) if line.startswith("refused")]
    assert line.startswith("refused    3 messages with tasks since 20")
    assert line.endswith(": it is not signed")
    assert "handlers" not in as_text(status()), "there are none"
    assert "secret" not in str(status().as_json())
    with connected(tasks.replicator._settings) as source:
        assert published_tables(source) is not None, "the other part of the comment is kept"


def test_refused_message_that_is_read_again_is_counted_once_and_reported_again(app):
    telemetry = Telemetry()
    refused = RefusedTasks(app, "dead", telemetry, clock=lambda: 0.0)

    def read(commit, place):
        message = LogicalMessage(None, True, Lsn(place), "flash.task", b"forged")
        return refused.refuse(message, Transaction(Lsn(commit), 1, 0), "it is not signed")

    first = read(10, 1)
    assert [read(10, 2), read(20, 3)] == [None, None]
    # The session ends before anything is acknowledged.
    assert [read(10, 1).id, read(10, 2), read(20, 3)] == [first.id, None, None]
    assert telemetry.refused_tasks == 3
    refused.begin_again()
    assert read(10, 1) is None
    assert telemetry.refused_tasks == 4


def test_message_that_is_too_large_is_refused_before_its_signature_is_computed():
    database = Database("1", "shop")
    body, keys = b" " * 1000, [signing._derived("a secret")]
    content = signing.sign(keys[0], database, body)
    with pytest.raises(TaskRefused, match="flash_max_change_size"):
        signing.Verifier(keys, database, 60, 999).verify(content, 0.0)
    assert signing.Verifier(keys, database, 60, 1000).verify(content, 0.0) == body


def test_rotated_keys_sign_and_are_accepted(flash):
    app = flash.app
    app.conf.flash_signing_key = ["the new secret", "the old secret"]
    flash.start()
    settings = flash.replicator._settings
    keys = signing.keys_of(settings)
    assert keys == [signing._derived("the new secret"), signing._derived("the old secret")]
    database = Database("1", "shop")
    for key in keys:
        message = signing.sign(key, database, b"body")
        verifier = signing.Verifier(keys, database, 60, 1000)
        assert verifier.verify(message, 0.0) == b"body"


def test_signals_and_traces_lead_from_the_application_to_the_broker(tasks):
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    heard = []

    def before(headers, **_):
        heard.append(("before", threading.current_thread().name))
        headers["tenant"] = "a"

    def after(headers, body, **_):
        heard.append(("after", headers["tenant"], tuple(body[0]), threading.current_thread().name))

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    try:
        tracer = provider.get_tracer("test")
        with (
            psycopg.connect(tasks.database.dsn) as connection,
            tracer.start_as_current_span("request") as request,
        ):
            with transactional(connection):
                tasks.receipt.delay(1)
                tasks.receipt.apply_async((2,), serializer="yaml")
                assert trace.get_current_span() is request
            assert heard == [("before", "MainThread")] * 2
        tasks.do("SELECT 1")
        assert heard[2:] == [
            ("after", "a", (1,), "flash-publishing"),
            ("after", "a", (2,), "flash-publishing"),
        ]
        published, *_ = exporter.get_finished_spans()
        assert published.name == "apply_async/receipt"
        assert published.parent.span_id == request.get_span_context().span_id
        message = tasks.publisher.queues["celery"][0]
        assert f"{published.context.span_id:016x}" in message.headers["traceparent"]
    finally:
        signals.before_task_publish.disconnect(before)
        signals.after_task_publish.disconnect(after)
        instrumentor.uninstrument()


def test_trace_of_sentry_goes_through_the_transaction(tasks):
    sentry_sdk = pytest.importorskip("sentry_sdk")
    from sentry_sdk.integrations.celery import CeleryIntegration

    class Nowhere(sentry_sdk.transport.Transport):
        def capture_envelope(self, envelope): ...

    options = {"traces_sample_rate": 1.0, "default_integrations": False, "transport": Nowhere}
    sentry_sdk.init("http://key@127.0.0.1:1/1", integrations=[CeleryIntegration()], **options)
    try:
        with psycopg.connect(tasks.database.dsn) as connection:
            with sentry_sdk.start_transaction(name="request", op="http") as request:
                with transactional(connection):
                    tasks.receipt.delay(1)
    finally:
        sentry_sdk.init()
    assert tasks.sent() == [(1,)]
    (message,) = tasks.publisher.queues["celery"]
    assert message.headers["headers"]["sentry-trace"].startswith(request.trace_id)


def test_retry_and_replacement_go_past_the_block(tasks):
    """They belong to the running task: rolled back, the task would be lost."""
    app, dsn = tasks.app, tasks.database.dsn
    app.conf.task_default_queue = "own"

    @app.task(name="retries", bind=True, shared=False, max_retries=3)
    def retries(self):
        with psycopg.connect(dsn) as connection, transactional(connection):
            tasks.receipt.delay("rolled back")
            raise self.retry(countdown=0)

    @app.task(name="replaces", bind=True, shared=False)
    def replaces(self):
        with psycopg.connect(dsn) as connection, transactional(connection):
            raise self.replace(tasks.receipt.si("replaced"))

    for task in (retries, replaces):
        task.push_request(id=f"id-{task.name}", called_directly=False, is_eager=False)
        try:
            with pytest.raises((Retry, Ignore)):
                task.run()
        finally:
            task.pop_request()
    with app.connection_for_write() as connection:
        messages = [connection.default_channel.basic_get("own", no_ack=True) for _ in range(3)]
    assert [message.headers["id"] for message in messages[:2]] == ["id-retries", "id-replaces"]
    assert messages[2] is None
    assert tasks.sent() == []


def test_what_a_block_does_not_carry_is_sent_at_once(tasks):
    app, receipt = tasks.app, tasks.receipt
    app.conf.update(task_default_queue="own", task_send_sent_event=True)
    with app.connection_for_write() as connection:
        control = Queue("control", app.control.mailbox.exchange, "#", channel=connection)
        events = Queue("events", event_exchange(connection), "#", channel=connection)
        for queue in (control, events):
            queue.declare()
        with suppress(ZeroDivisionError), psycopg.connect(tasks.database.dsn) as database:
            with transactional(database), app.amqp.Producer(connection) as producer:
                receipt.apply_async((1,), producer=producer)
                receipt.apply_async((2,), connection=connection)
                app.control.revoke("an id")
                receipt.delay("undone")
                raise ZeroDivisionError
        take = connection.default_channel.basic_get
        bodies = [json.loads(take("own", no_ack=True).body)[0] for _ in range(2)]
        assert bodies == [[1], [2]]
        assert json.loads(take("control", no_ack=True).body)["method"] == "revoke"
        sent = [json.loads(take("events", no_ack=True).body) for _ in range(2)]
        assert [(event["type"], event["args"]) for event in sent] == [
            ("task-sent", "(1,)"),
            ("task-sent", "(2,)"),
        ]
        assert [take(queue, no_ack=True) for queue in ("own", "control", "events")] == [None] * 3
    assert tasks.sent() == []


def test_eager_tasks_run_at_once_with_a_warning(tasks, caplog, monkeypatch):
    monkeypatch.setattr(blocks, "_eager_warned", False)
    tasks.app.conf.task_always_eager = True
    with psycopg.connect(tasks.database.dsn) as connection:
        for _ in range(2):
            with transactional(connection):
                assert tasks.receipt.delay(1).successful()
    assert caplog.text.count("task_always_eager is on") == 1
    assert tasks.sent() == []


def test_tail_shows_the_name_and_id_of_tasks_and_arguments_if_asked(tasks):
    lines, ready, control = [], threading.Event(), Control()

    def show(task, transaction):
        lines.extend(task_as_text(task, transaction, arguments) for arguments in (False, True))
        return len(lines) < 4

    settings = tasks.replicator._settings
    arguments = settings, [], lambda change: True, ready.set, control, show
    tail = threading.Thread(target=follow, args=arguments)
    tail.start()
    assert ready.wait(30)
    with psycopg.connect(tasks.database.dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_logical_emit_message(true, 'flash.task', 'forged')")
        with transactional(connection, strict=False):
            result = tasks.receipt.delay("a value")
            other = tasks.receipt.apply_async(shadow="as a worker shows it")
    tail.join(30)
    assert lines[0].endswith(f"task receipt[{result.id}]")
    assert lines[1].endswith(f"task receipt[{result.id}]  ('a value',) {{}}")
    assert lines[2].endswith(f"task as a worker shows it[{other.id}]")
    assert tasks.database.one("SELECT count(*) FROM pg_publication WHERE pubname ~ 'tail'") == 0


@pytest.mark.usefixtures("without_django")
def test_doctor_checks_the_key():
    def finding(key):
        found = key_finding(Settings(flash_signing_key=key))
        return found.level, found.message

    assert finding("") == ("ok", "no flash_signing_key, so transactional() refuses tasks")
    assert finding("short")[0] == "warning"
    level, message = finding(["x" * 16, "y" * 16])
    ids = ", ".join(signing._derived(each * 16).id.hex() for each in "xy")
    assert (level, message) == (
        "ok",
        f"transactional() signs with flash_signing_key, and 1 more accepted (ids {ids})",
    )


def test_status_says_since_when_tasks_may_be_missing():
    project = ProjectStatus("", [], "flash", [], carries_tasks=True)
    gap = Gap("flash", "wal_removed", "0/1", "2026-01-02 03:04:05").to_json()
    lines = gap_lines(project, DatabaseStatus(gaps=[gap]))
    assert "gap        tasks of transactions since 2026-01-02 03:04:05 may be missing, too" in lines
