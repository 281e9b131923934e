"""One call of a handler from a lane: what Celery does of it, and what becomes of the change."""

import os
import time
from datetime import datetime, timedelta, timezone
from signal import SIGKILL

import pytest
from celery import Task
from celery.exceptions import Ignore, Reject
from celery.signals import task_failure, task_postrun, task_prerun, task_retry, task_success
from kombu.utils.json import dumps, loads

from flash_celery import Changes, Ordered, on_change, testing
from flash_celery.lanes.calls import HandlerCalls, traced
from flash_celery.lanes.drain import Blocked, Head, Later
from flash_celery.messages.lane_entries import encode_form
from flash_celery.messages.task_ids import task_id_of_change
from flash_celery.publishing.brokers.lane_store import LostLease


@pytest.fixture
def call(new_app):
    """Declares a handler, and calls it for a change as a drain does."""
    app = new_app(broker_url="memory://")

    def make(function, ordered=True, batch=None, headers=None, **options):
        task = app.task(bind=True, name="handler", **options)(function)
        on_change("orders", ordered=ordered, batch=batch)(task)
        app.finalize()
        handler = traced(app, "handler", "worker@host")
        calls = HandlerCalls(app, handler, "1/slot", "worker@host", os.getpid())
        calls.read_form(encode_form("flash", {"task": "handler", **(headers or {})}, {}))
        return calls, app.tasks["handler"]

    return make


def head(*ids, retries=0, deaths=0, expires=None):
    changes = [testing.insert("orders", id=number) for number in ids or (1,)]
    return Head(changes, retries, deaths, 1, expires)


def test_lane_call_has_the_request_and_signals_of_a_task(call):
    seen, signals = [], []

    def handler(self, change):
        request = self.request
        seen.append((request.id, request.retries, request.hostname, change.new["id"]))
        seen.append((request.delivery_info["routing_key"], request.called_directly))

    calls, _ = call(handler)
    receivers = []
    for signal in (task_prerun, task_success, task_postrun):
        receivers.append(lambda signal=signal, **_: signals.append(signal))
        signal.connect(receivers[-1])
    first = head(7, retries=2)
    assert calls.handle(first) is None
    task_id = task_id_of_change("1/slot", "handler", first.changes[0].id)
    assert seen == [(task_id, 2, "worker@host", 7), ("flash", False)]
    assert signals == [task_prerun, task_success, task_postrun]


def test_lane_call_has_a_fence_which_does_not_travel(call):
    seen = []

    def handler(self, changes):
        seen.extend(changes)

    calls, _ = call(handler, batch=5)
    first = head(1, 2)
    assert [change.fence for change in first.changes] == [None, None]
    calls.handle(first._replace(fence=7))
    assert [change.fence for change in seen] == [7, 7]
    passed_on = loads(dumps(seen[0]))
    assert (passed_on, passed_on.fence) == (seen[0], None)


def test_lane_call_is_retried_without_a_message(call):
    retried = []

    def handler(self, change):
        raise self.retry(countdown=30)

    calls, _ = call(handler, max_retries=3)

    def noted(**_):
        retried.append(1)

    task_retry.connect(noted)
    assert calls.handle(head(retries=1)) == Later(30, 2)
    assert retried == [1]


def test_lane_call_retried_without_an_exception_is_retried(call):
    """`retry(throw=False)` publishes nothing in a lane, so it would be lost."""

    def handler(self, change):
        self.retry(countdown=5, throw=False)

    calls, _ = call(handler)
    assert calls.handle(head()) == Later(5, 1)


def test_lane_call_retried_at_a_moment_waits_until_then(call):
    def handler(self, change):
        raise self.retry(eta=datetime.now(timezone.utc) + timedelta(minutes=1))

    verdict = call(handler)[0].handle(head())
    assert 55 < verdict.seconds <= 60


def test_lane_call_retried_past_its_own_retry_publishes_nothing(call):
    class Patient(Task):
        def later(self):
            return super().retry(countdown=5)

    def handler(self, change):
        raise self.later()

    calls, task = call(handler, base=Patient)
    assert calls.handle(head()) == Later(5, 1)
    assert messages_in(task.app, "celery", "flash") == []


def test_lane_call_that_replaces_its_task_publishes_the_other(call):
    eager = []

    def handler(self, change):
        eager.append(self.request.is_eager)
        raise self.replace(self.app.signature("other", args=[change.new["id"]]))

    calls, task = call(handler)
    assert calls.handle(head(7)) is None
    (message,) = messages_in(task.app, "celery", "flash")
    assert message.headers["task"] == "other"
    assert message.payload[0] == [7]
    assert eager == [False]


def messages_in(app, *queues):
    with app.connection_for_read() as connection:
        bound = [app.amqp.queues[name](connection.default_channel) for name in queues]
        for queue in bound:
            queue.declare()
        return [message for queue in bound for message in iter(queue.get, None)]


def test_lane_call_leaves_no_limit_of_retries_to_the_next_one(call):
    """Celery leaves `override_max_retries` on the task, which stays the same object."""

    def handler(self, change):
        if change.new["id"] == 1:
            raise self.retry(countdown=0, max_retries=1)
        raise ConnectionError

    calls, task = call(
        handler, autoretry_for=(ConnectionError,), max_retries=9, default_retry_delay=1
    )
    assert calls.handle(head(1)) == Later(0, 1)
    assert "override_max_retries" not in task.__dict__
    assert isinstance(calls.handle(head(2, retries=5)), Later)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(Ignore(), None), (Reject(), None), (Reject(requeue=True), Later(1.0, 4))],
)
def test_lane_call_that_is_ignored_or_rejected(call, error, verdict):
    def handler(self, change):
        raise error

    assert call(handler)[0].handle(head(retries=4)) == verdict


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()])
def test_lane_call_that_fails_for_good_becomes_a_dead_letter(call, error, letters_of):
    failures = []

    def handler(self, change):
        raise error

    def noted(**_):
        failures.append(1)

    task_failure.connect(noted)
    calls, task = call(handler)
    assert calls.handle(head(5)) is None
    *_, letter = letters_of(task.app)  # the broker in memory is shared
    assert (letter.handler, letter.queue, letter.error) == (
        "handler",
        "flash",
        type(error).__name__,
    )
    assert letter.tables == ["public.orders"]


def test_lane_call_that_fails_for_good_may_block_its_lane(call):
    def handler(self, change):
        raise ValueError("no")

    calls, _ = call(handler, ordered=Ordered(on_failure="block"))
    verdict = calls.handle(head())
    assert isinstance(verdict, Blocked)
    assert '"error": "ValueError"' in verdict.reason


def test_lane_call_after_too_many_deaths_becomes_a_dead_letter_without_a_call(call, letters_of):
    def handler(self, change):
        raise AssertionError("called")

    calls, task = call(handler)
    assert calls.handle(head(deaths=3)) is None
    *_, letter = letters_of(task.app)  # the broker in memory is shared
    assert (letter.error, letter.deaths) == ("ProcessKilled", 3)


def test_lane_call_that_has_expired_is_not_made(call):
    def handler(self, change):
        raise AssertionError("called")

    assert call(handler)[0].handle(head(expires=1.0)) is None


def test_lane_call_of_a_batch_has_all_its_changes(call):
    seen = []

    def handler(self, changes):
        seen.append(changes)

    calls, _ = call(handler, batch=3)
    assert calls.size == 3
    calls.handle(head(1, 2))
    assert isinstance(seen[0], Changes)
    assert [change.new["id"] for change in seen[0]] == [1, 2]


@pytest.fixture
def letters_of():
    from flash_celery.dead_letters.queue import DeadLetterFilter, DeadLetterQueue

    def find(app):
        return DeadLetterQueue(app, "flash.dead").find(DeadLetterFilter())

    return find


def test_lane_call_past_its_limit_ends_its_process_whatever_can_be_stored(call, monkeypatch):
    killed = []
    monkeypatch.setattr("flash_celery.lanes.calls.os.kill", lambda *args: killed.append(args))

    def lost(verdict, changes):
        raise LostLease

    def handler(self, change):
        time.sleep(0.5)

    calls, _ = call(handler, ordered=Ordered(on_failure="block"))
    calls._main_process = None
    calls.on_limit = lost
    calls.read_form(encode_form("flash", {"task": "handler", "timelimit": [0.1, None]}, {}))
    calls.handle(head())
    assert killed == [(os.getpid(), SIGKILL)]
