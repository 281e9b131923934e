"""The cost for the application's own transactions: pgbench alone, with flash, and with a trigger.

With one client a core is free for the reader, so the loss is the cost for a transaction. With eight
the machine is saturated, so the loss is the processor time that the reader takes.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.bench import POSTGRES
from benchmarks.databases import TRIGGER, Database, Source
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import compare, places_of, valkey_bodies
from example_project.servers import Postgres

SCRIPT = r"""
\set customer random(1, 1000)
BEGIN;
INSERT INTO orders (customer_id, status, total, note)
VALUES (:customer, 'new', 12.34, 'please leave it at the door') RETURNING id AS key \gset
UPDATE orders SET status = 'paid', updated_at = now() WHERE id = :key;
COMMIT;
"""
CLIENTS = {1: 0.97, 8: None}
FLASH = "flash replicate"
TRIGGERED = "a trigger with pg_notify"


def cost(bench):
    """Transactions per second of pgbench, while its changes are read."""
    with Postgres(**{**POSTGRES, "fsync": "on"}) as server, bench.valkey() as broker:
        source = Source(Database(server, "read"), broker, "batched")
        _cost(bench, source, Database(server, "plain"))


def _cost(bench, source, plain):
    for clients, goal in CLIENTS.items():
        lines = {}
        for name in (FLASH, TRIGGERED):
            line = lines[name] = Line("cost", f"pgbench -c {clients} with {name}", "tps")
            line.against("without", Goal(goal) if goal and name == FLASH else None)
        for run in bench.each_run(f"cost: pgbench, {clients} clients"):
            seconds = max(1, round(bench.seconds(3)))
            first = pgbench(plain, clients, seconds)
            ours, details = with_flash(bench, source, clients, seconds)
            middle = pgbench(plain, clients, seconds)
            theirs = with_trigger(bench, plain, clients, seconds)
            last = pgbench(plain, clients, seconds)
            lines[FLASH].details.append(details)
            for name, tps, around in (
                (FLASH, ours, (first + middle) / 2),
                (TRIGGERED, theirs, (middle + last) / 2),
            ):
                lines[name].values.append(tps)
                lines[name].comparisons[0].add(around, tps / around)
            bench.say(
                f"  cost, {clients} clients, run {run}: {first:,.0f}, {middle:,.0f}, {last:,.0f} "
                f"tps without, {ours:,.0f} with flash, {theirs:,.0f} with the trigger"
            )
        for line in lines.values():
            bench.add(line)


def pgbench(database, clients, seconds):
    """Return pgbench's transactions per second."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.sql")
        script.write_text(SCRIPT)
        command = [database.server.binaries / "pgbench", "-n", "-M", "prepared", "-f", script]
        command += ["-c", str(clients), "-j", str(min(2, clients)), "-T", str(seconds)]
        command += [database.dsn]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pgbench: {done.stderr}")
    return float(re.search(r"tps = ([\d.]+)", done.stdout).group(1))


def with_flash(bench, source, clients, seconds):
    """Run pgbench while the replication worker reads, and verify the enqueued changes."""
    database = source.database
    with bench.valkey() as broker:
        with Project(source.dsn, broker, "batched", source.slot) as project:
            worker = project.replicate()
            worker.logged_at("Replicating the slot")
            # First read past the WAL that other runs have written since.
            database.until_confirmed(source.slot, database.end_of_wal(), worker.alive)
            tps = pgbench(database, clients, seconds)
            database.until_confirmed(source.slot, database.end_of_wal(), worker.alive)
        details = compare(source.written()[0], places_of(valkey_bodies(broker)), "cost")
    source.mark()
    return tps, details


def with_trigger(bench, database, clients, seconds):
    """Run pgbench with the trigger and a listener."""
    with bench.valkey() as broker, Project(database.dsn, broker) as project:
        project.start("benchmarks.rivals.notify").logged_at("listening")
        database.execute(TRIGGER)
        try:
            return pgbench(database, clients, seconds)
        finally:
            database.execute("DROP TRIGGER tell ON orders", "DROP FUNCTION tell")
