"""`make release`: check whether this tree can be released. Nothing is published."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PYTHON = sys.executable
#: A version's heading, as Keep a Changelog has it.
HEADING = re.compile(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def output(*command):
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return ran.stdout


def succeeds(*command, **environment):
    """Run a command; return its failure, or None. Its output has the details."""
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment})
    return f"{' '.join(map(str, command))} failed" if ran.returncode else None


def version():
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def changelog():
    """The newest heading is this version's."""
    name, date = HEADING.search((ROOT / "CHANGELOG.md").read_text()).groups()
    if name == version() and date:
        return None
    return f"CHANGELOG.md begins with [{name}]: write [{version()}] - YYYY-MM-DD in its place"


def readme():
    """It stands on PyPI, too."""
    named = ("README.md", "docs/install.md", "docs/tutorial.md")
    old = [name for name in named if "not on PyPI yet" in (ROOT / name).read_text()]
    if old:
        return f"{' and '.join(old)}: 'not on PyPI yet' will be wrong"
    return None


def tag():
    if output("git", "tag", "--list", f"v{version()}"):
        return f"v{version()} was released before: raise the version in pyproject.toml"
    return None


def tree():
    """Uncommitted changes would be neither released nor tagged."""
    left = output("git", "status", "--porcelain")
    return f"commit or put away first:\n{left.rstrip()}" if left else None


def build():
    shutil.rmtree(DIST, ignore_errors=True)
    command = [PYTHON, "-m", "build", "--outdir", str(DIST), str(ROOT)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        print(ran.stdout)
    return "python -m build failed" if ran.returncode else None


def metadata():
    return succeeds(PYTHON, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir()))


def install():
    """Both in empty environments: contents, types, commands, a change that reaches its handler."""
    tests = "tests/acceptance/test_packaging.py"
    return succeeds(PYTHON, "-m", "pytest", "-q", "-m", "soak", tests, FLASH_DIST=str(DIST), CI="1")


def documents():
    """Their links and examples, and the site."""
    there = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True).returncode == 0
    return succeeds("make", "docs") if there else None


def speed():
    """Against the last release, if there was one."""
    described = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0"], cwd=ROOT, capture_output=True, text=True
    )
    if described.returncode:
        return None
    return succeeds(PYTHON, "-m", "benchmarks.compare", described.stdout.strip())


CHECKS = {
    "the changelog": changelog,
    "the README": readme,
    "the tag": tag,
    "the tree": tree,
    "lint": lambda: succeeds("make", "lint"),
    "types": lambda: succeeds("make", "types"),
    "the documents": documents,
    "the build": build,
    "the metadata": metadata,
    "installing": install,
    "the speed": speed,
}


def main():
    wrong = {}
    for name, check in CHECKS.items():
        print(f"== {name}", flush=True)
        if found := check():
            wrong[name] = found
        if name == "the build" and found:
            break
    print()
    for name, found in wrong.items():
        print(f"{name}: {found}")
    if wrong:
        return 1
    print(f"{version()} can be released. After `make test long matrix audit links`, a person runs:")
    print(f"  git tag -a v{version()} -m {version()}")
    print("  git push origin main --follow-tags")
    print("  .venv/bin/twine upload dist/*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
