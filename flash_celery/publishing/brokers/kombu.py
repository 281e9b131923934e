"""All other transports of kombu: one message at a time, through its producer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kombu.messaging import Producer

from ...messages.sent_tasks import SentTask
from ...messages.task_message import Message
from .base import ConnectedPublisher


class KombuPublisher(ConnectedPublisher):
    """Publishes with kombu. A message counts as confirmed once the transport's publish returns."""

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages one after another.

        Raises:
            PublishError: The broker has not confirmed a message.
            Unroutable: No queue is bound to the exchange of a task.
        """
        self.confirmed = 0
        with self.errors():
            self._declare(messages)
            producer = Producer(self._channel, auto_declare=False)
            for message in messages:
                if message.exchange and not self._reaches_a_queue(message):
                    raise self.unroutable(message)
                self._publish(producer, message)
                self.confirmed += 1

    def _publish(self, producer: Producer, message: Message) -> None:
        try:
            producer.publish(
                message.body,
                routing_key=message.routing_key,
                exchange=message.exchange,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                headers=dict(message.headers),
                **message.properties,
            )
        except Exception as error:  # of any type: an application has chosen the values
            if self._is_of_broker(error) or not isinstance(message, SentTask):
                raise
            raise self.unsendable(message, error) from error

    def _reaches_a_queue(self, message: Message) -> bool:
        """Return False if kombu, which emulates exchanges, would drop a message."""
        if not self._is_virtual:
            return True
        return bool(self._channel._lookup(message.exchange, message.routing_key))

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move the oldest message.

        Raises:
            PublishError: The broker has not confirmed a message.
        """
        with self.errors():
            message = self._channel.basic_get(queue, no_ack=False)
            if message is None:
                return False
            messages = [restored(message)]
            if admit(messages):
                self.publish(messages)
                self._channel.basic_ack(message.delivery_tag)
            else:
                self._channel.basic_reject(message.delivery_tag, requeue=True)
        return True
