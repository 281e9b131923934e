"""A thread that calls functions at a given time: it renews leases, and enforces time limits."""

from __future__ import annotations

import heapq
import logging
import os
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

from ..messages.deduplication import now

logger = logging.getLogger(__name__)


class Alarm:
    """A call that is due at a time, unless it is cancelled before."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """Prevent the call; wait until it has ended if it is under way."""
        with self._lock:
            self._cancelled = True

    def ring(self) -> None:
        """Make the call, unless it was cancelled."""
        with self._lock:
            if not self._cancelled:
                self._function()


class _Alarms(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="flash-lanes", daemon=True)
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Alarm]] = []
        self._numbers = count()

    def call_at(self, moment: float, function: Callable[[], Any]) -> Alarm:
        alarm = Alarm(function)
        with self._changed:
            heapq.heappush(self._due, (moment, next(self._numbers), alarm))
            self._changed.notify()
        return alarm

    def run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > now():
                    self._changed.wait(self._due[0][0] - now() if self._due else None)
                alarm = heapq.heappop(self._due)[2]
            try:
                alarm.ring()
            except Exception:
                logger.exception("A lease of a lane could not be renewed, or a limit not enforced")


_alarms: tuple[int, _Alarms] | None = None


def call_at(moment: float, function: Callable[[], Any]) -> Alarm:
    """Call a function at a moment of `deduplication.now`, on the thread of this process."""
    global _alarms
    if _alarms is None or _alarms[0] != os.getpid():
        _alarms = os.getpid(), _Alarms()
        _alarms[1].start()
    return _alarms[1].call_at(moment, function)
