"""RabbitMQ: publisher confirms with many messages under way, mandatory and persistent.

Source: RabbitMQ documentation, "Consumer Acknowledgements and Publisher Confirms".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import NotConfirmed, PublishError, Unroutable
from ..messages import Message
from .base import TIMEOUT, ConnectedPublisher

#: Messages that may be unconfirmed at a time.
_WINDOW = 1000


class AmqpPublisher(ConnectedPublisher):
    """Publishes through the default exchange on a channel of its own."""

    # We wait for confirms ourselves; kombu would wait for each one.
    transport_options = {"read_timeout": TIMEOUT, "write_timeout": TIMEOUT}

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._window = _WINDOW

    def open(self, queues: Sequence[Any]) -> None:
        """Connect, declare the queues and ask for confirms. Raises `PublishError`."""
        super().open(queues)
        self._sent = 0
        self._pending: set[int] = set()
        self._trouble: NotConfirmed | Unroutable | None = None
        events = self._channel.events
        events["basic_ack"].add(self._on_ack)
        events["basic_nack"].add(self._on_nack)
        events["basic_return"].add(self._on_return)
        with self.errors():
            self._channel.confirm_select()

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish them and wait for every confirm. Raises `NotConfirmed` or `Unroutable`."""
        first = self._sent + 1
        try:
            with self.errors():
                for message in messages:
                    self._send(message)
                    if len(self._pending) >= self._window:
                        self._wait(self._window // 2)
                self._wait(0)
        except PublishError as error:
            # Nothing may overtake a message that was refused: one at a time until it is taken.
            self._window = 1
            error.confirmed = min(self._pending, default=self._sent + 1) - first
            raise
        self._window = _WINDOW

    def _send(self, message: Message) -> None:
        prepared = self.prepared(message)
        self._sent += 1
        self._pending.add(self._sent)
        # Not basic_publish: with the option confirm_publish that waits for each message.
        self._channel._basic_publish(
            prepared, exchange="", routing_key=message.queue, mandatory=True
        )

    def _wait(self, left: int) -> None:
        while len(self._pending) > left and self._trouble is None:
            try:
                self._connection.drain_events(timeout=TIMEOUT)
            except TimeoutError:
                raise NotConfirmed(
                    f"The broker confirmed none of {len(self._pending)} messages for {TIMEOUT:g} s."
                ) from None
        if self._trouble is not None:
            raise self._trouble

    def _on_ack(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._pending = {pending for pending in self._pending if pending > tag}
        else:
            self._pending.discard(tag)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._trouble = NotConfirmed(f"The broker refused message {tag}: its queue has no room.")

    def _on_return(self, error: Any, exchange: str, queue: str, message: Any) -> None:
        # The message is confirmed nevertheless, after this.
        self._trouble = Unroutable(f"The broker has no queue {queue}.")
