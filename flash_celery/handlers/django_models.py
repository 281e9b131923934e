"""A Django model's table and columns, read from its `_meta`; Django itself is imported only where a
change is to be an instance.
"""

from __future__ import annotations

import difflib
from typing import Any

from ..errors import SubscriptionError


def is_model(table: Any) -> bool:
    """Whether it is a Django model."""
    return hasattr(getattr(table, "_meta", None), "db_table")


def db_table(model: Any) -> str:
    """Its table, as `Meta.db_table` says it.

    A proxy model has the table of what it stands for. Raises `SubscriptionError` if it has none.
    """
    meta = model._meta
    if meta.abstract:
        raise SubscriptionError(
            f"{model.__name__} is an abstract model, which has no table; name the models that "
            "inherit from it, one on_change for each."
        )
    if meta.swapped:
        raise SubscriptionError(
            f"{meta.label} is swapped for {meta.swapped}, and has no table; name that model."
        )
    return str(meta.db_table)


def column_name(name: str, model: Any) -> str:
    """The column of a field, which may be named as the field (`customer`), its attribute
    (`customer_id`), its column, or `pk`.

    Raises `SubscriptionError` for what is no column of the model's own table.
    """
    meta = model._meta.concrete_model._meta if model._meta.concrete_model else model._meta
    for field in meta.local_concrete_fields:
        if name in _names(field) or (name == "pk" and field.primary_key):
            return str(field.column)
    for field in meta.concrete_fields:
        if name in _names(field):
            parent = field.model._meta.label
            raise SubscriptionError(
                f"{name} is a field of {parent}, whose rows are in the table of its own, not in "
                f"that of {meta.label}; handle it by on_change({field.model.__name__})."
            )
    if name in {field.name for field in (*meta.many_to_many, *meta.private_fields)}:
        raise SubscriptionError(
            f"{meta.label}.{name} has no column in the table of {meta.label}; handle the model, or "
            "the `through` model, whose table has it."
        )
    known = [field.name for field in meta.local_concrete_fields]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}."
    raise SubscriptionError(f"{meta.label} has no field {name!r}; {hint}")


def _names(field: Any) -> tuple[str, str, str]:
    return field.name, field.attname, field.column
