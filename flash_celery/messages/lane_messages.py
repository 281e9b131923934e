"""Messages for lanes: the changes of an ordered handler, and barriers.

A group is one message for one handler, however many lanes its changes go to. The broker has to take
all of it in one step, because the high-water mark of a subscription means that every change before
it is enqueued. With `coalesce=` that includes changes of which nothing is left, so a message may
have none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

from ..changes import payload
from ..changes.deliveries import Delivery
from ..changes.payload import Picked
from ..changes.rows import Table
from ..handlers.patterns import TablePattern
from ..provisioning.ordering_keys import Key
from . import lane_entries
from .coalescing import Coalescer
from .deduplication import Covered, covered_by
from .lane_placing import Hashes, Place, Placer, hashes, key_of, placer, seed_of
from .lane_transports import REDIS, LaneTransport
from .task_ids import short_digest
from .task_message import Form, Message

#: The name of the set of all handlers' keys on the broker, and the beginning of these keys.
REGISTRY = "_flash.ordered"
#: Bytes of rows, and changes, of one message.
_GROUP_BYTES = 1 << 20
_GROUP_CHANGES = 8000
#: The same if they are coalesced, counted before that.
_COALESCED_CHANGES = 10_000
#: Rows of a delivery from which on it takes less time to place them together.
_MANY = 16
#: Bytes of rows of one entry; a single row may have more.
_ENTRY_BYTES = 1 << 16
#: Where a change without a known key goes on a broker without barriers.
_UNPLACED = Place(0, 0)


def handler_key(source: str, handler: str) -> str:
    """Return the name of a handler's keys, without the broker's prefix.

    Args:
        source: The server and the slot, as in the ids of tasks.
        handler: The name of the task.
    """
    return f"{REGISTRY}.{source.replace('/', '.')}.{handler}"


@dataclass(frozen=True, eq=False)
class LaneForm:
    """The lanes of one handler: what all messages to them have in common."""

    #: The name of the keys on the broker.
    key: str
    #: The server and the slot, and the handler, for wakes.
    source: str
    handler: str
    lanes: int
    #: The form of the handler's task messages, for those that leave the lanes (dead letters).
    form: Form
    #: What the handler declares about the order, as text.
    declared: str = ""
    #: The ordering keys that the tables of each subscription have, by its number; None for any.
    keys: tuple[frozenset[Key] | None, ...] = ()
    #: Whether drains must leave the lanes alone.
    paused: bool = False
    transport: LaneTransport = REDIS
    #: Whether the changes are handled even if they were handled before (`once=`).
    again: bool = False
    #: Whether marks say what was handled. They skip a change that comes behind a newer one for the
    #: first time, as after a refusal of RabbitMQ.
    marked: bool = False

    @cached_property
    def layout(self) -> str:
        """A digest of everything that determines the lane of a change."""
        keys = [sorted(each or ()) for each in self.keys]
        return short_digest(f"{self.lanes}|{self.declared}|{keys}", 8)

    def allows(self, number: int, key: Key) -> bool:
        """Return whether changes of a subscription may be placed by a key in this layout."""
        keys = self.keys[number] if number < len(self.keys) else None
        return keys is None or key in keys

    def with_keys(self, number: int, keys: frozenset[Key]) -> LaneForm:
        """Return lanes in which the tables of one subscription have these keys."""
        return replace(self, keys=(*self.keys[:number], keys, *self.keys[number + 1 :]))


class LaneMessage(Message):
    """Changes for lanes, or one change for a barrier."""

    __slots__ = ("barrier", "lane_form", "pushes")

    def __init__(
        self,
        lane_form: LaneForm,
        pushes: Sequence[tuple[int, int, str]],
        covered: Covered,
        barrier: Sequence[int] = (),
    ) -> None:
        super().__init__(lane_form.form, "", "", "", covered)
        self.lane_form = lane_form
        #: For each entry its lane, its number of changes and its text. A barrier has one, and its
        #: lanes are those of `barrier`.
        self.pushes = pushes
        self.barrier = barrier

    @property
    def entries(self) -> int:
        """How many changes it has, each of which counts in lanes."""
        return sum(count for _, count, _ in self.pushes)

    @property
    def size(self) -> int:
        """How many characters its changes have."""
        return sum(len(text) for *_, text in self.pushes)

    @property
    def longest(self) -> int:
        """How many characters the longest of its entries has."""
        return max(len(text) for *_, text in self.pushes)

    @property
    def queue(self) -> str:
        """The name of the lanes' keys."""
        return self.lane_form.key

    def with_pushes(self, pushes: Sequence[tuple[int, int, str]]) -> LaneMessage:
        """Return the message with these entries, which covers the same changes."""
        return LaneMessage(self.lane_form, pushes, self.covered, self.barrier)


#: Stands for a row that is only counted.
_NO_ROW = (b"",)


class _Lane:
    """The changes of one lane that are collected for one entry."""

    __slots__ = ("picked", "places", "size")

    def __init__(self) -> None:
        self.picked: list[Picked] = []
        self.places: list[Place | int] = []
        self.size = 0

    def add(self, picked: Picked, places: Sequence[Place | int], size: int) -> None:
        """Add changes, with the places and the size of their rows."""
        last = self.picked[-1] if self.picked else None
        if last is not None and last.delivery is picked.delivery:
            last.ordinals.extend(picked.ordinals)
            last.rows.extend(picked.rows)
        else:
            self.picked.append(picked)
        self.places += places
        self.size += size

    def add_row(self, delivery: Delivery, ordinal: int, row: bytes, place: Place | int) -> None:
        """Add one change of a delivery."""
        if self.picked and self.picked[-1].delivery is delivery:
            self.picked[-1].ordinals.append(ordinal)
            self.picked[-1].rows.append(row)
        else:
            self.picked.append(Picked(delivery, [ordinal], [row]))
        self.places.append(place)
        self.size += len(row)


class LaneGroup:
    """Collects the changes of one handler, in the order of the WAL.

    Args:
        form: The lanes.
        columns: The ordering key of each subscription, by number; None for the row's key.
        coalescer: Makes neighbouring changes into one. Default: they stay as they are.
        patterns: The pattern of each subscription that has one, by number.
    """

    def __init__(
        self,
        form: LaneForm,
        columns: Sequence[Sequence[str] | None],
        coalescer: Coalescer | None = None,
        patterns: Mapping[int, TablePattern] = MappingProxyType({}),
    ) -> None:
        #: The lanes as the session began with them, and those of the next message.
        self._first_form = self._form = form
        self._columns = columns
        self._patterns = patterns
        self._coalescer = coalescer
        self._most = _GROUP_CHANGES if coalescer is None else _COALESCED_CHANGES
        self._placers: dict[tuple[Table, int], tuple[Key, Placer, Hashes | None]] = {}
        self._lanes: dict[int, _Lane] = {}
        self._full: list[tuple[int, int, str]] = []
        self._covered: list[Delivery] = []
        self._size = self._count = 0
        #: Consecutive rows that are not in their lanes yet, and the hashes of their keys.
        self._run: Delivery | None = None
        self._rows: list[bytes] = []
        self._hashed: list[int] = []

    def add(self, delivery: Delivery, expires: float | None) -> list[LaneMessage]:
        """Add changes; return the messages that are complete.

        Args:
            delivery: The changes.
            expires: Seconds since 1970 after which they are no longer handled.
        """
        messages: list[LaneMessage] = []
        key, place, hashes_of = self._placer(delivery.table, delivery.number)
        if not self._form.allows(delivery.number, key):
            messages += self.flush(expires)
            self._form = self._form_for(delivery.number, key)
        many = len(delivery.rows) >= _MANY
        if many and hashes_of is not None and self._coalescer is None:
            hashed = [each for each in hashes_of(delivery.rows) if each is not None]
            if len(hashed) == len(delivery.rows):
                return messages + self._add_hashed(delivery, hashed, expires)
        self._distribute(expires)
        first = following = delivery.ordinal
        for row in delivery.rows:
            placed, ordinal, following = place(row), following, following + 1
            if placed is None or placed.key != placed.old:
                crossed = self._crossed(placed)
                if crossed:
                    messages += self._flush_to(delivery, first, ordinal, expires)
                    single = delivery.row(ordinal - delivery.ordinal)
                    messages.append(self._barrier(single, crossed, expires))
                    first = following
                    continue
                placed = placed or _UNPLACED
            if self._coalescer is None:
                self._put(delivery, ordinal, row, placed, expires)
                self._size += len(row)
            else:
                self._coalescer.add(delivery.row(ordinal - delivery.ordinal), placed)
                self._size = self._coalescer.size
            self._count += 1
            if self._size >= _GROUP_BYTES or self._count >= self._most:
                messages += self._flush_to(delivery, first, following, expires)
                first = following
        self._cover(delivery, first, following)
        return messages

    def _add_hashed(
        self, delivery: Delivery, hashed: Sequence[int], expires: float | None
    ) -> list[LaneMessage]:
        """Do the same, faster, with changes none of which has moved its row to another key.

        Args:
            delivery: The changes.
            hashed: The hashes of their keys.
            expires: As for `add`.
        """
        messages: list[LaneMessage] = []
        first, start = delivery.ordinal, 0
        totals = list(accumulate(map(len, delivery.rows), initial=0))
        while start < len(hashed):
            full = totals[start] + _GROUP_BYTES - self._size
            end = min(
                len(hashed), start + self._most - self._count, bisect_left(totals, full, start + 1)
            )
            self._gather(delivery, start, end, hashed, expires)
            self._size += totals[end] - totals[start]
            self._count += end - start
            self._cover(delivery, first + start, first + end)
            if self._size >= _GROUP_BYTES or self._count >= self._most:
                messages += self.flush(expires)
            start = end
        return messages

    def _gather(
        self,
        delivery: Delivery,
        start: int,
        end: int,
        hashed: Sequence[int],
        expires: float | None,
    ) -> None:
        """Keep rows of a delivery until they are distributed, with those before them if they fit.

        A large transaction comes in deliveries that are smaller than the number of lanes.
        """
        run, ordinal = self._run, delivery.ordinal + start
        if run is None or delivery.part or not _continues(run, delivery, ordinal):
            self._distribute(expires)
            self._run = delivery._replace(rows=self._rows, ordinal=ordinal)
        self._rows += delivery.rows[start:end]
        self._hashed += hashed[start:end]

    def _distribute(self, expires: float | None) -> None:
        """Add the rows that are kept to their lanes."""
        run, hashed = self._run, self._hashed
        if run is None:
            return
        self._run, self._rows, self._hashed = None, [], []
        by_lane: defaultdict[int, list[int]] = defaultdict(list)
        for position, key in enumerate(hashed):
            by_lane[key % self._form.lanes].append(position)
        for number, positions in by_lane.items():
            self._put_all(run, number, positions, hashed, expires)

    def _put_all(
        self,
        delivery: Delivery,
        number: int,
        positions: Sequence[int],
        hashed: Sequence[int],
        expires: float | None,
    ) -> None:
        """Add changes of a delivery to one lane."""
        rows, first = delivery.rows, delivery.ordinal
        chosen = [rows[position] for position in positions]
        places = [hashed[position] for position in positions]
        ordinals = [first + position for position in positions]
        size, most = sum(map(len, chosen)), self._form.transport.entry_changes
        lane = self._lanes.get(number)
        if lane is None:
            lane = self._lanes[number] = _Lane()
        if lane.size + size <= _ENTRY_BYTES and len(lane.places) + len(places) <= most:
            lane.add(Picked(delivery, ordinals, chosen), places, size)
            return
        for ordinal, row, key in zip(ordinals, chosen, places, strict=True):
            self._put(delivery, ordinal, row, key, expires)

    def _crossed(self, place: Place | None) -> Sequence[int]:
        form = self._form
        return barrier_lanes(place, form.lanes) if form.transport.has_barriers else ()

    def _cover(self, delivery: Delivery, first: int, following: int) -> None:
        """Note changes of a delivery, from an ordinal on, as part of the next message."""
        if following > first:
            rows: Sequence[bytes] = _NO_ROW * (following - first)
            if delivery.transaction.backfill is not None:  # whose rows are known by their ids
                begin = first - delivery.ordinal
                rows = delivery.rows[begin : begin + len(rows)]
            self._covered.append(delivery._replace(rows=rows, ordinal=first))

    def _flush_to(
        self, delivery: Delivery, first: int, following: int, expires: float | None
    ) -> list[LaneMessage]:
        self._cover(delivery, first, following)
        return self.flush(expires)

    @property
    def is_empty(self) -> bool:
        """Whether everything that was added has left."""
        return not self._covered

    def _put(
        self,
        delivery: Delivery,
        ordinal: int,
        row: bytes,
        place: Place | int,
        expires: float | None,
    ) -> None:
        """Add one change of a delivery to its lane, whose entry may be full."""
        key, size = place if isinstance(place, int) else place.key, len(row)
        number, most = key % self._form.lanes, self._form.transport.entry_changes
        lane = self._lanes.get(number)
        if lane is None:
            lane = self._lanes[number] = _Lane()
        elif lane.places and (lane.size + size > _ENTRY_BYTES or len(lane.places) >= most):
            self._full.append(self._encoded(number, lane, expires))
            lane = self._lanes[number] = _Lane()
        lane.add_row(delivery, ordinal, row, place)

    def flush(self, expires: float | None) -> list[LaneMessage]:
        """Return the message with what has been added, if anything has, and forget it."""
        if not self._covered:
            return []
        self._distribute(expires)
        if self._coalescer is not None:
            for delivery, place in self._coalescer.take():
                self._put(delivery, delivery.ordinal, delivery.rows[0], place, expires)
        pushes = self._full + [self._encoded(*lane, expires) for lane in self._lanes.items()]
        message = LaneMessage(self._form, pushes, covered_by(self._covered))
        self._lanes, self._full, self._covered, self._size, self._count = {}, [], [], 0, 0
        return [message]

    def _barrier(
        self, delivery: Delivery, lanes: Sequence[int], expires: float | None
    ) -> LaneMessage:
        text = payload.encode([delivery])
        text = lane_entries.encode(text, [], expires, self._form.again, lanes[0])
        return LaneMessage(self._form, [(0, 1, text)], covered_by([delivery]), lanes)

    def _encoded(self, number: int, lane: _Lane, expires: float | None) -> tuple[int, int, str]:
        text = payload.encode_picked(lane.picked)
        text = lane_entries.encode(text, lane.places, expires, self._form.again)
        return number, len(lane.places), text

    def lanes_of(self, delivery: Delivery) -> list[int]:
        """Return the lane of each change, and of one that crosses several the first of them."""
        count = self._form.lanes
        _, place, _ = self._placer(delivery.table, delivery.number)
        lanes = []
        for row in delivery.rows:
            placed = place(row)
            crossed = barrier_lanes(placed, count)
            lanes.append(crossed[0] if placed is None or crossed else placed.key % count)
        return lanes

    def _form_for(self, number: int, key: Key) -> LaneForm:
        """Return lanes for a table that has another key than when the session began, or again that.

        Its changes may go to other lanes than earlier ones of the same row. They have another
        layout, so they are pushed when the lanes are empty.
        """
        keys = self._first_form.keys[number]
        if not self._first_form.allows(number, key):
            keys = frozenset([key])
        assert keys is not None
        return self._form.with_keys(number, keys)

    def _placer(self, table: Table, number: int) -> tuple[Key, Placer, Hashes | None]:
        found = self._placers.get((table, number))
        if found is None:
            if len(self._placers) >= 10_000:  # a table has a new description after each ALTER
                self._placers.clear()
            columns, seed = self._columns[number], seed_of(table, self._patterns.get(number))
            place = placer(table, columns, seed=seed)
            found = key_of(table, columns), place, hashes(table, columns, seed)
            self._placers[table, number] = found
        return found


def _continues(run: Delivery, delivery: Delivery, ordinal: int) -> bool:
    """Return whether the rows of a delivery from an ordinal on follow those of a run."""
    return (
        run.table is delivery.table
        and run.transaction is delivery.transaction
        and run.ordinal + len(run.rows) == ordinal
        and (run.part, run.number, run.shift) == (delivery.part, delivery.number, delivery.shift)
    )


def barrier_lanes(place: Place | None, lanes: int) -> Sequence[int]:
    """Return the lanes that must be empty up to a change before it is handled, if several."""
    if place is None:
        return range(lanes)
    crossed = {place.key % lanes, place.old % lanes}
    return sorted(crossed) if len(crossed) > 1 else ()
