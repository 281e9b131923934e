"""Drain a slot into a broker, between two runs of `pg_recvlogical` on identical slots.

The time runs from the start of streaming until the slot is confirmed past the end of the backlog,
which is after the broker has confirmed the last message. The start of the processes is not counted
on either side.
"""

from benchmarks import reference
from benchmarks.databases import Workload
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import compare, places_of, rabbit_bodies, valkey_bodies

PG = "pg_recvlogical"
LOOP = "apply_async in a loop"
ROWS = 300_000


def flash(backlog, broker, handler="batched", expected=None, batch=500, bodies=valkey_bodies):
    """Drain once with `flash replicate`, and verify; return changes per second and details."""
    slot = backlog.again()
    with Project(backlog.dsn, broker, handler, slot, batch=batch) as project:
        worker = project.replicate()
        started = worker.logged_at("Replicating the slot")
        cpu_before = worker.cpu()
        ended = backlog.database.until_confirmed(slot, backlog.end, worker.alive)
        cpu = worker.cpu() - cpu_before
    expected = backlog.places if expected is None else expected
    details = compare(expected, places_of(bodies(broker)), f"flash replicate, {handler}")
    details["cpu_us_per_change"] = round(cpu / backlog.rows * 1e6, 2)
    return backlog.rows / (ended - started), details


def against_postgres(bench, line, workload, goal, loop=None, broker=None, **options):
    """Measure a line: each run is the reference, a drain, and the reference again."""
    backlog = bench.backlog(workload)
    comparison = line.against(PG, Goal(goal))
    loops = line.against(LOOP, Goal(loop["goal"])) if loop else None
    for run in bench.each_run(f"{line.scenario}: {line.what}"):
        first = reference.drain(backlog)
        with (broker or bench.valkey)() as server:
            rate, details = flash(backlog, server, **options)
            if loop:
                with Project("", server, conf=loop["conf"]) as project:
                    count = str(bench.size(loop["count"]))
                    alone = project.output("benchmarks.rivals.apply_async", count)["rate"]
                loops.add(alone, rate / alone)
        limit = (first + reference.drain(backlog)) / 2
        line.values.append(rate)
        line.details.append(details)
        comparison.add(limit, rate / limit)
        bench.say(
            f"  {line.scenario}: {line.what}, run {run}: {rate:,.0f} changes/s, {PG} {limit:,.0f}, "
            f"ratio {rate / limit:.2f}, {details['cpu_us_per_change']} µs CPU a change"
            + (f", {rate / alone:.1f} x {LOOP} ({alone:,.0f}/s)" if loop else "")
        )
    bench.add(line)


def drain(bench):
    """Inserts, one transaction or many, in batches on Valkey."""
    for per in (0, 1, 10, 1000):
        workload = Workload(bench.size(ROWS), per)
        size = f"transactions of {per:,}" if per else "one transaction"
        line = Line("drain", f"{workload.rows:,} inserts in {size}, batches", "changes/s")
        against_postgres(bench, line, workload, 0.85)


def updates(bench):
    """Updates with the old row and the new one."""
    workload = Workload(bench.size(100_000), kind="update")
    line = Line("updates", f"{workload.rows:,} updates, identity FULL, batches", "changes/s")
    against_postgres(bench, line, workload, 0.75)


def single(bench):
    """A task for each change, on Valkey."""
    workload = Workload(bench.size(ROWS))
    line = Line("single", f"{workload.rows:,} inserts, a task for each", "changes/s")
    loop = {"count": 3000, "goal": 45, "conf": {}}
    against_postgres(bench, line, workload, 0.25, loop, handler="single")


def rabbitmq(bench):
    """RabbitMQ with publisher confirms."""
    options = {"broker": bench.rabbit, "bodies": rabbit_bodies}
    workload = Workload(bench.size(ROWS))
    line = Line("rabbitmq", f"{workload.rows:,} inserts, batches, RabbitMQ", "changes/s")
    against_postgres(bench, line, workload, 0.7, **options)
    workload = Workload(bench.size(100_000))
    line = Line("rabbitmq", f"{workload.rows:,} inserts, a task for each, RabbitMQ", "changes/s")
    backlog = bench.backlog(workload)
    confirm = {"broker_transport_options": {"confirm_publish": True}}
    loops = line.against(f"{LOOP}, confirm_publish", Goal(20))
    for run in bench.each_run(f"rabbitmq: {line.what}"):
        with bench.rabbit() as server:
            rate, details = flash(backlog, server, "single", bodies=rabbit_bodies)
            with Project("", server, conf=confirm) as project:
                count = str(bench.size(2000))
                alone = project.output("benchmarks.rivals.apply_async", count)["rate"]
        line.values.append(rate)
        line.details.append(details)
        loops.add(alone, rate / alone)
        bench.say(
            f"  rabbitmq: {line.what}, run {run}: {rate:,.0f} changes/s, {rate / alone:.1f} x "
            f"{LOOP} with confirm_publish ({alone:,.0f}/s)"
        )
    bench.add(line)


def filtering(bench):
    """A handler of one row in a hundred."""
    workload = Workload(bench.size(ROWS))
    backlog = bench.backlog(Workload(workload.rows, handler="filtered"))
    line = Line("filter", f"{workload.rows:,} inserts, fields and where reject 99 %", "changes/s")
    expected = [place for place in backlog.places if place[2] % 100 == 0]
    options = {"handler": "filtered", "expected": expected}
    against_postgres(bench, line, backlog.workload, 0.6, **options)
