"""The primary dies, and its standby goes on with a copy of the slot (PostgreSQL 17 and later)."""

import json
import signal

import pytest

from example_project.servers import Postgres, Standby, wait_until
from tests.acceptance.steps import assert_handled, insert_rows
from tests.conftest import Database, missing

from .conftest import Shop

CONF = json.dumps(
    {"flash_failover_slot": True, "flash_status_interval": 2, "flash_heartbeat_interval": 1}
)
FOLLOWING = {
    # No commit returns, and no change is delivered, before the standby has it.
    "synchronous_standby_names": "standby",
    "synchronized_standby_slots": "standby",
}


@pytest.fixture
def primary():
    with Postgres() as primary:
        if Database(primary, "postgres").one("SHOW server_version_num") < "170000":
            missing("PostgreSQL 17 or later")
        yield primary


@pytest.fixture
def standby(primary):
    with Standby(primary, sync_replication_slots="on") as standby:
        alter(primary, **FOLLOWING)
        yield standby
        alter(primary, **dict.fromkeys(FOLLOWING, ""))


def alter(server, **settings):
    if server.process is None:
        return
    for name, value in settings.items():
        Database(server, "postgres").execute(f"ALTER SYSTEM SET {name} = '{value}'")
    Database(server, "postgres").execute("SELECT pg_reload_conf()")


@pytest.fixture
def shop(primary, standby, valkey, tmp_path):
    import redis

    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    database = Database(primary, "postgres")
    database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
    database.dsn = (
        f"host=127.0.0.1,127.0.0.1 port={primary.port},{standby.port} user=postgres "
        "dbname=postgres target_session_attrs=read-write"
    )
    shop = Shop(database, valkey, tmp_path, SHOP_CONF=CONF)
    yield shop
    shop.close()


def copied(shop, standby):
    """Wait until the standby's copy of the slot would survive."""
    there = Database(standby, "postgres")

    def ready():
        # The slot of the primary must have advanced since its copy was begun.
        shop.database.execute("SELECT pg_log_standby_snapshot()")
        return there.execute(
            "SELECT 1 FROM pg_replication_slots WHERE synced AND NOT temporary "
            f"AND invalidation_reason IS NULL AND slot_name = '{shop.database.slot}'"
        )

    wait_until(ready, "the slot to be copied", 120)


def test_failover_loses_nothing(shop, primary, standby):
    replicate = shop.replicate()
    shop.worker()
    insert_rows(shop.database, 1, 100)
    copied(shop, standby)
    doctor = shop.run("flash", "doctor").stdout
    assert (
        f"failover to 127.0.0.1:{standby.port}: {shop.database.slot} has been copied and is ready"
        in doctor
    )
    assert "synchronized_standby_slots: standby is connected" in doctor
    insert_rows(shop.database, 101, 200)
    primary.stop(signal.SIGKILL)
    Database(standby, "postgres").execute("SELECT pg_promote()")
    insert_rows(shop.database, 201, 300)
    assert_handled(shop, 1, 300)
    assert shop.end(replicate) == 0


def test_failover_option_is_added_to_an_existing_slot(shop, primary, standby):
    shop.end(shop.replicate(SHOP_CONF="{}"))
    query = "SELECT failover FROM pg_replication_slots WHERE slot_type = 'logical'"
    assert not shop.database.one(query)
    replicate = shop.replicate()
    assert shop.database.one(query)
    copied(shop, standby)
    there = Database(standby, "postgres").dsn
    refused = shop.run("flash", "replicate", SHOP_DSN=there)
    assert refused.returncode == 2
    assert "This is a standby, and flash_failover_slot works on a primary only" in refused.stderr
    refused = shop.run("flash", "replicate", SHOP_DSN=there, SHOP_CONF="{}")
    assert refused.returncode == 2
    assert "is the copy of the primary's slot, which cannot be read" in refused.stderr
    shop.end(replicate)


@pytest.mark.soak  # 20 s of waiting
def test_failover_waits_for_an_absent_standby_are_logged(shop, primary, standby):
    replicate = shop.replicate()
    shop.worker()
    standby.stop()
    alter(primary, synchronous_standby_names="")
    insert_rows(shop.database, 1, 100)
    shop.until_said(replicate, "holds changes back until the standbys")
    assert shop.notes() == []
    assert "the standby of standby is not connected" in shop.run("flash", "doctor").stdout
    standby.start()
    shop.until_said(replicate, "PostgreSQL sends changes again")
    assert_handled(shop, 1, 100)
    assert replicate.log.read_text().count("holds changes back") == 1
    assert replicate.log.read_text().count("does not have active_pid") == 1
    assert "reconnecting" not in replicate.log.read_text()


def test_doctor_names_what_a_standby_lacks_for_a_failover(shop, primary):
    with Standby(primary, "plain", hot_standby_feedback="off") as plain:
        conninfo = f"host=127.0.0.1 port={primary.port} user=postgres"
        plain.stop()
        plain.options["primary_conninfo"] = conninfo
        plain.start()
        dsn = shop.database.dsn.replace("host=127.0.0.1,", "host=127.0.0.1,127.0.0.1,")
        dsn = dsn.replace(f"port={primary.port},", f"port={primary.port},{plain.port},")
        alter(primary, synchronized_standby_slots="")
        output = shop.run("flash", "doctor", SHOP_DSN=dsn).stdout
    for text in (
        "synchronized_standby_slots: empty",
        f"failover to 127.0.0.1:{plain.port}: sync_replication_slots is not on",
        "hot_standby_feedback is not on",
        "primary_conninfo has no dbname",
    ):
        assert text in output
