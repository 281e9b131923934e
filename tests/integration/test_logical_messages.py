"""`on_message`: what transactions wrote by pg_logical_emit_message, in its place."""

import pytest

from flash_celery import Insert, LogicalMessage, on_change, on_message

from .conftest import shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"


def emit(prefix, content, transactional=True):
    return f"SELECT pg_logical_emit_message({transactional}, '{prefix}', '{content}')"


def listen(flash, prefix, name="messages", **options):
    @flash.app.task(name=name, shared=False)
    def handler(message): ...

    on_message(prefix, **options)(handler)
    return flash


def all_delivered(flash):
    """Everything in the order in which it was enqueued."""
    names = [message.task for message in flash.publisher.queues.get("flash", [])]
    delivered = {name: flash.delivered(name) for name in set(names)}
    return [delivered[name].pop(0) for name in names]


@pytest.mark.parametrize("streaming", [False, True])
def test_logical_message_keeps_its_place_in_the_transaction(flash, streaming):
    flash.database.execute(ITEMS, "ALTER SYSTEM SET logical_decoding_work_mem = '64kB'")
    flash.database.execute("SELECT pg_reload_conf()")
    listen(flash, "order.paid").handler("items").start(flash_use_streaming=streaming)
    with flash.database.connect() as connection:
        connection.execute("BEGIN")
        connection.execute(
            "INSERT INTO items SELECT n, repeat('x', 900) FROM generate_series(1, 300) n"
        )
        connection.execute(emit("order.paid", '{"id": 1}'))
        connection.execute(emit("order.other", "not ours"))
        connection.execute("SAVEPOINT a")
        connection.execute(emit("order.paid", "rolled back"))
        connection.execute("ROLLBACK TO a")
        connection.execute("INSERT INTO items VALUES (301)")
        connection.execute(emit("order.paid", "second"))
        connection.execute("COMMIT")
    flash.do("SELECT 1")
    delivered = all_delivered(flash)
    kinds = [Insert] * 300 + [LogicalMessage, Insert, LogicalMessage]
    assert [type(change) for change in delivered] == kinds
    first, second = delivered[300], delivered[302]
    assert (first.prefix, first.content) == ("order.paid", b'{"id": 1}')
    assert second.content == b"second"
    assert {change.commit_lsn for change in delivered} == {first.commit_lsn}
    assert {change.xid for change in delivered} == {first.xid}
    # Messages do not shift the numbers of rows.
    assert [c.ordinal for c in delivered if isinstance(c, Insert)] == list(range(301))
    assert first.id == f"{first.commit_lsn}:0m"
    assert len({change.id for change in delivered}) == len(delivered)


@pytest.mark.parametrize("streaming", [False, True])
def test_changes_of_a_handler_come_in_the_order_of_their_positions(flash, streaming):
    """Also those of two subscriptions, and of an UPDATE that changes the key."""
    flash.database.execute(ITEMS, "CREATE TABLE others (LIKE items INCLUDING ALL)")
    flash.database.execute("ALTER SYSTEM SET logical_decoding_work_mem = '64kB'")
    flash.database.execute("SELECT pg_reload_conf()")

    @flash.app.task(name="handle", shared=False)
    def handle(change): ...

    for prefix in ("a", "b"):
        on_message(prefix)(handle)
    on_change("items")(handle)
    on_change("items", where={"id__lt": 1000})(handle)
    on_change("others", key=["name"])(handle)
    flash.start(flash_use_streaming=streaming)
    with flash.database.connect() as connection:
        connection.execute("BEGIN")
        connection.execute(emit("a", "first"))
        connection.execute(
            "INSERT INTO items SELECT n, repeat('x', 900) FROM generate_series(1, 200) n"
        )
        connection.execute(emit("b", "second"))
        connection.execute("INSERT INTO others VALUES (1, 'x'), (2, 'y')")
        connection.execute("UPDATE others SET name = 'z' WHERE id = 1")
        connection.execute("UPDATE items SET name = '' WHERE id < 3")
        connection.execute("SAVEPOINT s")
        connection.execute("INSERT INTO items VALUES (300)")
        connection.execute(emit("a", "rolled back"))
        connection.execute("ROLLBACK TO s")
        connection.execute("TRUNCATE others")
        connection.execute(emit("a", "last"))
        connection.execute("COMMIT")
    flash.do("INSERT INTO items VALUES (500)")
    delivered = flash.delivered("handle")
    positions = [change._position for change in delivered]
    assert len(set(positions)) == len(positions) == len({change.id for change in delivered})
    assert positions == sorted(positions)
    places = {position[1] for position in positions if position[0] == positions[0][0]}
    assert places == set(range(209))
    with flash.database.connect() as connection:
        (system,) = connection.execute(
            "SELECT system_identifier::text FROM pg_control_system()"
        ).fetchone()
    assert {str(change.transaction.history) for change in delivered} == {f"{system}/1"}


def test_logical_message_rolled_back_or_not_transactional_is_not_delivered(flash):
    listen(flash, "mail").start()
    with flash.database.connect() as connection:
        connection.execute("BEGIN")
        connection.execute(emit("mail", "rolled back"))
        connection.execute(emit("mail", "at once", transactional=False))
        connection.execute("ROLLBACK")
    flash.do(emit("mail", "alone"), emit("mail", ""), emit("mail", "at once", transactional=False))
    assert [message.content for message in flash.delivered("messages")] == [b"alone", b""]


def test_logical_message_handlers_need_no_table(flash):
    listen(flash, "a").start()
    flash.do(ITEMS, "INSERT INTO items VALUES (1)", emit("a", "x"), "UPDATE items SET name = 'y'")
    assert [message.content for message in flash.delivered("messages")] == [b"x"]


def test_batch_handler_receives_rows_and_messages_in_order(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", name="both", batch=100)
    on_message("items.done", batch=100)(flash.app.tasks["both"])
    flash.start()
    flash.do(
        "BEGIN; INSERT INTO items VALUES (1), (2);"
        f"{emit('items.done', 'two')}; INSERT INTO items VALUES (3); COMMIT"
    )
    delivered = flash.delivered("both")
    assert [change.operation.names()[0] for change in delivered] == [
        *("insert", "insert", "message", "insert")
    ]
    assert len({change.id for change in delivered}) == 4


def test_logical_message_written_without_a_worker_is_delivered_later(flash):
    listen(flash, "a").start()
    flash.do("SELECT 1")
    flash.stop()
    flash.database.execute(emit("a", "x"))
    flash.start()
    flash.do("SELECT 1")
    (message,) = flash.delivered("messages")
    assert message.content == b"x"


@pytest.mark.soak
def test_logical_message_of_megabytes_is_delivered(flash):
    listen(flash, "big").start()
    flash.do("SELECT pg_logical_emit_message(true, 'big', repeat('x', 20000000))")
    (message,) = flash.delivered("messages")
    assert message.content == b"x" * 20_000_000


def test_rows_are_delivered_unchanged_beside_logical_messages(flash):
    flash.database.execute(ITEMS)
    listen(flash, "a").handler("items").start()
    flash.do("INSERT INTO items VALUES (1)", emit("b", "x"), "DELETE FROM items", emit("a", "y"))
    assert shown(flash.delivered()) == ["insert 1,-", "delete 1"]


@pytest.mark.parametrize(
    ("streaming", "prefix"), [(False, "mail"), (True, "mail"), (True, "of another program")]
)
def test_logical_message_of_a_savepoint_rolled_back_late_is_not_delivered(flash, streaming, prefix):
    flash.database.execute(ITEMS, "ALTER SYSTEM SET logical_decoding_work_mem = '64kB'")
    flash.database.execute("SELECT pg_reload_conf()")
    listen(flash, "mail").handler("items").start(flash_use_streaming=streaming)
    many = "INSERT INTO items SELECT n, repeat('x', 900) FROM generate_series({}, {}) n"
    with flash.database.connect() as connection:
        connection.execute("BEGIN")
        connection.execute("SAVEPOINT a")
        connection.execute(emit(prefix, "rolled back"))
        connection.execute(many.format(1, 300))
        connection.execute("ROLLBACK TO a")
        connection.execute(many.format(1001, 1003))
        connection.execute(emit("mail", "kept"))
        connection.execute("COMMIT")
    flash.do("SELECT 1")
    assert len(flash.delivered()) == 3
    (message,) = flash.delivered("messages")
    assert message.content == b"kept"
    # Its id is the same whether it was streamed or not.
    assert message._position[1] == 3


def test_streaming_goes_on_after_unclear_messages_in_concurrent_transactions(flash, caplog):
    """Each unclear transaction is read once more, and nothing is delivered twice or left out."""
    flash.database.execute(ITEMS, "ALTER SYSTEM SET logical_decoding_work_mem = '64kB'")
    flash.database.execute("SELECT pg_reload_conf()")
    caplog.set_level("INFO")
    listen(flash, "mail").handler("items").start(flash_use_streaming=True)
    many = "INSERT INTO items SELECT n, repeat('x', 900) FROM generate_series({0}, {0} + 299) n"
    expected = []
    with flash.database.connect() as first, flash.database.connect() as second:
        for base, connection in ((1000, first), (2000, second)):
            connection.execute("BEGIN")
            connection.execute("SAVEPOINT a")
            connection.execute(emit("mail", f"rolled back {base}"))
            connection.execute(many.format(base))
            connection.execute("ROLLBACK TO a")
            connection.execute(emit("mail", f"kept {base}"))
            connection.execute(many.format(base + 500))
        flash.do("INSERT INTO items VALUES (1)", emit("mail", "small"))
        expected += [1, "small"]
        for base, connection in ((2000, second), (1000, first)):
            connection.execute("COMMIT")
            flash.do("SELECT 1")
            expected += [f"kept {base}", *range(base + 500, base + 800)]
    flash.wait(lambda: "restarting the session with flash_use_streaming" in caplog.text)
    flash.do(emit("mail", "end"))
    expected.append("end")
    delivered = all_delivered(flash)
    assert expected == [
        change.new["id"] if isinstance(change, Insert) else change.content.decode()
        for change in delivered
    ]
    assert "Reading it again, without flash_use_streaming" in caplog.text
