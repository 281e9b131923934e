"""`make bench-compare BASE=v0.1.0`: measure this tree and another revision, alternating.

It fails where this tree takes more than 5 % more processor time for a change, or more than 15 %
more time, than the base. What is around the measured process (the servers, the writer and the
measurement) is that of this tree on both sides.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks import drain, project
from benchmarks.bench import Bench, Missing
from benchmarks.databases import Source, Workload
from benchmarks.latency import percentile, replicated
from benchmarks.verify import Wrong, rabbit_bodies

#: The most that a median may be, against that of the base.
BOUNDS = {"cpu": 1.05, "wall": 1.15}
UNITS = {"cpu": "µs of CPU a change", "wall": "µs a change", "p50": "ms p50", "p99": "ms p99"}
#: Seconds of commits in a run of the latency.
LATENCY_SECONDS = 20


@dataclass
class Comparison:
    """One quantity of a line, of both sides."""

    line: str
    quantity: str
    base: list[float] = field(default_factory=list)
    tree: list[float] = field(default_factory=list)

    @property
    def ratio(self):
        """The median of this tree, divided by that of the base."""
        return median(self.tree) / median(self.base)

    @property
    def failed(self):
        """Whether it is worse than the bound allows; latencies are only shown."""
        return self.ratio > BOUNDS.get(self.quantity, float("inf"))


def drained(workload, handler="batched", rabbit=False):
    """Return a measurement: one drain of this workload."""

    def measure(bench):
        rows = bench.size(workload.rows)
        backlog = bench.backlog(Workload(rows, workload.per, workload.kind, handler=handler))
        expected = None
        if handler == "filtered":
            expected = [place for place in backlog.places if place[2] % 100 == 0]
        options = {"bodies": rabbit_bodies} if rabbit else {}

        def once():
            with bench.rabbit() if rabbit else bench.valkey() as broker:
                rate, details = drain.flash(backlog, broker, handler, expected, **options)
            return {"cpu": details["cpu_us_per_change"], "wall": 1e6 / rate}

        return once

    return measure


def latency(bench):
    """Return a measurement: the time from commit to handler at 200 commits a second."""
    with bench.valkey() as broker:
        source = Source(bench.database(), broker, "single")

    def once():
        milliseconds, _ = replicated(bench, source, bench.seconds(LATENCY_SECONDS))
        return {"p50": percentile(milliseconds, 50), "p99": percentile(milliseconds, 99)}

    return once


LINES = {
    "one": drained(Workload(drain.ROWS)),
    "thousand": drained(Workload(drain.ROWS, 1000)),
    "ten": drained(Workload(drain.ROWS, 10)),
    "each": drained(Workload(drain.ROWS, 1)),
    "updates": drained(Workload(100_000, kind="update")),
    "filter": drained(Workload(drain.ROWS), "filtered"),
    "single": drained(Workload(100_000), "single"),
    "rabbitmq": drained(Workload(100_000), "single", rabbit=True),
    "latency": latency,
}
EXPLAINED = {
    "one": "inserts in one transaction, batches",
    "thousand": "inserts in transactions of 1,000, batches",
    "ten": "inserts in transactions of 10, batches",
    "each": "inserts in transactions of 1, batches",
    "updates": "updates, identity FULL, batches",
    "filter": "inserts of which `where` rejects 99 %",
    "single": "inserts, a task for each",
    "rabbitmq": "inserts, a task for each, RabbitMQ",
    "latency": "commit to handler at 200/s",
}


@contextmanager
def checked_out(revision):
    """Check out a revision in a temporary folder, and yield the folder."""
    git = ["git", "-C", str(project.ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"BASE={revision} is no commit of this repository; name a tag or commit.")
    with tempfile.TemporaryDirectory(prefix="bench-base-") as folder:
        tree = Path(folder, "base")
        subprocess.run(
            [*git, "worktree", "add", "--quiet", "--detach", str(tree), found.stdout.strip()],
            check=True,
        )
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def compared(bench, name, base):
    """Measure a line in both trees, alternating; return a comparison for each quantity."""
    once = LINES[name](bench)
    comparisons = {}
    for run in range(bench.runs):
        # The order changes, because the second of a pair may find warmer caches.
        for side in ("base", "tree") if run % 2 else ("tree", "base"):
            bench.doing(f"{name}, run {run + 1} of {bench.runs}, {side}")
            with project.code_of(base if side == "base" else project.ROOT):
                measured = once()
            values = ", ".join(f"{value:.2f} {UNITS[key]}" for key, value in measured.items())
            bench.say(f"    {side}: {values}")
            for quantity, value in measured.items():
                new = Comparison(EXPLAINED[name], quantity)
                getattr(comparisons.setdefault(quantity, new), side).append(value)
    for comparison in comparisons.values():
        bench.say(
            f"  {name}: {median(comparison.base):.2f} -> {median(comparison.tree):.2f} "
            f"{UNITS[comparison.quantity]}, {comparison.ratio:.2f} x"
        )
    return list(comparisons.values())


def table(comparisons, revision):
    """Return the table of all comparisons."""
    shown = Table(title=f"Against {revision}; more is worse")
    for heading in ("what", "", "base", "this tree", "ratio", "verdict"):
        shown.add_column(heading, justify="left" if heading in ("what", "") else "right")
    for each in comparisons:
        base, tree = f"{median(each.base):.2f}", f"{median(each.tree):.2f}"
        bound = BOUNDS.get(each.quantity)
        verdict = "" if bound is None else f"> {bound}" if each.failed else "ok"
        row = (each.line, UNITS[each.quantity], base, tree, f"{each.ratio:.2f}", verdict)
        shown.add_row(*row, style="red" if each.failed else None)
    return shown


def main(arguments=None):
    """Return 0, or 1 if a line is worse than its bound allows or could not be measured."""
    parser = argparse.ArgumentParser(prog="make bench-compare", description=__doc__)
    parser.add_argument("base", metavar="BASE", help="the revision to compare with")
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all sizes")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs of each line")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    comparisons, wrong = [], []
    with (
        checked_out(options.base) as base,
        Bench(options.scale, options.runs, console) as bench,
    ):
        for name in options.only:
            try:
                comparisons += compared(bench, name, base)
            except (Missing, Wrong) as error:
                wrong.append(f"{name}: {error}")
    console.print(table(comparisons, options.base))
    for sentence in wrong:
        console.print(f"WRONG {sentence}", markup=False)
    return 1 if wrong or any(each.failed for each in comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
