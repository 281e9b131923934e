"""Watches the slot from the second connection: a stream that looks sound may not be.

A socket can be open and nobody behind it, the server can have given the slot to somebody else, hold
changes back, or be about to remove WAL that the slot needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg
from psycopg import errors as postgres

from ..errors import ReplicationError
from ..postgres.slots import POSITION
from ..progress import Progress
from ..protocol.lsn import Lsn
from ..settings import Settings
from ..telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Bytes of WAL that the stream has not brought yet, below which a server counts as idle, so that
#: heartbeats do not keep it awake: what it writes by itself after one (a checkpoint, its list of
#: running transactions) has fewer.
_IDLE_BYTES = 1024
#: Seconds that something must have been better before it is said to be.
_CALM_SECONDS = 60.0
#: The slot is in danger with less than this part of `max_slot_wal_keep_size` left.
_LOW = 0.5
#: Types of wait events of a process that waits for us, or for something to do; or is no more.
_GONE = "gone"
_IDLE = ("Activity", "Client", _GONE)
#: What PostgreSQL calls it when it waits for the standbys of `synchronized_standby_slots`.
_HELD_BACK = "WaitForStandbyConfirmation"

# A standby knows no time but that of the last commit it has applied.
_LOOK = f"""
SELECT s.active_pid, s.wal_status, s.safe_wal_size, {POSITION}::text, pg_is_in_recovery(),
       CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp()
            ELSE clock_timestamp() END,
       pg_size_bytes(current_setting('max_slot_wal_keep_size'))
FROM (SELECT) AS here LEFT JOIN pg_replication_slots s ON s.slot_name = %s
"""  # noqa: S608 - our own words
# In no transaction, so that nothing waits for it to be on disk.
_BEAT = "SELECT pg_logical_emit_message(false, 'flash.heartbeat', ''::text)::text"


class _Heartbeat(NamedTuple):
    position: Lsn
    written: float


class Watch:
    """One stream's guard. `look` now and then."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        pid: int,
        settings: Settings,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._connection = connection
        self._pid = pid
        self._slot = settings.flash_replication_slot
        self._interval = settings.flash_heartbeat_interval
        self._patience = settings.longest_silence
        self._progress = progress
        self._clock = clock
        self._telemetry = telemetry or Telemetry()
        self._received = Lsn(0)
        self._moved = clock()
        self._heartbeat: _Heartbeat | None = None
        #: When the last one was written, also one that has come back.
        self._written = clock()
        self._danger = 0
        self._better = clock()
        self._held_back = False

    def look(self, received: Lsn, reading: bool) -> None:
        """Look at the slot; write a heartbeat where one is due, and judge the last one.

        `received` is the position of what the stream has brought last; where we are not `reading`,
        it cannot bring anything. Raises `ReplicationError` if a new stream is needed.
        """
        row = self._connection.execute(_LOOK.encode(), [self._slot]).fetchone()
        assert row is not None
        reader, wal_status, safe, text, standby, said, limit = row
        if reader != self._pid:
            raise ReplicationError(
                f"The slot {self._slot} is not read by this worker's connection (PID {self._pid}) "
                f"any more, but by {f'PID {reader}' if reader else 'nobody'}; connecting anew."
            )
        position = Lsn.parse(text)
        self._progress.mark(position, said)
        self._warn(_danger(wal_status, safe, limit), safe)
        self._judge(received, reading)
        now = self._clock()
        due = self._interval and not standby and now - self._written >= self._interval
        if due and received and position - received >= _IDLE_BYTES:
            self._beat(now)

    def _judge(self, received: Lsn, reading: bool) -> None:
        """Whether the heartbeat has come back, or something else at least."""
        now = self._clock()
        if received != self._received or not reading:
            self._received, self._moved = received, now
        if self._heartbeat is None:
            return
        if received >= self._heartbeat.position:
            self._heartbeat = None
            if self._held_back:
                self._held_back = False
                self._telemetry.held_back = None
                logger.warning("PostgreSQL sends changes again")
        elif now - max(self._moved, self._heartbeat.written) > self._patience:
            self._overdue(now - self._heartbeat.written)

    def busy(self) -> bool:
        """Whether the server's process waits for nobody: it decodes, and has no time to answer.

        While it goes through a large transaction of other tables PostgreSQL answers only each
        half of `wal_sender_timeout`, and before 16 it may not at all (a materialized view).
        """
        kind, _ = self._waits_for()
        return kind not in _IDLE

    def _waits_for(self) -> tuple[str | None, str | None]:
        row = self._connection.execute(
            "SELECT wait_event_type, wait_event FROM pg_stat_activity WHERE pid = %s", [self._pid]
        ).fetchone()
        return row or (_GONE, None)

    def _overdue(self, seconds: float) -> None:
        kind, event = self._waits_for()
        if event != _HELD_BACK and kind in _IDLE:
            assert self._heartbeat is not None
            raise ReplicationError(
                f"What was written at {self._heartbeat.position} has not come through the stream "
                f"for {seconds:.0f} s; connecting anew."
            )
        # Once it is ready, it has as much time again.
        self._moved = self._clock()
        if event == _HELD_BACK and not self._held_back:
            self._held_back = True
            self._telemetry.held_back = time.time()
            logger.warning(
                "PostgreSQL holds changes back until the standbys of synchronized_standby_slots "
                "have them; start these standbys, or take them out of that setting"
            )

    def _beat(self, now: float) -> None:
        if self._heartbeat is not None:
            return
        try:
            row = self._connection.execute(_BEAT).fetchone()
        except (postgres.InsufficientPrivilege, postgres.ReadOnlySqlTransaction) as error:
            self._interval = 0
            logger.warning(
                "No heartbeats, only keepalives: %s; GRANT EXECUTE ON FUNCTION "
                "pg_logical_emit_message to this role, or set flash_heartbeat_interval = 0",
                error.diag.message_primary,
            )
            return
        assert row is not None
        self._heartbeat, self._written = _Heartbeat(Lsn.parse(row[0]), now), now

    def _warn(self, danger: int, safe: int | None) -> None:
        """Say it at once when it gets worse, and when it has been better for a while."""
        now = self._clock()
        if danger >= self._danger:
            self._better = now
        if danger > self._danger or now - self._better > _CALM_SECONDS:
            self._danger, self._better = danger, now
            logger.warning(_SAID[danger], self._slot, *([safe] if danger == _RUNNING_OUT else []))


_EXTENDED, _RUNNING_OUT, _UNRESERVED = 1, 2, 3
_SAID = {
    0: "The slot %s keeps no more WAL than max_wal_size again",
    _EXTENDED: "The slot %s keeps more WAL than max_wal_size (wal_status extended); something "
    "holds it up: the broker, the handlers' queue, or a long transaction",
    _RUNNING_OUT: "The slot %s is lost after %s bytes more of WAL (safe_wal_size): mend what holds "
    "it up, or raise max_slot_wal_keep_size",
    _UNRESERVED: "The slot %s is about to be lost (wal_status unreserved): PostgreSQL removes WAL "
    "that it needs at the next checkpoint; raise max_slot_wal_keep_size now",
}


def _danger(wal_status: str | None, safe: int | None, limit: int) -> int:
    if wal_status in ("unreserved", "lost"):
        return _UNRESERVED
    if safe is not None and limit > 0 and safe < limit * _LOW:
        return _RUNNING_OUT
    return _EXTENDED if wal_status == "extended" else 0
