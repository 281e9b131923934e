"""The tests' own set-up: default signal handlers, deadlines, and processes that are forked."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from example_project.servers import wait_until
from tests import memory
from tests.conftest import SOAK_TIMEOUT
from tests.processes import ForkedProcess, run_python, start_logged_python

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


#: What a process finds at its start, on its standard output.
REPORT = """
import json, os, signal, sys
from pathlib import Path

print("on stderr", file=sys.stderr)
found = {
    "environment": dict(os.environ),
    "arguments": sys.argv[1:],
    "input": sys.stdin.read(),
    "folder": os.getcwd(),
    "handles": sorted(map(int, os.listdir("/proc/self/fd")))[:4],
    "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
    "optimized": sys.flags.optimize,
    "name": __name__,
}
print(json.dumps(found))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def module(tmp_path):
    """Write a module; return how a process runs it, and the environment for that."""

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        path = os.pathsep.join(map(str, (tmp_path, ROOT)))
        return [sys.executable, "-m", name], {**os.environ, "PYTHONPATH": path, "FOR_THIS": "1"}

    return write


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="forks on Linux only")
@pytest.mark.parametrize("optimize", ["", "2"])
def test_forked_process_starts_as_one_of_its_own(module, optimize):
    command, environment = module("reporting", REPORT)
    environment["PYTHONOPTIMIZE"] = optimize
    command += ["3", "--option"]
    forked = run_python(command, environment, 60, stdin="yes")
    own = subprocess.run(
        command, env=environment, input="yes", capture_output=True, text=True, timeout=60
    )
    assert json.loads(forked.stdout) == json.loads(own.stdout)
    assert (forked.returncode, forked.stderr) == (own.returncode, own.stderr) == (3, "on stderr\n")


def test_forked_process_is_waited_for_and_killed(module, tmp_path):
    command, environment = module("sleeping", "import time; print('here', 5); time.sleep(60)")
    process = start_logged_python(command, tmp_path / "log", environment)
    assert isinstance(process, ForkedProcess) is hasattr(os, "pidfd_open")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    assert process.poll() is None
    os.kill(process.pid, 0)
    process.kill()
    assert process.wait(30) == process.poll() == process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    process.terminate()  # to no other process that has its PID by now
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(command, environment, 0.01)


def test_forked_process_ends_with_its_tests(module, tmp_path):
    """Also where pytest is killed."""
    command, environment = module("sleeping", "import time; time.sleep(60)")
    code = f"""
import os, pathlib, signal
from tests.processes import start_logged_python
process = start_logged_python({command!r}, pathlib.Path({str(tmp_path / "log")!r}), {environment!r})
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert ran.returncode == -signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(int(ran.stdout)), "the child to end")


NEW_FOLDER = """
import pathlib, sys
from tests import memory

memory.MEMORY = pathlib.Path(sys.argv[1])
print(memory.new_folder(), flush=True)
sys.stdin.read()
"""


def test_folder_in_memory_is_removed_after_its_tests_were_killed(tmp_path, monkeypatch):
    """By the next tests; those that still run keep theirs."""
    monkeypatch.setattr(memory, "MEMORY", tmp_path)
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", NEW_FOLDER, tmp_path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    )
    with first, second:
        kept, left = (Path(one.stdout.readline().strip()) for one in (first, second))
        (left / "data").write_text("of a server")
        second.kill()
        second.wait(30)
        assert kept.is_dir()
        assert left.is_dir()
        third = memory.new_folder()
        assert sorted(tmp_path.iterdir()) == sorted((kept, third))
        assert memory.new_folder() != third
        first.stdin.close()
