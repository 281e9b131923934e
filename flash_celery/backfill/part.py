"""The part of a table that `flash backfill --where` names, as SQL.

The lookups are recorded as they were given. SQL that is read from a table would run with
the privileges of the replication worker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import sql

from ..conditions import parsing
from ..conditions.parsing import Condition
from ..errors import ConfigurationError, SubscriptionError
from ..postgres.catalog import CatalogTable
from ..provisioning import narrowing


def condition_of(lookups: Sequence[str]) -> Condition:
    """Read lookups such as `status=paid` or `id__in=[1, 2]`, which must all match.

    A value is text as SQL has it between quotes, `true` or `false` after `__isnull`, and a list in
    JSON for the lookups that take one.

    Raises:
        ConfigurationError: One is no lookup.
    """
    where: dict[str, Any] = {}
    for lookup in lookups:
        name, separator, text = lookup.partition("=")
        if not separator or not name or name in where:
            raise ConfigurationError(
                f"--where takes a lookup such as status=paid, once for each, not {lookup!r}."
            )
        where[name] = _value(name, text)
    try:
        condition = parsing.parse(where)
    except SubscriptionError as error:
        raise ConfigurationError(f"--where: {error}") from None
    assert condition is not None
    return condition


def _value(name: str, text: str) -> Any:
    if name.rpartition("__")[2] not in (*parsing.LISTS, "isnull"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigurationError(
            f"--where {name} takes JSON, such as [1, 2], not {text}."
        ) from None


def expression_of(
    connection: psycopg.Connection[Any], table: CatalogTable, lookups: Sequence[str]
) -> sql.Composable:
    """Return the condition in SQL, exactly as a handler's `where` evaluates it.

    Raises:
        ConfigurationError: The table lacks a column, or PostgreSQL cannot evaluate it so.
    """
    condition = condition_of(lookups)
    missing = sorted(condition.columns - table.columns.keys())
    if missing:
        raise ConfigurationError(f"--where names {', '.join(missing)}, no column of {table.name}.")
    try:
        translated = narrowing.filter_of(connection, table, condition)
    except SubscriptionError as error:
        raise ConfigurationError(f"--where: {error}") from None
    if translated.omitted or translated.expression is None:
        raise ConfigurationError(
            f"--where has what PostgreSQL does not evaluate as a handler's where does: "
            f"{'; '.join(translated.omitted)}. Leave it out."
        )
    return translated.expression
