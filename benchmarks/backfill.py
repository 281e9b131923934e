"""Backfills, beside programs that read the same table and throw it away.

The rows that arrive are taken from the broker, decoded and compared with the table by a checksum.
"""

import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from hashlib import blake2b

import psycopg
import redis
from kombu.utils.json import loads

from benchmarks import latency as latencies
from benchmarks.databases import Source
from benchmarks.memory import Sampler
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import Wrong, body_of
from example_project.servers import wait_until
from flash_celery import Changes  # noqa: F401 - registers the type of messages

CHUNK = 5000
CONF = {"flash_backfill_ahead": 1000}
PSQL, COPY = "psql, COPY to /dev/null", "psycopg copy() that throws away"
#: Rows a second while the latency of other changes is measured.
RATE = 5000


def backfill(bench):
    """The rows of a table into batches on Valkey: speed, memory, a kill, and others' latency."""
    rows = bench.size(1_000_000)
    database = filled(bench, rows)
    with bench.valkey() as broker:
        source = Source(database, broker, "batched")
    line = Line("backfill", f"backfill of {rows:,} rows, batches of 500", "rows/s")
    line.goal = Goal(100_000)
    memory = Line("backfill", "the same, resident memory of the replication worker", "MB")
    memory.goal = Goal(120, at_least=False)
    again = Line("backfill", "rows delivered again after SIGKILL in the middle, Valkey", "rows")
    again.goal = Goal(0, at_least=False)
    against_psql, against_copy = line.against(PSQL), line.against(COPY)
    for run in bench.each_run("backfill"):
        by_psql, by_copy = rows / psql(database), rows / copy(database, rows)
        rate, peak, details = enqueued(bench, source, rows)
        _, repeated, _ = enqueued(bench, source, rows, kill=True)
        line.values.append(rate)
        line.details.append(details)
        against_psql.add(by_psql, rate / by_psql)
        against_copy.add(by_copy, rate / by_copy)
        memory.values.append(peak)
        again.values.append(repeated)
        bench.say(
            f"  backfill, run {run}: {rate:,.0f} rows/s, psql {by_psql:,.0f}, copy() "
            f"{by_copy:,.0f}; {details['cpu_us_per_row']} µs CPU a row, {peak:.0f} MB; "
            f"{repeated} rows again after a kill"
        )
    for each in (line, memory, again):
        bench.add(each)
    database.drop()
    others(bench)


def filled(bench, rows):
    """Return a database whose table has so many rows, with a set-up slot."""
    database = bench.database()
    database.fill(rows)
    database.execute("VACUUM ANALYZE orders")
    return database


def psql(database):
    """Return the seconds that psql takes to read the table."""
    command = [database.server.binaries / "psql", "-X", "-q", "-d", database.dsn]
    began = time.monotonic()
    copying = "COPY (SELECT * FROM orders ORDER BY id) TO STDOUT"
    with open("/dev/null", "w") as nowhere:
        subprocess.run([*command, "-c", copying], stdout=nowhere, check=True, cwd="/")
    return time.monotonic() - began


def copy(database, rows):
    """Return the seconds that psycopg takes to read the table in chunks."""
    began = time.monotonic()
    with psycopg.connect(database.dsn, autocommit=True) as connection, connection.cursor() as each:
        for first in range(1, rows + 1, CHUNK):
            query = f"COPY (SELECT * FROM orders WHERE id >= {first} ORDER BY id LIMIT {CHUNK})"
            with each.copy(f"{query} TO STDOUT") as lines:
                for _ in lines:
                    pass
    return time.monotonic() - began


class Taker(threading.Thread):
    """A thread that takes the messages of a queue, so that there is room for more."""

    def __init__(self, broker, queue="flash"):
        super().__init__(daemon=True)
        self.client, self.queue = redis.Redis(port=broker.port), queue
        self.texts, self.done = [], threading.Event()

    def run(self):
        """Take until `done` is set and nothing is left."""
        while True:
            ending = self.done.is_set()
            taken = self.client.rpop(self.queue, 100)
            self.texts += taken or []
            if ending and not taken:
                return
            time.sleep(0.02)

    def end(self):
        """Return the changes that have arrived."""
        self.done.set()
        self.join()
        for text in self.texts:
            (changes,), _, _ = loads(body_of(text))
            yield from changes


@contextmanager
def taking(broker, queue="flash"):
    """Run a `Taker`."""
    taker = Taker(broker, queue)
    taker.start()
    try:
        yield taker
    finally:
        taker.done.set()


def enqueued(bench, source, rows, kill=False):
    """Backfill once; return rows a second, the peak of memory or rows again, and details.

    The time runs from the start of streaming until the backfill is recorded as done.
    """
    database, slot = source.database, source.again()
    with bench.valkey() as broker, taking(broker) as taker:
        with Project(source.dsn, broker, "batched", slot, CONF) as project:
            project.request("--chunk", str(CHUNK))
            worker = project.replicate()
            sampler = Sampler(worker)
            started = worker.logged_at("Replicating the slot")
            sampler.start()
            before = worker.cpu()
            if kill:
                half = f"SELECT row_count >= {rows // 2} FROM flash_celery_backfills"
                wait_until(lambda: database.execute(half)[0], "half of the rows", 300)
                sampler.done.set()
                sampler.join()
                worker.end(signal.SIGKILL)
                worker = project.replicate()
            ended, cpu = until_done(database, worker)
            sampler.done.set()
        changes = list(taker.end())
        details, repeated = compare(database, changes)
    database.execute("DROP TABLE flash_celery_backfills CASCADE")
    details["cpu_us_per_row"] = round((cpu - before) / rows * 1e6, 2) if not kill else 0.0
    return rows / (ended - started), repeated if kill else sampler.peak("idle"), details


def until_done(database, worker):
    """Wait until the backfill has ended.

    Returns:
        When it has (seconds since 1970), and the seconds of processor time until then: some
        kernels no longer count a thread that has ended.
    """
    query = "SELECT extract(epoch FROM ended_at)::float8 FROM flash_celery_backfills"
    used = [worker.cpu()]

    def ended():
        worker.alive()
        used.append(worker.cpu())
        return database.execute(query)[0]

    return wait_until(ended, "the backfill", 600), max(used)


def compare(database, changes):
    """Return the checksum of the rows that have arrived, and how many came twice.

    Raises:
        Wrong: They are not those of the table.
    """
    arrived = {change.id: change for change in changes}
    received = checksum(change.new for change in arrived.values())
    with psycopg.connect(database.dsn) as connection, connection.cursor("table") as cursor:
        cursor.itersize = 20_000
        cursor.execute("SELECT * FROM orders ORDER BY id")
        names = [column.name for column in cursor.description]
        expected = checksum(dict(zip(names, row, strict=True)) for row in cursor)
    if received != expected:
        raise Wrong(f"backfill: {expected} in the table, {received} arrived")
    return {**expected}, len(changes) - len(arrived)


def checksum(rows):
    """Return a count and a checksum of rows with all values, in any order."""
    total, count = 0, 0
    for row in rows:
        values = repr([str(row[name]) for name in sorted(row)]).encode()
        total ^= int.from_bytes(blake2b(values, digest_size=8).digest(), "big")
        count += 1
    return {"changes": count, "checksum": f"{total:016x}"}


def others(bench):
    """Measure the latency of changes of another queue, which has its own worker, in a backfill."""
    seconds = bench.seconds(6)
    database = bench.database()
    database.execute(
        "CREATE TABLE old AS SELECT * FROM orders WHERE false",
        "ALTER TABLE old ADD PRIMARY KEY (id)",
        "INSERT INTO old SELECT n, n % 1000, 'paid', 1.5, 'please leave it at the door', now(),"
        f" now() FROM generate_series(1, {int(RATE * (seconds + 30))}) n",
        "ANALYZE old",
    )
    with bench.valkey() as broker:
        source = Source(database, broker, "beside_backfill")
    line = Line("backfill", f"commit to handler of another queue at {RATE:,} rows/s, p99", "ms")
    against = line.against("without a backfill", Goal(2.0, at_least=False))
    for run in bench.each_run("backfill: latency"):
        quiet, _ = latencies.replicated(bench, source, seconds, "beside_backfill")
        busy, details = latencies.replicated(bench, source, seconds, "beside_backfill", request)
        mine, other = latencies.percentile(busy, 99), latencies.percentile(quiet, 99)
        line.values.append(mine)
        line.details.append(details)
        against.add(other, mine / other)
        bench.say(f"  backfill, run {run}: p99 {mine:.2f} ms, without {other:.2f} ms")
    bench.add(line)


@contextmanager
def request(project, broker):
    """Have a backfill run until the block ends."""
    with taking(broker, "old"):
        project.request("--rate", f"{RATE}/s", handler="old")
        # The session that begins with it must not count.
        wait_until(lambda: project.backfilled() > RATE, "its first rows", 60)
        yield
        project.stop_backfill()
