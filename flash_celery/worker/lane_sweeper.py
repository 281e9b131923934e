"""Wakes lanes whose time has come, once a second: retries that are due, leases that have run out.

Celery workers do it too, but only they know when a broker has one that runs; this process does it
also while it waits for its slot.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from ..messages.lane_messages import LaneForm
from ..publishing.brokers.amqp_lanes import address

logger = logging.getLogger(__name__)

_SECONDS = 1.0


class LaneSweeper(threading.Thread):
    """Sweeps the lanes on an app's broker, which must have lanes, until `end`."""

    def __init__(self, app: Any) -> None:
        super().__init__(name="flash-lane-sweeper", daemon=True)
        self._app = app
        self._ended = threading.Event()

    def watch(self, lanes: Sequence[LaneForm]) -> None:
        """Look at these lanes, on a broker that cannot list them."""
        from ..lanes import amqp_sweep

        amqp_sweep.watch(
            self._app, (address(form, lane) for form in lanes for lane in range(form.lanes))
        )

    def run(self) -> None:
        """Sweep until `end`."""
        from ..lanes.wake import sweep

        last_logged = ""
        while not self._ended.wait(_SECONDS):
            try:
                sweep(self._app)
            except Exception as error:  # of a client library, for example
                if repr(error) != last_logged:
                    last_logged = repr(error)
                    logger.exception("Lanes cannot be woken, and this is tried again")

    def end(self) -> None:
        """Stop; never blocks."""
        self._ended.set()
