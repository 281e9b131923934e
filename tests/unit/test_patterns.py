"""The patterns of `on_change`: how they are read, and which names they match."""

from dataclasses import dataclass

import pytest

from flash_celery import on_change, testing
from flash_celery.errors import SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.handlers.patterns import Glob
from flash_celery.messages.task_options import _overlap
from flash_celery.table_name import TableName
from tests.docs.conftest import Page


def declared(app, table, **options):
    @app.task(name="handler", shared=False)
    def handler(change): ...

    on_change(table, **options)(handler)
    app.finalize()
    (subscription,) = subscriptions_of(app)
    return subscription


@pytest.mark.parametrize(
    ("table", "options", "matching", "others"),
    [
        (
            "tenant_*.orders",
            {},
            ["tenant_.orders", "tenant_a.orders"],
            ["tenant.orders", "a.orders"],
        ),
        ("*", {}, ["public.a"], ["other.a", "public.flash_celery_marks", "public.kombu_queue"]),
        ("*.a?", {}, ["public.ab"], ["pg_catalog.ab", "information_schema.ab", "x.a", "x.abc"]),
        ("orders", {"schema": "t*"}, ["t1.orders"], ["public.orders"]),
        ("*.kombu_queue", {}, ["public.kombu_queue"], []),
        ("t.*", {"exclude": ["a", "t.b*"]}, ["t.c"], ["t.a", "t.b", "t.bc"]),
        ('"t.".*', {}, ['"t.".a'], ["t.a"]),
    ],
)
def test_pattern_matches_names(app, table, options, matching, others):
    subscription = declared(app, table, **options)
    assert [name for name in matching if not subscription.is_on(TableName.parse(name))] == []
    assert [name for name in others if subscription.is_on(TableName.parse(name))] == []


def test_name_in_quotes_is_no_pattern(app):
    subscription = declared(app, '"tenant_*".orders')
    assert subscription.pattern is None
    assert subscription.table == TableName("tenant_*", "orders")


def test_schema_replaces_the_one_of_the_name(app):
    assert declared(app, "orders", schema="sales").table == TableName("sales", "orders")


@pytest.mark.parametrize(
    ("table", "options", "error"),
    [
        ("orders", {"exclude": ["a"]}, "exclude= is for patterns"),
        ("t.*", {"schema": "x"}, "the table names the schema t; leave out schema="),
        ("*", {"schema": "a.b"}, "schema is a name or a pattern"),
        ("*", {"exclude": 5}, "exclude is a list of names or patterns"),
        ("*.*.*", {}, "is not a table name"),
    ],
)
def test_wrong_pattern_is_refused(app, table, options, error):
    with pytest.raises(SubscriptionError, match=error):
        declared(app, table, **options)


def test_like_is_the_same_pattern():
    assert Glob("a_%*?").like == r"a\_\%%_"
    assert Glob("a*", quoted=True).like == "a*"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("tenant_*.orders.insert", "tenant_vip.*.*", True),
        ("tenant_*.orders.insert", "*.*.delete", False),
        ("tenant_*.orders.insert", "[a-t]enant_1.*", True),
        ("a*", "b*", False),
        ("*a", "*b", False),
        ("a*c", "ab*", True),
    ],
)
def test_globs_may_overlap(first, second, expected):
    assert _overlap(first, second) is expected
    assert _overlap(second, first) is expected


def test_example_of_the_page(app, capsys):
    names = {"app": app}
    exec(Page("howto/table-patterns.md").blocks["patterns"], names)
    flash = testing.Flash(app)
    changes = [
        testing.insert("tenant_a.orders", {"id": 1}),
        testing.delete("tenant_a.orders", {"id": 1}),
        testing.insert("tenant_test.orders", {"id": 2}),
        testing.insert("crm.audit_login", {"id": 3}),
        testing.insert("orders", {"id": 4}),
    ]
    for change in changes:
        flash.apply(change)
    assert capsys.readouterr().out == (
        "put tenant_a 1\nremove tenant_a 1\narchive crm.audit_login {'id': 3}\n"
    )


@dataclass
class Order:
    id: int
    total: int = 0


def test_rows_of_a_pattern_are_typed_and_ordered(app):
    received = []

    @app.task(name="typed", shared=False)
    def typed(change):
        received.append(change.new)

    on_change("tenant_*.orders", "insert", into=Order, ordered=True)(typed)
    flash = testing.Flash(app)
    change = testing.insert("tenant_a.orders", {"id": 1, "total": 5}, key=["id"])
    (task,) = flash.enqueued(change)
    assert task.ordering_keys == [{"id": 1}]
    flash.apply(change)
    assert received == [Order(1, 5)]
