"""The servers, sizes and results that the scenarios share."""

import itertools
from contextlib import ExitStack, contextmanager

import amqp

from benchmarks.databases import Backlog, Database
from example_project.servers import Postgres, Rabbit, Valkey

#: The defaults, without background work that would fall into some runs only.
POSTGRES = {"autovacuum": "off", "checkpoint_timeout": "1d", "max_wal_size": "32GB"}
#: Durable within a second, as is usual; `always` would slow down the alternatives most, which
#: enqueue one message at a time.
VALKEY = {"appendfsync": "everysec", "auto-aof-rewrite-percentage": "0"}


class Missing(Exception):
    """A server that is not installed on this machine."""


class Bench:
    """One execution of `make bench`."""

    def __init__(self, scale, runs, console):
        self.scale = scale
        self.runs = runs
        self.console = console
        self.lines = []
        #: Samples over time, or of a distribution, for the charts.
        self.series = {}
        self._status = None
        self._servers = ExitStack()
        self._numbers = itertools.count(1)
        self._backlogs = {}
        self._rabbit = None

    def __enter__(self):
        self.postgres = self._servers.enter_context(Postgres(**POSTGRES))
        self._status = self._servers.enter_context(self.console.status("starting"))
        return self

    def __exit__(self, *exit_):
        self._servers.close()

    def size(self, full):
        """Return a number of rows at this scale; enough to fill a batch."""
        return max(min(full, 1000), int(full * self.scale))

    def seconds(self, full):
        """Return a duration in seconds at this scale."""
        return max(0.5, full * min(1.0, self.scale))

    def doing(self, text):
        """Show what is being done."""
        self._status.update(text)
        if not self.console.is_terminal:
            self.console.print(f"  … {text}", markup=False)

    def say(self, text):
        """Print a result."""
        self.console.print(text)

    def add(self, line):
        """Add a line to the table."""
        self.lines.append(line)

    def each_run(self, activity):
        """Yield the numbers of the runs, and announce each."""
        for run in range(1, self.runs + 1):
            self.doing(f"{activity}, run {run} of {self.runs}")
            yield run

    def database(self, others=0):
        """Create a database with the table."""
        return Database(self.postgres, f"bench_{next(self._numbers)}", others)

    def backlog(self, workload):
        """Return the workload, written and waiting in a slot; each is written once."""
        if workload not in self._backlogs:
            self.doing(f"writing {workload}")
            with self.valkey() as broker:
                self._backlogs[workload] = Backlog(self.database(workload.others), broker, workload)
        return self._backlogs[workload]

    @contextmanager
    def valkey(self):
        """Run a broker for one run."""
        with Valkey(**VALKEY) as server:
            yield server

    @contextmanager
    def rabbit(self):
        """Return RabbitMQ without queues; it is started once."""
        if not Rabbit.installed():
            raise Missing("RabbitMQ (rabbitmq-server) is not installed")
        if self._rabbit is None:
            self.doing("starting RabbitMQ")
            self._rabbit = self._servers.enter_context(Rabbit())
        with amqp.Connection(host=f"127.0.0.1:{self._rabbit.port}") as connection:
            channel = connection.channel()
            for queue in self._rabbit.queues():
                channel.queue_delete(queue)
        yield self._rabbit
