"""What the lanes of ordered handlers can do on each kind of broker."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..changes.operations import Operation
from ..errors import SubscriptionError
from ..handlers.subscriptions import Subscription


@dataclass(frozen=True)
class LaneTransport:
    """A kind of broker that has lanes."""

    #: How many lanes a handler has unless it or `flash_lanes` names a number.
    lanes: int
    #: The most changes of one entry of a lane.
    entry_changes: int
    #: Whether a change can wait for several lanes.
    has_barriers: bool
    #: The most bytes of a handler's name.
    longest_name: int

    def check(self, handler: str, subscriptions: Sequence[Subscription]) -> None:
        """Refuse a handler that needs what the lanes of this broker cannot do.

        Raises:
            SubscriptionError: It handles TRUNCATEs or messages, blocks its lanes, has once= with
                coalesce=, or a name that is too long.
        """
        if len(handler.encode()) > self.longest_name:
            raise SubscriptionError(
                f"The name {handler} is too long for the queues of its lanes on RabbitMQ; give the "
                f"task a name= of {self.longest_name} bytes at most."
            )
        if self.has_barriers:
            return
        for each in subscriptions:
            if each.ordered is not None and each.ordered.on_failure == "block":
                raise SubscriptionError(
                    f"{handler} has Ordered(on_failure='block'), which needs Redis or Valkey as "
                    "the broker; on RabbitMQ a change that fails for good becomes a dead letter: "
                    "leave on_failure out."
                )
            if each.once is not None and each.ordered is not None and each.ordered.coalesce:
                raise SubscriptionError(
                    f"{handler} has once= and coalesce=, which needs Redis or Valkey as the "
                    "broker; RabbitMQ may get changes twice, and then others may have become one: "
                    "leave one of the two out."
                )
            if each.ends_of is not None:
                raise SubscriptionError(
                    f"{handler} has ordered= and on_backfill_end, which needs Redis or Valkey as "
                    "the broker; on RabbitMQ give the end to a task of its own: "
                    f"on_backfill_end({each.ends_of!r})."
                )
            if Operation.MESSAGE in each.operations:
                raise SubscriptionError(
                    f"{handler} has ordered= and {each.decorator}, which needs Redis or Valkey as "
                    "the broker; on RabbitMQ handle messages with a task of its own."
                )
            if Operation.TRUNCATE in each.operations:
                raise SubscriptionError(
                    f"{handler} has ordered= and handles TRUNCATEs, which needs Redis or Valkey as "
                    "the broker; on RabbitMQ leave them out: on_change("
                    f"'{each.subject}', 'insert|update|delete', ordered=…)."
                )


REDIS = LaneTransport(lanes=256, entry_changes=100, has_barriers=True, longest_name=1 << 20)
#: A change is a message, so that it can be acknowledged by itself. The name of a queue has 255
#: bytes at most, among them the server, the slot (63) and the number of the lane.
RABBITMQ = LaneTransport(lanes=16, entry_changes=1, has_barriers=False, longest_name=140)


def of(app: Any) -> LaneTransport:
    """Return the lanes of an app's broker; those of Redis for a broker that has none."""
    with suppress(Exception):  # a URL that is none is refused where it is used
        if app.connection_for_write().transport_cls in _AMQP:
            return RABBITMQ
    return REDIS


#: The names that kombu has for py-amqp, by which brokers are named in URLs.
_AMQP = {"amqp", "amqps", "pyamqp"}
