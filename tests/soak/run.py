"""One run: writers and faults for so long, then everything comes to rest, and is checked."""

import random
import re
import time
from dataclasses import dataclass, field

from example_project.servers import wait_until
from tests.soak import check
from tests.soak.faults import FAILOVER, FAULTS
from tests.soak.stage import Stage, Stalled

#: Seconds after the last write in which everything must have been handled, as long as there is
#: progress.
_REST = 60.0


@dataclass
class Strike:
    """A fault, and how it went; times are those of the wall clock."""

    fault: object
    at: float
    #: Seconds from the end of the harm until a change written then had arrived.
    recovery: float | None = None
    #: When all was well again.
    over: float = float("inf")


@dataclass
class Outcome:
    """The outcome of a run; `check` finds the problems."""

    broker: str
    seed: object
    conf: dict
    strikes: list[Strike] = field(default_factory=list)
    #: Seconds with writers.
    seconds: float = 0.0
    #: Violations, each with the changes that it concerns.
    problems: list[str] = field(default_factory=list)
    ledger: object = None
    vitals: list = field(default_factory=list)
    #: How many backfills were requested.
    backfills: int = 0
    #: When the Celery worker ended unexpectedly.
    worker_ended: list[float] = field(default_factory=list)
    #: When replication workers got no time from the machine.
    starved: list = field(default_factory=list)
    #: Of ordered handlers.
    harms: object = None
    lane_watch: object = None
    #: Of a handler with `once=`.
    effects: object = None
    #: The tasks that transactions carried.
    carried: object = None
    #: How many tasks were sent in transactions that were not committed.
    undone: int = 0


def settings(choose):
    """Those that change what the replication worker does; the seed picks them."""
    return {
        "flash_use_streaming": choose.random() < 0.5,
        "flash_max_queue_length": choose.choice([0, 1000]),
    }


def run(broker, seed, folder, seconds, faults=None, say=print, named=""):
    """`broker` is redis, sentinel or rabbitmq.

    With `faults` just these, else random ones for `seconds`, of those whose names match `named`.
    """
    choose = random.Random(f"{seed}/{broker}")
    outcome = Outcome(broker, seed, settings(choose))
    say(f"{broker}, seed {seed}, {_shown(outcome.conf)}")
    with Stage(broker, folder, seed, outcome.conf) as stage:
        outcome.ledger = stage.ledger
        stage.probe("each")
        stage.probe("keyed")
        stage.probe("carried")
        for writer in stage.writers:
            writer.start()
        started = time.time()
        try:
            for fault in faults or _random(choose, broker, named, started + seconds):
                _strike(stage, choose, outcome, fault, say, time.time() - started)
        except (Stalled, TimeoutError) as stalled:
            outcome.problems.append(f"{stalled} after {outcome.strikes[-1].fault.name}")
        outcome.seconds = time.time() - started
        for writer in stage.writers:
            writer.end()
        stage.supervisor.dismiss(stage.applications)
        _come_to_rest(stage, outcome, say)
        outcome.vitals = stage.supervisor.vitals
        outcome.worker_ended = [at for at, _, _ in stage.worker.ends]
        ends = [end for worker in stage.lane_workers for end in worker.ends]
        stage.harms.ended |= {pid: (at - 10.0, at) for at, _, pid in ends}
        ledger = stage.ledger
        outcome.starved = [each for process in stage.replicates for each in process.starved]
        stage.harms.unconfirmed += outcome.starved
        stage.harms.enqueued_again = check.twice(ledger.enqueued)
        stage.harms.committed_at = {i: commit.at for i, commit in ledger.committed.items()}
        outcome.effects = stage.effects
        outcome.carried, outcome.undone = stage.carried, stage.carried.undone
        outcome.harms, outcome.lane_watch = stage.harms, stage.lane_watch
        outcome.problems += check.everything(stage, outcome)
    return outcome


def _random(choose, broker, named, end):
    """Each kind as often as the others, in an order of its own each time.

    Where there is a Sentinel, every second one is a failover.
    """
    kinds = [fault for fault in FAULTS if broker in fault.brokers and re.search(named, fault.name)]
    deck = []
    while time.time() < end:
        deck = deck or choose.sample(kinds, len(kinds))
        yield deck.pop()
        if FAILOVER in kinds:
            yield FAILOVER


def _strike(stage, choose, outcome, fault, say, elapsed):
    time.sleep(choose.uniform(0.5, 3))
    if choose.random() < 0.4:
        stage.copy.begin()
        time.sleep(choose.uniform(0, 2))
    if fault.crowded and choose.random() < 0.5:
        stage.to_broker.delay(choose.uniform(0.2, 1))
        time.sleep(choose.uniform(0.5, 2))
    strike = Strike(fault, time.time())
    outcome.strikes.append(strike)
    mend = fault.strike(stage, choose)
    stage.to_broker.heal()
    repaired = strike.at if fault.promotes else time.time()
    stage.probe(fault.recovered)
    strike.recovery = time.time() - repaired
    if mend is not None:
        mend()
        stage.probe(fault.recovered)
    strike.over = time.time()
    if fault.uncommitted:
        stage.harms.unreachable.append((strike.at, strike.over))
    if fault.recovered == "enqueued" or fault.loses_on_redis:
        stage.harms.unconfirmed.append((strike.at, strike.over))
    say(
        f"{int(elapsed) // 60:02}:{int(elapsed) % 60:02}  {fault.name:<34}  "
        f"harmed {repaired - strike.at:4.1f} s, well after {strike.recovery:4.1f} s   "
        f"{len(stage.ledger.committed):,} changes, {max(0, stage.ledger.behind):,} to handle"
    )


def _come_to_rest(stage, outcome, say):
    """Wait until everything committed has been handled, or nothing more happens."""
    ledger = stage.ledger
    ((end,),) = stage.execute("SELECT pg_current_wal_insert_lsn()::text")
    say(f"the writers have ended; {max(0, ledger.behind):,} changes are to be handled")
    try:
        wait_until(
            lambda: stage.execute(
                "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots "
                "WHERE slot_name = 'soak'",
                end,
            )[0][0],
            "the slot to follow",
            timeout=600,
        )
    except TimeoutError as error:
        outcome.problems.append(f"everything stands still: {error}")
    try:
        wait_until(stage.copy.rests, "the backfill to end", timeout=300)
    except TimeoutError as error:
        outcome.problems.append(str(error))
    outcome.backfills = stage.copy.begun
    # The second look from here on begins after the last commit.
    ends = stage.truth.ends + 1
    wait_until(lambda: stage.truth.ends > ends, "all that was committed to be known", timeout=600)
    before, since = None, time.monotonic()
    while time.monotonic() - since < _REST and not check.complete(stage):
        seen = len(ledger.committed), len(ledger.enqueued), *map(len, ledger.handled.values())
        if stage.effects is not None:
            seen += (len(stage.effects.rows),)
        seen += tuple(map(len, stage.carried.seen.values()))
        if seen != before:
            before, since = seen, time.monotonic()
        time.sleep(1)


def _shown(conf):
    return ", ".join(f"{name}={value}" for name, value in conf.items())
