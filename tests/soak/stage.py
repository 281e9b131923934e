"""The servers, the network and the processes of one run."""

import contextlib
import json
import time

import psycopg

from example_project.servers import Postgres, Rabbit, Valkey, wait_until
from tests.proxy import Proxy
from tests.sentinel import Replicated
from tests.soak import carried, copies, effects
from tests.soak.calls import Harms
from tests.soak.carried import Carried
from tests.soak.copies import Copy
from tests.soak.effects import Effects
from tests.soak.lane_watch import RabbitLaneWatch, RedisLaneWatch
from tests.soak.ledger import ORDERED, UNORDERED, Ledger
from tests.soak.processes import COMMAND, Process, Supervisor
from tests.soak.witnesses import PUBLICATION, SLOT, Notes, RabbitTap, RedisTap, Truth
from tests.soak.writers import SCHEMA, Writer

#: Replication workers: one reads, the other waits.
_REPLICATES = 2
_WRITERS = 3
#: Seconds in which all must be well again; a RabbitMQ takes half a minute to boot.
PATIENCE = 180.0
#: Seconds after which a change that a worker has not handled is taken to be one that it lost.
_LOST = 20.0


class Stalled(Exception):
    """A change was not enqueued or handled in time: the worst but one that can happen."""


BROKERS = {"redis": Valkey, "sentinel": Replicated, "rabbitmq": Rabbit}


class Stage:
    """`with Stage("redis", folder, seed, conf) as stage:` starts everything but the writers."""

    def __init__(self, broker, folder, seed, conf):
        self.folder = folder
        self.kind = broker
        self.carried = Carried(self.execute)
        barriers = broker != "rabbitmq"
        self.ledger = Ledger(UNORDERED + ORDERED, barriers, self.carried)
        self.harms = Harms(weak=broker == "rabbitmq")
        #: Of the handler with `once=`, which RabbitMQ cannot have.
        self.effects = None if broker == "rabbitmq" else Effects(self.execute, self.ledger)
        self._password_file = folder / "password"
        self._seed = seed
        self._conf = conf
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exit_):
        self._stack.close()

    def _start(self):
        enter = self._stack.enter_context
        self.postgres = enter(
            # The server gives up a stopped reader soon, and streams whatever is not small.
            Postgres(fsync="on", wal_sender_timeout="5s", logical_decoding_work_mem="64kB")
        )
        self._ask_for_passwords()
        self.broker = enter(BROKERS[self.kind]())
        self.to_postgres = enter(Proxy(self.postgres.port))
        self.to_broker = enter(Proxy(self.broker.port))
        self.to_lanes = enter(Proxy(self.broker.port))
        for server in (self.postgres, *getattr(self.broker, "servers", [self.broker])):
            self._stack.callback(self._keep_log, server)
        self._create()
        tap = RabbitTap if self.kind == "rabbitmq" else RedisTap
        notes = self.folder / "notes"
        self.truth = Truth(self.ledger, self.postgres.dsn())
        direct = {"SOAK_BROKER": self.broker.url, "SOAK_DSN": self.postgres.dsn()}
        self.copy = Copy(self.execute, direct)
        self.witnesses = [
            self.truth,
            tap(self.ledger, self.broker),
            tap(self.copy, self.broker, copies.QUEUE),
            tap(self.carried, self.broker, carried.QUEUE, carried.argument),
            Notes(self.ledger, notes),
        ]
        command = {"flash_password_command": ["cat", str(self._password_file)]}
        environment = {
            "SOAK_CONF": json.dumps({**self._conf, **command}),
            "SOAK_NOTES": str(notes),
            "SOAK_TARGET": self.postgres.dsn(),
        }
        self.replicates = [
            Process(
                f"replicate-{number}",
                self.folder,
                {**environment, **self._ways(number)},
                *(*COMMAND, "flash", "replicate"),
            )
            for number in range(1, _REPLICATES + 1)
        ]
        self.worker = Process(
            "worker",
            self.folder,
            {**environment, **direct},
            *(
                *COMMAND,
                "worker",
                "-Q",
                f"each,many,{carried.RUN}",
                "-P",
                "prefork",
                "-c",
                "2",
                "-l",
                "WARNING",
            ),
            *("-n", "worker{life}@%h"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        )
        self.lane_workers = [
            Process(
                f"lanes-{pool}",
                self.folder,
                {**environment, "SOAK_BROKER": self._to(self.to_lanes)},
                *(*COMMAND, "worker", "-Q", "lanes", "-P", pool, "-c", "2", "-l", "WARNING"),
                *("-n", pool + "{life}@%h"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            )
            for pool in ("prefork", "threads")
        ]
        watch = RabbitLaneWatch if self.kind == "rabbitmq" else RedisLaneWatch
        self.lane_watch = watch(self.ledger, self.broker, self._able)
        self.witnesses.append(self.lane_watch)
        processes = [*self.replicates, self.worker, *self.lane_workers]
        self.supervisor = Supervisor(processes, self.replicates)
        for thread in (self.supervisor, *self.witnesses):
            thread.start()
            self._stack.callback(thread.end)
        wait_until(self.reader, "the slot to be read", PATIENCE)
        # Before there is a slot, tasks of transactions are lost.
        self.applications = [
            Process(
                f"application-{kind}",
                self.folder,
                {**environment, **direct},
                *("-m", "tests.soak.carried", kind),
            )
            for kind in carried.DATABASES
        ]
        self.supervisor.take(self.applications)
        seeds = [f"{self._seed}/writer {number}" for number in range(_WRITERS)]
        self.writers = [Writer(self.postgres.dsn(), self.ledger, seed) for seed in seeds]

    def _able(self):
        """Whether both workers for ordered handlers run."""
        return all(worker.running for worker in self.lane_workers)

    def _ways(self, number):
        """Both servers through their proxies; the user's name tells who reads the slot.

        Not a Valkey whose address Sentinel gives.
        """
        port = self.to_postgres.port
        return {
            "SOAK_BROKER": self._to(self.to_broker),
            "SOAK_DSN": f"postgresql://reader_{number}@127.0.0.1:{port}/postgres",
        }

    def _to(self, proxy):
        """The address of the broker through a proxy."""
        return self.broker.url.replace(str(self.broker.port), str(proxy.port))

    def _ask_for_passwords(self):
        """The replication workers log in with a password, and no one else does."""
        hba = self.postgres.data / "pg_hba.conf"
        hba.write_text("host all /^reader_ all scram-sha-256\n" + hba.read_text())
        self.postgres.stop()
        self.postgres.start()

    def password(self, password, seconds):
        """Change the password of the replication workers; they can read it some seconds later."""
        for number in range(1, _REPLICATES + 1):
            self.execute(f"ALTER ROLE reader_{number} PASSWORD '{password}'")
        time.sleep(seconds)
        self._password_file.write_text(password)

    def _create(self):
        with psycopg.connect(self.postgres.dsn(), autocommit=True) as connection:
            for statement in (*SCHEMA, *effects.SCHEMA, *carried.SCHEMA):
                connection.execute(statement)
            for number in range(1, _REPLICATES + 1):
                connection.execute(f"CREATE ROLE reader_{number} SUPERUSER LOGIN PASSWORD 'first'")
            self._password_file.write_text("first")
            connection.execute(f"CREATE PUBLICATION {PUBLICATION} FOR TABLE items, orders, probes")
            connection.execute(f"SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")

    def _keep_log(self, server):
        for log in server.folder.glob("*.log"):
            (self.folder / f"{server.port}-{log.name}").write_bytes(log.read_bytes())

    def execute(self, statement, *parameters):
        """The rows of a statement, once the server takes it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with psycopg.connect(
                    self.postgres.dsn(), autocommit=True, connect_timeout=5
                ) as connection:
                    cursor = connection.execute(statement, parameters or None)
                    return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _see_that_it_goes_on(self):
        for witness in self.witnesses:
            if witness.failure is not None:
                raise witness.failure
        for process in self.replicates:
            if len(process.ends) > 2:
                raise Stalled(f"{process.name} ended by itself again and again")

    def reader(self):
        """The replication worker that reads the slot, if one does."""
        self._see_that_it_goes_on()
        rows = self.execute(
            "SELECT usename FROM pg_replication_slots JOIN pg_stat_activity ON pid = active_pid "
            "WHERE slot_name = 'soak'"
        )
        return self.replicates[int(rows[0][0].rpartition("_")[2]) - 1] if rows else None

    def some_reader(self):
        """The same, once there is one."""
        return wait_until(self.reader, "the slot to be read", PATIENCE)

    def some_call(self, choose):
        """A call of an ordered handler that is under way, and the worker that makes it."""

        def found():
            # The thread that reads the notes changes the dictionary.
            calls = list(self.ledger.under_way.copy().values())
            pairs = [(call, worker) for call in calls for worker in self.lane_workers]
            return [(call, worker) for call, worker in pairs if worker.has(call.pid)]

        return choose.choice(wait_until(found, "a call", PATIENCE))

    def kill_lane_worker(self, worker):
        """Kill a worker with all its processes."""
        began = time.time()
        pids = worker.kill()
        self.harms.ended |= dict.fromkeys(pids, (began, time.time()))

    def probe(self, where):
        """Commit a change, and wait until it has been enqueued or handled.

        Redis may hand the first one to the connection of a worker that was killed just now; the
        reckoning counts it, and here it says nothing of whether all is well: another one is asked.

        Args:
            where: `enqueued`, the handler, or `carried`: a task that is sent now is enqueued.
        """
        if where == "carried":
            self._carry()
            return
        keys = set()
        began = since = time.monotonic()
        first = before = self.ledger.progress(where)
        while not keys & self.ledger.probes[where]:
            if before != (now := self.ledger.progress(where)):
                before, since = now, time.monotonic()
            # On a busy machine it may wait behind many others.
            if time.monotonic() > min(since + PATIENCE, began + 3 * PATIENCE):
                raise Stalled(
                    f"a change was not {where} within {time.monotonic() - began:.0f} s, and "
                    f"{now - first:,} others were"
                )
            if not keys or (where == "each" and time.monotonic() > began + len(keys) * _LOST):
                insert = "INSERT INTO probes VALUES (nextval('keys')) RETURNING id"
                ((key,),) = self.execute(insert)
                keys.add(key)
            self._see_that_it_goes_on()
            time.sleep(0.01)

    def _carry(self):
        ((place,),) = self.execute("SELECT nextval('places')")
        wait_until(lambda: self.carried.latest > place, "a task of a transaction", PATIENCE)
