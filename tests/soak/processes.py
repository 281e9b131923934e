"""Processes under a supervisor, which restarts each that ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from example_project.servers import end_with_parent

ROOT = Path(__file__).parents[2]
#: Seconds until the supervisor starts a process again.
_PAUSE = 0.3


#: What a replication worker logs if it, or PostgreSQL, got no time from the machine; the groups are
#: when, and for how many seconds.
_STARVED = re.compile(
    r"^\[([\d -:]+),\d+: .*(?:This process did not run|PostgreSQL has been silent|"
    r"a statement has not been answered) for (\d+) s",
    re.MULTILINE,
)
#: Arguments of Python for a command of the project.
COMMAND = "-m", "celery", "-A", "tests.soak.project"


class Process:
    """A process of Python, in one life after the other."""

    def __init__(self, name, folder, environment, *arguments):
        self.name = name
        self.log = folder / f"{name}.log"
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        self._arguments = arguments
        self._lives = 0
        self._asked = False
        #: Unexpected ends: the time, the exit code and the process id.
        self.ends = []
        self.start()

    def start(self):
        # Each life has a name of its own: RabbitMQ keeps that of a killed one for a while.
        self._lives += 1
        arguments = [text.format(life=self._lives) for text in self._arguments]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env=self._environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(signal.SIGKILL),
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def running(self):
        return self._process.poll() is None

    def send(self, number):
        """A signal; after most of them the process may end."""
        self._asked = number not in (signal.SIGSTOP, signal.SIGCONT)
        self._process.send_signal(number)

    def kill(self):
        """SIGKILL to the process and its children, as when the machine dies; return their ids."""
        family = [self.pid, *(child.pid for child in self.children())]
        self._asked = True
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return family

    def children(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children()
        return []

    def has(self, pid):
        """Whether this is its process or that of a child, and it runs."""
        return self.running and pid in (self.pid, *(child.pid for child in self.children()))

    @property
    def starved(self):
        """When it, or PostgreSQL, got no time from the machine, so that it reconnected."""
        lines = _STARVED.findall(self.log.read_text())
        ends = [(datetime.fromisoformat(at).timestamp(), float(seconds)) for at, seconds in lines]
        return [(end - seconds - 1, end) for end, seconds in ends]

    def look_after(self):
        """Start it again if it has ended."""
        if not self.running:
            if not self._asked:
                self.ends.append((time.time(), self._process.returncode, self.pid))
            self._asked = False
            time.sleep(_PAUSE)
            self.start()

    def end(self):
        self._asked = True
        self._process.terminate()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(30)


class Vital(NamedTuple):
    """The resources of a process: bytes of memory, and open files."""

    at: float
    pid: int
    memory: int
    files: int


class Supervisor(threading.Thread):
    """Restarts processes, and records their resources."""

    def __init__(self, processes, watched):
        super().__init__(daemon=True)
        self._processes = processes
        self._watched = watched
        #: Held while it looks after a process, so that one that is dismissed does not start again.
        self._lock = threading.RLock()
        self._ending = threading.Event()
        #: Of the watched processes, once a second.
        self.vitals = []

    def run(self):
        looked = 0.0
        while not self._ending.wait(0.1):
            self.look_after_all()
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                self._look()
        # Those it has started end with its thread.
        for process in self._processes:
            process.end()

    def look_after_all(self):
        """Start each that has ended again."""
        for process in self._processes:
            with self._lock:
                if process in self._processes:
                    process.look_after()

    def take(self, processes):
        """Look after more processes."""
        with self._lock:
            self._processes = [*self._processes, *processes]

    def dismiss(self, processes):
        """End some of the processes for good."""
        with self._lock:
            self._processes = [each for each in self._processes if each not in processes]
        for process in processes:
            process.end()

    def end(self):
        self._ending.set()
        self.join(120)

    def _look(self):
        for process in self._watched:
            with contextlib.suppress(psutil.Error):
                running = psutil.Process(process.pid)
                self.vitals.append(
                    Vital(time.time(), running.pid, running.memory_info().rss, running.num_fds())
                )
