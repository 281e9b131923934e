"""An outage of the broker: how long it lasts, and what the log reports of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import PublishError
from ..messages.lane_messages import LaneMessage
from ..messages.task_message import Message
from ..telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds between two log messages about one outage.
_REMINDER_SECONDS = 60.0


class Outage:
    """The state of the broker: an outage lasts from the first error to the first success."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        #: When the outage began and when it was logged last, by the monotonic clock; 0 for none.
        self._began_at = self._logged_at = 0.0

    def record(self, error: PublishError, unconfirmed: Sequence[Message]) -> None:
        """Record a failure, and log it now and then, with the messages that wait."""
        now = time.monotonic()
        self._began_at = self._began_at or now
        telemetry = self._telemetry
        telemetry.broker_failing = telemetry.broker_failing or time.time()
        telemetry.failures[type(error).__name__] += 1
        telemetry.record_error(error)
        if not self._logged_at or now - self._logged_at > _REMINDER_SECONDS:
            self._logged_at = now
            logger.warning(
                "%s Nothing is acknowledged until it works again (%.0f s so far, %s)",
                error,
                now - self._began_at,
                _described(unconfirmed),
            )

    @contextmanager
    def warn_if_slow(self, seconds: float) -> Iterator[None]:
        """Warn if the block takes longer than `seconds`, unless an outage was logged."""
        text = f"The broker has not answered for {seconds:g} s; waiting for it"
        timer = threading.Timer(seconds, logger.warning, [text])
        timer.daemon = True
        if not self._began_at:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def over(self) -> None:
        """Record that the broker works."""
        if self._began_at:
            self._began_at = self._logged_at = 0.0
            self._telemetry.broker_failing = None
            logger.warning("The broker confirms messages again")


def _described(messages: Sequence[Message]) -> str:
    if not messages:
        return "no message waits for it yet"
    size = sum(message.size for message in messages)
    lanes = "the lanes of " if isinstance(messages[0], LaneMessage) else ""
    first = messages[0].argsrepr or f"{lanes}{messages[0].task}"
    return f"{len(messages)} messages of {size} bytes, the first for {first}"
