"""Get the DSN and the password of a source where they change: from a callable, from a command.

Both are asked at every connect, and have a deadline: user code that never returns would otherwise
stop replication silently. Errors show neither a message of theirs nor any output, because these may
contain the password.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import selectors
import shlex
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from celery.utils.imports import symbol_by_name
from psycopg.conninfo import make_conninfo

from . import dsn
from .errors import CredentialsError, WrongCredentials

#: The dotted path of a callable, such as `shop.credentials.dsn` or `shop.credentials:dsn`.
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*")
#: The most bytes of a password; PostgreSQL 14 and later accept 65,535.
_LONGEST = 65_535
#: Why a program may not start now, and does so later.
_PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_HIDDEN = "is not shown, because it may contain the password"


def is_asked(given: object) -> bool:
    """Return whether a DSN setting is a callable, or the dotted path of one."""
    return callable(given) or (isinstance(given, str) and bool(_PATH.fullmatch(given)))


def arguments(command: str | Sequence[str]) -> list[str]:
    """Return a command as a list.

    Raises:
        ValueError: A quote is not closed.
    """
    return shlex.split(command) if isinstance(command, str) else list(command)


@dataclass(repr=False)
class Credentials:
    """Where the connections of a source get their DSN from. Any thread may ask.

    The callable is never called twice at the same time.
    """

    #: How the user writes the two settings.
    dsn_setting: str
    command_setting: str
    #: The DSN, a callable that returns it, or the dotted path of one.
    given: str | Callable[[], str]
    #: The command that prints the password; empty for none.
    command: list[str]
    #: Seconds that the callable and the command may each take.
    patience: float
    _lock: threading.Lock = field(default_factory=threading.Lock)
    #: The server and database of the first DSN.
    _place: Any = None

    def dsn(self) -> str:
        """Return the DSN to connect with now, with the password of the command.

        Raises:
            CredentialsError: The callable or the command fails.
            WrongCredentials: They give something that cannot be used.
        """
        address = self.address()
        if not self.command:
            return address
        return make_conninfo(address, password=self._password())

    def address(self) -> str:
        """Return the DSN without asking the command.

        Raises:
            CredentialsError: The callable fails, or leads to another database.
            WrongCredentials: It gives something that cannot be used.
        """
        if isinstance(self.given, str) and not is_asked(self.given):
            return self.given
        answer, name = self._asked()
        if not isinstance(answer, str):
            raise WrongCredentials(
                f"{self.dsn_setting} must give a connection string, and {name} has returned "
                f"{type(answer).__name__}."
            )
        if not answer.strip() or not dsn.is_readable(answer):
            raise WrongCredentials(
                f"{self.dsn_setting} must give a connection string, and {name} has returned text "
                "that is none; psycopg.conninfo.make_conninfo quotes a password correctly."
            )
        self._require_same_place(answer, name)
        return answer

    def _require_same_place(self, address: str, name: str) -> None:
        """Refuse another database, whose slot has other changes.

        Raises:
            CredentialsError: The DSN leads to another one than the first DSN.
        """
        place = dsn.place_of(address)
        if self._place is None:
            self._place = place
        if place != self._place:
            raise CredentialsError(
                f"{self.dsn_setting} leads to another server or database than before: {name} must "
                "name the same host, port and dbname while this process runs; start it again to "
                "change them."
            )

    def _asked(self) -> tuple[Any, str]:
        """Return what the callable returns, and its name."""
        deadline = time.monotonic() + self.patience
        # A call that still hangs holds the lock: threads must not pile up behind it.
        if not self._lock.acquire(timeout=self.patience):
            raise self._late("the callable")
        answer: Future[Any] = Future()
        names = ["the callable"]

        def ask() -> None:
            try:
                answer.set_result(self._call(names))
            except BaseException as error:
                answer.set_exception(error)
            finally:
                self._lock.release()

        try:
            threading.Thread(target=ask, name="flash-dsn", daemon=True).start()
        except RuntimeError:
            self._lock.release()
            raise self._failed("no thread can be started to call it") from None
        try:
            return answer.result(max(0.0, deadline - time.monotonic())), names[-1]
        except NotYet:
            raise self._late(names[-1]) from None

    def _call(self, names: list[str]) -> Any:
        """Return what the callable returns; append its name first."""
        function = self._function()
        try:
            names.append(_name(function))
            return function()
        except BaseException as error:
            failure = f"{names[-1]} raised {_class(error)}{_line(error)}; the message {_HIDDEN}"
        # Outside `except`, so that nothing leads to the message.
        raise self._failed(failure)

    def _failed(self, why: str) -> CredentialsError:
        return CredentialsError(f"{self.dsn_setting} has given no connection string: {why}.")

    def _late(self, name: str) -> CredentialsError:
        return self._failed(f"{name} has not returned for {self.patience:g} s")

    def _function(self) -> Callable[[], Any]:
        """Return the callable.

        Raises:
            WrongCredentials: The dotted path leads to none.
        """
        if callable(self.given):
            return self.given
        failure = ""
        try:
            function = symbol_by_name(self.given)
        except BaseException as error:
            failure = f"raises {_class(error)}"
        else:
            if callable(function):
                return function  # type: ignore[no-any-return]
            failure = f"leads to {type(function).__name__}"
        # A password may have a dot, so the text is not shown.
        raise WrongCredentials(
            f"{self.dsn_setting} is neither a connection string nor the dotted path of a callable "
            f"(to import it {failure}); write postgresql://user:password@host:5432/database, or a "
            "path such as shop.credentials.dsn."
        )

    def _password(self) -> str:
        """Run the command and return the first line that it prints."""
        setting = self.command_setting
        try:
            line = _output(self.command, self.patience).split(b"\n", 1)[0].removesuffix(b"\r")
        except OSError as error:
            failure = f"{setting} cannot be started ({os.strerror(error.errno or 0)})"
            if error.errno in _PASSING:
                raise CredentialsError(f"{failure}.") from None
            raise WrongCredentials(f"{failure}; write the full path of the program.") from None
        except subprocess.TimeoutExpired:
            raise CredentialsError(
                f"{setting} has not ended within {self.patience:g} s, and was killed."
            ) from None
        except subprocess.CalledProcessError as error:
            raise CredentialsError(
                f"{setting} has failed with {_status(error.returncode)}; its output {_HIDDEN}: run "
                "it by hand."
            ) from None
        if not line:
            raise CredentialsError(
                f"{setting} has printed no password, which is the first line of its output."
            )
        if len(line) > _LONGEST:
            raise CredentialsError(f"{setting} has printed a line of more than {_LONGEST} bytes.")
        if not _is_text(line):
            raise CredentialsError(f"{setting} has printed a first line that is not UTF-8.")
        return line.decode()


def _output(command: Sequence[str], patience: float) -> bytes:
    """Run a command and return the beginning of its output, more than a password may have.

    Args:
        command: The program and its arguments.
        patience: Seconds until the command and the processes that it has started are killed.

    Raises:
        OSError: The program cannot be started.
        subprocess.CalledProcessError: It fails.
        subprocess.TimeoutExpired: It has not ended in time.
    """
    deadline = time.monotonic() + patience
    output = b""
    process = subprocess.Popen(  # noqa: S603 - the user's own command, and no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        # `communicate` would keep all of an endless output, and wait for it without a limit.
        with process.stdout, selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline - time.monotonic())):
                part = os.read(process.stdout.fileno(), _LONGEST)
                if not part:
                    break
                output = (output + part)[: _LONGEST + 2]
            else:
                raise subprocess.TimeoutExpired(list(command), patience)
        process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return output


def _is_text(line: bytes) -> bool:
    try:
        return "\0" not in line.decode()
    except UnicodeDecodeError:
        return False


def _status(returncode: int) -> str:
    """Describe how a process has ended."""
    if returncode >= 0:
        return f"exit status {returncode}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-returncode).name
    return f"signal {-returncode}"


def _name(function: Callable[..., Any]) -> str:
    """Return the dotted path of a callable, or of its class."""
    function = function.func if isinstance(function, partial) else function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _class(error: BaseException) -> str:
    """Return the class of an error with its module, unless it is a builtin."""
    kind = type(error)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _line(error: BaseException) -> str:
    """Return where the callable was when an error was raised, or "" if it is not Python."""
    # The first entry is our own call, the second one the callable.
    entries = [*traceback.walk_tb(error.__traceback__)][1:2]
    for frame, line in entries:
        return f" in line {line} of {os.path.basename(frame.f_code.co_filename)}"
    return ""
