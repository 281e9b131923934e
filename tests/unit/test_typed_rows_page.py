"""The examples of the pages on typed rows and on tests run, and say what they say."""

import re
from decimal import Decimal
from pathlib import Path

from flash_celery import Delete, Insert, Update
from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.protocol.lsn import Lsn

DOCS = Path(__file__).parents[2] / "docs"


def examples(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(example, page):
    names = {"__name__": page.removesuffix(".md").replace("-", "_")}
    exec(compile(example, page, "exec"), names)
    return names


def test_typed_rows_page_examples_run(app, capsys):
    typed, _ = (run(example, "typed-rows.md") for example in examples("typed-rows.md"))
    by_table = {str(subscription.table): subscription for subscription in subscriptions_of(app)}
    assert by_table["public.orders"].into.name == "OrderRow"
    paid = by_table["sales.orders"]
    assert (paid.fields, paid.columns) == (("order_status",), {"order_status"})

    types = {"id": 23, "status": 25, "total": 1700, "note": 25}
    columns = tuple(Column(name, oid, "", identity=True) for name, oid in types.items())
    table = Table("public", "orders", None, "f", ("id",), columns)
    origin = Origin(table, Transaction(Lsn(1), 1, 0), 0)
    before, after = [b"5", b"paid", b"120", None], [b"5", b"paid", b"90", b"x"]
    typed["reward"](Insert(before, origin))
    typed["reward"](Update("O", before, after, origin))
    typed["reward"](Delete("O", after, origin))
    assert capsys.readouterr().out == (
        "order 5 is paid: 120\norder 5 went from 120 to 90\norder 5 is gone\n"
    )
    assert typed["OrderRow"](5, "paid", Decimal(1)).note is None
