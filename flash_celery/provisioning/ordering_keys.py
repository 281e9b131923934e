"""The ordering keys of ordered handlers as the catalog has them when a session begins.

The lane of a change is a hash of the text of its key. If a table gets another primary key, changes
of one row may go to another lane than before, so the lanes have to be empty first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import psycopg

from ..handlers.subscriptions import Subscription, of_patterns
from ..postgres import catalog, column_types
from ..postgres.catalog import CatalogTable

#: The names of a key's columns, each with the name of its type.
Key = tuple[tuple[str, str], ...]
#: The keys that a table and its partitions have, by handler and by number of the subscription.
OrderingKeys = Mapping[tuple[str, int], frozenset[Key]]


def read(
    connection: psycopg.Connection[Any], subscriptions: Iterable[Subscription]
) -> OrderingKeys:
    """Return the ordering keys of all ordered subscriptions whose table exists."""
    keys: dict[tuple[str, int], frozenset[Key]] = {}
    subscriptions = [each for each in subscriptions if each.ordered is not None]
    matching = catalog.matching(
        connection, [each.pattern for each in of_patterns(subscriptions) if each.pattern]
    )
    for subscription in subscriptions:
        found = frozenset[Key]([()])  # a logical message has none
        if subscription.pattern is not None:
            found = _keys_of_pattern(connection, subscription, matching)
        elif subscription.prefix is None:
            table = catalog.find(connection, subscription.table)
            if table is None:
                continue
            found = _keys(connection, subscription, table)
        keys[subscription.handler, subscription.number] = found
    return keys


def _keys_of_pattern(
    connection: psycopg.Connection[Any],
    subscription: Subscription,
    tables: Iterable[CatalogTable],
) -> frozenset[Key]:
    """Return the keys of all tables that match. Thousands of them have few different ones."""
    one_of_each = {
        (table.kind, table.primary_key, table.index_key, tuple(table.columns.values())): table
        for table in tables
        if subscription.is_on(table.name)
    }
    keys = (_keys(connection, subscription, table) for table in one_of_each.values())
    return frozenset[Key]().union(*keys)


def _keys(
    connection: psycopg.Connection[Any], subscription: Subscription, table: CatalogTable
) -> frozenset[Key]:
    order = subscription.ordered
    named = (order.by if order is not None else None) or subscription.key
    if named and not table.columns.keys() >= set(named):
        return frozenset()  # a table of a pattern that is left out
    columns = [tuple(named)] if named else catalog.row_keys(connection, table)
    oids = {name: table.columns[name].type_oid for key in columns for name in key}
    types = column_types.describe(connection, oids.values())
    return frozenset(
        tuple((name, types.get(oids[name], column_types.TEXT).name) for name in key)
        for key in columns
    )
