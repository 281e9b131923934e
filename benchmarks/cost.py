"""The cost for the application's own transactions: pgbench alone, with flash, and with a trigger.

With one client a core is free for the reader, so the loss is the cost for a transaction. With eight
the machine is saturated, so the loss is the processor time that the reader takes.
"""

import os
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
from flash_celery.changes import transaction_context
from flash_celery.handlers.written_context import statement_for

SCRIPT = r"""
\set customer random(1, 1000)
BEGIN;
INSERT INTO orders (customer_id, status, total, note)
VALUES (:customer, 'new', 12.34, 'please leave it at the door') RETURNING id AS key \gset
UPDATE orders SET status = 'paid', updated_at = now() WHERE id = :key;
COMMIT;
"""
#: The transaction of pgbench itself (TPC-B). A context travels with its first write, as in Django.
TPC_B = r"""
\set aid random(1, 100000 * :scale)
\set bid random(1, 1 * :scale)
\set tid random(1, 10 * :scale)
\set delta random(-5000, 5000)
BEGIN;
{context}UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime)
VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP);
END;
"""
CONTEXT = {
    "user": 1234567,
    "path": "/shop/orders/1234567/",
    "request_id": "7b0c1a52-6a70-4f3b-9d0a-3d7c1f1c2f11",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}
#: The least share of the transactions per second that is left with a context.
WRITERS = {"on": 0.97, "off": 0.92}
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


def context(bench):
    """Transactions per second of pgbench whose transactions carry a context."""
    statement = statement_for(transaction_context.encode(CONTEXT))
    scripts = [TPC_B.format(context=""), TPC_B.format(context=f"{statement} \\;\n")]
    with Postgres(**{**POSTGRES, "fsync": "on"}) as server:
        database = Database(server, "written")
        fill = [server.binaries / "pgbench", "-i", "-q", "-s", "10", database.dsn]
        subprocess.run(fill, check=True, capture_output=True)
        for mode, goal in WRITERS.items():
            what = f"pgbench -c 1 with a context, synchronous_commit {mode}"
            line = Line("context", what, "tps")
            line.against("without", Goal(goal))
            seconds = max(1, round(bench.seconds(3)))
            for run in bench.each_run(f"context: synchronous_commit {mode}"):
                first, ours, last = (
                    pgbench(database, 1, seconds, script, "simple", mode)
                    for script in (scripts[0], scripts[1], scripts[0])
                )
                around = (first + last) / 2
                line.values.append(ours)
                line.comparisons[0].add(around, ours / around)
                bench.say(f"  context, {mode}, run {run}: {ours:,.0f} tps, {around:,.0f} without")
            bench.add(line)


def pgbench(database, clients, seconds, script=SCRIPT, protocol="prepared", commits="on"):
    """Return pgbench's transactions per second.

    Args:
        database: The database.
        clients: The number of connections.
        seconds: How long it runs.
        script: The transaction.
        protocol: How pgbench sends a statement (`-M`).
        commits: The setting synchronous_commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.sql")
        path.write_text(script)
        command = [database.server.binaries / "pgbench", "-n", "-M", protocol, "-f", path]
        command += ["-c", str(clients), "-j", str(min(2, clients)), "-T", str(seconds)]
        command += ["-D", "scale=10", database.dsn]
        environment = {**os.environ, "PGOPTIONS": f"-c synchronous_commit={commits}"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
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
