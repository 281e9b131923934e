"""The project under test: its handlers record in a file what they receive."""

import json
import os
import random
import time

from celery import Celery

from flash_celery import Changes, on_change
from tests.sentinel import OPTIONS
from tests.soak.ledger import identify

#: Changes in a task of a batch handler.
BATCH = 100

app = Celery("soak", broker=os.environ.get("SOAK_BROKER"))
app.conf.update(
    flash_dsn=os.environ.get("SOAK_DSN"),
    flash_replication_slot="soak",
    flash_status_interval=1,
    flash_shutdown_timeout=5,
    # A change that is about when processes are killed at random is not to blame.
    flash_max_deaths=1000,
    worker_hijack_root_logger=False,
    worker_prefetch_multiplier=4,
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
)
if str(app.conf.broker_url).startswith(("redis", "sentinel")):
    app.conf.broker_transport_options = {
        **OPTIONS,
        # The tasks of a killed worker return within the run.
        "visibility_timeout": 10,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "unacked_restore_limit": 1000,
    }
app.conf.update(json.loads(os.environ.get("SOAK_CONF", "{}")))


def note(task, argument):
    """Append a line for each change, all in one write; a kill comes before it or after."""
    time.sleep(random.random() / 500)
    lines = []
    for change in argument if isinstance(argument, Changes) else [argument]:
        handler = task.name.rpartition(".")[2]
        lines.append(json.dumps([handler, time.time(), task.request.id, *identify(change)]))
    handle = os.open(os.environ["SOAK_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, ("\n".join(lines) + "\n").encode())
    finally:
        os.close(handle)
    time.sleep(random.random() / 500)


@on_change("items", queue="each")
@on_change("probes", queue="each")
@app.task(bind=True)
def each(self, change):
    """Receives single changes: of `items`, and of the probes of the run."""
    note(self, change)


@on_change("items", batch=BATCH, queue="many")
@on_change("orders", batch=BATCH, queue="many")
@app.task(bind=True)
def many(self, changes):
    """Receives batches, of two tables."""
    note(self, changes)


@on_change("probes", queue="spare")
@app.task
def spare(change):
    """Never runs: its queue is deleted now and then."""


@on_change("items", batch=BATCH, queue="witness")
@on_change("orders", batch=BATCH, queue="witness")
@on_change("probes", batch=BATCH, queue="witness")
@app.task
def witness(changes):
    """Never runs: its queue is read message by message, to see what was enqueued, and when."""
