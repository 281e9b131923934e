"""A connection to RabbitMQ for one drain at a time, which another thread keeps alive.

RabbitMQ gives a lane to another drain once it counts this connection as dead. So no change is begun
unless RabbitMQ has answered lately: see `Link.verify`.

py-amqp is not made for several threads. Everything that uses the connection holds its lock.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from amqp import spec

from ..dead_letters.failed_tasks import setting
from ..errors import PublishError
from ..messages.deduplication import now
from ..messages.lane_messages import REGISTRY
from ..messages.task_message import Message
from ..publishing.brokers.amqp import AmqpPublisher
from ..publishing.brokers.amqp_lanes import Depth, look, paused_queue, peek, recorded
from ..publishing.brokers.amqp_wakes import Wakes
from .alarms import call_at

#: Seconds without an answer after which the broker counts as unreachable.
_TIMEOUT = 10.0
#: RabbitMQ closes a connection from which it has read nothing in two of its intervals, and in three
#: at most. So the lease of a lane has three.
_INTERVALS = 3
_CERTAIN_INTERVALS = 2
#: How often it is asked in one interval.
_PINGS = 2
#: The longest delay of a wake; the sweep wakes a lane that waits longer.
_MOST_MILLISECONDS = 20 * 86_400_000
#: RabbitMQ deletes the queue of a delayed wake so long after that.
_UNUSED_MILLISECONDS = 60_000
#: In this part of an interval, before the connection ceases to be certain, no change is begun.
_MARGIN_PART = 2


class LostLink(Exception):
    """The connection is lost, and with it the lane; RabbitMQ gives it to another drain."""


class Link:
    """A connection, with a channel to look at lanes and to publish.

    Args:
        app: The Celery app.

    Raises:
        PublishError: The broker cannot be reached.
    """

    def __init__(self, app: Any) -> None:
        lease = float(setting(app, "flash_lane_lease"))
        self._publisher = AmqpPublisher(app, _TIMEOUT)
        # Waiting processes would handle nothing, so the broker would remain full. The sweep wakes
        # the lanes when it takes messages again.
        self._publisher.waits_while_blocked = False
        self._publisher.heartbeat = max(1, int(lease / _INTERVALS))
        self._lock = threading.RLock()
        try:
            self._publisher.open([])
        except BaseException:
            self._publisher.close()
            raise
        connection = self._publisher.channel.connection
        #: Seconds of the interval that RabbitMQ has agreed to.
        self._interval = float(connection.heartbeat or self._publisher.heartbeat)
        self._looks = connection.channel()
        #: Whether it can be used.
        self.works = True
        #: Until when RabbitMQ certainly keeps it, by `now`.
        self._until = float("-inf")
        self.wakes = Wakes(app)
        self.ping()
        self._schedule()

    def verify(self) -> None:
        """Return if RabbitMQ keeps this connection, so that a change may be begun.

        Raises:
            LostLink: The connection is lost.
        """
        connection = self._publisher.channel.connection
        with self.used():
            with suppress(TimeoutError), connection.transport.having_timeout(0.0):
                while True:  # a close is behind the messages that were sent before
                    connection.blocking_read(0.0)
            if now() >= self._until - self._interval / _MARGIN_PART:
                self.ping()

    def ping(self) -> None:
        """Wait for an answer of RabbitMQ.

        Raises:
            LostLink: It gives none.
        """
        with self.used():
            moment = now()
            self._publisher.check()
            self._until = moment + self._interval * _CERTAIN_INTERVALS

    def look(self, queue: str) -> Depth | None:
        """Return what waits in a queue; None if it does not exist.

        Raises:
            LostLink: The connection is lost.
        """
        with self.used():
            return look(self._looks, queue)

    def peek(self, queue: str) -> Any:
        """Return the message of a queue that has one at most; None if it is empty.

        Raises:
            LostLink: The connection is lost.
        """
        with self.used():
            return peek(self._looks, queue)

    def is_paused(self, lane: str) -> bool:
        """Return whether the handler of a lane is paused."""
        depth = self.look(paused_queue(lane.rpartition(".")[0]))
        return depth is not None and depth.ready > 0

    def former_layout(self, lane: str) -> str:
        """Return the layout before that of a lane, whose lanes were empty; "" if it is unknown."""
        with suppress(LostLink), self.used() as channel:
            return str(recorded(channel, lane.rpartition(".")[0]).get("former") or "")
        return ""

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages, and wait for the confirms.

        Raises:
            LostLink: The connection is lost, or the broker has refused one.
        """
        with self.used():
            self._publisher.publish(messages)

    def publish_later(self, wake: Message, seconds: float) -> None:
        """Publish a wake after some seconds, by a queue of its own that dead-letters it.

        Raises:
            LostLink: The connection is lost.
        """
        milliseconds = min(max(int(seconds * 1000), 1), _MOST_MILLISECONDS)
        name = f"{REGISTRY}.later.{uuid.uuid4()}"
        arguments = {
            "x-queue-type": "classic",
            "x-message-ttl": milliseconds,
            "x-expires": milliseconds + _UNUSED_MILLISECONDS,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": wake.queue,
        }
        with self.used() as channel:
            channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
        self.publish([Message(replace(wake.form, queue=name), wake.id, wake.argsrepr, wake.body)])

    def consume(self, queue: str, prefetch: int, receive: Callable[[Any], object]) -> Any:
        """Return a new channel, whose messages of a queue are passed to a function.

        Raises:
            LostLink: The connection is lost.
        """
        with self.used():
            channel = self._publisher.channel.connection.channel()
            channel.basic_qos(0, prefetch, False)
            channel.basic_consume(queue, callback=receive, on_cancel=self._on_cancel)
            return channel

    def close_channel(self, channel: Any) -> None:
        """Close a channel of `consume`: RabbitMQ puts back what is not acknowledged, in its place.

        `Channel.close` of py-amqp does the same, and warns of each message that comes until then.

        Raises:
            LostLink: The connection is lost.
        """
        with self.used():
            close = spec.Channel
            channel.send_method(close.Close, "BsBB", (0, "", 0, 0), wait=close.CloseOk)

    def read(self, timeout: float) -> bool:
        """Wait for an event of the connection; return whether there was one.

        Raises:
            LostLink: The connection is lost.
        """
        with self.used():
            try:
                self._publisher.channel.connection.drain_events(timeout=timeout)
            except TimeoutError:
                return False
            return True

    @contextmanager
    def used(self) -> Iterator[Any]:
        """Hold the lock, and yield the channel for looks.

        Raises:
            LostLink: The connection is lost.
        """
        with self._lock:
            if not self.works:
                raise LostLink("The connection to RabbitMQ is lost")
            try:
                with self._publisher.errors():
                    yield self._looks
            except PublishError as error:
                # Also after an error of a channel: py-amqp opens it again, without its consumer.
                self.works = False
                raise LostLink(str(error)) from error
            except BaseException:
                self.works = False  # an answer may still be on its way
                raise

    def close(self) -> None:
        """Disconnect; never raises."""
        with self._lock:
            channel = self._publisher.channel
            if not self.works and channel is not None and channel.connection is not None:
                # RabbitMQ does not answer a request to close while it is full.
                channel.connection.collect()
            self.works = False
            self._publisher.close()

    def _on_cancel(self, consumer: str) -> None:
        """Note that RabbitMQ has ended a consumer, as when its queue is deleted."""
        self.works = False

    def _schedule(self) -> None:
        call_at(now() + self._interval / _PINGS, self._keep_alive)

    def _keep_alive(self) -> None:
        if not self.works:
            return
        try:
            self.ping()
        except LostLink:
            return  # the drain notices it before the next change
        self._schedule()


_lock = threading.Lock()
#: Connections that no drain uses, by process and app.
_idle: dict[tuple[int, Any], list[Link]] = {}


@contextmanager
def borrowed(app: Any) -> Iterator[Link]:
    """Yield a connection of this process that nothing else uses. It is kept if it still works.

    Raises:
        PublishError: The broker cannot be reached.
    """
    key = os.getpid(), app
    with _lock:
        idle = _idle.setdefault(key, [])
        while idle and not idle[-1].works:
            idle.pop().close()
        link = idle.pop() if idle else None
    link = link or Link(app)
    try:
        yield link
    except BaseException:
        link.close()
        raise
    if link.works:
        with _lock:
            idle.append(link)
    else:
        link.close()


os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))
