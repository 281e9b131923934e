"""Messages that carry tasks and are not signed: counted, logged, and shown as dead letters.

Every role of the database can write any number of them, so neither the log nor the dead-letter
queue nor the record grows with them, and none has anything of their content.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from ..changes.rows import Transaction
from ..errors import CatalogError, TaskRefused
from ..messages.task_message import Message
from ..postgres.connection import is_standby
from ..postgres.source import Source
from ..protocol import timestamps
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import LogicalMessage
from ..provisioning import refusals
from ..provisioning.refusals import Refusals
from ..telemetry import Telemetry
from ..transactional_tasks.signing import PREFIX
from . import letters

logger = logging.getLogger(__name__)

#: Seconds between two lines of the log, and between two dead letters.
_SECONDS = 60.0
#: Seconds between two writes to the record.
_RECORD_SECONDS = 10.0
#: Where a message stands: the position of its commit, and its own.
_Place = tuple[Lsn, Lsn]


class RefusedTasks:
    """Reports the messages that are refused.

    Args:
        app: The Celery app.
        queue: The name of the dead-letter queue.
        telemetry: Counts them.
        clock: Returns the time, in seconds.
    """

    def __init__(
        self,
        app: Any,
        queue: str,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._queue = queue
        self._telemetry = telemetry
        self._clock = clock
        self._reported_at = self._recorded_at = float("-inf")
        #: How many were counted and not reported yet.
        self._count = 0
        #: The last one that was counted. What precedes it is read again.
        self._last: _Place = Lsn(0), Lsn(0)
        #: The last one that was reported, and the dead letter.
        self._reported: tuple[_Place, letters.DeadLetter] | None = None
        #: Those that are not recorded yet.
        self._unrecorded: Refusals | None = None

    def refuse(
        self, message: LogicalMessage, transaction: Transaction, reason: str
    ) -> Message | None:
        """Count a message; return a dead letter that reports it, once a minute.

        One that is read again, since nothing had been acknowledged, is not counted again.
        """
        place = transaction.commit_lsn, message.lsn
        if place > self._last:
            self._last = place
            self._add(message, transaction, reason)
        if self._reported is None or self._reported[0] != place:
            return None
        return letters.encode(self._app, self._reported[1], self._queue)

    def _add(self, message: LogicalMessage, transaction: Transaction, reason: str) -> None:
        self._count += 1
        self._telemetry.refused_tasks += 1
        committed = timestamps.to_datetime(transaction.committed_at).isoformat(" ", "seconds")
        here = Refusals(1, committed, committed, str(message.lsn), reason)
        self._unrecorded = self._unrecorded.and_then(here) if self._unrecorded else here
        now = self._clock()
        if now - self._reported_at < _SECONDS:
            return
        count, self._count, self._reported_at = self._count, 0, now
        text = (
            f"{count} {'message' if count == 1 else 'messages'} with the prefix {PREFIX} refused, "
            f"the last at {message.lsn} with {len(message.content)} bytes: {reason}"
        )
        logger.error("%s. %s", text, TaskRefused.solution, extra={"lsn": str(message.lsn)})
        text = f"{text}; SHA-256 {hashlib.sha256(message.content).hexdigest()}"
        self._reported = self._last, _letter(text, transaction)

    def begin_again(self) -> None:
        """Compare no positions with those of another server or timeline."""
        self._last, self._reported = (Lsn(0), Lsn(0)), None

    def record(self, source: Source, at_once: bool = False) -> None:
        """Record how many were refused, for `flash status`, now and then.

        A standby, and a role that may not write the record, have only the metrics.
        """
        now = self._clock()
        is_due = at_once or now - self._recorded_at >= _RECORD_SECONDS
        if self._unrecorded is None or not is_due:
            return
        self._recorded_at = now
        if not source.settings.flash_manage or is_standby(source.connection):
            return
        try:
            refusals.add(source, self._unrecorded)
        except CatalogError as error:
            logger.info("Cannot record how many messages with tasks were refused: %s", error)
        else:
            self._unrecorded = None


def _letter(text: str, transaction: Transaction) -> letters.DeadLetter:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return letters.DeadLetter(
        id=str(uuid.uuid4()),
        handler=PREFIX,
        queue="",
        priority=None,
        error=TaskRefused.__name__,
        message=text,
        traceback="",
        failed_at=now,
        first_failed_at=now,
        started_at=None,
        retries=0,
        deaths=0,
        worker="",
        tables=[PREFIX],
        changes=[],
        count=0,
        commit_lsn=str(transaction.commit_lsn),
        committed_at=timestamps.to_datetime(transaction.committed_at).isoformat(),
        argsrepr="",
        headers={},
        body="",
        binary=False,
        content_type="application/json",
        content_encoding="utf-8",
    )
