"""Convert databases of Django's `DATABASES` to connection strings."""

from __future__ import annotations

from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo


def dsn(alias: str = DEFAULT_DB_ALIAS) -> str:
    """Return the connection string of a database, with its password.

    Args:
        alias: The name in `DATABASES`.

    Return "" if Django has no settings, or the database is not PostgreSQL.

    With `functools.partial(dsn, "billing")` as the `dsn` of a source, the database is asked at each
    connect.
    """
    if not is_postgresql(alias):
        return ""
    # Django's parameters include some that psycopg or Django itself reads, not libpq.
    keywords = {option.keyword.decode() for option in Conninfo.get_defaults()}
    parameters = {
        name: str(value)
        for name, value in connections[alias].get_connection_params().items()
        if name in keywords and value is not None
    }
    return make_conninfo("", **parameters)


def is_postgresql(alias: str = DEFAULT_DB_ALIAS) -> bool:
    """Return whether Django has settings, and the database is PostgreSQL."""
    return bool(settings.configured) and connections[alias].vendor == "postgresql"
