"""When a lost broker is refilled, and when not."""

import pytest

from flash_celery import on_change
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.settings import Settings
from flash_celery.worker.refill import on_lost_broker


@pytest.mark.parametrize(
    ("setting", "window", "ordered", "expected"),
    [
        ("auto", 0, False, "continue"),
        ("auto", 60, False, "continue"),
        ("auto", 0, True, "continue"),
        ("auto", 60, True, "refill"),
        ("refill", 60, False, "refill"),
        ("continue", 60, True, "continue"),
        ("halt", 0, False, "halt"),
    ],
)
def test_lost_broker_is_refilled_by_default_for_ordered_handlers(
    app, setting, window, ordered, expected
):
    @on_change("orders", ordered=ordered)
    @app.task(name="handle")
    def handle(change): ...

    app.conf.update(flash_on_lost_broker=setting, flash_replay_window=window)
    app.finalize()
    assert on_lost_broker(Settings.from_app(app), subscriptions_of(app)) == expected
