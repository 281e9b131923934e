"""Makers of what the capture side passes on: templates, deliveries and messages."""

import time

from flash_celery import on_change
from flash_celery.changes.change import Operation
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.messages.task_message import Form, Message
from flash_celery.messages.task_options import TaskOptions
from flash_celery.messages.templates import Templates
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.settings import Settings

TABLE = Table("public", "orders", None, "d", ("id",), (Column("id", 23, "integer", True),))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def templates_of(app, subscriptions, source=""):
    settings = Settings.from_app(app)
    return Templates(app, settings, TaskOptions(app, settings, subscriptions), source)


def template(app, operation=Operation.INSERT, **options):
    @on_change("orders", **options)
    @app.task(name="handle")
    def handle(change):
        pass

    app.finalize()
    (subscription,) = subscriptions_of(app)
    return templates_of(app, [subscription])[subscription, operation]


def delivery(number, size=1):
    row = encode_row("I", 0, None, None, [str(number).zfill(size).encode()])
    return Delivery(TABLE, Transaction(Lsn(number * 16), 7, 0), 0, 0, 0, [row])


def message(number):
    return Message(Form("flash", "handle", {}, {}), str(number), str(number), str(number))


def wait(ready):
    deadline = time.monotonic() + 5
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)
