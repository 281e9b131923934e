"""Real servers for the tests, started when the first test asks for one."""

import gc
import itertools
import os
import shutil
import signal
import subprocess

import celery
import psycopg
import pytest
from celery import Celery
from psycopg import sql

from example_project.servers import Postgres, Rabbit, Valkey, free_port
from tests import memory

pytest.register_assert_rewrite(
    "tests.acceptance.network",
    "tests.acceptance.steps",
    "tests.acceptance.writer",
)

#: Those have a process of their own: see acceptance/test_django.py.
collect_ignore = [] if os.environ.get("FLASH_TESTS_DJANGO") else ["django"]
_numbers = itertools.count(1)


#: Seconds for a test that takes minutes or gigabytes; the others' limit is in pyproject.toml.
SOAK_TIMEOUT = 3600


def pytest_configure(config):
    """Give this process, and so its children, the default handlers of SIGINT and SIGQUIT.

    A script's shell starts what runs in the background with both ignored, and children inherit
    that: they would never end when a test interrupts them.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    # Soak tests write gigabytes. (The processes of xdist inherit the folder of the first.)
    soak = config.option.markexpr != "not soak"
    if not soak and "FLASH_FOLDER" not in os.environ and memory.is_enough():
        folder = memory.new_folder()
        os.environ["FLASH_FOLDER"] = str(folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection():
    gc.disable()  # until all is there


def pytest_collection_finish():
    """Exempt all modules and tests from garbage collection: each makes it take longer."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("soak") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SOAK_TIMEOUT))


def missing(what):
    """A missing service is a failure in CI, and no more than a skip on a desk."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is not on this machine")


@pytest.fixture(autouse=True)
def default_app_is_unused():
    """Celery's default app lives as long as the process, and would get the tasks of all tests."""
    yield
    default = celery._state.default_app
    assert default is None or not default.finalized, "this test, or one before, needs new_app"


@pytest.fixture
def new_app(monkeypatch):
    """Makes Celery apps; no shared tasks come from or go to other tests."""
    monkeypatch.setattr(celery._state, "_on_app_finalizers", set(celery._state._on_app_finalizers))
    monkeypatch.setattr(celery._state, "default_app", celery._state.default_app)
    apps = []

    def make(name="shop", **conf):
        app = Celery(name, set_as_current=True)
        app.set_default()  # as the commands do; other threads have no current app
        app.conf.update(conf)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


@pytest.fixture
def app(new_app):
    return new_app(task_always_eager=True)


@pytest.fixture(scope="session")
def postgres():
    with Postgres(max_prepared_transactions=10) as server:
        yield server


@pytest.fixture(scope="session")
def valkey():
    with Valkey() as server:
        yield server


class Certificates:
    """A certificate for `localhost` alone, and the authority that signed it."""

    def __init__(self, folder):
        self.authority, self.authority_key = folder / "authority.pem", folder / "authority.key"
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        signs = ("keyUsage=critical,keyCertSign,cRLSign",)  # Python asks for it from 3.13 on
        self._make(self.authority, self.authority_key, "a test's own authority", signs)
        signed = ("-CA", self.authority, "-CAkey", self.authority_key)
        serves = ("subjectAltName=DNS:localhost", "basicConstraints=critical,CA:false")
        self._make(self.certificate, self.key, "localhost", serves, *signed)

    @staticmethod
    def _make(certificate, key, name, extensions, *more):
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        command = ("openssl", "req", "-x509", *curve, "-days", "2", "-subj", f"/CN={name}")
        files = ("-keyout", key, "-out", certificate)
        named = [part for extension in extensions for part in ("-addext", extension)]
        subprocess.run(
            [*command, *files, *named, *more], check=True, capture_output=True, timeout=120
        )


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    if shutil.which("openssl") is None:
        missing("openssl")
    return Certificates(tmp_path_factory.mktemp("certificates"))


class TlsRabbit(Rabbit):
    """RabbitMQ that also listens on `tls_port`, so that the tests of TLS need no second node."""

    def __init__(self, certificates):
        self.tls_port = free_port()
        super().__init__(
            f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
            f"ssl_options.cacertfile = {certificates.authority}",
            f"ssl_options.certfile = {certificates.certificate}",
            f"ssl_options.keyfile = {certificates.key}",
            "ssl_options.verify = verify_none",
        )


@pytest.fixture(scope="session")
def rabbit(request):
    if not Rabbit.installed():
        missing("RabbitMQ (rabbitmq-server)")
    has_tls = shutil.which("openssl")
    with TlsRabbit(request.getfixturevalue("certificates")) if has_tls else Rabbit() as server:
        yield server


class Database:
    """A database of the test's own, and SQL in it."""

    def __init__(self, server, name):
        self.server = server
        self.name = name
        self.dsn = server.dsn(name)
        self.slot = f"flash_{name}"
        self._asked = None, None

    def connect(self):
        return psycopg.connect(self.dsn, autocommit=True)

    def execute(self, *statements):
        """Run each statement in a transaction of its own; the rows of the last one."""
        with self.connect() as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def one(self, statement):
        """Return a value, from a session that is kept for the next question.

        Tests ask until the answer is the right one, and connecting costs thirty times as much.
        """
        dsn, session = self._asked
        if dsn != self.dsn or session.closed:
            session = self._ask()
        try:
            return session.execute(statement).fetchone()[0]
        except psycopg.OperationalError:
            if not session.closed:
                raise
        return self._ask().execute(statement).fetchone()[0]  # the server was restarted

    def _ask(self):
        self.close()
        session = psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None)
        self._asked = self.dsn, session
        return session

    def close(self):
        _, session = self._asked
        if session is not None:
            session.close()

    def drop(self):
        self.close()
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                [self.name],
            )
            slots = "FROM pg_replication_slots WHERE database = %s"
            while connection.execute(f"SELECT 1 {slots} AND active", [self.name]).fetchall():
                pass
            connection.execute(f"SELECT pg_drop_replication_slot(slot_name) {slots}", [self.name])
            name = sql.Identifier(self.name)
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def new_database(postgres):
    databases = []

    def make(options=""):
        name = f"test_{next(_numbers)}"
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            statement = sql.SQL("CREATE DATABASE {} " + options)
            connection.execute(statement.format(sql.Identifier(name)))
        databases.append(Database(postgres, name))
        return databases[-1]

    yield make
    for database in databases:
        database.drop()


@pytest.fixture
def database(new_database):
    return new_database()
