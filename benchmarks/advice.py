"""Advice on settings: rows per second of one worker by batch size, pool and prefetch."""

from benchmarks import drain
from benchmarks.databases import Workload
from benchmarks.project import Project
from benchmarks.results import Line
from benchmarks.verify import compare

#: The rows to measure for each batch size.
BATCHES = {1: 3000, 10: 20_000, 100: 100_000, 500: 100_000, 1000: 100_000}
POOLS = {
    "-P solo": ("-P", "solo"),
    "-P threads -c 2": ("-P", "threads", "-c", "2"),
    "-P prefork -c 1": ("-c", "1"),
    "-P prefork -c 2": ("-c", "2"),
    "-P prefork -c 1, prefetch 1": ("-c", "1", "--prefetch-multiplier", "1"),
    "-P prefork -c 1, prefetch 64": ("-c", "1", "--prefetch-multiplier", "64"),
}
#: The runs of each combination: there are many, and the figures are advice, not claims.
RUNS = 1


def advice(bench):
    """Batch sizes, pools and prefetch: rows per second."""
    for batch, rows in BATCHES.items():
        backlog = bench.backlog(Workload(bench.size(rows)))
        enqueued = Line("advice", f"batch={batch}: enqueued", "rows/s")
        handled = Line("advice", f"batch={batch}: handled by one worker, -c 1", "rows/s")
        for run in range(min(RUNS, bench.runs)):
            bench.doing(f"advice: batch={batch}, run {run + 1}")
            handler = "single" if batch == 1 else "batched"
            rates, details = rates_of(bench, backlog, handler, batch, ("-c", "1"))
            for line, rate in zip((enqueued, handled), rates, strict=True):
                line.values.append(rate)
                line.details.append(details)
        for line in (enqueued, handled):
            bench.add(line)
            bench.say(f"  {line.what}: {line.median:,.0f} rows/s")
    backlog = bench.backlog(Workload(bench.size(3000)))
    for name, options in POOLS.items():
        line = Line("advice", f"one task for each, worker {name}", "rows/s")
        for run in range(min(RUNS, bench.runs)):
            bench.doing(f"advice: {name}, run {run + 1}")
            (_, rate), details = rates_of(bench, backlog, "single", 1, options)
            line.values.append(rate)
            line.details.append(details)
        bench.add(line)
        bench.say(f"  {line.what}: {line.median:,.0f} rows/s")


def rates_of(bench, backlog, handler, batch, options):
    """Return the rows enqueued per second, then handled per second from the full queue."""
    with bench.valkey() as broker:
        enqueued, details = drain.flash(backlog, broker, handler, batch=batch)
        with Project(backlog.dsn, broker, handler, batch=batch) as project:
            project.worker(*options)
            notes = project.noted(backlog.rows)
    # Two processes handle them in parallel, so the order differs.
    compare(backlog.places, sorted(note[2:] for note in notes), f"worker {' '.join(options)}")
    started, ended = min(note[0] for note in notes), max(note[1] for note in notes)
    return (enqueued, backlog.rows / (ended - started)), details
