"""Passwords that change while the replication worker runs, on a server that asks for them."""

import secrets
import threading

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from example_project.servers import Postgres
from flash_celery.errors import ConfigurationError, CredentialsError
from flash_celery.monitoring.observer import Observer
from flash_celery.provisioning import server_checks
from flash_celery.publishing.brokers.memory import MemoryPublisher
from flash_celery.settings import Settings
from flash_celery.testing import Live

ITEMS = "CREATE TABLE items (id int PRIMARY KEY)"


@pytest.fixture(scope="module")
def postgres():
    """A server that asks the role `shop` for its password, and no other role."""
    with Postgres(max_prepared_transactions=10) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE ROLE shop LOGIN SUPERUSER")
        hba = server.data / "pg_hba.conf"
        hba.write_text("host all shop all scram-sha-256\n" + hba.read_text())
        server.stop()
        server.start()
        yield server


class Keys:
    """The password of `shop`: the server's, and the one that clients are given."""

    def __init__(self, database):
        self.database = database
        self.dsn = make_conninfo(database.dsn, user="shop")
        self.given = ""
        self.deliver = lambda: None

    def change(self):
        """Give the role another password; clients do not have it yet."""
        self.password = secrets.token_urlsafe(9)
        text = sql.Literal(self.password).as_string(None)
        self.database.execute(f"ALTER ROLE shop PASSWORD {text}")

    def hand_out(self):
        self.given = self.password
        self.deliver()

    def rotate(self):
        self.change()
        self.hand_out()

    def end_sessions(self):
        self.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'shop'"
        )

    def sessions(self):
        rows = self.database.execute(
            "SELECT pid FROM pg_stat_activity WHERE usename = 'shop' ORDER BY pid"
        )
        return [pid for (pid,) in rows]

    def current(self):
        return make_conninfo(self.dsn, password=self.given)


@pytest.fixture
def keys(flash):
    keys = Keys(flash.database)
    keys.rotate()
    flash.database.execute(ITEMS)
    flash.handler("items")
    return keys


@pytest.fixture(params=["callable", "command", "pgpass", "service"])
def conf(request, keys, tmp_path, monkeypatch):
    """Settings that get the password from somewhere, each in its own way."""
    file = tmp_path / "credentials"
    parameters = conninfo_to_dict(keys.dsn)
    if request.param == "callable":
        return {"flash_dsn": keys.current}
    if request.param == "command":
        content, conf = "{}\n", {"flash_dsn": keys.dsn, "flash_password_command": f"cat {file}"}
    elif request.param == "pgpass":
        content, conf = "*:*:*:shop:{}\n", {"flash_dsn": keys.dsn}
        monkeypatch.setenv("PGPASSFILE", str(file))
    else:
        lines = [f"{name}={value}\n" for name, value in parameters.items()]
        content = "".join(["[shop]\n", *lines, "password={}\n"])
        conf = {"flash_dsn": "service=shop"}
        monkeypatch.setenv("PGSERVICEFILE", str(file))

    def deliver():
        file.touch(0o600)
        file.write_text(content.format(keys.given))

    keys.deliver = deliver
    deliver()
    return conf


def failures(flash):
    """How often the replication worker was refused by the server."""
    errors = list(flash.replicator.telemetry.errors)
    return sum(error.times for error in errors if "password authentication" in error.message)


def test_password_that_changes_while_connected_disturbs_nothing(flash, keys, conf):
    flash.start(**conf)
    sessions = keys.sessions()
    keys.change()
    flash.do("INSERT INTO items VALUES (1)")
    keys.hand_out()
    flash.do("INSERT INTO items VALUES (2)")
    assert [change.new["id"] for change in flash.delivered()] == [1, 2]
    assert keys.sessions() == sessions
    assert not flash.replicator.telemetry.errors


def test_password_that_changed_is_read_again_and_nothing_is_lost(flash, keys, conf):
    flash.start(**conf).do("INSERT INTO items VALUES (1)")
    for number in (2, 4):
        keys.change()
        keys.end_sessions()
        flash.database.execute(f"INSERT INTO items VALUES ({number})")
        before = failures(flash)
        flash.wait(lambda before=before: failures(flash) > before)
        keys.hand_out()
        flash.do(f"INSERT INTO items VALUES ({number + 1})")
    assert [change.new["id"] for change in flash.delivered()] == [1, 2, 3, 4, 5]
    said = str([vars(error) for error in flash.replicator.telemetry.errors])
    assert keys.password not in said


def test_password_change_is_survived_by_a_hot_spare(flash, keys, new_app):
    flash.start(flash_dsn=keys.current)
    spare = type(flash)(flash.database, flash.app)
    spare.publisher = MemoryPublisher()
    try:
        spare.start(flash_dsn=keys.current)
        spare.wait(lambda: spare.replicator.telemetry.state == "standby")
        keys.change()
        spare.wait(lambda: failures(spare))
        keys.hand_out()
        spare.wait(lambda: spare.replicator.telemetry.state == "standby")
        flash.stop()
        spare.do("INSERT INTO items VALUES (1)")
        assert [change.new["id"] for change in spare.delivered()] == [1]
    finally:
        spare.stop()


def test_wrong_password_still_ends_the_first_start(flash, keys):
    keys.change()
    with pytest.raises(ConfigurationError, match="password authentication failed.*flash_dsn") as e:
        flash.start(flash_dsn=keys.current)
    assert keys.given not in str(e.value)
    flash.error = None


class Faulty:
    """A callable that fails on demand."""

    def __init__(self, keys):
        self.keys = keys
        self.fault = None
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.fault is not None:
            return self.fault()
        return self.keys.current()


def raises(keys):
    raise RuntimeError(f"cannot read {keys.given}")


FAULTS = {
    "raises": (raises, "raised RuntimeError in line"),
    "returns nothing": (lambda keys: None, "has returned NoneType"),
    "returns no DSN": (lambda keys: f"{keys.given} x", "has returned text that is none"),
    "names another database": (
        lambda keys: make_conninfo(keys.current(), dbname="postgres"),
        "leads to another server or database",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_dsn_callable_that_fails_later_is_asked_again(flash, keys, case, caplog):
    fault, sentence = FAULTS[case]
    dsn = Faulty(keys)
    flash.start(flash_dsn=dsn).do("INSERT INTO items VALUES (1)")
    dsn.fault = lambda: fault(keys)
    keys.end_sessions()
    flash.database.execute("INSERT INTO items VALUES (2)")
    flash.wait(lambda: "CredentialsError" in kinds(flash) or "WrongCredentials" in kinds(flash))
    calls = dsn.calls
    flash.wait(lambda: dsn.calls > calls + 1)
    assert flash.replicator.telemetry.state == "connecting"
    dsn.fault = None
    flash.do("INSERT INTO items VALUES (3)")
    assert [change.new["id"] for change in flash.delivered()] == [1, 2, 3]
    assert "flash_dsn" in caplog.text
    assert sentence in caplog.text
    assert keys.given not in caplog.text


def kinds(flash):
    return [error.kind for error in flash.replicator.telemetry.errors]


def test_dsn_callable_that_hangs_is_logged_and_shown(flash, keys, caplog):
    release = threading.Event()
    dsn = Faulty(keys)
    flash.start(flash_dsn=dsn, flash_status_interval=0.5).do("INSERT INTO items VALUES (1)")
    dsn.fault = lambda: release.wait(120) and keys.current()
    keys.end_sessions()
    try:
        flash.wait(lambda: "CredentialsError" in kinds(flash))
        sentence = "Faulty has not returned for 10 s"
        assert sentence in caplog.text
        flash.wait(lambda: flash.replicator.telemetry.errors[-1].times > 1, timeout=60)
        assert dsn.calls == 3, "threads pile up"
    finally:
        dsn.fault = None
        release.set()
    flash.do("INSERT INTO items VALUES (2)")
    assert [change.new["id"] for change in flash.delivered()] == [1, 2]


def test_dsn_callable_that_fails_for_a_while_does_not_end_the_first_start(flash, keys, caplog):
    dsn = Faulty(keys)
    dsn.fault = lambda: raises(keys)
    starter = threading.Thread(target=flash.start, kwargs={"flash_dsn": dsn})
    starter.start()
    flash.wait(lambda: dsn.calls > 2)
    dsn.fault = None
    starter.join(60)
    flash.do("INSERT INTO items VALUES (1)")
    assert len(flash.delivered()) == 1
    assert "raised RuntimeError" in caplog.text


def test_dsn_callable_that_returns_nothing_ends_the_first_start(flash, keys):
    dsn = Faulty(keys)
    dsn.fault = lambda: None
    with pytest.raises(ConfigurationError, match=r"^flash_dsn must .* has returned NoneType\.$"):
        flash.start(flash_dsn=dsn)
    flash.error = None


def test_password_command_that_fails_later_is_run_again(flash, keys, tmp_path, caplog):
    file = tmp_path / "password"
    file.write_text(keys.given)
    conf = {"flash_dsn": keys.dsn, "flash_password_command": ["cat", str(file)]}
    flash.start(**conf).do("INSERT INTO items VALUES (1)")
    file.rename(tmp_path / "away")
    keys.end_sessions()
    flash.database.execute("INSERT INTO items VALUES (2)")
    flash.wait(lambda: "CredentialsError" in kinds(flash))
    assert "flash_password_command has failed with exit status 1" in caplog.text
    (tmp_path / "away").rename(file)
    flash.do("INSERT INTO items VALUES (3)")
    assert [change.new["id"] for change in flash.delivered()] == [1, 2, 3]


def test_doctor_blames_no_pooler_for_a_callable_that_fails(keys):
    with pytest.raises(CredentialsError, match="raised RuntimeError"):
        server_checks.can_stream(Settings(flash_dsn=lambda: raises(keys)))


def test_every_connection_asks_for_the_dsn(flash, keys, monkeypatch):
    """Each DSN is good for one connection: what kept one could not connect a second time."""
    used = []

    def once():
        keys.rotate()
        used.append(keys.given)
        return keys.current()

    flash.start(flash_dsn=once, flash_replay_window=3600).do("INSERT INTO items VALUES (1)")
    # The two connections of the session, and that of the replay slot.
    flash.wait(lambda: len(used) >= 3)
    started = len(used)
    settings = Settings.from_app(flash.app)
    observer = Observer(flash.app, settings, [], flash.replicator.telemetry)
    observer._poll_database()
    assert observer.report().database_error is None
    assert len(used) == started + 1
    observer._connection.close()
    observer._poll_database()
    assert observer.report().database_error
    observer._poll_database()
    assert observer.report().database_error is None
    observer._connection.close()
    keys.end_sessions()
    flash.do("INSERT INTO items VALUES (2)")
    assert [change.new["id"] for change in flash.delivered()] == [1, 2]
    flash.stop()
    with Live(flash.app) as live:
        flash.database.execute("INSERT INTO items VALUES (3)")
        assert len(live.wait_for()) == 1
