"""Databases of Django's `DATABASES` as connection strings."""

from __future__ import annotations

from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo


def dsn(alias: str = DEFAULT_DB_ALIAS) -> str:
    """The connection string of a database; "" where Django has no settings, or another database."""
    if not settings.configured or connections[alias].vendor != "postgresql":
        return ""
    # The others are of psycopg or of Django.
    known = {one.keyword.decode() for one in Conninfo.get_defaults()}
    parameters = connections[alias].get_connection_params()
    given = {
        name: str(value)
        for name, value in parameters.items()
        if name in known and value is not None
    }
    return make_conninfo("", **given)
