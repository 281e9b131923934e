"""The thread that renews leases and enforces time limits."""

import gc
import threading
import weakref

from flash_celery.lanes import alarms
from flash_celery.messages.deduplication import now


class Changes:
    """What a call that has a time limit holds."""

    def reached(self):
        raise AssertionError("no limit was reached")


def test_alarms_of_calls_that_have_ended_keep_nothing():
    """Each change has some, and limits may be hours away."""
    held = []
    for _ in range(5000):
        changes = Changes()
        held.append(weakref.ref(changes))
        alarms.call_at(now() + 3600, changes.reached).cancel()
    del changes
    gc.collect()
    assert not [each for each in held if each() is not None]
    assert len(alarms._alarms[1]._due) < 500


def test_alarms_ring_in_their_order_among_cancelled_ones():
    rang, last = [], threading.Event()
    for number in (3, 1, 2):
        alarms.call_at(now() + 0.1 * number, lambda number=number: rang.append(number))
        for _ in range(300):
            alarms.call_at(now() + 0.05, rang.clear).cancel()
            alarms.call_at(now() + 60, rang.clear).cancel()
    alarms.call_at(now() + 0.4, last.set)
    assert last.wait(60)
    assert rang == [1, 2, 3]
