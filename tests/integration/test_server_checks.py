"""Checks of the server's settings, on servers of the tests' own."""

import threading
from contextlib import closing

import psycopg
import pytest

from example_project.servers import Postgres, wait_until
from flash_celery.conditions import parsing
from flash_celery.errors import CatalogError
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.postgres import slots
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.provisioning import preflight
from flash_celery.provisioning.findings import OK, STOP
from flash_celery.settings import Settings
from flash_celery.table_name import TableName
from tests.conftest import Database

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"
SETTINGS = Settings(flash_replication_slot="flash_checked")
ON_ITEMS = Subscription("shop.handle", TableName("public", "items"))


@pytest.fixture(scope="module")
def server():
    with Postgres(max_replication_slots=1) as server:
        yield server


@pytest.fixture
def database(server):
    database = Database(server, "postgres")
    database.execute(ITEMS)
    yield database
    database.execute("DROP TABLE items")


def findings(database, *subscriptions):
    """The findings of a preflight, by their subject."""
    with connect(database.dsn) as connection:
        report = preflight.examine(Source(connection, SETTINGS), subscriptions or [ON_ITEMS])
    return {finding.subject: finding for finding in report.findings}


def test_output_plugin_that_the_server_forbids_is_named_with_the_statement(database):
    if database.one("SELECT current_setting('output_plugin_libraries', true)") is None:
        pytest.skip("output_plugin_libraries")
    assert "output_plugin_libraries" not in findings(database)
    for value in ("'test_decoding'", "''", "'no, pgoutput'", "'its own', test_decoding"):
        database.execute(
            f"ALTER SYSTEM SET output_plugin_libraries = {value}",
            "SELECT pg_reload_conf()",
        )
        wait_until(lambda: "output_plugin_libraries" in findings(database), "a reload")
        found = findings(database)["output_plugin_libraries"]
        assert found.level == STOP
        said, remedy = found.message.split(": ", 1)
        shown = database.one("SHOW output_plugin_libraries")
        assert (
            said
            == f"output_plugin_libraries is '{shown}', and reading changes needs pgoutput in it"
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="may not be used"):
            create_slot(database)
        database.execute(*remedy.rstrip(";").split("; "))
        wait_until(lambda: "output_plugin_libraries" not in findings(database), "a reload")
        create_slot(database)
        database.execute("SELECT pg_drop_replication_slot('flash_checked')")


def test_output_plugin_forbidden_to_a_role_that_cannot_see_why_is_refused(database):
    if database.one("SELECT current_setting('output_plugin_libraries', true)") is None:
        pytest.skip("output_plugin_libraries")
    database.execute(
        "CREATE ROLE weak LOGIN REPLICATION",
        "ALTER SYSTEM SET output_plugin_libraries = 'test_decoding'",
        "SELECT pg_reload_conf()",
    )
    wait_until(lambda: "output_plugin_libraries" in findings(database), "a reload")
    weak = psycopg.conninfo.make_conninfo(database.dsn, user="weak")
    try:
        with connect(weak) as connection:  # and nothing raises
            report = preflight.examine(Source(connection, SETTINGS), [ON_ITEMS])
        assert "output_plugin_libraries" not in {each.subject for each in report.findings}
        with (
            closing(ReplicationConnection(weak)) as stream,
            pytest.raises(CatalogError, match="add pgoutput to output_plugin_libraries"),
        ):
            slots.create(stream, "flash_checked")
    finally:
        database.execute(
            "ALTER SYSTEM RESET output_plugin_libraries",
            "SELECT pg_reload_conf()",
            "DROP ROLE weak",
        )


def create_slot(database):
    database.execute("SELECT pg_create_logical_replication_slot('flash_checked', 'pgoutput')")


def test_slot_of_a_running_repack_takes_no_place(database):
    if database.one("SHOW server_version_num") < "190000":
        pytest.skip("PostgreSQL 19 or later")
    blocker = database.connect()
    blocker.execute("BEGIN")
    blocker.execute("SELECT pg_current_xact_id()")
    repack = threading.Thread(target=database.execute, args=["REPACK (CONCURRENTLY) items"])
    repack.start()
    try:
        wait_until(lambda: database.execute("SELECT 1 FROM pg_replication_slots"), "a slot")
        assert findings(database)["max_replication_slots"].level == OK
    finally:
        blocker.close()
        repack.join(30)


def test_tables_that_repack_refuses_are_named(database):
    if database.one("SHOW server_version_num") < "190000":
        pytest.skip("PostgreSQL 19 or later")
    subject = "REPACK (CONCURRENTLY)"
    assert subject not in findings(database)
    filtered = Subscription(
        "shop.handle", TableName("public", "items"), where=parsing.parse({"name": "a"})
    )
    found = findings(database, filtered)[subject]
    assert (found.level, "public.items" in found.message) == (OK, True)
    database.execute("ALTER TABLE items REPLICA IDENTITY FULL")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        database.execute("REPACK (CONCURRENTLY) items")
