"""Convert a Django model to the name of its table, and its fields to the names of their columns.

Everything is read from the model's `_meta`; Django is not imported here.
"""

from __future__ import annotations

from typing import Any

from ..errors import SubscriptionError, did_you_mean
from ..table_name import TableName


def is_model(table: Any) -> bool:
    """Return whether the object is a Django model."""
    return hasattr(getattr(table, "_meta", None), "db_table")


def table_name(model: Any) -> TableName:
    """Return the name of a model's table; for a proxy model, that of the model it stands for.

    Raises:
        SubscriptionError: The model is abstract or swapped, and so has no table.
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
    return TableName.of_db_table(str(meta.db_table))


def column_name(name: str, model: Any) -> str:
    """Return the name of a field's column.

    Args:
        name: The field (`customer`), its attribute (`customer_id`), its column, or `pk`.
        model: The model the handler is on.

    Raises:
        SubscriptionError: The model's own table has no such column.
    """
    meta = model._meta.concrete_model._meta if model._meta.concrete_model else model._meta
    for field in meta.local_concrete_fields:
        if name in _names(field) or (name == "pk" and field.primary_key):
            return str(field.column)
    for field in meta.concrete_fields:
        if name in _names(field):
            parent = field.model._meta.label
            raise SubscriptionError(
                f"{name} is a field of {parent}, which has a table of its own, so it is not in the "
                f"table of {meta.label}; handle it with on_change({field.model.__name__})."
            )
    if name in {field.name for field in (*meta.many_to_many, *meta.private_fields)}:
        raise SubscriptionError(
            f"{meta.label}.{name} has no column in the table of {meta.label}; handle the model, or "
            "the `through` model, whose table has it."
        )
    field_names = [field.name for field in meta.local_concrete_fields]
    hint = did_you_mean(name, field_names) or f"; there are: {', '.join(field_names)}."
    raise SubscriptionError(f"{meta.label} has no field {name!r}{hint}")


def _names(field: Any) -> tuple[str, str, str]:
    return field.name, field.attname, field.column
