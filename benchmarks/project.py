"""Run the real `celery` commands as processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.notes import NOTE
from example_project.servers import end_with_parent, wait_until

ROOT = Path(__file__).parents[1]
#: The folder whose code the processes run, because Python looks for modules there first.
_tree = ROOT


@contextmanager
def code_of(tree):
    """Run the processes that are started in this block with the code of another folder."""
    global _tree
    before, _tree = _tree, tree
    try:
        yield
    finally:
        _tree = before


class Process:
    """A running command, and its log."""

    def __init__(self, command, environment, log):
        self.log = log
        with log.open("w") as file:
            self.child = subprocess.Popen(
                command,
                cwd=_tree,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(signal.SIGKILL),
            )
        self.measured = psutil.Process(self.child.pid)

    def alive(self):
        """Raise `RuntimeError` with the log if the process has ended."""
        if self.child.poll() is not None:
            raise RuntimeError(f"ended with {self.child.returncode}: {self.log.read_text()}")

    def logged_at(self, text):
        """Wait for a line of the log; return the time at its beginning (seconds since 1970)."""

        def matching():
            lines = [line for line in self.log.read_text().splitlines() if text in line]
            if not lines:
                self.alive()
            return lines

        return float(wait_until(matching, f"{text!r} in {self.log.name}", 300)[0].split()[0])

    def until_logged(self, text):
        """Wait for a text in the log."""
        wait_until(lambda: text in self.log.read_text() or self.alive(), text, 120)

    def cpu(self):
        """Return the seconds of processor time so far."""
        # The scheduler's own nanoseconds; the times of processes come in steps of 10 ms.
        with contextlib.suppress(OSError):
            threads = Path("/proc", str(self.measured.pid), "task").glob("*/schedstat")
            return sum(int(each.read_text().split()[0]) for each in threads) / 1e9
        times = self.measured.cpu_times()
        return times.user + times.system

    def end(self, number=signal.SIGTERM):
        """Send a signal, and wait until the process has ended."""
        if self.child.poll() is None:
            self.child.send_signal(number)
            try:
                self.child.wait(60)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


class Project:
    """`benchmarks.app` on a database and a broker; its processes end with the block."""

    def __init__(
        self,
        dsn,
        broker,
        handler="",
        slot="flash_replication",
        conf=None,
        batch=500,
        failing=(1, 60),
        effects="",
    ):
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.notes_file = self.folder / "notes"
        self.processes = []
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "BENCH_DSN": dsn,
            "BENCH_BROKER": broker.url if broker else "",
            "BENCH_HANDLER": handler,
            "BENCH_SLOT": slot,
            "BENCH_CONF": json.dumps(conf or {}),
            "BENCH_BATCH": str(batch),
            "BENCH_FAILING": json.dumps(failing),
            "BENCH_EFFECTS": effects,
            "BENCH_NOTES": str(self.notes_file),
        }

    def start(self, *command):
        """Start `python -m …`."""
        log = self.folder / f"{len(self.processes)}.log"
        process = Process([sys.executable, "-m", *command], self.environment, log)
        self.processes.append(process)
        return process

    def replicate(self):
        """Start the replication worker."""
        return self.start("celery", "-A", "benchmarks.app", "flash", "replicate")

    def request(self, *options, handler="handle"):
        """Request a backfill of a handler."""
        self._flash("backfill", "start", handler, *options)

    def backfilled(self):
        """Return how many rows the backfill that is under way has enqueued."""
        return self._under_way()["rows"]

    def stop_backfill(self):
        """Stop the backfill that is under way."""
        self._flash("backfill", "stop", self._under_way()["id"])

    def _under_way(self):
        found = json.loads(self._flash("backfill", "list", "--json"))
        (under_way,) = [each for each in found if each["state"] in ("requested", "running")]
        return under_way

    def _flash(self, *command):
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.app", "flash", *command]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def worker(self, *options, queues="flash"):
        """Start a Celery worker, and wait until it is ready."""
        command = ["celery", "-A", "benchmarks.app", "worker", "-Q", queues, "-l", "INFO"]
        command += options or ("-c", "1")
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        worker = self.start(*command)
        worker.until_logged(" ready.")
        return worker

    def output(self, *command):
        """Run `python -m …`; return its output, parsed as JSON."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=_tree,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return json.loads(done.stdout)

    def set_up(self):
        """Let `flash replicate` create its publications and its slot."""
        worker = self.replicate()
        worker.logged_at("Replicating the slot")
        worker.end()

    def noted(self, count, timeout=60.0):
        """Return the handlers' notes, once there are `count` or none has come for `timeout` s."""
        size, deadline = 0, time.monotonic() + timeout
        while size < count * NOTE.size and time.monotonic() < deadline:
            for process in self.processes:
                process.alive()
            time.sleep(0.02)
            if self._size() > size:
                size, deadline = self._size(), time.monotonic() + timeout
        time.sleep(0.2)  # for notes that should not come
        return self.notes()

    def notes(self):
        """Return the handlers' notes so far."""
        notes = self.notes_file.read_bytes() if self._size() else b""
        return list(NOTE.iter_unpack(notes[: len(notes) // NOTE.size * NOTE.size]))

    def _size(self):
        return self.notes_file.stat().st_size if self.notes_file.exists() else 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.end()
        shutil.rmtree(self.folder, ignore_errors=True)
