"""Ask the running Celery workers, as `celery inspect` does, and stop waiting when none can reply.

`celery inspect` waits for another second after the last reply, even if no worker runs. Here the
wait also ends when no worker listens, when each that listens has replied, and when no further reply
could change the answer.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

from kombu.messaging import Consumer, Producer

from ..publishing.brokers import redis_keys
from ..publishing.brokers.base import ConnectedPublisher

#: Seconds without a reply after which no more are expected.
_SILENCE_SECONDS = 1.0


class Inspection:
    """A question to all workers, which a thread asks while other work goes on."""

    def __init__(
        self,
        app: Any,
        command: str,
        enough: Callable[[dict[str, Any]], bool] = lambda replies: False,
    ) -> None:
        """Ask the workers.

        - `command`: a command of `celery inspect` without arguments.
        - `enough`: whether these replies settle the answer, whatever the other workers say.
        """
        self._app = app
        self._mailbox = app.control.mailbox
        self._command = command
        self._enough = enough
        self._replies: dict[str, Any] = {}
        #: Two workers may have the same name, so this is not the number of `_replies`.
        self._replied = 0
        #: How many workers listen; None if the broker does not tell.
        self._listening: int | None = None
        self._thread = threading.Thread(target=self._ask, name="flash-inspection", daemon=True)
        self._thread.start()

    def replies(self) -> dict[str, Any]:
        """Wait for the replies and return them, by the worker's name; {} if the broker fails."""
        self._thread.join()
        return self._replies

    def _ask(self) -> None:
        with suppress(Exception), closing(ConnectedPublisher(self._app)) as publisher:
            publisher.open([])
            if publisher.driver == "redis":
                exchange = self._mailbox.exchange.name
                self._listening = redis_keys.listeners(publisher.channel, exchange)
            if self._listening != 0:
                self._collect(publisher.channel, may_be_returned=publisher.driver == "amqp")

    def _collect(self, channel: Any, may_be_returned: bool) -> None:
        mailbox = self._mailbox
        queue = mailbox.get_reply_queue()
        # A later thread can get the same queue name from Celery, which RabbitMQ may refuse for a
        # moment; so the queue gets another name.
        queue.routing_key = str(uuid.uuid4())
        queue.name = f"{queue.routing_key}.{mailbox.reply_exchange.name}"
        consumer = Consumer(
            channel, [queue], accept=mailbox.accept, no_ack=True, callbacks=[self._on_reply]
        )
        try:
            with consumer:
                self._publish(channel, queue.routing_key, may_be_returned)
                while not self._is_complete():
                    channel.connection.client.drain_events(timeout=_SILENCE_SECONDS)
        finally:
            channel.after_reply_message_received(queue.name)

    def _publish(self, channel: Any, reply_to: str, may_be_returned: bool) -> None:
        mailbox = self._mailbox
        question = {
            "method": self._command,
            "arguments": {},
            "destination": None,  # all
            "ticket": reply_to,
            "reply_to": {"exchange": mailbox.reply_exchange.name, "routing_key": reply_to},
        }
        options = {}
        if may_be_returned:  # by RabbitMQ, if no worker has a queue for it
            channel.events["basic_return"].add(self._on_return)
            options["mandatory"] = True
        Producer(channel, auto_declare=False).publish(
            question,
            exchange=mailbox.exchange.name,
            declare=[mailbox.exchange],
            serializer=mailbox.serializer,
            **options,
        )

    def _on_reply(self, body: dict[str, Any], message: Any) -> None:
        self._replied += 1
        self._replies.update(body)

    def _on_return(self, *_: Any) -> None:
        self._listening = 0

    def _is_complete(self) -> bool:
        if self._listening is not None and self._replied >= self._listening:
            return True
        return bool(self._replies) and self._enough(self._replies)
