"""The reckoning: what was enqueued and handled, against what PostgreSQL has committed."""

from collections import Counter

from tests.soak import calls, carried
from tests.soak.ledger import ORDERED

#: Bounds for a replication worker: bytes, and open files.
MEMORY, FILES = 200_000_000, 64


def complete(stage):
    """Whether everything known to be committed has been enqueued and handled."""
    ledger = stage.ledger
    if stage.effects is not None:
        stage.effects.read()
        if stage.effects.missing:
            return False
    if stage.copy.differing:
        return False
    stage.carried.read()
    if any(map(stage.carried.missing, stage.carried.seen)):
        return False
    return not lost(ledger) and not any(unhandled(ledger, handler) for handler in ledger.handled)


def lost(ledger):
    """Committed and never enqueued."""
    return ledger.committed.keys() - {sighting.identity for sighting in ledger.enqueued}


def unhandled(ledger, handler):
    """Committed and enqueued, and never delivered to a handler."""
    wanted = {i for i, commit in ledger.committed.items() if ledger.wants(handler, commit)}
    return wanted - {sighting.identity for sighting in ledger.handled[handler]} - lost(ledger)


def everything(stage, outcome):
    """Each thing that must not be, in a sentence. Lists of identities are left in the folder."""
    ledger = stage.ledger
    problems = [
        *_enqueued(stage),
        *_handled(stage, outcome),
        *_ordered(stage),
        *_rows(stage),
        *_carried(stage, outcome),
        *_named(stage, "rows of the copy are not those of the table", stage.copy.differing),
        *(
            f"{process.name} ended by itself with {code}"
            for process in (*stage.replicates, *stage.applications)
            for _, code, _ in process.ends
        ),
        *(
            f"{type(witness).__name__} failed: {witness.failure!r}"
            for witness in stage.witnesses
            if witness.failure is not None
        ),
        *_vitals(stage.supervisor.vitals),
    ]
    if not ledger.committed:
        problems.append("nothing was committed: nothing is proved")
    return problems


def _enqueued(stage):
    ledger = stage.ledger
    yield from _named(stage, "never enqueued", lost(ledger))
    identities = {sighting.identity for sighting in ledger.enqueued}
    yield from _named(stage, "enqueued and never committed", identities - ledger.committed.keys())
    yield from _named(stage, "enqueued before an earlier one", misordered(ledger.enqueued))
    yield from _named(stage, "enqueued twice and not the same", unequal(ledger.enqueued))


def misordered(sightings):
    """Those whose first time came after a later change's."""
    latest, known, late = (0, 0), set(), set()
    for sighting in sightings:
        if sighting.identity in known:
            continue
        known.add(sighting.identity)
        if sighting.identity < latest:
            late.add(sighting.identity)
        latest = max(latest, sighting.identity)
    return late


def unequal(sightings):
    """Changes that were delivered twice, with different contents."""
    first = {}
    return {s.identity for s in sightings if first.setdefault(s.identity, s.checksum) != s.checksum}


def _handled(stage, outcome):
    ledger = stage.ledger
    checksums = {sighting.identity: sighting.checksum for sighting in ledger.enqueued}
    for handler, sightings in ledger.handled.items():
        identities = {sighting.identity for sighting in sightings}
        unknown = identities - ledger.committed.keys()
        yield from _named(stage, f"delivered to {handler} and never committed", unknown)
        other = {
            s.identity for s in sightings if checksums.get(s.identity, s.checksum) != s.checksum
        }
        yield from _named(stage, f"delivered to {handler} otherwise than enqueued", other)
        missing = unhandled(ledger, handler)
        if missing and not excused(outcome, handler):
            yield from _named(stage, f"enqueued and never handled by {handler}", missing)
    # A task of one change has the same id each time.
    for handler in {"each", "keyed"} & ledger.handled.keys():
        tasks = {}
        alone = ledger.handled[handler]
        others = {s.identity for s in alone if tasks.setdefault(s.identity, s.task_id) != s.task_id}
        yield from _named(stage, f"handled again by {handler} under another task id", others)


def _ordered(stage):
    """What ordered handlers promise."""
    harms = stage.harms
    for handler in ORDERED:
        found = [call for call in stage.ledger.calls if call.handler == handler]
        repeats = calls.repeats(found, harms)
        named = {
            "begun after a later one of its key": calls.inversions(found, harms),
            "begun beside one of its key": calls.overlaps(found, harms),
            "in a call that vanished": calls.vanished(found, harms),
            "handled again for no reason": {i for i, _, why in repeats if not why},
        }
        for what, identities in named.items():
            yield from _named(stage, f"{what} ({handler})", identities)
    if stage.effects is not None:
        yield from _named(stage, "without an effect of booked", stage.effects.missing)
        yield from _named(stage, "with two effects of booked", stage.effects.repeated)
        yield from _named(stage, "with a late effect of booked", stage.effects.misplaced)
    for lane, kind in sorted(stage.lane_watch.stalls):
        yield f"the lane {lane} stood still ({kind})"


def _carried(stage, outcome):
    """What is promised of the tasks of transactions."""
    found = stage.carried
    found.read()
    yield from _named(stage, "tasks never enqueued", found.missing(carried.QUEUE))
    yield from _named(stage, "tasks of transactions rolled back", found.strangers)
    yield from _named(stage, "tasks enqueued before an earlier one", found.misordered)
    missing = found.missing(carried.RUN)
    if len(missing) > _may_be_lost(outcome):
        yield from _named(stage, "tasks that never ran", missing)
    enqueued, run = again_after(outcome)
    again = found.unexplained(carried.QUEUE, enqueued)
    yield from _named(stage, "tasks enqueued again for no reason", again)
    yield from _named(
        stage, "tasks that ran again for no reason", found.unexplained(carried.RUN, run)
    )


def again_after(outcome):
    """From when to when a task may have been enqueued again, and may have begun to run again."""
    harms = outcome.harms
    enqueued = harms.unconfirmed if harms.weak else [(at, at) for at in harms.emptied]
    ended = [(at - 10.0, at) for at in outcome.worker_ended]
    of_workers = [(s.at, s.over) for s in outcome.strikes if s.fault.recovered == "each"]
    lost = [(s.at, s.over) for s in outcome.strikes if s.fault.loses_on_redis]
    return enqueued, [*enqueued, *ended, *of_workers, *lost]


def excused(outcome, handler):
    """Whether Celery's consumer can have lost what `handler` has not got: Redis only, and a
    message for each time that it was killed, or its Redis was, or refused its bookkeeping. The
    sweep of lanes brings back those of ordered handlers."""
    from tests.soak.project import BATCH

    if outcome.broker == "rabbitmq" or handler in ORDERED:
        return False
    most = _may_be_lost(outcome) * (BATCH if handler == "many" else 1)
    return len(unhandled(outcome.ledger, handler)) <= most


def _may_be_lost(outcome):
    """How many messages Celery's consumer may have lost."""
    if outcome.broker == "rabbitmq":
        return 0
    times = sum(strike.fault.loses_on_redis for strike in outcome.strikes)
    return times + len(outcome.worker_ended)


def _rows(stage):
    """Compare the rows that the changes lead to with the tables."""
    for table, rows in stage.ledger.rows.items():
        cursor = stage.execute(f"SELECT to_jsonb(t) FROM {table} AS t")
        there = {row["id"]: row for (row,) in cursor}
        if rows != there:
            differing = {
                key for key in rows.keys() | there.keys() if rows.get(key) != there.get(key)
            }
            yield from _named(stage, f"rows of {table} are not what the changes say", differing)


def _vitals(vitals):
    if not vitals:
        return
    memory, files = max(v.memory for v in vitals), max(v.files for v in vitals)
    if memory > MEMORY:
        yield f"a replication worker took {memory / 1e6:.0f} MB"
    if files > FILES:
        yield f"a replication worker had {files} files open"


def _named(stage, what, identities):
    if identities:
        path = stage.folder / f"{what.replace(' ', '-')}.txt"
        path.write_text("\n".join(str(identity) for identity in sorted(identities)) + "\n")
        yield f"{len(identities):,} {what}: {path}"


def twice(sightings):
    """The changes that came more than once."""
    seen = Counter(sighting.identity for sighting in sightings)
    return {identity for identity, count in seen.items() if count > 1}


def again(sightings):
    """When a change came for another time."""
    seen = Counter()
    for sighting in sightings:
        seen[sighting.identity] += 1
        if seen[sighting.identity] > 1:
            yield sighting.at
