"""Convert SQLAlchemy's mapped classes and tables to PostgreSQL's names of tables and columns.

SQLAlchemy is not imported, and no mapper is configured: where a handler is declared, the classes
that relationships name may not exist yet.
"""

from __future__ import annotations

from typing import Any

from ..errors import SubscriptionError
from ..table_name import TableName


def is_mapped(model: Any) -> bool:
    """Return whether the object is a SQLAlchemy class, mapped or to be mapped, or a `Table`."""
    return _is_table(model) or (
        isinstance(model, type)
        and (
            hasattr(model, "__mapper__")
            or (hasattr(model, "registry") and hasattr(model, "metadata"))
        )
    )


def table_name(model: Any) -> TableName:
    """Return the name of a class's table; a table without a schema is in `public`.

    With joined-table inheritance each class has a table of its own; with single-table inheritance
    a class has its parent's.

    Raises:
        SubscriptionError: The class has no table.
    """
    table = _table(model)
    return TableName(_catalog_name(table.schema) or "public", _catalog_name(table.name))


def is_attribute(name: Any) -> bool:
    """Return whether the object is an attribute of a mapped class, or a `Column`."""
    return hasattr(name, "key") and (_owner(name) is not None or _is_table(_table_of(name)))


def column_name(name: Any, model: Any) -> str:
    """Return the name of an attribute's column.

    Args:
        name: The attribute or `Column`, or its name; any other name is returned as it is.
        model: The class or table the handler is on.

    Raises:
        SubscriptionError: The attribute belongs to another class or table.
    """
    attribute = None if isinstance(name, str) else name
    owner = model if attribute is None else _owner(attribute) or _table_of(attribute)
    if not is_mapped(owner):
        return str(name)
    column = _column(name if attribute is None else attribute, owner, model)
    if column is None:
        return str(name)
    if is_mapped(model) and column.table is not _table(model):
        raise SubscriptionError(
            f"{name} is a column of {_full_name(column.table)}, and the handler is on "
            f"{_full_name(_table(model))}; declare one on that table too."
        )
    return _catalog_name(column.name)


def stored_value(name: Any, value: Any, model: Any) -> Any:
    """Return the label that a column of SQLAlchemy's type `Enum` holds for an enum member.

    That is the member's name, or what `values_callable` makes of it. Any other value is returned as
    it is.
    """
    owner = model if isinstance(name, str) else _owner(name) or _table_of(name)
    column = _column(name, owner, model) if is_mapped(owner) else None
    column_type: Any = getattr(column, "type", None)
    column_type = getattr(column_type, "item_type", column_type)
    enum_class = getattr(column_type, "enum_class", None)
    if enum_class is None:
        return value
    if isinstance(value, list):
        return [stored_value(name, member, model) for member in value]
    if not isinstance(value, enum_class):
        return value
    if getattr(column_type, "values_callable", None) is None:
        return value.name
    return dict(zip(enum_class, column_type.enums, strict=False)).get(value, value)


def _column(name: Any, owner: Any, model: Any) -> Any:
    """Return the column, preferring the model's own table if an attribute has several columns."""
    if not isinstance(name, str) and _owner(name) is None:
        return name
    key = name if isinstance(name, str) else name.key
    mapper = getattr(owner, "__mapper__", None)
    columns = _table(owner).columns if mapper is None else mapper.columns
    column = columns.get(key)
    if column is None or not is_mapped(model) or column.table is _table(model):
        return column
    own_columns = _table(model).columns
    return next((own for own in own_columns if own.name == column.name), column)


def _table(model: Any) -> Any:
    if _is_table(model):
        return model
    mapper = model.__dict__.get("__mapper__")
    table = getattr(mapper, "local_table", None)
    if mapper is None:
        raise SubscriptionError(
            f"{model.__name__} is not mapped to a table (abstract, or not mapped yet); name a "
            "class that is."
        )
    if not _is_table(table):
        raise SubscriptionError(
            f"{model.__name__} is mapped to a join or a query; name the tables it reads."
        )
    return table


def _is_table(model: Any) -> bool:
    parts = ("name", "schema", "columns", "indexes")  # an alias or a query has no indexes
    return not isinstance(model, type) and all(hasattr(model, part) for part in parts)


def _owner(attribute: Any) -> Any:
    """Return the class of a mapped attribute, or None."""
    owner = getattr(attribute, "class_", None)
    return owner if isinstance(owner, type) else None


def _table_of(column: Any) -> Any:
    return getattr(column, "table", None)


def _full_name(table: Any) -> str:
    name = table_name(table)
    return f"{name.schema}.{name.name}"


def _catalog_name(name: Any) -> str:
    """Return a name as PostgreSQL's catalog has it: it folds names that are not quoted."""
    if name is None:
        return ""
    return str(name).lower() if getattr(name, "quote", None) is False else str(name)
