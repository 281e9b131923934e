"""What those who listen to Celery's publishing signals hear, and OpenTelemetry's spans."""

import asyncio
import gc
import time
import uuid
from datetime import datetime, timezone

import celery
import pytest
from celery import signals
from kombu import Queue
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flash_celery import on_change
from flash_celery.acknowledgement import Progress
from flash_celery.changes.change import Changes, Insert, Operation
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.messages.batcher import PublishBatch
from flash_celery.messages.deduplication import Lease
from flash_celery.messages.task_message import Form, Message
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing import signals as announcing
from flash_celery.publishing.brokers.amqp import AmqpPublisher
from flash_celery.publishing.brokers.base import json_encodes
from flash_celery.publishing.brokers.memory import MemoryPublisher
from flash_celery.publishing.thread import Claim, PublishingThread
from tests.unit.builders import templates_of

TABLE = Table("public", "orders", None, "d", ("id",), (Column("id", 23, "integer", True),))
#: A commit a minute ago, as PostgreSQL counts.
EPOCH = datetime(2000, 1, 1, tzinfo=timezone.utc).timestamp()


def delivery(*ids, ago=60.0):
    committed_at = int((time.time() - ago - EPOCH) * 1e6)
    rows = [encode_row("I", 0, None, None, [str(row_id).encode()]) for row_id in ids]
    return Delivery(TABLE, Transaction(Lsn(0x16B3748), 7, committed_at), 0, 0, 0, rows)


@pytest.fixture
def app(new_app, monkeypatch):
    app = new_app(broker_url="memory://")
    # As `flash replicate` does; threads have no current app of their own.
    monkeypatch.setattr(celery._state, "default_app", app)
    return app


@pytest.fixture
def template(app):
    def make(batch=None, **conf):
        app.conf.update(conf)

        def handle(change):
            pass

        if "shop.handle" not in app.tasks:
            on_change("orders", batch=batch)(app.task(handle, name="shop.handle", shared=False))
        app.finalize()
        (declared,) = subscriptions_of(app)
        return templates_of(app, [declared])[declared, Operation.INSERT]

    return make


@pytest.fixture
def heard():
    """The signals that were sent."""
    heard = []

    def before(**sent):
        sent["headers"]["spoken_to"] = True
        heard.append(("before", sent))

    def after(**sent):
        heard.append(("after", sent))

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    yield heard
    signals.before_task_publish.disconnect(before)
    signals.after_task_publish.disconnect(after)


@pytest.fixture
def spans(app):
    """OpenTelemetry with its instrumentation of Celery; the spans that have ended."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    CeleryInstrumentor().instrument()
    yield exporter.get_finished_spans
    CeleryInstrumentor().uninstrument()
    exporter.shutdown()


class Reader(Progress):
    """The reading thread, and the progress of its session; what happens is in `calls`."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.fail = self.calls.append

    def wake(self):
        self.calls.append("wake")


def published(messages, publisher=None):
    publisher, reader = publisher or MemoryPublisher(), Reader()
    thread = PublishingThread(publisher, [Queue("flash")], reader)
    thread._session = Claim(Lease("", ""), reader)
    reader.wake = thread.end
    thread.put(PublishBatch(messages, Lsn(1), 1))
    thread.start()
    thread.join(10)
    assert not reader.calls
    return publisher.queues["flash"]


def test_signals_have_no_listeners_by_default(template):
    messages = template().each(delivery(1, 2))
    assert announcing.announce(messages, json_encodes) == []
    assert all(message.plain for message in messages)


@pytest.mark.parametrize("conf", [{}, {"task_compression": "gzip"}])
def test_signals_carry_what_celery_sends(template, heard, conf):
    messages = template(**conf).each(delivery(5, 6))
    assert published(messages) == messages
    assert [when for when, _ in heard] == ["before", "before", "after", "after"]
    for (_, sent), message in zip(heard, messages * 2, strict=True):
        assert sent["sender"] == "shop.handle"
        assert sent["routing_key"] == "flash"
        assert sent["headers"]["id"] == message.id
        args, kwargs, embed = sent["body"]
        (change,) = args
        assert isinstance(change, Insert)
        assert sent["headers"]["argsrepr"] == repr(change)
        assert (kwargs, embed["chain"]) == ({}, None)
    assert all(message.headers["spoken_to"] for message in messages)


def test_signals_are_sent_for_a_batch(template, heard):
    published([template(batch=10).together([delivery(5, 6)])])
    (changes,), _, _ = heard[0][1]["body"]
    assert isinstance(changes, Changes)
    assert [change.key["id"] for change in changes] == [5, 6]


def test_trace_leads_from_the_commit_to_the_message(template, spans):
    class Timed(MemoryPublisher):
        def publish(self, messages):
            super().publish(messages)
            self.confirmed_at = time.time_ns()

    messages = template().each(delivery(5))
    published(messages, publisher := Timed())
    enqueued, commit = spans()
    assert enqueued.start_time < publisher.confirmed_at < enqueued.end_time
    assert (commit.name, commit.parent) == ("commit public.orders", None)
    assert enqueued.name == "apply_async/shop.handle"
    assert enqueued.parent.span_id == commit.context.span_id
    assert 55 < (enqueued.start_time - commit.start_time) / 1e9 < 600
    assert commit.end_time >= enqueued.end_time
    assert commit.attributes["flash_celery.commit_lsn"] == "0/16B3748"
    assert commit.attributes["flash_celery.change_id"] == "0/16B3748:0"
    of = enqueued.context
    traceparent = messages[0].headers["traceparent"]
    assert traceparent.startswith(f"00-{of.trace_id:032x}-{of.span_id:016x}-")


def test_trace_is_new_for_each_message(template, spans):
    messages = template().each(delivery(*range(50)))
    published(messages)
    commits = [span for span in spans() if span.name.startswith("commit")]
    assert len({span.context.trace_id for span in commits}) == 50
    assert not any(span.parent for span in commits)
    assert len({message.headers["traceparent"] for message in messages}) == 50
    assert not trace.get_current_span().get_span_context().is_valid


def test_trace_of_a_batch_starts_at_its_first_change(template, spans):
    message = template(batch=10).together([delivery(1, ago=90.0), delivery(2, 3, ago=30.0)])
    published([message])
    enqueued, commit = spans()
    assert commit.attributes["messaging.batch.message_count"] == 3
    assert (enqueued.start_time - commit.start_time) / 1e9 > 85


def test_trace_of_a_commit_in_the_future_has_no_duration(template, spans):
    published(template().each(delivery(1, ago=-3600.0)))
    for span in spans():
        assert 0 <= (span.end_time - span.start_time) / 1e9 < 600


def test_signals_repeat_after_a_message_was_discarded(template, spans, caplog):
    for published in (False, True):
        (announced,) = announcing.announce(template().each(delivery(1)), json_encodes)
        announced.end(published)
    assert [span.name.split(" ")[0] for span in spans()] == [
        "apply_async/shop.handle",
        "commit",
    ] * 2
    assert [span.status.is_ok for span in spans() if span.name[0] == "c"] == [False, True]
    assert not trace.get_current_span().get_span_context().is_valid
    gc.collect()
    assert "detach" not in caplog.text


def test_spans_of_discarded_batches_are_marked(template, heard):
    publisher = MemoryPublisher()
    publisher.broken = True
    thread = PublishingThread(publisher, [Queue("flash")], Reader())
    thread.put(PublishBatch(template().each(delivery(1)), Lsn(1), 1))
    thread.start()
    deadline = time.monotonic() + 10
    while not heard and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.discard()
    thread.end()
    thread.join(10)
    assert [when for when, _ in heard] == ["before"]


def test_trace_of_a_dead_letter_has_no_commit(spans):
    headers = {"id": "1", "task": "flash_celery.dead_letter"}
    letter = Message.alone(Form("flash", "flash_celery.dead_letter", headers, {}), "[[{}], {}, {}]")
    assert published([letter]) == [letter]
    assert [span.name for span in spans() if span.name.startswith("commit")] == []


def test_tracer_failure_does_not_stop_publishing(template, spans, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no traces today")

    monkeypatch.setattr(trace, "get_tracer", broken)
    messages = template().each(delivery(1, 2))
    assert published(messages) == messages
    assert "A change could not be traced" in caplog.text


def test_signals_with_an_unreadable_body_do_not_stop_publishing(app, heard, caplog):
    headers = {"id": "1", "task": "shop.handle"}
    message = Message.alone(Form("flash", "shop.handle", headers, {}), "no JSON")
    assert published([message]) == [message]
    assert heard[0][1]["body"] == ((), {}, {})
    assert "could not be traced" in caplog.text


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), asyncio.CancelledError()])
def test_receiver_that_raises_does_not_stop_publishing(template, error, caplog):
    def receiver(**more):
        raise error

    signals.before_task_publish.connect(receiver)
    signals.after_task_publish.connect(receiver)
    try:
        messages = template().each(delivery(5))
        assert published(messages) == messages
    finally:
        signals.before_task_publish.disconnect(receiver)
        signals.after_task_publish.disconnect(receiver)
    assert caplog.text.count(type(error).__name__) >= 2


def test_headers_of_a_receiver_that_cannot_be_encoded_are_left_out(template, caplog):
    def receiver(headers, properties, **more):
        headers["tenant"] = "x"
        headers["unserialisable"] = object()
        headers[5] = "not a name"
        del headers["id"]
        properties["priority"] = object()

    signals.before_task_publish.connect(receiver)
    try:
        (message,) = template().each(delivery(5))
        assert published([message]) == [message]
    finally:
        signals.before_task_publish.disconnect(receiver)
    assert message.headers["tenant"] == "x"
    assert message.headers["id"] == message.id
    assert "unserialisable" not in message.headers
    assert 5 not in message.headers
    assert "priority" not in message.properties
    assert "unserialisable" in caplog.text


def test_rabbitmq_takes_fewer_types_of_headers_than_json(app):
    publisher = AmqpPublisher(app)

    def encodes(value):
        return publisher.encodes({"value": value}, {})

    assert all(map(encodes, ("a", None, 5, {"a": [1, None]}, datetime.now())))
    assert not any(map(encodes, (1 << 70, uuid.uuid4(), object(), {5: 1})))
    assert not publisher.encodes({}, {"priority": "high"})
    assert not publisher.encodes({}, {"correlation_id": 5})
    assert json_encodes({"value": uuid.uuid4()}, {})
