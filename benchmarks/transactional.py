"""Tasks that transactions carry, against tasks that are sent to the broker."""

import redis

from benchmarks.drain import LOOP
from benchmarks.memory import Sampler
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import Wrong

CONF = {"flash_signing_key": "a secret of the benchmark"}
#: Tasks that wait when the replication worker starts.
TASKS = 1_000_000
QUEUE = "celery"
SCRIPT = "benchmarks.rivals.transactional"


def transactional(bench):
    """Tasks of transactions: the time in the application, and the drain."""
    application(bench)
    drain(bench)


def application(bench):
    """Measure ten tasks of a transaction in the application."""
    line = Line("transactional", "10 tasks in one transaction, in the application", "ms")
    rival = line.against("10 delay() after the commit", Goal(0.35, at_least=False))
    for run in bench.each_run(f"transactional: {line.what}"):
        database = bench.database()
        with bench.valkey() as server, Project(database.dsn, server, conf=CONF) as project:
            project.set_up()
            seconds = project.output(SCRIPT, "compare", str(bench.size(300)))
        ours, theirs = seconds["carried"] * 1000, seconds["after_commit"] * 1000
        line.values.append(ours)
        rival.add(theirs, ours / theirs)
        bench.say(
            f"  transactional: 10 tasks, run {run}: {ours:.2f} ms, after the commit {theirs:.2f} ms"
            f", ratio {ours / theirs:.2f}"
        )
        database.drop()
    bench.add(line)


def drain(bench):
    """Measure how fast waiting tasks are published, and in how much memory."""
    count = bench.size(TASKS) // 10 * 10
    line = Line("transactional", f"{count:,} tasks of transactions, drained", "tasks/s")
    rival = line.against(LOOP, Goal(20))
    memory = Line(
        "transactional", "memory of the replication worker", "MB", goal=Goal(100, at_least=False)
    )
    database = bench.database()
    with bench.valkey() as server, Project(database.dsn, server, conf=CONF) as project:
        project.set_up()
        bench.doing(f"writing {count:,} tasks")
        project.output(SCRIPT, "write", str(count))
        end = database.end_of_wal()
        alone = project.output("benchmarks.rivals.apply_async", str(bench.size(2000)))["rate"]
        worker = project.replicate()
        sampler = Sampler(worker)
        sampler.start()
        started = worker.logged_at("Replicating the slot")
        seconds = database.until_confirmed("flash_replication", end, worker.alive) - started
        sampler.done.set()
        with redis.Redis(port=server.port) as client:
            if client.llen(QUEUE) != count:
                raise Wrong(f"{client.llen(QUEUE)} of {count} tasks are in the queue")
    rate = count / seconds
    line.values.append(rate)
    rival.add(alone, rate / alone)
    memory.values.append(sampler.peak("idle"))
    bench.say(
        f"  transactional: {rate:,.0f} tasks/s, {rate / alone:.1f} x {LOOP} ({alone:,.0f}/s), "
        f"{memory.median:.0f} MB"
    )
    database.drop()
    bench.add(line)
    bench.add(memory)
