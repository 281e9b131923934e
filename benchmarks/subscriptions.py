"""Measure whether other tables and handlers slow a handler down: same inserts, three projects."""

from benchmarks import drain
from benchmarks.databases import Workload
from benchmarks.results import Goal, Line


def subscriptions(bench):
    """A thousand tables, and fifty other handlers, against one table and one handler."""
    rows = bench.size(100_000)
    alone = bench.backlog(Workload(rows))
    others = {
        "a handler of 1,000 tables": Workload(rows, others=999, handler="thousand_tables"),
        "50 handlers of other tables": Workload(rows, others=50, handler="fifty_handlers"),
    }
    for name, workload in others.items():
        backlog = bench.backlog(workload)
        line = Line("subscriptions", f"{rows:,} inserts, {name}", "changes/s")
        comparison = line.against("one table, one handler", Goal(0.95))
        for run in bench.each_run(f"subscriptions: {name}"):
            first, _ = _drain(bench, alone, "batched")
            rate, details = _drain(bench, backlog, workload.handler)
            mean = (first + _drain(bench, alone, "batched")[0]) / 2
            line.values.append(rate)
            line.details.append(details)
            comparison.add(mean, rate / mean)
            bench.say(f"  {name}, run {run}: {rate:,.0f} changes/s, alone {mean:,.0f}")
        bench.add(line)


def _drain(bench, backlog, handler):
    with bench.valkey() as broker:
        return drain.flash(backlog, broker, handler)
