"""The types of handlers that a user's editor infers. Each line with a comment is checked by mypy --strict:
`# reveals: …` is what is revealed, `# error: …` what is refused."""
# fmt: off

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypedDict

import msgspec
import pydantic

from flash_celery import Change, Changes, Delete, Insert, Truncate, Update, on_change


@dataclass
class Order:
    id: int
    total: Decimal


@dataclass
class Customer:
    id: int


class Model(pydantic.BaseModel):
    id: int


class Struct(msgspec.Struct):
    id: int


class Keys(TypedDict):
    id: int


@on_change("orders", into=Order)
def every(change: Change[Order]) -> int:
    reveal_type(change.key)  # reveals: typing.Mapping[str, Any]
    if isinstance(change, Truncate):
        return 0
    return 1


@on_change("orders", "insert|update|delete", into=Order)
def matched(change: Insert[Order] | Update[Order] | Delete[Order]) -> None:
    match change:
        case Insert(new):
            reveal_type(new)  # reveals: tests.typing.handlers.Order
        case Update(old, new):
            reveal_type(old.total)  # reveals: decimal.Decimal
        case Delete(old):
            reveal_type(old)  # reveals: tests.typing.handlers.Order


@on_change("orders", into=Order, batch=10)
def batched(changes: Changes[Order]) -> None:
    reveal_type(changes[0])  # reveals: flash_celery.changes.change.Change[tests.typing.handlers.Order]
    reveal_type(changes[1:])  # reveals: flash_celery.changes.change.Changes[tests.typing.handlers.Order]
    for change in changes:
        if isinstance(change, Insert):
            reveal_type(change.commit_lsn)  # reveals: flash_celery.protocol.lsn.Lsn


@on_change("orders", "insert", into=Model)
def model(change: Insert[Model]) -> None:
    reveal_type(change.new.id)  # reveals: int


@on_change("orders", "insert", into=Struct)
def struct(change: Insert[Struct]) -> None:
    reveal_type(change.new.id)  # reveals: int


@on_change("orders", "delete", into=Keys)
def keys(change: Delete[Keys]) -> None:
    reveal_type(change.old["id"])  # reveals: int


@on_change("orders", into=Order)
def bound(self: Any, change: Change[Order]) -> None: ...


@on_change("orders", into=Order)
@on_change("customers", into=Customer)
def both(change: Change[Order] | Change[Customer]) -> None: ...


@on_change("orders", into=Order)  # error: arg-type
def other(change: Change[Customer]) -> None: ...


@on_change("orders", into=Order)  # error: arg-type
def other_insert(change: Insert[Customer]) -> None: ...


@on_change("orders", into=Order)  # error: arg-type
def untyped(change: Insert) -> None: ...


@on_change("orders", into=Order)  # error: arg-type
def other_batch(changes: Changes[Customer]) -> None: ...


# Without `into` a row is a mapping, and the classes need no parameter.
@on_change("orders")
def plain(change: Change) -> str:
    return change.id


@on_change("orders", "insert")
def plain_insert(change: Insert) -> Mapping[str, Any]:
    reveal_type(change)  # reveals: flash_celery.changes.change.Insert[flash_celery.changes.rows.Row]
    return change.new


@on_change("orders", batch=2)
def plain_batch(changes: Changes) -> None:
    reveal_type(changes[0])  # reveals: flash_celery.changes.change.Change[flash_celery.changes.rows.Row]
