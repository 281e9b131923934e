"""An outage of the broker: since when, and what is said of it now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import PublishError
from ..messages.templates import Message
from ..telemetry import Telemetry

logger = logging.getLogger(__name__)

#: Seconds between two complaints about the same trouble.
_REMINDER_SECONDS = 60.0


class Outage:
    """From the first error to the first call that works."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        #: Since when it lasts, and when that was said last; 0 if there is none.
        self._since = self._said = 0.0

    def goes_on(self, error: PublishError, waiting: Sequence[Message]) -> None:
        """It failed once more, with these messages."""
        now = time.monotonic()
        self._since = self._since or now
        telemetry = self._telemetry
        telemetry.broker_failing = telemetry.broker_failing or time.time()
        telemetry.failures[type(error).__name__] += 1
        telemetry.note(error)
        if not self._said or now - self._said > _REMINDER_SECONDS:
            self._said = now
            logger.warning(
                "%s Nothing is acknowledged until it works again (%.0f s so far, %s)",
                *(error, now - self._since, _described(waiting)),
            )

    @contextmanager
    def announced(self, seconds: float) -> Iterator[None]:
        """Say so if this takes longer, and nothing has failed that is said already."""
        said = (f"The broker has not answered for {seconds:g} s; waiting for it",)
        timer = threading.Timer(seconds, logger.warning, said)
        timer.daemon = True
        if not self._since:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def over(self) -> None:
        """It works."""
        if self._since:
            self._since = self._said = 0.0
            self._telemetry.broker_failing = None
            logger.warning("The broker confirms messages again")


def _described(messages: Sequence[Message]) -> str:
    if not messages:
        return "nothing waits for it yet"
    size = sum(len(message.body) for message in messages)
    return f"{len(messages)} messages of {size} bytes, the first for {messages[0].argsrepr}"
