"""Measure the time from the return of COMMIT to the first line of the handler.

The same commits run at the same rate with `flash replicate` and with an application that calls
`delay()` itself; the same worker handles both.
"""

from contextlib import contextmanager
from statistics import quantiles

from benchmarks.databases import Source
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import compare

RATE = 200
#: The first commits, which are not counted: connections are opened and code is loaded.
WARM_UP = 100
PERCENTILES = {"p50": (50, 5.0), "p99": (99, 25.0)}


@contextmanager
def nothing(*_):
    """Do nothing beside."""
    yield


def latency(bench):
    """Milliseconds from commit to handler at 200 transactions a second."""
    seconds = bench.seconds(6)
    with bench.valkey() as broker:
        source = Source(bench.database(), broker, "single")
    plain = bench.database()
    lines, comparisons = {}, {}
    for name, (_, bound) in PERCENTILES.items():
        lines[name] = Line("latency", f"commit to handler, {RATE}/s, {name}", "ms")
        lines[name].goal = Goal(bound, at_least=False)
        against = lines[name].against("delay() after the commit", Goal(1.3, at_least=False))
        comparisons[name] = against
    samples = {"flash": [], "delay()": []}
    for run in bench.each_run(f"latency: {RATE} commits a second"):
        theirs = delayed(bench, plain, seconds)
        ours, details = replicated(bench, source, seconds)
        samples["flash"] += ours
        samples["delay()"] += theirs
        for name, (percent, _) in PERCENTILES.items():
            mine, other = percentile(ours, percent), percentile(theirs, percent)
            lines[name].values.append(mine)
            lines[name].details.append(details)
            comparisons[name].add(other, mine / other)
            bench.say(f"  latency, run {run}, {name}: {mine:.2f} ms, delay() {other:.2f} ms")
    for line in lines.values():
        bench.add(line)
    bench.series["latency"] = {
        name: [round(value, 3) for value in quantiles(values, n=1000)]
        for name, values in samples.items()
    }


def percentile(values, percent):
    """Return a percentile of the values."""
    return quantiles(values, n=100)[percent - 1]


def replicated(bench, source, seconds, handler="single", beside=nothing):
    """Return the milliseconds of each commit with the replication worker.

    `beside` makes a block of the project and the broker, in which the commits run.
    """
    with (
        bench.valkey() as broker,
        Project(source.dsn, broker, handler, source.slot) as project,
    ):
        project.worker(queues="flash,celery")
        worker = project.replicate()
        worker.logged_at("Replicating the slot")
        with beside(project, broker):
            commits, notes = commit(project, seconds)
        source.database.until_confirmed(source.slot, source.database.end_of_wal(), worker.alive)
    received = [note[2:] for note in notes]
    if handler.startswith("ordered"):  # each key has an order of its own
        received.sort()
    details = compare(source.written()[0], received, "latency")
    source.mark()
    return milliseconds(commits, notes), details


def delayed(bench, database, seconds, rate=RATE):
    """Return the milliseconds of each commit with the application's own `delay()`."""
    with bench.valkey() as broker, Project(database.dsn, broker) as project:
        project.worker(queues="flash,celery")
        return own_tasks(project, seconds, "delay", rate)


def own_tasks(project, seconds, way, rate=RATE):
    """Return the milliseconds of each commit with a task of the application's own."""
    commits, notes = commit(project, seconds, way, rate=rate)
    compare([(0, 0, key) for key, _ in commits], [note[2:] for note in notes], way)
    return milliseconds(commits, notes)


def commit(project, seconds, *options, rate=RATE):
    """Commit for some seconds; return the commits, and the notes of the tasks."""
    duration = str(WARM_UP / rate + seconds)
    commits = project.output("benchmarks.commits", str(rate), duration, *options)
    return commits, project.noted(len(commits))


def milliseconds(commits, notes):
    """Return the milliseconds from the return of each COMMIT to the start of its task."""
    started = {note[4]: note[0] for note in notes}
    return [(started[key] - at) * 1000 for key, at in commits[WARM_UP:]]
