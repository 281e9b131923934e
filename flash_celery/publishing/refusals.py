"""Tasks of transactions that the broker refuses, as for an exchange that does not exist.

They become dead letters, so that they hold up nothing. Messages for handlers do not: the worker has
declared their queues, so what refuses them passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import PublishError, Unroutable
from ..messages.sent_tasks import SentTask
from ..messages.task_message import Message

#: Seconds in which no other task is tried where one could not be routed. Each attempt costs a
#: connection, and there may be many tasks.
_SECONDS = 10.0
#: An exchange and a routing key; any if None.
_Place = tuple[str, str | None]


class Letters(Protocol):
    """Makes dead letters."""

    def refused(self, sent: SentTask, error: PublishError) -> Message:
        """Return the dead letter of a task that the broker refuses."""


class Refusals:
    """What the broker has refused.

    Args:
        clock: Returns the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: The task that was refused last.
        self._last: SentTask | None = None
        #: Until when nothing can be sent to a place, and why.
        self._unroutable: dict[_Place, tuple[float, PublishError]] = {}

    def replaced(
        self, messages: Sequence[Message], letters: Letters, error: PublishError | None = None
    ) -> Sequence[Message]:
        """Return the messages, with dead letters for tasks that the broker refuses.

        Args:
            messages: The messages that are not confirmed.
            letters: Makes dead letters.
            error: The error of the last attempt.
        """
        refused = self._refused(error, messages[0]) if error and messages else None
        now = self._clock()
        found = self._unroutable.items()
        self._unroutable = {place: noted for place, noted in found if noted[0] > now}
        if refused is None and not self._unroutable:
            return messages
        return [self._replaced(message, letters, refused, error) for message in messages]

    def _replaced(
        self,
        message: Message,
        letters: Letters,
        refused: Message | None,
        error: PublishError | None,
    ) -> Message:
        if not isinstance(message, SentTask):
            return message
        if message is not refused:
            places = (message.exchange, None), (message.exchange, message.routing_key)
            noted = [self._unroutable[place] for place in places if place in self._unroutable]
            error = noted[0][1] if noted else None
        if error is None:
            return message
        message.refused = True
        return letters.refused(message, error)

    def _refused(self, error: PublishError, first: Message) -> SentTask | None:
        """Return the first message, if it is refused for the second time.

        The first time its queue may have been deleted: the next attempt declares it again.
        """
        if not error.refused or not isinstance(first, SentTask):
            return None
        if first is not self._last:
            self._last = first
            return None
        if isinstance(error, Unroutable):
            # RabbitMQ returns a message that no queue is bound for, and closes the channel, which
            # is the cause, for an exchange that does not exist.
            place = first.exchange, None if error.__cause__ else first.routing_key
            self._unroutable[place] = self._clock() + _SECONDS, error
        return first
