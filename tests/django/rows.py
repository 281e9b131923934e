"""Rows of the project's models: statements that insert them, and changes made by hand."""

from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.protocol.lsn import Lsn

CUSTOMER = "INSERT INTO sales_customer (full_name) VALUES ('Ada')"

ORDER = (
    "INSERT INTO sales.orders (customer_id, status, total, created, details, address, tags, warmth)"
    """ VALUES (1, 'open', 12.50, '2026-01-02 03:04:05+01', '{"a": 1.10}', '10.0.0.1',"""
    " '{x,NULL}', 36.6)"
)


def make_change(kind, name="sales_customer", schema="public", row=None, **columns):
    columns = {"id": (20, "int8"), **columns}
    columns = tuple(Column(column, *of, identity=True) for column, of in columns.items())
    table = Table(schema, name, None, "f", (), columns)
    origin = Origin(table, Transaction(Lsn(1), 1, 0), 0)
    return kind(*([row] if row is not None else []), origin)
