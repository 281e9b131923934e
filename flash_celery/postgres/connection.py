"""Connecting to PostgreSQL: session settings, errors that may be shown, and ordinary connections.

The replication connection of `stream.py` is opened here too, with the same session settings.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator
from typing import Any

import psycopg
from psycopg import conninfo, pq

from ..errors import (
    ConfigurationError,
    CredentialsError,
    FlashError,
    ReplicationError,
    WrongCredentials,
)
from ..escaping import one_line
from ..settings import Settings

#: The session settings of each of our connections, by their names in pg_settings: text has one
#: meaning, and SQL too, whatever the environment, the DSN, the role or the database sets.
PINNED = {
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "timezone_abbreviations": "Default",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "array_nulls": "on",
    "xmloption": "content",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "exit_on_error": "off",
    # PostgreSQL would compile the looks of each second at thousands of tables, for which it takes
    # many times as long as for running them.
    "jit": "off",
    # PostgreSQL 18 says by a warning that it leaves out a missing publication.
    "client_min_messages": "notice",
    # Our commits wait for no synchronous standby: `flash replicate` may be the one that they would
    # wait for (synchronous_standby_names = '*').
    "synchronous_commit": "local",
}
#: The server's limits on clients, which are switched off unless the DSN, the service or PGOPTIONS
#: sets them. `transaction_timeout` exists since PostgreSQL 17.
LIMITS = (
    "statement_timeout",
    "lock_timeout",
    "transaction_timeout",
    "idle_session_timeout",
    "idle_in_transaction_session_timeout",
)
#: Repeated at the start of a connection, where a pooler refuses them.
_STARTUP = (
    "-c datestyle=ISO,MDY -c intervalstyle=postgres -c extra_float_digits=3 -c timezone=UTC "
    "-c client_encoding=UTF8 -c synchronous_commit=local"
)
_PINS = """
FROM (VALUES {values}) AS pin (name, value)
JOIN pg_settings AS s USING (name)
WHERE (name <> ALL ('{{{limits}}}') OR s.source <> 'client')
""".format(
    values=", ".join(
        f"('{name}', '{value}')" for name, value in [*PINNED.items(), *((n, "0") for n in LIMITS)]
    ),
    limits=",".join(LIMITS),
)
#: Names of our SQL mean PostgreSQL's own objects, wherever `search_path` has pg_catalog. Its other
#: schemas stay, because functions of event triggers may need them.
_PIN_CATALOG = """
SELECT pg_catalog.set_config(
    'search_path', 'pg_catalog, ' || pg_catalog.current_setting('search_path'), false)
WHERE 'pg_catalog'::pg_catalog.name OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(false))
"""
_PIN = f"SELECT name, value, set_config(name, value, false) {_PINS}"
_OVERRIDDEN = f"""
SELECT name, s.setting || coalesce(s.unit, ''), s.source {_PINS}
  AND s.setting <> value AND s.source IN ('client', 'database', 'user', 'database user')
ORDER BY name
"""
_ORIGINS = {
    "client": "of the DSN or the environment",
    "database": "of the database",
    "user": "of the role",
    "database user": "of the role in this database",
}
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
        limited = gen if math.isinf(self.patience) else self._limited(gen)
        return super().wait(limited, *args, **kwargs)

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


def connect(
    dsn: str, patience: float = float("inf"), replication: bool = False
) -> psycopg.Connection[Any]:
    """Open a connection in autocommit mode, with the session settings of `PINNED`.

    Args:
        dsn: Where to connect, as libpq reads it.
        patience: The seconds after which a statement that still runs closes the connection.
        replication: Whether it is a replication connection to the database.

    Raises:
        ReplicationError: The server cannot be reached, or keeps another setting.
    """
    parameters = {"replication": "database"} if replication else {}
    try:
        connection = _Connection.connect(pinned(dsn, **parameters), autocommit=True)
        connection.patience = patience
        try:
            _pin(connection, replication)
        except BaseException:
            connection.close()
            raise
    except psycopg.Error as error:
        raise unreachable(error, dsn) from None
    return connection


def _pin(connection: psycopg.Connection[Any], replication: bool) -> None:
    """Set what libpq's own startup parameters (PGTZ, PGDATESTYLE) override, and read it back."""
    connection.execute(_PIN_CATALOG.encode())
    for name, value, actual in connection.execute(_PIN.encode()).fetchall():
        if actual != value:
            raise ReplicationError(
                f"PostgreSQL keeps {name} at {actual}, and {value} is needed; is a pooler between?"
            )
    if replication:
        # PostgreSQL lets the login role replicate, which may have another role as a setting.
        connection.execute("SET ROLE NONE")


def overridden(dsn: str) -> list[str]:
    """Return the settings of environment, DSN, role and database that `connect` overrides.

    Raises:
        ReplicationError: The server cannot be reached.
    """
    parameters = {"connect_timeout": _effective(dsn).get("connect_timeout", 10)}
    plain = conninfo.make_conninfo(dsn, **parameters)
    try:
        with psycopg.connect(plain, autocommit=True) as connection:
            rows = connection.execute(_OVERRIDDEN.encode()).fetchall()
    except psycopg.Error as error:
        raise unreachable(error, dsn) from None
    # Text of a session in SQL_ASCII is bytes.
    texts = [[v.decode() if isinstance(v, bytes) else v for v in row] for row in rows]
    return [f"{name} = {value} {_ORIGINS[origin]}" for name, value, origin in texts]


def is_standby(connection: psycopg.Connection[Any]) -> bool:
    """Return whether the server is a standby, which accepts no writes."""
    return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)


def pinned(dsn: str, **parameters: Any) -> str:
    """Return the DSN with our session settings and timeouts; the user's own `options` are kept.

    These are of the DSN, of a service file, or of PGOPTIONS, whichever libpq uses.
    """
    given = _effective(dsn)
    parameters.setdefault("application_name", APPLICATION_NAME)
    parameters.setdefault("connect_timeout", given.get("connect_timeout", 10))
    for name, value in _KEEPALIVE.items():
        parameters.setdefault(name, given.get(name, value))
    parameters["options"] = f"{given.get('options', '')} {_STARTUP}".strip()
    # A parameter beats PGCLIENTENCODING, which the server would apply after `options`.
    parameters["client_encoding"] = PINNED["client_encoding"]
    return conninfo.make_conninfo(dsn, **parameters)


def _effective(dsn: str) -> dict[str, str]:
    """Return the parameters of the DSN, completed from its service and the environment.

    Only a connection attempt makes libpq read a service that the DSN names: this one fails before
    any network traffic, because no server listens in a directory that does not exist.
    """
    attempt = conninfo.make_conninfo(dsn, host="/nonexistent", hostaddr="")
    connection = pq.PGconn.connect_start(attempt.encode())
    try:
        options = {option.keyword.decode(): option.val for option in connection.info}
    finally:
        connection.finish()
    given = {name: value.decode() for name, value in options.items() if value}
    return {**given, **{name: str(v) for name, v in conninfo.conninfo_to_dict(dsn).items()}}


def without_password(text: str, dsn: str) -> str:
    """Return an error message of libpq's without the password of the DSN."""
    try:
        password = conninfo.conninfo_to_dict(dsn).get("password")
    except psycopg.Error:
        password = None
    shown = re.sub(r"(?i)(password=)\S+|(//[^:/@\s]*:)[^@\s]+@", r"\1\2…", text)
    return shown.replace(str(password), "…") if password else shown


def unreachable(error: psycopg.Error, dsn: str = "") -> ReplicationError:
    """Return a failure of a connection as an error that may be shown.

    `dsn` is the one that it was opened with; without it, only what looks like a password is hidden.
    """
    text = one_line(without_password(str(error), dsn)).rstrip(".")
    return ReplicationError(f"The connection to PostgreSQL failed: {text}.")


def raise_if_fatal(error: FlashError, settings: Settings) -> None:
    """Raise `ConfigurationError` if connecting failed for a reason that a retry cannot fix."""
    if isinstance(error, WrongCredentials):
        raise ConfigurationError(str(error)) from None
    if isinstance(error, CredentialsError):
        return  # what it quotes are names of the user's
    if isinstance(error, ReplicationError) and _FATAL.search(str(error)):
        names = [
            "flash_dsn",
            *(["flash_password_command"] if settings.flash_password_command else []),
        ]
        where = " and ".join(map(settings.called, names))
        raise ConfigurationError(_with_hint(str(error), where)) from error


def _with_hint(message: str, dsn: str) -> str:
    if "unsupported startup parameter" in message:
        return f"{message[:-1]}; this is a pooler: {dsn} must lead to PostgreSQL itself."
    if "certificate" in message or "SSL" in message:
        return (
            f"{message[:-1]}; correct the host, sslmode and sslrootcert of {dsn}, or the server's "
            "certificate."
        )
    return f"{message[:-1]}; correct {dsn}, or the server's roles and pg_hba.conf."
