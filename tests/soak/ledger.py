"""Records of what was committed, enqueued and handled, each by its identity."""

import struct
import zlib
from collections import Counter
from itertools import count
from typing import NamedTuple

from flash_celery.changes.change import UNCHANGED, Delete, Truncate, Update
from tests.soak.calls import ALL, Call, Identity

#: The tables of each handler; the last two are ordered.
TABLES = {
    "each": ("items", "probes"),
    "many": ("items", "orders"),
    "keyed": ("items", "probes"),
    "grouped": ("items", "orders"),
}
UNORDERED, ORDERED = ("each", "many"), ("keyed", "grouped")

#: Seconds from the Unix epoch to PostgreSQL's.
EPOCH = 946_684_800


class Commit(NamedTuple):
    """A change that PostgreSQL has committed."""

    table: str
    operation: str
    at: float


class Sighting(NamedTuple):
    """A change that was met somewhere."""

    identity: Identity
    at: float
    task_id: str
    #: Of everything in the change.
    checksum: int


def identify(change):
    """Commit LSN, index and checksum of a change, and its table; for the notes."""
    content = [change.operation.names()[0], dict(change.key)]
    for side in ("old", "new"):
        row = getattr(change, side, {})
        content.append({name: "…" if v is UNCHANGED else v for name, v in row.items()})
    checksum = zlib.crc32(repr(content).encode())
    return int(change.commit_lsn), change.ordinal, checksum, change.table, change.key.get("id")


def keys(change, old=True):
    """The keys of the rows that a change is about; for the notes of ordered handlers.

    With `old` also the key that an UPDATE has changed.
    """
    if isinstance(change, Truncate):
        return [ALL]
    before = [change.old["id"]] if isinstance(change, Update) and old else []
    return sorted({change.key["id"], *before})


def committed(messages):
    """The changes in messages of pgoutput (protocol version 1), read with no code of ours.

    Source: PostgreSQL documentation, "Logical Replication Message Formats".
    """
    tables = {}
    lsn = at = 0
    indexes = count()
    for data in messages:
        kind = data[:1].decode()
        if kind == "B":
            lsn, microseconds = struct.unpack_from("!Qq", data, 1)
            indexes, at = count(), microseconds / 1e6 + EPOCH
        elif kind == "R":
            (oid,) = struct.unpack_from("!I", data, 1)
            tables[oid] = data[5:].split(b"\0")[1].decode()
        elif kind in "IUDT":
            several, first = (1, 1) if kind != "T" else (*struct.unpack_from("!I", data, 1), 6)
            for oid in struct.unpack_from(f"!{several}I", data, first):
                yield (lsn, next(indexes)), Commit(tables[oid], kind, at)


class Ledger:
    """Everything known of one run. Each part is written by one thread.

    Args:
        handlers: The handlers of the run.
        barriers: Whether ordered handlers get a TRUNCATE.
        carried: The records of tasks that transactions carry.
    """

    def __init__(self, handlers=UNORDERED, barriers=True, carried=None):
        self.carried = carried
        self.committed: dict[Identity, Commit] = {}
        self._barriers = barriers
        #: How many changes each handler is to receive.
        self._wanted: Counter[str] = Counter()
        #: In the order of the queue.
        self.enqueued: list[Sighting] = []
        #: By handler, in the order of the notes.
        self.handled: dict[str, list[Sighting]] = {handler: [] for handler in handlers}
        #: Of ordered handlers, in the order of their beginnings.
        self.calls: list[Call] = []
        self.under_way: dict[str, Call] = {}
        self._done: dict[str, set[Identity]] = {handler: set() for handler in handlers}
        #: Rows by table and key, as the changes that were enqueued make them.
        self.rows: dict[str, dict[int, dict]] = {"items": {}, "orders": {}, "probes": {}}
        self._known: set[Identity] = set()
        #: Probes that have been enqueued and handled.
        self.probes: dict[str, set[int]] = {"enqueued": set(), "each": set(), "keyed": set()}

    @property
    def behind(self):
        """Changes that are committed, as far as is known, and not handled by the slowest."""
        return max(self._wanted[handler] - len(done) for handler, done in self._done.items())

    def progress(self, where):
        """How many changes have been enqueued, or handled by a handler."""
        return len(self.enqueued if where == "enqueued" else self.handled[where])

    def wants(self, handler, commit):
        """Whether a handler is to receive a change."""
        barrier = commit.operation == "T" and handler in ORDERED
        return commit.table in TABLES[handler] and (self._barriers or not barrier)

    def commit(self, changes):
        """PostgreSQL has committed changes."""
        for identity, commit in changes:
            if identity not in self.committed:
                self.committed[identity] = commit
                self._wanted.update(h for h in self.handled if self.wants(h, commit))

    def enqueue(self, change, task_id, at):
        """The witness has found a change in its queue."""
        lsn, index, checksum, table, key = identify(change)
        self.enqueued.append(Sighting((lsn, index), at, task_id, checksum))
        if (lsn, index) not in self._known:
            self._known.add((lsn, index))
            self._apply(change, table)
            if table == "probes":
                self.probes["enqueued"].add(key)

    def handle(self, handler, at, task_id, lsn, index, checksum, table, key):
        """A handler has noted a change."""
        self.handled[handler].append(Sighting((lsn, index), at, task_id, checksum))
        self._done[handler].add((lsn, index))
        if table == "probes" and handler in self.probes:
            self.probes[handler].add(key)

    def run(self, at, task_id, place):
        """A task of a transaction has noted that it ran."""
        self.carried.run(at, task_id, place)

    def begin(self, name, handler, at, pid, parent, retries, changes):
        """An ordered handler begins a call, of changes given as commit LSN, index and keys."""
        touched = {(lsn, index): found for lsn, index, found in changes}
        call = Call(handler, pid, parent, at, retries, touched)
        self.calls.append(call)
        self.under_way[name] = call

    def end(self, name, at, again):
        """A call has ended, perhaps with a retry."""
        call = self.under_way.pop(name)
        call.ended, call.again = at, again

    def _apply(self, change, table):
        rows = self.rows[table]
        if isinstance(change, Truncate):
            rows.clear()
            return
        # Without an old key the key is the new one.
        before = rows.pop(change.old["id"], {}) if isinstance(change, Update | Delete) else {}
        if not isinstance(change, Delete):
            new = {n: before.get(n) if v is UNCHANGED else v for n, v in change.new.items()}
            rows[new["id"]] = new
