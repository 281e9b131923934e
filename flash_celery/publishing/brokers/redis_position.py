"""What Redis keeps beside the messages: how far they go, and who may publish more of them.

A hash has the owner's token, the binding, the number of the last write and the last change of each
template; a list has the transactions that PostgreSQL may send again. Both are written in one step
with the messages, and only while the token is ours and the last write is the one that we know of: a
process that was stopped, and whose slot another one has by now, publishes nothing when it wakes,
and nor does a write that was given up and comes through late.

The step is a script. In `MULTI` and `EXEC` a command that fails (a queue's key is of another type,
an ACL changes) does not keep the next ones from being done, and the position would be written
without the messages; a script ends there.

Source: Redis documentation, "Transactions" and "Scripting with Lua".
"""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Collection, Sequence
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import redis

from ...errors import ConfirmedLost, TakenOver
from ...messages.deduplication import Enqueued, Lease, Mark
from ...messages.templates import Message
from ...protocol.lsn import Lsn

#: A name, a key and arguments.
Command: TypeAlias = Sequence[Any]

_MARK = "mark:"
_LAST = struct.Struct("=q")
#: Writes without a reply that are remembered: one that comes through later is taken for a loss.
_DOUBTS = 100
#: Before every mark.
_NONE: Mark = (0, 0, 0)
#: 1 if the owner and the last write are not those that are expected. Each command comes with the
#: number of its words. A queue that is none is found before anything is pushed, for a script that
#: ends in the middle undoes nothing.
_STEP = """
if ARGV[1] ~= '' then
    local found = redis.call('HMGET', KEYS[1], 'owner', 'writes')
    if found[1] ~= ARGV[1] or found[2] ~= ARGV[2] then return 1 end
end
local at = 3
while at <= #ARGV do
    if ARGV[at + 1] == 'LPUSH' then redis.call('LLEN', ARGV[at + 2]) end
    at = at + tonumber(ARGV[at]) + 1
end
at = 3
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    redis.call(unpack(ARGV, at + 1, last))
    at = last + 1
end
"""


def in_one_step(
    client: Any, commands: Sequence[Command], key: str = "", token: str = "", writes: int = 0
) -> Any:
    """Do the commands in order, up to the first that fails, and nothing in between them.

    With a token only if the hash at `key` has it and this number of writes; else the answer is 1.
    """
    keys = dict.fromkeys([key] * bool(key) + [command[1] for command in commands])
    words = [word for command in commands for word in (len(command), *command)]
    return client.eval(_STEP, len(keys), *keys, token, writes, *words)


class _Write(NamedTuple):
    """What is known once Redis has done it."""

    messages: int
    #: The last transaction it added, if it added one.
    last: int | None
    #: How many entries of the list it dropped.
    dropped: int
    transactions: bytes
    latest: Mark


class Journal:
    """The position of one lease, beside the queues."""

    def __init__(self, key: str, lease: Lease) -> None:
        self._key, self._list = key, f"{key}.transactions"
        self._lease = lease
        #: The last write that is known to be done; each attempt has a number of its own.
        self._written = 0
        self._numbers = count(1)
        #: The latest mark that Redis is known to have had.
        self._latest: Mark = _NONE
        #: The last transaction of each entry of the list.
        self._entries: deque[int] = deque()
        self._transactions = b""
        #: The writes since the last one that is known to be done, by number: those whose reply did
        #: not come, all of them beginning with the same message.
        self._doubts: dict[int, _Write] = {}

    def claim(self, client: Any, before: Journal | None = None) -> Enqueued:
        """End the lease of every other session; what they have enqueued.

        `before` is of the last session in this process. Raises `ConfirmedLost` if no other one has
        begun since, and Redis does not have what it had confirmed.
        """
        with client.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(self._key)
            pipeline.lrange(self._list, 0, -1)
            pipeline.hset(self._key, mapping={"owner": self._lease.token, "writes": 0})
            fields, entries, _ = pipeline.execute()
        if before is not None and before._key == self._key:
            before._missed(fields)
        if fields.get(b"binding") != self._lease.binding.encode():
            self._forget(client, list(fields))
            return Enqueued({}, ())
        self._entries.extend(_LAST.unpack_from(entry)[0] for entry in entries)
        transactions = array("q", b"".join(entry[_LAST.size :] for entry in entries))
        marks = _marks(fields)
        self._latest = max(marks.values(), default=_NONE)
        return Enqueued(marks, frozenset(transactions))

    def _forget(self, client: Any, fields: Sequence[bytes]) -> None:
        """What was counted otherwise, or in another history, says nothing."""
        stale = [field for field in fields if field not in (b"owner", b"writes")]
        commands: list[Command] = [("HDEL", self._key, field) for field in stale]
        if self.step(client, [("DEL", self._list), *commands]):
            self.look(client)

    def settle(self, client: Any) -> int:
        """How many messages got through by a write whose reply did not come.

        Raises `TakenOver`, and `ConfirmedLost` if Redis does not have what it had confirmed.
        """
        if not self._doubts:
            return 0
        number = self.look(client)
        return self._done(number) if number != self._written else 0

    def write(self, client: Any, messages: Sequence[Message], pushes: Sequence[Command]) -> None:
        """Push messages and move the position in one step.

        Raises `TakenOver`, and `ConfirmedLost` if Redis does not have what it had confirmed.
        """
        marks, latest, transactions = _covered(messages)
        new = transactions if transactions != self._transactions else b""
        dropped = self._acknowledged()
        number = next(self._numbers)
        commands = [*pushes]
        if dropped:
            commands.append(("LTRIM", self._list, dropped, -1))
        if new:
            commands.append(("RPUSH", self._list, _LAST.pack(latest[0]) + new))
        # One by one: a command of a script has some thousand words at most.
        commands += [("HSET", self._key, field, mark) for field, mark in marks.items()]
        written = "writes", number, "binding", self._lease.binding
        commands.append(("HSET", self._key, *written))
        last = latest[0] if new else None
        self._doubt(number, _Write(len(messages), last, dropped, transactions, latest))
        if self.step(client, commands):
            self.look(client)
            raise redis.ConnectionError("a push whose reply did not come was done after all")
        self._done(number)

    def step(self, client: Any, commands: Sequence[Command]) -> Any:
        """Do the commands if the lease is ours and our last write is Redis'; else see `look`."""
        return in_one_step(client, commands, self._key, self._lease.token, self._written)

    def look(self, client: Any) -> int:
        """The last write that Redis has: the last known one, or one that is in doubt.

        Raises `TakenOver`, and `ConfirmedLost` if it is neither.
        """
        fields = client.hgetall(self._key)
        self._missed(fields)
        if fields[b"owner"] != self._lease.token.encode():
            raise TakenOver("Another replication worker publishes what is read from this slot.")
        return int(fields[b"writes"])

    def _missed(self, fields: dict[bytes, bytes]) -> None:
        """Raise `ConfirmedLost` if the hash, or our last write to it, is missing."""
        latest = max(_marks(fields).values(), default=_NONE)
        if fields.get(b"owner") == self._lease.token.encode():
            lost = int(fields.get(b"writes", 0)) not in (self._written, *self._doubts)
        else:
            # Who has taken over goes on from our marks; what is behind them is of a session before.
            same = fields.get(b"binding") == self._lease.binding.encode()
            lost = b"owner" not in fields or (same and latest < self._latest)
        if not lost:
            return
        self._latest = _NONE  # it is said once
        since = "before now" if latest == _NONE else f"from {Lsn(latest[0])} on"
        raise ConfirmedLost(
            "Redis does not have the last messages any more that it had confirmed (it was restored "
            "or emptied, evicts keys, or has failed over): changes committed "
            f"{since} may be missing."
        )

    def _acknowledged(self) -> int:
        """How many entries, from the first on, PostgreSQL does not send again."""
        for number, last in enumerate(self._entries):
            if last >= self._lease.acknowledged:
                return number
        return len(self._entries)

    def _doubt(self, number: int, write: _Write) -> None:
        if len(self._doubts) >= _DOUBTS:
            del self._doubts[min(self._doubts)]
        self._doubts[number] = write

    def _done(self, number: int) -> int:
        """Note what is so now; how many messages the write had."""
        write = self._doubts[number]
        self._doubts.clear()
        self._written, self._transactions = number, write.transactions
        self._latest = max(self._latest, write.latest)
        for _ in range(write.dropped):
            self._entries.popleft()
        if write.last is not None:
            self._entries.append(write.last)
        return write.messages


def _covered(messages: Sequence[Message]) -> tuple[dict[str, str], Mark, bytes]:
    """The fields of the marks, the latest of them, and all transactions."""
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
    last = max(marks.values(), default=_NONE)
    fields = {
        f"{_MARK}{template}:{number}": ":".join(map(str, map(int, mark)))
        for (template, number), mark in marks.items()
    }
    return fields, last, array("q", known).tobytes()


def _marks(fields: dict[bytes, bytes]) -> dict[tuple[str, int], Mark]:
    texts = ((name.decode(), value.decode()) for name, value in fields.items())
    return dict(_mark(name, value) for name, value in texts if name.startswith(_MARK))


def _mark(name: str, value: str) -> tuple[tuple[str, int], Mark]:
    template, number = name.removeprefix(_MARK).split(":")
    commit_lsn, ordinal, half = map(int, value.split(":"))
    return (template, int(number)), (commit_lsn, ordinal, half)
