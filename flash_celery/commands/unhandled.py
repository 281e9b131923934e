"""Find out whether a replay has something for a handler with `once=` to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

from ..capture.router import Receiver
from ..changes.change import Operation
from ..changes.deliveries import Delivery
from ..changes.payload import changes_of
from ..errors import ConfigurationError
from ..escaping import escaped
from ..handlers.subscriptions import Subscription
from ..lanes.marks import Position, read_positions
from ..messages.lane_messages import LaneForm, LaneGroup
from ..messages.templates import Templates

logger = logging.getLogger(__name__)


class Unhandled:
    """The sink that compares changes with the marks of their lanes.

    Args:
        templates: The templates of the handlers.
        positions: The positions of the marks, by lane.
    """

    def __init__(self, templates: Templates, positions: Mapping[int, Position]) -> None:
        self._templates = templates
        self._positions = positions
        #: Whether a change was not handled.
        self.found = False

    @classmethod
    def of(
        cls, templates: Templates, subscriptions: Sequence[Subscription], handler: str
    ) -> Unhandled | None:
        """Return the sink for a handler; None if marks cannot be asked."""
        own = [each for each in subscriptions if each.handler == handler]
        forms: list[LaneForm] = [form for form in templates.lanes if form.handler == handler]
        database = own[0].once if own else None
        if database is None or not forms:
            return None
        try:
            with database.transaction() as session:
                return cls(templates, read_positions(session.execute, forms[0]))
        except Exception as error:  # a function of the application; its text may hold a password
            logger.warning(
                "%s: what once= would skip is not known, because its database cannot be read from "
                "here (%s)",
                escaped(handler),
                type(error).__name__,
            )
            return None

    def receiver(self, subscription: Subscription, operation: Operation) -> Receiver:
        """Return what compares the changes of a delivery."""
        return partial(self._compare, self._templates[subscription, operation].group())

    def _compare(self, group: LaneGroup, delivery: Delivery) -> None:
        if self.found:
            return
        for lane, change in zip(group.lanes_of(delivery), changes_of(delivery), strict=True):
            if not self._positions[lane].covers(change):
                self.found = True
                return

    def require_some(self, handler: str) -> None:
        """Raise `ConfigurationError` if all changes were handled."""
        if not self.found:
            raise ConfigurationError(
                f"{handler} has handled all of these changes, and once= would skip them; add "
                "--again to have them handled again."
            )
