"""The spans of OpenTelemetry's instrumentation of Celery."""

from __future__ import annotations

import sys


def end_publishing_span(task_name: str, task_id: str) -> None:
    """End the span that the instrumentation began before a message, if there is one.

    It ends it after the message was published, which does not happen in this process, or not now.
    """
    module = sys.modules.get("opentelemetry.instrumentation.celery")
    # Another thread may be importing it just now.
    instrumentor = getattr(module, "CeleryInstrumentor", None)
    if instrumentor is None or not instrumentor().is_instrumented_by_opentelemetry:
        return
    from opentelemetry.instrumentation.celery import utils

    task = utils.retrieve_task_from_sender({"sender": task_name})
    span_context = utils.retrieve_context(task, task_id, is_publish=True)
    if span_context is not None:
        span_context[1].__exit__(None, None, None)
        utils.detach_context(task, task_id, is_publish=True)
