"""A project as users write one; its handlers record in a file what they receive."""

import json
import os
import signal
import sys
import time

from celery import Celery, shared_task
from kombu import Queue

from flash_celery import Changes, Truncate, on_change

app = Celery("shop", broker=os.environ.get("SHOP_BROKER"))
app.conf.flash_dsn = os.environ.get("SHOP_DSN")
app.conf.flash_replication_slot = os.environ.get("SHOP_SLOT", "flash_replication")
app.conf.flash_status_interval = 2
app.conf.flash_routes = {"public.items.delete": {"queue": "cleanup"}}
app.conf.worker_hijack_root_logger = False
app.conf.broker_connection_retry_on_startup = True
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
if os.environ.get("SHOP_QUORUM"):
    arguments = {"x-queue-type": "quorum"}
    names = ("flash", "cleanup")
    app.conf.task_queues = [Queue(name, queue_arguments=arguments) for name in names]


LIMIT = float(os.environ.get("SHOP_LIMIT", 0)) or None


def note(task, argument):
    changes = argument if isinstance(argument, Changes) else [argument]
    lines = []
    for change in changes:
        lines.append(
            json.dumps(
                {
                    "handler": task.name.rpartition(".")[2],
                    "task_id": task.request.id,
                    "source": change.source,
                    "table": change.table,
                    "operation": change.operation.names()[0],
                    "id": change.id,
                    "together": len(changes),
                    "key": None if isinstance(change, Truncate) else dict(change.key),
                    "new": dict(change.new) if hasattr(change, "new") else None,
                    "old": dict(change.old) if hasattr(change, "old") else None,
                },
                default=str,
            )
        )
    with open(os.environ["SHOP_NOTES"], "a") as notes:
        notes.write("\n".join(lines) + "\n")


def misbehave(change):
    """Fail as the name of the item asks, until the handlers have been fixed."""
    if not hasattr(change, "new") or os.path.exists(os.environ["SHOP_NOTES"] + ".fixed"):
        return
    name = change.new["name"]
    if name == "raise":
        raise ValueError("this item cannot be handled")
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exit":
        sys.exit(1)
    if name == "memory":
        raise MemoryError("no more")
    if name == "sleep":
        time.sleep(60)
    if name.startswith("wait"):
        notes = os.environ["SHOP_NOTES"]
        open(f"{notes}.{name}", "w").close()
        while not os.path.exists(f"{notes}.go"):
            time.sleep(0.02)
        raise (ValueError if name == "wait and retry" else RuntimeError)("the broker is gone")


if os.environ.get("SHOP_BATCH") != "only":

    @on_change(os.environ.get("SHOP_ITEMS", "items"))
    @shared_task(bind=True, max_retries=2, default_retry_delay=0, time_limit=LIMIT)
    def each(self, change):
        try:
            misbehave(change)
        except ValueError as error:
            raise self.retry(exc=error) from error
        note(self, change)
        time.sleep(float(os.environ.get("SHOP_SLEEP", "0")))


for also in filter(None, os.environ.get("SHOP_ALSO", "").split(",")):
    on_change(also)(each)


if os.environ.get("SHOP_BATCH"):

    @on_change("items", "insert", batch=100, queue="batches")
    @shared_task(bind=True)
    def many(self, changes):
        for change in changes:
            misbehave(change)
        note(self, changes)


if os.environ.get("SHOP_RETRY"):

    @on_change("items", "insert", batch=100, queue="batches")
    @shared_task(bind=True, max_retries=2, default_retry_delay=0)
    def stubborn(self, changes):
        note(self, changes)
        if self.request.retries < 2:
            raise self.retry()


if os.environ.get("SHOP_WHERE"):

    @on_change("items", where={"name": "paid"}, fields=["name"])
    @shared_task(bind=True)
    def paid(self, change):
        note(self, change)


BAD = {
    "where": lambda: on_change("items", where={"id__gte_": 1}),
    "operation": lambda: on_change("items", "upsert"),
    "table": lambda: on_change("item"),
    "column": lambda: on_change("items", fields=["nam"]),
    "contradiction": lambda: on_change("items", batch=5),
    "serializer": lambda: on_change("items"),
    "source": lambda: on_change("biling:items"),
    "sources": lambda: on_change("billing:items", source="shipping"),
}
if os.environ.get("SHOP_BAD"):
    kind = os.environ["SHOP_BAD"]

    @shared_task(serializer="pickle" if kind == "serializer" else None)
    def bad(change):
        pass

    BAD[kind]()(bad)
    if kind == "contradiction":
        on_change("items")(bad)
