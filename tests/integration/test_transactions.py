"""Which rows count: savepoints, rollbacks, prepared and empty transactions."""

import contextlib
import json
import os

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flash_celery import Batch, on_change, on_message
from flash_celery.capture.spool import Spool
from flash_celery.capture.transactions import Transactions, runs
from flash_celery.changes import payload
from flash_celery.errors import PublishError, SavepointUnclear, SubscriptionError
from flash_celery.protocol import pgoutput
from flash_celery.publishing.brokers.memory import MemoryPublisher

from .conftest import shown

EXAMPLES = int(os.environ.get("FLASH_EXAMPLES", "60"))
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"


def test_savepoints_count_only_if_released(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as connection:
        connection.execute(
            "BEGIN; INSERT INTO items VALUES (1); SAVEPOINT a; INSERT INTO items VALUES (2);"
            "SAVEPOINT b; INSERT INTO items VALUES (3); ROLLBACK TO b;"
            "INSERT INTO items VALUES (4); RELEASE a; INSERT INTO items VALUES (5); COMMIT"
        )
        connection.execute("BEGIN; INSERT INTO items VALUES (6); ROLLBACK")
    flash.do("INSERT INTO items VALUES (7)")
    changes = flash.delivered()
    assert shown(changes) == [f"insert {n},-" for n in (1, 2, 4, 5, 7)]
    assert [change.ordinal for change in changes] == [0, 1, 2, 3, 0]
    assert len({change.xid for change in changes[:4]}) == 1


def test_exception_block_in_plpgsql_is_delivered(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    flash.do(
        "DO $$ BEGIN FOR n IN 1..300 LOOP BEGIN INSERT INTO items VALUES (n % 200, 'x'); "
        "EXCEPTION WHEN unique_violation THEN NULL; END; END LOOP; END $$"
    )
    assert len(flash.delivered()) == 200


def test_prepared_transaction_is_delivered_when_it_commits(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as connection:
        connection.execute("BEGIN; INSERT INTO items VALUES (1); PREPARE TRANSACTION 'one'")
        connection.execute("BEGIN; INSERT INTO items VALUES (2); PREPARE TRANSACTION 'two'")
    flash.do("INSERT INTO items VALUES (3)")
    assert shown(flash.delivered()) == ["insert 3,-"]
    flash.do("COMMIT PREPARED 'one'", "ROLLBACK PREPARED 'two'")
    assert shown(flash.delivered()) == ["insert 1,-"]


def test_empty_transactions_and_other_tables_advance_the_slot(flash):
    flash.database.execute(ITEMS, "CREATE TABLE other (id int)")
    flash.handler("items").start()
    with flash.database.connect() as connection:
        for _ in range(2000):
            connection.execute("INSERT INTO other VALUES (1)")
    flash.do("INSERT INTO items VALUES (1)")
    assert shown(flash.delivered()) == ["insert 1,-"]


def test_transactions_of_other_tables_advance_the_slot_100_000_times(flash):
    flash.database.execute(ITEMS, "CREATE TABLE other (id int)")
    flash.handler("items").start()
    before = flash.database.one("SELECT pg_current_wal_insert_lsn()")
    loop = "DO $$ BEGIN FOR n IN 1..50000 LOOP {}; COMMIT; END LOOP; END $$"
    # `do` waits until the slot has followed all of it.
    flash.do(
        loop.format("PERFORM txid_current()"),
        loop.format("INSERT INTO other VALUES (n)"),
    )
    passed = f"confirmed_flush_lsn - '{before}'::pg_lsn"
    assert flash.database.one(flash.slot(passed)) > 100_000 * 30
    assert not flash.publisher.queues.get("flash")


def test_interleaved_transactions_arrive_in_commit_order(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as first, flash.database.connect() as second:
        first.execute("BEGIN")
        second.execute("BEGIN")
        for n in range(0, 2000, 2):
            first.execute("INSERT INTO items VALUES (%s)", [n])
            second.execute("INSERT INTO items VALUES (%s)", [n + 1])
        second.execute("COMMIT")
        first.execute("COMMIT")
    flash.do("SELECT 1")
    ids = [change.new["id"] for change in flash.delivered()]
    assert ids == [*range(1, 2000, 2), *range(0, 2000, 2)]


def test_copy_and_truncate_in_a_large_transaction_are_delivered(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as connection:
        connection.execute("BEGIN")
        with connection.cursor().copy("COPY items FROM STDIN") as copy:
            for n in range(5000):
                copy.write_row((n, "x"))
        connection.execute("TRUNCATE items; INSERT INTO items VALUES (1); COMMIT")
    flash.do("SELECT 1")
    changes = flash.delivered()
    assert [c.operation.names()[0] for c in changes] == [*["insert"] * 5000, "truncate", "insert"]
    assert [change.ordinal for change in changes] == list(range(5002))
    assert len({change.id for change in changes}) == 5002


class Unsure(MemoryPublisher):
    """Takes everything, and is cut off before it can confirm the end of the transaction."""

    def publish(self, messages):
        super().publish(messages)
        if len(self.queues["flash"]) >= 3:
            raise PublishError("The broker did not answer.")


def test_change_ids_are_equal_after_a_restart(flash):
    flash.database.execute(ITEMS)
    flash.publisher = Unsure()
    flash.handler("items", "insert|truncate").start(flash_shutdown_timeout=0.2)
    with flash.database.connect() as connection:
        connection.execute(
            "BEGIN; INSERT INTO items VALUES (1); SAVEPOINT a; INSERT INTO items VALUES (2);"
            "ROLLBACK TO a; UPDATE items SET name = 'x'; INSERT INTO items VALUES (3);"
            "TRUNCATE items; COMMIT"
        )

    def identities():
        tasks = [message.headers["id"] for message in flash.publisher.queues["flash"]]
        changes = flash.delivered()
        return dict.fromkeys(
            (c.id, c.ordinal, task) for c, task in zip(changes, tasks, strict=True)
        )

    flash.wait(lambda: len(flash.publisher.queues.get("flash", [])) >= 3)
    flash.stop()
    before = identities()
    assert [index for _, index, _ in before] == [0, 1, 2]
    assert len({change for change, _, _ in before}) == len({task for _, _, task in before}) == 3
    flash.publisher = MemoryPublisher()
    flash.start()
    flash.do("SELECT 1")
    assert list(identities()) == list(before)


class Collected:
    """What came out of a stream: each row's number, transaction and index."""

    def __init__(self):
        self.found = []

    def rows(self, kind, rows, transaction, index, shift):
        for place, message in enumerate(rows, index):
            assert message[:5] == kind
            row, _ = pgoutput.read_row(message)
            self.found.append((int(row.new[0]), transaction, place))

    def truncate(self, oids, transaction, index, shift):
        self.found.append((-1, transaction, index))

    def message(self, message, transaction, index, shift):
        if message.prefix == "counted":
            self.found.append((message.content.decode(), transaction, index))

    def relation(self, relation, transaction): ...


def collected(connection, plain=()):
    """What the slot has, and how many blocks were streamed.

    It is streamed if `plain` has the same without streaming. From there come transactions that are
    to be read again, which end up in `unclear`.
    """
    collected_rows = Collected()
    transactions = Transactions(collected_rows)
    streamed = 0
    rows = connection.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes('nested', NULL, NULL, "
        "'proto_version', '2', 'publication_names', 'nested', 'messages', 'on', 'streaming', %s)",
        ["on" if plain else "off"],
    ).fetchall()
    for kind, run in runs([data for (data,) in rows]):
        streamed += kind[:1] == b"S"
        try:
            end = transactions.receive(kind, run)
        except SavepointUnclear as error:
            unclear.append(error.commit_lsn)
            found = [row for row in plain if row[1].commit_lsn == error.commit_lsn]
            collected_rows.found += found
            transactions._forget(int.from_bytes(run[0][1:5], "big"))
            end = None
        while transactions.replaying:
            end = transactions.replay()
        assert end is None or not transactions.open
    # Before 18 the server does not always say that a streamed transaction with a TRUNCATE was
    # rolled back; its spool ends with the connection.
    assert transactions._spools == {} or connection.info.server_version < 180000
    transactions.close()
    return collected_rows.found, streamed


@pytest.fixture(scope="module")
def nested(postgres):
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE nested")
        options = "-c logical_decoding_work_mem=64kB"
        dsn = psycopg.conninfo.make_conninfo(postgres.dsn("nested"), options=options)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE rows (n int, body text)")
            connection.execute("CREATE PUBLICATION nested FOR TABLE rows")
            connection.execute("SELECT pg_create_logical_replication_slot('nested', 'pgoutput')")
            yield connection
            connection.execute("SELECT pg_drop_replication_slot('nested')")
        admin.execute("DROP DATABASE nested WITH (FORCE)")


STEPS = st.lists(
    st.sampled_from(["small", "large", "large", "savepoint", "savepoint", "release", "rollback",
                     "truncate", "message", "message", "other"]),
    max_size=14,
)  # fmt: skip


def transaction(connection, steps, commit, first, followed):
    """Run it; the numbers of the rows and messages that count, by our own reckoning.

    Those of messages are text. If `followed` is true, another record is behind each message.
    """
    number = first
    levels = [[]]
    connection.execute("BEGIN")
    for step in steps:
        if step in ("small", "large"):
            count = 1 if step == "small" else 150
            connection.execute(
                "INSERT INTO rows SELECT n, repeat('x', 500) "
                "FROM generate_series(%s::int, %s) AS n",
                [number, number + count - 1],
            )
            levels[-1] += range(number, number + count)
            number += count
        elif step == "message":
            emit = "SELECT pg_logical_emit_message(true, 'counted', %s::text)"
            if followed:
                emit += ", pg_logical_emit_message(false, 'next', '')"
            connection.execute(emit, [str(number)])
            levels[-1].append(str(number))
            number += 1
        elif step == "other":
            connection.execute("SELECT pg_logical_emit_message(true, 'other', '')")
        elif step == "truncate":
            connection.execute("TRUNCATE rows")
            levels[-1].append(-1)
        elif step == "savepoint":
            connection.execute(f"SAVEPOINT s{len(levels)}")
            levels.append([])
        elif len(levels) > 1:
            inner = levels.pop()
            if step == "release":
                connection.execute(f"RELEASE s{len(levels)}")
                levels[-1] += inner
            else:
                connection.execute(f"ROLLBACK TO s{len(levels)}; RELEASE s{len(levels)}")
    connection.execute("COMMIT" if commit else "ROLLBACK")
    return [n for level in levels for n in level] if commit else []


def apart(found):
    """The rows, and the messages, each in their order.

    A message has the position of the end of its record. If the next record is a row of another
    savepoint, both have the same position, and PostgreSQL sends either first. The ordinals, which
    ids are made of, count rows and messages apart.
    """

    def is_message(each):
        return isinstance(each[0] if isinstance(each, tuple) else each, str)

    return [each for each in found if not is_message(each)], list(filter(is_message, found))


streamed_blocks = []
#: Where the transactions committed that could not be streamed.
unclear = []


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(script=[(["small", "savepoint", "message", "savepoint", "small"], True)], followed=False)
@example(script=[(["truncate", "savepoint", "message", "savepoint", "large"], True)], followed=True)
@given(
    script=st.lists(st.tuples(STEPS, st.booleans()), min_size=1, max_size=3), followed=st.booleans()
)
def test_streaming_delivers_the_same_as_without_and_as_a_model(nested, script, followed):
    nested.execute(
        "SELECT count(*) FROM pg_logical_slot_get_binary_changes('nested', NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'nested')"
    )
    expected = []
    for steps, commit in script:
        expected += transaction(nested, steps, commit, len(expected), followed)
    plain, _ = collected(nested)
    in_order = list if followed else apart
    assert in_order([number for number, _, _ in plain]) == in_order(expected)
    if not plain:
        return
    try:
        streamed, blocks = collected(nested, plain)
    except psycopg.errors.InternalError_:
        # PostgreSQL cannot decode a TRUNCATE in a savepoint that was rolled back before it ends;
        # the replication worker goes on without streaming then.
        assert any("truncate" in steps and "rollback" in steps for steps, _ in script)
        return
    streamed_blocks.append(blocks)
    assert in_order(streamed) == in_order(plain)


def test_streaming_property_saw_streams():
    if streamed_blocks:
        assert max(streamed_blocks) > 1


MANY = "INSERT INTO rows SELECT n, repeat('x', 500) FROM generate_series(1, 150) n;"
MESSAGE = "SELECT pg_logical_emit_message(true, 'counted', '1');"
#: The beginning of a transaction that writes once more at its end; whether its message is certain.
SAVEPOINTS = [
    # A message before the first row, as that of the context is; the savepoint begins later.
    (f"{MESSAGE} {MANY} SAVEPOINT a; {MANY} ROLLBACK TO a", True),
    (f"{MESSAGE} {MANY} SAVEPOINT a; {MANY} SAVEPOINT b; {MANY} ROLLBACK TO a", True),
    (f"{MANY} SAVEPOINT a; {MANY} ROLLBACK TO a; {MESSAGE}", True),
    (f"SAVEPOINT a; {MANY} RELEASE a; {MESSAGE} {MANY} SAVEPOINT b; {MANY} ROLLBACK TO b", True),
    (f"{MANY} SAVEPOINT a; {MESSAGE} {MANY} ROLLBACK TO a", False),
    (f"SAVEPOINT a; SAVEPOINT b; {MESSAGE} RELEASE b; {MANY * 2} ROLLBACK TO a", False),
]


@pytest.mark.parametrize(("statements", "certain"), SAVEPOINTS)
def test_streamed_message_is_unclear_only_if_its_savepoint_may_be_aborted(
    nested, statements, certain
):
    drop = "SELECT count(*) FROM pg_logical_slot_get_binary_changes('nested', NULL, NULL, {})"
    nested.execute(drop.format("'proto_version', '1', 'publication_names', 'nested'"))
    nested.execute(f"BEGIN; {statements}; {MANY} COMMIT")
    plain, _ = collected(nested)
    unclear.clear()
    streamed, blocks = collected(nested, plain)
    assert streamed == plain
    assert blocks > 0
    assert (not unclear) == certain


def test_streaming_survives_interleaved_savepoints_and_a_restart(flash):
    flash.database.execute(ITEMS)
    options = "-c logical_decoding_work_mem=64kB"
    flash.handler("items", "insert").start(
        flash_use_streaming=True,
        flash_dsn=psycopg.conninfo.make_conninfo(flash.database.dsn, options=options),
    )
    expected = []
    with flash.database.connect() as first, flash.database.connect() as second:
        for connection, base in ((first, 0), (second, 100_000)):
            connection.execute("BEGIN")
            connection.execute(
                f"INSERT INTO items SELECT n, repeat('x', 200) "
                f"FROM generate_series({base}, {base} + 4999) AS n; SAVEPOINT a"
            )
        for connection, base in ((first, 10_000), (second, 110_000)):
            connection.execute(
                f"INSERT INTO items SELECT n, repeat('y', 200) "
                f"FROM generate_series({base}, {base} + 4999) AS n"
            )
        first.execute("ROLLBACK TO a")
        flash.stop()
        flash.start()
        second.execute("COMMIT")
        first.execute("INSERT INTO items VALUES (9999, 'z'); COMMIT")
        expected = [*range(100_000, 105_000), *range(110_000, 115_000), *range(5000), 9999]
    flash.do("SELECT 1")
    changes = flash.delivered()
    assert [change.new["id"] for change in changes] == expected
    assert [change.ordinal for change in changes] == [*range(10_000), *range(5001)]


def test_streamed_transactions_of_another_origin_are_delivered(flash):
    small_memory = "-c logical_decoding_work_mem=64kB"
    dsn = psycopg.conninfo.make_conninfo(flash.database.dsn, options=small_memory)
    flash.database.execute(ITEMS)
    flash.handler("items", "insert").start(flash_use_streaming=True, flash_dsn=dsn)
    for name in ("b", "bé", "elsewhere"):
        with flash.database.connect() as connection:
            connection.execute("SELECT pg_replication_origin_create(%s)", [name])
            connection.execute("SELECT pg_replication_origin_session_setup(%s)", [name])
            with connection.transaction():
                connection.execute("SELECT pg_replication_origin_xact_setup('0/1234', now())")
                connection.execute(
                    "INSERT INTO items SELECT n, repeat('x', 200) FROM generate_series(1, 2000) n"
                )
            connection.execute("SELECT pg_replication_origin_session_reset()")
            connection.execute("SELECT pg_replication_origin_drop(%s)", [name])
        flash.do("TRUNCATE items")
        assert len(flash.delivered()) == 2000
    streams = "SELECT stream_txns FROM pg_stat_replication_slots WHERE slot_name = %s"
    flash.stop()
    with flash.database.connect() as connection:
        assert connection.execute(streams, [flash.database.slot]).fetchone()[0] > 0


def test_relation_first_sent_in_an_aborted_savepoint_is_known(flash):
    flash.database.execute(ITEMS)
    options = "-c logical_decoding_work_mem=64kB"
    flash.handler("items").start(
        flash_use_streaming=True,
        flash_dsn=psycopg.conninfo.make_conninfo(flash.database.dsn, options=options),
    )
    streamed = (
        "SELECT stream_count > 0 FROM pg_stat_replication_slots "
        f"WHERE slot_name = '{flash.database.slot}'"
    )
    with flash.database.connect() as large:
        large.execute(
            "BEGIN; SAVEPOINT a; "
            "INSERT INTO items SELECT n, repeat('x', 200) FROM generate_series(1, 20000) n"
        )
        flash.wait(lambda: flash.database.one(streamed))
        large.execute("ROLLBACK TO a; INSERT INTO items VALUES (30001, 'y'); COMMIT")
    flash.do("INSERT INTO items VALUES (1, 'z')")
    assert [change.new["id"] for change in flash.delivered()] == [30001, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_small_transactions_do_not_wait_for_a_large_open_one(flash, streaming):
    flash.database.execute(ITEMS)
    options = "-c logical_decoding_work_mem=64kB"
    flash.handler("items").start(
        flash_use_streaming=streaming,
        flash_dsn=psycopg.conninfo.make_conninfo(flash.database.dsn, options=options),
    )
    with flash.database.connect() as large:
        large.execute(
            "BEGIN; INSERT INTO items SELECT n, repeat('x', 200) FROM generate_series(1, 20000) n"
        )
        if streaming:
            # (How much was streamed is counted with every block.)
            count = (
                "SELECT stream_count > 0 FROM pg_stat_replication_slots "
                f"WHERE slot_name = '{flash.database.slot}'"
            )
            flash.wait(lambda: flash.database.one(count))
        flash.do("INSERT INTO items VALUES (-1)", "UPDATE items SET name = 'b'")
        assert shown(flash.delivered()) == ["insert -1,-", "update -1 -> -1,b"]
        large.execute("DELETE FROM items WHERE id = 1")
        flash.do("INSERT INTO items VALUES (-2)")
        assert shown(flash.delivered()) == ["insert -2,-"]
        large.execute("COMMIT")
    flash.do("INSERT INTO items VALUES (-3)")
    changes = flash.delivered()
    # Its rows have its commit's place, whenever they were written.
    assert [c.key["id"] for c in changes] == [*range(1, 20_001), 1, -3]
    assert [c.ordinal for c in changes] == [*range(20_001), 0]
    assert changes[20_000].operation.names() == ("delete",)
    assert len({c.commit_lsn for c in changes}) == 2


def test_spool_leaves_no_file(tmp_path):
    spool = Spool(str(tmp_path))
    for number in range(3000):
        spool.append(number % 3, [b"x" * 1000])
    assert list(tmp_path.iterdir()) == []
    spool.abort(1)
    assert len(list(spool.messages())) == 2000
    spool.close()


def test_full_disk_is_logged_and_retried():
    from flash_celery.errors import SpoolError

    spool = Spool("/nowhere")
    with contextlib.closing(spool), pytest.raises(SpoolError, match="cannot be spooled"):
        spool.append(1, [b"x" * 3_000_000])


def test_transaction_the_server_cannot_stream_is_read_whole(flash):
    flash.database.execute(ITEMS)
    options = "-c logical_decoding_work_mem=64kB"
    flash.handler("items", "insert").start(
        flash_use_streaming=True,
        flash_dsn=psycopg.conninfo.make_conninfo(flash.database.dsn, options=options),
    )
    flash.stop()
    many = "INSERT INTO items SELECT n, repeat('x', 500) FROM generate_series({}, {}) AS n;"
    with flash.database.connect() as connection:
        connection.execute(
            f"BEGIN; {many.format(1, 1000)} SAVEPOINT a; TRUNCATE items; {many.format(1, 1000)}"
            f"ROLLBACK TO a; {many.format(2000, 2999)} COMMIT"
        )
    flash.start()
    flash.do("SELECT 1")
    ids = [change.new["id"] for change in flash.delivered()]
    assert list(dict.fromkeys(ids)) == [*range(1, 1001), *range(2000, 3000)]


@pytest.mark.parametrize("streaming", [False, True])
def test_batch_of_a_transaction_has_all_its_changes_of_all_tables(flash, streaming):
    flash.database.execute(ITEMS, "CREATE TABLE others (LIKE items INCLUDING ALL)")
    options = "-c logical_decoding_work_mem=64kB"
    flash.handler("items", batch="transaction")
    on_change("others", where={"id__lt": 1000}, batch="transaction")(flash.app.tasks["handler"])
    on_message("done", batch="transaction")(flash.app.tasks["handler"])
    flash.handler("items", "insert", name="small", batch=Batch(400, transaction=True))
    flash.start(
        flash_use_streaming=streaming,
        flash_dsn=psycopg.conninfo.make_conninfo(flash.database.dsn, options=options),
    )
    with flash.database.connect() as connection:
        connection.execute("INSERT INTO items VALUES (0)")
        connection.execute("UPDATE items SET name = 'a'")
        connection.execute(
            "BEGIN; INSERT INTO items SELECT n, repeat('x', 500) FROM generate_series(1, 1000) n;"
            "INSERT INTO others VALUES (1), (5000); SAVEPOINT a; DELETE FROM items;"
            "ROLLBACK TO a; SELECT pg_logical_emit_message(true, 'done', 'x');"
            "DELETE FROM others; COMMIT"
        )
    flash.do("INSERT INTO others VALUES (2)")
    batches = {"handler": [], "small": []}
    for message in flash.publisher.queues.pop("flash"):
        value = json.loads(message.body)[0][0]["__value__"]
        batches[message.task].append(payload.decode_batch(value))
    kinds = [[change.operation.names()[0] for change in changes] for changes in batches["handler"]]
    large = [*["insert"] * 1001, "message", "delete"]
    assert [len(kind) for kind in kinds] == [1, 1, 1003, 1]
    assert kinds == [["insert"], ["update"], large, ["insert"]]
    assert all((changes.part, changes.last) == (0, True) for changes in batches["handler"])
    assert len({changes[0].commit_lsn for changes in batches["handler"]}) == 4
    assert [(len(changes), changes.part, changes.last) for changes in batches["small"]] == [
        *((1, 0, True), (400, 0, False), (400, 1, False), (200, 2, True)),
    ]


@pytest.mark.parametrize(
    ("options", "conf", "said"),
    [
        ({"ordered": True}, {}, "ordered= and a batch of whole transactions"),
        ({"batch": Batch(9, wait=1, transaction=True)}, {}, "which do not wait for others"),
        ({"batch": "all"}, {}, "'transaction' or a Batch, not 'all'"),
        (
            {},
            {"flash_routes": {"public.items.delete": {"queue": "other"}}},
            "flash_routes gives its operations different options",
        ),
    ],
)
def test_batch_of_a_transaction_that_cannot_be_is_refused(flash, options, conf, said):
    flash.handler("items", **{"batch": "transaction", **options})
    with pytest.raises(SubscriptionError, match=said):
        flash.start(**conf)
