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

#: Alarms that may be kept although they are cancelled.
_FEW = 100


class Alarm:
    """A call that is due at a time, unless it is cancelled before."""

    def __init__(self, function: Callable[[], Any]) -> None:
        #: None once it is cancelled, so that what belongs to the call is freed before it is due.
        self._function: Callable[[], Any] | None = function
        self._lock = threading.Lock()

    @property
    def is_cancelled(self) -> bool:
        """Whether it will never ring."""
        return self._function is None

    def cancel(self) -> None:
        """Prevent the call; wait until it has ended if it is under way."""
        with self._lock:
            self._function = None

    def ring(self) -> None:
        """Make the call, unless it was cancelled."""
        with self._lock:
            if self._function is not None:
                self._function()


class _Alarms(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="flash-lanes", daemon=True)
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Alarm]] = []
        self._numbers = count()
        #: Beyond so many, those that are cancelled are removed.
        self._most = _FEW

    def call_at(self, moment: float, function: Callable[[], Any]) -> Alarm:
        alarm = Alarm(function)
        with self._changed:
            if len(self._due) >= self._most:
                self._remove_cancelled()
            heapq.heappush(self._due, (moment, next(self._numbers), alarm))
            if self._due[0][2] is alarm:  # else the thread sleeps on: each call has an alarm
                self._changed.notify()
        return alarm

    def _remove_cancelled(self) -> None:
        """Remove the alarms that will never ring: nearly all, and some are due in hours."""
        left = [due for due in self._due if not due[2].is_cancelled]
        heapq.heapify(left)
        self._due, self._most = left, 2 * len(left) + _FEW

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
