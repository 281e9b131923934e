"""Measure the way from committed rows to Python values in a handler, on one worker process."""

from benchmarks.databases import Workload
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import compare


def end_to_end(bench):
    """Committed rows decoded in a batch handler on one prefork process."""
    many = bench.backlog(Workload(bench.size(300_000), 1000))
    few = bench.backlog(Workload(bench.size(3000), 1000))
    line = Line("end_to_end", f"{many.rows:,} rows handled in batches, worker -c 1", "changes/s")
    line.goal = Goal(30_000)
    comparison = line.against(f"a task for each ({few.rows:,}), same worker", Goal(40))
    for run in bench.each_run(line.what):
        rate, details = handle(bench, many, "batched")
        alone, _ = handle(bench, few, "single")
        line.values.append(rate)
        line.details.append(details)
        comparison.add(alone, rate / alone)
        bench.say(f"  end_to_end, run {run}: {rate:,.0f} changes/s, one by one {alone:,.0f}")
    bench.add(line)


def handle(bench, backlog, handler):
    """Return changes per second, from the start of streaming to the end of the last task."""
    with (
        bench.valkey() as broker,
        Project(backlog.dsn, broker, handler, backlog.again()) as project,
    ):
        project.worker()
        started = project.replicate().logged_at("Replicating the slot")
        notes = project.noted(backlog.rows)
    details = compare(backlog.places, [note[2:] for note in notes], f"worker -c 1, {handler}")
    return backlog.rows / (max(note[1] for note in notes) - started), details
