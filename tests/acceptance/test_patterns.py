"""Tables that join a pattern, while the replication worker and the broker die."""

import json
import signal
import threading
import time
from itertools import count

import psycopg
import pytest
import redis

from benchmarks.verify import body_of
from example_project.servers import Valkey, wait_until
from flash_celery import Delete, Insert, Update
from flash_celery.changes import payload
from tests.acceptance.steps import replicate_through, wait_until_confirmed

JOINED = "SELECT count(*) FROM flash_celery_backfills WHERE state = 'done'"


def enqueued(broker):
    """The changes in the queue of the handler, the oldest first."""
    with redis.Redis(port=broker.port) as client:
        bodies = [body_of(message) for message in reversed(client.lrange("tenants", 0, -1))]
    changes = []
    for body in bodies:
        (argument,), _, _ = json.loads(body)
        changes += payload.decode(argument["__value__"])
    return changes


class Tenants(threading.Thread):
    """Creates a tenant again and again, fills it, and uses it at once."""

    def __init__(self, dsn):
        super().__init__(daemon=True)
        self.dsn, self.schemas, self.error = dsn, [], None
        self.ending = threading.Event()

    def run(self):
        try:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                for number in count():
                    if self.ending.is_set():
                        return
                    self.create(connection, f"tenant_{number}")
        except psycopg.Error as error:
            self.error = error

    def until_another(self):
        before = len(self.schemas)
        wait_until(lambda: len(self.schemas) > before, "another tenant")

    def create(self, connection, schema):
        connection.execute(
            f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.orders (id int PRIMARY KEY, total int);"
            f"INSERT INTO {schema}.orders SELECT n, n FROM generate_series(1, 100) n"
        )
        self.schemas.append(schema)
        for n in range(1, 100):
            schema = self.schemas[n % len(self.schemas)]
            connection.execute(f"UPDATE {schema}.orders SET total = total - {n} WHERE id = {n}")
            connection.execute(f"DELETE FROM {schema}.orders WHERE id = {2 * n}")
            connection.execute(
                f"INSERT INTO {schema}.orders VALUES ({100 + n}, {n}) ON CONFLICT DO NOTHING"
            )
            time.sleep(0.02)


def state_of(changes):
    """The tables as a handler has them that applies what it receives."""
    rows = {}
    for change in changes:
        match change:
            case Insert(new=new) | Update(new=new):
                rows[change.schema, new["id"]] = new["total"]
            case Delete(key=key):
                rows.pop((change.schema, key["id"]), None)
    return rows


@pytest.mark.parametrize("pauses", [[0.4], pytest.param([1.3, 0.4, 0.8], marks=pytest.mark.soak)])
def test_tenants_are_delivered_whole_though_worker_and_broker_are_killed(make_shop, pauses):
    with Valkey() as own:
        shop = make_shop(own)
        shop.project = "tenants"
        worker = shop.replicate()
        writer = Tenants(shop.database.dsn)
        writer.start()
        for pause in pauses:
            writer.until_another()
            time.sleep(pause)  # about when its table joins
            shop.end(worker, signal.SIGKILL)
            worker = shop.replicate()
        own.stop(signal.SIGKILL)
        writer.until_another()
        own.start()
        writer.ending.set()
        writer.join(60)
        assert writer.error is None
        wait_until(
            lambda: shop.database.one(JOINED) == len(writer.schemas), "the backfills", timeout=200
        )
        wait_until_confirmed(shop)
        changes = enqueued(own)
        expected = {
            (schema, id): total
            for schema in writer.schemas
            for id, total in shop.database.execute(f"SELECT * FROM {schema}.orders")
        }
        assert state_of(changes) == expected
        assert shop.end(worker) == 0


def test_worker_that_is_killed_while_it_requests_many_backfills_requests_each_once(shop):
    """They are recorded in one transaction."""
    shop.project, schemas = "tenants", [f"tenant_{number}" for number in range(30)]
    shop.end(shop.replicate())
    shop.database.execute(
        *(f"CREATE SCHEMA {name}" for name in schemas),
        *(f"CREATE TABLE {name}.orders (id int PRIMARY KEY, total int)" for name in schemas),
        *(f"INSERT INTO {name}.orders VALUES (1, 1), (2, 2)" for name in schemas),
    )
    worker = replicate_through(shop, "requested:1")
    wait_until(lambda: shop.database.one(JOINED) >= len(schemas), "the backfills")
    rows = [
        (change.schema, change.new["id"])
        for change in enqueued(shop.broker)
        if isinstance(change, Insert)
    ]
    assert sorted(rows) == sorted((name, id) for name in schemas for id in (1, 2))
    assert shop.database.one("SELECT count(*) FROM flash_celery_backfills") == len(schemas)
    assert shop.end(worker) == 0


def test_commands_know_patterns(shop):
    shop.project = "tenants"
    shop.environment["SHOP_CONF"] = json.dumps({"flash_replay_window": 3600})
    shop.database.execute(
        "CREATE SCHEMA tenant_a; CREATE TABLE tenant_a.orders (id int PRIMARY KEY, total int)",
        "INSERT INTO tenant_a.orders VALUES (1, 1)",
        "CREATE SCHEMA tenant_b; CREATE TABLE tenant_b.orders (id int PRIMARY KEY)",
    )

    def flash(*arguments):
        ran = shop.run("flash", *arguments)
        assert ran.returncode == 0, ran.stderr + ran.stdout
        return ran.stdout + ran.stderr

    assert "tenant_a" in flash("doctor", "--sql")
    assert "CREATE EVENT TRIGGER" in flash("doctor", "--event-trigger")
    worker = shop.replicate()
    status = flash("status")
    assert "left out   tenant_b.orders for tenants.mirror: tenant_b.orders has no column" in status
    assert "tenants.mirror  tenant_*.orders" in status
    diagnosis = flash("doctor")
    assert "tenants.mirror on tenant_*.orders: insert|update|delete|truncate: 1 table" in diagnosis
    assert "tenants.mirror on tenant_b.orders: left out: " in diagnosis
    assert "tenant_a.orders for tenants.mirror" in flash("backfill", "mirror", "--dry-run")
    started = flash("backfill", "mirror", "--table", "tenant_a.orders", "--wait")
    assert "tenant_a.orders for tenants.mirror is requested" in started
    tail = shop.start("flash", "tail", "tenant_*.orders", "--limit", "1")
    shop.until_said(tail, "Following tenant_*.orders")
    since = str(shop.database.one("SELECT clock_timestamp()"))
    shop.database.execute("INSERT INTO tenant_a.orders VALUES (2, 2)")
    shop.until_said(tail, "insert tenant_a.orders id=2")
    shop.database.execute("DROP SCHEMA tenant_a CASCADE")
    wait_until_confirmed(shop)
    again = flash("replay", "--handler", "mirror", "--since", since, "--dry-run")
    assert "tenants.mirror: 1 changes of 1 transactions" in again
    assert shop.end(worker) == 0
    flash("reset", "--yes")
    assert shop.database.one("SELECT count(*) FROM pg_publication") == 0
