"""Convert rows to the class given by `into=`, before the handler runs.

The class is a dataclass, a pydantic model, a msgspec Struct or a TypedDict. pydantic and msgspec
convert to their own classes; they are used only if the user's code has imported them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, get_origin

from ..changes.change import Change, Changes
from ..changes.rows import UNCHANGED, Row
from ..errors import RowError, SubscriptionError

if sys.version_info >= (3, 11):
    from typing import NotRequired, get_type_hints
else:
    from typing_extensions import NotRequired, get_type_hints

#: The most characters of a reason in an error. The reason may quote values of the row.
_MAX_REASON = 300


@dataclass(frozen=True)
class Field:
    """A field of the class, and the column that it is filled from."""

    name: str
    column: str
    required: bool
    #: Whether its default is `UNCHANGED`. No other default may stand for a value that was not sent.
    accepts_unknown: bool = False


@dataclass(frozen=True, eq=False)
class RowType:
    """A conversion of rows to objects of one class."""

    name: str
    fields: tuple[Field, ...]
    #: Makes an object of values by column; may raise any exception.
    make: Callable[[dict[str, Any]], Any]
    #: Whether an optional field may be absent from the object if its value was not sent.
    partial: bool = False

    @classmethod
    def of(cls, into: Any) -> RowType:
        """Return the conversion to the class given by the `into=` of an `on_change`.

        Raises:
            SubscriptionError: It is not such a class.
        """
        pydantic: Any = sys.modules.get("pydantic")
        msgspec: Any = sys.modules.get("msgspec")
        name = getattr(into, "__name__", "")
        if isinstance(into, type):
            row_class: Any = into
            if pydantic is not None and issubclass(into, pydantic.BaseModel):
                return cls(name, tuple(_pydantic_fields(into)), row_class.model_validate)
            if msgspec is not None and issubclass(into, msgspec.Struct):
                fields = tuple(_msgspec_fields(msgspec, into))
                return cls(name, fields, lambda values: msgspec.convert(values, into))
            if dataclasses.is_dataclass(into):
                return cls(name, tuple(_dataclass_fields(into)), lambda values: row_class(**values))
            if hasattr(into, "__required_keys__"):
                return cls(name, tuple(_typed_dict_fields(into)), dict, partial=True)
        raise SubscriptionError(
            "into is a dataclass, a pydantic model, a msgspec Struct or a TypedDict, not "
            f"{into!r:.100}."
        )

    def require(self, delivered: Iterable[str]) -> None:
        """Raise `SubscriptionError` if a field without a default is not among these columns."""
        delivered = set(delivered)
        for field in self.fields:
            if field.required and field.column not in delivered:
                raise SubscriptionError(
                    f"into={self.name} needs the column {field.column}, which is not among the "
                    "fields; name it there, or give it a default."
                )

    def read(self, row: Row) -> Any:
        """Return an object for the row.

        Raises:
            RowError: The row does not fit the class.
            _NotSent: PostgreSQL did not send a value that the object needs.
        """
        values: dict[str, Any] = {}
        for field in self.fields:
            value = row.get(field.column, UNCHANGED)
            if value is not UNCHANGED:
                values[field.column] = value
            elif field.column not in row._table.delivered:
                self._missing(field, row)
            elif not field.accepts_unknown and not (self.partial and not field.required):
                raise _NotSent(field.column, row)
        try:
            return self.make(values)
        except Exception as error:
            # Without the cause: its text, and so the traceback, may hold the whole row.
            raise RowError(_reason(error)) from None

    @staticmethod
    def _missing(field: Field, row: Row) -> None:
        if field.required:
            raise RowError(
                f"the column {field.column} is not in this change, and the field has no default"
            )


class _NotSent(Exception):
    """A value that PostgreSQL did not send."""

    def __init__(self, column: str, row: Row) -> None:
        super().__init__(
            f"the value of {column} was not sent; run ALTER TABLE {row._table.full_name} "
            f"REPLICA IDENTITY FULL, or give {column} the default UNCHANGED"
        )


def convert(
    argument: Any,
    row_type: Callable[[Change[Any]], RowType | None],
    handler: str,
    keep: bool = False,
) -> Any:
    """Return a change, or the changes of a batch, with `old` and `new` converted.

    If PostgreSQL did not send a value that a class needs, `old` or `new` raises `RowError` when the
    handler reads it. Any other argument is returned as it is.

    Args:
        argument: An argument of the handler.
        row_type: Returns the conversion for a change, or None to leave its rows as mappings.
        handler: The handler's name, for the error.
        keep: Whether to leave changes alone that were converted before.

    Raises:
        RowError: A row does not fit its class.
    """
    if isinstance(argument, Changes):
        changes = [convert(change, row_type, handler, keep) for change in argument]
        return Changes(changes, argument.part, argument.last)
    if not isinstance(argument, Change) or (keep and argument._typed is not None):
        return argument
    into = row_type(argument)
    converted = copy(argument)
    converted._typed = {} if into is None else _converted_sides(argument, into, handler)
    return converted


def _converted_sides(change: Change[Any], into: RowType, handler: str) -> dict[str, Any]:
    """Return `old` and `new` as objects; as an error where a value was not sent."""
    sides: dict[str, Any] = {}
    for side, row in change._sides():
        try:
            sides[side] = into.read(row)
        except RowError as error:
            raise _row_error(handler, change, side, into, error) from None
        except _NotSent as error:
            sides[side] = _row_error(handler, change, side, into, error)
    return sides


def _row_error(
    handler: str, change: Change[Any], side: str, into: RowType, reason: Exception
) -> RowError:
    return RowError(f"{handler}: {side} of {change!r} is not a valid {into.name}: {reason}.")


def _reason(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(errors):  # pydantic's
        details = errors(include_url=False, include_input=False, include_context=False)
        reason = "; ".join(
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details
        )
    else:
        reason = str(error) or type(error).__name__
    reason = reason.rstrip(".")
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}…"


def _dataclass_fields(into: Any) -> Iterator[Field]:
    absent = dataclasses.MISSING
    for field in dataclasses.fields(into):
        if field.init:
            required = field.default is absent and field.default_factory is absent
            yield Field(field.name, field.name, required, field.default is UNCHANGED)


def _pydantic_fields(into: Any) -> Iterator[Field]:
    by_name = into.model_config.get("validate_by_alias") is False
    for name, field in into.model_fields.items():
        alias = None if by_name else field.validation_alias or field.alias
        if alias is not None and not isinstance(alias, str):
            raise SubscriptionError(
                f"into={into.__name__}: the alias of {name} is not a column's name; make it a "
                "string."
            )
        yield Field(name, alias or name, field.is_required(), field.default is UNCHANGED)


def _msgspec_fields(msgspec: Any, into: Any) -> Iterator[Field]:
    for field in msgspec.structs.fields(into):
        yield Field(field.name, field.encode_name, field.required, field.default is UNCHANGED)


def _typed_dict_fields(into: Any) -> Iterator[Field]:
    try:
        # `__required_keys__` misses NotRequired in annotations that are strings.
        hints = get_type_hints(into, include_extras=True)
    except Exception:
        hints = {}
    for name in into.__annotations__:
        optional = get_origin(hints.get(name)) is NotRequired
        yield Field(name, name, name in into.__required_keys__ and not optional)
