"""The measured project, `celery -A benchmarks.app …`, with one handler at a time.

Environment variables select the handler and the settings, so that each run is a real process.
"""

import functools
import json
import os
import time
from contextlib import contextmanager, nullcontext

import psycopg
from celery import Celery
from psycopg.conninfo import conninfo_to_dict

from benchmarks.notes import NOTE
from flash_celery import Changes, Ordered, on_change

app = Celery("benchmarks", broker=os.environ.get("BENCH_BROKER"))
app.conf.flash_dsn = os.environ.get("BENCH_DSN")
app.conf.flash_replication_slot = os.environ.get("BENCH_SLOT", "flash_replication")
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True
# `project.Process.logged_at` reads the time at the front.
app.conf.worker_log_format = "%(created)f %(levelname)s %(message)s"
app.conf.update(json.loads(os.environ.get("BENCH_CONF", "{}")))

BATCH = int(os.environ.get("BENCH_BATCH", "500"))
#: One key in so many fails, and is retried after so many seconds.
FAILING, COUNTDOWN = json.loads(os.environ.get("BENCH_FAILING", "[1, 60]"))
#: The database that handlers write to.
EFFECTS = os.environ.get("BENCH_EFFECTS", "")
#: Adds a change to its customer.
UPDATE = "UPDATE totals SET orders = orders + 1, total = total + %s WHERE customer_id = %s"


@functools.cache
def effects():
    """Return this process's connection to the database that handlers write to."""
    return psycopg.connect(EFFECTS, autocommit=True)


@contextmanager
def kept():
    """Yield the connection, and leave it open, as a pool would."""
    yield effects()


@functools.cache
def notes():
    """Open the file to which the handlers of this process append notes."""
    return os.open(os.environ["BENCH_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def decode(change):
    """Convert every value of the row to a Python object."""
    return dict(change.new)


@app.task(name="handle")
def handle(argument):
    """Decode all changes, and note them."""
    started = time.time()
    changes = argument if isinstance(argument, Changes) else [argument]
    for change in changes:
        decode(change)
    now = time.time()
    packed = [NOTE.pack(started, now, c.commit_lsn, c.ordinal, c.key["id"]) for c in changes]
    os.write(notes(), b"".join(packed))


@app.task(name="slow")
def slow(change):
    """Note a change, and take a while."""
    handle.run(change)
    time.sleep(0.02)


@app.task(name="failing", bind=True, max_retries=1)
def failing(self, change):
    """Note a change; some keys are retried once, after a countdown."""
    if change.key["id"] % FAILING == 0 and not self.request.retries:
        raise self.retry(countdown=COUNTDOWN)
    handle.run(change)


@app.task(name="write")
def write(change):
    """Write with psycopg, in the transaction of the call or one of its own, and note the change."""
    connection = change.connection or effects()
    with nullcontext() if change.connection else connection.transaction():
        connection.execute(UPDATE, (change.new["total"], change.new["customer_id"]))
    handle.run(change)


@app.task(name="write_django")
def write_django(change):
    """Do the same with Django."""
    from django.db import connection, transaction

    own = nullcontext() if change.connection else transaction.atomic()
    with own, connection.cursor() as cursor:
        cursor.execute(UPDATE, (change.new["total"], change.new["customer_id"]))
    handle.run(change)


@app.task(name="row")
def row(order):
    """Handle a row in JSON, as an application would enqueue it itself."""
    now = time.time()
    os.write(notes(), NOTE.pack(now, now, 0, 0, order["id"]))


def elsewhere(number):
    """Declare a handler of another table."""

    @on_change(f"other_{number}")
    @app.task(name=f"elsewhere_{number}")
    def other(change): ...


def batched():
    """Declare one task for up to BATCH changes."""
    on_change("orders", batch=BATCH)(handle)


def single():
    """Declare one task for each change."""
    on_change("orders")(handle)


def filtered():
    """Declare a handler of one row in a hundred, with some of its columns."""
    columns = ["id", "status", "total"]
    on_change("orders", "insert", fields=columns, where={"status": "refunded"}, batch=BATCH)(handle)


def thousand_tables():
    """Declare one handler of a thousand tables."""
    batched()
    for number in range(999):
        on_change(f"other_{number}", batch=BATCH)(handle)


def tenants():
    """Declare one handler of every table of every tenant."""
    on_change("tenant_*.*", batch=BATCH)(handle)


def fifty_handlers():
    """Declare the handler, and fifty handlers of other tables."""
    batched()
    for number in range(50):
        elsewhere(number)


def ordered():
    """Declare one call for each change, in the order of each customer."""
    on_change("orders", ordered="customer_id")(handle)


def ordered_rows():
    """Declare the same without TRUNCATE, which lanes of RabbitMQ cannot order."""
    on_change("orders", "insert|update|delete", ordered="customer_id")(handle)


def ordered_batched():
    """Declare calls for up to BATCH changes, in the order of each customer."""
    on_change("orders", ordered="customer_id", batch=BATCH)(handle)


def beside_backfill():
    """Declare the handler, and one of another table with a queue of its own."""
    single()

    @on_change("old", batch=BATCH)
    @app.task(name="old", queue="old")
    def old(changes): ...


def one_lane():
    """Declare a slow handler that gets all changes one at a time."""
    on_change("orders", ordered=Ordered(lanes=1))(slow)


def some_fail():
    """Declare a handler that fails for some keys."""
    on_change("orders", ordered=True)(failing)


def ordered_write():
    """Declare a handler that writes, in transactions of its own."""
    on_change("orders", ordered="customer_id")(write)


def ordered_once():
    """Declare a handler that writes in the transaction of its mark."""
    on_change("orders", ordered="customer_id", once=kept)(write)


def ordered_write_django():
    """Declare a handler that writes with Django."""
    set_up_django()
    on_change("orders", ordered="customer_id")(write_django)


def ordered_once_django():
    """Declare a handler that writes with Django in the transaction of its mark."""
    set_up_django()
    on_change("orders", ordered="customer_id", once="default")(write_django)


def set_up_django():
    """Make the database that handlers write to Django's."""
    import django
    from django.conf import settings

    found = conninfo_to_dict(EFFECTS)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": found.get("dbname"),
        "USER": found.get("user"),
        "HOST": found.get("host"),
        "PORT": found.get("port"),
        "CONN_MAX_AGE": None,
    }
    settings.configure(DATABASES={"default": database})
    django.setup()


HANDLERS = {
    function.__name__: function
    for function in (
        batched,
        single,
        filtered,
        thousand_tables,
        fifty_handlers,
        tenants,
        ordered,
        ordered_rows,
        ordered_batched,
        beside_backfill,
        one_lane,
        some_fail,
        ordered_write,
        ordered_once,
        ordered_write_django,
        ordered_once_django,
    )
}
if name := os.environ.get("BENCH_HANDLER"):
    HANDLERS[name]()
