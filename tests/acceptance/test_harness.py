"""The tests' own set-up: default signal handlers, and a deadline for every test."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import SOAK_TIMEOUT

ROOT = Path(__file__).parents[2]


def run_pytest(*arguments, shell=""):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        ["sh", "-c", f'{shell} exec "$@"', "sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_signals_have_their_default_handlers_in_children():
    code = "import signal; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGQUIT))"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "SIG_IGN" not in child.stdout
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_signals_have_their_default_handlers_below_a_script_that_ignores_them(options):
    """`make test &` in a script starts with SIGINT and SIGQUIT ignored."""
    test = f"{__file__}::test_signals_have_their_default_handlers_in_children"
    ran = run_pytest(*options, test, shell="trap '' INT QUIT;")
    assert ran.returncode == 0, ran.stdout


def test_timeout_fails_one_test_and_the_next_one_runs(tmp_path):
    """Also where xdist distributes them: the worker process goes on."""
    tests = tmp_path / "test_slow.py"
    tests.write_text(
        textwrap.dedent("""
            import time
            import pytest

            @pytest.mark.timeout(0.5)
            def test_first():
                time.sleep(60)

            def test_second():
                pass
        """)
    )
    ran = run_pytest("-n", "1", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, tests)
    assert ran.returncode == 1
    assert "Timeout" in ran.stdout
    assert "1 failed, 1 passed" in ran.stdout
    assert "crashed" not in ran.stdout


def test_timeout_of_a_test_is_set(request):
    assert float(request.config.getini("timeout")) > 0


@pytest.mark.soak
def test_timeout_of_a_soak_test_is_longer(request):
    assert request.node.get_closest_marker("timeout").args == (SOAK_TIMEOUT,)
