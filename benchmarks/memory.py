"""Sample the replication worker's resident memory: idle, draining, and in a large transaction."""

import threading
import time
from itertools import islice

import redis

from benchmarks.databases import Source
from benchmarks.project import Project
from benchmarks.results import Goal, Line
from benchmarks.verify import Rolling, body_of, compare_sums, places_of

#: The phases of a measurement, with the most megabytes of each.
PHASES = {"idle": 60, "drain": 100, "large": 150}
_SAMPLE_SECONDS = 0.05
#: Seconds without a message after which the wait for more ends.
_TIMEOUT = 300.0


class Sampler(threading.Thread):
    """A thread that samples the resident memory of a process, with the phase."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process = process
        self.phase = "idle"
        self.samples = []
        self.done = threading.Event()

    def run(self):
        """Sample until `done` is set."""
        started = time.monotonic()
        while not self.done.wait(_SAMPLE_SECONDS):
            megabytes = self.process.measured.memory_info().rss / 1e6
            self.samples.append((round(time.monotonic() - started, 2), megabytes, self.phase))

    def peak(self, phase):
        """Return the most megabytes of a phase."""
        return max(megabytes for _, megabytes, sampled in self.samples if sampled == phase)


class Consumer(threading.Thread):
    """A thread that consumes the queue, so that the broker does not grow."""

    def __init__(self, broker):
        super().__init__(daemon=True)
        self.client = redis.Redis(port=broker.port)
        self.rolling = Rolling()
        self.done = threading.Event()
        self.failed = None

    def run(self):
        """Consume until `done` is set."""
        try:
            while not self.done.is_set():
                texts = self.client.rpop("flash", 20)
                if texts is None:
                    time.sleep(0.02)
                    continue
                for place in places_of(body_of(text) for text in texts):
                    self.rolling.add(place)
        except Exception as error:
            self.failed = error

    def wait_for(self, count, alive):
        """Wait until `count` changes have arrived, or no more arrive."""
        seen, deadline = 0, 0.0
        while self.rolling.count < count and self.failed is None:
            alive()
            if self.rolling.count > seen or not deadline:
                seen, deadline = self.rolling.count, time.monotonic() + _TIMEOUT
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        time.sleep(0.3)  # for changes that should not arrive
        if self.failed is not None:
            raise self.failed


def memory(bench):
    """Resident memory: idle, draining, and a transaction of five million rows."""
    usual, large = bench.size(300_000), bench.size(5_000_000)
    bench.series["memory"] = {}
    for name, streaming in (("streaming off", False), ("streaming on", True)):
        bench.doing(f"memory: {usual:,} rows, then a transaction of {large:,}, {name}")
        sampler, details = watch(bench, usual, large, streaming)
        descriptions = {
            "idle": "idle",
            "drain": f"a transaction of {usual:,}",
            "large": f"a transaction of {large:,}",
        }
        for phase, bound in PHASES.items():
            line = Line("memory", f"resident memory, {descriptions[phase]}, {name}", "MB")
            line.goal = Goal(bound, at_least=False)
            line.values.append(sampler.peak(phase))
            line.details.append(details)
            bench.add(line)
        peaks = ", ".join(f"{phase} {sampler.peak(phase):.0f} MB" for phase in PHASES)
        bench.say(f"  memory, {name}: {peaks}")
        every = max(1, len(sampler.samples) // 1000)
        bench.series["memory"][name] = [
            (at, round(megabytes, 1), phase)
            for at, megabytes, phase in islice(sampler.samples, None, None, every)
        ]


def watch(bench, usual, large, streaming):
    """Sample one worker; return the samples and the verified checksum."""
    database = bench.database()
    conf = {"flash_use_streaming": streaming}
    with bench.valkey() as broker:
        source = Source(database, broker, "batched")
        with Project(source.dsn, broker, "batched", source.slot, conf) as project:
            worker = project.replicate()
            worker.logged_at("Replicating the slot")
            sampler, consumer = Sampler(worker), Consumer(broker)
            sampler.start()
            consumer.start()
            time.sleep(bench.seconds(3))
            expected = Rolling()
            for phase, rows in (("drain", usual), ("large", large)):
                sampler.phase = phase
                before = database.end_of_wal()
                first = expected.count + 1
                database.fill(rows)
                after = database.end_of_wal()
                consumer.wait_for(expected.count + rows, worker.alive)
                commit = consumer.rolling.last[0]
                for index in range(rows):
                    expected.add((commit, index, first + index))
                compare_sums(expected, consumer.rolling, f"memory, {phase}")
                assert before <= commit < after
            sampler.done.set()
            consumer.done.set()
            sampler.join()
            consumer.join()
        streamed = database.execute(
            f"SELECT stream_txns FROM pg_stat_replication_slots WHERE slot_name = '{source.slot}'"
        )[0]
    details = {**expected.as_json(), "streamed_transactions": streamed}
    database.drop()
    return sampler, details
