"""The metrics, for Prometheus. They are read when somebody asks, and nobody is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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

#: The label of the database of `flash_dsn`, which has no name.
_DEFAULT = "default"
#: What PostgreSQL says of a slot's WAL.
_STATUSES = ("reserved", "extended", "unreserved", "lost")
#: Samples: the values of a metric's own labels, and the number.
_Samples = list[tuple[tuple[str, ...], float]]
_FAMILIES: dict[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
}


class Described(NamedTuple):
    """A metric. Each has the label `source` too."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()


#: Every metric of ours, by its name.
METRICS = {
    "flash_info": Described("gauge", "Always 1; its labels say which.", ("version", "slot")),
    "flash_state": Described("gauge", "1 for what the worker is doing, else 0.", ("state",)),
    "flash_ready": Described("gauge", "1 if changes are being read and nothing is wrong."),
    "flash_loop_age_seconds": Described("gauge", "Time since the main loop has turned."),
    "flash_changes_received_total": Described(
        "counter",
        "Changes that PostgreSQL has sent; again after a reconnection.",
        ("table", "operation"),
    ),
    "flash_changes_enqueued_total": Described(
        "counter",
        "Changes that the broker has confirmed, for each handler.",
        ("table", "operation", "handler", "queue"),
    ),
    "flash_changes_unjudged_total": Described(
        "counter", "Changes judged without their old values.", ("table",)
    ),
    "flash_transactions_total": Described("counter", "Transactions that PostgreSQL has sent."),
    "flash_messages_published_total": Described("counter", "Messages the broker has confirmed."),
    "flash_published_bytes_total": Described(
        "counter", "Bytes of the bodies of published messages."
    ),
    "flash_publish_batches_total": Described("counter", "Calls that published messages."),
    "flash_publish_failures_total": Described(
        "counter", "Attempts to publish that failed and were made again.", ("error",)
    ),
    "flash_enqueue_delay_seconds": Described(
        "histogram",
        "From the commit to the broker's confirmation, of the oldest change of each unit.",
    ),
    "flash_reconnections_total": Described("counter", "Times that the stream was begun anew."),
    "flash_lag_seconds": Described(
        "gauge", "Age of the oldest change that may not be enqueued yet; 0 if there is none."
    ),
    "flash_lag_bytes": Described("gauge", "WAL from the slot's confirmed position to the present."),
    "flash_received_lsn": Described("gauge", "The last position that has arrived, in bytes."),
    "flash_confirmed_lsn": Described("gauge", "The position up to which all is with the broker."),
    "flash_spool_bytes": Described("gauge", "Open transactions that are spooled."),
    "flash_backpressure": Described("gauge", "1 while reading pauses because a queue is full."),
    "flash_paused": Described(
        "gauge",
        "1 from `flash pause` to `flash resume`; without a name, of everything.",
        ("handler",),
    ),
    "flash_held_back": Described("gauge", "1 while PostgreSQL waits for standbys."),
    "flash_broker_up": Described("gauge", "1 if the broker answers."),
    "flash_database_up": Described("gauge", "1 if PostgreSQL answers."),
    "flash_slot_active": Described("gauge", "1 if somebody reads the slot."),
    "flash_slot_retained_bytes": Described("gauge", "WAL that the slot keeps."),
    "flash_slot_safe_bytes": Described(
        "gauge", "WAL that may be written until the slot is lost; none without a limit."
    ),
    "flash_slot_wal_status": Described(
        "gauge", "1 for the slot's wal_status, else 0.", ("status",)
    ),
    "flash_slot_gaps": Described("gauge", "Recorded gaps: changes that nobody will ever read."),
    "flash_queue_messages": Described("gauge", "Messages that wait in a queue.", ("queue",)),
    "flash_queue_limit_messages": Described("gauge", "flash_max_queue_length, if it is set."),
    "flash_dead_letters": Described("gauge", "Changes whose handler has failed for good."),
}


class Metrics(Collector):
    """Turns a report and the telemetry into samples."""

    def __init__(self, telemetry: Telemetry, report: Callable[[], dict[str, Any]]) -> None:
        self._telemetry = telemetry
        self._report = report
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: there is one collector of these names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every metric of which something is known."""
        report = self._report()
        source = report["source"] or _DEFAULT
        samples = {**_counted(self._telemetry), **_worker(report), **_servers(report)}
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


def _one(number: float | None) -> _Samples:
    return [] if number is None else [((), float(number))]


def _each(numbers: Mapping[Any, float | None]) -> _Samples:
    found = {key if isinstance(key, tuple) else (key,): n for key, n in numbers.items()}
    return [(tuple(key), n) for key, n in found.items() if n is not None]


def _counted(telemetry: Telemetry) -> dict[str, _Samples]:
    # Copied at once: the worker goes on counting.
    return {
        "flash_changes_received_total": _each(telemetry.received),
        "flash_changes_enqueued_total": _each(
            {astuple(route): count for route, count in dict(telemetry.enqueued).items()}
        ),
        "flash_changes_unjudged_total": _each(dict(telemetry.unjudged)),
        "flash_publish_failures_total": _each(dict(telemetry.failures)),
        "flash_transactions_total": _one(telemetry.transactions),
        "flash_messages_published_total": _one(telemetry.messages),
        "flash_published_bytes_total": _one(telemetry.bytes),
        "flash_publish_batches_total": _one(telemetry.batches),
        "flash_reconnections_total": _one(telemetry.reconnections),
    }


def _worker(report: dict[str, Any]) -> dict[str, _Samples]:
    return {
        "flash_info": [((report["version"], report["slot_name"]), 1.0)],
        "flash_state": _each({state: float(state == report["state"]) for state in STATES}),
        "flash_ready": _one(report["ready"]),
        "flash_loop_age_seconds": _one(report["stuck_seconds"]),
        "flash_lag_seconds": _one(report["lag_seconds"]),
        "flash_received_lsn": _one(Lsn.parse(report["received_lsn"])),
        "flash_confirmed_lsn": _one(Lsn.parse(report["confirmed_lsn"])),
        "flash_spool_bytes": _one(report["spool_bytes"]),
        "flash_backpressure": _one(report["paused_since"] is not None),
        "flash_held_back": _one(report["held_back_since"] is not None),
    }


def _servers(report: dict[str, Any]) -> dict[str, _Samples]:
    down = report["broker_error"] or report["broker_failing_since"]
    paused = {one["handler"]: 1.0 for one in report["paused_handlers"]}
    found = {
        "flash_paused": _each({"": float(report["paused"] is not None), **paused}),
        "flash_lag_bytes": _one(report["lag_bytes"]),
        "flash_broker_up": _one(not down),
        "flash_database_up": _one(not report["database_error"]),
        "flash_slot_gaps": _one(len(report["gaps"])),
        "flash_queue_messages": _each(report["queues"]),
        "flash_queue_limit_messages": _one(report["max_queue_length"] or None),
        "flash_dead_letters": _one(report["dead_letters"]["count"]),
    }
    if slot := report["slot"]:
        status = slot["wal_status"]
        found |= {
            "flash_slot_active": _one(slot["active"]),
            "flash_slot_retained_bytes": _one(slot["retained_bytes"]),
            "flash_slot_safe_bytes": _one(slot["safe_wal_size"]),
            "flash_slot_wal_status": _each({one: float(one == status) for one in _STATUSES}),
        }
    return found
