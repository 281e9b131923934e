"""A pattern over thousands of tables: the start, the memory, and the look of each second."""

import time
from contextlib import closing
from pathlib import Path
from statistics import median

from celery import Celery

from benchmarks.project import Project
from benchmarks.results import Goal, Line
from flash_celery import on_change
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.postgres.source import connected
from flash_celery.settings import Settings
from flash_celery.worker.control import Control
from flash_celery.worker.startup import Startup

#: The schemas, and the tables of each.
SCHEMAS = 2000
TABLES = ("orders", "lines", "payments", "users", "audit")
_LOOKS = 20
_SLOT = "flash_tenants"
#: The lines, with their units and bounds.
_LINES = {
    "first start": ("s", 30),
    "processor time of the first start": ("s", 30),
    "later start": ("s", 30),
    "processor time of the later start": ("s", 30),
    "resident memory": ("MB", 200),
    "look of each second": ("ms", 50),
    "processor time of PostgreSQL for it": ("ms", 50),
}


def tenants(bench):
    """A pattern over 2,000 schemas of five tables: start, memory and the look of each second."""
    schemas = max(20, min(SCHEMAS, int(SCHEMAS * bench.scale)))
    database = bench.database()
    count = schemas * len(TABLES)
    bench.doing(f"tenants: creating {count:,} tables")
    columns = "id bigint PRIMARY KEY, a text, b int, c numeric, d timestamptz, e bool, f text"
    with database.connect() as connection:
        for number in range(schemas):
            name = f"tenant_{number}"
            tables = (f"CREATE TABLE {name}.{table} ({columns})" for table in TABLES)
            connection.execute("; ".join([f"CREATE SCHEMA {name}", *tables]))
    lines = {}
    for what, (unit, bound) in _LINES.items():
        lines[what] = Line("tenants", f"{count:,} tables by a pattern, {what}", unit)
        lines[what].goal = Goal(bound, at_least=False)
    for run in bench.each_run("tenants"):
        taken = measure(bench, database)
        for what, value in taken.items():
            lines[what].values.append(round(value, 2))
        bench.say(f"  tenants, run {run}: {taken}")
    for line in lines.values():
        bench.add(line)


def measure(bench, database):
    """Return what one run took."""
    taken = {}
    with bench.valkey() as broker, Project(database.dsn, broker, "tenants", _SLOT) as project:
        for what in ("first start", "later start"):
            started = time.time()
            replicate = project.replicate()
            taken[what] = replicate.logged_at("Replicating the slot") - started
            taken[f"processor time of the {what}"] = replicate.cpu()
            status = Path(f"/proc/{replicate.child.pid}/status").read_text()
            replicate.end()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        taken["resident memory"] = int(peak.split()[1]) / 1024
        taken["look of each second"], taken["processor time of PostgreSQL for it"] = look(database)
        reset(database)
    return taken


def look(database):
    """Return the milliseconds of a look, and those of the server's processor for it."""
    app = Celery("tenants", broker="memory://", set_as_current=False)
    app.conf.update(flash_dsn=database.dsn, flash_replication_slot=_SLOT)

    @app.task(name="handle", shared=False)
    def handle(change): ...

    on_change("tenant_*.*")(handle)
    app.finalize()
    settings, times = Settings.from_app(app), []
    with closing(Control()) as control, connected(settings) as source:
        startup = Startup(settings, subscriptions_of(app), control)
        startup.tables_changed(source)
        before = processor_time(source.connection)
        for _ in range(_LOOKS):
            started = time.perf_counter()
            startup.tables_changed(source)
            times.append((time.perf_counter() - started) * 1000)
        used = (processor_time(source.connection) - before) / _LOOKS
    return median(times), used


def processor_time(connection):
    """Return the milliseconds of processor time that the server's process has used."""
    fields = (
        Path(f"/proc/{connection.info.backend_pid}/stat").read_text().rpartition(")")[2].split()
    )
    return (int(fields[11]) + int(fields[12])) * 10


def reset(database):
    """Undo the set-up."""
    database.drop_slot(_SLOT)
    for operation in ("insert", "update", "delete", "truncate"):
        database.execute(f"DROP PUBLICATION flash_publication_{operation}")
