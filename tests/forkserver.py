"""A process that has imported Celery, and forks into `python -m MODULE ARGUMENTS` on request.

These imports are most of what a short command costs, and the tests start hundreds of commands. A
child has its own environment, standard streams, signals and exit, as if it had been started by
itself. `tests/processes.py` starts this server and makes the requests.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from example_project.servers import end_with_parent

ROOT = Path(__file__).parents[1]
CELERY = (
    "billiard.popen_fork",
    "billiard.sharedctypes",
    "celery.app.amqp",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.app.trace",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "celery.concurrency.solo",
    "celery.concurrency.thread",
    "celery.events.receiver",
    "celery.fixups.django",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.loops",
    "celery.worker.pidbox",
    "kombu.transport.pyamqp",
    "kombu.transport.redis",
)
#: Where these are loaded, others of ours act differently.
LEFT_OUT = ("flash_celery.django", "flash_celery.pytest_plugin", "flash_celery.testing")
REPORT = struct.Struct("i")
#: The exit code of a child that has come to its end.
_codes = []


def preload():
    files = sorted((ROOT / "flash_celery").rglob("*.py"))
    ours = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    for name in (*CELERY, *ours):
        if not name.startswith(LEFT_OUT):
            importlib.import_module(name.removesuffix(".__init__"))
    gc.collect()
    gc.freeze()  # a child that looks for garbage copies none of this memory


def serve(control):
    """Fork at each request; return the request and its streams in the child, None at the end.

    Each request comes with the file handles of the standard streams and of a socket, which gets the
    PID of the child and later its exit code.
    """
    server = os.getpid()
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    pid, report = key.data
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    send(report, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    os.close(report)
                    continue
                request, handles, *_ = socket.recv_fds(control, 1 << 20, 4)
                if not request:
                    return None
                pid = os.fork()
                if pid == 0:
                    return {**json.loads(request), "server": server}, handles[:3]
                *streams, report = handles
                for handle in streams:
                    os.close(handle)
                send(report, pid)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, report))


def send(report, number):
    with contextlib.suppress(BrokenPipeError):  # the test has stopped waiting
        os.write(report, REPORT.pack(number))


def become(request, streams):
    """Do what `python -m` does in a new process."""
    end_with_parent(signal.SIGKILL)()
    if os.getppid() != request["server"]:  # it had ended before
        os._exit(1)
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
    os.closerange(3, 1024)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = request["arguments"]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, (int, type(None))):  # for others there is a message
            _codes.append(end.code or 0)
        raise
    _codes.append(0)


def end_at_once():
    """Leave out what Python does last: it visits each object, and so copies all the memory."""
    if _codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_codes[0] & 0xFF)


if __name__ == "__main__":
    atexit.register(end_at_once)  # the first is called last, after all threads have ended
    preload()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        child = serve(control)
    if child is not None:
        become(*child)
