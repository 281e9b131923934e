"""Checks that a subscription's table and columns exist and that their changes are in the WAL."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from ..errors import SubscriptionError, did_you_mean
from ..handlers.subscriptions import Subscription
from ..postgres import catalog, column_types
from ..postgres.catalog import CatalogTable
from ..table_name import TableName
from .requirements import REWRITES

_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


def find(connection: psycopg.Connection[Any], subscription: Subscription) -> CatalogTable:
    """Return the table of a subscription.

    Raises:
        SubscriptionError: There is no such table.
    """
    name, handler = subscription.table, subscription.handler
    table = catalog.find(connection, name)
    if table is None:
        rows = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        hint = did_you_mean(name, (TableName(*row) for row in rows)) or "."
        raise SubscriptionError(
            f"{handler}: there is no table {name} in the database {connection.info.dbname}{hint}"
        )
    if table.kind in _KINDS:
        raise SubscriptionError(
            f"{handler}: {name} is {_KINDS[table.kind]}, and only tables have changes in the WAL; "
            "name the tables it reads."
        )
    return table


def check(
    connection: psycopg.Connection[Any], subscription: Subscription, table: CatalogTable
) -> None:
    """Raise `SubscriptionError` if PostgreSQL would not send all changes of the table."""
    name, handler = table.name, subscription.handler
    unlogged = catalog.unlogged(connection, table)
    if unlogged is not None:
        raise SubscriptionError(
            f"{handler}: {unlogged} is unlogged, so its changes are not in the WAL: "
            f"ALTER TABLE {_sql(unlogged)} SET LOGGED; changes before that are not delivered."
        )
    rewrites = subscription.captured & REWRITES
    if table.kind == catalog.PARTITIONED and rewrites and not table.default_identity:
        but = " but a deferrable one" if table.primary_key else ""
        raise SubscriptionError(
            f"{handler}: {name} is partitioned and has no primary key{but}, so PostgreSQL would "
            "refuse UPDATE and DELETE on a partition attached later: ALTER TABLE "
            f"{quoted(table)} ADD PRIMARY KEY (…); or handle its partitions one by one."
        )


def check_columns(
    connection: psycopg.Connection[Any], subscription: Subscription, table: CatalogTable
) -> None:
    """Raise `SubscriptionError` for a missing or unpublished column, or an impossible condition."""
    handler = subscription.handler
    for column, reason in sorted(_required_columns(subscription).items()):
        if column not in table.columns:
            hint = did_you_mean(column, table.columns) or "."
            raise SubscriptionError(f"{handler}: {table.name} has no column {column}{reason}{hint}")
        generated = table.columns[column].generated
        if generated and (generated == "v" or connection.info.server_version < 180000):
            name = f"{table.name}.{column}{reason and reason + ','}"
            raise SubscriptionError(
                f"{handler}: {name} is a generated column, which this server does not publish; "
                "name the columns it is computed from."
            )
    _require_ordering_key(subscription, table)
    try:
        types = {column.name: column.type_oid for column in table.columns.values()}
        column_types.matcher(connection, table.oid, subscription.where, types)
    except SubscriptionError as error:
        raise SubscriptionError(f"{handler}: on {table.name}, {error}") from None


def _require_ordering_key(subscription: Subscription, table: CatalogTable) -> None:
    """Raise `SubscriptionError` if the changes are to be in the order of a key that is missing."""
    ordered = subscription.ordered
    if ordered is None or ordered.by or subscription.key:
        return
    if not (table.primary_key or table.index_key or table.default_identity):
        raise SubscriptionError(
            f"{subscription.handler}: {table.name} has no primary key for ordered=True; name the "
            "columns of the ordering key: ordered=[…]."
        )


def _required_columns(subscription: Subscription) -> dict[str, str]:
    """Return the required columns, each with the reason to show in an error."""
    columns = dict.fromkeys(subscription.columns, "")
    if (into := subscription.into) is not None:
        reason = f", which into={into.name} needs without a default"
        for field in into.fields:
            if field.required:
                columns.setdefault(field.column, reason)
    return columns


def quoted(table: CatalogTable) -> str:
    """Return the name of the table as SQL."""
    return _sql(table.name)


def _sql(name: TableName) -> str:
    return sql.Identifier(name.schema, name.name).as_string(None)
