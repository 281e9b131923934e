"""The project that is measured: `celery -A benchmarks.app …`, one handler at a time.

What it does is given by the environment, so that each run is a real process with real settings.
"""

import functools
import json
import os
import time

from celery import Celery

from benchmarks.notes import NOTE
from flash_celery import Changes, on_change

app = Celery("benchmarks", broker=os.environ.get("BENCH_BROKER"))
app.conf.flash_dsn = os.environ.get("BENCH_DSN")
app.conf.flash_replication_slot = os.environ.get("BENCH_SLOT", "flash_replication")
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True
# The seconds at the front are read by `project.Process.said_at`.
app.conf.worker_log_format = "%(created)f %(levelname)s %(message)s"
app.conf.update(json.loads(os.environ.get("BENCH_CONF", "{}")))

BATCH = int(os.environ.get("BENCH_BATCH", "500"))


@functools.cache
def notes():
    """Where this process notes what its handler was told."""
    return os.open(os.environ["BENCH_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def decode(change):
    """Every value of the row as a Python object."""
    return dict(change.new)


@app.task(name="handle")
def handle(told):
    """The handler: decode everything, note what came."""
    started = time.time()
    changes = told if isinstance(told, Changes) else [told]
    for change in changes:
        decode(change)
    now = time.time()
    noted = [NOTE.pack(started, now, c.commit_lsn, c.index, c.key["id"]) for c in changes]
    os.write(notes(), b"".join(noted))


@app.task(name="row")
def row(order):
    """What an application would enqueue itself: the row in JSON."""
    now = time.time()
    os.write(notes(), NOTE.pack(now, now, 0, 0, order["id"]))


def elsewhere(number):
    """A handler of another table."""

    @on_change(f"other_{number}")
    @app.task(name=f"elsewhere_{number}")
    def other(change): ...


def batched():
    """One task for up to BATCH changes."""
    on_change("orders", batch=BATCH)(handle)


def single():
    """One task for each change."""
    on_change("orders")(handle)


def filtered():
    """One row in a hundred, and some of its columns."""
    columns = ["id", "status", "total"]
    on_change("orders", "insert", fields=columns, where={"status": "refunded"}, batch=BATCH)(handle)


def thousand_tables():
    """One handler of a thousand tables."""
    batched()
    for number in range(999):
        on_change(f"other_{number}", batch=BATCH)(handle)


def fifty_handlers():
    """The handler, and fifty of other tables."""
    batched()
    for number in range(50):
        elsewhere(number)


HANDLERS = {f.__name__: f for f in (batched, single, filtered, thousand_tables, fifty_handlers)}
if name := os.environ.get("BENCH_HANDLER"):
    HANDLERS[name]()
