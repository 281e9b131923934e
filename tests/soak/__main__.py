"""`python -m tests.soak --minutes 30 --seed 5 --broker redis`; exits with 1 if all is not well."""

import argparse
import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import machine
from tests.soak import report
from tests.soak.run import run

#: The runs of each broker, each with its share of the time.
RUNS = {
    "redis": {"redis": 2 / 3, "sentinel": 1 / 3},
    "sentinel": {"sentinel": 1.0},
    "rabbitmq": {"rabbitmq": 1.0},
}


def main():
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="of writing and faults, in all")
    parser.add_argument("--seed", help="repeats the choices of a run; else one is made up")
    parser.add_argument(
        "--broker",
        choices=RUNS,
        help="else redis half the time (a third of it through Sentinel), and rabbitmq",
    )
    parser.add_argument(
        "--faults", default="", help="a regular expression: only those whose names match"
    )
    parser.add_argument("--docs", action="store_true", help="rewrite the results in docs/soak.md")
    parser.add_argument("--keep", action="store_true", help="leave logs and notes in any case")
    given = parser.parse_args()
    logging.disable()  # of the libraries that witnesses use
    brokers = [given.broker] if given.broker else ["redis", "rabbitmq"]
    seed = given.seed or str(random.randrange(10**6))
    folder = Path(tempfile.mkdtemp(prefix="flash-soak-"))
    _say(f"logs and notes: {folder}")
    outcomes = []
    for broker, share in (part for broker_name in brokers for part in RUNS[broker_name].items()):
        (folder / broker).mkdir()
        seconds = given.minutes * 60 / len(brokers) * share
        outcomes.append(run(broker, seed, folder / broker, seconds, say=_say, named=given.faults))
    for outcome in outcomes:
        _say(f"\n{outcome.broker}, {outcome.seconds / 60:.1f} minutes, seed {seed}\n")
        for line in report.lines(outcome):
            _say(line)
    _say("\n" + ", ".join(f"{name} {value}" for name, value in machine().items()))
    if given.docs:
        command = f"make soak MINUTES={given.minutes:g} SEED={seed}"
        text = report.rewrite(report.DOCUMENT.read_text(), command, machine(), outcomes)
        report.DOCUMENT.write_text(text)
    wrong = [f"{o.broker}: {problem}" for o in outcomes for problem in o.problems]
    for problem in wrong:
        _say(f"WRONG: {problem}")
    if wrong or given.keep:
        _say(f"Logs and notes are in {folder}; SEED={seed} repeats the choices.")
    else:
        shutil.rmtree(folder)
    sys.exit(bool(wrong))


def _say(line):
    print(line, flush=True)


if __name__ == "__main__":
    main()
