"""`make bench`: run the scenarios, print the table, keep JSON and charts."""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks import (
    advice,
    alternatives,
    cost,
    drain,
    handling,
    latency,
    memory,
    report,
    subscriptions,
)
from benchmarks.bench import Bench
from benchmarks.verify import Wrong

ROOT = Path(__file__).parents[1]

SCENARIOS = {
    "drain": drain.drain,
    "updates": drain.updates,
    "single": drain.single,
    "rabbitmq": drain.rabbitmq,
    "filter": drain.filtering,
    "end_to_end": handling.end_to_end,
    "latency": latency.latency,
    "memory": memory.memory,
    "subscriptions": subscriptions.subscriptions,
    "cost": cost.cost,
    "alternatives": alternatives.alternatives,
    "advice": advice.advice,
}


def arguments(given):
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes, such as 0.02")
    parser.add_argument("--runs", type=int, default=5, help="of which medians are taken")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench")
    return parser.parse_args(given)


def run(bench, names):
    """Run them; what went wrong, if anything."""
    wrong = []
    for name in names:
        bench.say(f"[bold]{name}[/]: {SCENARIOS[name].__doc__}")
        started = time.monotonic()
        try:
            SCENARIOS[name](bench)
        except Wrong as error:
            bench.say(f"[red]WRONG[/] {error}")
            wrong.append(f"{name}: {error}")
        bench.say(f"  {name} took {time.monotonic() - started:.0f} s")
    return wrong


def main(given=None):
    """0, or 1 if a run lost, doubled or reordered anything."""
    options = arguments(given)
    console = Console(highlight=False, soft_wrap=True)
    if options.list:
        for name, scenario in SCENARIOS.items():
            console.print(f"{name:<14}{scenario.__doc__}")
        return 0
    started = time.monotonic()
    with Bench(options.scale, options.runs, console) as bench:
        wrong = run(bench, options.only or SCENARIOS)
    found = {
        "scale": options.scale,
        "runs": options.runs,
        "seconds": round(time.monotonic() - started),
        "lines": [line.as_json() for line in bench.lines],
        "series": bench.series,
        "wrong": wrong,
    }
    console.print(report.table(found["lines"]))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "performance.json").write_text(json.dumps(found, indent=1) + "\n")
    for sentence in wrong:
        console.print(f"[red]WRONG[/] {sentence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
