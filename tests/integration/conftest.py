"""A replication worker in this process, on a real database, publishing into a list."""

import json
import threading
import time

import pytest

from flash_celery import on_change
from flash_celery.changes import payload
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.publishing.brokers.memory import MemoryPublisher
from flash_celery.settings import Settings
from flash_celery.worker.replicator import Replicator


class Flash:
    """Declares handlers, runs the replication worker, and keeps what it delivers."""

    def __init__(self, database, app, source=""):
        self.database = database
        self.app = app
        self.source = source
        self.publisher = MemoryPublisher()
        self.thread = None
        self.error = None
        app.conf.broker_url = "memory://"
        if source:
            there = {"dsn": database.dsn, "slot": database.slot}
            app.conf.flash_sources = {**app.conf.get("flash_sources", {}), source: there}
        else:
            app.conf.update(flash_dsn=database.dsn, flash_replication_slot=database.slot)

    def handler(self, table, operations="all", name="handler", **options):
        @self.app.task(name=name, shared=False)
        def handler(change): ...

        on_change(table, operations, **options)(handler)
        return self

    def start(self, wait=True, **conf):
        self.app.conf.update(conf)
        self.app.finalize()
        settings = Settings.from_app(self.app)
        settings = settings.of_source(self.source) if self.source else settings
        subscriptions = [
            subscription
            for subscription in subscriptions_of(self.app)
            if subscription.source == self.source
        ]
        self.replicator = Replicator(self.app, settings, subscriptions, self.publisher)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        reads = self.slot("count(*) FILTER (WHERE active AND confirmed_flush_lsn IS NOT NULL)")
        self.wait(lambda: not wait or self.database.one(reads))
        return self

    def run(self):
        try:
            self.replicator.run()
        except Exception as error:
            self.error = error

    def slot(self, columns):
        return (
            f"SELECT {columns} FROM pg_replication_slots WHERE slot_name = '{self.database.slot}'"
        )

    def wait(self, ready, timeout=30.0):
        deadline = time.monotonic() + timeout
        while True:
            asked = time.monotonic()
            if ready():
                return
            if self.error is not None:
                raise self.error
            answered = time.monotonic()
            assert answered < deadline, "nothing happens"
            # Leave most of the processor to the event that is waited for.
            time.sleep(max(0.01, min(4 * (answered - asked), 0.3)))

    def do(self, *statements):
        """Run the statements, and wait until all they did is with the broker."""
        self.database.execute(*statements)
        goal = self.database.one("SELECT pg_current_wal_insert_lsn()")
        self.wait(lambda: self.database.one(self.slot(f"confirmed_flush_lsn >= '{goal}'")))
        return self

    def delivered(self, name="handler"):
        """Return the changes delivered to a handler since the last call."""
        messages = self.publisher.queues.get("flash", [])
        mine = [message for message in messages if message.task == name]
        self.publisher.queues["flash"] = [m for m in messages if m.task != name]
        return [
            change
            for message in mine
            for change in payload.decode(json.loads(message.body)[0][0]["__value__"])
        ]

    def stop(self):
        if self.thread is not None:
            self.replicator.stop()
            self.thread.join(20)
            assert not self.thread.is_alive()


@pytest.fixture
def flash(database, new_app):
    flash = Flash(database, new_app())
    yield flash
    flash.stop()


def shown(changes):
    """Changes as short texts: `update 1,a -> 1,b`."""

    def row(values):
        return ",".join("-" if v is None else str(v) for v in values.values())

    lines = []
    for change in changes:
        rows = [row(getattr(change, side)) for side in ("old", "new") if hasattr(change, side)]
        lines.append(f"{change.operation.names()[0]} {' -> '.join(rows)}".strip())
    return lines
