"""`into=` on rows that PostgreSQL wrote, and what is found out before anything is created."""

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from flash_celery import UNCHANGED, on_change
from flash_celery.errors import RowError, SubscriptionError


@dataclass
class Order:
    id: int
    status: str
    total: Decimal
    made: datetime
    note: Any = UNCHANGED


ORDERS = """
CREATE TABLE orders (id int PRIMARY KEY, status text, total numeric, made timestamptz DEFAULT now(),
                     note text);
ALTER TABLE orders ALTER note SET STORAGE EXTERNAL
"""


def test_row_types_accept_rows_as_postgresql_writes_them(flash):
    flash.database.execute(ORDERS)
    delivered = []

    @on_change("orders", into=Order)
    @flash.app.task(name="handler", shared=False)
    def handler(change):
        delivered.append(change)

    flash.start(flash_replica_identity="keep")
    flash.do(
        "INSERT INTO orders VALUES (1, 'new', 9.5, '2024-02-29 12:00Z', repeat('x', 10000))",
        "UPDATE orders SET status = 'paid'",
        "DELETE FROM orders",
    )
    for change in flash.delivered():
        handler(change)
    insert, update, delete = delivered
    assert dataclasses.astuple(insert.new)[:3] == (1, "new", Decimal("9.5"))
    assert (insert.new.made.year, len(insert.new.note)) == (2024, 10000)
    assert (update.new.status, update.new.note) == ("paid", UNCHANGED)
    for change in (update, delete):
        with pytest.raises(RowError, match="of status was not sent; .*IDENTITY FULL"):
            change.old  # noqa: B018 - asking is what raises
    assert dict(delete.key) == {"id": 1}


def test_row_type_field_without_a_column_stops_the_start(flash):
    flash.database.execute(
        "CREATE TABLE orders (id int PRIMARY KEY, statsu text, made timestamptz)"
    )
    flash.handler("orders", into=Order)
    sentence = "handler: public.orders has no column status, which into=Order needs .*mean statsu"
    with pytest.raises(SubscriptionError, match=sentence):
        flash.start()
    assert flash.database.one("SELECT count(*) FROM pg_publication") == 0


def test_row_type_field_of_an_unpublished_column_stops_the_start(flash):
    # Stored ones are published from PostgreSQL 18 on, virtual ones never.
    late = flash.database.one("SHOW server_version_num") >= "180000"
    flash.database.execute(
        "CREATE TABLE orders (id int PRIMARY KEY, double int GENERATED ALWAYS AS (id * 2) "
        f"{'VIRTUAL' if late else 'STORED'})"
    )

    @dataclass
    class Doubled:
        double: int

    flash.handler("orders", "insert", into=Doubled)
    with pytest.raises(SubscriptionError, match="double, which into=Doubled needs .* generated"):
        flash.start()
