"""The roles in the documents: their privileges suffice, and they need no others."""

import re
from pathlib import Path

import psycopg
import pytest
import redis

from example_project.servers import wait_until
from flash_celery.errors import CatalogError
from tests.acceptance.steps import created_nothing, psql, publications, slots
from tests.integration.conftest import Flash, shown

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "security.md").read_text() + (DOCS / "operating.md").read_text()
UNMANAGED = '{"flash_manage": false}'


def documented(name, database):
    """The statements of a block, for this database."""
    (statements,) = re.findall(rf"<!-- run: {name} -->\n```sql\n(.*?)```", TEXT, re.DOTALL)
    return statements.replace("DATABASE shop", f'DATABASE "{database.name}"').splitlines()


def drop(server, *roles):
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        for role in roles:
            connection.execute(f"DROP ROLE IF EXISTS {role}")


@pytest.fixture
def owner(database):
    """The owner of the tables, who is no superuser and may not replicate."""
    database.execute(
        "CREATE ROLE shop_owner LOGIN",
        f'GRANT CREATE ON DATABASE "{database.name}" TO shop_owner',
        "GRANT CREATE, USAGE ON SCHEMA public TO shop_owner",
    )
    yield psycopg.conninfo.make_conninfo(database.dsn, user="shop_owner")
    ours = "SELECT rolname FROM pg_roles WHERE rolname ~ '^flash'"
    roles = [name for (name,) in database.execute(ours)]
    for slot in slots(database):
        database.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active",
            f"SELECT pg_drop_replication_slot('{slot}')",
        )
    for role in (*roles, "shop_owner"):
        database.execute(f"DROP OWNED BY {role} CASCADE")
    drop(database.server, *roles, "shop_owner")


@pytest.fixture
def shop(shop, owner):
    shop.database.execute("ALTER TABLE items OWNER TO shop_owner")
    return shop


def as_role(shop, role):
    return psycopg.conninfo.make_conninfo(shop.database.dsn, user=role)


def enqueued(shop, count):
    with redis.Redis(port=shop.broker.port) as client:
        wait_until(lambda: client.llen("flash") == count, f"{count} changes")


def test_role_that_can_only_replicate_needs_setup_by_the_owner(shop, owner):
    database = shop.database
    database.execute(
        f'REVOKE ALL ON DATABASE "{database.name}" FROM PUBLIC',
        f'GRANT CONNECT ON DATABASE "{database.name}" TO shop_owner',
        *documented("reader", database),
    )
    shop.environment |= {
        "SHOP_DSN": as_role(shop, "flash_reader"),
        "SHOP_CONF": UNMANAGED,
        "SHOP_WHERE": "1",
    }
    refused = shop.run("flash", "replicate")
    assert refused.returncode == 2
    (error,) = refused.stderr.splitlines()
    assert error.startswith("Error: flash_manage is off, so the owner of the tables")
    for statement in (
        "CREATE PUBLICATION \"flash_publication_insert\" WITH (publish = 'insert'",
        'ALTER TABLE ONLY "public"."items" REPLICA IDENTITY FULL',
        'ALTER PUBLICATION "flash_publication_update" ADD TABLE ONLY "public"."items"',
        f"SELECT pg_create_logical_replication_slot('{database.slot}', 'pgoutput')",
    ):
        assert statement in error
        assert statement in shop.run("flash", "doctor").stdout
    assert created_nothing(database)

    # The owner may do everything but make the slot, which the reader may.
    script = shop.run("flash", "doctor", "--sql")
    assert script.returncode == 0, script.stderr
    done = psql(shop, script.stdout, owner)
    assert "replication" in done.stderr
    assert len(publications(database)) == 4
    assert slots(database) == []
    left = shop.run("flash", "doctor", "--sql").stdout
    assert [line for line in left.splitlines() if line.startswith("BEGIN")] == [
        f"BEGIN; SELECT pg_create_logical_replication_slot('{database.slot}', 'pgoutput'); COMMIT;"
    ]
    done = psql(shop, left, shop.environment["SHOP_DSN"])
    assert done.returncode == 0, done.stderr

    replicate = shop.replicate()
    database.execute("INSERT INTO items VALUES (1, 'paid')", "UPDATE items SET name = 'a'")
    enqueued(shop, 3)
    doctor = shop.run("flash", "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "ok       publications: as required" in doctor.stdout
    shop.end(replicate)

    reset = shop.run("flash", "reset", "--yes")
    assert reset.returncode == 0, reset.stderr
    assert slots(database) == []
    assert len(publications(database)) == 4
    (note,) = re.findall("flash_manage is off; its owner runs: (.*)", reset.stdout)
    again = shop.run("flash", "replicate")
    assert again.returncode == 2
    assert "pg_create_logical_replication_slot" in again.stderr
    assert slots(database) == []
    assert psql(shop, note, owner).returncode == 0
    assert created_nothing(database)
    assert database.one("SELECT relreplident FROM pg_class WHERE relname = 'items'") == "d"


def test_doctor_script_run_by_a_dba_is_enough(shop):
    database = shop.database
    database.execute(*documented("reader", database))
    script = shop.run("flash", "doctor", "--sql", SHOP_WHERE="1")
    assert psql(shop, script.stdout, database.dsn).returncode == 0
    shop.environment |= {"SHOP_DSN": as_role(shop, "flash_reader"), "SHOP_CONF": UNMANAGED}
    shop.environment["SHOP_WHERE"] = "1"
    shop.end(shop.replicate())
    # A role that manages finds everything as it would have created it.
    nothing = shop.run("flash", "doctor", SHOP_CONF="{}", SHOP_DSN=database.dsn)
    assert "ok       publications: as required" in nothing.stdout
    script = shop.run("flash", "doctor", "--sql")
    assert "BEGIN" not in script.stdout


def test_role_that_can_manage_is_enough(shop):
    database = shop.database
    database.execute(*documented("privileges", database))
    shop.environment |= {"SHOP_DSN": as_role(shop, "flash"), "SHOP_WHERE": "1"}
    replicate = shop.replicate()
    database.execute("INSERT INTO items VALUES (1, 'paid')")
    enqueued(shop, 2)
    shop.end(replicate)
    assert shop.run("flash", "reset", "--yes").returncode == 0
    assert created_nothing(database)


@pytest.fixture
def flash(database, new_app):
    flash = Flash(database, new_app(flash_manage=False))
    yield flash
    flash.stop()


def set_up(flash):
    """Set up as the owner does, with the script."""
    from flash_celery.handlers.app_subscriptions import subscriptions_of
    from flash_celery.postgres.connection import connect
    from flash_celery.postgres.source import Source
    from flash_celery.provisioning import ddl, preflight
    from flash_celery.settings import Settings

    flash.app.finalize()
    settings, subscriptions = Settings.from_app(flash.app), subscriptions_of(flash.app)
    with connect(flash.database.dsn) as connection:
        report = preflight.examine(Source(connection, settings), subscriptions)
    statements = [line for line in ddl.script(report.script) if line.startswith("BEGIN")]
    flash.database.execute(*statements)
    return statements


PARTITIONED = "CREATE TABLE logs (id int PRIMARY KEY, line text) PARTITION BY RANGE (id)"
PARTITION = "CREATE TABLE logs_{0} PARTITION OF logs FOR VALUES FROM ({0}) TO ({1})"


def test_partitions_are_followed_without_management(flash):
    flash.database.execute(PARTITIONED, PARTITION.format(1, 10))
    flash.handler("logs")
    set_up(flash)
    flash.start()
    flash.do("INSERT INTO logs VALUES (1, 'a')", PARTITION.format(10, 20))
    flash.do("INSERT INTO logs VALUES (10, 'b')")
    flash.wait(lambda: len(flash.replicator._startup.partition_history._recorded) == 2)
    flash.do(
        "INSERT INTO logs VALUES (11, 'c'); ALTER TABLE logs DETACH PARTITION logs_10",
        "DROP TABLE logs_10",
    )
    assert shown(flash.delivered()) == ["insert 1,a", "insert 10,b", "insert 11,c"]
    # The owner has yet to record this partition, which stops no worker.
    flash.database.execute(PARTITION.format(20, 30))
    *others, statement = set_up(flash)
    assert "COMMENT ON" in statement
    old = flash.database.one("SHOW server_version_num") < "150000"
    assert [("SET (publish_via" in other) for other in others] == [True] * old


def test_dropped_slot_is_recreated_by_its_owner_without_management(flash):
    """Its owner recreates it, and is shown which changes are lost."""
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items")
    set_up(flash)
    flash.start().do("INSERT INTO items VALUES (1)").stop()
    drop = f"SELECT pg_drop_replication_slot('{flash.database.slot}')"
    flash.database.execute("INSERT INTO items VALUES (2)", drop)
    with pytest.raises(CatalogError, match="existed before, changes from .* to .* are missing"):
        flash.start()
    flash.error = None
    set_up(flash)
    flash.start().do("INSERT INTO items VALUES (3)")
    assert shown(flash.delivered()) == ["insert 1", "insert 3"]


def test_table_that_becomes_a_partition_is_followed_without_management(flash, caplog):
    """PostgreSQL 14 needs the owner, and the error names it; later versions do not."""
    flash.database.execute(
        PARTITIONED, PARTITION.format(1, 10), "CREATE TABLE logs_10 (id int PRIMARY KEY, line text)"
    )
    flash.handler("logs")
    set_up(flash)
    flash.start()
    flash.do("INSERT INTO logs VALUES (1, 'a')", "INSERT INTO logs_10 VALUES (10, 'a')")
    flash.do("ALTER TABLE logs ATTACH PARTITION logs_10 FOR VALUES FROM (10) TO (20)")
    flash.wait(lambda: len(flash.replicator._startup.partition_history._recorded) == 2)
    warnings = [line for line in caplog.messages if "may leave out rows" in line]
    old = flash.database.one("SHOW server_version_num") < "150000"
    assert len(warnings) == old
    set_up(flash)
    flash.do("INSERT INTO logs VALUES (11, 'b')")
    assert shown(flash.delivered()) == ["insert 1,a", "insert 11,b"]


def test_partition_that_needs_old_values_waits_for_its_owner(flash):
    flash.database.execute(PARTITIONED, PARTITION.format(1, 10))
    flash.handler("logs", where={"line": "a"})
    set_up(flash)
    flash.start()
    flash.do("INSERT INTO logs VALUES (1, 'a')")
    flash.database.execute(PARTITION.format(10, 20))
    flash.thread.join(20)
    assert 'ALTER TABLE ONLY "public"."logs_10" REPLICA IDENTITY FULL' in str(flash.error)
    flash.database.execute("INSERT INTO logs VALUES (10, 'a')")
    set_up(flash)
    flash.error = None
    flash.start()
    flash.do("UPDATE logs SET line = 'b'")
    assert shown(flash.delivered()) == ["insert 1,a", "insert 10,a", "delete 1,a", "delete 10,a"]
