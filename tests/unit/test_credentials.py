"""DSNs from callables and passwords from commands: asked at every connect, shown nowhere."""

import functools
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.worker.control import conf
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from example_project.servers import wait_until
from flash_celery.credentials import Credentials, arguments
from flash_celery.errors import ConfigurationError, CredentialsError, WrongCredentials
from flash_celery.settings import Settings

SECRET = "hunter2"
DSN = f"postgresql://shop:{SECRET}@127.0.0.1:1/shop"


def a_dsn():
    return DSN


class Vault:
    """Has a method that returns DSNs."""

    def dsn(self):
        return DSN

    __call__ = dsn


def prints(text, *, before="", after=""):
    """Return a command that prints a text."""
    code = f"import os, sys, time\n{before}\nsys.stdout.write({text!r})\n{after}"
    return [sys.executable, "-c", code]


def credentials(given, command=(), patience=60):
    return Credentials("flash_dsn", "flash_password_command", given, list(command), patience)


@pytest.fixture
def password():
    """Runs a command, and returns the password that the DSN then has."""

    def read(command, patience=60):
        given = "host=h dbname=shop password=old"
        dsn = credentials(given, arguments(command), patience).dsn()
        return conninfo_to_dict(dsn)["password"]

    return read


@pytest.mark.parametrize(
    "given",
    [
        a_dsn,
        lambda: DSN,
        Vault().dsn,
        Vault(),
        functools.partial(make_conninfo, DSN),
        f"{__name__}.a_dsn",
        f"{__name__}:a_dsn",
    ],
    ids=["function", "lambda", "method", "object", "partial", "path", "path:name"],
)
def test_dsn_callable_is_called_at_every_connect(given):
    settings = Settings(flash_dsn=given)
    assert conninfo_to_dict(settings.require_dsn())["password"] == SECRET


def test_dsn_callable_is_asked_anew_for_each_connection():
    numbers = iter("123")
    settings = Settings(flash_dsn=lambda: make_conninfo(DSN, password=next(numbers)))
    passwords = [conninfo_to_dict(settings.require_dsn())["password"] for _ in "123"]
    assert passwords == ["1", "2", "3"]


def test_dsn_callable_is_not_called_while_settings_are_read():
    def never():
        raise AssertionError

    app = Celery("shop", set_as_current=False)
    app.conf.flash_dsn = never
    app.conf.flash_sources = {"billing": {"dsn": never}, "shipping": {"dsn": "no.such.path"}}
    settings = Settings.from_app(app)
    assert settings.flash_dsn is never
    with pytest.raises(CredentialsError, match=r"flash_sources\['billing'\]\['dsn'\] has given"):
        settings.of_source("billing").require_dsn()
    app.close()


def raises(error):
    raise error


class Unprintable(Exception):
    """An error of user code that cannot be shown."""

    def __str__(self):
        raise RuntimeError(SECRET)

    __repr__ = __str__


class Secretive:
    """A callable that fails when it is asked for its name."""

    def __getattr__(self, name):
        raise RuntimeError(SECRET)

    def __call__(self):
        return DSN


async def coroutine():
    return DSN


WRONG = {
    "nothing": (lambda: None, "test_credentials.*<lambda> has returned NoneType"),
    "bytes": (lambda: DSN.encode(), "has returned bytes"),
    "an empty text": (lambda: "", "returned text that is none; .*make_conninfo"),
    "a blank": (lambda: " \n", "returned text that is none"),
    "no DSN": (lambda: f"{SECRET} x", "returned text that is none"),
    "a password that is not quoted": (lambda: f"postgresql://u:a/{SECRET}@h/d", "text that is non"),
    "no module": ("no_such_module.dsn", r"neither .*\(to import it raises ModuleNotFoundError\)"),
    "no attribute": (f"{__name__}.nothing", r"\(to import it raises AttributeError\)"),
    "no callable": (f"{__name__}.SECRET", r"\(to import it leads to str\)"),
    "a host": (f"db.{SECRET}", "is neither a connection string nor the dotted path"),
}
FAILED = {
    "an error": (lambda: raises(ValueError(SECRET)), r"<lambda> raised ValueError in line \d+ of"),
    "an error of a library": (
        lambda: raises(subprocess.CalledProcessError(1, SECRET)),
        "raised subprocess.CalledProcessError in line",
    ),
    "an error that cannot be shown": (lambda: raises(Unprintable()), "raised .*Unprintable in"),
    "an object without a name": (Secretive(), "the callable raised RuntimeError in line"),
    "an exit": (lambda: sys.exit(SECRET), "raised SystemExit"),
    "arguments": (lambda argument: argument, "raised TypeError"),
    "an interrupt": (lambda: raises(KeyboardInterrupt(SECRET)), "raised KeyboardInterrupt"),
    "an error of ours": (
        lambda: raises(WrongCredentials(SECRET)),
        "raised flash_celery.errors.Wrong",
    ),
    "a timeout": (lambda: raises(TimeoutError(SECRET)), "raised TimeoutError"),
}


@pytest.mark.parametrize("case", [*WRONG, *FAILED])
def test_dsn_callable_failure_is_one_sentence_without_the_password(case):
    given, sentence = (WRONG | FAILED)[case]
    settings = Settings(flash_dsn=given)
    with pytest.raises(CredentialsError, match=f"^flash_dsn .*{sentence}") as raised:
        settings.require_dsn()
    assert isinstance(raised.value, WrongCredentials) == (case in WRONG)
    said = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    assert SECRET not in said
    assert raised.value.__context__ is raised.value.__cause__ is None
    assert str(raised.value).endswith(".")


def test_dsn_coroutine_is_refused():
    made = []
    settings = Settings(flash_dsn=lambda: made.append(coroutine()) or made[0])
    with pytest.raises(WrongCredentials, match="has returned coroutine"):
        settings.require_dsn()
    made[0].close()


def test_dsn_callable_that_never_returns_has_a_deadline():
    release, calls = threading.Event(), []

    def hangs():
        calls.append(threading.current_thread())
        release.wait(60)
        return DSN

    hanging = credentials(hangs, patience=0.3)
    for _ in range(3):
        with pytest.raises(CredentialsError, match=r"^flash_dsn .* has not returned for 0\.3 s"):
            hanging.dsn()
    # The first call still runs, and no others wait behind it.
    assert len(calls) == 1
    release.set()
    calls[0].join(60)
    assert hanging.dsn() == DSN


@pytest.mark.parametrize("change", ["host=other", "port=2", "dbname=other"])
def test_dsn_callable_may_not_lead_to_another_database(change):
    answers = iter([DSN, make_conninfo(DSN, **dict([change.split("=")])), DSN])
    settings = Settings(flash_dsn=lambda: next(answers))
    settings.require_dsn()
    with pytest.raises(CredentialsError, match="^flash_dsn leads to another server") as raised:
        settings.require_dsn()
    assert not isinstance(raised.value, WrongCredentials)
    assert SECRET not in str(raised.value)
    assert settings.require_dsn() == DSN


def test_dsn_callable_may_change_user_password_and_options():
    new = make_conninfo(DSN, user="other", password="new", sslmode="require")
    answers = iter([DSN, new])
    settings = Settings(flash_dsn=lambda: next(answers))
    assert [settings.require_dsn() for _ in "12"] == [DSN, new]


def test_sources_with_callables_need_names_of_their_own():
    app = Celery("shop", set_as_current=False)
    app.conf.flash_dsn = a_dsn
    app.conf.flash_sources = {"billing": {"dsn": "dbname=b", "slot": "flash_replication"}}
    with pytest.raises(ConfigurationError, match="perhaps on the same server; give .*another name"):
        Settings.from_app(app)
    app.conf.flash_sources = {"billing": {"dsn": a_dsn}}
    assert Settings.from_app(app).of_source("billing").require_dsn() == DSN
    app.close()


def test_password_command_prints_the_password(password, tmp_path):
    secret = "it's a \\ secret é"
    file = tmp_path / "the password"
    for content in (secret, f"{secret}\n", f"{secret}\r\nmore\n"):
        file.write_bytes(content.encode())
        assert password(["cat", str(file)]) == secret
        assert password(f"cat '{file}'") == secret
    file.write_text("rotated\n")
    assert password(("cat", str(file))) == "rotated"
    assert password(prints(" spaces are part of it ")) == " spaces are part of it "


def test_password_command_runs_through_no_shell(password):
    assert password("echo $HOME; exit 3") == "$HOME; exit 3"


def test_password_command_does_not_wait_for_input_or_output(password):
    assert password(prints("x\n", before="sys.stdin.read()")) == "x"
    assert password(prints("x\n", after="sys.stdout.write('y' * 10_000_000)")) == "x"
    assert password(prints("x\n", before="sys.stderr.write('y' * 10_000_000)")) == "x"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (prints(SECRET, after="sys.exit(3)"), "has failed with exit status 3; its output is not"),
        (prints("", after=f"sys.exit('{SECRET}')"), "has failed with exit status 1"),
        (
            prints(SECRET, after="sys.stdout.flush(); os.kill(os.getpid(), 9)"),
            "has failed with SIGKILL; its",
        ),
        (["true"], "has printed no password, which is the first line"),
        (prints(f"\n{SECRET}\n"), "has printed no password"),
        (prints("x" * 70_000), "has printed a line of more than 65535 bytes"),
        (prints("a\0b"), "has printed a first line that is not UTF-8"),
        (["printf", r"\377"], "has printed a first line that is not UTF-8"),
    ],
)
def test_password_command_failure_is_one_sentence(password, command, sentence):
    with pytest.raises(CredentialsError, match=f"^flash_password_command {sentence}") as raised:
        password(command)
    assert not isinstance(raised.value, WrongCredentials)
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([f"/nowhere/{SECRET}"], r"\(No such file or directory\); write the full path"),
        (SECRET, r"\(No such file or directory\); write the full path"),
        (["/etc/passwd"], r"\(Permission denied\)"),
    ],
)
def test_password_command_without_a_program_is_wrong(password, command, sentence):
    with pytest.raises(WrongCredentials, match=f"cannot be started {sentence}") as raised:
        password(command)
    assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "after",
    [
        "sys.stdout.flush(); time.sleep(600)",
        "os.close(1); time.sleep(600)",
        "os.system('sleep 600')",
        "exec(\"while True: sys.stdout.write('y' * 65536)\")",
    ],
    ids=["sleeps", "closes its output", "has a child", "never stops printing"],
)
def test_password_command_that_never_ends_is_killed(password, tmp_path, after):
    group = tmp_path / "group"
    code = f"open({str(group)!r}, 'w').write(str(os.getpgrp()))"
    with pytest.raises(CredentialsError, match="has not ended within 3 s, and was killed"):
        password(prints("x", before=code, after=after), patience=3)
    number = int(group.read_text())

    def ended():
        try:
            os.killpg(number, 0)
        except ProcessLookupError:
            return True
        return all(
            int(stat.rsplit(")", 1)[1].split()[2]) != number or ") Z " in stat
            for stat in map(_stat, Path("/proc").glob("[0-9]*"))
            if stat
        )

    wait_until(ended, "the process group to end")


def _stat(process):
    try:
        return (process / "stat").read_text()
    except OSError:
        return ""


def test_password_command_wins_over_dsn_and_environment(password, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "of the environment")
    assert password(["echo", "of the command"]) == "of the command"


def test_password_command_follows_a_callable():
    settings = Settings(flash_dsn=a_dsn, flash_password_command="echo new")
    assert conninfo_to_dict(settings.require_dsn())["password"] == "new"


def test_password_command_belongs_to_one_source():
    billing = {"dsn": "dbname=b", "password_command": "echo of-billing"}
    settings = Settings(
        flash_dsn="dbname=a",
        flash_password_command="echo of-default",
        flash_sources={"billing": billing, "other": {"dsn": "dbname=c"}},
    )
    assert "of-default" in settings.require_dsn()
    assert "of-billing" in settings.of_source("billing").require_dsn()
    assert settings.of_source("other").require_dsn() == "dbname=c"
    billing["password_command"] = "false"
    with pytest.raises(
        CredentialsError, match=r"^flash_sources\['billing'\]\['password_command'\]"
    ):
        settings.of_source("billing").require_dsn()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (5, "must be str or list or tuple, not int"),
        ({"a": "b"}, "must be str or list or tuple, not dict"),
        (f"cat '{SECRET}", "is not a command; write a list"),
        (["cat", 5], "is not a command"),
        ([""], "is not a command"),
        (["cat", "a\0b"], "is not a command"),
    ],
)
def test_invalid_password_command_is_named(value, sentence):
    app = Celery("shop", set_as_current=False)
    app.conf.flash_dsn = "dbname=a"
    app.conf.flash_password_command = value
    with pytest.raises(ConfigurationError, match=f"^flash_password_command {sentence}") as raised:
        Settings.from_app(app)
    assert SECRET not in str(raised.value)
    app.conf.flash_password_command = None
    app.conf.flash_sources = {"billing": {"dsn": "dbname=a", "password_command": value}}
    with pytest.raises(ConfigurationError, match=r"\['password_command'\] (must|is)") as raised:
        Settings.from_app(app)
    assert SECRET not in str(raised.value)
    app.close()


def test_settings_repr_hides_credentials():
    settings = Settings(flash_dsn=DSN, flash_password_command=["vault", SECRET])
    assert SECRET not in repr(settings) + repr(settings._credentials)


def test_celery_report_prints_a_password_of_the_dsn_only():
    app = Celery("shop", set_as_current=False)
    app.conf.flash_dsn = DSN
    assert SECRET in app.bugreport()
    app.conf.flash_dsn = a_dsn
    app.conf.flash_sources = {"billing": {"dsn": a_dsn}}
    assert SECRET not in app.bugreport() + str(conf(SimpleNamespace(app=app)))
    app.close()


def test_settings_module_may_define_the_callable(tmp_path, monkeypatch):
    (tmp_path / "celeryconfig_of_shop.py").write_text(
        "def flash_dsn():\n    return 'host=h dbname=from_module'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    app = Celery("shop", set_as_current=False)
    app.config_from_object("celeryconfig_of_shop")
    assert Settings.from_app(app).require_dsn() == "host=h dbname=from_module"
    app.close()
