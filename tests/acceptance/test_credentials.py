"""Credentials from a callable or a command, in the real commands."""

import json
import signal
import sys

import psutil
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from example_project.servers import Postgres, free_port, wait_until
from tests.acceptance.steps import assert_refused, created_nothing, http_get

SECRET = "Zq9open"
#: A module of the user's: what its callable does stands in a file.
MODULE = """
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def dsn():
    with open(FOLDER / "calls", "a") as calls:
        calls.write("x")
    mode = (FOLDER / "mode").read_text()
    dsn = (FOLDER / "dsn").read_text()
    if mode == "hang":
        time.sleep(600)
    if mode == "raise":
        raise RuntimeError(f"no connection with {dsn}")
    return {"none": None, "nonsense": f"{dsn} x", "sleep": dsn}.get(mode, dsn)
"""


@pytest.fixture(scope="module")
def postgres():
    """A server that asks the role `shop` for its password, and no other role."""
    with Postgres() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE shop LOGIN SUPERUSER PASSWORD '{SECRET}'")
        hba = server.data / "pg_hba.conf"
        hba.write_text("host all shop all scram-sha-256\n" + hba.read_text())
        server.stop()
        server.start()
        yield server


class User:
    """The module and the password of the user, and what a command for the password would run."""

    def __init__(self, shop):
        self.folder = shop.folder
        self.database = shop.database
        (self.folder / "credentials.py").write_text(MODULE)
        (self.folder / "mode").write_text("")
        self.dsn = make_conninfo(shop.database.dsn, user="shop")
        self.password = SECRET
        self.rotate(SECRET)

    def rotate(self, password):
        self.password = password
        literal = sql.Literal(password).as_string(None)
        self.database.execute(f"ALTER ROLE shop PASSWORD {literal}")
        (self.folder / "dsn").write_text(make_conninfo(self.dsn, password=password))
        (self.folder / "password").write_text(f"{password}\n")

    def behave(self, mode):
        (self.folder / "mode").write_text(mode)

    def end_sessions(self):
        self.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'shop'"
        )

    @property
    def calls(self):
        calls = self.folder / "calls"
        return len(calls.read_text()) if calls.exists() else 0


@pytest.fixture
def user(shop):
    user = User(shop)
    shop.environment["PYTHONPATH"] += f":{user.folder}"
    shop.environment["SHOP_DSN"] = "credentials.dsn"
    yield user
    user.rotate(SECRET)


def use_command(shop, user, *command):
    shop.environment["SHOP_DSN"] = user.dsn
    shop.environment["SHOP_CONF"] = json.dumps({"flash_password_command": command})


COMMANDS = ["replicate", "status", "doctor", "doctor --sql", "tail", "reset", "wait"]


@pytest.mark.parametrize("how", ["callable", "command"])
def test_credentials_are_asked_for_by_every_command(shop, user, how):
    if how == "command":
        use_command(shop, user, "cat", str(user.folder / "password"))
    worker = shop.worker()
    replicate = shop.replicate("--log-json", "-l", "DEBUG")
    user.rotate("Xw8shut")
    tail = shop.start("flash", "tail", "--limit", "1")
    shop.until_said(tail, "Following public.items")
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    assert tail.wait(30) == 0
    outputs = [replicate.log.read_text(), tail.log.read_text()]
    for command in ("status", "doctor", "status --json", "wait", "pause", "resume"):
        calls = user.calls
        ended = shop.run("flash", *command.split())
        assert ended.returncode == (1 if command == "doctor" else 0) or command == "doctor"
        assert "STOP" not in ended.stdout, ended.stdout
        outputs.append(ended.stdout + ended.stderr)
        assert how == "command" or user.calls > calls
    shop.until_noted(1)
    user.end_sessions()
    shop.database.execute("INSERT INTO items VALUES (2, 'a')")
    shop.until_noted(2)
    titles = [psutil.Process(process.pid).cmdline() for process in (replicate, worker)]
    outputs += [str(titles), replicate.log.read_text(), worker.log.read_text()]
    assert shop.end(replicate) == 0
    ended = shop.run("flash", "reset", "--yes")
    assert ended.returncode == 0, ended.stderr
    assert created_nothing(shop.database)
    outputs.append(ended.stdout + ended.stderr)
    for output in outputs:
        assert SECRET not in output
        assert "Xw8shut" not in output


FAILING = {
    "raises": (
        "raise",
        "flash_dsn has given .*: credentials.dsn raised RuntimeError in line 16 of",
    ),
    "returns nothing": ("none", "flash_dsn must .*credentials.dsn has returned NoneType"),
    "returns no DSN": ("nonsense", "flash_dsn must .* has returned text that is none"),
}
FAILING_COMMANDS = {
    "fails": (["sh", "-c", "cat $0; exit 4", "FILE"], "_command has failed with exit status 4"),
    "is missing": (["/nowhere/vault", "FILE"], "_command cannot be started .No such file"),
    "is silent": (["true"], "_command has printed no password"),
}


#: All commands ask for credentials in the same way, so the other cases are tried with two.
WITH_EACH_COMMAND = "returns nothing", "is missing"


@pytest.mark.parametrize("case", [*FAILING, *FAILING_COMMANDS])
def test_credentials_that_fail_end_each_command_with_one_sentence(shop, user, case):
    if case in FAILING:
        mode, sentence = FAILING[case]
        user.behave(mode)
    else:
        command, sentence = FAILING_COMMANDS[case]
        file = str(user.folder / "password")
        use_command(shop, user, *(file if word == "FILE" else word for word in command))
    for command in COMMANDS if case in WITH_EACH_COMMAND else ("replicate", "doctor"):
        if command == "replicate" and case in ("raises", "fails", "is silent"):
            continue  # it waits: see below
        ended = shop.run("flash", *command.split())
        assert ended.returncode == 2, ended.stderr
        assert_refused(ended, sentence)
        assert SECRET not in ended.stdout + ended.stderr
    assert created_nothing(shop.database)


@pytest.mark.parametrize("how", ["callable", "command"])
def test_credentials_that_fail_at_the_start_are_waited_for(shop, user, how):
    file = user.folder / "password"
    if how == "command":
        use_command(shop, user, "cat", str(file))
        file.rename(user.folder / "away")
    user.behave("raise")
    replicate = shop.replicate(wait=False)
    expected = "raised RuntimeError" if how == "callable" else "failed with exit status 1"
    shop.until_said(replicate, expected)
    user.behave("")
    if how == "command":
        (user.folder / "away").rename(file)
    shop.until_said(replicate, "Replicating the slot")
    assert SECRET not in replicate.log.read_text()
    assert shop.end(replicate) == 0


def test_dsn_callable_that_hangs_is_shown_and_a_signal_ends_it(shop, user):
    address = f"127.0.0.1:{free_port()}"
    shop.worker()
    replicate = shop.replicate("--http", address)
    assert http_get(address, "/ready")[0] == 200
    user.behave("hang")
    user.end_sessions()
    sentence = "flash_dsn has given no connection string: credentials.dsn has not returned for 10 s"
    shop.until_said(replicate, sentence)
    status, body, _ = http_get(address, "/ready")
    assert status == 503
    assert sentence in body
    assert http_get(address, "/live")[0] == 200
    page = json.loads(http_get(address, "/status.json")[1])
    assert sentence in page["problems"][0]
    assert page["state"] == "connecting"
    ended = shop.run("flash", "status")
    assert ended.returncode == 2
    assert_refused(ended, sentence)
    assert SECRET not in replicate.log.read_text() + json.dumps(page)
    assert shop.end(replicate) == 0


def test_dsn_callable_that_hangs_at_the_start_does_not_delay_a_signal(shop, user):
    user.behave("hang")
    replicate = shop.replicate(wait=False)
    wait_until(lambda: user.calls, "the callable to be called")
    assert shop.end(replicate, signal.SIGTERM) == 0
    assert created_nothing(shop.database)


def test_password_command_that_hangs_leaves_no_process_after_a_signal(shop, user):
    command = ["sh", "-c", f"echo $$ > {user.folder}/pid; sleep 600"]
    use_command(shop, user, *command)
    conf = json.loads(shop.environment["SHOP_CONF"])
    shop.environment["SHOP_CONF"] = json.dumps(conf | {"flash_shutdown_timeout": 0.5})
    replicate = shop.replicate(wait=False)
    number = wait_until(lambda: (user.folder / "pid").exists() and pid_of(user), "the command")
    children = psutil.Process(number).children(recursive=True)
    assert shop.end(replicate, signal.SIGTERM) == 0
    _, alive = psutil.wait_procs(children, 30)
    assert alive == []
    assert not psutil.pid_exists(number)


def pid_of(user):
    return int((user.folder / "pid").read_text() or 0)


def test_sources_have_credentials_of_their_own(shop, user, new_database):
    billing = new_database()
    billing.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
    source = {
        "dsn": make_conninfo(billing.dsn, user="shop"),
        "password_command": [sys.executable, "-c", f"print({SECRET!r})"],
    }
    shop.environment |= {
        "SHOP_ALSO": "billing:items",
        "SHOP_CONF": json.dumps({"flash_sources": {"billing": source}}),
    }
    shop.worker()
    processes = shop.replicate(), shop.replicate("--source", "billing")
    for database in (shop.database, billing):
        database.execute("INSERT INTO items VALUES (1, 'a')")
    assert {note["source"] for note in shop.until_noted(2)} == {"", "billing"}
    for process in processes:
        assert shop.end(process) == 0
    source["password_command"] = "false"
    shop.environment["SHOP_CONF"] = json.dumps({"flash_sources": {"billing": source}})
    ended = shop.run("flash", "doctor", "--source", "billing")
    assert ended.returncode == 2
    assert_refused(ended, r"flash_sources\['billing'\]\['password_command'\] has failed with exit")
