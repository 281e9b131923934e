"""`make python`: the unit and integration tests on Python 3.10 to 3.15, in a venv for each.

A release that this machine has not comes from Debian, where it has it. One that cannot be found is
named and makes the run fail.
"""

import subprocess
import sys
from pathlib import Path

from tests import pythons

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "python"
RELEASES = ["3.10", "3.11", "3.12", "3.13", "3.14", "3.15"]
TESTS = ["tests/unit", "tests/integration", "tests/acceptance/test_pipeline.py"]


def python_of(release):
    """The interpreter of a virtual environment of this release with what the tests need."""
    folder = CACHE / release
    python = folder / "bin" / "python"
    made = folder / "made"
    wanted = (ROOT / "pyproject.toml").read_text()
    if not made.exists() or made.read_text() != wanted:
        interpreter = pythons.installed(release) or pythons.unpacked(release)
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--editable", ".[dev]"]
        subprocess.run(install, cwd=ROOT, check=True)
        made.write_text(wanted)
    return python


def tested(release, arguments):
    try:
        python = python_of(release)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"could not be installed: {error}"
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *TESTS, *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    return "passed" if code == 0 else f"failed (exit {code})"


def main():
    arguments = sys.argv[1:]
    wanted = [argument for argument in arguments if argument in RELEASES] or RELEASES
    # The other arguments are for pytest.
    more = [argument for argument in arguments if argument not in RELEASES]
    results = {}
    for release in wanted:
        print(f"== Python {release}", flush=True)
        results[release] = tested(release, more)
    for release, result in results.items():
        print(f"Python {release}: {result}")
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
