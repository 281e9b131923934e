"""`on_change(Order)`: a model's table, and its fields as columns."""

import pytest

from flash_celery import on_change
from flash_celery.errors import SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.handlers.subscriptions import column_name, table_name


@pytest.fixture
def models(configured):
    from sales import models

    return models


def test_model_names_its_table(models):
    assert str(table_name(models.Order)) == "sales.orders"
    assert str(table_name(models.UrgentOrder)) == "sales.orders"
    assert str(table_name(models.Customer)) == "public.sales_customer"
    assert str(table_name(models.Book)) == "public.sales_book"
    assert str(table_name(models.Item.buyers.through)) == "public.sales_item_buyers"


@pytest.mark.parametrize(
    ("db_table", "table"),
    [
        ('"sales"."orders"', "sales.orders"),
        ('sales"."orders', "sales.orders"),
        ('"Sales"."Order lines"', 'Sales."Order lines"'),
        ("Order lines", 'public."Order lines"'),
        ("sales.orders", 'public."sales.orders"'),
        ("Orders", "public.Orders"),
    ],
)
def test_model_db_table_with_a_schema_is_read_as_django_writes_it(models, db_table, table):
    class Model:
        class _meta:
            abstract = swapped = False

    Model._meta.db_table = db_table
    assert str(table_name(Model)) == table


def test_model_fields_are_columns(models, app):
    @on_change(
        models.Order,
        fields=["customer", "status"],
        where={"customer_id__gte": 5, "total__gt": 1, "note": None},
        key=["pk"],
    )
    @app.task(name="orders", shared=False)
    def orders(change): ...

    @on_change(models.Customer, fields=["name"])
    @app.task(name="customers", shared=False)
    def customers(change): ...

    @on_change(models.UrgentOrder, fields=["customer"], where=[{"customer": 1}, {"pk__lt": 3}])
    @app.task(name="urgent", shared=False)
    def urgent(change): ...

    by_handler = {subscription.handler: subscription for subscription in subscriptions_of(app)}
    assert by_handler["orders"].fields == ("customer_id", "status")
    assert by_handler["orders"].where.columns == {"customer_id", "total", "note"}
    assert by_handler["orders"].key == ("id",)
    assert by_handler["customers"].fields == ("full_name",)
    assert by_handler["urgent"].fields == ("customer_id",)
    assert by_handler["urgent"].where.columns == {"customer_id", "id"}


def test_model_child_table_has_its_fields_and_pointer(models):
    assert column_name("pages", models.Book) == "pages"
    assert column_name("item_ptr", models.Book) == column_name("pk", models.Book) == "item_ptr_id"
    assert column_name("created", models.Order) == "created"


@pytest.mark.parametrize(
    ("model", "name", "sentence"),
    [
        ("Order", "statsu", "sales.Order has no field 'statsu'; did you mean status?"),
        ("UrgentOrder", "colour", "sales.Order has no field 'colour'; there are: id, created, cus"),
        ("Book", "title", "title is a field of sales.Item, .* handle it with on_change.Item."),
        ("Item", "buyers", "sales.Item.buyers has no column .* the `through` model"),
        ("Item", "book", "sales.Item has no field 'book'"),
    ],
)
def test_model_refuses_a_name_without_a_column(models, app, model, name, sentence):
    @on_change(getattr(models, model), fields=[name])
    @app.task(name="wrong", shared=False)
    def wrong(change): ...

    with pytest.raises(SubscriptionError, match=f"^wrong: {sentence}"):
        subscriptions_of(app)


def test_model_that_is_abstract_is_refused(models, app):
    @on_change(models.Stamped)
    @app.task(name="wrong", shared=False)
    def wrong(change): ...

    with pytest.raises(SubscriptionError, match="wrong: Stamped is an abstract model, .* inherit"):
        subscriptions_of(app)
