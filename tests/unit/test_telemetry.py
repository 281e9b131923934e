"""Counters, and the time at which they count."""

import time

from flash_celery import telemetry as counting
from flash_celery.errors import ReplicationError
from flash_celery.handlers.subscriptions import Batch
from flash_celery.messages.batcher import Batcher, PublishBatch
from flash_celery.messages.deduplication import NOTHING
from flash_celery.messages.lane_messages import LaneForm, LaneMessage
from flash_celery.messages.task_message import Form
from flash_celery.protocol.lsn import Lsn
from flash_celery.telemetry import Telemetry, route, unix
from tests.unit.builders import Clock, delivery, message, template, wait

ROUTE = route("public.orders", "insert", "handle", "flash")


def test_telemetry_counts_the_changes_of_a_publish_batch_by_route(app):
    outbox, single = Batcher(None), template(app)
    for number in (1, 2):
        outbox.add(single, delivery(number), ROUTE)
    unit = outbox.collect(committed=5.0, latest=6.0)
    assert (unit.counts, unit.committed, unit.latest) == ({ROUTE: 2}, 5.0, 6.0)
    assert outbox.collect().counts == {}


def test_telemetry_counts_a_waiting_batch_when_it_is_published(app):
    clock = Clock()
    outbox, batch = Batcher(None, clock), template(app, batch=Batch(2, wait=5))
    for number in (1, 2, 3):
        outbox.add(batch, delivery(number), ROUTE)
    assert outbox.collect().counts == {ROUTE: 2}
    clock.now = 6.0
    assert outbox.collect().counts == {ROUTE: 1}


def test_telemetry_counts_only_confirmed_messages(thread):
    telemetry = thread._telemetry
    thread.publisher.failures = [1, 0]
    committed = time.time() - 2
    thread.put(
        PublishBatch([message(1), message(2)], Lsn(8), 2002, {ROUTE: 2}, committed, committed)
    )
    assert thread.oldest_commit() == committed
    assert not telemetry.enqueued
    thread.start()
    wait(lambda: thread.confirmed == [8])
    assert telemetry.enqueued == {ROUTE: 2}
    assert (telemetry.messages, telemetry.bytes, telemetry.failures) == (2, 2, {"PublishError": 2})
    assert telemetry.broker_failing is None
    assert telemetry.committed == committed
    assert thread.oldest_commit() is None
    assert sum(telemetry.delays.counts) == 1
    assert telemetry.delays.sum > 2
    assert [(error.kind, error.times) for error in telemetry.errors] == [("PublishError", 2)]


def test_telemetry_counts_the_bytes_of_lanes(thread):
    form = LaneForm("flash", "1/slot", "handle", 4, Form("flash", "handle", {}, {}))
    lanes = LaneMessage(form, [(0, 2, "first"), (1, 1, "second")], NOTHING)
    thread.put(PublishBatch([lanes], Lsn(8), 11, {ROUTE: 3}, 1.0, 1.0))
    thread.start()
    wait(lambda: thread.confirmed == [8])
    assert (thread._telemetry.messages, thread._telemetry.bytes) == (1, 11)


def test_telemetry_does_not_count_discarded_messages(thread):
    thread.put(PublishBatch([message(1)], Lsn(8), 1, {ROUTE: 1}, 1.0, 1.0))
    thread.discard()
    thread.put(PublishBatch([], Lsn(9), 0))
    thread.start()
    wait(lambda: thread.confirmed == [9])
    assert not thread._telemetry.enqueued
    assert thread._telemetry.messages == 0


def test_telemetry_delays_fall_into_their_buckets():
    delays = counting.Delays()
    for seconds in (-1, 0.005, 0.006, 1e9):
        delays.add(seconds)
    assert (delays.counts[0], delays.counts[1], delays.counts[-1]) == (2, 1, 1)


def test_telemetry_counts_repeated_errors_and_keeps_twenty():
    telemetry = Telemetry()
    for number in range(30):
        for _ in range(2):
            telemetry.record_error(ReplicationError(f"It failed {number}."))
    assert [error.message for error in telemetry.errors] == [
        f"It failed {n}." for n in range(10, 30)
    ]
    assert {error.times for error in telemetry.errors} == {2}
    assert telemetry.errors[0].solution == ReplicationError.solution


def test_telemetry_state_is_final_after_stopping():
    telemetry = Telemetry()
    telemetry.enter(counting.STREAMING)
    telemetry.enter(counting.STOPPING)
    telemetry.enter(counting.CONNECTING)
    assert telemetry.state == counting.STOPPING


def test_telemetry_converts_times_of_postgresql_to_unix():
    assert unix(0) == 0.0
    assert unix(1_500_000) == 946_684_801.5
