"""`backfill=`: how a handler asks for the rows that its table has already."""

from dataclasses import replace

import pytest

from flash_celery import Backfill, on_backfill_end, on_change
from flash_celery.errors import SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.handlers.subscriptions import operations_of


@pytest.fixture
def declare(new_app):
    """Declares one task with `on_change("orders", …)`, and returns its subscription."""

    def make(*arguments, **options):
        app = new_app(broker_url="memory://", flash_dsn="host=x dbname=x")

        @on_change("orders", *arguments, **options)
        @app.task(name="handler")
        def handler(change): ...

        (subscription,) = subscriptions_of(app)
        return subscription

    return make


@pytest.mark.parametrize(
    ("backfill", "wish"),
    [
        (None, None),
        (False, False),
        (True, Backfill()),
        (Backfill(rate=500, chunk=10), Backfill(500, 10)),
    ],
)
def test_handler_is_backfilled_as_it_says(declare, backfill, wish):
    subscription = declare(backfill=backfill)
    assert subscription.backfill == wish
    # The positions on Redis are bound to it.
    assert repr(subscription) == repr(replace(subscription, backfill=None))


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ([], {"backfill": "yes"}, "backfill is True, False or a Backfill, not 'yes'"),
        ([], {"backfill": Backfill(rate=0)}, "rate=0; it is rows a second, above 0"),
        ([], {"backfill": Backfill(chunk=True)}, "chunk=True; it is a number of rows from 1 to"),
        ([], {"backfill": Backfill(queue=" ")}, "queue=' '; it is the name of a Celery queue"),
        (["update|delete"], {"backfill": True}, "needs a handler of insert, because rows are"),
        (
            ["insert|update"],
            {"backfill": Backfill(truncate=True)},
            "is not on truncate: it would not learn that its copy begins empty",
        ),
    ],
)
def test_backfill_refuses_what_it_cannot_do(declare, arguments, options, reason):
    with pytest.raises(SubscriptionError, match=reason):
        declare(*arguments, **options)


@pytest.mark.parametrize(("backfill", "captured"), [(True, "INSERT|UPDATE"), (False, "INSERT")])
def test_updates_are_watched_for_backfills_of_inserts(declare, backfill, captured):
    subscription = declare("insert", backfill=backfill)
    assert subscription.captured == operations_of(captured)
    assert not subscription.receives_each_update


@pytest.mark.parametrize(
    ("options", "receives"),
    [({}, True), ({"fields": ["n"]}, False), ({"ignore_own": True}, False)],
)
def test_rows_that_move_are_read_unless_each_update_is_delivered(declare, options, receives):
    assert declare(**options).receives_each_update is receives


def test_end_of_backfills_comes_in_the_way_of_the_changes(new_app):
    app = new_app(broker_url="memory://", flash_dsn="host=x dbname=x")

    @on_backfill_end()
    @on_change("orders", batch=5, queue="rows", ordered=True)
    @app.task(name="rows")
    def rows(changes): ...

    @on_backfill_end("rows", queue="ends")
    @app.task(name="other")
    def other(change): ...

    other_end, _, own_end = subscriptions_of(app)
    assert (other_end.ends_of, other_end.queue, other_end.batch) == ("rows", "ends", None)
    assert (own_end.ends_of, own_end.queue, own_end.batch.size) == ("rows", "rows", 5)
    assert own_end.ordered


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (None, "has on_backfill_end\\(\\) and no on_change"),
        ("nothing", "on_backfill_end\\('nothing'\\), which is no handler of a table"),
        (5, "on_backfill_end takes the name of a task, not 5"),
    ],
)
def test_end_of_backfills_names_a_handler(new_app, handler, reason):
    app = new_app(broker_url="memory://", flash_dsn="host=x dbname=x")

    @on_backfill_end(handler)
    @app.task(name="other")
    def other(change): ...

    with pytest.raises(SubscriptionError, match=reason):
        subscriptions_of(app)
