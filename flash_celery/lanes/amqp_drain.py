"""A drain of a lane on RabbitMQ: one consumer of its queue, for at most the budget.

RabbitMQ lets one consumer of a lane's queue be active at a time, and puts back what a closed
channel had, in its place. Four rules make order of that:

- A drain looks before it consumes: if the lane has a consumer, that one looks again when it ends.
- It handles the changes in order, and acknowledges them. It never cancels its consumer, and never
  rejects a change: RabbitMQ would activate the next consumer while this one still has changes, or
  put changes behind newer ones.
- It ends by closing its channel. Then it looks until no consumer is left, and wakes the lane if
  changes wait.
- It begins no change unless RabbitMQ has answered lately. See `amqp_link`.

A message in a queue cannot be altered. So how often the first change was retried, how many
processes have died on it, and until when it waits, is in a message of another queue: `Memory`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..changes.change import Change
from ..errors import PayloadError
from ..messages import lane_entries
from ..messages.deduplication import now
from ..messages.lane_entries import Entry
from ..publishing.brokers.amqp_lanes import LANES, LAYOUT, Depth, head_queue, note, number_of
from ..publishing.brokers.amqp_wakes import Lane
from .amqp_acknowledgements import Acknowledgements
from .amqp_link import Link, LostLink
from .drain import Calls, Head, Later, Limits, Verdict

logger = logging.getLogger(__name__)

#: Messages that RabbitMQ sends ahead.
_PREFETCH = 50
#: Seconds that a drain waits for messages that it has seen in the queue. They do not come if
#: another drain was faster.
_DELIVERY_SECONDS = 1.0
#: Seconds of a countdown for which a drain waits itself; it costs a process of the worker.
_WAIT_SECONDS = 5.0
#: Seconds between two looks at the clock, in such a wait.
_SLICE_SECONDS = 0.1
#: Seconds until the consumers of closed channels are gone, which takes 0.1 s at most.
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Memory:
    """The past of the first change of a lane.

    Attributes:
        id: The `change.id`.
        retries: How often it was retried.
        deaths: How many processes have died on it.
        until: Until when it waits, in seconds since 1970.
    """

    id: str
    retries: int = 0
    deaths: int = 0
    until: float = 0.0


@dataclass(frozen=True)
class _Received:
    """A change that RabbitMQ has sent."""

    change: Change
    #: The hashes of its ordering keys.
    keys: frozenset[int]
    expires: float | None
    again: bool
    tag: int
    redelivered: bool

    def is_like(self, other: _Received) -> bool:
        """Return whether both may be handled by one call."""
        return (self.expires, self.again) == (other.expires, other.again)


class AmqpDrain:
    """Handles the changes of one lane until it is empty, the budget is used up or one must wait.

    Args:
        link: A connection that nothing else uses.
        lane: The lane.
        calls: Calls the handler.
        limits: When it ends although more changes wait.
        stopping: Whether the worker is being stopped.
        died: Whether the process of an earlier drain may have died on the first change.
    """

    def __init__(
        self,
        link: Link,
        lane: Lane,
        calls: Calls,
        limits: Limits,
        stopping: Callable[[], bool] = lambda: False,
        died: bool = False,
    ) -> None:
        self._link = link
        self._lane = lane
        self._calls = calls
        self._limits = limits
        self._stopping = stopping
        self._died = died
        self._channel: Any = None
        self._done: Acknowledgements
        #: Messages that are not taken yet, and how many have not come yet.
        self._buffer: deque[Any] = deque()
        self._outstanding = 0
        #: The changes of the first message in the buffer, if it is read already.
        self._ahead: list[_Received] | None = None
        #: The tag of the last message of the current call.
        self._tag = 0
        #: What the lane's memory has.
        self._memory = Memory("")
        #: Changes that were handled.
        self.handled = 0

    def run(self) -> None:
        """Drain the lane, unless another drain has it.

        Raises:
            LostLink: The connection is lost. RabbitMQ gives the lane to another drain.
        """
        if self._link.is_paused(self._lane.name):
            return
        depth = self._depth_without_consumers() if self._died else self._depth()
        if depth is None or depth.consumers or not depth.ready:
            return
        self._outstanding = depth.ready
        prefetch = max(_PREFETCH, self._calls.size)
        self._channel = self._link.consume(self._lane.name, prefetch, self._receive)
        self._done = Acknowledgements(self._link, self._channel, prefetch)
        try:
            goes_on = self._handle_all()
        finally:
            with suppress(LostLink):
                self._close()
        if goes_on:
            self._look_after()

    def end_with(self, verdict: Verdict, changes: int) -> None:
        """Give the lane back while the handler is in a call that will not return.

        Args:
            verdict: The result of the call.
            changes: Their number.
        """
        with suppress(LostLink):
            if verdict is None:
                self._forget()
                self._done.add(self._tag, changes, set())
            self._close()

    def _receive(self, message: Any) -> None:
        self._buffer.append(message)
        self._outstanding -= 1

    def _handle_all(self) -> bool:
        """Handle changes; return whether the lane goes on at once if more wait."""
        began, first = now(), True
        while self._fill():
            try:
                received = self._take()
            except PayloadError as error:
                # Most likely a newer replication worker wrote it. Nothing behind it may pass.
                logger.error("The lane %s waits: %s %s", self._lane.name, error, error.solution)
                return False
            if first:
                self._recall(received[0])
                first = False
            if not self._handle(received):
                return False
            self.handled += len(received)
            if now() - began >= self._limits.budget or self.handled >= self._limits.changes:
                return True
            if self._stopping():
                return True
        return True

    def _fill(self) -> bool:
        """Read until a call has its changes, or no more come; return whether there are any."""
        deadline = now() + _DELIVERY_SECONDS
        while len(self._buffer) < self._calls.size:
            timeout = deadline - now() if self._outstanding > 0 else 0.0
            if timeout < 0 or not self._link.read(timeout):
                break
        return bool(self._buffer)

    def _take(self) -> list[_Received]:
        """Return the changes of the next call."""
        taken: list[_Received] = []
        while self._buffer and len(taken) < self._calls.size:
            try:
                received = self._first()
            except PayloadError:
                if taken:
                    break
                raise
            if taken and not received[0].is_like(taken[0]):
                break
            if not taken and not self.handled:
                self._calls.read_form(self._form(self._buffer[0]))
            taken += received
            self._buffer.popleft()
            self._ahead = None
        self._tag = taken[-1].tag
        return taken

    def _first(self) -> list[_Received]:
        """Return the changes of the first message in the buffer.

        Raises:
            PayloadError: It is damaged, or has another version.
        """
        if self._ahead is None:
            self._ahead = list(_read(self._buffer[0]))
        return self._ahead

    def _next_keys(self) -> frozenset[int]:
        """Return the keys of the change after those that are taken; none if that is not read."""
        if self._buffer:
            with suppress(PayloadError):  # `_take` finds it again
                return self._first()[0].keys
        return frozenset()

    def _form(self, message: Any) -> bytes:
        names = ("delivery_mode", "priority", "reply_to")
        properties = {name: message.properties.get(name) for name in names}
        headers = dict(message.headers)
        layout, lanes = headers.pop(LAYOUT, ""), headers.pop(LANES, 0)
        form = lane_entries.encode_form(self._lane.queue, headers, properties, layout, lanes)
        return form.encode()

    def _recall(self, first: _Received) -> None:
        """Read the lane's memory, and count a death of its first change."""
        message = self._link.peek(head_queue(self._lane.name))
        if message is not None:
            self._memory = Memory(**json.loads(message.body))
        if self._died and first.redelivered:
            known = self._memory_of(first.change)
            self._remember(replace(known, deaths=known.deaths + 1))

    def _memory_of(self, change: Change) -> Memory:
        return self._memory if self._memory.id == change.id else Memory(change.id)

    def _remember(self, memory: Memory) -> None:
        self._link.publish([note(head_queue(self._lane.name), asdict(memory))])
        self._memory = memory

    def _forget(self) -> None:
        with self._link.used() as channel:
            channel.queue_purge(head_queue(self._lane.name))
        self._memory = Memory("")

    def _handle(self, received: list[_Received]) -> bool:
        """Handle changes in one call, or several if they are retried; return whether it is done."""
        changes, first = [each.change for each in received], received[0]
        keys = set[int]().union(*(each.keys for each in received))
        while True:
            memory = self._memory_of(first.change)
            if not self._wait_until(memory.until):
                return False
            self._link.verify()
            self._done.confirm_before(keys)
            self._done.prepare(self._next_keys())
            head = Head(
                changes,
                memory.retries,
                memory.deaths,
                None,
                first.expires,
                first.again,
                number_of(self._lane.name),
            )
            verdict = self._calls.handle(head)
            if verdict is None:
                if memory is self._memory:
                    self._forget()
                self._done.add(self._tag, len(changes), keys)
                return True
            assert isinstance(verdict, Later)
            self._done.confirm()  # so that this change is the first one
            seconds = max(verdict.seconds, 0.0)
            until = time.time() + seconds
            self._remember(Memory(first.change.id, verdict.retries, 0, until))
            if seconds > _WAIT_SECONDS:
                self._link.publish_later(self._link.wakes.to(self._lane), seconds)

    def _wait_until(self, moment: float) -> bool:
        """Wait until a moment; return False if that is too long, or the worker is stopped."""
        if moment - time.time() > _WAIT_SECONDS:
            return False
        while (seconds := moment - time.time()) > 0:
            if self._stopping():
                return False
            time.sleep(min(seconds, _SLICE_SECONDS))
        return True

    def _close(self) -> None:
        """Give back what is not done. RabbitMQ takes the acknowledgements before that."""
        self._done.send()
        self._link.close_channel(self._channel)

    def _look_after(self) -> None:
        """Wake the lane if changes wait that came after this drain's look, or are given back."""
        depth = self._depth_without_consumers()
        if depth is not None and depth.ready and not depth.consumers:
            self._link.publish([self._link.wakes.to(self._lane)])

    def _depth(self) -> Depth | None:
        return self._link.look(self._lane.name)

    def _depth_without_consumers(self) -> Depth | None:
        """Return what waits when all consumers are gone: before that, RabbitMQ miscounts.

        If one is left after a second, it is another drain's, which looks when it ends.
        """
        pause, end = 0.001, now() + _SETTLE_SECONDS
        while True:
            depth = self._depth()
            if depth is None or not depth.consumers or now() >= end:
                return depth
            time.sleep(pause)
            pause = min(pause * 2, 0.05)


def _read(message: Any) -> Iterator[_Received]:
    """Yield the changes of a message.

    Raises:
        PayloadError: It is damaged, or has another version.
    """
    body = message.body
    entry = lane_entries.decode(body.encode() if isinstance(body, str) else bytes(body))
    if not isinstance(entry, Entry) or not entry.changes:
        raise PayloadError("This is not a change of a lane.")
    info = message.delivery_info
    tag, redelivered = info["delivery_tag"], info["redelivered"]
    for change, keys in zip(entry.changes, entry.keys, strict=True):
        yield _Received(change, keys, entry.expires, entry.again, tag, redelivered)
