"""Acknowledges the changes that a drain on RabbitMQ has handled.

They are acknowledged in groups, and always before a second change of one of their keys is handled.
An acknowledgement has no confirm, so RabbitMQ has to answer another request behind it then. That
is sent one change ahead, and its answer is read when it is needed, so that the handler rarely waits
for it.

So after a death or a lost connection only the last change of a key may come again. Quorum queues
answer before their leader has written it, so there the last few may come again, in order.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from amqp import spec

from ..messages.deduplication import now
from .amqp_link import Link

#: Changes, and seconds since the first of them, after which they are acknowledged.
_GROUP = 20
_GROUP_SECONDS = 0.05


class Acknowledgements:
    """The acknowledgements on one channel.

    Args:
        link: The connection.
        channel: The channel of the consumer.
        prefetch: How many messages RabbitMQ sends ahead on it.
    """

    def __init__(self, link: Link, channel: Any, prefetch: int) -> None:
        self._link = link
        self._channel = channel
        self._prefetch = prefetch
        #: The last message that is done, how many are not acknowledged, and since when.
        self._tag = self._count = 0
        self._since = 0.0
        #: The keys of changes whose acknowledgement RabbitMQ may not have.
        self._keys: set[int] = set()
        #: Those for which it has been asked that, and whether its answer is still to come.
        self._asked_keys: set[int] = set()
        self._asked = False

    def add(self, tag: int, count: int, keys: Set[int]) -> None:
        """Note that changes are done, and acknowledge them if they are enough.

        Args:
            tag: The tag of the last message.
            count: How many changes they are.
            keys: The hashes of their ordering keys.

        Raises:
            LostLink: The connection is lost.
        """
        if not self._count:
            self._since = now()
        self._tag, self._count = tag, self._count + count
        self._keys |= keys
        if self._count >= _GROUP or now() - self._since >= _GROUP_SECONDS:
            self.send()

    def send(self) -> None:
        """Acknowledge all changes that are done.

        Raises:
            LostLink: The connection is lost.
        """
        if self._count:
            with self._link.used():
                self._channel.basic_ack(self._tag, multiple=True)
            self._count = 0

    def confirm(self) -> None:
        """Acknowledge all changes that are done, and wait until RabbitMQ has read that.

        Raises:
            LostLink: The connection is lost.
        """
        self.send()
        if self._keys:
            self._ask()
        self._wait()

    def confirm_before(self, keys: Set[int]) -> None:
        """Wait until RabbitMQ has the acknowledgements of earlier changes of these keys.

        Raises:
            LostLink: The connection is lost.
        """
        if not keys.isdisjoint(self._keys):
            self.confirm()
        elif not keys.isdisjoint(self._asked_keys):
            self._wait()

    def prepare(self, keys: Set[int]) -> None:
        """Have `confirm_before` wait for less.

        Args:
            keys: The keys of a change that comes after another one.

        Raises:
            LostLink: The connection is lost.
        """
        if not keys.isdisjoint(self._keys):
            self.send()
            self._ask()

    def _ask(self) -> None:
        """Send a request that RabbitMQ answers when it has read what was sent before."""
        self._wait()
        with self._link.used():
            # `Channel.basic_qos` would wait for it.
            self._channel._pending[spec.Basic.QosOk] = self._on_answer
            self._channel.send_method(spec.Basic.Qos, "lBb", (0, self._prefetch, False))
        self._asked, self._asked_keys, self._keys = True, self._keys, set()

    def _on_answer(self, *_: object) -> None:
        self._asked = False

    def _wait(self) -> None:
        """Wait for the answer, if there was a request."""
        with self._link.used():
            while self._asked:
                self._channel.connection.drain_events()
        self._asked_keys = set()
