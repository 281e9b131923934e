"""`into=`: rows as a class of the user's own, checked before the handler runs.

A dataclass, a pydantic model, a msgspec Struct or a TypedDict. pydantic and msgspec are looked for
among what the user has imported, and do the conversion.
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

#: Characters of a reason that are told; a reason may quote what was in the row.
_REASON_LENGTH = 300


@dataclass(frozen=True)
class Field:
    """A field of the class, and the column it is filled from."""

    name: str
    column: str
    required: bool
    #: Whether its default is `UNCHANGED`: the only one that says what an unknown value is.
    unknown: bool = False


@dataclass(frozen=True, eq=False)
class RowType:
    """How rows become objects of a class."""

    name: str
    fields: tuple[Field, ...]
    #: Values by column → an object; raises whatever the class does.
    make: Callable[[dict[str, Any]], Any]
    #: Whether a value that is not known may simply be missing.
    partial: bool = False

    @classmethod
    def of(cls, into: Any) -> RowType:
        """Read the `into=` of an `on_change`. Raises `SubscriptionError` for any other class."""
        pydantic, msgspec = (sys.modules.get(name) for name in ("pydantic", "msgspec"))
        name = getattr(into, "__name__", "")
        if not isinstance(into, type):
            pass
        elif pydantic is not None and issubclass(into, pydantic.BaseModel):
            return cls(name, tuple(_of_pydantic(into)), _pydantic_make(into))
        elif msgspec is not None and issubclass(into, msgspec.Struct):
            fields = tuple(_of_msgspec(msgspec, into))
            return cls(name, fields, lambda values: msgspec.convert(values, into))
        elif dataclasses.is_dataclass(into):
            return cls(name, tuple(_of_dataclass(into)), lambda values: into(**values))
        elif hasattr(into, "__required_keys__"):
            return cls(name, tuple(_of_typed_dict(into)), dict, partial=True)
        raise SubscriptionError(
            "into is a dataclass, a pydantic model, a msgspec Struct or a TypedDict, not "
            f"{into!r:.100}."
        )

    def require(self, delivered: Iterable[str]) -> None:
        """Raise `SubscriptionError` if a field without a default is not among these columns."""
        known = set(delivered)
        for field in self.fields:
            if field.required and field.column not in known:
                raise SubscriptionError(
                    f"into={self.name} needs the column {field.column}, which is not among the "
                    "fields; name it there, or give it a default."
                )

    def read(self, row: Row) -> Any:
        """An object for the row. Raises `RowError`, and `_Unknown` where a value is not known."""
        values: dict[str, Any] = {}
        for field in self.fields:
            value = row.get(field.column, UNCHANGED)
            if value is not UNCHANGED:
                values[field.column] = value
            elif field.column not in row._table.delivered:
                self._missing(field, row)
            elif not field.unknown and not (self.partial and not field.required):
                raise _Unknown(field.column, row)
        try:
            return self.make(values)
        except Exception as error:
            # Without the cause: its text, and so every traceback, may hold the whole row.
            raise RowError(_reason(error)) from None

    @staticmethod
    def _missing(field: Field, row: Row) -> None:
        if field.required:
            raise RowError(
                f"the column {field.column} is not in this change, and the field has no default"
            )


class _Unknown(Exception):
    """PostgreSQL did not send a value."""

    def __init__(self, column: str, row: Row) -> None:
        super().__init__(
            f"the value of {column} was not sent; it is after ALTER TABLE {row._table.full_name} "
            f"REPLICA IDENTITY FULL (or give {column} the default UNCHANGED)"
        )


def typed(
    told: Any, row_type: Callable[[Change[Any]], RowType | None], handler: str, keep: bool = False
) -> Any:
    """A change, or the changes of a batch, with `old` and `new` of the handler's own class.

    Anything else is as it was, and with `keep` what has been typed is too. Raises `RowError` for a
    row that does not fit; a value that is not known raises it where the row is asked for.
    """
    if isinstance(told, Changes):
        return Changes([typed(change, row_type, handler, keep) for change in told])
    if not isinstance(told, Change) or (keep and told._typed is not None):
        return told
    into = row_type(told)
    found = copy(told)
    found._typed = {} if into is None else _sides(told, into, handler)
    return found


def _sides(change: Change[Any], into: RowType, handler: str) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for side, row in change._sides():
        try:
            sides[side] = into.read(row)
        except RowError as error:
            raise _named(handler, change, side, into, str(error)) from None
        except _Unknown as error:
            sides[side] = _named(handler, change, side, into, str(error))
    return sides


def _named(handler: str, change: Change[Any], side: str, into: RowType, reason: str) -> RowError:
    return RowError(f"{handler}: {side} of {change!r} is no {into.name}: {reason}.")


def _reason(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(errors):  # pydantic's
        each = errors(include_url=False, include_input=False, include_context=False)
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in each)
    else:
        said = str(error) or type(error).__name__
    said = said.rstrip(".")
    return said if len(said) <= _REASON_LENGTH else f"{said[:_REASON_LENGTH]}…"


def _of_dataclass(into: Any) -> Iterator[Field]:
    absent = dataclasses.MISSING
    for field in dataclasses.fields(into):
        if field.init:
            required = field.default is absent and field.default_factory is absent
            yield Field(field.name, field.name, required, field.default is UNCHANGED)


def _pydantic_make(into: Any) -> Callable[[dict[str, Any]], Any]:
    made: Callable[[dict[str, Any]], Any] = into.model_validate
    return made


def _of_pydantic(into: Any) -> Iterator[Field]:
    by_name = into.model_config.get("validate_by_alias") is False
    for name, field in into.model_fields.items():
        alias = None if by_name else field.validation_alias or field.alias
        if alias is not None and not isinstance(alias, str):
            raise SubscriptionError(
                f"into={into.__name__}: the alias of {name} is no column's name; give it one "
                "that is a string."
            )
        yield Field(name, alias or name, field.is_required(), field.default is UNCHANGED)


def _of_msgspec(msgspec: Any, into: Any) -> Iterator[Field]:
    for field in msgspec.structs.fields(into):
        yield Field(field.name, field.encode_name, field.required, field.default is UNCHANGED)


def _of_typed_dict(into: Any) -> Iterator[Field]:
    try:
        # Where annotations are strings, only this finds what is NotRequired.
        hints = get_type_hints(into, include_extras=True)
    except Exception:
        hints = {}
    for name in into.__annotations__:
        optional = get_origin(hints.get(name)) is NotRequired
        yield Field(name, name, name in into.__required_keys__ and not optional)
