"""Traces: a span from the commit until the broker has the message; its publishing is the child.

OpenTelemetry's instrumentation of Celery creates the spans below it by itself, from the signals.
Sentry's integration replaces functions that the replication worker does not call, so this module
creates its span. A library is used only if the application has enabled it in this process.
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
from ..messages.task_message import Message
from ..transactional_tasks.tracing import end_publishing_span

#: Ends a trace, in the context where it began; receives whether the message was published.
End: TypeAlias = Callable[[bool], None]
#: Begins the trace of a message that is about to be published; may add to its headers.
Tracer: TypeAlias = Callable[[Message, Sequence[Change]], End]


def active_tracers() -> list[Tracer]:
    """Return the tracers that the application has enabled."""
    tracers: list[Tracer] = []
    if _opentelemetry_is_enabled():
        tracers.append(_opentelemetry_span)
    if _sentry_is_enabled():
        tracers.append(_sentry_transaction)
    return tracers


def _opentelemetry_is_enabled() -> bool:
    module = sys.modules.get("opentelemetry.instrumentation.celery")
    # Another thread may be importing it just now.
    instrumentor = getattr(module, "CeleryInstrumentor", None)
    return instrumentor is not None and bool(instrumentor().is_instrumented_by_opentelemetry)


@cache
def _version() -> str:
    return metadata.version("flash-celery")


def _opentelemetry_span(message: Message, changes: Sequence[Change]) -> End:
    from opentelemetry import context, trace

    tracer = trace.get_tracer("flash_celery", _version())
    span = tracer.start_span(
        _name(changes),
        attributes=_attributes(message, changes),
        start_time=int(_committed(changes) * 1e9),
    )
    context.attach(trace.set_span_in_context(span))

    def end(published: bool) -> None:
        if not published:
            end_publishing_span(message.task, message.id)
            span.set_status(trace.StatusCode.ERROR, "given up, and read again")
        span.end()

    return end


def _sentry_is_enabled() -> bool:
    # Another thread may be importing it just now.
    get_client = getattr(sys.modules.get("sentry_sdk"), "get_client", None)
    client = get_client() if get_client is not None else None
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
    for name, value in _attributes(message, changes).items():
        transaction.set_data(name, value)
    spans = ExitStack()
    spans.enter_context(sentry_sdk.start_transaction(transaction))
    span = spans.enter_context(sentry_sdk.start_span(op="queue.publish", name=message.task))
    span.set_data("messaging.message.id", message.id)
    span.set_data("messaging.destination.name", message.queue)
    trace_headers = {
        "sentry-trace": sentry_sdk.get_traceparent(),
        "baggage": sentry_sdk.get_baggage(),
        "sentry-task-enqueued-time": time.time(),
    }
    # In both places, as Sentry's integration reads them in a worker.
    message.headers.update(trace_headers)
    message.headers["headers"] = {**(message.headers.get("headers") or {}), **trace_headers}

    def end(published: bool) -> None:
        if not published:
            span.set_status("aborted")
        span.finish()
        # By default Sentry takes the age of this object, which is younger than the commit.
        transaction.finish(end_timestamp=time.time())
        spans.close()

    return end


def _committed(changes: Sequence[Change]) -> float:
    """Return the commit time of the first change in Unix seconds, not later than now.

    PostgreSQL's clock may be ahead.
    """
    return min(changes[0].committed_at.timestamp(), time.time())


def _name(changes: Sequence[Change]) -> str:
    return f"commit {changes[0]._source.shown}"


def _attributes(message: Message, changes: Sequence[Change]) -> dict[str, Any]:
    """Return the attributes of a span: names and positions, no values of rows."""
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
