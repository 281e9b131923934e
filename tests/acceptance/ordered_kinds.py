"""Ordered handlers with what else a handler may have; each records what it receives."""

import json
import os
from dataclasses import dataclass

import celery
from celery import Celery

from flash_celery import Delete, on_change

app = Celery("ordered_kinds", broker=os.environ.get("SHOP_BROKER"))
app.conf.update(
    flash_dsn=os.environ.get("SHOP_DSN"),
    flash_replication_slot=os.environ.get("SHOP_SLOT", "flash_replication"),
    flash_lanes=16,
    result_backend=os.environ.get("SHOP_BROKER"),
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))
#: Celery has it from 5.5 on.
PYDANTIC = {"pydantic": True} if tuple(map(int, celery.__version__.split(".")[:2])) > (5, 4) else {}


@dataclass
class Item:
    id: int
    name: str
    note: str | None


def note(task, change, name):
    line = {
        "handler": task.name.rpartition(".")[2],
        "source": change.source,
        "operation": change.operation.names()[0],
        "id": change.id,
        "key": change.key["id"],
        "name": name,
        "task_id": task.request.id,
        "retries": task.request.retries,
    }
    with open(os.environ["SHOP_NOTES"], "a") as notes:
        notes.write(json.dumps(line) + "\n")


def name_of(change):
    return (change.old if isinstance(change, Delete) else change.new)["name"]


@on_change("items", ordered=True, into=Item)
@app.task(bind=True)
def typed(self, change):
    note(self, change, (change.old if isinstance(change, Delete) else change.new).name)


@on_change("items", ordered=True, where={"note": "in"})
@app.task(bind=True)
def chosen(self, change):
    note(self, change, name_of(change))


@on_change("items", ordered=True)
@on_change("billing:items", ordered=True)
@app.task(bind=True)
def both(self, change):
    note(self, change, name_of(change))


retried = {"autoretry_for": (ValueError,), "retry_kwargs": {"countdown": 0, "max_retries": 3}}


@on_change("items", "insert|update", ordered=True)
@app.task(bind=True, ignore_result=False, **retried, **PYDANTIC)
def validated(self, change):
    if change.key["id"] % 3 == 0 and self.request.retries < 1:
        raise ValueError("again")
    note(self, change, name_of(change))
    return {"id": change.id}
