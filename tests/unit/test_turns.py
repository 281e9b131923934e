"""A backfill that stands still holds up no other."""

from datetime import datetime, timezone

import pytest

from flash_celery.backfill.requests import RequestedBackfill
from flash_celery.worker.turns import Turns

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


class World:
    """The backfills of a source, by name; a name begins with its handler's queue."""

    def __init__(self, *names):
        self.time, self.chunks = 1000.0, dict.fromkeys(names, 0)
        #: Why those stand still that do.
        self.error = "an error"
        self.turns = Turns(lambda: self.time)
        self.turns.queues_of = lambda backfill: [backfill.handler[0]]

    def doing(self, seconds=0.0, going_on=""):
        """What is done after some seconds, in which some of them get a chunk confirmed."""
        for _ in range(max(int(seconds), 1)):
            self.time += seconds / max(int(seconds), 1)
            for name in going_on.split():
                self.chunks[name] += 1
            chosen = [each.id for each in self.turns.choose(list(map(self.backfill, self.chunks)))]
            self.turns.doing = chosen
        return " ".join(chosen)

    def backfill(self, name):
        rate = 5.0 if name.endswith("limited") else None
        rows = [rate, 5000, 0, NOW, None, NOW, self.chunks[name], 0, {}, None, self.error]
        return RequestedBackfill(name, "slot", name, "table", "requested", *rows)


def test_backfills_of_different_queues_are_done_together():
    assert World("a1", "b1", "a2", "c1").doing() == "a1 b1 c1"
    assert World(*"abcdefg").doing() == "a b c d"


def test_next_of_a_queue_follows_when_one_has_ended():
    world = World("a1", "a2")
    assert world.doing(100, going_on="a1") == "a1"
    del world.chunks["a1"]
    assert world.doing() == "a2"


def test_one_that_stands_still_gives_its_turn_to_another():
    world = World("a1", "a2")
    assert world.doing(9) == "a1"
    assert world.doing(3) == "a2"
    assert world.doing(300, going_on="a2") == "a2"
    del world.chunks["a2"]
    assert world.doing() == "a1"


def test_one_that_stands_still_gives_way_to_a_new_one_at_once():
    world = World("a1")
    assert world.doing(3000) == "a1"
    world.chunks["a2"] = 0
    assert world.doing() == "a2"


def test_one_that_goes_on_keeps_its_turn():
    world = World("a2")
    assert world.doing(5, going_on="a2") == "a2"
    world.chunks = {"a1": 0, **world.chunks}  # it was paused, and is resumed
    assert world.doing(100, going_on="a2") == "a2"


@pytest.mark.parametrize("names", ["a1 a2", "a1 a2 a3", "a b c d e"])
def test_turns_become_longer_if_all_stand_still(names):
    """A session begins for each."""
    world, changes, before = World(*names.split()), 0, set()
    for _ in range(3600):
        doing = set(world.doing(1).split())
        changes += doing != before
        before = doing
    assert 5 < changes < 50


def test_backfill_may_stand_still_for_weeks():
    world = World("a1")
    for _ in range(2000):
        world.time += 600
        assert world.doing(1) == "a1"


def test_those_with_a_rate_hold_up_none_without():
    limited = [f"{queue} limited" for queue in "efghijklmnopqrstuvw"]
    world = World(*limited, *"abcd")
    assert world.doing() == " ".join([*limited[:16], *"abcd"])


def test_one_without_room_gives_way_only_to_one_that_may_have_room():
    world = World("a1", "a2")
    world.error = None
    assert world.doing(3000) == "a1"
    world = World(*"abcde")
    world.error = None
    assert world.doing(9) == "a b c d"
    assert "e" in world.doing(3).split()
