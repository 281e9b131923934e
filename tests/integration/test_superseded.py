"""What is noted of dead letters beside their lanes, and which later changes supersede them."""

import pytest
import redis

from flash_celery import Ordered, on_change, testing
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.lanes.superseding import Superseding
from flash_celery.publishing.brokers import lane_letters
from flash_celery.publishing.brokers.lane_letters import LaneLetters, Noted
from flash_celery.publishing.brokers.lane_store import LaneStore
from tests.integration.lane_world import KEY, QUEUE

LANES = 8


@pytest.fixture
def client(valkey):
    with redis.Redis(port=valkey.port, db=9) as client:
        client.flushdb()
        yield client


def configure(client, lanes=LANES):
    names = "_flash.ordered", KEY, f"{lanes} lanes", lanes, QUEUE, "", "{}", False
    assert LaneStore(client, KEY).configure(*names)


@pytest.fixture
def letters(client):
    configure(client)
    return LaneLetters(client, KEY)


@pytest.fixture
def drain(new_app, letters):
    """Makes what a drain of a lane knows of its handler's dead letters."""
    app = new_app(broker_url="memory://")

    @on_change("orders", ordered=Ordered(by="name"))
    @app.task(name="handler")
    def handler(change): ...

    subscriptions = subscriptions_of(app)
    return lambda lane=1: Superseding(letters, "1/slot", lane, subscriptions)


def order(name, number=1):
    """A change, which is committed after those that were made before."""
    return testing.insert("orders", id=number, name=name)


def at(letters, change, lanes=range(LANES)):
    return letters.superseded(lanes, change.id)


def test_dead_letter_is_superseded_by_a_later_change_of_its_key_alone(drain, letters):
    # The hashes of these two, by which they are in one lane, are equal.
    replayed, dead, other = order("plumless"), order("plumless"), order("buckeroo", 2)
    assert drain().note([dead, other]) == ["1/slot", [1]]
    drain().handled([replayed])
    assert (at(letters, dead), at(letters, other)) == (False, False)
    drain().handled([order("plumless", 3)])
    assert (at(letters, dead), at(letters, other)) == (True, False)


def test_dead_letter_is_superseded_by_a_change_of_the_same_drain(drain, letters):
    here, dead = drain(), order("a")
    assert not here.has_noted
    here.note([dead])
    assert here.has_noted
    here.handled([order("b")])
    assert at(letters, dead) is False
    here.handled([order("a")])
    assert at(letters, dead) is True


def test_dead_letters_of_all_lanes_are_superseded_by_a_truncate(drain, letters):
    first, second = order("a"), order("b")
    drain(1).note([first])
    drain(2).note([second])
    drain(3).handled([testing.truncate("orders")])
    assert (at(letters, first), at(letters, second)) == (True, True)


def test_dead_letter_is_not_superseded_by_a_change_of_another_table(drain, letters):
    dead = order("a")
    drain().note([dead])
    later = testing.insert("tenant_2.orders", id=1, name="a")
    drain().handled([later])
    drain().handled([testing.truncate("tenant_2.orders")])
    drain().note([later])
    letters.handled([1], [later.id])
    assert at(letters, dead) is False


def test_dead_letter_is_superseded_by_an_update_that_takes_its_key_away(drain, letters):
    first, second, third = order("a"), order("b"), order("c")
    moved = testing.update("orders", {"id": 1, "name": "a"}, {"id": 1, "name": "b"})
    for lane in range(LANES):  # whichever these keys are in
        drain(lane).note([first, second, third])
    drain().handled([moved])
    assert (at(letters, first), at(letters, second), at(letters, third)) == (True, True, False)


def test_dead_letter_is_superseded_by_a_later_one_that_is_retried(drain, letters):
    first, second, other = order("a"), order("a", 2), order("b", 3)
    drain().note([first, second, other])
    letters.handled([1], [second.id])
    assert [at(letters, change) for change in (first, second, other)] == [True, None, False]
    drain().note([first])  # of a replay
    assert at(letters, first) is True


def test_change_that_is_handled_after_all_is_no_dead_letter(drain, letters):
    """Its dead letter could not be stored, so it was handled again."""
    dead = order("a")
    drain().note([dead])
    drain().handled([dead])
    assert at(letters, dead) is None


def test_dead_letters_are_unknown_in_other_lanes_and_beyond_a_number(
    drain, letters, client, monkeypatch
):
    monkeypatch.setattr(lane_letters, "MOST_LETTERS", 3)
    dead = [order("a", number) for number in range(1, 6)]
    for change in dead:
        drain().note([change])
    assert [at(letters, change) for change in dead] == [None, None, False, False, False]
    assert 0 < client.ttl(f"{KEY}.dead.1") <= 30 * 86_400
    configure(client)  # as each session does
    assert at(letters, dead[-1]) is False
    configure(client, LANES + 1)
    assert [at(letters, change) for change in dead] == [None] * 5


def test_dead_letter_that_is_gone_does_not_come_back(letters):
    letters.supersede(1, ["1:0"])
    assert letters.superseded([1], "1:0") is None
    letters.note([1], {"1:0": Noted((1, 0, 0, 0), "public.t", frozenset({5}))})
    letters.forget([1], ["1:0"])
    letters.supersede(1, ["1:0"])
    assert letters.superseded([1], "1:0") is None
