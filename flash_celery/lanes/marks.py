"""Marks: the position in the WAL up to which a lane's changes were handled (`once=`).

A mark is one row of the table `flash_celery_marks`, in the database where the handler's effects go.
A call locks it, compares it with its change and moves it, in the transaction of the effects. So a
change that comes again is recognised, whatever died in between, and of two processes that hold one
lane the later finds the change handled.

What comes again has the same ordinals, because the server decodes a row with the publications of
its time, and all sessions name the same four. The ordinals of rows and of logical messages are
compared apart, each with its own: whether messages are read depends on the handlers of the moment,
so a number that counted both would differ between two readings of one transaction.

The row with the lane -1 says which layout (number of lanes, ordering key) the marks are of, and is
the floor from which the mark of each lane begins.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from celery.exceptions import Ignore

from ..changes.change import Change, LogicalMessage
from ..changes.history import History
from ..changes.payload import history_json, history_of
from ..errors import PayloadError
from ..escaping import escaped
from ..handlers.databases import MARKS_TABLE, Execute, Session
from ..handlers.written_context import content_of, statement_for
from ..messages.deduplication import now
from ..messages.lane_messages import LaneForm
from ..protocol.lsn import Lsn
from . import marks_table as table
from .alarms import call_at

logger = logging.getLogger(__name__)

#: The errors of a database that lacks the table or the privileges: undefined_table and
#: insufficient_privilege.
_NOT_SET_UP = {"42P01", "42501"}
#: Seconds between two looks at the calls that wait for their marks.
_LOCKED_SECONDS = 10.0

#: The ordinal of a row or message in its transaction, its subscription, and its part.
Place = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a handler's keys are."""

    #: A digest of the number of lanes and the ordering key.
    digest: str
    lanes: int
    #: Returns the digest of the layout before, whose lanes the broker has seen empty when this one
    #: began; "" if that is not known.
    former: Callable[[], str] = lambda: ""

    @property
    def described(self) -> str:
        """What a mark says of it."""
        return f"{self.lanes}/{self.digest}"


class LaneMark:
    """The mark of one lane, as one call of the handler sees it.

    Args:
        handler: The name of the task.
        source: The server and the slot.
        layout: The layout of the lanes.
        lane: The number of the lane; None if it is not known, for the change of a barrier.
        fence: The fencing token of the call.
    """

    def __init__(
        self, handler: str, source: str, layout: Layout, lane: int | None, fence: int
    ) -> None:
        self._of_handler = handler, source
        self._of_lane = handler, source, lane
        self._layout = layout
        self._lane = lane
        self._fence = fence
        #: Whether the changes can only be handled later: it has raised `Ignore`.
        self.waits = False

    def advance(
        self,
        session: Session,
        changes: Sequence[Change],
        context_for: Callable[[Sequence[Change]], str] = lambda changes: "",
    ) -> Sequence[Change] | None:
        """Move past changes, and return those that were not handled; None: `create` it first.

        Args:
            session: The transaction.
            changes: The changes.
            context_for: Returns the context to write for those that were not handled, in JSON; ""
                for none.

        Raises:
            PayloadError: A change does not say in which WAL its position is.
            Ignore: The database is not set up; the changes have to wait.
        """
        self._require_positions(changes)
        _locked.begin(self)
        try:
            return self._advance(session, changes, context_for)
        finally:
            _locked.end(self)

    def _advance(
        self,
        session: Session,
        changes: Sequence[Change],
        context_for: Callable[[Sequence[Change]], str],
    ) -> Sequence[Change] | None:
        first, last = changes[0], changes[-1]
        if first is last or _alike(changes):
            move = table.MOVE_PAST_MESSAGES if _is_message(first) else table.MOVE_PAST_ROWS
            end, place = str(last.commit_lsn), _array(_place(last))
            before = end, place
            latest = last.transaction.committed_at
            if first is not last:
                before = str(first.commit_lsn), _array(_place(first))
                latest = max(change.transaction.committed_at for change in changes)
            history = history_json(last.transaction.history)
            layout = self._layout.described
            parameters: Sequence[Any]
            parameters = end, place, end, latest, *self._of_lane, layout, history, *before
            if context := context_for(changes):
                move += table.WITH_CONTEXT
                parameters = *parameters, content_of(context)
            if self._moved(session, move, parameters):
                return changes
        left = self._compare(session.execute, changes)
        if left and (context := context_for(left)):
            session.execute(statement_for(context), ())
        return left

    def log_that_it_is_locked(self, seconds: float) -> None:
        """Log that a call waits for its mark."""
        logger.warning(
            "%s: lane %s has waited for its mark for %.0f s, because another transaction has "
            "its row in %s: that of a process that stands still in a call, or has lost its "
            "connection; pg_blocking_pids() names its session",
            escaped(self._of_handler[0]),
            self._lane,
            seconds,
            MARKS_TABLE,
        )

    def _require_positions(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if self._lane is None or change.transaction.history is None:
                raise PayloadError(
                    "This change does not say to which server its position belongs, so `once=` "
                    "cannot know whether it was handled: an older `flash replicate` has enqueued "
                    "it."
                )

    def _compare(self, execute: Execute, changes: Sequence[Change]) -> Sequence[Change] | None:
        """Do the same where the mark is of another layout or history, or past some change."""
        rows = execute(table.LOCK, self._of_lane)
        if not rows or rows[0][0] != self._layout.described:
            return None
        mark = Position.of(*rows[0][1:])
        left = [change for change in changes if mark.move_past(change)]
        if left:
            execute(table.SET, (*mark.columns, *self._of_lane))
        if len(left) < len(changes):
            logger.info(
                "%s: %d of %d changes in lane %d were handled already, up to %s",
                escaped(self._of_handler[0]),
                len(changes) - len(left),
                len(changes),
                self._lane,
                mark.commit_lsn,
            )
        return left

    def _moved(self, session: Session, move: str, parameters: Sequence[Any]) -> bool:
        try:
            return session.count(move, parameters) > 0
        except Exception as error:
            if not {_state(error), _state(error.__cause__)} & _NOT_SET_UP:
                raise
            self.wait(
                f"its database of once= has no table {MARKS_TABLE}, or does not let this role "
                "write there; run what `flash doctor --sql` prints"
            )

    def wait(self, reason: str) -> NoReturn:
        """Leave the changes in their lane until later."""
        self.waits = True
        handler = escaped(self._of_handler[0])
        logger.error("%s: lane %s waits: %s", handler, self._lane, escaped(reason)[:500])
        raise Ignore(reason)

    def create(self, execute: Execute) -> None:
        """Create the mark, at the floor of its layout.

        Raises:
            Ignore: The marks are of a newer layout than this call, whose lease has run out.
        """
        layout = self._layout.described
        execute(table.CREATE_FLOOR, (*self._of_handler, layout, self._fence))
        ((found, fence),) = execute(table.LOCK_FLOOR, self._of_handler)
        if found != layout:
            if self._fence < fence:
                self.wait("the marks are of a newer layout of the lanes than this call")
            self._replace_layout(execute, str(found))
        execute(table.CREATE, (self._lane, *self._of_handler))

    def _replace_layout(self, execute: Execute, found: str) -> None:
        """Turn the marks of another layout into the floor of this one.

        If its lanes are known to have been empty, everything up to the greatest mark was handled.
        Else only what is below the mark of each lane is known to have been; a lane without a mark
        may have lost its first change with the broker.
        """
        lanes, _, digest = found.partition("/")
        if digest == self._layout.former():
            execute(table.RAISE_FLOOR_TO_GREATEST, self._of_handler)
        else:
            execute(table.RAISE_FLOOR_TO_LEAST, (*self._of_handler, int(lanes)))
        execute(table.FORGET, self._of_handler)
        execute(table.SET_LAYOUT, (self._layout.described, self._fence, *self._of_handler))


class _Locked:
    """Has the log say which calls wait for their mark for long: their lanes stand still until then.

    There is no timeout, because the lock is that of a transaction with the same changes, whose
    process was frozen or cut off, and whose result decides whether they are handled. One alarm is
    for all calls of the process, because one for each would take longer than the rest of a mark.

    Args:
        seconds: How long a call waits until the log says so, and says so again.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        #: When each call began to wait.
        self._since: dict[LaneMark, float] = {}
        #: The process that looks.
        self._process = 0

    def begin(self, mark: LaneMark) -> None:
        """Note that a call may wait."""
        if self._process != os.getpid():
            # The calls of a process before a fork are not in this one, which has no alarm either.
            self._process, self._since = os.getpid(), {}
            self._look_later()
        self._since[mark] = now()

    def end(self, mark: LaneMark) -> None:
        """Note that it does not wait any more."""
        self._since.pop(mark, None)  # another thread may have begun with none

    def _look_later(self) -> None:
        call_at(now() + self._seconds, self._look)

    def _look(self) -> None:
        self._look_later()
        for mark, since in list(self._since.items()):
            waited = now() - since
            if waited >= self._seconds:
                mark.log_that_it_is_locked(waited)


_locked = _Locked(_LOCKED_SECONDS)


@dataclass
class Position:
    """The content of a mark."""

    history: History | None = None
    commit_lsn: Lsn = Lsn(0)  # noqa: RUF009 - it is immutable
    row_place: Place = ()
    message_place: Place = ()
    #: The latest time at which a change was committed that was handled, in microseconds since 2000.
    #: A server that was restored from a backup writes the same positions again, but later.
    committed_at: int = 0

    @classmethod
    def of(
        cls, history: str, commit_lsn: str, row: str, message: str, committed_at: int
    ) -> Position:
        """Return the position in the columns of a mark."""
        places = _place_in(row), _place_in(message)
        return cls(history_of(json.loads(history)), Lsn.parse(commit_lsn), *places, committed_at)

    @property
    def columns(self) -> tuple[str, str, str, str, int]:
        """The columns of a mark."""
        places = _array(self.row_place), _array(self.message_place)
        return history_json(self.history), str(self.commit_lsn), *places, self.committed_at

    def covers(self, change: Change) -> bool:
        """Return whether a change was handled."""
        commit = change.commit_lsn
        if commit >= self._common_end(change) or self._is_older_than(change):
            return False
        if commit != self.commit_lsn:
            return commit < self.commit_lsn
        return _place(change) <= (self.message_place if _is_message(change) else self.row_place)

    def move_past(self, change: Change) -> bool:
        """Move past a change; return False if it was handled."""
        if self.covers(change):
            return False
        end = self._common_end(change)
        restored = change.commit_lsn <= self.commit_lsn and self._is_older_than(change)
        comparable = change.commit_lsn < end and not restored
        if self.history is not None and not comparable and (restored or self.commit_lsn >= end):
            logger.warning(
                "The mark at %s of %s is dropped: a failover has lost that position, the server "
                "was restored from a backup, or it is another; the change is at %s of %s",
                self.commit_lsn,
                self.history,
                change.commit_lsn,
                change.transaction.history,
            )
        if not comparable or change.commit_lsn != self.commit_lsn:
            self.row_place = self.message_place = ()
        self.history, self.commit_lsn = change.transaction.history, change.commit_lsn
        self.committed_at = max(self.committed_at, change.transaction.committed_at)
        if _is_message(change):
            self.message_place = _place(change)
        else:
            self.row_place = _place(change)
        return True

    def _is_older_than(self, change: Change) -> bool:
        return change.transaction.committed_at > self.committed_at

    def _common_end(self, change: Change) -> Lsn:
        """Return up to where the position means something in the WAL of a change.

        After a failover, changes from before it may come again. None of the new server's later ones
        was handled, even if the position of the old server is greater.
        """
        history = change.transaction.history
        if self.history is None or history is None:
            return Lsn(0)
        return history.common_end(self.history) or Lsn(0)


def read_positions(execute: Execute, form: LaneForm) -> Mapping[int, Position]:
    """Return the position of each lane's mark; a lane without a mark is at the floor."""
    rows = execute(table.READ, (form.handler, form.source))
    layout = Layout(form.layout, form.lanes).described
    found = {lane: Position.of(*columns) for lane, its, *columns in rows if its == layout}
    floor = found.get(table.FLOOR, Position())
    return {lane: found.get(lane, floor) for lane in range(form.lanes)}


def _alike(changes: Sequence[Change]) -> bool:
    """Return whether changes are of one history, and all rows or all messages."""
    return len({(change.transaction.history, _is_message(change)) for change in changes}) == 1


def _is_message(change: Change) -> bool:
    return isinstance(change, LogicalMessage)


def _place(change: Change) -> Place:
    return change.ordinal, change.number, int(change.part)


def _place_in(array: str) -> Place:
    return tuple(map(int, array.strip("{}").split(","))) if array != "{}" else ()


def _array(place: Place) -> str:
    return f"{{{','.join(map(str, place))}}}"


def _state(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a driver's error; SQLAlchemy's wraps one."""
    error = getattr(error, "orig", None) or error
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
