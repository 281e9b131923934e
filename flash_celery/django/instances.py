"""A change's row as an instance of its Django model, as Django itself would have read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

from django.apps import apps
from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils import timezone
from psycopg import adapters
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.pq import Format
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.hstore import HstoreLoader
from psycopg.types.string import TextLoader

from ..changes.change import Change, Delete, Insert, Update
from ..changes.rows import UNCHANGED, Column
from ..errors import NoInstance, SubscriptionError
from ..handlers.subscriptions import table_name
from ..protocol.pgoutput import Cell
from ..table_name import TableName
from ..values.loading import Loader, or_text


class _NaiveLoader(TimestamptzLoader):
    """What USE_TZ = False makes of a point in time."""

    def load(self, data: Any) -> Any:
        return timezone.make_naive(super().load(data), timezone.get_default_timezone())


def instance(change: Change[Any], side: str | None, model: Any) -> Any:
    """The row of a change. Raises `NoInstance` where there is none, or no model for it."""
    if side is None:
        side = "old" if isinstance(change, Delete) else "new"
    cells, known = _row(change, side)
    model = _model_of(change) if model is None else _checked(change, model)
    alias = _alias(change)
    connection = connections[alias or DEFAULT_DB_ALIAS]
    told = {column.name: (column, cell) for column, cell in _told(change, cells, known)}
    names, values = [], []
    for field in model._meta.concrete_fields:
        if field.model._meta.concrete_model is not model._meta.concrete_model:
            continue  # in the table of a parent
        if field.column in told:
            names.append(field.attname)
            values.append(_value(*told[field.column], field, connection))
    _require_key(change, side, model, names)
    made = model.from_db(alias, names, values)
    if side == "old":
        # What it was is nowhere to be loaded from; what it is now would pass for it.
        made.refresh_from_db = partial(_refuse, repr(change), model._meta.label)
        made._state.adding = isinstance(change, Delete)
    return made


def _require_key(change: Change[Any], side: str, model: Any, names: Sequence[str]) -> None:
    """Django defers no primary key: without one an instance cannot even be printed."""
    for field in getattr(model._meta, "pk_fields", None) or [model._meta.pk]:
        if field.attname not in names:
            raise NoInstance(
                f"{change!r} does not tell {field.column}, the primary key of {model._meta.label}, "
                f"in its {side!r} row; take it into fields=, or set REPLICA IDENTITY FULL."
            )


def _row(change: Change[Any], side: str) -> tuple[Any, frozenset[str]]:
    """The cells of one side, and the columns that are known of it."""
    everything = frozenset(change._source.positions)
    if side == "new" and isinstance(change, (Insert, Update)):
        return change._new, everything
    if side == "old" and isinstance(change, Update):
        return (change._new if change._old is None else change._old), change._old_known()
    if side == "old" and isinstance(change, Delete):
        full = change._old_kind == "O"
        return change._old, everything if full else change._source.identity_columns
    raise NoInstance(
        f"{change!r} has no {side!r} row: an insert has 'new', a delete 'old', an update both, and "
        "others have none."
    )


def _told(change: Change[Any], cells: Any, known: frozenset[str]) -> Iterator[tuple[Column, Cell]]:
    """The columns that a handler may see, the key's included, with their text."""
    source = change._source
    for column, cell in zip(source.columns, cells, strict=True):
        told = column.delivered or column.name in source.key
        if told and column.name in known and cell is not UNCHANGED:
            yield column, cell


def _model_of(change: Change[Any]) -> Any:
    if not apps.models_ready:
        raise NoInstance(
            "change.instance() needs Django's models, and they are not loaded in this process: "
            "call django.setup() first."
        )
    found = _models(change.schema, change.table)
    if not found:
        raise NoInstance(
            f"No Django model has the table {TableName(change.schema, change.table)}; give one by "
            "change.instance(model=…), or use change.new and change.old."
        )
    if len(found) > 1:
        labels = ", ".join(one._meta.label for one in found)
        raise NoInstance(
            f"Several models have the table {TableName(change.schema, change.table)}: {labels}; "
            "say which by change.instance(model=…)."
        )
    return found[0]


def _models(schema: str, name: str) -> list[Any]:
    """The models of a table; those that only look at it stand back behind the one that makes it."""
    found = [one for one in apps.get_models(include_auto_created=True) if not one._meta.proxy]
    found = [one for one in found if table_name(one) == TableName(schema, name)]
    return [one for one in found if one._meta.managed] or found


def _checked(change: Change[Any], model: Any) -> Any:
    """A model of the user's choice. Raises `NoInstance` if it is not of the change's table."""
    try:
        table = table_name(model)
    except SubscriptionError as error:
        raise NoInstance(f"change.instance(model=…): {error}") from None
    if table != TableName(change.schema, change.table):
        raise NoInstance(
            f"{model._meta.label} is the model of {table}, and this is {change!r}; give a model of "
            "the change's table."
        )
    return model


def _alias(change: Change[Any]) -> str | None:
    """The database of the instance: DATABASES has it by the name of the source, or not at all."""
    alias = change.source or DEFAULT_DB_ALIAS
    return alias if alias in connections.databases else None


def _value(column: Column, cell: Cell, field: Any, connection: Any) -> Any:
    """As Django reads it: through its connection's loaders, then the field's own converters."""
    value = _load(column, cell) if isinstance(cell, bytes) else None
    expression = field.get_col(field.model._meta.db_table)
    for convert in expression.get_db_converters(connection):
        value = convert(value, expression, connection)
    return value


def _load(column: Column, text: bytes) -> Any:
    if column.fields:
        return column.load(text)
    return _loader(column.type_oid, column.type_name, settings.USE_TZ)(text)


@lru_cache(maxsize=2)
def _adapters(use_tz: bool) -> AdaptersMap:
    """The loaders of Django's own connection: what its fields decode stays text.

    Source: `get_adapters_template` in django.db.backends.postgresql.psycopg_any.
    """
    found = AdaptersMap(adapters)
    for name in ("jsonb", "inet", "cidr"):
        found.register_loader(name, TextLoader)
    if not use_tz:
        found.register_loader("timestamptz", _NaiveLoader)
    return found


@lru_cache(maxsize=1024)
def _loader(type_oid: int, type_name: str, use_tz: bool) -> Loader:
    # An extension's type has no fixed OID for psycopg to know it by.
    known = HstoreLoader(type_oid) if type_name == "hstore" else None
    return or_text((known or Transformer(_adapters(use_tz)).get_loader(type_oid, Format.TEXT)).load)


def _refuse(change: str, label: str, using: Any = None, fields: Any = None, **_: Any) -> None:
    """In place of `refresh_from_db`."""
    what = ", ".join(fields) if fields else "the row"
    raise NoInstance(
        f"{change} does not tell what {what} of {label} was, and it cannot be loaded any more; set "
        "REPLICA IDENTITY FULL on the table, or take the column into fields=."
    )
