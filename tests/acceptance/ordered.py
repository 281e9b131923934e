"""A project with ordered handlers, which record when they begin and end, in which process."""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import psycopg
from celery import Celery

from flash_celery import Changes, Ordered, on_backfill_end, on_change, on_message

app = Celery("ordered", broker=os.environ.get("SHOP_BROKER"))
app.conf.update(
    flash_dsn=os.environ.get("SHOP_DSN"),
    flash_replication_slot=os.environ.get("SHOP_SLOT", "flash_replication"),
    flash_status_interval=2,
    flash_lane_lease=4,
    flash_lanes=16,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))

ORDER = {
    "column": "name",
    "block": Ordered(on_failure="block"),
    "one": Ordered(lanes=1),
    "none": False,
    "coalesce": Ordered(coalesce=0.2),
}.get(os.environ.get("SHOP_ORDER", ""), True)
SECONDS = float(os.environ.get("SHOP_SLEEP", "0"))
LIMIT = float(os.environ.get("SHOP_LIMIT", 0)) or None
SOFT_LIMIT = float(os.environ.get("SHOP_SOFT_LIMIT", 0)) or None


def note(event, task, argument):
    changes = argument if isinstance(argument, Changes) else [argument]
    with open(os.environ["SHOP_NOTES"], "a") as notes:
        for change in changes:
            line = {
                "handler": task.name.rpartition(".")[2],
                "event": event,
                "pid": os.getpid(),
                "task_id": task.request.id,
                "retries": task.request.retries,
                "operation": change.operation.names()[0],
                "id": change.id,
                "together": len(changes),
                "coalesced": change.coalesced,
                "superseded": change.superseded,
                "key": dict(change.key),
                "new": dict(change.new) if hasattr(change, "new") else None,
            }
            notes.write(json.dumps(line) + "\n")


def fixed():
    return os.path.exists(os.environ["SHOP_NOTES"] + ".fixed")


def misbehave(task, change):
    """Do what the note of the item asks."""
    asked = (change.new["note"] or "") if hasattr(change, "new") else ""
    if asked == "raise" and not fixed():
        raise ValueError("this item cannot be handled")
    if asked == "retry" and task.request.retries < 2:
        raise task.retry(countdown=0.3, max_retries=5)
    if asked == "retry late" and task.request.retries < 1:
        raise task.retry(countdown=6, max_retries=5)
    if asked == "retry quietly" and task.request.retries < 2:
        task.retry(countdown=0.3, throw=False)
    if asked == "kill" or (asked == "kill once" and not fixed()):
        Path(os.environ["SHOP_NOTES"] + (".fixed" if asked == "kill once" else ".killed")).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if asked == "kill after" and not fixed():
        killed_after.append(change)
    if asked == "sleep":
        time.sleep(60)


killed_after = []


@contextmanager
def connection():
    """The database of `once=`; the process may die when the transaction has committed."""
    with psycopg.connect(os.environ["SHOP_DSN"], autocommit=True) as opened:
        yield opened
    if killed_after:
        Path(os.environ["SHOP_NOTES"] + ".fixed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def each(self, change):
    note("begin", self, change)
    if change.connection is not None:
        change.connection.execute("INSERT INTO effects VALUES (%s)", [change.id])
    misbehave(self, change)
    time.sleep(SECONDS)
    note("end", self, change)


ONCE = connection if os.environ.get("SHOP_ONCE") else None
options = {"bind": True, "max_retries": 5, "time_limit": LIMIT, "soft_time_limit": SOFT_LIMIT}
each = app.task(name=os.environ.get("SHOP_NAME", "ordered.each"), **options)(each)
OPERATIONS = os.environ.get("SHOP_OPERATIONS", "insert|update|delete|truncate")
each = on_change("items", OPERATIONS, ordered=ORDER, once=ONCE)(each)
if os.environ.get("SHOP_ENDS"):
    on_backfill_end()(each)
if os.environ.get("SHOP_MESSAGES"):
    on_message("said")(each)

if os.environ.get("SHOP_BATCH"):

    @on_change("items", "insert|update", ordered=True, batch=50)
    @app.task(bind=True, name="ordered.many")
    def many(self, changes):
        for change in changes:
            misbehave(self, change)
        note("end", self, changes)
