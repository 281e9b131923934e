"""Watch the slot from the second connection, because a stream may look healthy and not be.

A socket can be open with no server behind it; the server can have given the slot to another worker,
hold changes back, or be about to remove WAL that the slot needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from psycopg import errors as postgres

from ..acknowledgement import Progress
from ..errors import ReplicationError
from ..postgres.connection import is_standby
from ..postgres.slots import POSITION
from ..postgres.source import Source
from ..protocol.lsn import Lsn
from ..telemetry import Telemetry

logger = logging.getLogger(__name__)

#: A heartbeat is written only if the stream lags at least this many bytes of WAL behind the server.
#: An idle server writes fewer bytes after a heartbeat by itself (a checkpoint, its list of running
#: transactions), so heartbeats do not keep it awake.
_IDLE_BYTES = 1024
#: Seconds between two attempts to write a heartbeat after the server has refused one.
_REFUSED_SECONDS = 60.0
#: Seconds that an improvement must last before it is logged.
_CALM_SECONDS = 60.0
#: The slot is in danger if less than this fraction of `max_slot_wal_keep_size` is left.
_LOW = 0.5
#: The type of wait event that stands for a process that does not exist.
_GONE = "gone"
#: Types of wait events of a process that waits for this worker or for work, or does not exist.
_IDLE = ("Activity", "Client", _GONE)
#: PostgreSQL's wait event for the standbys of `synchronized_standby_slots`.
_HELD_BACK = "WaitForStandbyConfirmation"

# A standby knows only the time of the last commit that it has applied.
_STATE = f"""
SELECT s.active_pid, s.wal_status, s.safe_wal_size, coalesce(s.restart_lsn, '0/0')::text,
       {POSITION}::text, pg_is_in_recovery(),
       CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp()
            ELSE clock_timestamp() END,
       pg_size_bytes(current_setting('max_slot_wal_keep_size')),
       coalesce(r.sync_state IN ('sync', 'quorum'), false)
FROM (SELECT) AS here LEFT JOIN pg_replication_slots s ON s.slot_name = %s
LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid
"""  # noqa: S608 - our own words
# Not transactional, so that no process waits until it is on disk.
_BEAT = "SELECT pg_logical_emit_message(false, 'flash.heartbeat', ''::text)::text"
_NO_HEARTBEATS = (
    "Cannot write heartbeats, relying on keepalives: %s; GRANT EXECUTE ON FUNCTION "
    "pg_logical_emit_message to this role, or set flash_heartbeat_interval = 0"
)
_SYNCHRONOUS = (
    "PostgreSQL counts the reader of the slot %s as a synchronous standby: every commit of the "
    "server waits until the broker has its changes, also while the broker is down or this source "
    "is paused; name the standbys in synchronous_standby_names instead of *, and reload PostgreSQL "
    "(docs/operating.md, Synchronous standbys)"
)


class _Heartbeat(NamedTuple):
    position: Lsn
    written: float


class SlotWatch:
    """Watches the slot of one stream.

    Args:
        source: The source.
        pid: The PID of the server process that sends the stream.
        progress: Gets the server's position and time at each check.
        clock: Returns the time, in seconds.
        telemetry: Notes since when PostgreSQL holds changes back.
    """

    def __init__(
        self,
        source: Source,
        pid: int,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._connection = source.connection
        self._pid = pid
        self._slot = source.slot
        #: Seconds between heartbeats; 0 for none.
        self._interval = source.settings.flash_heartbeat_interval
        self._patience = source.settings.longest_silence
        self._progress = progress
        self._clock = clock
        self._telemetry = telemetry or Telemetry()
        #: Whether the server is a standby. When it is promoted, a new timeline begins.
        self._standby = is_standby(source.connection)
        #: The position from which PostgreSQL reads WAL for the slot, as of the last check.
        self._restart = Lsn(0)
        #: The same as of the check before.
        self.durable = Lsn(0)
        #: The position that the stream had brought at the last check.
        self._received = Lsn(0)
        #: When that position last moved, or when the session was last not listening.
        self._moved_at = clock()
        #: The heartbeat that has not come back yet.
        self._heartbeat: _Heartbeat | None = None
        #: When the last heartbeat was written.
        self._beaten_at = clock()
        #: Whether the server has refused the last one.
        self._refused = False
        #: The danger that was logged last, and when the slot was last in at least that danger.
        self._danger = _Danger.NONE
        self._in_danger_at = clock()
        self._held_back = False
        #: Whether commits wait until this worker has confirmed them.
        self._synchronous = False

    @property
    def confirmed(self) -> Lsn:
        """The position that the broker has confirmed."""
        return self._progress.confirmed

    def check(self, received: Lsn, listening: bool) -> None:
        """Check the slot and the last heartbeat, and write a heartbeat if one is due.

        Args:
            received: The last position that the stream has brought.
            listening: Whether the session reads the stream; otherwise `received` cannot advance.

        Raises:
            ReplicationError: A new stream is needed.
        """
        row = self._connection.execute(_STATE.encode(), [self._slot]).fetchone()
        assert row is not None
        reader, wal_status, safe_bytes, restart, text, standby, *others = row
        server_time, limit, synchronous = others
        if reader != self._pid:
            raise ReplicationError(
                f"The slot {self._slot} is not read by this worker's connection (PID {self._pid}) "
                f"any more, but by {f'PID {reader}' if reader else 'no process'}; reconnecting."
            )
        if self._standby and not standby:
            # Messages name the timeline that the stream began in.
            raise ReplicationError("The standby was promoted; reconnecting.")
        # At the next check it is on PostgreSQL's disk, with an acknowledgement that is not older.
        self.durable, self._restart = self._restart, Lsn.parse(restart)
        position = Lsn.parse(text)
        self._progress.mark(position, server_time)
        self._warn(_danger(wal_status, safe_bytes, limit), safe_bytes)
        if synchronous and not self._synchronous:
            logger.error(_SYNCHRONOUS, self._slot)
        self._synchronous = synchronous
        self._check_heartbeat(received, listening)
        now = self._clock()
        due = self._interval and not standby and now - self._beaten_at >= self._interval
        if due and received and position - received >= _IDLE_BYTES:
            self._beat(now)

    def _check_heartbeat(self, received: Lsn, listening: bool) -> None:
        now = self._clock()
        if received != self._received or not listening:
            self._received, self._moved_at = received, now
        if self._heartbeat is None:
            return
        if received >= self._heartbeat.position:
            self._heartbeat = None
            if self._held_back:
                self._held_back = False
                self._telemetry.held_back = None
                logger.warning("PostgreSQL sends changes again")
        elif now - max(self._moved_at, self._heartbeat.written) > self._patience:
            self._overdue(now - self._heartbeat.written)

    def server_is_busy(self) -> bool:
        """Return whether the server process is decoding, and therefore has no time to answer.

        While PostgreSQL decodes a large transaction of other tables it answers only twice in each
        `wal_sender_timeout`. Before version 16 it may not answer at all, as while it decodes the
        refresh of a materialized view.
        """
        event_type, _ = self._wait_event()
        return event_type not in _IDLE

    def _wait_event(self) -> tuple[str | None, str | None]:
        """Return type and name of the wait event of the server process."""
        row = self._connection.execute(
            "SELECT wait_event_type, wait_event FROM pg_stat_activity WHERE pid = %s", [self._pid]
        ).fetchone()
        return row or (_GONE, None)

    def _overdue(self, seconds: float) -> None:
        event_type, event = self._wait_event()
        if event != _HELD_BACK and event_type in _IDLE:
            assert self._heartbeat is not None
            raise ReplicationError(
                f"The heartbeat written at {self._heartbeat.position} has not come through the "
                f"stream for {seconds:.0f} s; reconnecting."
            )
        # The server is busy or waits for standbys, so wait for as long again.
        self._moved_at = self._clock()
        if event == _HELD_BACK and not self._held_back:
            self._held_back = True
            self._telemetry.held_back = time.time()
            logger.warning(
                "PostgreSQL holds changes back until the standbys of synchronized_standby_slots "
                "have received them; start these standbys, or remove them from that setting"
            )

    def _beat(self, now: float) -> None:
        if self._heartbeat is not None:
            return
        try:
            row = self._connection.execute(_BEAT).fetchone()
        except (postgres.InsufficientPrivilege, postgres.ReadOnlySqlTransaction) as error:
            # Not for ever: the privilege may come, and a provider makes a server read-only for a
            # while when its disk is nearly full.
            self._beaten_at = now + max(_REFUSED_SECONDS - self._interval, 0.0)
            if not self._refused:
                self._refused = True
                logger.warning(_NO_HEARTBEATS, error.diag.message_primary)
            return
        assert row is not None
        if self._refused:
            self._refused = False
            logger.warning("Heartbeats are written again")
        self._heartbeat, self._beaten_at = _Heartbeat(Lsn.parse(row[0]), now), now

    def _warn(self, danger: _Danger, safe_bytes: int | None) -> None:
        """Log a greater danger at once, and a smaller one once it has lasted for a while."""
        now = self._clock()
        if danger >= self._danger:
            self._in_danger_at = now
        if danger > self._danger or now - self._in_danger_at > _CALM_SECONDS:
            self._danger, self._in_danger_at = danger, now
            bytes_left = [safe_bytes] if danger == _Danger.RUNNING_OUT else []
            logger.warning(_WARNINGS[danger], self._slot, *bytes_left)


class _Danger(IntEnum):
    """How close the slot is to being lost."""

    NONE = 0
    EXTENDED = 1
    RUNNING_OUT = 2
    UNRESERVED = 3


_WARNINGS = {
    _Danger.NONE: "The slot %s no longer keeps more WAL than max_wal_size",
    _Danger.EXTENDED: "The slot %s keeps more WAL than max_wal_size (wal_status extended); "
    "something holds it up: the broker, the handlers' queue, or a long transaction",
    _Danger.RUNNING_OUT: "The slot %s is lost after %s more bytes of WAL (safe_wal_size): fix what "
    "holds it up, or raise max_slot_wal_keep_size",
    _Danger.UNRESERVED: "The slot %s is about to be lost (wal_status unreserved): PostgreSQL "
    "removes WAL that it needs at the next checkpoint; raise max_slot_wal_keep_size now",
}


def _danger(wal_status: str | None, safe_bytes: int | None, limit: int) -> _Danger:
    if wal_status in ("unreserved", "lost"):
        return _Danger.UNRESERVED
    if safe_bytes is not None and limit > 0 and safe_bytes < limit * _LOW:
        return _Danger.RUNNING_OUT
    return _Danger.EXTENDED if wal_status == "extended" else _Danger.NONE
