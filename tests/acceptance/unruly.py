"""A project whose handler raises what breaks Celery's workers, as the name of an item asks."""

import asyncio
import json
import os
import sys

from celery import Celery, Task, signals
from celery.exceptions import Reject
from celery.worker.request import Request
from kombu import Queue

from flash_celery import on_change

app = Celery("unruly", broker=os.environ.get("SHOP_BROKER"))
app.conf.flash_dsn = os.environ.get("SHOP_DSN")
app.conf.flash_replication_slot = os.environ.get("SHOP_SLOT", "flash_replication")
app.conf.flash_status_interval = 2
app.conf.broker_connection_retry_on_startup = True
app.conf.task_default_queue = "flash"
app.conf.task_queues = [Queue("flash")]
app.conf.task_create_missing_queues = False
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))


class Textless(Exception):
    def __str__(self):
        return self.args[0].reason

    @property
    def exc_cls_name(self):
        raise RuntimeError("a property that raises")


class Nameless(Textless):
    __repr__ = Textless.__str__


class Two(Exception):
    """Cannot be unpickled."""

    def __init__(self, argument, two):
        super().__init__(argument)


class Unreduced(Exception):
    def __reduce__(self):
        raise ValueError("it cannot be pickled")


class Base(BaseException):
    def __init__(self, argument, two):
        super().__init__("a plain one")


class Leaving(Exception):
    """Its own code exits."""

    def __str__(self):
        sys.exit("an exception that exits")

    __repr__ = __str__


class LeavingReduce(Exception):
    def __reduce__(self):
        sys.exit("an exception that exits where it is pickled")


def leave(*_):
    sys.exit("an exception that exits where it is unpickled")


class LeavingInit(Exception):
    def __reduce__(self):
        return leave, ()


class OwnRequest(Request):
    def __init__(self, message, *args, **kwargs):
        super().__init__(message, *args, **kwargs)
        if self.row_name == "request":
            raise RuntimeError("it cannot be made")
        if self.row_name == "request exit":
            sys.exit("it cannot be made")

    @property
    def row_name(self):
        return self.args[0].new["name"]

    def revoked(self):
        if self.row_name == "revoked":
            sys.exit("nothing is known of it")
        return super().revoked()

    def send_event(self, *args, **kwargs):
        if self.row_name == "event":
            raise RuntimeError("no events")
        super().send_event(*args, **kwargs)

    def acknowledge(self):
        if self.row_name == "acknowledge":
            raise asyncio.CancelledError
        super().acknowledge()

    def on_failure(self, *args, **kwargs):
        super().on_failure(*args, **kwargs)
        raise RuntimeError("a request that raises")


class OwnTask(Task):
    Request = OwnRequest

    def apply_async(self, args=None, kwargs=None, **options):
        if kwargs and "refuse" in kwargs:
            raise LookupError("no such tenant")
        return super().apply_async(args, kwargs, **options)


@signals.task_received.connect
def received(request, **_):
    if request.name == "unruly.each" and request.args[0].new["name"] == "received":
        raise asyncio.CancelledError("not taken")


@signals.task_prerun.connect
def prerun(args, **_):
    if args and args[0].new["name"] == "prerun":
        sys.exit("not begun")


@signals.task_postrun.connect
def postrun(args, **_):
    if args and args[0].new["name"] == "postrun":
        raise asyncio.CancelledError("not ended")


RAISED = {
    "leaving": lambda: Leaving("x"),
    "leaving reduce": lambda: LeavingReduce("x"),
    "leaving init": lambda: LeavingInit("x"),
    "str": lambda: Textless("x"),
    "repr": lambda: Nameless("x"),
    "two": lambda: Two(1, 2),
    "reduce": lambda: Unreduced("x"),
    "reject": lambda: Reject(Two(1, 2), requeue=False),
    "cancelled": lambda: asyncio.CancelledError("given up"),
    "base": lambda: Base(1, 2),
}


@on_change("items", "insert")
@app.task(bind=True, base=OwnTask, default_retry_delay=0)
def each(self, change, **more):
    name = change.new["name"]
    if name in RAISED:
        raise RAISED[name]()
    if name == "exit":
        sys.exit("the handler has exited")
    if name == "unserialisable":
        raise self.retry(kwargs={"seen": {1}})
    if name == "refuse":
        raise self.retry(kwargs={"refuse": True})
    if name == "unpicklable retry":
        raise self.retry(exc=Two(1, 2), max_retries=1)
    if name == "no route":
        raise self.retry(queue="nowhere")
    with open(os.environ["SHOP_NOTES"], "a") as notes:
        notes.write(json.dumps({"handler": "each", "id": change.id, "name": name}) + "\n")
