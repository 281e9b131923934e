"""`make celery`: the tests that Celery's releases could break, on each release that is supported.

Every release gets a virtual environment of its own under `.cache`, with the kombu of its time. One
that cannot be installed is named and makes the run fail.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "celery"
#: Each with the kombu that was current when it came out.
RELEASES = {
    "5.4": ["celery~=5.4.0", "kombu[redis]~=5.4.0"],
    "5.5": ["celery~=5.5.0", "kombu[redis]~=5.5.0"],
    "5.6": ["celery~=5.6.0", "kombu[redis]~=5.6.0"],
    "5.7": ["celery~=5.7.0", "kombu[redis]~=5.7.0"],
}
ACCEPTANCE = [
    "celery",
    "commands",
    "dead_letters",
    "declarations",
    "inspection",
    "lanes",
    "pipeline",
    "typing",
]
TESTS = ["tests/unit", *(f"tests/acceptance/test_{name}.py" for name in ACCEPTANCE)]


def python_with(release):
    """The interpreter of an environment with this release, or None."""
    folder = CACHE / release
    python = folder / "bin" / "python"
    made = folder / "made"
    wanted = "\n".join([*RELEASES[release], (ROOT / "pyproject.toml").read_text()])
    if made.exists() and made.read_text() == wanted:
        return python
    # As in the Makefile: everything is in the extra.
    install = [python, "-m", "pip", "install", "--quiet", "--editable", ".[long]"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", folder],
        [*install, *RELEASES[release]],
    ):
        if subprocess.run(command, cwd=ROOT).returncode:
            return None
    made.write_text(wanted)
    return python


def versions(python):
    code = "import celery, kombu; print(f'Celery {celery.__version__}, kombu {kombu.__version__}')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def main():
    arguments = sys.argv[1:]
    wanted = [argument for argument in arguments if argument in RELEASES] or list(RELEASES)
    # The other arguments are for pytest.
    more = [argument for argument in arguments if argument not in RELEASES]
    results = {}
    for release in wanted:
        print(f"== Celery {release}", flush=True)
        python = python_with(release)
        if python is None:
            results[f"Celery {release}"] = "could not be installed"
            continue
        command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *TESTS, *more]
        code = subprocess.run(command, cwd=ROOT).returncode
        results[versions(python)] = "passed" if code == 0 else f"failed (exit {code})"
    for release, result in results.items():
        print(f"{release}: {result}")
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
