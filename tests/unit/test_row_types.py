import dataclasses
import json
import pickle
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest
from celery import shared_task
from kombu.utils.json import dumps, loads
from typing_extensions import NotRequired

from flash_celery import UNCHANGED, Batch, Changes, Delete, Insert, Truncate, Update, on_change
from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.errors import RowError, SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.handlers.row_types import RowType
from flash_celery.protocol.lsn import Lsn


def table(name="orders", identity="f", **flags):
    """A table whose columns are id, status, total, note and made."""
    types = {"id": 20, "status": 25, "total": 1700, "note": 25, "made": 1082}
    columns = tuple(
        Column(column, oid, "", identity == "f" or column == "id", flags.get(column, True))
        for column, oid in types.items()
    )
    return Table("public", name, None, identity, ("id",), columns)


@pytest.fixture(autouse=True)
def app_of_the_test(app):
    """What a test declares goes with its app."""


ORDERS = table()
ORIGIN = Transaction(Lsn(0x16B3748), 7, 0), 0
CELLS = [b"5", b"paid", b"9.50", None, b"2024-02-29"]


def insert(cells=CELLS, of=ORDERS, number=0):
    return Insert(list(cells), Origin(of, *ORIGIN, number=number))


@dataclass
class Order:
    id: int
    status: str
    total: Decimal
    note: str | None = None


class OrderModel(pydantic.BaseModel):
    id: int
    state: str = pydantic.Field(alias="status")
    total: float


class OrderStruct(msgspec.Struct, rename={"state": "status"}):
    id: int
    state: str
    total: Decimal
    made: date


class OrderDict(TypedDict):
    id: int
    status: str
    note: NotRequired[str]
    colour: NotRequired[str]


@pydantic.dataclasses.dataclass
class Checked:
    id: int
    total: int


def read(into, change, side="new"):
    """One side of a change, as a handler sees it."""
    seen = []
    handler = on_change("orders", into=into)(
        lambda delivered: seen.append(getattr(delivered, side))
    )
    handler(change)
    return seen[0]


def test_row_is_an_object_of_its_class():
    assert read(Order, insert()) == Order(5, "paid", Decimal("9.50"), None)
    model = read(OrderModel, insert())
    assert (model.state, model.total) == ("paid", 9.5)
    assert read(OrderStruct, insert()) == OrderStruct(5, "paid", Decimal("9.50"), date(2024, 2, 29))
    assert read(OrderDict, insert()) == {"id": 5, "status": "paid", "note": None}
    with pytest.raises(RowError, match="total"):
        read(Checked, insert())


def test_row_type_decodes_only_its_columns():
    damaged = [b"5", b"paid", b"9.50", None, b"\xff"]
    assert read(Order, insert(damaged)).id == 5


@pytest.mark.parametrize("into", [Order, OrderModel, OrderStruct, OrderDict])
def test_row_type_applies_to_both_rows_of_an_update(into):
    change = Update("O", [b"5", b"new", *CELLS[2:]], list(CELLS), Origin(ORDERS, *ORIGIN))
    assert read(into, change, "old") != read(into, change, "new")
    assert read(into, Delete("O", list(CELLS), Origin(ORDERS, *ORIGIN)), "old") == read(
        into, insert()
    )


def test_row_type_leaves_everything_but_rows_alone():
    delivered = []
    handler = on_change("orders", into=Order)(delivered.append)
    change = Update("O", [b"5", b"new", *CELLS[2:]], list(CELLS), Origin(ORDERS, *ORIGIN))
    handler(change)
    handler(Truncate(Origin(ORDERS, *ORIGIN)))
    handler("something else")
    seen = delivered[0]
    assert (dict(seen.key), seen.changed, seen.id) == ({"id": 5}, {"status"}, change.id)
    assert seen == change
    assert hash(seen) == hash(change)
    assert change.new["status"] == "paid"  # the one that was passed is as it was
    assert seen.new is seen.new
    assert isinstance(delivered[1], Truncate)
    assert delivered[2] == "something else"


def test_row_type_does_not_change_the_message():
    delivered = []
    on_change("orders", into=Order)(delivered.append)(insert())
    (back,) = loads(dumps(delivered))
    assert back == insert()
    assert back.new["status"] == "paid"


@pytest.mark.parametrize(
    ("into", "cells", "reason"),
    [
        (OrderModel, [b"5", b"paid", None], "total: Input should be a valid number"),
        (OrderStruct, [b"5", None, b"1"], r"Expected `str`, got `null` - at `\$.status`"),
        (Checked, [b"5", b"paid", b"9.5"], "total: Input should be a valid integer"),
    ],
)
def test_row_type_error_has_the_reason_and_no_values(into, cells, reason):
    cells = [*cells, b"a secret", b"2024-02-29"]
    with pytest.raises(RowError, match=reason) as caught:
        read(into, insert(cells))
    message = str(caught.value)
    assert (
        f"new of insert public.orders id=5 @0/16B3748 is not a valid {into.__name__}: " in message
    )
    assert "test_row_types" in message or "lambda" in message
    assert "secret" not in message
    assert caught.value.__suppress_context__
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_row_type_error_is_bounded():
    @dataclass
    class Strict:
        status: str

        def __post_init__(self):
            raise ValueError("x" * 5000)

    with pytest.raises(RowError) as caught:
        read(Strict, insert())
    assert len(str(caught.value)) < 600


def test_row_type_of_an_old_row_with_missing_values_is_refused():
    keyed = table(identity="d")
    change = Update(None, None, list(CELLS), Origin(keyed, *ORIGIN))
    assert read(Order, change).status == "paid"
    with pytest.raises(RowError, match="of status was not sent; .* REPLICA IDENTITY FULL"):
        read(Order, change, "old")
    gone = Delete("K", [b"5", None, None, None, None], Origin(keyed, *ORIGIN))
    assert dict(read_key(gone)) == {"id": 5}
    with pytest.raises(RowError, match="of status was not sent"):
        read(Order, gone, "old")

    class Key(TypedDict, total=False):
        id: int
        status: str

    assert read(Key, gone, "old") == {"id": 5}


def read_key(change):
    keys = []
    on_change("orders", into=Order)(lambda delivered: keys.append(delivered.key))(change)
    return keys[0]


def test_row_type_default_never_replaces_a_value():
    unsent = [b"5", b"paid", b"1", UNCHANGED, b"2024-02-29"]
    change = Update(None, None, unsent, Origin(table(identity="d"), *ORIGIN))
    with pytest.raises(RowError, match="the value of note was not sent"):
        read(Order, change)

    @dataclass
    class Careful:
        id: int
        note: Any = UNCHANGED

    assert read(Careful, change).note is UNCHANGED
    assert read(Careful, insert()).note is None


def test_row_type_default_replaces_a_column_that_is_not_sent():
    without = table(note=False)
    assert read(Order, insert([*CELLS[:3], b"hidden", None], without)).note is None
    with pytest.raises(RowError, match="the column status is not in this change"):
        read(Order, insert(of=table(status=False)))


def test_row_type_optional_keys_work_with_string_annotations():
    names = {}
    code = """
from __future__ import annotations
from typing import TypedDict
from typing_extensions import NotRequired
class Row(TypedDict):
    id: int
    note: NotRequired[str]
"""
    exec(compile(code, "rows.py", "exec"), names | {"__name__": "rows"}, names)
    names["Row"].__module__ = __name__
    fields = {field.name: field.required for field in RowType.of(names["Row"]).fields}
    assert fields == {"id": True, "note": False}


@pytest.mark.parametrize("into", [int, dict, "Order", Order(1, "a", Decimal(1)), object()])
def test_row_type_of_an_unsupported_class_is_refused(app, into):
    @on_change("orders", into=into)
    def handle(change): ...

    with pytest.raises(SubscriptionError, match="handle: into is a dataclass, a pydantic model"):
        subscriptions_of(app)


def test_row_type_that_needs_more_than_the_fields_is_refused(app):
    @on_change("orders", fields=["id", "status"], into=Order)
    def handle(change): ...

    with pytest.raises(SubscriptionError, match="into=Order needs the column total"):
        subscriptions_of(app)


def test_row_type_alias_that_is_no_name_is_refused():
    class Nested(pydantic.BaseModel):
        status: str = pydantic.Field(validation_alias=pydantic.AliasPath("a", 0))

    with pytest.raises(SubscriptionError, match="the alias of status is not a column's name"):
        RowType.of(Nested)


@pytest.mark.parametrize("where", ["above", "below", "plain"])
@pytest.mark.parametrize("bind", [True, False])
def test_row_type_works_with_any_decorator_order(app, where, bind):
    def handle(*args):
        return type(args[-1].new).__name__, len(args)

    declare = on_change("orders", into=Order)
    if where == "plain":
        task, count = declare(handle), 1
    else:
        make, count = shared_task(bind=bind, name=f"shop.{where}"), 1 + bind
        task = declare(make(handle)) if where == "above" else make(declare(handle))
    subscriptions_of(app)
    assert task(insert()) == ("Order", count)
    assert task.delay(insert()).get() == ("Order", count)
    assert task.apply(args=[insert()]).get() == ("Order", count)


def test_row_type_applies_to_keyword_arguments(app):
    @on_change("orders", into=Order)
    def handle(change):
        return change.new.id

    subscriptions_of(app)
    assert handle(change=insert()) == handle.delay(change=insert()).get() == 5


def test_row_type_differs_for_each_table_of_a_task(app):
    @dataclass
    class Customer:
        id: int

    @dataclass
    class Other:
        total: Decimal

    @on_change("invoices")
    @on_change("orders", into=Other)
    @shared_task
    @on_change("customers", into=Customer)
    @on_change("orders", into=Order)
    def handle(change):
        return change.new

    numbered = {
        (subscription.table.name, subscription.number) for subscription in subscriptions_of(app)
    }
    assert numbered == {("orders", 0), ("customers", 1), ("orders", 2), ("invoices", 3)}
    assert isinstance(handle(insert()), Order)
    assert isinstance(handle(insert(number=2)), Other)
    # An earlier version of the code had more subscriptions.
    assert isinstance(handle(insert(number=9)), Order)
    assert handle(insert(of=table("customers"), number=1)) == Customer(5)
    assert handle(insert(of=table("invoices"), number=3))["id"] == 5
    assert handle(insert(of=table("elsewhere")))["id"] == 5


def test_row_type_applies_to_each_change_of_a_batch(app):
    @on_change("orders", batch=Batch(10), into=Order)
    @shared_task
    def handle(changes):
        return [type(change.new) for change in changes], changes[0] == insert()

    subscriptions_of(app)
    assert handle.delay(Changes([insert(), insert()])).get() == ([Order, Order], True)
    with pytest.raises(RowError, match=r"new of insert public\.orders id=6"):
        handle(Changes([insert(), insert([b"6", b"a", b"b"], of=narrow())]))


def narrow():
    columns = tuple(Column(name, 25, "text", True) for name in ("id", "status", "note"))
    return Table("public", "orders", None, "f", ("id",), columns)


def test_row_type_error_is_retried_like_any_failure(app):
    attempts = []

    @dataclass
    class Impatient:
        id: int

        def __post_init__(self):
            attempts.append(self.id)
            if len(attempts) < 3:
                raise ValueError("not yet")

    @shared_task(autoretry_for=(RowError,), max_retries=5, default_retry_delay=0)
    @on_change("orders", into=Impatient)
    def handle(change):
        return change.new.id

    assert handle.delay(insert()).get() == 5
    assert len(attempts) == 3


def test_row_type_applies_again_in_a_retry(app):
    delivered = []

    @on_change("orders", into=Order)
    @shared_task(bind=True, max_retries=2, default_retry_delay=0)
    def handle(self, change):
        delivered.append(change.new)
        if len(delivered) < 2:
            raise self.retry()

    handle.delay(insert())
    assert delivered == [read(Order, insert())] * 2


def test_row_type_does_not_affect_the_enqueued_message(app):
    @on_change("orders", into=Order)
    def handle(change): ...

    (subscription,) = subscriptions_of(app)
    assert repr(subscription) == repr(dataclasses.replace(subscription, into=None))
    assert json.dumps(repr(subscription))
