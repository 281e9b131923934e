"""The position of a session, which only this module stores in Redis, in one step with the messages.

Strategy: a hash has the fencing token of the session that may publish (field `owner`), the
sequence number of its last write (field `writes`), the lease's binding, and the high-water marks of
each template. One list has the transactions that PostgreSQL may send again, another the rows of the
last chunks of backfills, which may be read again. Each write is one
compare-and-set: a script pushes the messages and moves the position if token and sequence number
are the expected ones, and does nothing otherwise. So a process that was frozen while another took
over its slot publishes nothing when it wakes, and a write that was given up and arrives late has no
effect.

The write is a script, not a `MULTI` with `EXEC`: there, the commands after a failed one (a queue's
key is of another type, an ACL changed) are executed all the same, so the position would be written
without the messages. A script ends at the first error.

Source: Redis documentation, "Transactions" and "Scripting with Lua".
"""

from __future__ import annotations

import logging
import struct
from array import array
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import redis

from ...errors import ConfirmedLost, LanesNotReady, TakenOver
from ...messages.deduplication import (
    CHUNK_BYTES,
    CHUNK_ID_BYTES,
    ROW_ID_BYTES,
    Deduplicator,
    Lease,
    Watermark,
    now,
)
from ...messages.task_message import Message
from ...protocol.lsn import Lsn
from . import lane_scripts, redis_texts

logger = logging.getLogger(__name__)

#: A command of Redis: its name, a key and further arguments.
Command: TypeAlias = Sequence[Any]

_NO_POSITION = (
    "Redis has no position %s, although an earlier worker has read the slot. Unless that worker "
    "had another broker, Redis was emptied, restored, or evicts keys: tasks that it had confirmed "
    "may be missing (run `flash replay --since` if flash_replay_window covers them, or rebuild "
    "what depends on them), and changes that PostgreSQL sends again are enqueued again"
)
_UPGRADED = (
    "The server has another system identifier than when its position was stored in Redis "
    "(pg_upgrade); storing it as %s from now on"
)
#: Prefix of the hash fields with marks.
_MARK = "mark:"
#: The hash field with the acknowledged position: everything before it had been pushed by then.
_ACKNOWLEDGED = b"acknowledged"
#: The head of an entry of the list: the commit LSN of its last transaction.
_LAST = struct.Struct("=q")
_IDENTITY_BYTES = 8
#: The most acknowledged transactions to keep: 1 MB.
_MOST_KEPT = 1 << 17
#: The chunks whose rows are kept: more than those of all backfills that are enqueued and not
#: recorded, also if they are read again. Beyond some bytes of their ids only some are.
_KEPT_CHUNKS, _KEPT_CHUNKS_BEYOND, _KEPT_CHUNK_BYTES = 128, 16, 2 << 20
#: The most writes without a reply to remember. If Redis executes an older one, it counts as a loss.
_MAX_UNANSWERED = 100
#: Lower than every other mark.
_NONE: Watermark = (0, 0, 0)
#: What a step does of each command, whose words are those of `ARGV` from `at` to `last`; lanes have
#: other functions.
_COMMANDS = """
local function check()
    return true
end

local function run(at, last)
    redis.call(unpack(ARGV, at, last))
end
"""
#: Returns 1, and does nothing, if the fencing token or the sequence number is not the expected one;
#: 2, if lanes have another layout. Each command is preceded by the number of its words. A key that
#: is not a list fails before anything is pushed, because a script that ends early undoes nothing.
#: The hash needs no such check: HMGET has read it.
_STEP = """
local lists = {LPUSH = true, RPUSH = true, LTRIM = true, ['FLASH.TASKS'] = true}
if ARGV[1] ~= '' then
    local found = redis.call('HMGET', KEYS[1], 'owner', 'writes')
    if found[1] ~= ARGV[1] or found[2] ~= ARGV[2] then return 1 end
end
local at = 3
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    if lists[ARGV[at + 1]] then redis.call('LLEN', ARGV[at + 2]) end
    if not check(at + 1, last) then return 2 end
    at = last + 1
end
at = 3
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    local step = ARGV[at + 1] == 'FLASH.TASKS' and push_tasks or run
    step(at + 1, last)
    at = last + 1
end
"""


def in_one_step(
    client: Any,
    commands: Sequence[Command],
    key: str = "",
    fencing_token: str = "",
    sequence_number: int = 0,
) -> Any:
    """Execute commands in order and atomically, up to the first that fails.

    Args:
        client: The client.
        commands: The commands.
        key: The key of the hash with the position.
        fencing_token: If given, commands are executed only if the hash has this token and number.
        sequence_number: The number that the hash must have.

    Returns:
        1 if the hash has another token or number, so that nothing was executed.

    Raises:
        LanesNotReady: The commands fill lanes, and these have another layout.
    """
    # The functions for lanes are a long text, which a step without them does not send.
    names = {str(command[0]) for command in commands if str(command[0]).startswith("FLASH.")}
    functions = lane_scripts.COMMANDS if names - {redis_texts.TOGETHER} else _COMMANDS
    script = redis_texts.SCRIPT + functions + _STEP
    keys = dict.fromkeys([key] * bool(key) + [command[1] for command in commands])
    words = [word for command in commands for word in (len(command), *command)]
    try:
        refused = client.eval(script, len(keys), *keys, fencing_token, sequence_number, *words)
    except redis.ResponseError as error:
        raise _with_key(client, key, keys, error) from None
    if refused == lane_scripts.OTHER_LAYOUT:
        raise LanesNotReady("The lanes are not set up, or for another number of lanes or key.")
    return refused


def _with_key(
    client: Any, key: str, keys: Iterable[str], error: redis.ResponseError
) -> redis.ResponseError:
    """Return the error with the name of the key that is of another type, which Redis omits."""
    if "WRONGTYPE" not in str(error):
        return error
    with suppress(redis.ResponseError):  # an ACL without TYPE
        for each in keys:
            expected, found = "hash" if each == key else "list", client.type(each).decode()
            if found not in (expected, "none"):
                return redis.ResponseError(
                    f"WRONGTYPE: the key {each} is a {found}, and flash-celery keeps a {expected} "
                    "there; rename or delete it"
                )
    return error


class _Entry(NamedTuple):
    """An entry of the list, without the identities of its transactions."""

    #: The commit LSN of the last one.
    last: int
    #: Their number.
    transactions: int

    @classmethod
    def read(cls, entry: bytes) -> _Entry:
        """Return what an entry of the list says."""
        return cls(_LAST.unpack_from(entry)[0], (len(entry) - _LAST.size) // _IDENTITY_BYTES)


class _Write(NamedTuple):
    """A write to Redis, and the changes to the position once Redis has executed it."""

    #: How many messages it pushes.
    messages: int
    #: The entry that it appends to the list, if any.
    entry: _Entry | None
    #: How many entries of the list it drops.
    dropped: int
    #: The transactions of its messages, packed.
    transactions: bytes
    #: The highest mark among its messages.
    highest: Watermark
    #: The chunks whose rows it appends, in the order of the list, with the bytes of the ids.
    chunks: Sequence[tuple[bytes, int]] = ()
    #: How many entries of the list of chunks it drops.
    dropped_chunks: int = 0


class RedisPosition:
    """The position of one session. It belongs to the publishing thread, like the publisher."""

    def __init__(self, key: str, lease: Lease) -> None:
        self._key, self._list = key, f"{key}.transactions"
        self._chunk_list = f"{key}.chunks"
        self._lease = lease
        #: The sequence number of the last write that Redis has confirmed.
        self._sequence_number = 0
        #: Sequence numbers for the next writes; each attempt takes one.
        self._numbers = count(1)
        #: The highest mark that Redis has confirmed.
        self._highest: Watermark = _NONE
        #: The entries of the list.
        self._entries: deque[_Entry] = deque()
        #: How many transactions are in them.
        self._kept = 0
        #: The transactions of the last write, packed.
        self._transactions = b""
        #: The ids of the chunks in the entries of the list of chunks, with their bytes.
        self._chunks: deque[tuple[bytes, int]] = deque()
        #: Writes after the last confirmed one, by sequence number, whose replies were lost. All
        #: begin with the same message and expect the same number, so Redis executes at most one.
        self._unanswered: dict[int, _Write] = {}

    def claim(self, client: Any, previous: RedisPosition | None = None) -> Deduplicator:
        """End the lease of every other session, and return what they have enqueued.

        Args:
            client: The client.
            previous: The position of this process's last session.

        Raises:
            ConfirmedLost: Redis has lost something that it had confirmed to that session.
        """
        if self._lease.refills and not self._lease.lost:
            # Before this claim leaves a position, which a session after a crash would believe.
            self._raise_if_not_there(client, previous)
        with client.pipeline(transaction=True) as pipeline:
            pipeline.hgetall(self._key)
            pipeline.lrange(self._list, 0, -1)
            pipeline.lrange(self._chunk_list, 0, -1)
            pipeline.hset(self._key, mapping={"owner": self._lease.fencing_token, "writes": 0})
            fields, entries, chunks, _ = pipeline.execute()
        if self._lease.lost:
            pass
        elif previous is not None and previous._key == self._key:
            previous._raise_if_lost(fields)
        elif self._lease.continues and b"owner" not in fields:
            if self._has_former(client):
                logger.info(_UPGRADED, self._key)
            else:
                logger.error(_NO_POSITION, self._key)
        self._chunks.extend((entry[:CHUNK_ID_BYTES], len(entry)) for entry in chunks)
        if fields.get(b"binding") != self._lease.binding.encode():
            self._reset(client, list(fields))
            return Deduplicator({}, (), chunks=_rows_by_chunk(chunks))
        self._entries.extend(map(_Entry.read, entries))
        self._kept = sum(entry.transactions for entry in self._entries)
        transactions = array("q", b"".join(entry[_LAST.size :] for entry in entries))
        marks = _marks(fields)
        self._highest = max(marks.values(), default=_NONE)
        acknowledged = Lsn(int(fields[_ACKNOWLEDGED])) if _ACKNOWLEDGED in fields else None
        return Deduplicator(marks, frozenset(transactions), acknowledged, _rows_by_chunk(chunks))

    def _has_former(self, client: Any) -> bool:
        """Return whether Redis has the position of the server before pg_upgrade."""
        key = self._key.removesuffix(self._lease.name) + self._lease.former_name
        return bool(self._lease.former_name and client.hgetall(key))

    def _raise_if_not_there(self, client: Any, previous: RedisPosition | None) -> None:
        fields = client.hgetall(self._key)
        if previous is not None and previous._key == self._key:
            previous._raise_if_lost(fields)
        elif self._lease.continues and b"owner" not in fields and not self._has_former(client):
            raise ConfirmedLost(
                f"Redis has no position {self._key}, although an earlier worker has read the slot: "
                "it was emptied, or is another one."
            )

    def _reset(self, client: Any, fields: Sequence[bytes]) -> None:
        """Delete the position of another binding: its changes were counted differently."""
        stale = [field for field in fields if field not in (b"owner", b"writes")]
        commands: list[Command] = [("HDEL", self._key, field) for field in stale]
        if self.compare_and_set(client, [("DEL", self._list), *commands]):
            self.check(client)

    @property
    def is_current(self) -> bool:
        """Whether the lease is valid, so that no other session can have claimed another one."""
        return now() < self._lease.until

    def recover_reply(self, client: Any) -> int:
        """Return how many messages Redis received in a write whose reply was lost.

        Raises:
            TakenOver: Another session has claimed the lease.
            ConfirmedLost: Redis has lost a write that it had confirmed.
        """
        if not self._unanswered:
            return 0
        number = self.check(client)
        return self._confirm(number) if number != self._sequence_number else 0

    def write(self, client: Any, messages: Sequence[Message], pushes: Sequence[Command]) -> None:
        """Push messages, by the commands `pushes`, and move the position in one step.

        Raises:
            TakenOver: Another session has claimed the lease.
            ConfirmedLost: Redis has lost a write that it had confirmed.
        """
        marks, highest, transactions, chunks = _covered(messages)
        new = transactions if transactions != self._transactions else b""
        dropped = self._superfluous_entries()
        number = next(self._numbers)
        commands = [*pushes]
        if dropped:
            commands.append(("LTRIM", self._list, dropped, -1))
        if new:
            commands.append(("RPUSH", self._list, _LAST.pack(highest[0]) + new))
        dropped_chunks = self._superfluous_chunks(chunks)
        if dropped_chunks:
            commands.append(("LTRIM", self._chunk_list, dropped_chunks, -1))
        commands += [("RPUSH", self._chunk_list, chunk + ids) for chunk, ids in chunks.items()]
        # One command each: Lua unpacks some thousand words at most.
        commands += [("HSET", self._key, field, mark) for field, mark in marks.items()]
        fields: list[Any] = ["writes", number, "binding", self._lease.binding]
        if self._lease.acknowledged:
            fields += [_ACKNOWLEDGED, int(self._lease.acknowledged)]
        commands.append(("HSET", self._key, *fields))
        entry = _Entry(highest[0], len(new) // _IDENTITY_BYTES) if new else None
        ids = [(chunk[:CHUNK_ID_BYTES], len(rows)) for chunk, rows in chunks.items()]
        self._expect(
            number,
            _Write(len(messages), entry, dropped, transactions, highest, ids, dropped_chunks),
        )
        if self.compare_and_set(client, commands):
            self.check(client)
            raise redis.ConnectionError("a push whose reply was lost was executed after all")
        self._confirm(number)

    def compare_and_set(self, client: Any, commands: Sequence[Command]) -> Any:
        """Execute commands if Redis has the token and the sequence number of this session.

        Otherwise return 1; `check` finds out why.
        """
        token, number = self._lease.fencing_token, self._sequence_number
        return in_one_step(client, commands, self._key, token, number)

    def check(self, client: Any) -> int:
        """Return the sequence number in Redis: that of the last confirmed or an unanswered write.

        Raises:
            ConfirmedLost: It is the number of neither.
            TakenOver: Another session has claimed the lease.
        """
        fields = client.hgetall(self._key)
        self._raise_if_lost(fields)
        if fields[b"owner"] != self._lease.fencing_token.encode():
            raise TakenOver("Another replication worker has taken over this slot and publishes.")
        return int(fields[b"writes"])

    def _raise_if_lost(self, fields: dict[bytes, bytes]) -> None:
        """Raise `ConfirmedLost` if the hash lacks a write that Redis had confirmed."""
        highest = max(_marks(fields).values(), default=_NONE)
        if fields.get(b"owner") == self._lease.fencing_token.encode():
            expected = self._sequence_number, *self._unanswered
            lost = int(fields.get(b"writes", 0)) not in expected
        else:
            # A session that took over continues from our marks, so lower marks mean a restore.
            same_binding = fields.get(b"binding") == self._lease.binding.encode()
            lost = b"owner" not in fields or (same_binding and highest < self._highest)
        if not lost:
            return
        self._highest = _NONE  # so that a loss is reported once
        since = "before now" if highest == _NONE else f"from {Lsn(highest[0])} on"
        raise ConfirmedLost(
            "Redis has lost the last messages that it had confirmed (it was restored or emptied, "
            f"evicts keys, or has failed over): changes committed {since} may be missing."
        )

    def _superfluous_entries(self) -> int:
        """Return how many entries, from the first, have only transactions that are not sent again.

        A server that crashes sends transactions again that were acknowledged. They are kept, unless
        an open transaction makes them too many.
        """
        kept = self._kept
        for index, entry in enumerate(self._entries):
            acknowledged = entry.last < self._lease.acknowledged
            if not acknowledged or (entry.last >= self._lease.durable and kept <= _MOST_KEPT):
                return index
            kept -= entry.transactions
        return len(self._entries)

    def _superfluous_chunks(self, new: Mapping[bytes, bytes]) -> int:
        """Return how many entries of the list, from the first, are of chunks that are recorded."""
        kept = dict.fromkeys(chunk[:CHUNK_ID_BYTES] for chunk in new)
        size = sum(map(len, new.values()))
        for following, (chunk, length) in enumerate(reversed(self._chunks)):
            size += length
            most = _KEPT_CHUNKS if size <= _KEPT_CHUNK_BYTES else _KEPT_CHUNKS_BEYOND
            if chunk not in kept and len(kept) >= most:
                return len(self._chunks) - following
            kept[chunk] = None
        return 0

    def _expect(self, number: int, write: _Write) -> None:
        if len(self._unanswered) >= _MAX_UNANSWERED:
            del self._unanswered[min(self._unanswered)]
        self._unanswered[number] = write

    def _confirm(self, number: int) -> int:
        """Record that Redis has executed a write; return how many messages it pushed."""
        write = self._unanswered[number]
        self._unanswered.clear()
        self._sequence_number, self._transactions = number, write.transactions
        self._highest = max(self._highest, write.highest)
        for _ in range(write.dropped):
            self._kept -= self._entries.popleft().transactions
        if write.entry is not None:
            self._entries.append(write.entry)
            self._kept += write.entry.transactions
        for _ in range(write.dropped_chunks):
            self._chunks.popleft()
        self._chunks.extend(write.chunks)
        return write.messages


def _covered(
    messages: Sequence[Message],
) -> tuple[dict[str, str], Watermark, bytes, dict[bytes, bytes]]:
    """Return what messages cover.

    Returns:
        Hash fields with marks, the highest mark, the transactions, packed, and the ids of rows by
        chunk.
    """
    marks: dict[tuple[str, int], Watermark] = {}
    distinct: dict[int, None] = {}
    previous: Collection[int] = ()
    chunks: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for message, later in zip(messages, [*messages[1:], None], strict=True):
        if later is not None and message.is_covered_by(later):
            continue
        message_marks, transactions, chunk_rows = message.covered
        for chunk, ids in chunk_rows:
            chunks[chunk].append(ids)
        for number, mark in message_marks:
            marks[message.form.template, number] = mark
        if transactions is not previous:  # the messages of one transaction share the object
            previous = transactions
            distinct.update(dict.fromkeys(transactions))
    highest = max(marks.values(), default=_NONE)
    fields = {
        f"{_MARK}{template}:{number}": ":".join(map(str, map(int, mark)))
        for (template, number), mark in marks.items()
    }
    rows = {chunk: b"".join(ids) for chunk, ids in chunks.items()}
    return fields, highest, array("q", distinct).tobytes(), rows


def _rows_by_chunk(entries: Iterable[bytes]) -> dict[bytes, frozenset[bytes]]:
    """Return the ids of the rows that entries of the list of chunks have, by chunk."""
    joined: defaultdict[bytes, bytes] = defaultdict(bytes)
    for entry in entries:
        joined[entry[:CHUNK_BYTES]] += entry[CHUNK_BYTES:]
    size = ROW_ID_BYTES
    return {
        chunk: frozenset(ids[start : start + size] for start in range(0, len(ids), size))
        for chunk, ids in joined.items()
    }


def _marks(fields: dict[bytes, bytes]) -> dict[tuple[str, int], Watermark]:
    texts = ((name.decode(), value.decode()) for name, value in fields.items())
    return dict(_mark(name, value) for name, value in texts if name.startswith(_MARK))


def _mark(name: str, value: str) -> tuple[tuple[str, int], Watermark]:
    template, number = name.removeprefix(_MARK).split(":")
    commit_lsn, ordinal, part = map(int, value.split(":"))
    return (template, int(number)), (commit_lsn, ordinal, part)
