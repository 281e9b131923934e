import django
import pytest
from django.conf import settings
from sqlalchemy import BigInteger, Column, MetaData, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from flash_celery import Operation
from flash_celery.conditions import parsing
from flash_celery.errors import SubscriptionError
from flash_celery.handlers.subscriptions import (
    column_names,
    operations_of,
    prefix_of,
    table_name,
    table_of,
)
from flash_celery.table_name import TableName


@pytest.mark.parametrize(
    ("text", "schema", "name"),
    [
        ("orders", "public", "orders"),
        ("Orders", "public", "Orders"),
        ("sales.orders", "sales", "orders"),
        ('"Sales"."Order lines"', "Sales", "Order lines"),
        ('sales."has.dot"', "sales", "has.dot"),
        ('"q""q"', "public", 'q"q'),
        ('"a:b"."c:d"', "a:b", "c:d"),
    ],
)
def test_table_names_are_read_in_every_spelling(text, schema, name):
    table = table_name(text)
    assert (table.schema, table.name) == (schema, name)
    assert table_name(str(table)) == table


@pytest.mark.parametrize("text", ["", "a.b.c", "order lines", '"open', "a.", 'x"y', "a:b"])
def test_table_name_that_is_invalid_is_refused(text):
    with pytest.raises(SubscriptionError, match="is not a table name"):
        table_name(text)


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("orders", "", "public.orders"),
        ("billing:invoices", "billing", "public.invoices"),
        ("billing:sales.invoices", "billing", "sales.invoices"),
        ('billing:"Sales"."a:b"', "billing", 'Sales."a:b"'),
        # A colon within quotes is the table's own.
        ('"billing:invoices"', "", 'public."billing:invoices"'),
        ('sales."a:b"', "", 'sales."a:b"'),
        ('"q""q:"', "", 'public."q""q:"'),
    ],
)
def test_source_stands_before_the_first_unquoted_colon(text, source, name):
    found_source, table = table_of(text, None)
    assert (found_source, str(table)) == (source, name)
    assert table_of(text, source or None) == (found_source, table)


def test_source_can_be_a_keyword_argument():
    table = TableName("public", "orders")
    assert table_of(table, "billing") == table_of("orders", "billing") == ("billing", table)
    assert table_of(table, "") == table_of(table, None) == ("", table)


@pytest.mark.parametrize(
    ("table", "source", "sentence"),
    [
        ("billing:orders", "shipping", "is in the source 'billing', but source= is 'shipping'"),
        ("billing:orders", "", "is in the source 'billing', but source= is ''"),
        (":orders", None, "has no source before its colon"),
        ("billing:", None, "'' is not a table name"),
        ("billing:a:b", None, "'a:b' is not a table name"),
        ("orders", 5, "source= is a name in flash_sources, not 5"),
    ],
)
def test_source_that_is_invalid_is_refused(table, source, sentence):
    with pytest.raises(SubscriptionError, match=sentence):
        table_of(table, source)


@pytest.mark.parametrize("names", [{"b", "a"}, frozenset("ab"), {"b": 1, "a": 1}.keys()])
def test_field_names_in_a_set_are_sorted(names):
    assert column_names("fields", names, "orders") == ("a", "b")


def test_between_refuses_a_set():
    with pytest.raises(SubscriptionError, match="total__between takes two values in their order"):
        parsing.parse({"total__between": {5, 10}})


def test_table_can_be_a_sqlalchemy_class_or_table():
    class Base(DeclarativeBase): ...

    class Order(Base):
        __tablename__ = "orders"
        __table_args__ = {"schema": "sales"}
        id: Mapped[int] = mapped_column(primary_key=True)

    lines = Table("Order lines", MetaData(), Column("id", BigInteger))
    assert str(table_name(Order)) == "sales.orders"
    assert str(table_name(lines)) == 'public."Order lines"'


def test_table_can_be_a_django_model():
    if not settings.configured:
        settings.configure()
        django.setup()
    from django.db import models

    class Customer(models.Model):
        class Meta:
            app_label = "shop"

    class Order(models.Model):
        customer = models.ForeignKey(Customer, on_delete=models.CASCADE)

        class Meta:
            app_label = "shop"
            db_table = '"sales"."orders"'

    assert str(table_name(Order)) == "sales.orders"
    assert str(table_name(Customer)) == "public.shop_customer"
    assert column_names("fields", ["customer"], Order) == ("customer_id",)


@pytest.mark.parametrize(
    "operations",
    ["insert|update", ["insert", "update"], Operation.INSERT | Operation.UPDATE, "UPDATE | insert"],
)
def test_operations_can_be_flags_or_names(operations):
    assert operations_of(operations) == Operation.INSERT | Operation.UPDATE


@pytest.mark.parametrize("operations", ["message", "insert|message", Operation.MESSAGE])
def test_operations_of_a_table_exclude_messages(operations):
    with pytest.raises(SubscriptionError, match="on_message"):
        operations_of(operations)


@pytest.mark.parametrize("prefix", ["", None, 5, ["a"]])
def test_message_prefix_is_a_string(prefix):
    with pytest.raises(SubscriptionError, match="on_message takes the prefix"):
        prefix_of(prefix)


def test_message_prefixes_of_flash_celery_are_refused():
    with pytest.raises(SubscriptionError, match="choose another prefix"):
        prefix_of("flash.task")
    assert prefix_of("flash").name == "flash"
