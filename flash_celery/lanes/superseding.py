"""`change.superseded`: whether a later change of a dead letter's ordering key has been handled.

A drain notes the changes of a dead letter beside their lane. A drain that handles a later change
of the same table with an equal ordering key marks them there. Equal keys of different tables share
a lane, but may be those of different things: the order 1 of each tenant, for example. The task of
a dead letter that is retried looks there before it calls the handler.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ..changes.change import Change, Changes, Truncate
from ..changes.payload import row_of
from ..changes.rows import Table
from ..errors import PublishError
from ..escaping import escaped
from ..handlers.subscriptions import Subscription
from ..messages.lane_messages import barrier_lanes
from ..messages.lane_placing import Place, Placer, placer, seed_of, strong_digest
from ..publishing.brokers.lane_letters import LaneLetters, Noted
from . import connection

try:
    import redis
except ImportError:  # with another broker, whose workers note nothing
    redis = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class Superseding:
    """The dead letters that the changes of one drain become or supersede.

    Args:
        letters: Those of the handler's lanes.
        source: The server and the slot.
        lane: The lane.
        subscriptions: The subscriptions of the handler.
    """

    def __init__(
        self,
        letters: LaneLetters,
        source: str,
        lane: int,
        subscriptions: Sequence[Subscription],
    ) -> None:
        self._letters = letters
        self._source = source
        self._lane = lane
        self._columns = {
            each.number: each.ordered.by for each in subscriptions if each.ordered is not None
        }
        self._patterns = {each.number: each.pattern for each in subscriptions}
        self._placers: dict[tuple[Table, int], tuple[Placer, Placer]] = {}
        #: The notes beside lanes, as far as they were read.
        self._found: dict[int, dict[str, Noted]] = {}
        self._lanes: int | None = None
        #: Whether this drain has made dead letters.
        self.has_noted = False

    def note(self, changes: Sequence[Change]) -> Any:
        """Note changes that are about to become a dead letter.

        Returns:
            What their task has to know to look them up when it is retried, in JSON; None if they
            have no ordering key, or cannot be noted.
        """
        lanes: set[int] = set()
        letters: dict[str, Noted] = {}
        try:
            for change in changes:
                places = self._places(change)
                position = change._position
                if places is None or position is None:
                    return None
                lane, key = places
                lanes |= self._crossed(lane)
                at, table = tuple(map(int, position)), change._source.full_name
                letters[change.id] = Noted(at, table, frozenset(key))
            self._letters.note(lanes, letters)
            self.has_noted = True
            for number in lanes:
                self._found.pop(number, None)
        except redis.RedisError as error:
            logger.warning("Later changes will not be seen to supersede a dead letter: %s", error)
            return None
        return [self._source, sorted(lanes)]

    def handled(self, changes: Sequence[Change]) -> None:
        """Mark the dead letters that changes supersede which were handled."""
        superseded: dict[int, set[str]] = {}
        for change in changes:
            for lane, letter in self._superseded_by(change):
                superseded.setdefault(lane, set()).add(letter)
            if (
                self._noted(self._lane).pop(change.id, None) is not None
            ):  # its dead letter could not be stored
                self._letters.forget([self._lane], [change.id])
        for lane, letters in superseded.items():
            self._letters.supersede(lane, letters)
            for letter in letters:
                self._found[lane][letter] = replace(self._found[lane][letter], superseded=True)

    def _superseded_by(self, change: Change) -> Iterator[tuple[int, str]]:
        places, position = self._places(change), change._position
        table = change._source.full_name
        if isinstance(change, Truncate):
            lanes, keys = set(range(self._number_of_lanes)), None
        elif places is not None:
            lanes, keys = self._crossed(places[0]), set(places[1])
        else:  # it has no ordering key, or an unknown one
            return
        for lane in lanes:
            for letter, noted in self._noted(lane).items():
                same = noted.table == table and (keys is None or keys & noted.keys)
                later = position is None or position > noted.position
                if same and later and not noted.superseded:
                    yield lane, letter

    def _places(self, change: Change) -> tuple[Place, Place] | None:
        """Return the place of a change, and the same with digests that are as good as the keys."""
        table, number = change._source, change.number
        found = self._placers.get((table, number))
        if found is None:
            columns, seed = self._columns.get(number), seed_of(table, self._patterns.get(number))
            found = placer(table, columns, seed=seed), placer(table, columns, strong_digest)
            self._placers[table, number] = found
        row = row_of(change)
        lane, key = (place(row) for place in found)
        return None if lane is None or key is None else (lane, key)

    def _crossed(self, place: Place) -> set[int]:
        if place.key == place.old:
            return {self._lane}
        return set(barrier_lanes(place, self._number_of_lanes)) or {self._lane}

    def _noted(self, lane: int) -> dict[str, Noted]:
        if lane not in self._found:
            self._found[lane] = self._letters.find(lane)
        return self._found[lane]

    @property
    def _number_of_lanes(self) -> int:
        if self._lanes is None:
            self._lanes = self._letters.lanes()
        return self._lanes


@contextmanager
def retried(task: Any, noted: Any, arguments: Iterable[Any]) -> Iterator[None]:
    """Tell the changes of a dead letter that is retried whether they are superseded.

    If the block raises nothing, their notes are removed.

    Args:
        task: The task.
        noted: The result of `Superseding.note`.
        arguments: The arguments of the task.
    """
    changes = list(_changes_in(arguments))
    handled = None
    try:
        source, lanes = noted
        lanes = [int(lane) for lane in lanes]
        store = connection.store(task.app, str(source), str(task.name))
        letters = LaneLetters(store.client, store.key)
        for change in changes:
            superseded = letters.superseded(lanes, change.id)
            change._call = change._call._replace(superseded=superseded)
        handled = partial(letters.handled, lanes, [change.id for change in changes])
    except (PublishError, redis.RedisError, TypeError, ValueError) as error:
        logger.warning("It is unknown whether %s is superseded: %s", task.name, escaped(str(error)))
    yield
    if handled is not None and changes:
        try:
            handled()
        except redis.RedisError as error:
            logger.warning("Earlier dead letters will not be seen to be superseded: %s", error)


def _changes_in(arguments: Iterable[Any]) -> Iterator[Change]:
    for argument in arguments:
        if isinstance(argument, Change):
            yield argument
        elif isinstance(argument, Changes):
            yield from argument
