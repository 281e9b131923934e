"""Connecting to PostgreSQL: session settings, errors that may be shown, and ordinary connections.

The replication connection, which `stream.py` makes, shares the session settings and the errors.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator
from typing import Any

import psycopg
from psycopg import conninfo

from ..errors import ConfigurationError, FlashError, ReplicationError
from ..escaping import one_line
from ..settings import Settings

#: The session settings of PostgreSQL's own subscriber: text has one meaning, whatever the server's
#: or the role's defaults are. Our commits wait for no synchronous standby: `flash replicate` may be
#: the one that they would wait for (synchronous_standby_names = '*').
PINNED = (
    "-c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3 -c timezone=UTC "
    "-c client_encoding=UTF8 -c synchronous_commit=local"
)
#: The name of our connections in pg_stat_activity.
APPLICATION_NAME = "flash_celery"
#: A dead connection is noticed within a minute, by the kernel too.
_KEEPALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
#: libpq's messages for failures that a retry cannot fix; it gives no SQLSTATE for them.
_FATAL = re.compile(
    r"authentication failed|no password supplied|does not exist|pg_hba\.conf|permission denied|"
    r"unsupported startup parameter|not permitted to log in|invalid connection option|"
    r"must be superuser or replication role|certificate|private key file|SSL was required"
)


class _Connection(psycopg.Connection[Any]):
    """A connection that limits how long a statement may take, even if the server is silent.

    `statement_timeout` would not do: the server enforces it, and its error cannot arrive over a
    dead connection.
    """

    #: Seconds that a statement may take.
    patience = float("inf")

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for a statement as psycopg does. Raise `OperationalError` after `patience` seconds.

        psycopg waits in short intervals and resumes `gen` with 0 after one in which nothing
        happened.
        """
        return super().wait(self._limited(gen), *args, **kwargs)

    def _limited(self, statement: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        deadline = time.monotonic() + self.patience
        try:
            direction = next(statement)
            while True:
                ready = yield direction
                if not ready and time.monotonic() > deadline:
                    self.close()
                    raise psycopg.OperationalError(
                        f"a statement has not been answered for {self.patience:.0f} s"
                    )
                direction = statement.send(ready)
        except StopIteration as done:
            return done.value


def connect(dsn: str, patience: float = float("inf")) -> psycopg.Connection[Any]:
    """Open an ordinary connection in autocommit mode.

    A statement that takes longer than `patience` seconds closes the connection.
    Raises `ReplicationError` if the server cannot be reached.
    """
    try:
        connection = _Connection.connect(pinned(dsn), autocommit=True)
    except psycopg.OperationalError as error:
        raise unreachable(error, dsn) from None
    connection.patience = patience
    return connection


def is_standby(connection: psycopg.Connection[Any]) -> bool:
    """Return whether the server is a standby, which accepts no writes."""
    return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)


def pinned(dsn: str, **parameters: Any) -> str:
    """Return the DSN with our session settings and timeouts; the user's own `options` are kept."""
    given = conninfo.conninfo_to_dict(dsn)
    parameters.setdefault("application_name", APPLICATION_NAME)
    parameters.setdefault("connect_timeout", given.get("connect_timeout", 10))
    for name, value in _KEEPALIVE.items():
        parameters.setdefault(name, given.get(name, value))
    parameters["options"] = f"{given.get('options', '')} {PINNED}".strip()
    return conninfo.make_conninfo(dsn, **parameters)


def without_password(text: str, dsn: str) -> str:
    """Return an error message of libpq's without the password of the DSN."""
    try:
        password = conninfo.conninfo_to_dict(dsn).get("password")
    except psycopg.Error:
        password = None
    shown = re.sub(r"(?i)(password=)\S+|(//[^:/@\s]*:)[^@\s]+@", r"\1\2…", text)
    return shown.replace(str(password), "…") if password else shown


def unreachable(error: psycopg.Error, dsn: str) -> ReplicationError:
    """Return a failure to connect as an error that may be shown."""
    text = one_line(without_password(str(error), dsn)).rstrip(".")
    return ReplicationError(f"The connection to PostgreSQL failed: {text}.")


def raise_if_fatal(error: FlashError, settings: Settings) -> None:
    """Raise `ConfigurationError` if connecting failed for a reason that a retry cannot fix."""
    if isinstance(error, ReplicationError) and _FATAL.search(str(error)):
        raise ConfigurationError(_with_hint(str(error), settings.called("flash_dsn"))) from error


def _with_hint(message: str, dsn: str) -> str:
    if "unsupported startup parameter" in message:
        return f"{message[:-1]}; this is a pooler: {dsn} must lead to PostgreSQL itself."
    if "certificate" in message or "SSL" in message:
        return (
            f"{message[:-1]}; correct the host, sslmode and sslrootcert of {dsn}, or the server's "
            "certificate."
        )
    return f"{message[:-1]}; correct {dsn}, or the server's roles and pg_hba.conf."
