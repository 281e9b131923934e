"""Tables that join a pattern, while the replication worker and the broker die."""

import json
import signal
import threading
import time
from itertools import count

import psycopg
import redis

from benchmarks.verify import body_of
from example_project.servers import Valkey, wait_until
from flash_celery import Delete, Insert, Update
from flash_celery.changes import payload
from tests.acceptance.steps import wait_until_confirmed


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
            time.sleep(0.03)


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


def test_tenants_are_delivered_whole_though_worker_and_broker_are_killed(make_shop):
    with Valkey() as own:
        shop = make_shop(own)
        shop.project = "tenants"
        worker = shop.replicate()
        writer = Tenants(shop.database.dsn)
        writer.start()
        for pause in (1.3, 0.4):
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
        joined = "SELECT count(*) FROM flash_celery_backfills WHERE state = 'done'"
        wait_until(
            lambda: shop.database.one(joined) == len(writer.schemas), "the backfills", timeout=200
        )
        wait_until_confirmed(shop)
        with redis.Redis(port=own.port) as client:
            bodies = [body_of(message) for message in reversed(client.lrange("tenants", 0, -1))]
        changes = []
        for body in bodies:
            (argument,), _, _ = json.loads(body)
            changes += payload.decode(argument["__value__"])
        expected = {
            (schema, id): total
            for schema in writer.schemas
            for id, total in shop.database.execute(f"SELECT * FROM {schema}.orders")
        }
        assert state_of(changes) == expected
        assert shop.end(worker) == 0
