"""The replication connection against a real server."""

import fcntl
import select
import termios
import time
from array import array

import psycopg
import pytest
from psycopg import sql

from example_project.servers import Postgres, Standby
from flash_celery.errors import ReplicationError, SlotInUse, SlotMissing
from flash_celery.postgres import slots
from flash_celery.postgres.connection import connect, without_password
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.protocol import frames, pgoutput
from flash_celery.protocol.lsn import Lsn
from tests.conftest import Database


@pytest.fixture
def table(database):
    database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text)",
        "CREATE PUBLICATION everything FOR TABLE items",
    )
    return database


@pytest.fixture
def connections():
    opened = []

    def connect(dsn):
        opened.append(ReplicationConnection(dsn))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def read_until(connection, done, timeout=10.0):
    burst = []
    deadline = time.monotonic() + timeout
    while not done(burst):
        assert time.monotonic() < deadline, burst
        select.select([connection.fileno()], [], [], 0.1)
        burst += connection.receive()
    return burst


def messages(burst):
    return [pgoutput.decode(frame) for frame in burst if frame[0] != frames.KEEPALIVE]


def committed(count):
    def done(burst):
        return sum(isinstance(m, pgoutput.Commit) for m in messages(burst)) >= count

    return done


def test_stream_repeats_changes_until_they_are_acknowledged(table, connections):
    first = connections(table.dsn)
    start = slots.create(first, table.slot)
    table.execute("INSERT INTO items VALUES (1, 'é')", "UPDATE items SET name = 'b'")
    first.start(table.slot, ["everything"])
    seen = messages(read_until(first, committed(2)))
    assert [type(m).__name__ for m in seen] == [
        *("Begin", "Relation", "Row", "Commit"),
        *("Begin", "Row", "Commit"),
    ]
    assert seen[2].new == [b"1", "é".encode()]
    end_of_first = seen[3].end_lsn
    assert start <= seen[0].commit_lsn < end_of_first
    first.send_status(end_of_first, end_of_first, end_of_first)
    first.close()
    second = connections(table.dsn)
    start_when_free(second, table.slot)
    again = messages(read_until(second, committed(1)))
    assert [m.new for m in again if isinstance(m, pgoutput.Row)] == [[b"1", b"b"]]


def start_when_free(connection, slot):
    deadline = time.monotonic() + 10
    while True:
        try:
            return connection.start(slot, ["everything"])
        except SlotInUse:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_stream_names_a_slot_in_use_and_a_missing_slot(table, connections):
    first = connections(table.dsn)
    slots.create(first, table.slot)
    first.start(table.slot, ["everything"])
    with pytest.raises(SlotInUse, match=f'"{table.slot}" is active for PID'):
        connections(table.dsn).start(table.slot, ["everything"])
    with pytest.raises(SlotMissing, match='"no_such" does not exist'):
        connections(table.dsn).start("no_such", ["everything"])


def test_enabling_failover_expects_a_command_without_rows(table, connections, monkeypatch):
    connection = connections(table.dsn)
    slots.create(connection, table.slot)
    if psycopg.connect(table.dsn).info.server_version < 170000:
        # The command is unknown to this server; its answer has the form of this one's.
        drop = sql.SQL("DROP_REPLICATION_SLOT {}").format(sql.Identifier(table.slot))
        monkeypatch.setattr(slots, "failover_command", lambda _: drop)
    slots.enable_failover(connection, table.slot)
    connection.start_session()  # which the command has left usable


def test_keepalive_carries_the_position_of_a_server_busy_elsewhere(table, connections):
    connection = connections(table.dsn)
    start = slots.create(connection, table.slot)
    connection.start(table.slot, ["everything"])
    table.execute("CREATE TABLE other (id int)", "INSERT INTO other VALUES (1)")
    goal = Lsn.parse(table.one("SELECT pg_current_wal_lsn()"))

    def caught_up(burst):
        connection.send_status(start, start, start, reply=True)
        alive = [
            frames.keepalive(keepalive) for keepalive in burst if keepalive[0] == frames.KEEPALIVE
        ]
        return any(keepalive.wal_end >= goal for keepalive in alive)

    read_until(connection, caught_up)
    assert connection.received >= goal


def test_stream_raises_if_the_server_process_ends(table, connections):
    connection = connections(table.dsn)
    slots.create(connection, table.slot)
    connection.start(table.slot, ["everything"])
    table.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots "
        "WHERE active_pid IS NOT NULL AND database = current_database()"
    )
    with pytest.raises(ReplicationError, match="terminating connection"):
        read_until(connection, lambda burst: False)


def test_stream_error_without_a_server_hides_the_password():
    with pytest.raises(ReplicationError) as caught:
        ReplicationConnection("postgresql://me:s3cret@127.0.0.1:1/shop")
    assert "s3cret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "dsn"),
    [
        ("bad: postgresql://me:s3cret@h/db", "postgresql://me:s3cret@h/db"),
        ("bad: host=h password=s3cret", "host=h password=s3cret"),
        ("s3cret is wrong", "host=h password=s3cret"),
        ("bad: postgresql://me:s3cret@h/db", "not a dsn"),
    ],
)
def test_password_is_removed_from_error_texts(text, dsn):
    assert "s3cret" not in without_password(text, dsn)


def test_session_settings_are_those_of_a_subscriber(table):
    dsn = psycopg.conninfo.make_conninfo(table.dsn, options="-c statement_timeout=7s")
    with connect(dsn) as connection:
        for name, value in {
            "datestyle": "ISO, MDY",
            "intervalstyle": "postgres",
            "extra_float_digits": "3",
            "timezone": "UTC",
            "statement_timeout": "7s",
            "application_name": "flash_celery",
        }.items():
            row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
            assert row == (value,), name


def test_stream_history_names_the_ancestors_of_a_promoted_server(connections):
    with Postgres() as primary, Standby(primary) as standby:
        before, _ = connections(primary.dsn()).identify()
        assert (before.timeline, before.ancestors) == (1, ())
        assert connections(standby.dsn()).identify()[0] == before
        promoted = Database(standby, "postgres")
        promoted.execute("SELECT pg_promote()")
        after, _ = connections(standby.dsn()).identify()
        (ancestor,) = after.ancestors
        assert (after.system, after.timeline, ancestor.timeline) == (before.system, 2, 1)
        assert after.common_end(before) == ancestor.end
        now = Lsn.parse(promoted.one("SELECT pg_current_wal_insert_lsn()::text"))
        assert ancestor.end <= now


def test_busy_stream_pauses_between_reads_and_an_idle_one_passes_each_row_on(table, connections):
    connection = connections(table.dsn)
    slots.create(connection, table.slot)
    connection.start(table.slot, ["everything"])
    table.execute("INSERT INTO items SELECT n, 'a name' FROM generate_series(1, 10000) n")
    arrived = array("i", [0])
    deadline = time.monotonic() + 10
    while arrived[0] < 1 << 15:
        assert time.monotonic() < deadline
        fcntl.ioctl(connection.fileno(), termios.FIONREAD, arrived)
    burst = connection.receive()
    assert connection.resumes_at is not None
    while not any(message[:1] == b"C" for message in burst[-100:]):
        assert time.monotonic() < deadline
        if connection.resumes_at is None:
            select.select([connection], [], [], 10.0)
        else:
            time.sleep(max(0.0, connection.resumes_at - time.monotonic()))
        burst += connection.receive()
    rows = [message for message in messages(burst) if isinstance(message, pgoutput.Row)]
    assert len(rows) == 10000
    while connection.resumes_at is not None:  # until one call has received little
        connection.receive()
    table.execute("INSERT INTO items VALUES (0, 'alone')")
    assert select.select([connection], [], [], 10.0)[0]
