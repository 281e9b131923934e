"""PostgreSQL 19 needs no more than `wal_level = replica`, and what that costs a standby."""

import re

import pytest
import redis

from example_project.servers import Postgres, Standby, wait_until
from tests.acceptance.steps import assert_handled, assert_refused, created_nothing, insert_rows
from tests.conftest import Database

from .conftest import Shop
from .test_standby import StandbyShop, applied, replicating, set_up_on_the_primary

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, note text)"
REMEDY = "on the primary run ALTER SYSTEM SET wal_level = 'logical'; and restart it"


def since_19(server):
    if Database(server, "postgres").one("SHOW server_version_num") < "190000":
        pytest.skip("PostgreSQL 19 or later")


@pytest.fixture(scope="module")
def primary():
    with Postgres(wal_level="replica") as server:
        since_19(server)
        Database(server, "postgres").execute(ITEMS)
        yield server


@pytest.fixture(scope="module")
def standby(primary):
    with Standby(primary, wal_level="replica") as server:
        yield server


@pytest.fixture
def broker(valkey):
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    return valkey


@pytest.fixture
def shop(primary, broker, tmp_path):
    shop = Shop(Database(primary, "postgres"), broker, tmp_path)
    yield shop
    shop.close()
    assert shop.run("flash", "reset", "--yes", "--force").returncode == 0
    shop.database.execute("TRUNCATE items")


@pytest.fixture
def reader(primary, standby, broker, tmp_path):
    shop = StandbyShop(
        Database(standby, "postgres"), broker, tmp_path, Database(primary, "postgres")
    )
    yield shop
    shop.close()
    slots = "FROM pg_replication_slots WHERE slot_type = 'logical'"
    for database in shop.database, shop.primary:
        wait_until(lambda at=database: not at.execute(f"SELECT 1 {slots} AND active"), "the end")
        database.execute(f"SELECT pg_drop_replication_slot(slot_name) {slots}")
    for (name,) in shop.primary.execute("SELECT pubname FROM pg_publication"):
        shop.primary.execute(f"DROP PUBLICATION {name}")
    shop.primary.execute("TRUNCATE items")


def level(database, expected):
    wait_until(lambda: database.one("SHOW effective_wal_level") == expected, f"level {expected}")


def test_wal_level_replica_suffices(shop):
    doctor = shop.run("flash", "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "ok       wal_level: replica: the first logical slot raises it" in doctor.stdout
    assert created_nothing(shop.database)
    level(shop.database, "replica")
    replicate = shop.replicate()
    shop.worker()
    level(shop.database, "logical")
    insert_rows(shop.database, 1, 100)
    assert_handled(shop, 1, 100)
    shop.end(replicate)
    assert shop.run("flash", "reset", "--yes").returncode == 0
    level(shop.database, "replica")
    # It went down without a restart, and goes up again; what was written before is not read.
    insert_rows(shop.database, 101, 200)
    shop.replicate()
    insert_rows(shop.database, 201, 300)
    ids = {note["new"]["id"] for note in shop.until_noted(200)}
    assert ids == {*range(1, 101), *range(201, 301)}


def test_wal_level_minimal_is_refused_with_advice_for_this_version(valkey, tmp_path):
    with Postgres(wal_level="minimal", max_wal_senders=0) as server:
        since_19(server)
        shop = Shop(Database(server, "postgres"), valkey, tmp_path)
        ended = shop.run("flash", "replicate")
        assert ended.returncode == 2
        assert_refused(ended, "wal_level is minimal.*needs replica: ALTER SYSTEM SET wal_level")
        shop.close()


def test_standby_of_a_primary_without_logical_wal_is_refused(reader):
    level(reader.database, "replica")
    doctor = reader.run("flash", "doctor")
    assert doctor.returncode == 1
    assert re.search(f"STOP     wal_level: effective_wal_level is replica.*{REMEDY}", doctor.stdout)
    ended = reader.run("flash", "replicate")
    assert ended.returncode == 2
    assert_refused(ended, REMEDY)


@pytest.mark.parametrize("running", [True, False])
def test_standby_loses_its_slot_with_the_last_one_of_the_primary(reader, running):
    reader.primary.execute("SELECT pg_create_logical_replication_slot('theirs', 'pgoutput')")
    applied(reader)
    level(reader.database, "logical")
    doctor = reader.run("flash", "doctor")
    assert re.search(f"warning  wal_level: logical, but replica is set.*{REMEDY}", doctor.stdout)
    set_up_on_the_primary(reader)
    replicate = replicating(reader)
    reader.worker()
    insert_rows(reader.primary, 1, 100)
    assert_handled(reader, 1, 100)
    if not running:
        assert reader.end(replicate) == 0
    reader.primary.execute("SELECT pg_drop_replication_slot('theirs')")
    level(reader.primary, "replica")
    if running:
        assert replicate.wait(60) == 2
        said = replicate.log.read_text()
    else:
        level(reader.database, "replica")
        ended = reader.run("flash", "replicate")
        assert ended.returncode == 2
        said = ended.stderr
    assert "are missing" in said
    assert f"wal_level_insufficient); {REMEDY}, then run `flash reset`" in said
    assert "(on a standby flash_on_lost_slot is always 'halt')" in said


def test_reset_warns_that_standbys_lose_their_slots_with_the_last_one(shop, standby):
    shop.end(shop.replicate())
    asked = shop.run("flash", "reset")
    assert f"lose the logical slots of standbys, if there are any: {shop.database.slot}" in (
        asked.stdout
    )
    shop.database.execute("SELECT pg_create_logical_replication_slot('theirs', 'pgoutput')")
    try:
        assert "slots of standbys" not in shop.run("flash", "reset").stdout
    finally:
        shop.database.execute("SELECT pg_drop_replication_slot('theirs')")
