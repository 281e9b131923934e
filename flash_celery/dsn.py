"""Connection strings: whether libpq reads one as it is meant, where it leads, and Django's own."""

from __future__ import annotations

import sys
from typing import Any

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict


def is_readable(dsn: str) -> bool:
    """Whether it is a connection string. What libpq says of one that is not may hold a password."""
    try:
        conninfo_to_dict(dsn)
    except ProgrammingError:
        return False
    return not _misread(dsn)


def place_of(dsn: str) -> tuple[list[Any], Any]:
    """The server that a DSN leads to and the database there, as far as its text says."""
    try:
        given = conninfo_to_dict(dsn)
    except ProgrammingError:
        return [dsn], None  # it will be refused where it is used
    server = [given.get(part) for part in ("service", "host", "hostaddr")]
    return [*server, str(given.get("port", 5432))], given.get("dbname", given.get("user"))


def of_django() -> str:
    """`DATABASES["default"]` as a connection string, where Django is in use and has one."""
    if "django.conf" not in sys.modules:
        return ""
    from .django.dsn import dsn

    return dsn()


def _misread(dsn: str) -> bool:
    """Whether a part of the password passes for the host, which errors name."""
    rest = dsn.removeprefix("postgresql://").removeprefix("postgres://")
    if rest == dsn:
        return False
    credentials, _, beyond = rest.partition("@")
    return "@" in (rest if "/" in credentials else beyond).partition("?")[0]
