"""`change.instance()`: a row as its model reads it, without a query."""

import ipaddress
import json
import pickle
import subprocess
import sys
from datetime import datetime, timezone
from decimal import Decimal

import pytest
from django.apps.registry import Apps
from django.contrib.postgres import signals as django_signals
from django.contrib.postgres.fields import ArrayField, HStoreField
from django.db import connection
from django.db.models import Model, TextField
from django.test.utils import CaptureQueriesContext, override_settings

from flash_celery import UNCHANGED, Insert, LogicalMessage, Truncate, Update
from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.errors import NoInstance
from flash_celery.protocol.lsn import Lsn
from tests.django.rows import CUSTOMER, ORDER, make_change

from .conftest import ROOT


@pytest.fixture
def models(configured):
    from sales import models

    return models


@pytest.fixture
def sales(migrated, models):
    return models


@pytest.fixture
def no_query(sales):
    def run(function, *arguments, **named):
        with CaptureQueriesContext(connection) as queries:
            result = function(*arguments, **named)
        assert not queries.captured_queries
        return result

    return run


def values(instance):
    loaded = {field.attname for field in instance._meta.concrete_fields}
    loaded -= instance.get_deferred_fields()
    return {name: getattr(instance, name) for name in loaded}


def test_instance_equals_one_read_by_a_query(flash, sales, no_query):
    flash.handler(sales.Order).handler(sales.Customer, name="customers").start()
    flash.do(CUSTOMER, ORDER)
    (change,) = flash.delivered()
    order = no_query(change.instance)
    read = sales.Order.objects.get()
    assert type(order) is sales.Order
    assert order == read
    assert values(order) == values(read)
    assert {name: type(value) for name, value in values(order).items()} == {
        name: type(value) for name, value in values(read).items()
    }
    assert order.details == {"a": Decimal("1.10")}
    assert type(order.details["a"]) is Decimal
    assert type(order.warmth) is sales.Celsius
    assert (order._state.adding, order._state.db) == (False, "default")
    assert pickle.loads(pickle.dumps(order)).status == "open"
    (customer,) = flash.delivered("customers")
    assert no_query(customer.instance).name == "Ada"


def test_instance_loads_missing_fields_on_access(flash, sales, no_query):
    flash.handler(sales.Order, fields=["status"]).start()
    flash.do(CUSTOMER, ORDER)
    (change,) = flash.delivered()
    order = no_query(change.instance)
    assert order.get_deferred_fields() == {
        field.attname for field in sales.Order._meta.concrete_fields
    } - {"id", "status"}
    assert no_query(lambda: (order.pk, order.status)) == (1, "open")
    assert order.total == Decimal("12.50")
    assert order.customer.name == "Ada"
    # Django writes only the loaded fields, and so does not undo later writes of others.
    flash.database.execute("UPDATE sales.orders SET note = 'mine'")
    order.status = "paid"
    order.save()
    assert flash.database.execute("SELECT status, note FROM sales.orders") == [("paid", "mine")]


def test_instance_defers_an_unchanged_large_value(flash, sales, no_query):
    flash.handler(sales.Order, "update").start()
    large = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 500) n)"
    flash.do(CUSTOMER, ORDER, f"UPDATE sales.orders SET note = {large}")
    flash.delivered()
    flash.do("UPDATE sales.orders SET status = 'paid'")
    (change,) = flash.delivered()
    assert change.new["note"] is UNCHANGED
    order = no_query(change.instance)
    assert order.get_deferred_fields() == {"note"}
    assert len(order.note) == 16_000


@pytest.mark.parametrize("schema", ["public", "extensions"])
def test_instance_reads_types_of_extensions_as_a_query_does(flash, sales, no_query, schema):
    class Sample(Model):
        hstores = ArrayField(HStoreField())
        words = ArrayField(TextField())
        grid = ArrayField(ArrayField(HStoreField()))
        domain = HStoreField(null=True)
        domains = ArrayField(HStoreField(), null=True)
        pair = TextField()
        paths = TextField()

        class Meta:
            app_label = "samples"
            apps = Apps()

    flash.database.execute(
        f"CREATE SCHEMA IF NOT EXISTS {schema}; CREATE EXTENSION hstore SCHEMA {schema}; "
        f"CREATE EXTENSION citext SCHEMA {schema}; CREATE EXTENSION ltree SCHEMA {schema}",
        f"CREATE DOMAIN labels AS {schema}.hstore; CREATE DOMAIN label_list AS {schema}.hstore[]; "
        f"CREATE TYPE pair AS (attributes {schema}.hstore, words {schema}.citext[], n int)",
        f"CREATE TABLE samples_sample (id bigint PRIMARY KEY, hstores {schema}.hstore[], "
        f"words {schema}.citext[], grid {schema}.hstore[], domain labels, domains label_list, "
        f"pair pair, paths {schema}.ltree[])",
    )
    flash.handler("samples_sample").start()
    hstore, text = "'{\"x=>1\"}'", "'{A,b,NULL}'"
    flash.do(
        f"INSERT INTO samples_sample VALUES (1, {hstore}, {text}, '{{{{x=>1}},{{y=>NULL}}}}', "
        f"'x=>1', {hstore}, ROW('x=>1', {text}, 5), '{{a.b}}')"
    )
    (change,) = flash.delivered()
    instance = no_query(change.instance, model=Sample)
    django_signals.get_hstore_oids.cache_clear()
    django_signals.get_citext_oids.cache_clear()
    connection.close()
    (read,) = Sample.objects.all()
    assert instance.hstores == read.hstores == [{"x": "1"}]
    assert instance.words == read.words == ["A", "b", None]
    assert instance.grid == read.grid == [[{"x": "1"}], [{"y": None}]]
    assert instance.domain == read.domain == {"x": "1"}
    assert instance.domains == read.domains == [{"x": "1"}]
    assert instance.paths == read.paths == "{a.b}"
    # psycopg reads a composite type as text until it is registered; a change needs no registration.
    assert instance.pair == {"attributes": {"x": "1"}, "words": ["A", "b", None], "n": 5}


def test_instance_of_the_old_row_never_loads_current_values(flash, sales, no_query):
    flash.handler(sales.Order, "update|delete").start()
    flash.do(CUSTOMER, ORDER, "UPDATE sales.orders SET status = 'paid'", "DELETE FROM sales.orders")
    update, delete = flash.delivered()
    assert no_query(update.instance).status == "paid"
    for change, adding in ((update, False), (delete, True)):
        old = no_query(change.instance, "old")
        assert (old.pk, old._state.adding) == (1, adding)
        with pytest.raises(
            NoInstance, match="old value of status of sales.Order, .* IDENTITY FULL"
        ):
            no_query(getattr, old, "status")
        pickle.loads(pickle.dumps(old))
    assert no_query(delete.instance).pk == 1


def test_instance_of_the_old_row_with_a_full_identity(flash, sales, no_query):
    flash.handler(sales.Order, "update|delete", fields=["status"]).start()
    flash.do(CUSTOMER, ORDER, "UPDATE sales.orders SET status = 'paid', id = 7")
    flash.do("DELETE FROM sales.orders")
    update, delete = flash.delivered()
    before = no_query(update.instance, side="old")
    assert (before.pk, before.status) == (1, "open")
    assert no_query(update.instance, "new").pk == 7
    gone = no_query(delete.instance)
    assert (gone.pk, gone.status) == (7, "paid")


def test_instance_supports_proxies_and_child_models(flash, sales, no_query):
    flash.handler(sales.UrgentOrder).handler(sales.Book, name="books").start()
    flash.do(CUSTOMER, ORDER, "INSERT INTO sales_item (title) VALUES ('Emma')")
    flash.do("INSERT INTO sales_book (item_ptr_id, pages) VALUES (1, 320)")
    (change,) = flash.delivered()
    assert type(change.instance()) is sales.Order
    assert type(change.instance(model=sales.UrgentOrder)) is sales.UrgentOrder
    (book,) = (change.instance() for change in flash.delivered("books"))
    assert no_query(lambda: (book.pk, book.id, book.pages)) == (1, 1, 320)
    assert book.get_deferred_fields() == {"title"}
    assert book.title == "Emma"


def test_instance_supports_many_to_many_tables(flash, sales, no_query):
    flash.handler(sales.Item.buyers.through).start()
    flash.do(CUSTOMER, "INSERT INTO sales_item (title) VALUES ('Emma')")
    flash.do("INSERT INTO sales_item_buyers (item_id, customer_id) VALUES (1, 1)")
    (change,) = flash.delivered()
    assert no_query(lambda: change.instance().customer_id) == 1


def test_instance_keeps_an_infinite_time_as_text(models):
    change = make_change(Insert, row=[b"1", b"infinity"], created=(1184, "timestamptz"))
    assert change.instance().created == "infinity"


@override_settings(USE_TZ=False, TIME_ZONE="Europe/Paris")
def test_instance_times_are_local_without_time_zones(models):
    change = make_change(
        Insert, row=[b"1", b"2026-07-01 10:00:00+00"], created=(1184, "timestamptz")
    )
    assert change.new["created"] == datetime(2026, 7, 1, 10, tzinfo=timezone.utc)
    assert change.instance().created == datetime(2026, 7, 1, 12)


def test_instance_converts_json_and_addresses_by_their_fields(models):
    change = make_change(
        Insert,
        name="orders",
        schema="sales",
        row=[b"1", json.dumps({"a": [1.5]}).encode(), b"::1"],
        details=(3802, "jsonb"),
        address=(869, "inet"),
    )
    assert change.instance().details == {"a": [Decimal("1.5")]}
    assert change.instance().address == str(ipaddress.ip_address("::1"))


def test_instance_of_a_tenant_is_of_the_model_without_a_schema(models):
    change = make_change(Insert, schema="acme", row=[b"7", b"Ada"], full_name=(25, "text"))
    for customer in (change.instance(), change.instance(model=models.Customer)):
        assert (type(customer), customer.pk, customer.name) == (models.Customer, 7, "Ada")


@pytest.mark.parametrize(
    ("schema", "table", "model", "sentence"),
    [
        # A model names the schema `sales`, so its tables are those of the models that do.
        ("sales", "sales_customer", None, "No Django model has the table sales.sales_customer"),
        # Its model names another schema.
        ("acme", "orders", None, "No Django model has the table acme.orders"),
        ("acme", "orders", "Order", "sales.Order is a model of sales.orders, and the change is"),
    ],
)
def test_instance_keeps_to_the_schema_that_a_model_names(models, schema, table, model, sentence):
    change = make_change(Insert, name=table, schema=schema, row=[b"7"])
    with pytest.raises(NoInstance, match=sentence):
        change.instance(model=model and getattr(models, model))


def test_instance_of_a_tenant_is_chosen_by_model_in_a_schema_with_models(models):
    change = make_change(Insert, schema="sales", row=[b"7"])
    assert type(change.instance(model=models.Customer)) is models.Customer


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda: make_change(Truncate), {}, "^truncate public.sales_customer .* has no 'new' row"),
        (
            lambda: make_change(Insert, row=[b"1"]),
            {"side": "old"},
            "has no 'old' row: an insert has 'new'",
        ),
        (lambda: make_change(Insert, row=[b"1"]), {"side": "mew"}, "has no 'mew' row"),
        (
            lambda: make_change(LogicalMessage, row=b"", schema=""),
            {},
            "^message .* has no 'new' row",
        ),
        (
            lambda: make_change(Insert, name="else", row=[b"1"]),
            {},
            "No Django model has the table public.else; .* change.new and change.old",
        ),
        (
            lambda: make_change(Insert, name="else", row=[b"1"]),
            {"model": "Order"},
            "sales.Order is a model of sales.orders, and the change is insert public.else",
        ),
        (
            lambda: make_change(Insert, row=[b"1"]),
            {"model": "Stamped"},
            "change.instance.model=….: Stamped is an abstract model",
        ),
    ],
)
def test_instance_refuses_changes_without_a_model_row(models, make, options, sentence):
    if "model" in options:
        options = {"model": getattr(models, options["model"])}
    with pytest.raises(NoInstance, match=sentence):
        make().instance(**options)


def test_instance_needs_a_primary_key(models):
    columns = (Column("id", 20, "int8", identity=False),)
    table = Table("public", "sales_customer", None, "f", ("id",), columns)
    change = Update(None, None, [b"5"], Origin(table, Transaction(Lsn(1), 1, 0), 0))
    assert change.instance().pk == 5
    with pytest.raises(NoInstance, match="has no value for id, the primary key of .* 'old' row"):
        change.instance("old")


def test_instance_before_django_setup_is_explained():
    code = (
        "from flash_celery import Insert\n"
        "from tests.django.rows import make_change\n"
        "make_change(Insert, row=[b'1']).instance()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "NoInstance: change.instance() needs Django's models, which" in ended.stderr


def test_instance_without_django_is_explained():
    code = (
        "import sys\n"
        "sys.modules['django'] = None\n"
        "from flash_celery import Truncate\n"
        "from flash_celery.changes.rows import Origin, Table\n"
        "Truncate(Origin(Table('public', 't', None, 'f', (), ()), None, 0)).instance()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "NoInstance: change.instance() needs Django: pip install" in ended.stderr
