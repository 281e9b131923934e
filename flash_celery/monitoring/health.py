"""Whether the replication worker lives, and whether it does its work."""

from __future__ import annotations

import time
from typing import Any

from ..settings import Settings
from ..telemetry import STANDBY, STREAMING

#: The shortest time, in seconds, after which a loop that does not turn counts as dead: whatever it
#: waits for has an end before.
_STUCK_SECONDS = 60.0
_BROKER_ERRORS = ("PublishError", "Unroutable", "NotConfirmed")


def patience(settings: Settings) -> float:
    """Seconds that the main loop may take for a turn: a server that says nothing is given up after
    `longest_silence`, and one statement may follow another."""
    return max(_STUCK_SECONDS, 3 * settings.longest_silence)


def live(report: dict[str, Any], limit: float) -> bool:
    """Whether the main loop turns; a restart helps if it does not."""
    return bool(report["stuck_seconds"] < limit)


def problems(report: dict[str, Any]) -> list[str]:
    """What keeps changes from being enqueued, or will soon; nothing if all is well."""
    found = []
    state = report["state"]
    if state == STANDBY:
        found.append(f"Standby for {_since(report['state_since'])}: another worker reads the slot.")
    elif state != STREAMING:
        why = _last(report, broker=False)
        found.append(f"Not reading ({state}) for {_since(report['state_since'])}.{why}")
    if report["broker_failing_since"]:
        why = _last(report, broker=True)
        found.append(f"The broker has failed for {_since(report['broker_failing_since'])}.{why}")
    if report["held_back_since"]:
        found.append(
            "PostgreSQL holds changes back until the standbys of synchronized_standby_slots have "
            "them; start these standbys, or take them out of that setting."
        )
    slot = report["slot"]
    if slot and slot["wal_status"] in ("unreserved", "lost"):
        found.append(
            f"The slot {slot['name']} is {slot['wal_status']}: raise max_slot_wal_keep_size."
        )
    elif slot and slot["safe_wal_size"] is not None and _running_out(slot):
        found.append(
            f"The slot {slot['name']} has used up more than half of max_slot_wal_keep_size."
        )
    return found


def only_standby(report: dict[str, Any]) -> bool:
    """Whether it is ready to take over, though another worker does the work."""
    return report["state"] == STANDBY and len(report["problems"]) == 1


def _running_out(slot: dict[str, Any]) -> bool:
    return bool(slot["safe_wal_size"] < slot["retained_bytes"])


def _last(report: dict[str, Any], broker: bool) -> str:
    """The last error of the broker, or of anything else."""
    for error in report["errors"]:
        if (error["kind"] in _BROKER_ERRORS) == broker:
            return f" {error['message']}"
    return ""


def _since(moment: float) -> str:
    return f"{max(0.0, time.time() - moment):.0f} s"
