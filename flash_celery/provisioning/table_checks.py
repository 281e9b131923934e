"""Whether a subscription's table and columns are there, and can be read from the WAL."""

from __future__ import annotations

import difflib
from typing import Any

import psycopg
from psycopg import sql

from ..errors import SubscriptionError
from ..handlers.subscriptions import Subscription
from ..postgres import catalog, column_types
from ..postgres.catalog import CatalogTable
from ..table_name import TableName
from .publications import REWRITES

_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


def find(connection: psycopg.Connection[Any], subscription: Subscription) -> CatalogTable:
    """The table of a subscription. Raises `SubscriptionError` if there is none."""
    name, who = subscription.table, subscription.handler
    table = catalog.find(connection, name)
    if table is None:
        rows = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        close = _close(str(name), [str(TableName(*row)) for row in rows])
        raise SubscriptionError(
            f"{who}: there is no table {name} in the database {connection.info.dbname}{close}"
        )
    if table.kind in _KINDS:
        raise SubscriptionError(
            f"{who}: {name} is {_KINDS[table.kind]}, and only tables have changes in the WAL; "
            "name the tables it reads."
        )
    return table


def check(
    connection: psycopg.Connection[Any], subscription: Subscription, table: CatalogTable
) -> None:
    """Raise `SubscriptionError` if not all of its changes can be read."""
    name, who = table.name, subscription.handler
    unlogged = catalog.unlogged(connection, table)
    if unlogged is not None:
        raise SubscriptionError(
            f"{who}: {unlogged} is unlogged, so its changes are not in the WAL: "
            f"ALTER TABLE {_sql(unlogged)} SET LOGGED; what is written until then is not told."
        )
    rewrites = subscription.captured & REWRITES
    if table.kind == catalog.PARTITIONED and rewrites and not table.default_identity:
        kind = " but a deferrable one" if table.primary_key else ""
        raise SubscriptionError(
            f"{who}: {name} is partitioned and has no primary key{kind}, so PostgreSQL would "
            "refuse UPDATE and DELETE on a partition attached later: ALTER TABLE "
            f"{quoted(table)} ADD PRIMARY KEY (…); or handle its partitions one by one."
        )


def check_columns(
    connection: psycopg.Connection[Any], subscription: Subscription, table: CatalogTable
) -> None:
    """Raise `SubscriptionError` if it names a column or compares a value that cannot be."""
    who = subscription.handler
    for column, why in sorted(_needed(subscription).items()):
        if column not in table.columns:
            close = _close(column, list(table.columns))
            raise SubscriptionError(f"{who}: {table.name} has no column {column}{why}{close}")
        generated = table.columns[column].generated
        if generated and (generated == "v" or connection.info.server_version < 180000):
            named = f"{table.name}.{column}{why and why + ','}"
            raise SubscriptionError(
                f"{who}: {named} is a generated column, which this server does not publish; "
                "name the columns it is made of."
            )
    try:
        types = {column.name: column.type_oid for column in table.columns.values()}
        column_types.matcher(connection, table.oid, subscription.where, types)
    except SubscriptionError as error:
        raise SubscriptionError(f"{who}: on {table.name}, {error}") from None


def _needed(subscription: Subscription) -> dict[str, str]:
    """The columns that must be there, and why where that is not said in so many words."""
    needed = dict.fromkeys(subscription.columns, "")
    if (into := subscription.into) is not None:
        why = f", which into={into.name} needs without a default"
        for field in into.fields:
            if field.required:
                needed.setdefault(field.column, why)
    return needed


def _close(name: str, known: list[str]) -> str:
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"; did you mean {folded[close[0]]}?" if close else "."


def quoted(table: CatalogTable) -> str:
    """Its name as SQL."""
    return _sql(table.name)


def _sql(name: TableName) -> str:
    return sql.Identifier(name.schema, name.name).as_string(None)
