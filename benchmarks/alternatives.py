"""Measure the alternatives on rows of the same table."""

import time

import redis

from benchmarks import drain
from benchmarks.databases import TRIGGER, Workload
from benchmarks.project import Project
from benchmarks.results import Line
from benchmarks.verify import Wrong
from example_project.servers import wait_until

SIGNALS = "Django's post_save and delay_on_commit"
NOTIFY = "a trigger, NOTIFY, and a listener with apply_async"
LOOP = "a psycopg2 loop with apply_async"
DECODE = "a psycopg2 loop to dicts of text, publishing nothing"


def alternatives(bench):
    """Signals, NOTIFY and a loop over psycopg2, against flash replicate."""
    backlog = bench.backlog(Workload(bench.size(100_000)))
    count = bench.size(2000)
    plain = bench.database()
    single = Line("alternatives", f"{backlog.rows:,} inserts, a task for each", "changes/s")
    batched = Line("alternatives", f"{backlog.rows:,} inserts, batches", "changes/s")
    comparisons = [(single.against(name), rate_of) for name, rate_of in ONE_BY_ONE.items()]
    decode = batched.against(DECODE)
    for run in bench.each_run("alternatives"):
        for line, handler in ((single, "single"), (batched, "batched")):
            with bench.valkey() as broker:
                rate, details = drain.flash(backlog, broker, handler)
            line.values.append(rate)
            line.details.append(details)
        for comparison, rate_of in comparisons:
            with bench.valkey() as broker:
                rate = rate_of(backlog, plain, broker, count)
                with redis.Redis(port=broker.port) as client:
                    if client.llen("rows") != count:
                        raise Wrong(f"{comparison.against}: {client.llen('rows')} of {count}")
            comparison.add(rate, single.values[-1] / rate)
            bench.say(f"  {comparison.against}, run {run}: {rate:,.0f}/s")
        rate = loop(backlog, plain, None, backlog.rows)
        decode.add(rate, batched.values[-1] / rate)
        bench.say(f"  {DECODE}, run {run}: {rate:,.0f}/s, flash {batched.values[-1]:,.0f}/s")
    bench.add(single)
    bench.add(batched)


def signals(backlog, plain, broker, rows):
    """Return the rows saved and enqueued per second."""
    with Project(plain.dsn, broker) as project:
        return project.output("benchmarks.rivals.signals", str(rows))["rate"]


def notify(backlog, plain, broker, rows):
    """Return the rows per second, from their commit to the last message."""
    plain.execute(TRIGGER)
    try:
        with Project(plain.dsn, broker) as project, redis.Redis(port=broker.port) as client:
            project.start("benchmarks.rivals.notify").logged_at("listening")
            plain.fill(rows)
            started = time.time()
            wait_until(lambda: client.llen("rows") >= rows, "notifications", 120)
            return rows / (time.time() - started)
    finally:
        plain.execute("DROP TRIGGER tell ON orders", "DROP FUNCTION tell")


def looped(backlog, plain, broker, rows):
    """Return the rows decoded and enqueued per second."""
    return loop(backlog, plain, broker, rows, "apply_async")


def loop(backlog, plain, broker, rows, *options):
    """Return the rows decoded per second, after checking the last one."""
    slot = backlog.copy()
    with Project(backlog.dsn, broker) as project:
        output = project.output("benchmarks.rivals.psycopg2_loop", slot, str(rows), *options)
    backlog.database.drop_slot(slot)
    if int(output["last"]["id"]) != backlog.places[rows - 1][2]:
        raise Wrong(f"the psycopg2 loop ended with {output['last']}")
    return output["rate"]


ONE_BY_ONE = {SIGNALS: signals, NOTIFY: notify, LOOP: looped}
