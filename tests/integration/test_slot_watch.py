"""The watch over the slot, on a real server and with a clock of the test's own."""

import logging
import re
import select
from contextlib import closing

import psycopg
import pytest

from example_project.servers import wait_until
from flash_celery.acknowledgement import Progress
from flash_celery.errors import ConfigurationError, ReplicationError
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.postgres import slots
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.protocol.lsn import Lsn
from flash_celery.provisioning.preflight import examine
from flash_celery.settings import Settings
from flash_celery.table_name import TableName
from flash_celery.worker import slot_watch
from flash_celery.worker.slot_watch import SlotWatch


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stream(database):
    database.execute("CREATE TABLE items (id int)", "CREATE PUBLICATION items FOR TABLE items")
    with closing(ReplicationConnection(database.dsn)) as stream:
        slots.create(stream, database.slot)
        stream.start_session()
        stream.start(database.slot, ["items"])
        yield stream


@pytest.fixture
def connection(database):
    with connect(database.dsn) as connection:
        yield connection


@pytest.fixture
def progress():
    return Progress()


@pytest.fixture
def guard(database, stream, connection, clock, progress):
    settings = Settings(flash_replication_slot=database.slot)
    return SlotWatch(Source(connection, settings), stream.pid, progress, clock)


def position(database):
    return Lsn.parse(database.one("SELECT pg_current_wal_insert_lsn()"))


def test_missing_heartbeat_ends_the_stream(database, guard, clock):
    guard.check(Lsn(1), listening=True)
    database.execute("INSERT INTO items SELECT generate_series(1, 1000)")
    clock.now += 10
    guard.check(Lsn(1), listening=True)  # writes it
    clock.now += 29
    guard.check(Lsn(1), listening=True)
    # Its writes have to be decoded; a server that is at work has more time.
    wait_until(lambda: not guard.server_is_busy(), "the server to be idle")
    clock.now += 2
    with pytest.raises(ReplicationError, match="has not come through the stream for 31 s"):
        guard.check(Lsn(1), listening=True)


def test_heartbeat_is_not_expected_of_a_busy_or_unread_stream(database, guard, clock):
    guard.check(Lsn(1), listening=True)
    database.execute("INSERT INTO items SELECT generate_series(1, 1000)")
    clock.now += 10
    guard.check(Lsn(1), listening=True)
    for received in range(2, 10):
        clock.now += 20
        guard.check(Lsn(received), listening=True)
    for _ in range(5):
        clock.now += 40
        guard.check(Lsn(9), listening=False)
    guard.check(position(database), listening=True)
    clock.now += 100
    guard.check(Lsn(9), listening=True)


def test_heartbeat_returns_as_a_position_with_any_publication(database, stream, guard, clock):
    guard.check(Lsn(1), listening=True)
    database.execute("CREATE TABLE other AS SELECT generate_series(1, 1000)")
    clock.now += 10
    guard.check(Lsn(1), listening=True)
    written = position(database)
    start = stream.received
    for _ in range(500):
        stream.send_status(start, start, start, reply=True)
        stream.receive()
        if stream.received >= written:
            break
        select.select([stream], [], [], 0.05)
    assert stream.received >= written


def test_heartbeat_does_not_keep_an_idle_server_awake(database, guard, clock):
    guard.check(Lsn(1), listening=True)
    before = position(database)
    for _ in range(20):
        clock.now += 10
        guard.check(position(database), listening=True)
    # The WAL that the server writes by itself now and then is smaller.
    assert position(database) - before < 1024


def test_heartbeat_without_privilege_is_logged_once_and_tried_again(
    database, stream, connection, guard, clock, caplog
):
    database.execute("CREATE ROLE humble")
    try:
        for function in database.execute(
            "SELECT oid::regprocedure FROM pg_proc WHERE proname = 'pg_logical_emit_message'"
        ):
            database.execute(f"REVOKE EXECUTE ON FUNCTION {function[0]} FROM PUBLIC")
        connection.execute("SET ROLE humble")
        for _ in range(4):
            database.execute("INSERT INTO items SELECT generate_series(1, 1000)")
            clock.now += 40
            guard.check(Lsn(1), listening=True)
        warning = "Cannot write heartbeats, relying on keepalives: permission denied"
        assert caplog.text.count(warning) == 1
        connection.execute("RESET ROLE")  # as once the privilege is granted
        clock.now += 100
        guard.check(Lsn(1), listening=True)
        assert "Heartbeats are written again" in caplog.text
    finally:
        connection.execute("RESET ROLE")
        database.execute("DROP ROLE humble")


def test_slot_read_by_another_process_or_none_ends_the_stream(database, stream, guard):
    guard.check(Lsn(1), listening=True)
    stream.close()
    active = "FROM pg_replication_slots WHERE active AND database = current_database()"
    while database.execute(f"SELECT 1 {active}"):
        pass
    with pytest.raises(ReplicationError, match="any more, but by no process; reconnecting"):
        guard.check(Lsn(1), listening=True)


def test_slot_watch_knows_the_time_up_to_which_all_is_handled(database, guard, progress):
    guard.check(Lsn(1), listening=True)
    assert progress.confirmed_at is None
    between = database.one("SELECT clock_timestamp()")
    progress.confirm(position(database))
    guard.check(Lsn(1), listening=True)
    assert progress.confirmed_at < between
    database.execute("INSERT INTO items VALUES (1)")
    later = database.one("SELECT clock_timestamp()")
    guard.check(Lsn(1), listening=True)
    guard.check(Lsn(1), listening=True)
    assert progress.confirmed_at < later


def test_slot_watch_logs_each_state_once_and_better_ones_later(guard, clock, caplog, monkeypatch):
    states = [1, 1, 2, 3, 2, 3, 2, 1, 1, 0, 0, 1, 0, 0, 0]
    left = iter(states)
    monkeypatch.setattr(slot_watch, "_danger", lambda *_: next(left))
    caplog.set_level(logging.WARNING)
    for _ in states:
        clock.now += 25
        guard.check(Lsn(0), listening=False)
    messages = [record.getMessage() for record in caplog.records]
    kinds = ["more WAL than max_wal_size (", "lost after", "about to be lost", "no longer"]
    assert [next(kind for kind in kinds if kind in line) for line in messages] == [
        *("more WAL than max_wal_size (", "lost after", "about to be lost"),
        *("more WAL than max_wal_size (", "no longer"),
    ]


@pytest.mark.parametrize(
    ("wal_status", "safe", "limit", "danger"),
    [
        ("reserved", None, -1, 0),
        ("extended", None, -1, 1),
        ("extended", 60, 100, 1),
        ("reserved", 40, 100, 2),
        ("unreserved", 0, 100, 3),
        ("lost", None, 100, 3),
    ],
)
def test_slot_watch_rates_the_danger_of_a_slot(wal_status, safe, limit, danger):
    assert slot_watch._danger(wal_status, safe, limit) == danger


def test_failover_slot_needs_postgresql_17(database, connection):
    database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    settings = Settings(flash_replication_slot=database.slot, flash_failover_slot=True)
    report = examine(
        Source(connection, settings), [Subscription("h", TableName("public", "items"))]
    )
    if connection.info.server_version >= 170000:
        report.raise_first()
    else:
        with pytest.raises(ConfigurationError, match="flash_failover_slot needs PostgreSQL 17"):
            report.raise_first()


def test_failover_sql_for_the_owner_keeps_the_slot(database, connection):
    if connection.info.server_version < 170000:
        pytest.skip("PostgreSQL keeps slots over a failover from 17 on")
    database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    names = {"flash_replication_slot": database.slot, "flash_failover_slot": True}
    settings = Settings(flash_manage=False, **names)
    subscriptions = [Subscription("h", TableName("public", "items"))]
    kept = f"SELECT failover FROM pg_replication_slots WHERE slot_name = '{database.slot}'"
    database.execute(*map(str, examine(Source(connection, settings), subscriptions).script))
    assert database.one(kept)
    report = examine(Source(connection, settings), subscriptions)
    assert not report.script
    database.execute(
        f"SELECT pg_drop_replication_slot('{database.slot}')",
        f"SELECT pg_create_logical_replication_slot('{database.slot}', 'pgoutput')",
    )
    (warning,) = [
        finding.message
        for finding in examine(Source(connection, settings), subscriptions).findings
        if "ALTER_REPLICATION_SLOT" in finding.message
    ]
    command = re.search("ALTER_REPLICATION_SLOT .* true[)]", warning)[0]
    with psycopg.connect(database.dsn, autocommit=True, replication="database") as stream:
        stream.pgconn.exec_(command.encode())
    assert database.one(kept)
