"""The project under test: its handlers record in a file what they receive."""

import json
import os
import random
import time
import uuid
from functools import partial

import psycopg
from celery import Celery

from flash_celery import Changes, on_change
from tests.sentinel import OPTIONS
from tests.soak import carried as tasks
from tests.soak import effects
from tests.soak.calls import LEASE
from tests.soak.ledger import identify, keys

#: Changes in a task of a batch handler, and of an ordered one.
BATCH = 100
ORDERED_BATCH = 20
#: Seconds in which what Redis has lost can be enqueued again.
WINDOW = 60
#: Seconds of a long call of an ordered handler, and until a retry.
_LONG, _COUNTDOWN = 3.0, 0.3

app = Celery("soak", broker=os.environ.get("SOAK_BROKER"))
app.conf.update(
    flash_dsn=os.environ.get("SOAK_DSN"),
    flash_replication_slot="soak",
    flash_status_interval=1,
    flash_shutdown_timeout=5,
    # A change that is about when processes are killed at random is not to blame.
    flash_max_deaths=1000,
    flash_lanes=16,
    flash_lane_lease=LEASE,
    flash_signing_key="a secret of the soak test",
    task_routes={f"tests.soak.project.{name}": name for name in (tasks.QUEUE, tasks.RUN)},
    worker_hijack_root_logger=False,
    worker_prefetch_multiplier=4,
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
)
ON_RABBITMQ = str(app.conf.broker_url).startswith("amqp")
#: Of ordered handlers: a TRUNCATE waits for all lanes, which RabbitMQ cannot.
OPERATIONS = "insert|update|delete" if ON_RABBITMQ else "insert|update|delete|truncate"
if not ON_RABBITMQ:
    app.conf.broker_transport_options = {
        **OPTIONS,
        # The tasks of a killed worker return within the run.
        "visibility_timeout": 10,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "unacked_restore_limit": 1000,
        # A worker that is killed while it returns them would keep the others from it for 5 minutes.
        "unacked_mutex_expire": 5,
    }
    # Also the default `flash_on_lost_broker` needs it, for ordered handlers.
    app.conf.flash_replay_window = WINDOW
app.conf.update(json.loads(os.environ.get("SOAK_CONF", "{}")))


def append(notes):
    """Append a line for each note, all in one write; a kill comes before it or after."""
    handle = os.open(os.environ["SOAK_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, "".join(f"{json.dumps(note)}\n" for note in notes).encode())
    finally:
        os.close(handle)


def handled(task, argument):
    """Return a note for each change that a task has received."""
    handler, changes = task.name.rpartition(".")[2], listed(argument)
    return [["handle", handler, time.time(), task.request.id, *identify(c)] for c in changes]


def listed(argument):
    return argument if isinstance(argument, Changes) else [argument]


def note(task, argument):
    """Note what an unordered handler has received."""
    time.sleep(random.random() / 500)
    append(handled(task, argument))
    time.sleep(random.random() / 500)


def call(task, argument):
    """Note the beginning and the end of a call of an ordered handler, and sometimes retry it."""
    name, handler, request = uuid.uuid4().hex, task.name.rpartition(".")[2], task.request
    old = not ON_RABBITMQ  # there it has no order with the old key's changes
    changes = [[int(c.commit_lsn), c.ordinal, keys(c, old)] for c in listed(argument)]
    process = os.getpid(), os.getppid(), request.retries
    append([["begin", name, handler, time.time(), *process, changes]])
    chance = random.random()
    time.sleep(_LONG if chance < 0.0005 else random.random() / 250)
    if chance > 0.99:
        append([["end", name, time.time(), True]])
        raise task.retry(countdown=_COUNTDOWN, max_retries=None)
    append([*handled(task, argument), ["end", name, time.time(), False]])


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


@on_change("items", OPERATIONS, ordered=True, queue="lanes")
@on_change("probes", OPERATIONS, ordered=True, queue="lanes")
@app.task(bind=True)
def keyed(self, change):
    """Receives single changes of one key in commit order."""
    call(self, change)


@on_change("items", OPERATIONS, ordered=True, batch=ORDERED_BATCH, queue="lanes")
@on_change("orders", OPERATIONS, ordered=True, batch=ORDERED_BATCH, queue="lanes")
@app.task(bind=True)
def grouped(self, changes):
    """Receives batches of one lane, in commit order of each key."""
    call(self, changes)


if not ON_RABBITMQ:
    connect = partial(psycopg.connect, os.environ.get("SOAK_TARGET", ""))
    patient = {"autoretry_for": (psycopg.Error,), "max_retries": None, "default_retry_delay": 0.5}

    @on_change("items", ordered=True, once=connect, queue="lanes")
    @on_change("probes", ordered=True, once=connect, queue="lanes")
    @app.task(**patient)
    def booked(change):
        """Leaves a row for each change, once."""
        row = int(change.commit_lsn), change.ordinal, keys(change)
        change.connection.execute(effects.INSERT, row)
        if random.random() > 0.99:
            raise psycopg.Error("this time its effect is rolled back")


@on_change("probes", queue="spare")
@app.task
def spare(change):
    """Never runs: its queue is deleted now and then."""


@on_change("items", batch=BATCH, queue="copies")
@app.task
def copied(changes):
    """Never runs: its queue is read as a handler would that keeps a copy of the table."""


@app.task
def carried(place, rest):
    """Never runs: its queue is read to see what transactions carried."""


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def ran(self, place, rest):
    """Notes that it ran."""
    append([["run", time.time(), self.request.id, place]])


@on_change("items", batch=BATCH, queue="witness")
@on_change("orders", batch=BATCH, queue="witness")
@on_change("probes", batch=BATCH, queue="witness")
@app.task
def witness(changes):
    """Never runs: its queue is read message by message, to see what was enqueued, and when."""
