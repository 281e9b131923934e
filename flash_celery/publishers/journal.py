"""What Redis keeps beside the messages: how far they go, and who may publish more of them.

A hash has the owner's token, the binding, a count of writes and the last change of each template; a
list has the transactions that PostgreSQL may send again. Both are written by the transaction that
pushes the messages, and only while the token is ours: a process that was stopped, and whose slot
another one has by now, publishes nothing when it wakes.

Source: Redis documentation, "Transactions".
"""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import redis

from ..enqueued import Enqueued, Lease, Mark
from ..errors import TakenOver
from ..messages import Message

_MARK = "mark:"
_LAST = struct.Struct("=q")


class _Write(NamedTuple):
    """What is known once Redis has done it."""

    messages: int
    #: The last transaction it added, if it added one.
    last: int | None
    #: How many entries of the list it dropped.
    dropped: int


class Journal:
    """The position of one lease, beside the queues."""

    def __init__(self, key: str, lease: Lease) -> None:
        self._key, self._list = key, f"{key}.transactions"
        self._lease = lease
        self._writes = 0
        #: The last transaction of each entry of the list.
        self._entries: deque[int] = deque()
        self._transactions = b""
        #: A write whose reply did not come.
        self._doubt: _Write | None = None

    def claim(self, client: Any) -> Enqueued:
        """End the lease of every other session; what they have enqueued."""
        with client.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(self._key)
            pipeline.lrange(self._list, 0, -1)
            pipeline.hset(self._key, mapping={"owner": self._lease.token, "writes": 0})
            fields, entries, _ = pipeline.execute()
        if fields.get(b"binding") != self._lease.binding.encode():
            self._forget(client, list(fields))
            return Enqueued({}, ())
        self._entries.extend(_LAST.unpack_from(entry)[0] for entry in entries)
        transactions = array("q", b"".join(entry[_LAST.size :] for entry in entries))
        return Enqueued(dict(map(_mark, _marks(fields))), frozenset(transactions))

    def _forget(self, client: Any, fields: Sequence[bytes]) -> None:
        """What was counted otherwise, or in another history, says nothing."""

        def delete(pipeline: Any) -> None:
            pipeline.delete(self._list)
            stale = [field for field in fields if field not in (b"owner", b"writes")]
            if stale:
                pipeline.hdel(self._key, *stale)

        self._guarded(client, delete)

    def settle(self, client: Any) -> int:
        """How many messages got through by the last write, whose reply did not come."""
        doubt, self._doubt = self._doubt, None
        if doubt is None:
            return 0
        owner, writes = client.hmget(self._key, "owner", "writes")
        self._check(owner)
        if int(writes) == self._writes:
            return 0
        self._done(doubt)
        return doubt.messages

    def write(
        self, client: Any, messages: Sequence[Message], push: Callable[[Any], object]
    ) -> None:
        """Push messages and move the position in one step. Raises `TakenOver`."""
        marks, last, transactions = _covered(messages)
        fields = {"writes": self._writes + 1, "binding": self._lease.binding, **marks}
        new = transactions if transactions != self._transactions else b""
        dropped = self._acknowledged()

        def fill(pipeline: Any) -> None:
            push(pipeline)
            pipeline.hset(self._key, mapping=fields)
            if dropped:
                pipeline.ltrim(self._list, dropped, -1)
            if new:
                pipeline.rpush(self._list, _LAST.pack(last) + new)

        self._doubt = _Write(len(messages), last if new else None, dropped)
        try:
            self._guarded(client, fill)
        except redis.ResponseError:
            # Redis does the rest of a transaction although one command fails.
            self._doubt = None
            client.hdel(self._key, "binding")
            raise
        self._done(self._doubt)
        self._doubt, self._transactions = None, transactions

    def _acknowledged(self) -> int:
        """How many entries, from the first on, PostgreSQL does not send again."""
        for count, last in enumerate(self._entries):
            if last >= self._lease.acknowledged:
                return count
        return len(self._entries)

    def _done(self, write: _Write) -> None:
        self._writes += 1
        for _ in range(write.dropped):
            self._entries.popleft()
        if write.last is not None:
            self._entries.append(write.last)

    def _guarded(self, client: Any, fill: Callable[[Any], None]) -> None:
        """Run a transaction if the lease is ours, and still is when it runs."""
        with client.pipeline(transaction=True) as pipeline:
            try:
                self.watch(pipeline)
                pipeline.multi()
                fill(pipeline)
                pipeline.execute()
            except redis.WatchError as error:
                # That is also what a connection lost meanwhile is called.
                self._check(client.hget(self._key, "owner"))
                raise redis.ConnectionError(str(error)) from error

    def watch(self, pipeline: Any) -> None:
        """Let the transaction to come fail if the lease is not ours then. Raises `TakenOver`."""
        pipeline.watch(self._key)
        self._check(pipeline.hget(self._key, "owner"))

    def _check(self, owner: bytes | None) -> None:
        if owner != self._lease.token.encode():
            raise TakenOver("Another replication worker publishes what is read from this slot.")


def _covered(messages: Sequence[Message]) -> tuple[dict[str, str], int, bytes]:
    """The fields of the marks, the last transaction, and all of them."""
    marks: dict[tuple[str, int], Mark] = {}
    known: dict[int, None] = {}
    before: Collection[int] = ()
    for message in messages:
        latest, transactions = message.covered
        for number, mark in latest:
            marks[message.form.template, number] = mark
        if transactions is not before:  # the messages of one transaction share them
            before = transactions
            known.update(dict.fromkeys(transactions))
    last = max((mark[0] for mark in marks.values()), default=0)
    fields = {
        f"{_MARK}{template}:{number}": ":".join(map(str, map(int, mark)))
        for (template, number), mark in marks.items()
    }
    return fields, last, array("q", known).tobytes()


def _marks(fields: dict[bytes, bytes]) -> list[tuple[str, str]]:
    texts = ((name.decode(), value.decode()) for name, value in fields.items())
    return [(name, value) for name, value in texts if name.startswith(_MARK)]


def _mark(field: tuple[str, str]) -> tuple[tuple[str, int], Mark]:
    name, value = field
    template, number = name.removeprefix(_MARK).split(":")
    commit_lsn, ordinal, half = map(int, value.split(":"))
    return (template, int(number)), (commit_lsn, ordinal, half)
