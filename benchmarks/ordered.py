"""Ordered handlers, beside ordinary tasks in the same runs.

Lanes are filled before the worker starts, and the replication worker has ended by then. Each run is
verified like the others, and the changes of each key must have been handled in their order.
"""

import signal
from collections import defaultdict
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import psutil
import redis

from benchmarks import latency as latencies
from benchmarks.bench import POSTGRES
from benchmarks.databases import Database, Source, Workload
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import Wrong, compare, places_of, valkey_bodies
from example_project.servers import Postgres, wait_until
from flash_celery.lanes import marks_table
from flash_celery.messages import lane_entries
from tests.proxy import Proxy

#: The orders belong to so many customers, by whom they are kept in order.
KEYS = 1000
CPU = "cpu_us_per_change"
PLAIN = "a task for each, same worker"
#: Seconds of the lease where a whole worker is killed.
LEASE = 5
#: What a handler with effects writes to.
TOTALS = """
CREATE TABLE totals (
    customer_id bigint PRIMARY KEY,
    orders bigint NOT NULL DEFAULT 0,
    total numeric(14,2) NOT NULL DEFAULT 0
) WITH (fillfactor = 50)"""
#: How many keys fail, and the seconds until they are retried.
FAILING, COUNTDOWN = 64, 60
#: The round trip to a distant broker, in seconds.
ROUND_TRIP = 0.002


def ordered(bench):
    """One call for each change in lanes, batches, latency, recovery, and keys that fail."""
    for measure in MEASUREMENTS:
        measure(bench)


def calls(bench):
    """Measure one call for each change, with one process and with two."""
    many, few = _backlogs(bench, 100_000, 3000)
    line = _line(f"{many.rows:,} changes of {KEYS:,} keys in lanes, one call each, worker -c 1")
    plain = line.against(PLAIN, Goal(10))
    cpu = _line("the same, processor time of worker and broker for a change", "µs")
    plain_cpu = cpu.against(PLAIN, Goal(0.1, at_least=False))
    double = _line("the same, worker -c 2")
    against_one = double.against("worker -c 1", Goal(1.6))
    for run in bench.each_run("ordered: one call for each change"):
        before, first = handled(bench, few, "single")
        rate, details = handled(bench, many, "ordered")
        after, second = handled(bench, few, "single")
        rate_of_two, details_of_two = handled(bench, many, "ordered", "-c", "2")
        alone = (before + after) / 2
        _note(line, rate, details, plain, alone)
        used, used_alone = details[CPU], (first[CPU] + second[CPU]) / 2
        _note(cpu, used, {}, plain_cpu, used_alone)
        _note(double, rate_of_two, details_of_two, against_one, rate)
        bench.say(
            f"  ordered, run {run}: {rate:,.0f} changes/s, {rate / alone:.1f} x one by one "
            f"({alone:,.0f}/s), {used:.0f} µs CPU a change against {used_alone:.0f}; "
            f"-c 2 {rate_of_two:,.0f}, {rate_of_two / rate:.2f} x"
        )
    for each in (line, cpu, double):
        bench.add(each)


def batches(bench):
    """Measure batches of 500: how fast they are enqueued, and handled."""
    backlog = bench.backlog(Workload(bench.size(300_000), handler="ordered"))
    plain = bench.backlog(Workload(backlog.rows))
    drain = _line(f"{backlog.rows:,} changes drained into lanes")
    against_queue = drain.against("into ordinary batches of 500", Goal(0.6))
    handle = _line(f"{backlog.rows:,} changes, batch=500 with ordered=, worker -c 1")
    unordered = handle.against("batch=500 without", Goal(0.7))
    for run in bench.each_run("ordered: batches of 500"):
        theirs = filled_and_handled(bench, plain, "batched")
        ours = filled_and_handled(bench, backlog, "ordered_batched")
        for line, comparison, mine, other in zip(
            (drain, handle), (against_queue, unordered), ours[:2], theirs[:2], strict=True
        ):
            _note(line, mine, ours[2], comparison, other)
        bench.say(
            f"  ordered, run {run}: drained {ours[0]:,.0f} and {theirs[0]:,.0f} changes/s, "
            f"handled {ours[1]:,.0f} and {theirs[1]:,.0f}; "
            f"{ours[2]['changes_per_entry']} changes an entry"
        )
    bench.add(drain)
    bench.add(handle)


def quiet(bench):
    """Measure the time from commit to handler in quiet lanes, beside an ordinary task."""
    seconds = bench.seconds(6)
    with bench.valkey() as broker:
        plain = Source(bench.database(), broker, "single")
        lanes = Source(bench.database(), broker, "ordered")
    lines, comparisons = {}, {}
    for name, bound in {"p50": 1.2, "p99": 1.3}.items():
        lines[name] = _line(f"commit to handler in a quiet lane, {latencies.RATE}/s, {name}", "ms")
        comparisons[name] = lines[name].against("an ordinary task", Goal(bound, at_least=False))
    for run in bench.each_run("ordered: latency"):
        theirs, _ = latencies.replicated(bench, plain, seconds)
        ours, details = latencies.replicated(bench, lanes, seconds, "ordered")
        for name, line in lines.items():
            percent = latencies.PERCENTILES[name][0]
            mine, other = (latencies.percentile(each, percent) for each in (ours, theirs))
            _note(line, mine, details, comparisons[name], other)
            bench.say(f"  ordered, run {run}, {name}: {mine:.2f} ms, ordinary {other:.2f} ms")
    for line in lines.values():
        bench.add(line)


def recovery(bench):
    """Measure how long a lane stands still after a kill of its process, and of its worker."""
    backlog = bench.backlog(Workload(300, handler="one_lane"))
    child = _line("a lane stands still after SIGKILL of its process", "s")
    child.goal = Goal(1, at_least=False)
    worker = _line(f"a lane stands still after SIGKILL of its worker, lease {LEASE} s", "s")
    worker.goal = Goal(LEASE + 2, at_least=False)
    for run in bench.each_run("ordered: recovery"):
        for line, whole in ((child, False), (worker, True)):
            gap, details = stood_still(bench, backlog, whole)
            line.values.append(gap)
            line.details.append(details)
            bench.say(f"  ordered, run {run}: {line.what}: {gap:.2f} s")
    bench.add(child)
    bench.add(worker)


def failing(bench):
    """Measure whether keys that are retried slow down the lanes of the others; one run each."""
    rows, countdown = bench.size(1_000_000), bench.seconds(COUNTDOWN)
    backlog = bench.backlog(Workload(rows, handler="some_fail"))
    bench.doing(f"ordered: {FAILING} of {rows:,} keys fail")
    none, every = rows + 1, max(rows // FAILING, 1)  # the former is beyond the last key
    before, _, _ = seconds_in_lanes(bench, backlog, none, countdown)
    times, lanes, details = seconds_in_lanes(bench, backlog, every, countdown)
    after, _, _ = seconds_in_lanes(bench, backlog, none, countdown)
    held = {lane for lane, keys in lanes.items() if any(key % every == 0 for key in keys)}
    share = len(held) / len(lanes)
    line = _line(
        f"{rows:,} keys, {FAILING} retried after {countdown:g} s: p99 in the "
        f"{1 - share:.0%} of the lanes that none of them holds up",
        "s",
    )
    comparison = line.against("the same lanes, no key fails", Goal(1.1, at_least=False))
    clean = [key for lane, keys in lanes.items() if lane not in held for key in keys]
    first, mine, last = (
        latencies.percentile([of[key] for key in clean], 99) for of in (before, times, after)
    )
    other = (first + last) / 2
    _note(line, mine, details, comparison, other)
    held_up = _line(f"the part of the {len(lanes)} lanes that these {FAILING} keys hold up", "%")
    expected = 1 - (1 - 1 / len(lanes)) ** FAILING
    by_chance = held_up.against(f"1 - (1 - 1/{len(lanes)})^{FAILING}", Goal(1.1, at_least=False))
    _note(held_up, share * 100, {}, by_chance, expected * 100)
    bench.say(f"  ordered: {line.what} {mine:.1f} s; no key fails {other:.1f} s")
    bench.say(f"  ordered: {held_up.what}: {share:.1%}, by chance {expected:.1%}")
    bench.add(line)
    bench.add(held_up)


def distant(bench):
    """Measure one call for each change with a distant broker."""
    many, few = _backlogs(bench, 20_000, 1000)
    line = _line(f"{many.rows:,} changes in lanes, broker {ROUND_TRIP * 1000:g} ms away, -c 1")
    plain = line.against(PLAIN)
    for run in bench.each_run("ordered: a distant broker"):
        alone, _ = handled(bench, few, "single", far=True)
        rate, details = handled(bench, many, "ordered", far=True)
        _note(line, rate, details, plain, alone)
        bench.say(f"  ordered, run {run}: far away {rate:,.0f} changes/s, alone {alone:,.0f}")
    bench.add(line)


def once(bench):
    """Measure `once=`, with a handler that makes one UPDATE in a transaction."""
    backlog = bench.backlog(Workload(bench.size(20_000), handler="ordered"))
    lines = {}
    for driver, handler in {"psycopg": "", "Django": "_django"}.items():
        line = _line(f"{backlog.rows:,} changes, one UPDATE each with {driver}, once=, -c 1")
        lines[handler] = line, line.against("without once=", Goal(0.8))
    with Postgres(**{**POSTGRES, "fsync": "on"}) as server:
        for run in bench.each_run("ordered: once="):
            _once(bench, server, run, backlog, lines)
    for line, _ in lines.values():
        bench.add(line)


def _once(bench, server, run, backlog, lines):
    for handler, (line, comparison) in lines.items():
        before, _ = written(bench, server, backlog, f"ordered_write{handler}")
        rate, details = written(bench, server, backlog, f"ordered_once{handler}")
        after, _ = written(bench, server, backlog, f"ordered_write{handler}")
        without = (before + after) / 2
        _note(line, rate, details, comparison, without)
        bench.say(
            f"  ordered, run {run}: {line.what}: {rate:,.0f} changes/s, without "
            f"{without:,.0f}, {rate / without:.2f} x; {details[CPU]:.0f} µs CPU a change"
        )


def rabbitmq(bench):
    """Measure one call for each change in lanes of RabbitMQ, classic queues."""
    many, few = _backlogs(bench, 50_000, 3000, "ordered_rows")
    line = _line(f"{many.rows:,} changes in lanes of RabbitMQ, one call each, worker -c 1")
    plain = line.against(PLAIN, Goal(4))
    for run in bench.each_run("ordered: RabbitMQ"):
        before, _ = handled(bench, few, "single", server=bench.rabbit)
        rate, details = handled(bench, many, "ordered_rows", server=bench.rabbit)
        after, _ = handled(bench, few, "single", server=bench.rabbit)
        alone = (before + after) / 2
        _note(line, rate, details, plain, alone)
        bench.say(
            f"  ordered, run {run}: RabbitMQ {rate:,.0f} changes/s, {rate / alone:.1f} x one by "
            f"one ({alone:,.0f}/s)"
        )
    bench.add(line)


#: What `ordered` measures.
MEASUREMENTS = (calls, batches, quiet, recovery, failing, distant, once, rabbitmq)


def handled(bench, backlog, handler, *options, far=False, server=None, effects=""):
    """Return changes per second of a worker whose queue or lanes are full, and details."""
    with (server or bench.valkey)() as broker:
        _fill(backlog, broker, handler, effects)
        with _away(broker, far) as reached:
            rate, details, _ = _work_off(backlog, reached, handler, options, effects=effects)
    return rate, details


def written(bench, server, backlog, handler):
    """Do the same with a handler that writes to a database, and verify what it has written."""
    database = Database(server, "effects")
    database.execute(TOTALS, f"INSERT INTO totals SELECT n FROM generate_series(0, {KEYS}) n")
    database.execute(marks_table.CREATE_TABLE)
    rate, details = handled(bench, backlog, handler, effects=database.dsn)
    query = "SELECT customer_id, count(*), sum(total) FROM orders GROUP BY 1 ORDER BY 1"
    expected = backlog.database.rows(query)
    if database.rows("SELECT * FROM totals WHERE orders > 0 ORDER BY 1") != expected:
        raise Wrong(f"{handler}: the totals of the customers are wrong")
    database.drop()
    return rate, details


def filled_and_handled(bench, backlog, handler):
    """Return changes per second enqueued, and handled by one process, and details."""
    with bench.valkey() as broker:
        enqueued = _fill(backlog, broker, handler)
        if handler == "batched":
            details = compare(backlog.places, places_of(valkey_bodies(broker)), handler)
        else:
            entries = entries_of(broker)
            found = sorted(place for places in entries for place in places)
            details = compare(backlog.places, found, handler)
            details["changes_per_entry"] = round(backlog.rows / len(entries), 1)
        rate, _, _ = _work_off(backlog, broker, handler, ())
    return enqueued, rate, details


def stood_still(bench, backlog, whole):
    """Kill what drains the only lane; return the longest time without a change, and details."""
    with bench.valkey() as broker:
        _fill(backlog, broker, "one_lane")
        conf = {"flash_lane_lease": LEASE}
        with Project(backlog.dsn, broker, "one_lane", conf=conf) as project:
            worker = project.worker()
            wait_until(lambda: len(project.notes()) > backlog.rows // 5, "some changes")
            children = worker.measured.children()
            if whole:
                worker.end(signal.SIGKILL)
                project.processes.remove(worker)
            for child in children:
                child.kill()
            if whole:
                project.worker()
            notes = project.noted(backlog.rows, timeout=LEASE + 30)
    starts = [note[0] for note in notes]
    # The change that was under way may come again.
    details = compare(backlog.places, list(dict.fromkeys(note[2:] for note in notes)), "recovery")
    details["repeated"] = len(notes) - backlog.rows
    return max(b - a for a, b in pairwise(starts)), details


def seconds_in_lanes(bench, backlog, every, countdown):
    """Return the seconds until each key was handled, the keys of each lane, and details."""
    with bench.valkey() as broker:
        _fill(backlog, broker, "some_fail")
        lanes = lanes_of(broker)
        failing = every, countdown
        _, details, notes = _work_off(backlog, broker, "some_fail", (), failing=failing)
    begun = min(note[0] for note in notes)
    return {note[4]: note[1] - begun for note in notes}, lanes, details


def entries_of(broker):
    """Return the places of each entry of the lanes."""
    return [places for entries in _lanes(broker).values() for places in entries]


def lanes_of(broker):
    """Return the keys that wait in each lane."""
    return {
        lane: [key for places in entries for _, _, key in places]
        for lane, entries in _lanes(broker).items()
    }


def _lanes(broker):
    lanes = {}
    with redis.Redis(port=broker.port) as client:
        (handler,) = client.smembers("_flash.ordered")
        for lane in range(int(client.hget(handler + b".state", "lanes"))):
            texts = client.lrange(b"%s.%d" % (handler, lane), 0, -1)
            lanes[lane] = [
                [(int(c.commit_lsn), c.ordinal, c.key["id"]) for c in entry.changes]
                for entry in map(lane_entries.decode, texts)
            ]
    return lanes


@contextmanager
def _away(broker, far):
    """Return the broker, or one that is as far away as a distant one."""
    if not far:
        yield broker
        return
    with Proxy(broker.port) as proxy:
        proxy.delay(ROUND_TRIP / 2)
        url = f"redis://127.0.0.1:{proxy.port}/0"
        yield SimpleNamespace(url=url, process=broker.process)


def _backlogs(bench, many, few, handler="ordered"):
    """Return backlogs for an ordered handler and for an ordinary one."""
    return (
        bench.backlog(Workload(bench.size(many), handler=handler)),
        bench.backlog(Workload(bench.size(few), handler="single")),
    )


def _fill(backlog, broker, handler, effects=""):
    """Enqueue a backlog, and end the replication worker; return changes per second."""
    slot = backlog.again()
    with Project(backlog.dsn, broker, handler, slot, effects=effects) as project:
        worker = project.replicate()
        started = worker.logged_at("Replicating the slot")
        ended = backlog.database.until_confirmed(slot, backlog.end, worker.alive)
    return backlog.rows / (ended - started)


def _work_off(backlog, broker, handler, options, failing=(1, 0), effects=""):
    """Run a worker until everything is handled; return its rate, details and the notes."""
    with Project(backlog.dsn, broker, handler, failing=failing, effects=effects) as project:
        worker = project.worker(*options)
        parents = psutil.Process(broker.process.pid), worker.measured
        processes = [each for one in parents for each in (one, *one.children(recursive=True))]
        before = _cpu(processes)
        notes = project.noted(backlog.rows, timeout=max(60, 2 * failing[1]))
        cpu = _cpu(processes) - before
    name = f"worker, {handler} {' '.join(options)}"
    details = compare(backlog.places, sorted(note[2:] for note in notes), name)
    if handler.startswith("ordered"):
        in_order(notes, name)
    details[CPU] = round(cpu / backlog.rows * 1e6, 1)
    started, ended = min(note[0] for note in notes), max(note[1] for note in notes)
    return backlog.rows / (ended - started), details, notes


def _cpu(processes):
    """Return the seconds of processor time of some processes."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def in_order(notes, name):
    """Check that the changes of each key were handled in their order."""
    last = defaultdict(lambda: (0, -1))
    for _, _, lsn, ordinal, key in notes:
        customer = key % KEYS
        if (lsn, ordinal) <= last[customer]:
            raise Wrong(f"{name}: customer {customer}: order {key} after a newer one")
        last[customer] = lsn, ordinal


def _line(what, unit="changes/s"):
    return Line("ordered", what, unit)


def _note(line, value, details, comparison, other):
    line.values.append(value)
    line.details.append(details)
    comparison.add(other, value / other)
