"""The time limits of one call of a handler, in a child process of prefork.

Celery's own limits are for a message; a wake has none, because it handles many changes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded

from ..messages.deduplication import now
from .alarms import call_at


@contextmanager
def time_limits(soft: float | None, hard: float | None, late: Callable[[], Any]) -> Iterator[None]:
    """Raise `SoftTimeLimitExceeded` in the block after `soft` seconds; call `late` after `hard`."""
    if not soft and not hard:
        yield
        return
    began = now()
    alarms = []
    if soft:
        # billiard's handler of this signal raises the exception in the main thread.
        alarms.append(call_at(began + soft, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    if hard:
        alarms.append(call_at(began + hard, late))
    try:
        yield
    finally:
        # The signal may have been sent just before.
        with suppress(SoftTimeLimitExceeded):
            for alarm in alarms:
                alarm.cancel()
