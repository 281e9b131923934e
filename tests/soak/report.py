"""The table: a line for each kind of fault."""

import re
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from statistics import median

from tests.soak import check
from tests.soak.calls import inversions, overlaps, repeats
from tests.soak.carried import QUEUE, RUN
from tests.soak.faults import FAULTS
from tests.soak.ledger import ORDERED

_HEAD = (
    "fault",
    "times",
    "in flight",
    "lost",
    "not handled",
    "enqueued again",
    "handled again",
    "recovery p50",
    "max",
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "soak.md"
#: Titles of the sections of docs/soak.md.
_TITLES = {"redis": "Valkey", "sentinel": "Valkey, through Sentinel", "rabbitmq": "RabbitMQ"}


def rewrite(text, command, machine, outcomes):
    """Return docs/soak.md with these results instead of its own."""
    block = [f"`{command}` on {', '.join(f'{name} {value}' for name, value in machine.items())}."]
    for outcome in outcomes:
        block += ["", f"### {_TITLES[outcome.broker]}", ""]
        table, remarks = split(lines(outcome))
        block += [*table, "", *(f"- {remark}" for remark in remarks)]
    text, replaced = re.subn(
        r"(<!-- soak -->\n).*(<!-- /soak -->)",
        lambda match: "\n".join([match[1], *block, "", match[2]]),
        text,
        flags=re.DOTALL,
    )
    if not replaced:
        raise ValueError("docs/soak.md has no block for the results")
    return text


def split(report):
    """Return the lines of the table, and the remarks below it."""
    report = list(report)
    blank = report.index("")
    return report[:blank], report[blank + 1 :]


def lines(outcome):
    """Markdown, and then what else is to be said."""
    ledger = outcome.ledger
    rows = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1))]
    lost = _attributed(outcome, _times(ledger, check.lost(ledger)), lambda strike: True)
    missing = [i for handler in ledger.handled for i in check.unhandled(ledger, handler)]
    missing = _attributed(
        outcome, _times(ledger, missing), lambda strike: strike.fault.loses_on_redis
    )
    enqueued = _attributed(outcome, check.again(ledger.enqueued))
    handled = _attributed(outcome, (at for s in ledger.handled.values() for at in check.again(s)))
    flying = _InFlight(ledger)
    for fault in FAULTS:
        strikes = [strike for strike in outcome.strikes if strike.fault is fault]
        if not strikes:
            continue
        seconds = [strike.recovery for strike in strikes if strike.recovery is not None]
        counts = (
            len(strikes),
            sum(flying.at(strike.at, fault.recovered) for strike in strikes),
            lost[fault.name],
            missing[fault.name],
            enqueued[fault.name],
            handled[fault.name],
        )
        times = [f"{median(seconds):.1f} s", f"{max(seconds):.1f} s"] if seconds else ["", ""]
        rows.append((fault.name, *(f"{count:,}" for count in counts), *times))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    yield from ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
    yield ""
    yield from _remarks(outcome)


def _remarks(outcome):
    ledger = outcome.ledger
    transactions = len({lsn for lsn, _ in ledger.committed})
    yield (
        f"{len(ledger.committed):,} changes of {transactions:,} transactions in "
        f"{outcome.seconds:.0f} s; {len(check.lost(ledger))} lost, "
        f"{len(check.misordered(ledger.enqueued))} out of order; handled "
        + ", ".join(f"{len(seen):,} ({name})" for name, seen in ledger.handled.items())
    )
    missing = {handler: len(check.unhandled(ledger, handler)) for handler in ledger.handled}
    if any(missing.values()):
        yield "not handled: " + ", ".join(
            f"{count:,} changes of {handler}" for handler, count in missing.items()
        )
    if outcome.lane_watch is not None:
        yield from _order(outcome)
    if outcome.backfills:
        yield f"{outcome.backfills} backfills of a copy"
    if outcome.carried is not None:
        yield _carried(outcome)
    if outcome.worker_ended:
        yield f"Celery workers ended {len(outcome.worker_ended)} times by themselves"
    if outcome.starved:
        yield (
            f"{len(outcome.starved)} times a replication worker reconnected because it, or "
            "PostgreSQL, got no time from the machine for seconds, or because of a fault; that "
            "explains what is enqueued again on RabbitMQ"
        )
    if outcome.vitals:
        yield _vitals(outcome.vitals)


def _carried(outcome):
    """What became of the tasks that transactions carried."""
    found = outcome.carried
    again = [sum(1 for _ in found.again(queue)) for queue in (QUEUE, RUN)]
    return (
        f"{len(found.sent):,} tasks of transactions that were committed, and {outcome.undone:,} of "
        f"others; {len(found.missing(QUEUE))} lost, {len(found.strangers)} of others enqueued, "
        f"{len(found.misordered)} out of order, {len(found.missing(RUN))} lost by Celery's "
        f"consumer; {again[0]:,} enqueued again, {again[1]:,} ran again"
    )


def _order(outcome):
    """What became of the promises to ordered handlers."""
    calls, harms = outcome.ledger.calls, outcome.harms
    wrong, beside, reasons = 0, 0, Counter()
    for handler in ORDERED:
        found = [call for call in calls if call.handler == handler]
        wrong += len(inversions(found, harms))
        beside += len(overlaps(found, harms))
        reasons.update(why or "for no reason" for _, _, why in repeats(found, harms))
    longest = outcome.lane_watch.longest
    again = ", ".join(f"{count:,} because {why}" for why, count in reasons.most_common())
    yield (
        f"{len(calls):,} calls of ordered handlers; {wrong} changes begun after a later one of "
        f"their key, {beside} beside another of their key; handled again: {again or 'none'}"
    )
    if outcome.effects is not None:
        found = outcome.effects
        yield (
            f"{len(found.rows):,} effects of a handler with `once=`: {len(found.missing)} missing, "
            f"{len(found.repeated)} twice, {len(found.misplaced)} out of order"
        )
    shown = ", ".join(f"{seconds:.0f} s ({kind})" for kind, seconds in sorted(longest.items()))
    yield f"lanes with changes, without a holder or progress: at most {shown or '0 s'}"


def _vitals(vitals):
    pid, _ = Counter(vital.pid for vital in vitals).most_common(1)[0]
    life = [vital for vital in vitals if vital.pid == pid]
    # It has read its modules by then.
    first, last = life[len(life) // 4], life[-1]
    return (
        f"a replication worker took at most {max(v.memory for v in vitals) / 1e6:.0f} MB and had "
        f"{max(v.files for v in vitals)} files open; the longest life ({last.at - life[0].at:.0f} s"
        f") went from {first.memory / 1e6:.0f} to {last.memory / 1e6:.0f} MB, from {first.files} "
        f"to {last.files} files"
    )


def _attributed(outcome, times, guilty=None):
    """How many of the times belong to each kind: to the strike they follow.

    With `guilty`: to the first strike of this sort that was not over then, or the last of all.
    """
    counts = Counter()
    starts = [strike.at for strike in outcome.strikes]
    for at in times:
        place = bisect_right(starts, at) - 1
        if guilty is not None:
            those = (
                n for n, fault in enumerate(outcome.strikes) if fault.over >= at and guilty(fault)
            )
            place = next(those, len(starts) - 1)
        if place >= 0:
            counts[outcome.strikes[place].fault.name] += 1
    return counts


def _times(ledger, identities):
    return [ledger.committed[identity].at for identity in identities]


class _InFlight:
    """How many changes were committed and had not arrived, at a time."""

    def __init__(self, ledger):
        self._committed = sorted(commit.at for commit in ledger.committed.values())
        handled = ledger.handled
        self._arrived = {
            "enqueued": _first(ledger.enqueued),
            "each": _first(handled["each"] + handled["many"]),
            "keyed": _first(handled.get("keyed", []) + handled.get("grouped", [])),
        }

    def at(self, time, where):
        where = "enqueued" if where == "carried" else where
        arrived = bisect_right(self._arrived[where], time)
        return max(0, bisect_right(self._committed, time) - arrived)


def _first(sightings):
    first = {}
    for sighting in sightings:
        first[sighting.identity] = min(sighting.at, first.get(sighting.identity, sighting.at))
    return sorted(first.values())
