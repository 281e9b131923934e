"""Checks of the server and the role: is logical replication possible there at all?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from ..errors import CatalogError, ConfigurationError, ReplicationError
from ..postgres.connection import APPLICATION_NAME, is_standby, overridden
from ..postgres.source import Source
from ..postgres.stream import ReplicationConnection
from ..settings import Settings
from . import standby_checks
from .findings import OK, STOP, WARNING, Finding, stop

_OLDEST = 140000
#: The newest version that the tests have run on.
_NEWEST = 19
#: The first version whose first logical slot raises the level of the WAL by itself.
_RAISES_LEVEL_SINCE = 190000
#: Files and sockets that a replication worker has open besides its spools.
_OTHER_FILES = 100
#: A name in a setting that is a list, with or without double quotes.
_LIST_ITEM = re.compile(r'"([^"]*)"|([^\s,"]+)')
# PostgreSQL lets `session_user` replicate, whatever a `role` setting makes of `current_user`.
_ROLE = """
SELECT current_user::text, session_user::text, current_database()::text,
       rolreplication OR rolsuper OR EXISTS (
           SELECT 1 FROM pg_roles g
           WHERE g.rolname = 'rds_replication' AND pg_has_role(session_user, g.oid, 'MEMBER')),
       has_database_privilege(current_database(), 'CREATE')
FROM pg_roles WHERE rolname = session_user
"""


@dataclass(frozen=True)
class Role:
    """The role of a connection, its database, and its privileges there."""

    name: str
    #: The role that logged in, which is another one if it has a `role` setting.
    login: str
    database: str
    replicates: bool
    creates: bool

    @classmethod
    def of(cls, connection: psycopg.Connection[Any]) -> Role:
        """Return the role of a connection."""
        row = connection.execute(_ROLE).fetchone()
        assert row is not None
        return cls(*row)

    def __str__(self) -> str:
        """Return the name as SQL."""
        return sql.Identifier(self.name).as_string(None)

    def finding(self) -> Finding:
        """Check that it may replicate."""
        if self.replicates:
            return Finding("role", OK, f"{self.login} may replicate")
        login = sql.Identifier(self.login).as_string(None)
        error = CatalogError(
            f"The role {self.login} may not replicate: ALTER ROLE {login} REPLICATION; "
            f"(on RDS: GRANT rds_replication TO {login};)"
        )
        return stop("role", error)


def findings(source: Source) -> Iterator[Finding]:
    """Check the version, the settings, and the needs of a standby."""
    connection, settings = source.connection, source.settings
    version, shown = connection.info.server_version, _setting(connection, "server_version")
    if version < _OLDEST:
        error = ConfigurationError(
            f"PostgreSQL {shown} is too old; versions 14 to {_NEWEST} are supported."
        )
        yield stop("server", error)
        return
    yield version_finding(version, shown)
    if is_standby(connection):
        yield from standby_checks.reading(source)
    elif settings.flash_failover_slot and version < standby_checks.FAILOVER_SINCE:
        error = ConfigurationError(
            f"flash_failover_slot needs PostgreSQL 17 or later, and this is {shown}: remove the "
            "setting; the slot does not survive a failover."
        )
        yield stop("failover", error)
    else:
        yield from _synchronous(connection)
    yield from _wal(connection)


def _synchronous(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Check that commits do not wait for `flash replicate`.

    Source: PostgreSQL documentation, "synchronous_standby_names"; names have no case there.
    """
    names = _setting(connection, "synchronous_standby_names")
    if {"*", APPLICATION_NAME} & set(re.findall(r"\*|\w+", names.lower())):
        yield Finding(
            "synchronous_standby_names",
            WARNING,
            f"{names}: counts `flash replicate` (application_name {APPLICATION_NAME}) as a "
            "synchronous standby, so that every commit of the server waits until the broker has "
            "its changes: ALTER SYSTEM SET synchronous_standby_names = 'the application_name of "
            "each standby'; SELECT pg_reload_conf();",
        )


#: The minor releases of August 2025, by their major version. Source: commits 4909b38af0 (in those
#: of May 2025) and d87d07b of PostgreSQL, which allocates less.
_FIRST_SOUND = {14: 19, 15: 14, 16: 10, 17: 6}
_LEAVES_ROWS_OUT = (
    "may not send rows that an open transaction writes to a table after the table was published"
)
_ENDS_DECODING = (
    "may fail for ever with `invalid memory alloc request size` where tables are created or "
    "altered while many transactions are open"
)


def version_finding(version: int, shown: str) -> Finding:
    """Return whether the tests have run on this version, and faults that it is known to have.

    Args:
        version: As libpq gives it, such as 180006.
        shown: As a reader knows it, such as 18.6.
    """
    if version >= (_NEWEST + 1) * 10000:
        message = (
            f"PostgreSQL {shown} is newer than {_NEWEST}, the newest version that flash-celery is "
            "tested with: look for a newer flash-celery, and try it on a copy first"
        )
        return Finding("server", WARNING, message)
    major, minor = divmod(version, 10000)
    if minor < _FIRST_SOUND.get(major, 0):
        fault = _ENDS_DECODING if minor == _FIRST_SOUND[major] - 1 else _LEAVES_ROWS_OUT
        message = f"PostgreSQL {shown} {fault}: upgrade to {major}.{_FIRST_SOUND[major]} or later"
        return Finding("server", WARNING, message)
    return Finding("server", OK, f"PostgreSQL {shown}")


def _wal_level(connection: psycopg.Connection[Any]) -> Finding:
    """Check that the WAL holds what decoding needs, or will once there is a slot.

    Source: PostgreSQL documentation, "effective_wal_level". It is the primary's, on standbys too.
    """
    level, required = _setting(connection, "wal_level"), "logical"
    if connection.info.server_version >= _RAISES_LEVEL_SINCE:
        effective = _setting(connection, "effective_wal_level")
        if is_standby(connection):
            return standby_checks.wal_level(level, effective)
        required = "replica"
        if level == required:
            message = f"{level}: the first logical slot raises it (effective_wal_level {effective})"
            return Finding("wal_level", OK, message)
    if level == "logical":
        return Finding("wal_level", OK, level)
    error = ConfigurationError(
        f"wal_level is {level}, and reading changes needs {required}: "
        f"ALTER SYSTEM SET wal_level = '{required}'; then restart PostgreSQL."
    )
    return stop("wal_level", error)


def _output_plugin(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Check that slots may use pgoutput, where the server restricts that.

    Source: PostgreSQL documentation, "output_plugin_libraries", since the releases of August 2026.
    """
    setting = "output_plugin_libraries"
    # A role without pg_read_all_settings does not see it: PostgreSQL refuses the slot then.
    query = "SELECT setting FROM pg_settings WHERE name = %s"
    row = connection.execute(query, [setting]).fetchone()
    if row is None:
        return
    (value,) = row
    names = [quoted or plain for quoted, plain in _LIST_ITEM.findall(value) if quoted or plain]
    if "pgoutput" in names:
        return
    # Each name is a string of its own: ALTER SYSTEM takes a whole list in one string for one name.
    allowed = [sql.Literal(name).as_string(None) for name in ["pgoutput", *names]]
    error = ConfigurationError(
        f"{setting} is '{value}', and reading changes needs pgoutput in it: "
        f"ALTER SYSTEM SET {setting} = {', '.join(allowed)}; SELECT pg_reload_conf();"
    )
    yield stop(setting, error)


def _wal(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    yield _wal_level(connection)
    yield from _output_plugin(connection)
    if _setting(connection, "server_encoding") == "SQL_ASCII":
        yield Finding(
            "encoding",
            WARNING,
            "SQL_ASCII: bytes of text that are not UTF-8 reach handlers as lone surrogates "
            "(docs/semantics.md), and a backfill stops at their row; dump the database and restore "
            "it into one with ENCODING 'UTF8'",
        )
    limit = _setting(connection, "max_slot_wal_keep_size")
    if limit == "-1":
        yield Finding(
            "max_slot_wal_keep_size",
            WARNING,
            "unlimited: while the slot has no reader, WAL piles up until the disk is full; with a "
            "limit (ALTER SYSTEM SET max_slot_wal_keep_size = '50GB') the slot is lost instead",
        )
    else:
        yield Finding("max_slot_wal_keep_size", OK, limit)


def open_files(source: Source) -> Iterator[Finding]:
    """Check the limit on open files: each large open transaction is spooled in a file."""
    limit = _open_files_limit()
    if not source.settings.flash_use_streaming or not limit:
        return
    names = "max_connections", "max_prepared_transactions"
    most = sum(int(_setting(source.connection, name)) for name in names)
    if limit < most + _OTHER_FILES:
        message = (
            f"{limit} may be open, and up to {most} transactions ({' and '.join(names)}) may be "
            f"spooled at once: ulimit -n {most + _OTHER_FILES} (systemd: LimitNOFILE)"
        )
        yield Finding("files", WARNING, message)


def room_for_a_slot(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Check that one more slot can be created and read.

    The slots of REPACK (CONCURRENTLY) do not count: PostgreSQL has max_repack_replication_slots for
    them.
    """
    for setting, used in (
        ("max_replication_slots", "pg_replication_slots WHERE plugin IS DISTINCT FROM 'pgrepack'"),
        ("max_wal_senders", "pg_stat_replication"),
    ):
        limit = int(_setting(connection, setting))
        query = f"SELECT count(*) FROM {used}"  # noqa: S608 - constants only
        (taken,) = connection.execute(query.encode()).fetchone() or (0,)
        if taken >= limit:
            error = ConfigurationError(
                f"All {limit} of {setting} are in use; free one, or "
                f"ALTER SYSTEM SET {setting} = {limit + 5}; then restart PostgreSQL."
            )
            yield stop(setting, error)
        else:
            yield Finding(setting, OK, f"{taken} of {limit} in use")


def session_findings(settings: Settings) -> Iterator[Finding]:
    """List the settings that our connections override."""
    names = overridden(settings.require_dsn())
    if names:
        yield Finding("session settings", OK, f"{', '.join(names)}: not used by flash-celery")


def can_stream(settings: Settings) -> Finding:
    """Check that a replication connection can be opened; poolers do not support one."""
    dsn = settings.require_dsn()
    try:
        ReplicationConnection(dsn).close()
    except ReplicationError as error:
        hint = (
            f"{settings.called('flash_dsn')} must lead to PostgreSQL itself, not to a pooler, and "
            "pg_hba.conf must allow it"
        )
        return Finding("replication connection", STOP, f"{str(error)[:-1]}; {hint}", error)
    return Finding("replication connection", OK, "works")


def _setting(connection: psycopg.Connection[Any], name: str) -> str:
    row = connection.execute("SELECT current_setting(%s, true)", [name]).fetchone()
    return str(row[0] if row else None)


def _open_files_limit() -> int:
    """Return how many files this process may have open; 0 if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return max(0, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
