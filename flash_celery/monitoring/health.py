"""Whether the replication worker is alive (`/live`), and whether it does its work (`/ready`)."""

from __future__ import annotations

import time

from ..commands.status import SlotStatus
from ..settings import Settings
from ..telemetry import STANDBY, STREAMING
from .report import WorkerReport

#: The least number of seconds after which a stuck main loop counts as dead. Everything that it
#: waits for has a shorter timeout.
_STUCK_SECONDS = 60.0
_BROKER_ERRORS = ("PublishError", "Unroutable", "NotConfirmed")


def patience(settings: Settings) -> float:
    """Return the seconds that one iteration of the main loop may take.

    A silent server is given up after `longest_silence`; an iteration may run several statements.
    """
    return max(_STUCK_SECONDS, 3 * settings.longest_silence)


def is_live(report: WorkerReport, limit: float) -> bool:
    """Return whether the main loop is running; if not, a restart helps."""
    return report.stuck_seconds < limit


def problems(report: WorkerReport) -> list[str]:
    """Return what keeps changes from being enqueued, now or soon; an empty list if all is well."""
    sentences = []
    if report.state == STANDBY:
        sentences.append(
            f"Standing by for {_age(report.state_since)}: another worker reads the slot."
        )
    elif report.state != STREAMING:
        sentences.append(
            f"Not reading ({report.state}) for {_age(report.state_since)}."
            f"{_last_error(report, broker=False)}"
        )
    if report.broker_failing_since:
        sentences.append(
            f"The broker has failed for {_age(report.broker_failing_since)}."
            f"{_last_error(report, broker=True)}"
        )
    if report.held_back_since:
        sentences.append(
            "PostgreSQL holds changes back until the standbys of synchronized_standby_slots have "
            "them; start these standbys, or remove them from that setting."
        )
    slot = report.database.slot
    if slot and slot.wal_status in ("unreserved", "lost"):
        sentences.append(
            f"The slot {slot.name} is {slot.wal_status}: raise max_slot_wal_keep_size."
        )
    elif slot and _is_running_out(slot):
        sentences.append(f"The slot {slot.name} has used more than half of max_slot_wal_keep_size.")
    return sentences


def is_hot_spare(report: WorkerReport) -> bool:
    """Return whether the worker waits for another to let go of the slot, and is otherwise well."""
    return report.state == STANDBY and len(problems(report)) == 1


def _is_running_out(slot: SlotStatus) -> bool:
    if slot.safe_wal_size is None or slot.retained_bytes is None:
        return False
    return slot.safe_wal_size < slot.retained_bytes


def _last_error(report: WorkerReport, broker: bool) -> str:
    """Return the last error of the broker, or the last other one, after a space."""
    for error in report.errors:
        if (error["kind"] in _BROKER_ERRORS) == broker:
            return f" {error['message']}"
    return ""


def _age(moment: float) -> str:
    return f"{max(0.0, time.time() - moment):.0f} s"
