"""The real `celery` commands as processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from example_project.servers import end_with_parent, free_port, wait_until
from tests.conftest import missing
from tests.processes import run_python, start_logged_python

HERE = Path(__file__).parent


class Shop:
    """The project of `shop.py` on a database and a broker."""

    #: Where flash-celery is installed.
    python = sys.executable
    project = "shop"

    def __init__(self, database, broker, folder, **environment):
        self.database = database
        self.broker = broker
        self.folder = folder
        self.notes_file = folder / "notes"
        self.processes = []
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
            "PYTHONUNBUFFERED": "1",
            "SHOP_BROKER": broker.url,
            "SHOP_DSN": database.dsn,
            "SHOP_SLOT": database.slot,
            "SHOP_NOTES": str(self.notes_file),
            **environment,
        }

    def command(self, *arguments):
        return [self.python, "-m", "celery", "-A", self.project, *arguments]

    def run(self, *arguments, timeout=60, stdin="", **environment):
        """A command that ends by itself."""
        environment = {**self.environment, **environment}
        return run_python(self.command(*arguments), environment, timeout, stdin)

    def start(self, *arguments, **environment):
        process = start_logged_python(
            self.command(*arguments),
            self.folder / f"{len(self.processes)}.log",
            {**self.environment, **environment},
        )
        self.processes.append(process)
        return process

    def replicate(self, *arguments, wait=True, **environment):
        """Start the replication worker; it reads once this returns."""
        process = self.start("flash", "replicate", *arguments, **environment)
        if wait:
            self.until_said(process, "Replicating the slot")
        return process

    def worker(self, pool="solo", queues="flash,cleanup,batches", options=(), **environment):
        return self.start(
            *("worker", "-Q", queues, "-P", pool, "-c", "2", "-l", "WARNING"),
            # RabbitMQ gives a name's control queue to one worker only.
            *("-n", f"worker{len(self.processes)}@%h"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            *options,
            **environment,
        )

    @staticmethod
    def until_said(process, text, timeout=60.0):
        def said():
            assert process.poll() is None or text in process.log.read_text(), (
                f"ended with {process.returncode}: {process.log.read_text()}"
            )
            return text in process.log.read_text()

        try:
            wait_until(said, f"{text!r} to be logged", timeout)
        except TimeoutError:
            raise AssertionError(process.log.read_text()) from None

    def end(self, process, number=signal.SIGTERM, timeout=30):
        process.send_signal(number)
        return process.wait(timeout)

    def notes(self, handler="each"):
        if not self.notes_file.exists():
            return []
        # What follows the last newline is still being written.
        lines = self.notes_file.read_text().split("\n")[:-1]
        notes = [json.loads(line) for line in lines]
        return [note for note in notes if note["handler"] == handler]

    def until_noted(self, count, handler="each", timeout=60.0):
        """The notes, once there are changes with so many ids."""

        def enough():
            notes = self.notes(handler)
            return notes if len({note["id"] for note in notes}) >= count else None

        try:
            return wait_until(enough, f"{count} changes", timeout)
        except TimeoutError as error:
            logs = "\n".join(process.log.read_text()[-3000:] for process in self.processes)
            raise AssertionError(f"{error}: {len(self.notes(handler))} notes\n{logs}") from None

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(30)


@pytest.fixture
def make_shop(database, tmp_path):
    shops = []

    def make(broker, **environment):
        database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
        folder = tmp_path / str(len(shops))
        folder.mkdir()
        shops.append(Shop(database, broker, folder, **environment))
        return shops[-1]

    yield make
    for shop in shops:
        shop.close()


@pytest.fixture
def shop(make_shop, valkey):
    import redis

    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    return make_shop(valkey)


@pytest.fixture(params=["redis", "rabbitmq"])
def any_shop(request, make_shop):
    if request.param == "redis":
        return request.getfixturevalue("shop")
    rabbit = request.getfixturevalue("rabbit")
    rabbit.empty()
    return make_shop(rabbit)


@pytest.fixture
def pooler(postgres):
    """PgBouncer, which carries no replication connection before 1.23."""
    binary = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if binary is None:
        missing("PgBouncer (pgbouncer)")
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="flash-", dir="/tmp"))
    folder.chmod(0o777)
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={postgres.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
        "auth_type = any\nunix_socket_dir =\npool_mode = transaction\n"
    )
    as_user = {"user": "nobody"} if os.geteuid() == 0 else {}
    process = subprocess.Popen(
        [binary, "-q", folder / "pgbouncer.ini"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=end_with_parent(signal.SIGKILL),
        **as_user,
    )

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers, "PgBouncer")
    yield port
    process.kill()
    process.wait(30)
    shutil.rmtree(folder)
