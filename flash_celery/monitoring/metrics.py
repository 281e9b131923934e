"""The metrics, in the format of Prometheus. They are computed when Prometheus asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..protocol.lsn import Lsn
from ..telemetry import BUCKETS, STATES, Telemetry
from . import health
from .report import WorkerReport

#: The label of the database of `flash_dsn`, which has no name.
_DEFAULT = "default"
#: The values of `pg_replication_slots.wal_status`.
_WAL_STATUSES = ("reserved", "extended", "unreserved", "lost")
#: The values of a metric's own labels, and the number.
_Samples = list[tuple[tuple[str, ...], float]]
_FAMILIES: dict[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
}


class Described(NamedTuple):
    """A metric's description. Every metric has the label `source` as well."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()


#: Every metric by its name. docs/reference/metrics.md is made from it.
METRICS = {
    "flash_info": Described(
        "gauge", "Always 1; the labels describe the worker.", ("version", "slot")
    ),
    "flash_state": Described("gauge", "1 for the worker's current state, else 0.", ("state",)),
    "flash_ready": Described("gauge", "1 if the worker reads changes and has no problem."),
    "flash_loop_age_seconds": Described("gauge", "Time since the last iteration of the main loop."),
    "flash_changes_received_total": Described(
        "counter",
        "Changes received from PostgreSQL; counted again after a reconnection.",
        ("table", "operation"),
    ),
    "flash_changes_enqueued_total": Described(
        "counter",
        "Changes confirmed by the broker, for each handler.",
        ("table", "operation", "handler", "queue"),
    ),
    "flash_changes_unjudged_total": Described(
        "counter", "Changes whose `where` was evaluated without their old values.", ("table",)
    ),
    "flash_tasks_refused_total": Described(
        "counter", "Refused messages of `transactional`: not signed, too old or too large."
    ),
    "flash_transactions_total": Described("counter", "Transactions received from PostgreSQL."),
    "flash_messages_published_total": Described("counter", "Messages confirmed by the broker."),
    "flash_published_bytes_total": Described(
        "counter", "Size of the bodies of published messages."
    ),
    "flash_publish_batches_total": Described("counter", "Calls that published messages."),
    "flash_publish_failures_total": Described(
        "counter", "Attempts to publish that failed and were retried.", ("error",)
    ),
    "flash_enqueue_delay_seconds": Described(
        "histogram",
        "From the commit to the broker's confirmation, for the oldest change of each batch.",
    ),
    "flash_reconnections_total": Described("counter", "Times that the stream was restarted."),
    "flash_lag_seconds": Described(
        "gauge", "Age of the oldest change that may not be enqueued yet; 0 if there is none."
    ),
    "flash_lag_bytes": Described("gauge", "WAL from the slot's confirmed position to the present."),
    "flash_received_lsn": Described("gauge", "The last position received, in bytes."),
    "flash_confirmed_lsn": Described(
        "gauge", "The position up to which the broker has confirmed everything, in bytes."
    ),
    "flash_spool_bytes": Described("gauge", "Size of the open transactions that are spooled."),
    "flash_backpressure": Described("gauge", "1 while reading is paused because a queue is full."),
    "flash_paused": Described(
        "gauge",
        "1 from `flash pause` to `flash resume`; an empty label stands for the whole source.",
        ("handler",),
    ),
    "flash_held_back": Described("gauge", "1 while PostgreSQL waits for standbys."),
    "flash_broker_up": Described("gauge", "1 if the broker answers."),
    "flash_database_up": Described("gauge", "1 if PostgreSQL answers."),
    "flash_slot_active": Described("gauge", "1 if a process reads the slot."),
    "flash_slot_retained_bytes": Described("gauge", "WAL that the slot keeps."),
    "flash_slot_safe_bytes": Described(
        "gauge", "WAL that may be written before the slot is lost; absent without a limit."
    ),
    "flash_slot_wal_status": Described(
        "gauge", "1 for the slot's wal_status, else 0.", ("status",)
    ),
    "flash_slot_gaps": Described("gauge", "Recorded gaps: changes that can no longer be read."),
    "flash_queue_messages": Described("gauge", "Messages waiting in a queue.", ("queue",)),
    "flash_queue_limit_messages": Described("gauge", "flash_max_queue_length, if it is set."),
    "flash_lane_changes": Described(
        "gauge", "Changes waiting in the lanes of an ordered handler.", ("handler",)
    ),
    "flash_lanes": Described(
        "gauge",
        "Lanes of an ordered handler that are busy, asleep (until a retry) or blocked.",
        ("handler", "state"),
    ),
    "flash_lane_oldest_seconds": Described(
        "gauge", "Age of the oldest change in the lanes of a handler; 0 if none.", ("handler",)
    ),
    "flash_backfill_rows": Described(
        "gauge",
        "Rows that a backfill has enqueued; absent once it has ended.",
        ("handler", "table", "state"),
    ),
    "flash_backfill_estimated_rows": Described(
        "gauge", "Rows that a backfill has to read, as estimated.", ("handler", "table")
    ),
    "flash_backfill_idle_seconds": Described(
        "gauge",
        "Time since a backfill has enqueued rows, unless `flash backfill pause` was run.",
        ("handler", "table"),
    ),
    "flash_dead_letters": Described(
        "gauge", "Dead letters: changes whose handler failed for good."
    ),
}


class Metrics(Collector):
    """The collector that turns a report and the telemetry into samples."""

    def __init__(self, telemetry: Telemetry, report: Callable[[], WorkerReport]) -> None:
        self._telemetry = telemetry
        self._report = report
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: no other collector of the registry has these names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; one without a known value has no samples."""
        report = self._report()
        source = report.project.source or _DEFAULT
        samples = {**_counters(self._telemetry), **_worker(report), **_servers(report)}
        for name, (kind, text, labels) in METRICS.items():
            if kind == "histogram":
                yield self._delays(name, text, source)
                continue
            family = _FAMILIES[kind](name, text, labels=["source", *labels])
            for values, number in samples.get(name, []):
                family.add_metric([source, *values], number)
            yield family

    def _delays(self, name: str, text: str, source: str) -> Metric:
        family = HistogramMetricFamily(name, text, labels=["source"])
        delays = self._telemetry.delays
        bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(delays.counts), strict=True))
        family.add_metric([source], buckets=buckets, sum_value=delays.sum)
        return family


def _single(number: float | None) -> _Samples:
    return [] if number is None else [((), float(number))]


def _labelled(numbers: Mapping[Any, float | None]) -> _Samples:
    """Return one sample for each key that has a number; a key is a label or a tuple of labels."""
    return [
        (key if isinstance(key, tuple) else (key,), number)
        for key, number in numbers.items()
        if number is not None
    ]


def _counters(telemetry: Telemetry) -> dict[str, _Samples]:
    # `dict` copies a counter at once: the worker goes on counting.
    return {
        "flash_changes_received_total": _labelled(telemetry.received),
        "flash_changes_enqueued_total": _labelled(
            {astuple(route): count for route, count in dict(telemetry.enqueued).items()}
        ),
        "flash_changes_unjudged_total": _labelled(dict(telemetry.unevaluated)),
        "flash_publish_failures_total": _labelled(dict(telemetry.failures)),
        "flash_tasks_refused_total": _single(telemetry.refused_tasks),
        "flash_transactions_total": _single(telemetry.transactions),
        "flash_messages_published_total": _single(telemetry.messages),
        "flash_published_bytes_total": _single(telemetry.bytes),
        "flash_publish_batches_total": _single(telemetry.batches),
        "flash_reconnections_total": _single(telemetry.reconnections),
    }


def _worker(report: WorkerReport) -> dict[str, _Samples]:
    return {
        "flash_info": [((report.version, report.project.slot_name), 1.0)],
        "flash_state": _labelled({state: float(state == report.state) for state in STATES}),
        "flash_ready": _single(not health.problems(report)),
        "flash_loop_age_seconds": _single(report.stuck_seconds),
        "flash_lag_seconds": _single(report.lag_seconds),
        "flash_received_lsn": _single(Lsn.parse(report.received_lsn)),
        "flash_confirmed_lsn": _single(Lsn.parse(report.confirmed_lsn)),
        "flash_spool_bytes": _single(report.spool_bytes),
        "flash_backpressure": _single(report.paused_since is not None),
        "flash_held_back": _single(report.held_back_since is not None),
    }


def _servers(report: WorkerReport) -> dict[str, _Samples]:
    database, broker = report.database, report.broker
    broker_down = broker.broker_error or report.broker_failing_since
    paused = {"": float(database.paused is not None)}
    paused |= {paused_handler.handler: 1.0 for paused_handler in database.paused_handlers}
    samples: dict[str, _Samples] = {
        "flash_paused": _labelled(paused),
        "flash_lag_bytes": _single(report.lag_bytes),
        "flash_broker_up": _single(not broker_down),
        "flash_database_up": _single(not report.database_error),
        "flash_slot_gaps": _single(len(database.gaps)),
        "flash_queue_messages": _labelled(broker.queues),
        "flash_queue_limit_messages": _single(broker.max_queue_length or None),
        "flash_dead_letters": _single(broker.dead_letters.count),
        "flash_lane_changes": _labelled({each.handler: each.waiting for each in broker.lanes}),
        "flash_lane_oldest_seconds": _labelled(
            {each.handler: each.oldest_seconds or 0.0 for each in broker.lanes}
        ),
        "flash_lanes": [
            ((each.handler, state), float(getattr(each, state)))
            for each in broker.lanes
            for state in ("busy", "asleep", "blocked")
        ],
    }
    samples |= _backfills(database.backfills)
    if slot := database.slot:
        samples |= {
            "flash_slot_active": _single(slot.active),
            "flash_slot_retained_bytes": _single(slot.retained_bytes),
            "flash_slot_safe_bytes": _single(slot.safe_wal_size),
            "flash_slot_wal_status": _labelled(
                {status: float(status == slot.wal_status) for status in _WAL_STATUSES}
            ),
        }
    return samples


def _backfills(backfills: Sequence[Mapping[str, Any]]) -> dict[str, _Samples]:
    under_way = [each for each in backfills if each["ended_at"] is None]
    return {
        "flash_backfill_rows": _labelled(
            {(each["handler"], each["table"], each["state"]): each["rows"] for each in under_way}
        ),
        "flash_backfill_estimated_rows": _labelled(
            {(each["handler"], each["table"]): each["estimate"] for each in under_way}
        ),
        "flash_backfill_idle_seconds": _labelled(
            {(each["handler"], each["table"]): each["idle_seconds"] for each in under_way}
        ),
    }
