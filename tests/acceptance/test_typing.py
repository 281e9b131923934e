"""mypy on what users write: one run, whose every line is accounted for."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SNIPPETS = ROOT / "tests" / "typing"


def expected():
    for path in sorted(SNIPPETS.glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for kind, what in re.findall(r"  # (reveals|error): (.+)$", line):
                yield path.name, number, kind, what


def found():
    # As for an installed package, errors inside it are not shown; `make types` has them.
    silent = "--follow-imports=silent"
    arguments = ("--strict", "--config-file=", "--show-error-codes", "--hide-error-context", silent)
    missing = ("--disable-error-code=import-untyped", "--python-version=3.10")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments, *missing, *sorted(SNIPPETS.glob("*.py"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    for line in run.stdout.splitlines():
        report = re.fullmatch(r".*?(\w+\.py):(\d+): (note|error): (.*)", line)
        if report is None:
            continue
        name, number, kind, text = report.groups()
        if revealed := re.fullmatch(r'Revealed type is "(.*)"', text):
            yield name, int(number), "reveals", revealed[1].replace("builtins.", "")
        elif kind == "error":
            yield name, int(number), "error", re.findall(r"\[([\w-]+)\]$", text)[0]


def test_type_checkers_know_the_types_of_rows():
    revealed = set(found())
    assert sorted(revealed) == sorted(expected())
