"""Wakes lanes whose time has come, once a second: retries that are due, leases that have run out.

Celery workers do it too, but only they know when a broker has one that runs; this process does it
also while it waits for its slot.
"""

from __future__ import annotations

import threading
from typing import Any

_SECONDS = 1.0


class LaneSweeper(threading.Thread):
    """Sweeps the lanes on an app's broker, which must have lanes, until `end`."""

    def __init__(self, app: Any) -> None:
        super().__init__(name="flash-lane-sweeper", daemon=True)
        self._app = app
        self._ended = threading.Event()

    def run(self) -> None:
        """Sweep until `end`."""
        from ..lanes.wake import sweep

        while not self._ended.wait(_SECONDS):
            sweep(self._app)

    def end(self) -> None:
        """Stop; never blocks."""
        self._ended.set()
