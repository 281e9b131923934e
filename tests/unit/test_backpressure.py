"""How many messages may go, and who waits."""

import logging

import pytest

from flash_celery.errors import PublishError
from flash_celery.messages.deduplication import NOTHING
from flash_celery.messages.lane_messages import LaneForm, LaneMessage
from flash_celery.messages.task_message import Form, Message
from flash_celery.publishing.backpressure import Backpressure, is_full

FORMS = {queue: Form(queue, "handle", {}, {}) for queue in ("flash", "cleanup")}


def messages(*queues):
    return [Message(FORMS[queue], str(n), str(n), str(n)) for n, queue in enumerate(queues)]


class Queues:
    """Depths that a consumer may lower while the publishing thread waits."""

    def __init__(self, **depths):
        self.depths = depths
        self.taken = []
        self.asked = 0

    def depth(self, queue):
        self.asked += 1
        return self.depths.get(queue, 0)

    def given_up(self, seconds):
        """Each wait takes some away; it is given up when there is nothing to take."""
        if not self.taken:
            return True
        self.depths["flash"] -= self.taken.pop(0)
        return False


def admitted(limit, queues, *wanted):
    return Backpressure(limit, queues.depth).admit(messages(*wanted), queues.given_up)


def test_backpressure_without_a_limit_asks_no_broker():
    queues = Queues(flash=10**6)
    assert admitted(0, queues, *["flash"] * 50) == 50
    assert queues.asked == 0


@pytest.mark.parametrize(
    ("limit", "depth", "wanted", "count"),
    [
        (100, 0, 50, 50),
        (100, 50, 50, 50),  # to the brim
        (100, 95, 5, 5),
        (100, 0, 150, 100),  # the first of them
        (100, 90, 50, 10),
        (100, 91, 50, 0),  # too little is free for a part of them
        (100, 100, 1, 0),
        (100, 200, 1, 0),  # of another publisher
        (1, 0, 5, 1),
        (1, 1, 5, 0),
        (7, 6, 5, 1),
    ],
)
def test_backpressure_fills_a_queue_to_its_limit(limit, depth, wanted, count):
    assert admitted(limit, Queues(flash=depth), *["flash"] * wanted) == count


def test_lanes_are_as_long_as_their_changes_but_a_message_goes_whole():
    form = LaneForm("lanes", "1/slot", "handle", 4, FORMS["flash"])
    lanes = [LaneMessage(form, [(0, 30, ""), (1, 10, "")], NOTHING) for _ in range(4)]
    for depth, count in ((0, 3), (20, 2), (60, 1), (90, 1), (91, 0)):
        queues = Queues(lanes=depth)
        assert Backpressure(100, queues.depth).admit(lanes, queues.given_up) == count


def test_backpressure_waits_until_a_tenth_is_free():
    queues = Queues(flash=100)
    queues.taken = [5, 4, 1, 50]
    assert admitted(100, queues, *["flash"] * 20) == 10
    assert queues.taken == [50]


def test_backpressure_stops_before_the_first_full_queue():
    queues = Queues(flash=0, cleanup=10)
    assert admitted(10, queues, "flash", "flash", "cleanup", "flash") == 2
    assert admitted(10, queues, "cleanup", "flash") == 0


def test_queue_stays_full_while_nothing_is_admitted():
    assert [depth for depth in range(100, 111) if is_full(depth, 109)] == list(range(100, 111))
    assert not is_full(99, 109)
    assert (is_full(0, 1), is_full(1, 1)) == (False, True)


def test_backpressure_raises_if_the_broker_does_not_answer():
    def depth(queue):
        raise PublishError("It is gone.")

    with pytest.raises(PublishError):
        Backpressure(5, depth).admit(messages("flash"), lambda seconds: True)


def test_backpressure_logs_a_pause_and_its_end_once(caplog):
    queues = Queues(flash=10)
    pressure = Backpressure(10, queues.depth)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            queues.depths["flash"], queues.taken = 10, [0, 0, 5]
            assert pressure.admit(messages("flash"), queues.given_up) == 1
    paused, again = (record.getMessage() for record in caplog.records)
    assert "10 messages wait in the queue flash" in paused
    assert "flash_max_queue_length is 10" in paused
    assert "publishing continues" in again
