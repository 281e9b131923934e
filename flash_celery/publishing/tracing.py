"""Traces that begin at the commit: a span until the broker has the message, above the enqueueing.

OpenTelemetry's instrumentation of Celery makes the spans below it by itself: it listens to the
signals. Sentry's replaces functions that the replication worker does not call, so its span is made
here. Nothing of either is imported that the application has not turned on in this process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from typing import Any, TypeAlias

from ..changes.change import Change
from ..messages.templates import Message

#: Ends what a tracer has begun, in the same context; told whether the broker has the message.
End: TypeAlias = Callable[[bool], None]
#: Traces a message while it is published; may add to its headers.
Tracer: TypeAlias = Callable[[Message, Sequence[Change]], End]


def at_work() -> list[Tracer]:
    """The tracers that the application has turned on."""
    found = [(_opentelemetry, _opentelemetry_span), (_sentry, _sentry_transaction)]
    return [tracer for turned_on, tracer in found if turned_on()]


def _opentelemetry() -> bool:
    module = sys.modules.get("opentelemetry.instrumentation.celery")
    if module is None:
        return False
    return bool(module.CeleryInstrumentor().is_instrumented_by_opentelemetry)


@cache
def _version() -> str:
    return metadata.version("flash-celery")


def _opentelemetry_span(message: Message, changes: Sequence[Change]) -> End:
    from opentelemetry import context, trace

    tracer = trace.get_tracer("flash_celery", _version())
    span = tracer.start_span(
        _name(changes),
        attributes=_facts(message, changes),
        start_time=int(_committed(changes) * 1e9),
    )
    context.attach(trace.set_span_in_context(span))

    def end(published: bool) -> None:
        if not published:
            _give_up(message)
            span.set_status(trace.StatusCode.ERROR, "given up, and read again")
        span.end()

    return end


def _give_up(message: Message) -> None:
    """End the instrumentation's span, which knows of no publishing that fails."""
    from opentelemetry.instrumentation.celery import utils

    task = utils.retrieve_task_from_sender({"sender": message.task})
    found = utils.retrieve_context(task, message.id, is_publish=True)
    if found is not None:
        found[1].__exit__(None, None, None)
        utils.detach_context(task, message.id, is_publish=True)


def _sentry() -> bool:
    sdk: Any = sys.modules.get("sentry_sdk")
    client = sdk.get_client() if sdk is not None else None
    if client is None or client.get_integration("celery") is None:
        return False
    rates = client.options.get("traces_sample_rate"), client.options.get("traces_sampler")
    return any(rate is not None for rate in rates)


def _sentry_transaction(message: Message, changes: Sequence[Change]) -> End:
    import sentry_sdk
    from sentry_sdk import Scope

    Scope.set_isolation_scope(Scope.get_isolation_scope().fork())
    Scope.set_current_scope(Scope.get_current_scope().fork())
    transaction = sentry_sdk.continue_trace(
        {}, op="db.commit", name=_name(changes), source="task", origin="auto.queue.flash_celery"
    )
    transaction.start_timestamp = datetime.fromtimestamp(_committed(changes), timezone.utc)
    for name, value in _facts(message, changes).items():
        transaction.set_data(name, value)
    spans = ExitStack()
    spans.enter_context(sentry_sdk.start_transaction(transaction))
    span = spans.enter_context(sentry_sdk.start_span(op="queue.publish", name=message.task))
    span.set_data("messaging.message.id", message.id)
    span.set_data("messaging.destination.name", message.queue)
    handed = {
        "sentry-trace": sentry_sdk.get_traceparent(),
        "baggage": sentry_sdk.get_baggage(),
        "sentry-task-enqueued-time": time.time(),
    }
    # Where its integration looks for them in a worker.
    message.headers.update(handed)
    message.headers["headers"] = {**(message.headers.get("headers") or {}), **handed}

    def end(published: bool) -> None:
        if not published:
            span.set_status("aborted")
        span.finish()
        # By itself it would last as long as this process knew of it.
        transaction.finish(end_timestamp=time.time())
        spans.close()

    return end


def _committed(changes: Sequence[Change]) -> float:
    """Since when the first of them waits, in seconds since 1970; clocks may differ."""
    return min(changes[0].committed_at.timestamp(), time.time())


def _name(changes: Sequence[Change]) -> str:
    return f"commit {changes[0]._source.shown}"


def _facts(message: Message, changes: Sequence[Change]) -> dict[str, Any]:
    """What a span says of its changes: names and positions, and nothing of their rows."""
    first = changes[0]
    return {
        "db.system.name": "postgresql",
        "db.collection.name": first._source.shown,
        "messaging.batch.message_count": len(changes),
        "flash_celery.handler": message.task,
        "flash_celery.operation": first.operation.names()[0],
        "flash_celery.change_id": first.id,
        "flash_celery.commit_lsn": str(first.commit_lsn),
        "flash_celery.xid": first.xid,
    }
