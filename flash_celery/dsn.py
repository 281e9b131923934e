"""Connection strings: validate them, find the server they lead to, and get Django's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict


def is_readable(dsn: str) -> bool:
    """Return whether libpq reads the string as it was meant.

    libpq's own error is not shown, because it may contain the password.
    """
    try:
        conninfo_to_dict(dsn)
    except ProgrammingError:
        return False
    return not _password_in_host(dsn)


def place_of(dsn: str) -> tuple[list[Any], Any]:
    """Return the server and the database that a DSN names, for comparison with another DSN."""
    try:
        parameters = conninfo_to_dict(dsn)
    except ProgrammingError:
        return [dsn], None  # it is refused where it is used
    server = [parameters.get(part) for part in ("service", "host", "hostaddr")]
    database = parameters.get("dbname", parameters.get("user"))
    return [*server, str(parameters.get("port", 5432))], database


def of_django() -> str | Callable[[], str]:
    """Return what returns the DSN of `DATABASES["default"]`, or "" if there is none.

    A custom database backend may have another password for each connection.
    """
    if "django.conf" not in sys.modules:
        return ""
    from .django.dsn import dsn, is_postgresql

    return dsn if is_postgresql() else ""


def _password_in_host(dsn: str) -> bool:
    """Return whether libpq takes a part of the password for the host, which errors show."""
    rest = dsn.removeprefix("postgresql://").removeprefix("postgres://")
    if rest == dsn:
        return False
    credentials, _, after = rest.partition("@")
    return "@" in (rest if "/" in credentials else after).partition("?")[0]
