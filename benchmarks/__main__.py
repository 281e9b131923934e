"""`make bench`: run the scenarios, print a table, and write JSON and charts."""

import argparse
import json
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks import (
    advice,
    alternatives,
    backfill,
    cost,
    distance,
    drain,
    handling,
    latency,
    memory,
    ordered,
    report,
    startup,
    subscriptions,
    tenants,
    transactional,
)
from benchmarks.bench import Bench, Missing
from benchmarks.document import merged, rewrite
from benchmarks.machine import machine
from benchmarks.verify import Wrong

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

SCENARIOS = {
    "drain": drain.drain,
    "updates": drain.updates,
    "single": drain.single,
    "rabbitmq": drain.rabbitmq,
    "filter": drain.filtering,
    "end_to_end": handling.end_to_end,
    "latency": latency.latency,
    "distance": distance.distance,
    "ordered": ordered.ordered,
    "backfill": backfill.backfill,
    "transactional": transactional.transactional,
    "memory": memory.memory,
    "subscriptions": subscriptions.subscriptions,
    "tenants": tenants.tenants,
    "cost": cost.cost,
    "context": cost.context,
    "startup": startup.startup,
    "startup_rabbitmq": startup.startup_rabbitmq,
    "alternatives": alternatives.alternatives,
    "advice": advice.advice,
}


def parse_arguments(arguments):
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of all sizes, such as 0.02"
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="number of runs, of which medians are taken"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument(
        "--docs", action="store_true", help="rewrite docs/performance.md, as a full run does"
    )
    return parser.parse_args(arguments)


def measure(bench, names):
    """Run the scenarios; return their durations, errors, and those that could not be measured."""
    durations, wrong, missing = {}, [], {}
    for name in names:
        bench.say(f"[bold]{name}[/]: {SCENARIOS[name].__doc__}")
        started = time.monotonic()
        try:
            SCENARIOS[name](bench)
        except Missing as error:
            bench.say(f"  [yellow]not measured[/]: {error}")
            missing[name] = str(error)
        except KeyboardInterrupt:
            wrong.append(f"{name}: interrupted")
            break
        except Exception as error:  # keep the results so far
            if not isinstance(error, Wrong):
                traceback.print_exc()
            bench.say(f"  [red]WRONG[/] {escape(str(error))}")
            wrong.append(f"{name}: {error}")
        durations[name] = round(time.monotonic() - started)
        bench.say(f"  took {durations[name]} s")
    return {"scenarios": durations, "wrong": wrong, "missing": missing}


def write(results, folder):
    """Write the charts and the JSON; return the charts."""
    from benchmarks import charts  # with matplotlib, which takes a second

    drawn = charts.draw(results, folder / "performance")
    (folder / "performance.json").write_text(json.dumps(results, indent=1) + "\n")
    return drawn


def write_document(results):
    """Rewrite the page, its charts and its JSON; keep earlier results of other scenarios."""
    document, earlier = DOCS / "performance.md", DOCS / "performance.json"
    results = merged(json.loads(earlier.read_text()) if earlier.exists() else None, results)
    drawn = write(results, DOCS)
    document.write_text(rewrite(document.read_text(), results, drawn))


def main(arguments=None):
    """Return 0, or 1 if a run lost, duplicated or reordered a change."""
    options = parse_arguments(arguments)
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=True, width=None if terminal else 160)
    if options.list:
        for name, scenario in SCENARIOS.items():
            console.print(f"{name:<18}{scenario.__doc__}")
        return 0
    started = time.monotonic()
    with Bench(options.scale, options.runs, console) as bench:
        outcome = measure(bench, options.only or SCENARIOS)
    results = {
        "measured": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "machine": machine(),
        "scale": options.scale,
        "runs": options.runs,
        **outcome,
        "lines": [line.as_json() for line in bench.lines],
        "series": bench.series,
    }
    console.print(report.terminal_table(results["lines"]))
    console.print(f"{time.monotonic() - started:.0f} s")
    options.output.mkdir(parents=True, exist_ok=True)
    write(results, options.output)
    full = not options.only and options.scale == 1 and not outcome["wrong"]
    if options.docs or full:
        write_document(results)
    for name, why in outcome["missing"].items():
        console.print(f"[yellow]not measured[/] {name}: {why}")
    for sentence in outcome["wrong"]:
        console.print(f"[red]WRONG[/] {escape(sentence)}")
    return 1 if outcome["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
