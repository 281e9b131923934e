"""SQLAlchemy's mapped classes and tables → the names PostgreSQL knows them by.

SQLAlchemy is not imported, and no mapper is configured: relationships may name classes that do not
exist yet where a handler is declared.
"""

from __future__ import annotations

from typing import Any

from ..errors import SubscriptionError


def is_mapped(what: Any) -> bool:
    """Whether it is a SQLAlchemy class, mapped or not yet, or a `Table`."""
    return _is_table(what) or (
        isinstance(what, type)
        and (
            hasattr(what, "__mapper__") or (hasattr(what, "registry") and hasattr(what, "metadata"))
        )
    )


def table_name(what: Any) -> tuple[str, str]:
    """Schema and name of its table; without a schema `public`.

    A class of joined-table inheritance has a table of its own, one of single-table inheritance its
    parent's. Raises `SubscriptionError` for a class without a table.
    """
    table = _table(what)
    return _spelled(table.schema) or "public", _spelled(table.name)


def is_attribute(name: Any) -> bool:
    """Whether it is an attribute of a mapped class, or a `Column`."""
    return hasattr(name, "key") and (_owner(name) is not None or _is_table(_table_of(name)))


def column_name(name: Any, what: Any) -> str:
    """The column of an attribute, given by its name or itself; any other name as it is.

    `what` is the class or table that the handler is on. Raises `SubscriptionError` for an attribute
    of another one.
    """
    attribute = None if isinstance(name, str) else name
    owner = what if attribute is None else _owner(attribute) or _table_of(attribute)
    if not is_mapped(owner):
        return str(name)
    column = _column(name if attribute is None else attribute, owner, what)
    if column is None:
        return str(name)
    if is_mapped(what) and column.table is not _table(what):
        raise SubscriptionError(
            f"{name} is a column of {_shown(column.table)}, and the handler is on "
            f"{_shown(_table(what))}; declare one on that table too."
        )
    return _spelled(column.name)


def _column(name: Any, owner: Any, what: Any) -> Any:
    """The column, that of the handler's own table where an attribute stands for several."""
    if not isinstance(name, str) and _owner(name) is None:
        return name
    key = name if isinstance(name, str) else name.key
    mapper = getattr(owner, "__mapper__", None)
    columns = _table(owner).columns if mapper is None else mapper.columns
    found = columns.get(key)
    if found is None or not is_mapped(what) or found.table is _table(what):
        return found
    own = _table(what).columns
    return next((one for one in own if one.name == found.name), found)


def _table(what: Any) -> Any:
    if _is_table(what):
        return what
    mapper = what.__dict__.get("__mapper__")
    table = getattr(mapper, "local_table", None)
    if mapper is None:
        raise SubscriptionError(
            f"{what.__name__} is not mapped to a table (abstract, or not mapped yet); name a class "
            "that is."
        )
    if not _is_table(table):
        raise SubscriptionError(
            f"{what.__name__} is mapped to a join or a query; name the tables it reads."
        )
    return table


def _is_table(what: Any) -> bool:
    parts = ("name", "schema", "columns", "indexes")  # an alias or a query has no indexes
    return not isinstance(what, type) and all(hasattr(what, part) for part in parts)


def _owner(attribute: Any) -> Any:
    """The class of a mapped attribute."""
    owner = getattr(attribute, "class_", None)
    return owner if isinstance(owner, type) else None


def _table_of(column: Any) -> Any:
    return getattr(column, "table", None)


def _shown(table: Any) -> str:
    return ".".join(table_name(table))


def _spelled(name: Any) -> str:
    """A name as the catalog spells it; SQLAlchemy leaves `quote=False` to PostgreSQL to fold."""
    if name is None:
        return ""
    return str(name).lower() if getattr(name, "quote", None) is False else str(name)
