"""A standby is read, and never written (PostgreSQL 16 and later)."""

import json
import re
from contextlib import contextmanager

import pytest
import redis
from celery import Celery

from example_project.servers import Postgres, Standby, wait_until
from flash_celery import on_change
from flash_celery.backfill.new_handlers import NewHandlers
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source
from flash_celery.settings import Settings
from tests.acceptance.steps import assert_handled, insert_rows
from tests.conftest import Database, missing

from .conftest import Shop

ORDERS = "CREATE TABLE {}.orders (id int PRIMARY KEY, total int)"


@pytest.fixture(scope="module")
def pair():
    with Postgres() as primary:
        if Database(primary, "postgres").one("SHOW server_version_num") < "160000":
            missing("PostgreSQL 16 or later")
        with Standby(primary) as standby:
            yield primary, standby


class StandbyShop(Shop):
    """The shop on a standby of the server `primary`."""

    def __init__(self, standby, broker, folder, primary):
        super().__init__(standby, broker, folder)
        self.primary = primary


@pytest.fixture
def shop(pair, valkey, tmp_path):
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    primary, standby = (Database(server, "postgres") for server in pair)
    primary.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
    shop = StandbyShop(standby, valkey, tmp_path, primary)
    applied(shop)
    yield shop
    shop.close()
    slots = "FROM pg_replication_slots WHERE slot_type = 'logical'"
    wait_until(
        lambda: not standby.execute(f"SELECT 1 {slots} AND active"), "the slot to be let go of"
    )
    standby.execute(f"SELECT pg_drop_replication_slot(slot_name) {slots}")
    for (name,) in primary.execute("SELECT pubname FROM pg_publication"):
        primary.execute(f"DROP PUBLICATION {name}")
    primary.execute("DROP TABLE items")


def applied(shop):
    """Wait until the standby has everything."""
    goal = shop.primary.one("SELECT pg_current_wal_insert_lsn()")
    wait_until(
        lambda: shop.database.one(f"SELECT pg_last_wal_replay_lsn() >= '{goal}'::pg_lsn"),
        "the standby to follow",
    )


def set_up_on_the_primary(shop):
    """Return the SQL that the message of `replicate` asks for."""
    ended = shop.run("flash", "replicate")
    assert ended.returncode == 2
    (statements,) = re.findall(r"on the primary run: (.*);$", ended.stderr, re.MULTILINE)
    shop.primary.execute(statements)
    applied(shop)


def replicating(shop):
    """Start on the standby, which waits for its primary to tell which transactions are open."""
    replicate = shop.replicate(wait=False)
    wait_until(
        lambda: (
            shop.primary.execute("SELECT pg_log_standby_snapshot()")
            and (
                "Replicating the slot" in replicate.log.read_text() or replicate.poll() is not None
            )
        ),
        "the slot to be created",
    )
    shop.until_said(replicate, "Replicating the slot")
    return replicate


def test_standby_delivers_changes(shop):
    doctor = shop.run("flash", "doctor")
    assert "on the primary run: CREATE PUBLICATION" in doctor.stdout
    set_up_on_the_primary(shop)
    replicate = replicating(shop)
    shop.worker()
    insert_rows(shop.primary, 1, 100)
    assert_handled(shop, 1, 100)
    status = shop.run("flash", "status")
    assert status.returncode == 0, status.stderr
    backfill = shop.run("flash", "backfill", "each")
    assert backfill.returncode == 2
    assert "name the primary in flash_dsn to backfill" in backfill.stderr
    assert shop.end(replicate) == 0
    insert_rows(shop.primary, 101, 200)
    shop.replicate()
    assert_handled(shop, 1, 200)


def test_new_handler_that_asks_for_a_backfill_is_read_on_a_standby_without(pair, caplog):
    app = Celery()
    app.conf.flash_dsn = pair[1].dsn("postgres")

    @on_change("items", backfill=True)
    @app.task
    def copy(change): ...

    settings = Settings.from_app(app)
    with connect(settings.require_dsn()) as connection:
        NewHandlers(subscriptions_of(app)).request(Source(connection, settings))
    assert "name the primary in flash_dsn to backfill" in caplog.text


@pytest.mark.soak
def test_tables_join_a_pattern_on_a_standby_when_their_owner_has_published_them(shop, valkey):
    shop.project = "tenants"
    shop.primary.execute("CREATE SCHEMA tenant_a", ORDERS.format("tenant_a"))
    try:
        applied(shop)
        set_up_on_the_primary(shop)
        replicate = replicating(shop)
        shop.primary.execute("CREATE SCHEMA tenant_b", ORDERS.format("tenant_b"))
        shop.until_said(replicate, "tenant_b.orders: it is not published")
        (script,) = re.findall(r"its owner runs: (.*);", replicate.log.read_text())
        shop.primary.execute(*script.split("; "), "INSERT INTO tenant_b.orders VALUES (1, 1)")
        with redis.Redis(port=valkey.port) as client:
            wait_until(lambda: client.llen("tenants"), "the row")
        assert "as required, but not recorded" in shop.run("flash", "doctor").stdout
        assert shop.end(replicate) == 0
    finally:
        shop.primary.execute("DROP SCHEMA tenant_a, tenant_b CASCADE")


def test_standby_that_is_promoted_goes_on_in_its_new_timeline(valkey, tmp_path):
    with redis.Redis(port=valkey.port) as client, Postgres() as server:
        client.flushall()
        primary = Database(server, "postgres")
        if primary.one("SHOW server_version_num") < "160000":
            missing("PostgreSQL 16 or later")
        primary.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
        with Standby(server) as other, closing_shop(other, valkey, tmp_path, primary) as shop:
            applied(shop)
            set_up_on_the_primary(shop)
            replicate = replicating(shop)
            insert_rows(primary, 1, 10)
            wait_until(lambda: client.llen("flash") == 10, "the rows")
            applied(shop)
            server.stop()
            shop.database.execute("SELECT pg_promote()")
            shop.until_said(replicate, "The standby was promoted; reconnecting.")
            insert_rows(shop.database, 11, 20)
            wait_until(lambda: client.llen("flash") == 20, "the rows after the promotion")
            histories = [
                json.loads(json.loads(text)["body"])[0][0]["__value__"]["history"][0][1:]
                for text in reversed(client.lrange("flash", 0, -1))
            ]
            assert histories[:10] == [[1]] * 10
            assert [(timeline, ancestors[0][0]) for timeline, ancestors in histories[10:]] == [
                (2, 1)
            ] * 10
            shop.worker()
            assert_handled(shop, 1, 20)


@contextmanager
def closing_shop(*arguments):
    server, *others = arguments
    shop = StandbyShop(Database(server, "postgres"), *others)
    try:
        yield shop
    finally:
        shop.close()


def test_standby_slot_loss_is_noticed_once_the_primary_records_the_slot(shop):
    set_up_on_the_primary(shop)
    replicate = replicating(shop)
    (note,) = re.findall(r"on the primary run (COMMENT .*);$", replicate.log.read_text(), re.M)
    shop.primary.execute(note)
    assert shop.end(replicate) == 0
    wait_until(
        lambda: not shop.database.execute("SELECT 1 FROM pg_replication_slots WHERE active"),
        "the slot to be let go of",
    )
    shop.database.execute(f"SELECT pg_drop_replication_slot('{shop.database.slot}')")
    applied(shop)
    refused = shop.run("flash", "backfill", "start", "each")
    assert "This server is a standby, which does not show which transactions run" in refused.stderr
    for setting in ("halt", "recreate"):  # which would have to be recorded
        ended = shop.run("flash", "replicate", SHOP_CONF=f'{{"flash_on_lost_slot": "{setting}"}}')
        assert ended.returncode == 2
        assert "existed and is gone: changes from an unknown position to " in ended.stderr
        assert "if the slot is its primary's, connect to that (target_session_at" in ended.stderr


def test_standby_logs_missing_objects_while_it_waits(shop):
    set_up_on_the_primary(shop)
    with shop.primary.connect() as connection, connection.transaction():
        # Or the primary may happen to tell of its transactions just then.
        connection.execute("SELECT pg_current_xact_id()")
        replicate = shop.replicate(wait=False)
        shop.until_said(replicate, "on the primary run SELECT pg_log_standby_snapshot()")
        assert shop.end(replicate) == 0
    wait_until(
        lambda: not shop.database.execute("SELECT 1 FROM pg_replication_slots"),
        "the slot to be given up",
    )


def test_reset_on_a_standby_drops_its_slot_and_prints_sql_for_the_primary(shop):
    set_up_on_the_primary(shop)
    shop.end(replicating(shop))
    done = shop.run("flash", "reset", "--yes")
    assert done.returncode == 0, done.stderr
    assert "on the primary run DROP PUBLICATION" in done.stdout
    assert not shop.database.execute("SELECT 1 FROM pg_replication_slots")
