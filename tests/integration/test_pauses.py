"""Pauses of handlers and sources, in a replication worker of this process."""

import json
import threading
from dataclasses import replace

import psycopg
import pytest

from flash_celery.errors import CatalogError, ConfigurationError
from flash_celery.postgres.source import Source
from flash_celery.provisioning import advisory_lock, pauses
from flash_celery.provisioning.record import Record
from flash_celery.settings import Settings
from tests.integration.conftest import shown

STREAMED = "SELECT stream_count > 0 FROM pg_stat_replication_slots WHERE slot_name = '{}'"


@pytest.fixture
def flash(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    return flash


def pause(flash, *handlers, end=False):
    settings = Settings.from_app(flash.app)
    with flash.database.connect() as connection:
        (pauses.resume if end else pauses.pause)(Source(connection, settings), handlers)


def record(flash):
    with flash.database.connect() as connection:
        return pauses.read(Source(connection, Settings.from_app(flash.app)))


def noticed(flash, **wanted):
    def equal():
        return all(
            sorted(getattr(flash.replicator._pauses.record, name)) == value
            for name, value in wanted.items()
        )

    flash.wait(equal)


def test_pauses_end_in_any_order(flash):
    flash.handler("items", name="one").handler("items", "insert", name="two", batch=10).start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    pause(flash, "one", "two")
    pause(flash, "one")
    noticed(flash, paused=["one", "two"])
    flash.do("INSERT INTO items VALUES (2, 'b')", "INSERT INTO items VALUES (3, 'c')")
    assert shown(flash.delivered("one")) == ["insert 1,a"]
    assert shown(flash.delivered("two")) == ["insert 1,a"]
    pause(flash, "one", end=True)
    pause(flash, "one")
    pause(flash, "two", end=True)
    flash.wait(lambda: list(record(flash).paused) == ["one"] and not record(flash).resuming)
    flash.do("UPDATE items SET name = 'd' WHERE id = 3", "INSERT INTO items VALUES (4, 'd')")
    assert shown(flash.delivered("two")) == ["insert 2,b", "insert 3,c", "insert 4,d"]
    # It may have gone on for a moment.
    first = shown(flash.delivered("one"))
    pause(flash, "one", end=True)
    flash.wait(lambda: not record(flash).resuming)
    flash.do("DELETE FROM items WHERE id = 1")
    delivered = [*first, *shown(flash.delivered("one"))]
    assert delivered == ["insert 2,b", "insert 3,c", "update 3 -> 3,d", "insert 4,d", "delete 1"]


def test_pause_does_not_wait_for_an_open_transaction(flash):
    """With streaming it may be open for hours."""
    options = "-c logical_decoding_work_mem=64kB"
    dsn = psycopg.conninfo.make_conninfo(flash.database.dsn, options=options)
    conf = {"flash_dsn": dsn, "flash_use_streaming": True, "flash_shutdown_timeout": 2}
    flash.handler("items").start(**conf)
    rows = "SELECT n, repeat('x', 100) FROM generate_series(1, 3000) AS n"
    with flash.database.connect() as connection, connection.transaction():
        connection.execute(f"INSERT INTO items {rows}")
        flash.wait(lambda: flash.database.one(STREAMED.format(flash.database.slot)))
        pause(flash, "")
        noticed(flash, paused=[""])
    flash.database.execute("INSERT INTO items VALUES (4000, 'b')")
    assert flash.delivered() == []
    pause(flash, "", end=True)
    flash.do("INSERT INTO items VALUES (0, 'c')")
    assert len(flash.delivered()) == 3002


def test_pause_without_privileges_prints_the_sql(flash):
    flash.handler("items").start()
    database = flash.database
    database.execute("CREATE ROLE nobody_here LOGIN")
    try:
        dsn = psycopg.conninfo.make_conninfo(database.dsn, user="nobody_here")
        settings = Settings.from_app(flash.app)
        with (
            psycopg.connect(dsn, autocommit=True) as connection,
            pytest.raises(
                CatalogError, match="to another role; as that role run COMMENT"
            ) as refusal,
        ):
            pauses.pause(Source(connection, settings), ["handler"])
        statement = str(refusal.value).partition("as that role run ")[2].rstrip(";")
        database.execute(statement)
        noticed(flash, paused=["handler"])
    finally:
        database.execute("DROP ROLE nobody_here")


def test_pause_logs_a_wait_for_another_process(flash, caplog):
    """It may be a `flash replicate` that waits for open transactions, for hours."""
    flash.handler("items").start()
    settings = Settings.from_app(flash.app)
    with (
        flash.database.connect() as other,
        advisory_lock.held(Source(other, settings)),
    ):
        waiting = threading.Thread(target=pause, args=(flash, "handler"))
        waiting.start()
        flash.wait(lambda: "waiting until it is done" in caplog.text)
        assert not record(flash).paused
    waiting.join(30)
    assert list(record(flash).paused) == ["handler"]


def test_pause_accepts_short_and_full_names():
    known = ["shop.tasks.send", "other.send", "shop.tasks.bill"]
    assert pauses.named(["bill", "shop.tasks.bill", "other.send"], known) == [
        "shop.tasks.bill",
        "other.send",
    ]
    with pytest.raises(ConfigurationError, match="send may be any of other.send, shop.tasks.send"):
        pauses.named(["send"], known)
    with pytest.raises(ConfigurationError, match="There is no handler sent; there are "):
        pauses.named(["sent"], known)


def test_pause_record_of_an_older_version_is_read():
    written = json.loads(Record(slot="one").to_json())
    del written["paused"], written["resuming"]
    assert Record.of_json(json.dumps(written)) == Record(slot="one")


def test_pause_of_a_removed_handler_is_kept(flash, caplog):
    flash.handler("items", name="kept").handler("items", name="gone").start()
    pause(flash, "kept", "gone")
    pause(flash, "kept", "gone", end=True)
    flash.stop()
    pause(flash, "kept", "gone")
    pause(flash, "kept", "gone", end=True)
    del flash.app.tasks["gone"]
    flash.start()
    flash.wait(lambda: list(record(flash).resuming) == ["gone"])
    message = "gone is no longer a handler; its held messages stay in the queue flash.paused."
    flash.wait(lambda: message in caplog.text)
    settings = Settings.from_app(flash.app)
    with flash.database.connect() as connection:
        assert pauses.resume(Source(connection, settings), ["gone"], removed=["gone"]) == []
    assert not record(flash).resuming


def test_pause_refuses_unknown_names(flash):
    flash.handler("items", name="shop.each")
    with pytest.raises(CatalogError, match="start `flash replicate` first"):
        pause(flash, "shop.each")
    with pytest.raises(ConfigurationError, match="is no longer a handler of this app"):
        pauses.removed_handlers(
            ["shop.gone"], ["shop.each"], "", lambda queues: dict.fromkeys(queues, 1)
        )
    with pytest.raises(ConfigurationError, match="is too long for its hold queue"):
        pause(flash, "x" * 201)
    of_source = replace(Settings.from_app(flash.app), source="billing")
    with (
        flash.database.connect() as connection,
        pytest.raises(ConfigurationError, match="of 193 bytes at most"),
    ):
        pauses.pause(Source(connection, of_source), ["x" * 200])
