"""Convert a change's row to an instance of its Django model, as Django would have read it."""

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
from ..values.loading import Loader, array_loader, field_loader, or_text, record_loader


class _NaiveLoader(TimestamptzLoader):
    """A loader of `timestamptz` as a naive datetime, for USE_TZ = False."""

    def load(self, data: Any) -> Any:
        return timezone.make_naive(super().load(data), timezone.get_default_timezone())


def instance(change: Change[Any], side: str | None, model: Any) -> Any:
    """Return the row of a change as an instance of a model.

    Args:
        change: The change.
        side: `"old"` or `"new"`; None is "old" for a delete and "new" otherwise.
        model: The model; None is the model of the change's table.

    Raises:
        NoInstance: The change has no such row, or the table has no model.
    """
    if side is None:
        side = "old" if isinstance(change, Delete) else "new"
    cells, known_columns = _row(change, side)
    model = _model_of(change) if model is None else _checked(change, model)
    alias = _alias(change)
    connection = connections[alias or DEFAULT_DB_ALIAS]
    delivered = {
        column.name: (column, cell) for column, cell in _delivered(change, cells, known_columns)
    }
    names, values = [], []
    for field in model._meta.concrete_fields:
        if field.model._meta.concrete_model is not model._meta.concrete_model:
            continue  # it is in the table of a parent model
        if field.column in delivered:
            column, cell = delivered[field.column]
            names.append(field.attname)
            values.append(_value(column, cell, field, connection))
    _require_key(change, side, model, names)
    loaded = model.from_db(alias, names, values)
    if side == "old":
        # Loading a deferred field would return the present value as if it were the old one.
        loaded.refresh_from_db = partial(_refuse, repr(change), model._meta.label)
        loaded._state.adding = isinstance(change, Delete)
    return loaded


def _require_key(change: Change[Any], side: str, model: Any, names: Sequence[str]) -> None:
    """Raise `NoInstance` unless the key is delivered: Django cannot defer a primary key."""
    for field in getattr(model._meta, "pk_fields", None) or [model._meta.pk]:
        if field.attname not in names:
            raise NoInstance(
                f"{change!r} has no value for {field.column}, the primary key of "
                f"{model._meta.label}, in its {side!r} row; add the column to fields=, or set "
                "REPLICA IDENTITY FULL."
            )


def _row(change: Change[Any], side: str) -> tuple[Any, frozenset[str]]:
    """Return the cells of one side, and the names of the columns that PostgreSQL sent of it."""
    all_columns = frozenset(change._source.positions)
    if side == "new" and isinstance(change, (Insert, Update)):
        return change._new, all_columns
    if side == "old" and isinstance(change, Update):
        return (change._new if change._old is None else change._old), change._old_known()
    if side == "old" and isinstance(change, Delete):
        full = change._old_kind == "O"
        return change._old, all_columns if full else change._source.identity_columns
    raise NoInstance(
        f"{change!r} has no {side!r} row: an insert has 'new', a delete has 'old', an update has "
        "both, and other changes have none."
    )


def _delivered(
    change: Change[Any], cells: Any, known_columns: frozenset[str]
) -> Iterator[tuple[Column, Cell]]:
    """Yield the columns that are delivered to the handler, and those of the key, with cells."""
    source = change._source
    for column, cell in zip(source.columns, cells, strict=True):
        delivered = column.delivered or column.name in source.key
        if delivered and column.name in known_columns and cell is not UNCHANGED:
            yield column, cell


def _model_of(change: Change[Any]) -> Any:
    if not apps.models_ready:
        raise NoInstance(
            "change.instance() needs Django's models, which are not loaded in this process; call "
            "django.setup() first."
        )
    table = TableName(change.schema, change.table)
    models = models_of(table)
    if not models:
        raise NoInstance(
            f"No Django model has the table {table}; pass one as change.instance(model=…), or use "
            "change.new and change.old."
        )
    if len(models) > 1:
        labels = ", ".join(model._meta.label for model in models)
        raise NoInstance(
            f"Several models have the table {table}: {labels}; choose one with "
            "change.instance(model=…)."
        )
    return models[0]


def models_of(table: TableName) -> list[Any]:
    """Return the models of a table; only the managed ones if there are any."""
    models = _managed([model for model in _all_models() if table_name(model) == table])
    return models or _models_without_schema(table)


def _models_without_schema(table: TableName) -> list[Any]:
    """Return the models whose table has this name in whichever schema the search path finds it.

    So it is in projects with a schema for each tenant. There are none if a model names the schema:
    its tables are those of the models that do.
    """
    models = _all_models()
    if any(_names_schema(model) and table_name(model).schema == table.schema for model in models):
        return []
    return _managed([model for model in models if _may_be_in(model, table)])


def _all_models() -> list[Any]:
    return [model for model in apps.get_models(include_auto_created=True) if not model._meta.proxy]


def _managed(models: list[Any]) -> list[Any]:
    return [model for model in models if model._meta.managed] or models


def _names_schema(model: Any) -> bool:
    """Return whether the model's `db_table` names a schema, as `"sales"."orders"` does."""
    db_table = str(model._meta.db_table)
    return table_name(model).name != db_table.strip('"')


def _may_be_in(model: Any, table: TableName) -> bool:
    return not _names_schema(model) and table_name(model).name == table.name


def _checked(change: Change[Any], model: Any) -> Any:
    """Return the model if its table is the change's, or raise `NoInstance`."""
    try:
        table = table_name(model)
    except SubscriptionError as error:
        raise NoInstance(f"change.instance(model=…): {error}") from None
    changed_table = TableName(change.schema, change.table)
    if table != changed_table and not _may_be_in(model, changed_table):
        raise NoInstance(
            f"{model._meta.label} is a model of {table}, and the change is {change!r}; pass a "
            "model of the change's table."
        )
    return model


def _alias(change: Change[Any]) -> str | None:
    """Return the instance's alias in DATABASES, the name of the source; None if it has none."""
    alias = change.source or DEFAULT_DB_ALIAS
    return alias if alias in connections.databases else None


def _value(column: Column, cell: Cell, field: Any, connection: Any) -> Any:
    """Convert a cell as Django does: with its connection's loaders, then the field's converters."""
    value = _load(column, cell, field, connection) if isinstance(cell, bytes) else None
    expression = field.get_col(field.model._meta.db_table)
    for convert in expression.get_db_converters(connection):
        value = convert(value, expression, connection)
    return value


def _load(column: Column, text: bytes, field: Any, connection: Any) -> Any:
    if column.fields:
        return _composite_loader(column)(text)
    load = None
    if adapters.types.get(column.type_oid) is None:
        shape = _shape(field, connection)
        load = _extension_loader(column.type_oid, column.type_name, *shape)
    return (load or _loader(column.type_oid, settings.USE_TZ))(text)


def _shape(field: Any, connection: Any) -> tuple[bool, bool]:
    """Return whether a field is an `ArrayField`, and whether it is or holds an `HStoreField`."""
    is_array = False
    while base := getattr(field, "base_field", None):
        is_array, field = True, base
    return is_array, field.db_type(connection) == "hstore"


@lru_cache(maxsize=1024)
def _composite_loader(column: Column) -> Loader:
    """Return a loader of a composite value like `Column.load`, for extension types in it too."""
    loaders = [
        _composite_loader(field)
        if field.fields
        else _extension_loader(field.type_oid, field.type_name) or field_loader(field.type_oid)
        for field in column.fields
    ]
    load = record_loader([field.name for field in column.fields], loaders)
    return array_loader(load) if column.array else load


@lru_cache(maxsize=2)
def _adapters(use_tz: bool) -> AdaptersMap:
    """Return the loaders of Django's own connection; types that its fields decode stay text.

    Source: `get_adapters_template` in django.db.backends.postgresql.psycopg_any.
    """
    adapters_map = AdaptersMap(adapters)
    for name in ("jsonb", "inet", "cidr"):
        adapters_map.register_loader(name, TextLoader)
    if not use_tz:
        adapters_map.register_loader("timestamptz", _NaiveLoader)
    return adapters_map


@lru_cache(maxsize=1024)
def _extension_loader(
    type_oid: int, type_name: str, array_field: bool = False, hstore_field: bool = False
) -> Loader | None:
    """Return a loader of `hstore`, `citext` and their arrays, which Django's connections read.

    A type of an extension has no fixed OID, so psycopg has no loader registered for it. Its name
    may have a schema. The name of a domain does not show its base type, so there the field decides.

    Source: `register_type_handlers` in django.contrib.postgres.signals.
    """
    if adapters.types.get(type_oid) is not None:
        return None
    name, brackets, _ = type_name.rpartition(".")[2].strip('"').partition("[]")
    known = name in ("hstore", "citext")
    load = HstoreLoader(type_oid).load if name == "hstore" or hstore_field else bytes.decode
    if brackets:
        return or_text(array_loader(load)) if known else None
    if known:
        return or_text(load)
    return or_text(array_loader(load) if array_field else load)


@lru_cache(maxsize=1024)
def _loader(type_oid: int, use_tz: bool) -> Loader:
    return or_text(Transformer(_adapters(use_tz)).get_loader(type_oid, Format.TEXT).load)


def _refuse(change: str, label: str, using: Any = None, fields: Any = None, **_: Any) -> None:
    """Raise `NoInstance`, in place of `refresh_from_db`. Pickled instances refer to this name."""
    names = ", ".join(fields) if fields else "the row"
    raise NoInstance(
        f"{change} does not have the old value of {names} of {label}, and it can no longer be "
        "loaded; set REPLICA IDENTITY FULL on the table, or add the column to fields=."
    )
