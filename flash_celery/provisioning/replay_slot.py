"""The replay slot: a second slot that trails the replication slot, for `flash replay`.

A slot's confirmed position cannot go back, so `flash replay` reads a copy of this slot, which stays
behind. The comment on the publication of truncates records the position after which the replay slot
has every change.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from ..changes.operations import Operation
from ..errors import ConfigurationError, FlashError
from ..escaping import one_line
from ..postgres import slots
from ..postgres.source import Source, connected
from ..protocol.lsn import Lsn
from ..settings import Settings
from . import ddl
from .findings import OK, WARNING, Finding
from .record import comment, comment_step

logger = logging.getLogger(__name__)

#: The slot advances in steps of a twentieth of the window.
_STEPS_PER_WINDOW = 20
#: Seconds between two steps.
_SHORTEST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
#: The recorded position while the slot is being created.
_UNKNOWN = Lsn((1 << 64) - 1)
#: The thread that advances the slot and the reading thread both update the record.
_updating = threading.Lock()
#: Bytes of WAL after which it is recorded again up to where everything was handled. Each record
#: writes WAL too, so an idle server would otherwise be kept busy.
_HANDLED_BYTES = 1 << 16
#: Seconds between two of these records at least.
_HANDLED_SECONDS = 60.0
# PostgreSQL 18 invalidates a slot that stays idle for that long, also on an idle server. To advance
# a slot to where it is counts as using it.
_USE = """
SELECT pg_replication_slot_advance(slot_name, confirmed_flush_lsn) FROM pg_replication_slots
WHERE slot_name = %s AND NOT active AND invalidation_reason IS NULL
AND (SELECT setting FROM pg_settings WHERE name = 'idle_replication_slot_timeout') <> '0'
"""
#: The version from which that setting exists.
_HAS_IDLE_TIMEOUT = 180000
#: The key of the record.
_KEY = "flash_celery_history"


class Mark(NamedTuple):
    """A position and its time, after which the replay slot has every commit."""

    lsn: Lsn
    time: datetime

    def __str__(self) -> str:
        return f"{self.lsn} ({self.time.isoformat(' ', 'seconds')})"


_REFILL_GIVEN_UP = (
    "The broker has lost the changes committed from %s up to %s, and enqueuing them again was not "
    "completed: they may be missing, because flash_replay_window is 0 now"
)


class Refill(NamedTuple):
    """A range of changes that the broker has lost, and that are being enqueued again."""

    since: Lsn
    until: Lsn


IsDrained = Callable[[], bool]
#: Past positions of the replication slot, each with the time by this process's monotonic clock.
Samples = deque[tuple[float, Mark]]


def oldest(source: Source) -> Mark | None:
    """Return the mark after which changes can be replayed; None without a usable replay slot."""
    slot = slots.find(source.connection, source.replay_slot)
    recorded = _recorded(source)
    if slot is None or slot.reason is not None or slot.confirmed is None:
        return None
    if recorded is None or recorded.lsn == _UNKNOWN:
        return None
    return Mark(max(recorded.lsn, Lsn.parse(slot.confirmed)), recorded.time)


def ours(source: Source) -> bool:
    """Return whether the slot exists and was created by flash-celery."""
    slot = slots.find(source.connection, source.replay_slot)
    return slot is not None and _recorded(source) is not None


def findings(source: Source) -> Iterator[Finding]:
    """Check how far back changes can be replayed, and whether the slot keeps WAL needlessly."""
    name = source.replay_slot
    slot = slots.find(source.connection, name)
    if slot is None or _recorded(source) is None:
        return
    mark = oldest(source)
    if not source.settings.flash_replay_window:
        message = (
            f"{name} keeps WAL although flash_replay_window is 0; `flash replicate` drops it when "
            "it starts"
        )
        yield Finding("replay", WARNING, message)
    elif mark is None:
        state = f"was lost ({slot.reason})" if slot.reason else "is being created"
        message = f"{name} {state}; `flash replicate` creates a new one when it starts"
        yield Finding("replay", WARNING, message)
    else:
        message = f"changes after {mark} can be replayed ({slot.wal_status})"
        yield Finding("replay", OK, message)
    if (refill := refill_under_way(source)) is not None:
        message = (
            f"the broker has lost the changes committed from {refill.since} up to {refill.until}; "
            "`flash replicate` enqueues them again before it reads on"
        )
        yield Finding("replay", WARNING, message)


def prepare(source: Source) -> None:
    """Create the slot if it is needed and missing, and drop it if it is no longer needed.

    Raises:
        ConfigurationError: The slot exists but flash-celery did not create it, or the server has no
            free slot.
    """
    name = source.replay_slot
    slot, recorded = slots.find(source.connection, name), _recorded(source)
    if not source.settings.flash_replay_window:
        if recorded is not None:
            if (refill := refill_under_way(source)) is not None:
                logger.error(_REFILL_GIVEN_UP, refill.since, refill.until)
            forget(source)
            logger.info("Dropped the slot %s because flash_replay_window is 0", name)
        return
    if slot is not None:
        if recorded is None:
            raise ConfigurationError(
                f"flash_replay_window needs the slot {name}, but a slot of that name exists that "
                "`flash replicate` did not create; drop it, or set flash_replay_window = 0."
            )
        if slot.reason is not None:
            logger.warning("The slot %s was lost (%s); creating it again", name, slot.reason)
        elif recorded.lsn != _UNKNOWN:
            return
        slots.drop(source.connection, name)
    _create(source)


def forget(source: Source) -> None:
    """Drop the slot, and its record."""
    slots.drop(source.connection, source.replay_slot)
    _write(source, None)


def _create(source: Source) -> None:
    now = _position(source)
    if now is None:
        return
    # Recorded first, so that the slot counts as ours even if this process dies before the end.
    _record(source, now._replace(lsn=_UNKNOWN))
    try:
        slots.copy_permanent(source.connection, source.slot, source.replay_slot)
    except psycopg.errors.ConfigurationLimitExceeded:
        raise ConfigurationError(
            "flash_replay_window needs a second slot, but all max_replication_slots are in use; "
            "drop a slot, raise that setting of the server, or set flash_replay_window = 0."
        ) from None
    slot = slots.find(source.connection, source.replay_slot)
    assert slot is not None
    assert slot.confirmed is not None
    _record(source, now._replace(lsn=Lsn.parse(slot.confirmed)))
    logger.info("Created the slot %s; changes can be replayed from now on", source.replay_slot)


def _position(source: Source) -> Mark | None:
    """Return the position of the replication slot and the current time."""
    row = source.connection.execute(
        "SELECT confirmed_flush_lsn::text, clock_timestamp() FROM pg_replication_slots "
        "WHERE slot_name = %s AND confirmed_flush_lsn IS NOT NULL",
        [source.slot],
    ).fetchone()
    return Mark(Lsn.parse(row[0]), row[1]) if row else None


def _recorded(source: Source) -> Mark | None:
    """Return the recorded position of the slot."""
    return _parse(_read(source))


def _next(source: Source) -> Mark | None:
    """Return the recorded mark to which the slot advances next."""
    recorded = _read(source)
    return _parse(recorded.get("next")) if isinstance(recorded, dict) else None


def _read(source: Source) -> Any:
    try:
        return json.loads(comment(source, Operation.TRUNCATE) or "")[_KEY]
    except (ValueError, TypeError, KeyError):
        return None


def _parse(recorded: Any) -> Mark | None:
    try:
        return Mark(Lsn.parse(recorded["lsn"]), datetime.fromisoformat(recorded["time"]))
    except (ValueError, TypeError, KeyError):
        return None


def refill_under_way(source: Source) -> Refill | None:
    """Return the recorded range that is being enqueued again; None if there is none."""
    try:
        refill = _read(source)["refill"]
        return Refill(Lsn.parse(refill["since"]), Lsn.parse(refill["until"]))
    except (ValueError, TypeError, KeyError):
        return None


def remember_refill(source: Source, refill: Refill | None) -> None:
    """Record the range that is being enqueued again, None for none any more.

    The replay slot does not advance while there is one.
    """
    value = refill and {name: str(lsn) for name, lsn in refill._asdict().items()}
    _update(source, refill=value)


def handled_up_to(source: Source, history: str) -> Lsn | None:
    """Return a position before which all changes had been handled; None if none is recorded.

    Args:
        source: The source.
        history: The server and its timeline; a position of another one counts as none.
    """
    try:
        handled = _read(source)["handled"]
        return Lsn.parse(handled["lsn"]) if handled["history"] == history else None
    except (ValueError, TypeError, KeyError):
        return None


def _record(source: Source, mark: Mark, following: Mark | None = None) -> None:
    _update(source, **_to_json(mark), next=_to_json(following) if following else None)


def _update(source: Source, **values: Any) -> None:
    """Replace values in the record; None removes one."""
    with _updating:
        recorded = _read(source)
        recorded = (recorded if isinstance(recorded, dict) else {}) | values
        kept = {name: value for name, value in recorded.items() if value is not None}
        _write(source, json.dumps({_KEY: kept}))


def _to_json(mark: Mark) -> dict[str, Any]:
    return {"lsn": str(mark.lsn), "time": mark.time.isoformat()}


def _write(source: Source, text: str | None) -> None:
    ddl.apply(source.connection, [comment_step(source.prefix, Operation.TRUNCATE, text)])


def _use(source: Source) -> None:
    """Keep PostgreSQL from counting the slot as idle."""
    if source.connection.info.server_version >= _HAS_IDLE_TIMEOUT:
        with slots.as_login_role(source.connection):
            source.connection.execute(_USE, [source.replay_slot])


class _Advancer(threading.Thread):
    """A thread that advances the slot. It has its own connection, because decoding WAL is slow.

    It reconnects after any error, because a session may last for months.
    """

    def __init__(
        self, settings: Settings, samples: Samples, history: str, is_drained: IsDrained | None
    ) -> None:
        super().__init__(name="flash-replay-slot", daemon=True)
        self._settings = settings
        self._samples = samples
        #: Whether the samples reach back to an earlier process, or one is recorded for the next.
        self._restored = bool(samples)
        self._history = history
        self._is_drained = is_drained
        #: The position at the last check, if the queues were empty then.
        self._drained_at: Lsn | None = None
        #: The position that is recorded as handled, and when it was.
        self._handled, self._recorded_at = Lsn(0), -_HANDLED_SECONDS
        step = settings.flash_replay_window / _STEPS_PER_WINDOW
        self._pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, step))
        self._stopping = threading.Event()
        self._connection: psycopg.Connection[Any] | None = None
        self._last_logged = ""

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                with connected(self._settings) as source:
                    self._connection = source.connection
                    while not self._stopping.is_set():
                        self._advance(source)
                        self._last_logged = ""
                        self._stopping.wait(self._pause if self._restored else _SHORTEST_PAUSE)
            except (psycopg.Error, FlashError) as error:
                self._log(error)
            except Exception as error:  # without this thread WAL would pile up
                logger.exception("The thread of %s has failed", self._settings.replay_slot)
                self._log(error)
            self._stopping.wait(self._pause)

    def _log(self, error: Exception) -> None:
        message = one_line(error)
        if not self._stopping.is_set() and message != self._last_logged:
            self._last_logged = message
            name = self._settings.replay_slot
            logger.warning("Cannot advance the slot %s, and will try again: %s", name, message)

    def _advance(self, source: Source) -> None:
        now = _position(source)
        if refill_under_way(source) is not None:
            _use(source)  # it may have to begin again
            return
        slot = slots.find(source.connection, source.replay_slot)
        if slot is not None and slot.reason is not None:
            prepare(source)
        if now is not None and self._is_drained is not None:
            self._note_handled(source, now.lsn, self._is_drained())
        if now is not None:
            if not self._restored:
                # Again if the first look came before the first acknowledgement.
                self._restored = self._restore_sample(source, now)
            self._samples.append((time.monotonic(), now))
        due, limit = None, time.monotonic() - self._settings.flash_replay_window
        while self._samples and self._samples[0][0] <= limit:
            due = self._samples.popleft()[1]
        reached = oldest(source)
        if due is None or reached is None or due.lsn <= reached.lsn:
            _use(source)
            return
        # Recorded first, so that the record never promises more than the slot holds.
        _record(source, due, now)
        statement = "SELECT pg_replication_slot_advance(%s, %s)"
        with slots.as_login_role(source.connection):
            source.connection.execute(statement, [source.replay_slot, str(due.lsn)])

    def _note_handled(self, source: Source, position: Lsn, is_drained: bool) -> None:
        """Record the last position if the queues were empty then, and are again.

        One check does not suffice: a message that a worker is receiving is nowhere for a moment.
        """
        handled, self._drained_at = self._drained_at, position if is_drained else None
        now = time.monotonic()
        if handled is None or not is_drained or now - self._recorded_at < _HANDLED_SECONDS:
            return
        if handled - self._handled >= _HANDLED_BYTES:
            _update(source, handled={"lsn": str(handled), "history": self._history})
            self._handled, self._recorded_at = handled, now

    def _restore_sample(self, source: Source, now: Mark) -> bool:
        """Continue from the recorded sample of an earlier process, or record one.

        Otherwise the slot would never advance under a worker that is always restarted before the
        window has passed. Returns False if there is nothing to record yet.
        """
        reached, following = oldest(source), _next(source)
        if reached is None or now.lsn <= reached.lsn:
            return False
        if following is not None and reached.lsn < following.lsn <= now.lsn:
            age = (now.time - following.time).total_seconds()
            self._samples.appendleft((time.monotonic() - age, following))
        else:
            _record(source, reached, now)
        return True

    def stop(self) -> None:
        """Stop, even in the middle of a statement."""
        self._stopping.set()
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.cancel()
        self.join(1.0)


@contextmanager
def trailing(
    settings: Settings, samples: Samples, history: str = "", is_drained: IsDrained | None = None
) -> Iterator[None]:
    """In this block, keep the replay slot `flash_replay_window` behind the replication slot.

    Args:
        settings: The settings of the source.
        samples: Past positions, which the caller keeps from one session to the next.
        history: The server and its timeline.
        is_drained: Returns whether every message up to now has been handled. Default: it is not
            asked, and no such position is recorded.
    """
    if not settings.flash_replay_window:
        yield
        return
    advancer = _Advancer(settings, samples, history, is_drained)
    advancer.start()
    try:
        yield
    finally:
        advancer.stop()
