"""SIGTERM in every state: exit code 0 in time, and nothing is left behind."""

import json
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import psycopg
import pytest

from example_project.servers import free_port, wait_until
from tests.acceptance.network import Network, is_catalog_query, is_stream
from tests.acceptance.steps import insert_rows, use_streaming, wait_until_confirmed
from tests.proxy import Proxy

#: Seconds; what is in flight gets so much time.
LIMIT = 2
#: … and a machine that is busy with other tests some more.
GENEROUS = LIMIT + 8
MANY = "INSERT INTO items SELECT n, repeat('x', 300) FROM generate_series(1, {}) AS n"


class State:
    """A replication worker that is brought into some state."""

    def __init__(self, shop, folder, stack):
        self.shop = shop
        self.folder = folder
        self._enter = stack.enter_context
        self._configure()

    def _configure(self, **conf):
        conf = {"flash_shutdown_timeout": LIMIT, "flash_status_interval": 30, **conf}
        self.shop.environment["SHOP_CONF"] = json.dumps(conf)

    def _network(self):
        ports = self.shop.database.server.port, self.shop.broker.port
        network = Network(self.shop, *(self._enter(Proxy(port)) for port in ports))
        self._configure()
        return network

    def _until_said(self, process, text):
        self.shop.until_said(process, text)
        return process

    # The states.

    def idle(self):
        process = self.shop.replicate()
        insert_rows(self.shop.database, 1, 10)
        wait_until_confirmed(self.shop)
        return process

    def delivering_a_large_transaction(self):
        process = self.shop.replicate()
        self.shop.database.execute(MANY.format(50_000))
        time.sleep(0.3)
        return process

    def receiving_an_open_transaction(self):
        use_streaming(
            self.shop, flash_shutdown_timeout=LIMIT, flash_spool_directory=str(self.folder)
        )
        process = self.shop.replicate()
        self._enter(self.shop.database.connect()).execute(f"BEGIN; {MANY.format(20_000)}")
        spools = Path(f"/proc/{process.pid}/fd")
        wait_until(
            lambda: any(str(self.folder) in str(end.resolve()) for end in spools.iterdir()),
            "a spool",
        )
        return process

    def with_a_broker_that_is_silent(self):
        network = self._network()
        process = self.shop.replicate()
        network.broker.stall()
        insert_rows(self.shop.database, 1, 10)
        time.sleep(0.5)
        return process

    def with_a_stream_that_is_silent(self, picked=is_stream):
        network = self._network()
        process = self.shop.replicate()
        network.postgresql.stall(only=picked)
        insert_rows(self.shop.database, 1, 10)
        time.sleep(1.5)  # it looks at the tables each second
        return process

    def with_a_catalog_that_is_silent(self):
        return self.with_a_stream_that_is_silent(is_catalog_query)

    def connecting_to_a_silent_postgresql(self):
        network = self._network()
        network.postgresql.stall()
        process = self.shop.replicate(wait=False)
        wait_until(lambda: network.postgresql.accepted, "a connection")
        time.sleep(0.5)
        return process

    def waiting_for_postgresql(self):
        dsn = psycopg.conninfo.make_conninfo(self.shop.database.dsn, port=free_port())
        process = self.shop.replicate(wait=False, SHOP_DSN=dsn)
        return self._until_said(process, "The connection to PostgreSQL failed")

    def waiting_for_the_slot(self):
        self.shop.replicate()
        return self._until_said(self.shop.replicate(wait=False), "is active for PID")

    def waiting_for_workers(self):
        process = self.shop.replicate("--wait-for-workers", wait=False)
        return self._until_said(process, "Waiting for Celery workers")

    def waiting_for_workers_without_a_broker(self):
        process = self.shop.replicate(
            "--wait-for-workers", wait=False, SHOP_BROKER=f"redis://127.0.0.1:{free_port()}"
        )
        return self._until_said(process, "Waiting for Celery workers")

    def waiting_for_a_lock(self):
        locker = self._enter(self.shop.database.connect())
        locker.execute("BEGIN; LOCK items")
        process = self.shop.replicate(wait=False)
        return self._until_said(process, "waits for PID")

    def creating_the_slot(self):
        """Which waits for the transactions that were open."""
        other = self._enter(self.shop.database.connect())
        other.execute("CREATE TABLE other (id int)")
        other.execute("BEGIN; INSERT INTO other VALUES (1)")
        process = self.shop.replicate(wait=False)
        waits = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}'"
        wait_until(
            lambda: self.shop.database.one(waits.format(self.shop.database.slot)), "the slot"
        )
        return process


STATES = [name for name in vars(State) if not name.startswith("_")]


@pytest.mark.parametrize("state", STATES)
def test_sigterm_ends_every_state_in_time(shop, tmp_path, state):
    folder = tmp_path / "spool"
    folder.mkdir()
    with ExitStack() as stack:
        process = getattr(State(shop, folder, stack), state)()
        family = psutil.Process(process.pid).children(recursive=True)
        try:
            assert shop.end(process, signal.SIGTERM, GENEROUS) == 0
        except subprocess.TimeoutExpired:
            pytest.fail(process.log.read_text())
        assert "Traceback" not in process.log.read_text()
        assert not psutil.wait_procs(family, timeout=0)[1]
        assert list(folder.iterdir()) == []
        assert process.poll() is not None
    others = [running for running in shop.processes if running.poll() is None]
    shop.close()
    connections = f"""
        SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'flash_celery' AND datname = '{shop.database.name}'"""
    wait_until(lambda: shop.database.one(connections) == 0, "PostgreSQL to notice")
    temporary = "SELECT count(*) FROM pg_replication_slots WHERE temporary OR active"
    assert shop.database.one(temporary) == 0
    assert len(others) == (state == "waiting_for_the_slot")
