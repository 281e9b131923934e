"""A chunk has each row once, byte for byte as the stream sends it."""

from contextlib import closing, contextmanager

import psycopg
import pytest
from psycopg import sql

from flash_celery.backfill import plans, requests, unreadable_rows
from flash_celery.backfill.chunks import ChunkReader
from flash_celery.backfill.leaves import LeafReader
from flash_celery.changes.operations import Operation
from flash_celery.commands.backfill import as_json
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.postgres import catalog
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source
from flash_celery.provisioning import joined
from flash_celery.settings import Settings
from flash_celery.table_name import TableName
from tests.integration.conftest import shown

MANY = ", ".join(f"c{number} int" for number in range(1599))
WORDS = (
    "(VALUES ('a'), ('A'), ('b'), ('B'), ('ä'), ('z'), ('Z'), ('_'), ('a b'), (''), ('10'), ('9'))"
)
#: The columns of a table, and the query that fills it.
TABLES = {
    "composite": (
        "a int, b text, c uuid, note text, PRIMARY KEY (b, a, c)",
        "SELECT n % 3, 'key ' || n % 5, gen_random_uuid(), E'\\\\ \\t\\n'"
        " FROM generate_series(1, 40) n",
    ),
    "collated": (
        'word text COLLATE "C" PRIMARY KEY, n int',
        f"SELECT word, 1 FROM {WORDS} AS word",
    ),
    "linguistic": (
        'word text COLLATE "und-x-icu" PRIMARY KEY, n int',
        f"SELECT word, 1 FROM {WORDS} AS word",
    ),
    # 'a' and 'A' would be equal.
    "folded": (
        "word text COLLATE folding PRIMARY KEY, n int",
        "SELECT DISTINCT lower(word), 1 FROM unnest(ARRAY['B', 'a', 'C', 'É', 'z', 'd', 'e', 'F',"
        " 'g', '_', '1']) AS word",
    ),
    "padded": (
        "code char(4) PRIMARY KEY, n numeric(9, 3)",
        "SELECT n, n FROM generate_series(1, 20) n",
    ),
    "instants": (
        "at timestamptz PRIMARY KEY",
        "SELECT 'infinity' UNION ALL"
        " SELECT now() + n * interval '1 us' FROM generate_series(1, 20) n",
    ),
    "generated": (
        "id int PRIMARY KEY, dropped int, twice int GENERATED ALWAYS AS (id * 2) STORED",
        "SELECT n FROM generate_series(1, 20) n",
    ),
    "toasted": (
        "id int PRIMARY KEY, note text",
        "SELECT n, repeat(md5(n::text), n * 9000) FROM generate_series(1, 20) n",
    ),
    "escaped": (
        "id int PRIMARY KEY, note text, n int, other text",
        "SELECT row_number() OVER (), note, nullif(length(note), 1), repeat(note, 400) FROM"
        r" (VALUES (''), (NULL), ('\N'), ('\'), ('\\'), ('\t'), ('N'), (E'a\tb\nc\rd\be\ff\vg'),"
        r" (E'é\\\n'), (E'\n')) AS notes (note)",
    ),
    "wide": (f"id int PRIMARY KEY, {MANY}", "SELECT n, NULL, n FROM generate_series(1, 8) n"),
}


FOLDING = """CREATE COLLATION folding
    (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"""


@contextmanager
def streaming(connection, table):
    """A function that returns the Inserts of a table since the beginning of the block."""
    with_generated = connection.info.server_version >= 180000
    options = "WITH (publish_generated_columns = stored)" if with_generated else ""
    connection.execute(f"CREATE PUBLICATION rows FOR TABLE {table} {options}")
    connection.execute("SELECT pg_create_logical_replication_slot('rows', 'pgoutput')")
    query = (
        "SELECT data FROM pg_logical_slot_peek_binary_changes('rows', NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'rows')"
    )
    try:
        yield lambda: [data for (data,) in connection.execute(query) if data[:1] == b"I"]
    finally:
        connection.execute("SELECT pg_drop_replication_slot('rows')")


@pytest.mark.parametrize("table", TABLES)
def test_chunks_have_the_rows_of_the_stream(database, table):
    columns, rows = TABLES[table]
    with closing(connect(database.dsn)) as connection:
        if table in ("linguistic", "folded"):
            try:
                connection.execute(FOLDING)
            except psycopg.errors.FeatureNotSupported:
                pytest.skip("this PostgreSQL is built without ICU")
        connection.execute(f"CREATE TABLE {table} ({columns})")
        connection.execute(f"ALTER TABLE {table} DROP COLUMN IF EXISTS dropped")
        with streaming(connection, table) as streamed:
            connection.execute(f"INSERT INTO {table} {rows}")
            assert sorted(chunked(connection, table)) == sorted(streamed())


def chunked(connection, table):
    """All rows, in chunks of seven."""
    reader, cursor, found = ChunkReader(connection, TableName("public", table)), None, []
    for _ in range(20):
        chunk = reader.read(cursor, 7)
        found += chunk.rows.values()
        if chunk.is_last:
            return found
        cursor = chunk.cursor
    raise AssertionError("the chunks do not end")


def test_chunk_ends_with_the_row_that_exceeds_its_bytes(database, monkeypatch):
    """Otherwise a chunk that is read again has other rows, and Redis gets some twice."""
    monkeypatch.setattr("flash_celery.backfill.chunks._CHUNK_BYTES", 550)
    database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, note text)",
        "INSERT INTO items SELECT n, repeat('n', 96) FROM generate_series(10, 30) n",
    )
    with closing(connect(database.dsn)) as connection:
        reader, cursor = ChunkReader(connection, TableName("public", "items")), None
        for size in (6, 6, 6, 3):
            chunk = reader.read(cursor, 100)
            assert len(chunk.rows) == size
            cursor = chunk.cursor


def test_table_is_read_again_if_its_key_gets_another_order(database):
    """Otherwise rows that were not read come before the cursor."""
    database.execute(
        "CREATE TABLE items (id numeric PRIMARY KEY)",
        "INSERT INTO items SELECT n FROM generate_series(1, 20) n",
    )
    with closing(connect(database.dsn)) as connection:
        reader = ChunkReader(connection, TableName("public", "items"))
        cursor = reader.read(None, 9).cursor
        assert len(reader.read(cursor, 100).rows) == 11
        database.execute("ALTER TABLE items ALTER id TYPE text")
        assert len(reader.read(cursor, 100).rows) == 20
        cursor = reader.read(None, 9).cursor
        database.execute('ALTER TABLE items ALTER id TYPE text COLLATE "POSIX"')
        assert len(reader.read(cursor, 100).rows) == 20


def test_leaves_are_read_whole_though_they_are_renamed(database):
    """Also if two of them exchange their names, and by key."""
    database.execute(
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (21)",
        "CREATE TABLE high PARTITION OF parted FOR VALUES FROM (21) TO (99)",
        "INSERT INTO parted SELECT n FROM generate_series(1, 40) n",
    )
    low = database.one("SELECT 'low'::regclass::oid::int8")
    renamings = [
        ["ALTER TABLE low RENAME TO lower"],
        [
            "ALTER TABLE lower RENAME TO other",
            "ALTER TABLE high RENAME TO lower",
            "ALTER TABLE other RENAME TO high",
        ],
    ]
    found, cursor, is_last = [], None, False
    with closing(connect(database.dsn)) as connection:
        reader = LeafReader(connection, TableName("public", "parted"))
        while not is_last:
            chunk = reader.read(cursor, 7)
            found += chunk.rows
            cursor, is_last = chunk.cursor, chunk.is_last
            if renamings:
                database.execute(*renamings.pop(0))
        database.execute("ALTER TABLE high RENAME TO low")
        assert len(reader.read_keys(low, [{"id": "3"}], 1).rows) == 1
    assert sorted(int(key) for (key,) in found) == list(range(1, 41))


class Altered(ChunkReader):
    """A reader beside whom someone alters the table right after the snapshot."""

    error = None

    def _snapshot(self):
        found = super()._snapshot()
        with psycopg.connect(self.dsn, autocommit=True) as other:
            try:
                other.execute("SET lock_timeout = 100")
                other.execute("ALTER TABLE items ALTER n TYPE bigint")
            except psycopg.errors.LockNotAvailable as error:
                self.error = error
        return found


class WithoutLock(Altered):
    """The naive order: a snapshot before the lock."""

    def _begin(self):
        self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")


@pytest.mark.parametrize(("kind", "rows"), [(Altered, 50), (WithoutLock, 0)])
def test_table_is_not_rewritten_between_the_snapshot_and_its_rows(database, kind, rows):
    """Otherwise the chunk is empty, and looks like the end of the table."""
    database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "INSERT INTO items SELECT n, n FROM generate_series(1, 50) n",
    )
    with closing(connect(database.dsn)) as connection:
        reader = kind(connection, TableName("public", "items"))
        reader.dsn = database.dsn
        assert len(reader.read(None, 100).rows) == rows
        assert (reader.error is None) == (kind is WithoutLock)


def test_row_is_not_blamed_for_a_command_that_was_cancelled(database):
    def query(ctids):
        return sql.SQL("COPY (SELECT pg_sleep(10)) TO STDOUT").format()

    with database.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL statement_timeout = '50ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            unreadable_rows.find(connection, query, ["(0,1)", "(0,2)"])


def test_worker_that_reads_a_standby_leaves_the_backfills_of_the_primary_alone(
    database, monkeypatch
):
    """It cannot write there, and may have the same slot name and handlers."""
    settings = Settings(flash_dsn=database.dsn, flash_replication_slot=database.slot)
    with closing(connect(database.dsn)) as connection:
        source = Source(connection, settings)
        draft = requests.Draft("shop.handle", "public.items", None, 100, 1)
        (begun,) = requests.request(source, [draft])
        requests.advance(connection, begun.id, 1, None)
        absence = requests.absence_of(begun)
        requests.enter(connection, begun.id, "paused", requests.ACTIVE, absence)
        assert [each.id for each in requests.begun(source)] == [begun.id]
        monkeypatch.setattr(requests, "is_standby", lambda _: True)
        connection.execute("SET default_transaction_read_only = on")
        assert requests.begun(source) == []
        requests.resume_present(source, lambda _: True)


def test_handler_of_inserts_gets_the_rows_that_are_there(flash):
    """Its updates are watched for rows that move, and not delivered."""
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "INSERT INTO items SELECT n, n FROM generate_series(1, 3) n",
    )
    flash.handler("items", "insert", backfill=True).start()
    done = "SELECT count(*) = 1 FROM flash_celery_backfills WHERE state = 'done'"
    flash.wait(lambda: flash.database.one("SELECT to_regclass('flash_celery_backfills')"))
    flash.wait(lambda: flash.database.one(done))
    flash.do("UPDATE items SET n = 0", "INSERT INTO items VALUES (4, 4)")
    changes = flash.delivered()
    assert shown(changes) == ["insert 1,1", "insert 2,2", "insert 3,3", "insert 4,4"]
    assert [change.backfill is None for change in changes] == [False, False, False, True]


def test_plan_does_not_wait_for_a_session_that_has_locked_a_table(database):
    database.execute(
        "CREATE TABLE free (id int PRIMARY KEY)",
        "CREATE TABLE locked (id int PRIMARY KEY)",
        "INSERT INTO free SELECT generate_series(1, 500)",
        "INSERT INTO locked SELECT generate_series(1, 300)",
        "ANALYZE free, locked",
    )
    subscriptions = [Subscription("h", TableName("public", name)) for name in ("free", "locked")]
    with closing(connect(database.dsn)) as connection, database.connect() as other:
        source = Source(connection, Settings(flash_dsn=database.dsn))
        connection.execute("SET statement_timeout = '20s'")
        with other.transaction():
            other.execute("LOCK TABLE locked")
            found = plans.plan(source, subscriptions, "h")
    assert {each.table.name: each.rows for each in found} == {"free": 500, "locked": 300}


def test_plan_takes_all_subscriptions_of_a_handler_to_a_table_together(database):
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    name = TableName("public", "t")
    parts = [
        Subscription("h", name, Operation.INSERT, number=0),
        Subscription("h", name, Operation.UPDATE | Operation.DELETE, number=1),
    ]
    with closing(connect(database.dsn)) as connection:
        source = Source(connection, Settings(flash_dsn=database.dsn))
        (plan,) = plans.plan(source, parts, "h")
    assert plan.table == name


def test_table_is_surely_empty_only_if_nothing_may_be_missing(database):
    names = ["bare", "reading", "writing", "prepared", "locked", "filled", "parted"]
    database.execute(
        *(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in names[:-1]),
        "CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (9)",
        "CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (9) TO (99)",
        "INSERT INTO filled VALUES (1)",
    )
    with (
        connect(database.dsn) as connection,
        database.connect() as one,
        database.connect() as other,
    ):
        tables = catalog.find_all(connection, [TableName("public", name) for name in names])

        def empty():
            leaves = catalog.leaves_of(connection, tables.values())
            found = joined.surely_empty(connection, leaves)
            return {table.name.name for table in tables.values() if table.oid in found}

        one.execute("BEGIN; SELECT FROM reading; INSERT INTO writing VALUES (1)")
        one.execute("LOCK TABLE locked")
        other.execute("BEGIN; DELETE FROM prepared; PREPARE TRANSACTION 'open'")
        assert empty() == {"bare", "reading", "parted"}
        one.execute("ROLLBACK")
        for statement in ("ROLLBACK PREPARED 'open'", "INSERT INTO parted VALUES (10)"):
            other.execute(statement)
        assert empty() == {"bare", "reading", "prepared", "locked"}


def test_backfills_with_errors_hold_up_none_without(database):
    with closing(connect(database.dsn)) as connection:
        settings = Settings(flash_dsn=database.dsn, flash_replication_slot=database.slot)
        source = Source(connection, settings)
        names = [f"public.t{number}" for number in range(50)]
        drafts = [requests.Draft("h", name, None, 100, 1) for name in names]
        requested = {each.table_name: each.id for each in requests.request(source, drafts)}
        for name in names[:40]:
            requests.enter(connection, requested[name], "running", requests.ACTIVE, "is locked")
        active = {each.table_name for each in requests.active(source)}
    assert active.issuperset(names[40:])
    assert len(active) == 30


def test_nothing_is_requested_between_the_end_of_backfills_and_those_in_their_place(database):
    """A second one of a table would have all of them refused."""
    lock = "SELECT pg_try_advisory_xact_lock(hashtext('public.flash_celery_backfills'))"
    with closing(connect(database.dsn)) as connection, database.connect() as other:
        settings = Settings(flash_dsn=database.dsn, flash_replication_slot=database.slot)
        source = Source(connection, settings)
        drafts = [requests.Draft("h", f"public.{name}", None, 100, 1) for name in "ab"]
        with connection.transaction():
            requests.request(source, drafts)
        with connection.transaction():
            requests.stop(source, "lost", {("h", "public.a")})
            assert other.execute(lock).fetchone() == (False,)
            requests.request(source, drafts[:1])
        assert requests.under_way(source).keys() == {("h", "public.a"), ("h", "public.b")}
        states = [each.state for each in requests.all_of(source)]
    assert states == ["stopped", "requested", "requested"]


def test_status_shows_those_of_thousands_that_matter_first(database):
    settings = Settings(flash_dsn=database.dsn, flash_replication_slot=database.slot)
    drafts = [requests.Draft("h", f"public.t{number}", None, 100, 1) for number in range(5)]
    with closing(connect(database.dsn)) as connection:
        source = Source(connection, settings)
        assert requests.recent(source, 2) == ([], {})
        _, second, third, fourth, _ = requests.request(source, drafts)
        requests.stop(source, "No.", {("h", "public.t0")})
        requests.enter(connection, third.id, "running", requests.ACTIVE)
        requests.enter(connection, fourth.id, "paused", requests.ACTIVE, "No.")
        shown, others = requests.recent(source, 3)
    assert [each.id for each in shown] == [second.id, third.id, fourth.id]
    assert others == {"stopped": 1, "requested": 1}


def test_pace_of_a_backfill_is_that_of_the_last_half_minute(database):
    settings = Settings(flash_dsn=database.dsn, flash_replication_slot=database.slot)
    with closing(connect(database.dsn)) as connection:
        source = Source(connection, settings)
        (begun,) = requests.request(source, [requests.Draft("h", "public.t", None, 100, 10_000)])

        def chunk(seconds, rows=1000):
            connection.execute(
                "UPDATE flash_celery_backfills"
                f" SET advanced_at = clock_timestamp() - interval '{seconds} s'"
            )
            requests.advance(connection, begun.id, rows, None)
            return as_json(requests.find(connection, begun.id))["rows_per_second"]

        connection.execute(
            "UPDATE flash_celery_backfills SET requested_at = requested_at - interval '1 day'"
        )
        chunk(3600)  # it waited for a transaction
        assert chunk(1) == pytest.approx(1000, rel=0.1)
        assert chunk(0.001) == pytest.approx(2000, rel=0.1)  # 2,000 rows in a second
        assert chunk(100) < 100
        assert chunk(86_400) < 1  # no worker took anything for a day
        for _ in range(50):
            assert chunk(86_400, rows=0) == 0
        connection.execute(
            "UPDATE flash_celery_backfills"
            " SET advanced_at = clock_timestamp() - interval '10 minutes'"
        )
        still = as_json(requests.find(connection, begun.id))
        assert (still["rows_per_second"], still["seconds_left"]) == (0, None)
        requests.stop(source, "No.")
        assert as_json(requests.find(connection, begun.id))["rows_per_second"] < 1
