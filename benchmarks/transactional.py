"""Tasks that transactions carry, against tasks that are sent to the broker."""

import re

import redis

from benchmarks.drain import LOOP
from benchmarks.latency import delayed, own_tasks, percentile
from benchmarks.memory import Sampler
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import Wrong, total_of_ids

CONF = {"flash_signing_key": "a secret of the benchmark"}
#: Tasks that wait when the replication worker starts.
TASKS = 1_000_000
QUEUE = "celery"
SCRIPT = "benchmarks.rivals.transactional"
ON_COMMIT = "delay() after the commit"
#: Transactions a second, each with one task.
RATE = 50
#: Percentiles, each with the goal of its ratio.
PERCENTILES = {"p50": (50, 1.3), "p99": (99, 1.6)}
_ID = re.compile(rb'"correlation_id": ?"([0-9a-f-]{36})"')
#: Messages that are read together.
_TOGETHER = 10_000


def transactional(bench):
    """Tasks of transactions: the time in the application, latency, and the drain."""
    application(bench)
    latency(bench)
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


def latency(bench):
    """Measure the time from the commit of a task to its start."""
    seconds = bench.seconds(6)
    lines = {}
    for name, (percent, bound) in PERCENTILES.items():
        line = Line("transactional", f"commit to the start of its task, {RATE}/s, {name}", "ms")
        lines[name] = line, line.against(ON_COMMIT, Goal(bound, at_least=False)), percent
    plain = bench.database()
    for run in bench.each_run(f"transactional: {RATE} commits a second"):
        theirs, ours = delayed(bench, plain, seconds, RATE), carried(bench, seconds)
        for name, (line, rival, percent) in lines.items():
            mine, other = percentile(ours, percent), percentile(theirs, percent)
            line.values.append(mine)
            rival.add(other, mine / other)
            bench.say(
                f"  transactional: {name}, run {run}: {mine:.2f} ms, after the commit {other:.2f} "
                f"ms, ratio {mine / other:.2f}"
            )
    for line, _, _ in lines.values():
        bench.add(line)


def carried(bench, seconds):
    """Return the milliseconds of each commit that carries its task."""
    database = bench.database()
    with bench.valkey() as broker, Project(database.dsn, broker, conf=CONF) as project:
        project.worker(queues=QUEUE)
        project.replicate().logged_at("Replicating the slot")
        found = own_tasks(project, seconds, "carried", RATE)
    database.drop()
    return found


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
        written = project.output(SCRIPT, "write", str(count))
        end = database.end_of_wal()
        alone = project.output("benchmarks.rivals.apply_async", str(bench.size(2000)))["rate"]
        worker = project.replicate()
        sampler = Sampler(worker)
        sampler.start()
        started = worker.logged_at("Replicating the slot")
        seconds = database.until_confirmed("flash_replication", end, worker.alive) - started
        sampler.done.set()
        with redis.Redis(port=server.port) as client:
            there = ids(client)
        if (
            len(there) != count
            or len(set(there)) != count
            or total_of_ids(there) != written["total"]
        ):
            raise Wrong(f"{len(set(there))} of {count} tasks are in the queue, or other ones")
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


def ids(client):
    """Return the ids of the tasks in the queue."""
    found = []
    while texts := client.lrange(QUEUE, len(found), len(found) + _TOGETHER - 1):
        found += [_ID.search(text)[1].decode() for text in texts]
    return found
