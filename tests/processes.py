"""Child processes of the tests."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack

from example_project.servers import end_with_parent
from tests.forkserver import REPORT

#: These patch the standard library before anything else is imported.
PATCHING_POOLS = {"gevent", "eventlet"}


class LoggedProcess(subprocess.Popen):
    """A child that writes its output into the file `log` and ends with its parent."""

    def __init__(self, command, log, **options):
        self.log = log
        with log.open("w") as output:
            super().__init__(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(signal.SIGKILL),
                **options,
            )


class ForkedProcess:
    """A `python -m MODULE ARGUMENTS` of the fork server, with the methods of `subprocess.Popen`."""

    def __init__(self, command, env, stdin, stdout, stderr):
        self.args = command
        self.returncode = None
        python = {name: env[name] for name in env if name.startswith("PYTHON")}
        server = _fork_server(json.dumps(python, sort_keys=True))
        request = {"arguments": command[2:], "environment": env, "folder": os.getcwd()}
        self._report, report = socket.socketpair()
        with report:
            handles = [one.fileno() for one in (stdin, stdout, stderr, report)]
            socket.send_fds(server, [json.dumps(request).encode()], handles)
        self.pid = self._reported(60)

    def _reported(self, timeout):
        self._report.settimeout(timeout)
        try:
            report = self._report.recv(REPORT.size)
        except (BlockingIOError, TimeoutError):
            raise subprocess.TimeoutExpired(self.args, timeout) from None
        return REPORT.unpack(report)[0]

    def wait(self, timeout=None):
        if self.returncode is None:
            self.returncode = self._reported(timeout)
            self._report.close()
        return self.returncode

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def _fork_server(python):
    """Start a fork server with these variables of Python's own; return the socket for requests."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())],
            env={**os.environ, **json.loads(python)},
            pass_fds=[theirs.fileno()],
            preexec_fn=end_with_parent(signal.SIGKILL),
            start_new_session=True,
        )

    def end():
        control.close()
        process.wait(30)

    atexit.register(end)
    return control


def start_python(command, env, stdin, stdout, stderr):
    """Start a `[python, "-m", module, *arguments]`, without its imports where that is possible."""
    if (
        hasattr(os, "pidfd_open")
        and command[:2] == [sys.executable, "-m"]
        and PATCHING_POOLS.isdisjoint(command)
    ):
        return ForkedProcess(command, env, stdin, stdout, stderr)
    return subprocess.Popen(
        command,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=end_with_parent(signal.SIGKILL),
    )


def start_logged_python(command, log, env):
    """The same with its output in the file `log`."""
    with open(os.devnull) as nothing, log.open("w") as output:
        process = start_python(command, env, nothing, output, output)
    process.log = log
    return process


def run_python(command, env, timeout, stdin=""):
    """Run a command that ends, as `subprocess.run` does; its output is text with its `\\r`."""
    with ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        streams[0].write(stdin.encode())
        streams[0].seek(0)
        process = start_python(command, env, *streams)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
            raise
        for stream in streams[1:]:
            stream.seek(0)
        output = [stream.read().decode() for stream in streams[1:]]
    return subprocess.CompletedProcess(command, process.returncode, *output)
