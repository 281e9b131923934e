"""Messages that carry tasks and are not signed: counted, logged, and shown as dead letters.

Every role of the database can write any number of them, so neither the log nor the dead-letter
queue grows with them, and neither has anything of their content.
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
from ..errors import TaskRefused
from ..messages.task_message import Message
from ..protocol import timestamps
from ..protocol.pgoutput import LogicalMessage
from ..telemetry import Telemetry
from ..transactional_tasks.signing import PREFIX
from . import letters

logger = logging.getLogger(__name__)

#: Seconds between two lines of the log, and between two dead letters.
_SECONDS = 60.0


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
        self._reported_at = float("-inf")
        self._count = 0

    def refuse(
        self, message: LogicalMessage, transaction: Transaction, reason: str
    ) -> Message | None:
        """Count a message; return a dead letter that reports it, once a minute."""
        self._count += 1
        self._telemetry.refused_tasks += 1
        now = self._clock()
        if now - self._reported_at < _SECONDS:
            return None
        count, self._count, self._reported_at = self._count, 0, now
        text = (
            f"{count} {'message' if count == 1 else 'messages'} with the prefix {PREFIX} refused, "
            f"the last at {message.lsn} with {len(message.content)} bytes: {reason}"
        )
        logger.error("%s. %s", text, TaskRefused.solution, extra={"lsn": str(message.lsn)})
        digest = hashlib.sha256(message.content).hexdigest()
        committed = timestamps.to_unix(transaction.committed_at)
        letter = _letter(f"{text}; SHA-256 {digest}", str(transaction.commit_lsn), committed)
        return letters.encode(self._app, letter, self._queue)


def _letter(text: str, commit_lsn: str, committed: float) -> letters.DeadLetter:
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
        commit_lsn=commit_lsn,
        committed_at=datetime.fromtimestamp(committed, timezone.utc).isoformat(),
        argsrepr="",
        headers={},
        body="",
        binary=False,
        content_type="application/json",
        content_encoding="utf-8",
    )
