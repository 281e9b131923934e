"""A project that uses what Celery has besides queues; its handlers record what they receive."""

import json
import os
import time

from celery import Celery, chain, chord, group
from kombu.common import Broadcast
from kombu.serialization import register

from flash_celery import on_change

app = Celery("desk", broker=os.environ.get("SHOP_BROKER"))
app.conf.flash_dsn = os.environ.get("SHOP_DSN")
app.conf.flash_replication_slot = os.environ.get("SHOP_SLOT", "flash_replication")
app.conf.flash_status_interval = 2
app.conf.worker_hijack_root_logger = False
app.conf.broker_connection_retry_on_startup = True
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))


if os.environ.get("DESK_JSON"):
    register("json", json.dumps, json.loads, content_type="application/json")
if os.environ.get("DESK_BROADCAST"):
    app.conf.task_queues = [Broadcast("flash")]


def by_argument(name, args, *rest, **named):
    """Route by the argument, which only a task that is sent by hand has at this time."""
    return {"queue": f"of-{args[0]}"} if name == "desk.each" else None


def note(handler, **more):
    line = json.dumps({"handler": handler, "at": time.time(), **more}, default=str)
    with open(os.environ["SHOP_NOTES"], "a") as notes:
        notes.write(line + "\n")


def bill(order, idempotency_key):
    note("bill", id=idempotency_key, order=order)


if os.environ.get("DESK_EXAMPLES"):
    with open(os.environ["DESK_EXAMPLES"]) as examples:
        exec(
            examples.read(), {"__name__": "desk", "app": app, "on_change": on_change, "bill": bill}
        )
    app.conf.broker_url = os.environ["SHOP_BROKER"]


def noted(file):
    """Write what a tracing library would send to a file, a line for each span."""

    def write(**more):
        with open(f"{os.environ['SHOP_NOTES']}.{file}", "a") as spans:
            spans.write(json.dumps({"pid": os.getpid(), **more}, default=str) + "\n")

    return write


@on_change("items", "insert")
@app.task(bind=True)
def each(self, change):
    name = change.new["name"]
    note(
        "each",
        id=change.id,
        key=dict(change.key),
        task_id=self.request.id,
        queue=self.request.delivery_info["routing_key"],
        priority=self.request.delivery_info["priority"],
    )
    if name == "raise":
        raise ValueError("this item cannot be handled")
    if name == "retry" and self.request.retries < 1:
        raise self.retry(countdown=int(change.new["note"] or 0))
    if name == "wait":
        while not os.path.exists(f"{os.environ['SHOP_NOTES']}.go"):
            time.sleep(0.05)
    return {"id": change.key["id"]}


@on_change("items", "delete", batch=100)
@app.task(bind=True)
def many(self, changes):
    note("many", id=changes[0].id, task_id=self.request.id)


@on_change("items", "update")
@app.task(bind=True, ignore_result=True)
def canvas(self, change):
    """Use the change as an argument and as a result of other tasks."""
    note("canvas", id=change.id, task_id=self.request.id)
    chain(passed_on.s(change), named.s()).delay()
    group(named.s(change), named.s(change)).delay()
    if app.conf.result_backend:
        chord([passed_on.s(change), passed_on.s(change)], collected.s()).delay()
    return "unused"


@app.task
def passed_on(change):
    return change


@app.task(bind=True)
def named(self, change):
    note("named", id=change.id, new=dict(change.new), task_id=self.request.id)


@app.task(bind=True)
def collected(self, changes):
    ids = [change.id for change in changes]
    note("collected", id=ids[0], ids=ids, task_id=self.request.id)


@app.task(bind=True)
def tick(self):
    note("tick", id=self.request.id)


def trace_with_opentelemetry():
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    write = noted("opentelemetry")

    class Exporter(SpanExporter):
        def export(self, spans):
            for span in spans:
                parent = f"{span.parent.span_id:016x}" if span.parent else None
                write(
                    name=span.name,
                    trace=f"{span.context.trace_id:032x}",
                    span=f"{span.context.span_id:016x}",
                    parent=parent,
                    start=span.start_time / 1e9,
                    end=span.end_time / 1e9,
                )
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Exporter(), schedule_delay_millis=100))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()


def trace_with_sentry():
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration
    from sentry_sdk.transport import Transport

    write = noted("sentry")

    class Capture(Transport):
        def capture_envelope(self, envelope):
            for item in envelope.items:
                write(kind=item.type, event=item.payload.json)

        def flush(self, timeout, callback=None):
            pass

    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=Capture,
        traces_sample_rate=1.0,
        integrations=[CeleryIntegration()],
    )


TRACED = os.environ.get("DESK_TRACE", "")
if "opentelemetry" in TRACED:
    trace_with_opentelemetry()
if "sentry" in TRACED:
    trace_with_sentry()
