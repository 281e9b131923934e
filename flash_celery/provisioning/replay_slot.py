"""A second slot that stays behind the first, so that what was read can be read again.

A confirmed position cannot go back, but a slot that is behind can be copied (`flash replay`). How
far back it goes is noted in the comment of the publication of truncates.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from ..changes.change import Operation
from ..errors import ConfigurationError, FlashError
from ..escaping import one_line
from ..postgres import slots
from ..postgres.source import Source, connected
from ..protocol.lsn import Lsn
from ..settings import Settings
from . import ddl
from .ddl import Step
from .findings import OK, WARNING, Finding
from .publications import name_of

logger = logging.getLogger(__name__)

#: The slot is moved each of so many parts of the window, within these seconds.
_PARTS, _SHORTEST, _LONGEST = 20, 1.0, 60.0
#: Noted while the slot is being made.
_UNKNOWN = Lsn((1 << 64) - 1)


class Mark(NamedTuple):
    """Everything that was committed after this position, or after this time, is held."""

    lsn: Lsn
    time: datetime

    def __str__(self) -> str:
        return f"{self.lsn} ({self.time.isoformat(' ', 'seconds')})"


#: Where the first slot was, and when it was seen there by this process's clock.
Samples = deque[tuple[float, Mark]]


def oldest(source: Source) -> Mark | None:
    """From where on everything is held; None if there is no such slot."""
    found = slots.find(source.connection, source.replay_slot)
    noted = _noted(source)
    if found is None or found.reason is not None or found.confirmed is None:
        return None
    if noted is None or noted.lsn == _UNKNOWN:
        return None
    return Mark(max(noted.lsn, Lsn.parse(found.confirmed)), noted.time)


def ours(source: Source) -> bool:
    """Whether the slot is there, and was made here."""
    found = slots.find(source.connection, source.replay_slot)
    return found is not None and _noted(source) is not None


def findings(source: Source) -> Iterator[Finding]:
    """How far back one can go, and whether the slot keeps WAL for nobody."""
    found = slots.find(source.connection, source.replay_slot)
    if found is None or _noted(source) is None:
        return
    mark = oldest(source)
    if not source.settings.flash_replay_window:
        said = (
            f"{source.replay_slot} keeps WAL, and flash_replay_window is 0; `flash replicate` "
            "drops it when it starts"
        )
        yield Finding("replay", WARNING, said)
    elif mark is None:
        why = f"was lost ({found.reason})" if found.reason else "is being made"
        said = f"{source.replay_slot} {why}; `flash replicate` makes a new one when it starts"
        yield Finding("replay", WARNING, said)
    else:
        yield Finding("replay", OK, f"what is after {mark} can be replayed ({found.wal_status})")


def prepare(source: Source) -> None:
    """Make the slot where it is wanted and missing, and drop it where it is not wanted any more.

    Raises `ConfigurationError` for a slot that is somebody else's, or if the server has none left.
    """
    name = source.replay_slot
    found, noted = slots.find(source.connection, name), _noted(source)
    if not source.settings.flash_replay_window:
        if noted is not None:
            forget(source)
            logger.info("Dropped the slot %s, for flash_replay_window is 0", name)
        return
    if found is not None:
        if noted is None:
            raise ConfigurationError(
                f"flash_replay_window needs a slot {name}, and there is one that was not made by "
                "`flash replicate`; drop it, or set flash_replay_window = 0."
            )
        if found.reason is not None:
            logger.warning("The slot %s was lost (%s); a new one begins now", name, found.reason)
        elif noted.lsn != _UNKNOWN:
            return
        slots.drop(source.connection, name)
    _make(source)


def forget(source: Source) -> None:
    """Drop the slot, and what is noted of it."""
    slots.drop(source.connection, source.replay_slot)
    _keep(source, sql.SQL("NULL"))


def _make(source: Source) -> None:
    now = _now(source)
    if now is None:
        return
    # So that it is known whose the slot is, whenever this process ends.
    _note(source, now._replace(lsn=_UNKNOWN))
    try:
        source.connection.execute(
            "SELECT pg_copy_logical_replication_slot(%s, %s, false)",
            [source.slot, source.replay_slot],
        )
    except psycopg.errors.ConfigurationLimitExceeded:
        raise ConfigurationError(
            "flash_replay_window needs a second slot, and all of max_replication_slots are in use; "
            "drop one, raise that setting of the server, or set flash_replay_window = 0."
        ) from None
    found = slots.find(source.connection, source.replay_slot)
    assert found is not None
    assert found.confirmed is not None
    _note(source, now._replace(lsn=Lsn.parse(found.confirmed)))
    logger.info("Created the slot %s; what is read from now on can be replayed", source.replay_slot)


def _now(source: Source) -> Mark | None:
    """Where the first slot is now. What is committed later is after it."""
    row = source.connection.execute(
        "SELECT confirmed_flush_lsn::text, clock_timestamp() FROM pg_replication_slots "
        "WHERE slot_name = %s AND confirmed_flush_lsn IS NOT NULL",
        [source.slot],
    ).fetchone()
    return Mark(Lsn.parse(row[0]), row[1]) if row else None


def _noted(source: Source) -> Mark | None:
    return _mark(_comment(source))


def _next(source: Source) -> Mark | None:
    """Where the slot is to go next, as far as it was noted."""
    noted = _comment(source)
    return _mark(noted.get("next")) if isinstance(noted, dict) else None


def _comment(source: Source) -> Any:
    row = source.connection.execute(
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = %s",
        [name_of(source.prefix, Operation.TRUNCATE)],
    ).fetchone()
    try:
        return json.loads((row and row[0]) or "")["flash_celery_history"]
    except (ValueError, TypeError, KeyError):
        return None


def _mark(noted: Any) -> Mark | None:
    try:
        return Mark(Lsn.parse(noted["lsn"]), datetime.fromisoformat(noted["time"]))
    except (ValueError, TypeError, KeyError):
        return None


def _note(source: Source, mark: Mark, then: Mark | None = None) -> None:
    noted = _written(mark) | ({"next": _written(then)} if then else {})
    _keep(source, sql.Literal(json.dumps({"flash_celery_history": noted})))


def _written(mark: Mark) -> dict[str, Any]:
    return {"lsn": str(mark.lsn), "time": mark.time.isoformat()}


def _keep(source: Source, comment: sql.Composable) -> None:
    name = name_of(source.prefix, Operation.TRUNCATE)
    statement = sql.SQL("COMMENT ON PUBLICATION {} IS {}")
    ddl.apply(source.connection, [Step(statement.format(sql.Identifier(name), comment), note=True)])


class _Keeper(threading.Thread):
    """Moves the slot, on a connection of its own: that decodes WAL, and may take long.

    A session may last for months, so it connects anew whatever ends its connection.
    """

    def __init__(self, settings: Settings, samples: Samples) -> None:
        super().__init__(name="flash-history", daemon=True)
        self._settings = settings
        self._samples = samples
        self._pause = min(_LONGEST, max(_SHORTEST, settings.flash_replay_window / _PARTS))
        self._ending = threading.Event()
        self._connection: psycopg.Connection[Any] | None = None
        self._said = ""

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                with connected(self._settings) as source:
                    self._connection = source.connection
                    while not self._ending.is_set():
                        self._move(source)
                        self._said = ""
                        self._ending.wait(self._pause)
            except (psycopg.Error, FlashError) as error:
                self._failed(error)
            self._ending.wait(self._pause)

    def _failed(self, error: Exception) -> None:
        said = one_line(error)
        if not self._ending.is_set() and said != self._said:
            self._said = said
            logger.warning("The slot %s cannot be moved now: %s", self._settings.replay_slot, said)

    def _move(self, source: Source) -> None:
        now = _now(source)
        if now is not None:
            if not self._samples:
                self._recall(source, now)
            self._samples.append((time.monotonic(), now))
        due, before = None, time.monotonic() - self._settings.flash_replay_window
        while self._samples and self._samples[0][0] <= before:
            due = self._samples.popleft()[1]
        reached = oldest(source)
        if due is None or reached is None or due.lsn <= reached.lsn:
            return
        # Noted first: it never says that more is held than is.
        _note(source, due, now)
        source.connection.execute(
            "SELECT pg_replication_slot_advance(%s, %s)", [self._settings.replay_slot, str(due.lsn)]
        )

    def _recall(self, source: Source, now: Mark) -> None:
        """Go on where an earlier process was: if the window began anew with each of them, the slot
        of one that is often restarted would never move."""
        reached, then = oldest(source), _next(source)
        if reached is None or now.lsn <= reached.lsn:
            return
        if then is not None and reached.lsn < then.lsn <= now.lsn:
            age = (now.time - then.time).total_seconds()
            self._samples.append((time.monotonic() - age, then))
        else:
            _note(source, reached, now)

    def end(self) -> None:
        """Stop, also in the middle of a statement."""
        self._ending.set()
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.cancel()
        self.join(1.0)


@contextmanager
def keeping(settings: Settings, samples: Samples) -> Iterator[None]:
    """Keep the second slot the window behind the first, as long as that is read."""
    if not settings.flash_replay_window:
        yield
        return
    keeper = _Keeper(settings, samples)
    keeper.start()
    try:
        yield
    finally:
        keeper.end()
