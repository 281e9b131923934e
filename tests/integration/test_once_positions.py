"""Marks of `once=` recognise a change that another session has read, with other handlers."""

import json
import select
from contextlib import closing

import pytest

from flash_celery import on_change, on_message
from flash_celery.capture.partition_history import PartitionHistory
from flash_celery.capture.pipeline import Pipeline
from flash_celery.capture.relations import RelationCatalog
from flash_celery.changes.change import LogicalMessage
from flash_celery.changes.payload import changes_of
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.lanes.marks import Position
from flash_celery.postgres.source import publication_names
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.settings import Settings


class Changes:
    """The sink that keeps the changes of `handler`."""

    def __init__(self):
        self.received = []

    def receiver(self, subscription, operation):
        if subscription.handler != "handler":
            return lambda delivery: None
        return lambda delivery: self.received.extend(changes_of(delivery))


def subscriptions(new_app, *, stacked, other):
    """A handler of rows; with messages for itself, or for another handler."""
    app = new_app()

    @app.task(name="handler", shared=False)
    def handler(change): ...

    @app.task(name="other", shared=False)
    def listener(message): ...

    on_change("items", ordered=True)(handler)
    if stacked:
        on_message("said")(handler)
    if other:
        on_message("said")(listener)
    app.finalize()
    return subscriptions_of(app)


def read(database, slot, declared):
    """Read all changes of a slot, as a session does that has these subscriptions."""
    sink, end = Changes(), database.one("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")
    names = publication_names(Settings().flash_publication_slot_prefix)
    with closing(ReplicationConnection(database.dsn)) as stream, database.connect() as connection:
        history, _ = stream.identify()
        catalog = RelationCatalog(connection, PartitionHistory({}))
        pipeline = Pipeline(declared, catalog, sink, history=history)
        stream.start_session()
        stream.start(slot, names)
        while stream.received < end or pipeline.transactions.open:
            stream.send_status(stream.received, 0, 0, reply=True)
            select.select([stream], [], [], 1)
            pipeline.feed(stream.receive())
            list(pipeline.deliver())
    return sink.received


@pytest.fixture
def readings(flash, new_app):
    """Three readings of the same transactions: without messages, with them, and with both."""
    database = flash.database
    database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)", "CREATE TABLE more ()")
    flash.handler("items").start()
    flash.stop()
    for number in range(3):
        database.execute(
            f"SELECT pg_create_logical_replication_slot('reading_{number}', 'pgoutput')"
        )
    emit = "SELECT pg_logical_emit_message(true, 'said', 'x')"
    with database.connect() as connection:
        for first in (0, 10):
            connection.execute("BEGIN")
            for row in range(first, first + 4):
                connection.execute(emit)
                connection.execute("SAVEPOINT s")
                connection.execute(emit)
                connection.execute(f"INSERT INTO items VALUES ({row + 100})")
                connection.execute("ROLLBACK TO s")
                connection.execute(f"INSERT INTO items VALUES ({row})")
            connection.execute("UPDATE items SET id = id + 1000 WHERE id < 100")
            connection.execute("COMMIT")
    try:
        yield [
            read(database, f"reading_{number}", subscriptions(new_app, **options))
            for number, options in enumerate(
                [
                    {"stacked": False, "other": False},
                    {"stacked": False, "other": True},
                    {"stacked": True, "other": False},
                ]
            )
        ]
    finally:
        for number in range(3):
            database.execute(f"SELECT pg_drop_replication_slot('reading_{number}')")


def rows_of(reading):
    return [change for change in reading if not isinstance(change, LogicalMessage)]


def test_once_positions_do_not_depend_on_who_reads_messages(readings):
    """A crash amid a transaction, a deploy that adds or removes an on_message, a restart."""
    without, with_other, stacked = readings
    assert len(without) == len(with_other) == len(rows_of(stacked)) == 16
    assert len(stacked) == 24
    for before in readings:
        for after in readings:
            for handled in range(len(before) + 1):
                position = Position()
                for change in before[:handled]:
                    assert position.move_past(change)
                skipped = [change for change in after if position.covers(change)]
                rows = len(rows_of(before[:handled]))
                assert rows_of(skipped) == rows_of(after)[:rows], (before is without, handled)
                if before is after:
                    assert skipped == after[:handled]


def test_once_positions_survive_the_database(readings):
    """A mark that was stored is the mark that is read."""
    for change in readings[2]:
        position = Position()
        position.move_past(change)
        assert Position.of(*position.columns) == position
        assert json.loads(position.columns[0])[0] == change.transaction.history.system
