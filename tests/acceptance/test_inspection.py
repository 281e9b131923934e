"""What the Celery workers reply, and that nothing is waited for which cannot come.

The wait for a further reply is so long in most of these tests that the test's own limit ends it.
"""

import signal
import time

import pytest
import redis

from example_project.servers import wait_until
from flash_celery import on_change
from flash_celery.commands import inspection
from flash_celery.commands.inspection import Inspection
from flash_celery.commands.worker_checks import Registered, unhandled
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.publishing.brokers.redis_keys import listeners

PATIENT = 3600.0


@pytest.fixture(autouse=True)
def no_former_workers(valkey):
    """End the connections that children of killed workers keep: to Redis these workers listen."""
    with redis.Redis.from_url(valkey.url) as client:
        client.client_kill_filter(_type="pubsub")


@pytest.fixture
def endless(monkeypatch):
    """Wait for a further reply longer than any test may take."""
    monkeypatch.setattr(inspection, "_SILENCE_SECONDS", PATIENT)


@pytest.fixture
def declare(new_app):
    """Make an app on the broker of a shop's workers, with subscriptions of these handlers."""

    def make(shop, *handlers):
        app = new_app(broker_url=shop.broker.url)
        for name in handlers:

            @app.task(name=name, shared=False)
            def handler(change): ...

            on_change("items")(handler)
        app.finalize()
        return app, subscriptions_of(app)

    return make


def running(shop, app, count, **options):
    """Start workers, and wait until all of them reply."""
    workers = [shop.worker(**options) for _ in range(count)]
    wait_until(
        lambda: len(app.control.inspect(timeout=2.0).ping() or {}) == count, f"{count} workers"
    )
    return workers


def test_inspection_without_workers_ends_at_once(any_shop, declare, endless):
    app, subscriptions = declare(any_shop, "shop.each")
    assert Inspection(app, "registered").replies() == {}
    assert unhandled(app, subscriptions) is None


def test_inspection_ends_when_every_handler_is_known(any_shop, declare, endless):
    app, subscriptions = declare(any_shop, "shop.each")
    running(any_shop, app, 2)
    assert unhandled(app, subscriptions) == []


def test_inspection_of_workers_without_handlers_to_look_for_says_that_they_answer(
    any_shop, declare, endless
):
    app, _ = declare(any_shop, "shop.each")
    running(any_shop, app, 1)
    assert unhandled(app, []) == []


def test_inspection_ends_when_each_worker_on_redis_has_replied(shop, declare, endless):
    app, subscriptions = declare(shop, "shop.each", "unknown")
    running(shop, app, 2)
    assert unhandled(app, subscriptions) == ["unknown"]
    assert len(Inspection(app, "active_queues").replies()) == 2


def test_inspection_names_the_handler_that_no_worker_knows(any_shop, declare):
    app, subscriptions = declare(any_shop, "shop.each", "unknown")
    running(any_shop, app, 2)
    assert unhandled(app, subscriptions) == ["unknown"]


def test_inspection_waits_for_a_slow_worker(any_shop, declare, endless):
    app, subscriptions = declare(any_shop, "shop.each")
    (worker,) = running(any_shop, app, 1)
    worker.send_signal(signal.SIGSTOP)
    registered = Registered(app, subscriptions)
    # Longer than a whole inspection of workers that reply, or of none.
    time.sleep(0.5)
    worker.send_signal(signal.SIGCONT)
    assert registered.unhandled() == []


def test_inspection_keeps_the_replies_of_others_if_one_worker_hangs(any_shop, declare):
    app, subscriptions = declare(any_shop, "shop.each", "unknown")
    hanging, _ = running(any_shop, app, 2)
    hanging.send_signal(signal.SIGSTOP)
    assert unhandled(app, subscriptions) == ["unknown"]


def test_inspection_of_a_killed_worker_ends(any_shop, declare):
    app, subscriptions = declare(any_shop, "shop.each")
    (worker,) = running(any_shop, app, 1)
    any_shop.end(worker, signal.SIGKILL)
    assert unhandled(app, subscriptions) is None


def test_inspection_tells_workers_of_one_name_apart(shop, declare, endless):
    app, _ = declare(shop, "shop.each")
    running(shop, app, 1)
    shop.worker(options=["-n", "worker0@%h"])

    channel = app.connection_for_read().channel()
    wait_until(lambda: listeners(channel, "celery.pidbox") == 2, "two workers")
    assert list(Inspection(app, "ping").replies().values()) == [{"ok": "pong"}]


def test_inspection_without_a_broker_replies_nothing(new_app):
    app = new_app(broker_url="redis://127.0.0.1:1/0")
    assert Inspection(app, "registered").replies() == {}


def test_inspection_leaves_no_queue_behind(shop, declare):
    app, subscriptions = declare(shop, "shop.each")
    running(shop, app, 1)
    client = redis.Redis(port=shop.broker.port)
    before = set(client.keys())
    assert unhandled(app, subscriptions) == []
    assert set(client.keys()) <= before
