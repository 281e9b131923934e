"""The publishing thread: order, retries, giving up."""

import sys
import threading
import time
from itertools import repeat
from types import ModuleType

import pytest

from flash_celery.errors import ConfirmedLost, TakenOver
from flash_celery.messages.batcher import PublishBatch
from flash_celery.messages.deduplication import Lease, now
from flash_celery.protocol.lsn import Lsn
from flash_celery.publishing import thread as publishing
from flash_celery.publishing.backpressure import Backpressure
from flash_celery.publishing.thread import Claim
from flash_celery.publishing.tracing import active_tracers
from flash_celery.worker.control import Control
from tests.unit.builders import message, wait


@pytest.mark.parametrize("name", ["sentry_sdk", "opentelemetry.instrumentation.celery"])
def test_library_that_another_thread_is_importing_traces_nothing_yet(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert active_tracers() == []


def unit(first, count, position):
    messages = [message(n) for n in range(first, first + count)]
    return PublishBatch(messages, Lsn(position), count)


def test_batches_are_confirmed_in_order(thread):
    for number in range(3):
        thread.put(unit(number * 10, 10, number + 1))
    thread.put(PublishBatch([], Lsn(9), 0))
    thread.start()
    wait(lambda: thread.idle)
    assert [m.body for m in thread.publisher.queues["flash"]] == [str(n) for n in range(30)]
    assert thread.confirmed[-1] == 9
    assert thread.has_room


def test_confirmed_messages_are_not_sent_again(thread):
    thread.publisher.failures = [3, 0, 4]
    thread.put(unit(0, 10, 1))
    thread.start()
    wait(lambda: thread.idle)
    assert [m.body for m in thread.publisher.queues["flash"]] == [str(n) for n in range(10)]
    assert thread.confirmed == [1]


def test_pause_after_a_failure_is_short_if_messages_were_confirmed(thread, monkeypatch):
    """As when several ordering keys follow each other, each of which waits for empty lanes."""
    monkeypatch.setattr(publishing, "delays", lambda: iter((0.0, 3600.0)))
    thread.publisher.failures = [1, 1, 1]
    thread.put(unit(0, 10, 1))
    thread.start()
    wait(lambda: thread.idle)
    assert thread.confirmed == [1]


def test_pause_after_a_failure_is_no_longer_than_its_reason_needs(thread, monkeypatch):
    monkeypatch.setattr(publishing, "delays", lambda: repeat(3600.0))
    thread.publisher.failures, thread.publisher.longest_pause = [0, 0], 0.0
    thread.put(unit(0, 10, 1))
    thread.start()
    wait(lambda: thread.idle)
    assert thread.confirmed == [1]


def test_discarded_batch_is_never_confirmed(thread):
    thread.publisher.broken = True
    thread.put(unit(0, 10, 1))
    thread.put(unit(10, 10, 2))
    thread.start()
    time.sleep(0.05)
    thread.discard()
    thread.publisher.broken = False
    wait(lambda: thread.idle)
    thread.put(unit(20, 1, 3))
    wait(lambda: thread.idle)
    assert thread.confirmed == [3]
    assert thread.has_room


def test_discard_before_sending_drops_the_batch(thread, monkeypatch):
    thread.publisher.broken = True
    taken = thread._deliver

    def late(generation, units):
        thread.discard()
        taken(generation, units)

    monkeypatch.setattr(thread, "_deliver", late)
    thread.put(unit(0, 10, 1))
    thread.start()
    wait(lambda: thread.idle)
    assert thread.confirmed == []


def test_claim_has_room_once_its_deduplicator_can_be_picked_up(thread):
    thread.claim(Claim(Lease("", "")))
    assert not thread.has_room
    assert thread.deduplicator is None
    thread.start()
    wait(lambda: thread.has_room)
    assert thread.deduplicator is not None
    thread.discard()
    assert thread.deduplicator is None


def test_unexpected_error_reaches_the_main_thread(thread, monkeypatch):
    monkeypatch.setattr(thread.publisher, "publish", lambda messages: 1 / 0)
    thread.put(unit(0, 1, 1))
    thread.start()
    wait(lambda: thread.failed)
    assert isinstance(thread.failed[0], ZeroDivisionError)


def test_discard_while_sending_confirms_nothing(thread, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    publish = thread.publisher.publish

    def slow(messages):
        entered.set()
        assert go_on.wait(5)
        publish(messages)

    monkeypatch.setattr(thread.publisher, "publish", slow)
    thread.put(unit(0, 1, 7))
    thread.start()
    assert entered.wait(5)
    thread.discard()
    go_on.set()
    wait(lambda: thread.idle)
    assert thread.confirmed == []
    assert thread.has_room


def test_idle_connection_that_died_is_reopened(thread, caplog):
    thread.put(unit(0, 1, 1))
    thread.start()
    wait(lambda: thread.idle)
    thread.publisher.broken = True
    wait(lambda: "Nothing is acknowledged until it works again" in caplog.text)
    # The slot still follows changes without a handler, and nothing is in flight.
    thread.put(PublishBatch([], Lsn(5), 0))
    wait(lambda: thread.confirmed == [1, 5])
    assert thread.idle
    thread.publisher.broken = False
    wait(lambda: "The broker confirms messages again" in caplog.text)
    assert caplog.text.count("Nothing is acknowledged") == 1
    assert thread.publisher.opened == 2


def test_unused_broker_is_not_asked(thread, monkeypatch):
    monkeypatch.setattr(thread.publisher, "check", lambda: 1 / 0)
    thread.put(PublishBatch([], Lsn(5), 0))
    thread.start()
    wait(lambda: thread.confirmed == [5])
    time.sleep(0.1)
    assert thread.failed == []


@pytest.fixture
def bounded(thread):
    """The publishing thread with room for ten messages in its queue."""
    thread._backpressure = Backpressure(10, thread.publisher.depth)
    return thread


def test_full_queue_delays_the_rest(bounded):
    bounded.put(unit(0, 35, 1))
    bounded.put(unit(35, 35, 2))
    bounded.start()
    wait(lambda: len(bounded.publisher.queues.get("flash", ())) == 10)
    time.sleep(0.5)
    assert bounded.confirmed == []

    def all_read():
        bounded.consume()
        return len(bounded.read) == 70

    wait(all_read)
    assert bounded.read == list(range(70))
    wait(lambda: bounded.idle)
    assert bounded.confirmed[-1] == 2


def test_discard_drops_batches_that_wait_for_room(bounded):
    bounded.put(unit(0, 35, 1))
    bounded.start()
    wait(lambda: len(bounded.publisher.queues.get("flash", ())) == 10)
    bounded.discard()
    wait(lambda: bounded.idle)
    bounded.consume()
    bounded.put(unit(100, 1, 3))
    wait(lambda: bounded.idle)
    assert bounded.confirmed == [3]


def test_broker_failure_during_a_depth_check_loses_and_repeats_nothing(bounded):
    bounded.put(unit(0, 35, 1))
    bounded.start()
    wait(lambda: len(bounded.publisher.queues.get("flash", ())) == 10)
    bounded.publisher.broken = True
    time.sleep(0.5)
    bounded.publisher.broken = False

    def all_read():
        bounded.consume()
        return bounded.idle

    wait(all_read)
    bounded.consume()
    assert bounded.read == list(range(35))


def test_publishing_waits_for_a_lease(thread):
    thread._session.lease.until = now() - 1
    thread.put(unit(0, 3, 1))
    thread.start()
    assert not thread.publisher.tried.wait(0.5)
    thread._session.lease.until = now() + 60
    wait(lambda: thread.idle)
    assert thread.confirmed == [1]


def test_discard_without_a_lease_publishes_nothing(thread):
    thread._session.lease.until = now() - 1
    thread.put(unit(0, 3, 1))
    thread.start()
    time.sleep(0.1)
    thread.discard()
    thread._session.lease.until = now() + 60
    thread.put(unit(10, 1, 2))
    wait(lambda: thread.idle)
    assert [m.body for m in thread.publisher.queues["flash"]] == ["10"]
    assert thread.confirmed == [2]


def test_discard_while_connecting_publishes_nothing(thread):
    thread.put(unit(0, 3, 1))
    connect = thread.publisher.open

    def open_late(queues):
        connect(queues)
        thread.discard()

    thread.publisher.open = open_late
    thread.start()
    wait(lambda: thread.idle)
    assert thread.publisher.queues["flash"] == []
    assert thread.confirmed == []


def test_publishing_stops_after_a_failure_and_keeps_the_first(thread):
    """The loss would not be logged, and what follows it would be confirmed."""
    control, errors = Control(), [ConfirmedLost("It is lost."), TakenOver("It is taken.")]
    publish = thread.publisher.publish

    def fail_first(messages):
        if errors:
            raise errors.pop(0)
        publish(messages)

    thread.publisher.publish = fail_first
    thread._reader = control
    thread._together = 0
    for number in (1, 2, 3):
        thread.put(unit(number, 1, number))
    thread.start()
    wait(lambda: control.failure)
    time.sleep(0.1)
    with pytest.raises(ConfirmedLost):
        control.check()
    errors.clear()
    thread.discard()
    thread.put(unit(1, 1, 1))
    wait(lambda: thread.idle)
    assert [m.body for m in thread.publisher.queues["flash"]] == ["1"]
    assert thread.confirmed == [1]
    control.check()
    control.fail(TakenOver("It is taken."))
    control.fail(ConfirmedLost("It is lost."))
    with pytest.raises(TakenOver):
        control.check()
    control.check()
    control.close()


def test_slow_broker_is_logged(thread, caplog):
    connect = thread.publisher.open

    def open_late(queues):
        wait(lambda: "has not answered for 0.02 s" in caplog.text)
        connect(queues)

    thread.publisher.open = open_late
    thread.put(unit(0, 1, 1))
    thread.start()
    wait(lambda: thread.idle)
    assert thread.confirmed == [1]


def test_lease_expires_while_the_host_is_suspended(thread, monkeypatch):
    """The monotonic clock of Linux stands still then, and another one may have the slot."""
    stands_still = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: stands_still)
    thread._session.lease.until = now() + 0.2
    time.sleep(0.3)
    thread.put(unit(0, 3, 1))
    thread.start()
    assert not thread.publisher.tried.wait(0.5)
    monkeypatch.undo()
    thread._session.lease.until = now() + 60
    wait(lambda: thread.idle)
    assert thread.confirmed == [1]
