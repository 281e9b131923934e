"""Calls of ordered handlers, and what must not be among them.

The notes of all processes are appended to one file, so the places of two lines say which came
first.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

#: Of a transaction's commit, and of the change in it: what `change.id` is made of.
Identity = tuple[int, int]
#: Seconds of a lease.
LEASE = 5.0
#: The key of a TRUNCATE, which concerns every key.
ALL = None
#: Seconds before the end of a process in which it may have made calls that it had not committed:
#: the longest call, and some.
_UNCOMMITTED = 10.0
#: Seconds between the wake-up of a frozen process and what it does before it looks at its lease.
_AWAKE = 2.0


@dataclass(eq=False)
class Call:
    """A call of an ordered handler: the changes of one lane that came together."""

    handler: str
    pid: int
    parent: int
    began: float
    retries: int
    #: What it is about: the keys of each change, by its identity.
    keys: dict[Identity, list]
    ended: float | None = None
    #: Whether it ended with a retry.
    again: bool = False


@dataclass
class Harms:
    """What was done to processes and to what they had stored."""

    #: The intervals in which processes ended that were killed or got a signal.
    ended: dict[int, tuple[float, float]] = field(default_factory=dict)
    #: Processes that stood still: from when to when.
    frozen: list[tuple[int, float, float]] = field(default_factory=list)
    #: From when to when a call may not have been committed, because of its connection or broker.
    unreachable: list[tuple[float, float]] = field(default_factory=list)
    #: When Redis lost everything, and lanes were filled again with changes that were handled.
    emptied: list[float] = field(default_factory=list)
    #: Whether less is promised, as on RabbitMQ: several changes of a key may come again in order
    #: if they were enqueued again, or if the broker was away; and a call goes on beside the next
    #: one if its worker has lost the broker.
    weak: bool = False
    #: Changes that were enqueued again, as far as the witness has seen it.
    enqueued_again: set[Identity] = field(default_factory=set)
    #: From when to when a message may have been published again, because it was not confirmed.
    unconfirmed: list[tuple[float, float]] = field(default_factory=list)
    #: When changes were committed.
    committed_at: dict[Identity, float] = field(default_factory=dict)

    def died(self, call, since, until):
        """Whether the process of a call ended in this time."""
        times = [self.ended[pid] for pid in (call.pid, call.parent) if pid in self.ended]
        return any(first <= until and last >= since for first, last in times)

    def stood_still(self, call, until):
        """Whether the process of a call was frozen since it looked at its lease."""
        return any(
            pid in (call.pid, call.parent) and begin <= until and end >= call.began - _AWAKE
            for pid, begin, end in self.frozen
        )

    def excuses(self, call, until):
        """Whether a call may be out of order, or beside another: its lease may have been lost."""
        emptied = any(at <= call.began <= at + LEASE for at in self.emptied)
        cut_off = self.weak and self.cut_off(call, until)
        return emptied or cut_off or self.stood_still(call, until)

    def cut_off(self, call, until):
        """Whether the broker was away during a call, or so soon after that nothing was noted."""
        return any(begin <= until and end >= call.began for begin, end in self.unreachable)

    def published_again(self, identity, before, after):
        """Whether a change may have been enqueued again since it was handled, or just before."""
        since, until = self.committed_at.get(identity, before.began), _committed(before, after)
        return self.weak and (
            identity in self.enqueued_again
            or any(begin <= until and end >= since for begin, end in self.unconfirmed)
        )


def inversions(calls, harms):
    """Changes that were begun after a later one of their key."""
    wrong: set[Identity] = set()
    known: dict[Identity, Call] = {}
    latest: dict = {}
    emptied = sorted(harms.emptied)
    for call in calls:
        if emptied and call.began > emptied[0] + LEASE:
            # From here on the lanes have what was filled in again.
            emptied.pop(0)
            latest = {}
        excused = harms.excuses(call, call.ended or call.began)
        for identity, keys in call.keys.items():
            concerned = latest.keys() if ALL in keys else latest.keys() & {*keys, ALL}
            before = known.get(identity)
            again = before is not None and (
                harms.published_again(identity, before, call)
                or (harms.weak and harms.cut_off(before, _committed(before, call)))
            )
            if not (excused or again) and any(identity < latest[key] for key in concerned):
                wrong.add(identity)
            known[identity] = call
        _remember(latest, call)
    return wrong


def _remember(latest, call):
    """Note of each key the last change; of a call with several, the first, as it may come again."""
    first = {}
    for identity, keys in sorted(call.keys.items()):
        for key in keys:
            first.setdefault(key, identity)
    for key, identity in first.items():
        latest[key] = max(latest.get(key, (0, 0)), identity)


def overlaps(calls, harms):
    """Changes that were begun while a call with one of their keys was under way."""
    wrong = set()
    under_way: list[Call] = []
    for call in calls:
        # Places in the file are those of the beginnings; an end is known by its time.
        under_way = [c for c in under_way if c.ended is None or c.ended > call.began]
        for other in [c for c in under_way if _share_a_key(c, call)]:
            if other.ended is None and harms.died(other, other.began, call.began):
                under_way.remove(other)
            elif not (harms.excuses(other, call.began) or harms.excuses(call, call.began)):
                wrong |= call.keys.keys()
        under_way.append(call)
    return wrong


def _share_a_key(one, other):
    ours, theirs = ({key for keys in c.keys.values() for key in keys} for c in (one, other))
    return ALL in ours or ALL in theirs or bool(ours & theirs)


def repeats(calls, harms) -> Iterator[tuple[Identity, float, str | None]]:
    """Changes that came another time, when, and which harm explains it."""
    of_change = defaultdict(list)
    for call in calls:
        for identity in call.keys:
            of_change[identity].append(call)
    for identity, found in of_change.items():
        for before, after in pairwise(found):
            if not (before.again and after.retries > before.retries):
                why = _explanation(before, after, harms)
                if why is None and harms.published_again(identity, before, after):
                    why = "it was enqueued again"
                yield identity, after.began, why


def _committed(before, after):
    """When a call of changes that came again must have been committed at the latest."""
    return min(after.began, (before.ended or after.began) + _UNCOMMITTED)


def _explanation(before, after, harms):
    until = after.began
    latest = _committed(before, after)
    if any(before.began <= at <= until for at in harms.emptied):
        return "Redis was emptied"
    if harms.died(before, before.began, latest):
        return "its process was ended"
    if harms.stood_still(before, until):
        return "its process was frozen"
    if harms.cut_off(before, latest):
        return "the broker was away"
    return None


def vanished(calls, harms):
    """Changes of calls that never ended, though nothing ended their processes."""
    return {
        identity
        for call in calls
        if call.ended is None and not harms.died(call, call.began, float("inf"))
        for identity in call.keys
    }
