"""The session settings of our connections, whatever environment, DSN, role and database set."""

from contextlib import closing

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from flash_celery.commands import doctor
from flash_celery.errors import CatalogError
from flash_celery.postgres import connection as connections
from flash_celery.postgres import slots
from flash_celery.postgres.connection import connect, overridden
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.provisioning import server_checks
from flash_celery.settings import Settings


def shown(dsn, *names):
    """Return the settings of both connections, which must agree."""
    with connect(dsn) as ordinary, closing(ReplicationConnection(dsn)) as stream:
        values = []
        for name in names:
            query = sql.SQL("SELECT current_setting({}, true)").format(sql.Literal(name))
            value = (stream.execute(query).get_value(0, 0) or b"").decode()
            row = ordinary.execute(query).fetchone()
            assert row is not None
            assert (row[0] or "") == value, name
            values.append(value)
        return values


@pytest.fixture
def alter(database):
    """Alter settings of the database."""

    def run(**settings):
        for name, value in settings.items():
            database.execute(f"ALTER DATABASE \"{database.name}\" SET {name} = '{value}'")

    return run


@pytest.mark.parametrize("how", ["PGCLIENTENCODING", "DSN", "role"])
def test_session_encoding_is_utf8_and_a_condition_matches(flash, alter, monkeypatch, how):
    database = flash.database
    database.execute("CREATE TABLE shops (id int PRIMARY KEY, city text)")
    dsn = database.dsn
    if how == "PGCLIENTENCODING":
        monkeypatch.setenv(how, "LATIN1")
    elif how == "DSN":
        dsn = make_conninfo(dsn, client_encoding="LATIN1")
    else:
        alter(client_encoding="LATIN1")
    flash.handler("shops", where={"city": "Zürich"}).start(flash_dsn=dsn)
    monkeypatch.delenv("PGCLIENTENCODING", raising=False)
    with psycopg.connect(database.dsn, autocommit=True, client_encoding="UTF8") as connection:
        connection.execute("INSERT INTO shops VALUES (1, 'Zürich'), (2, 'Łódź')")
    flash.do("SELECT 1")
    (change,) = flash.delivered()
    assert change.new["city"] == "Zürich"


def test_session_dates_are_those_without_pgtz_and_pgdatestyle(flash, monkeypatch):
    flash.database.execute("CREATE TABLE events (id int PRIMARY KEY, at timestamptz, day date)")
    monkeypatch.setenv("PGTZ", "Asia/Kathmandu")
    monkeypatch.setenv("PGDATESTYLE", "German")
    flash.handler("events", where={"day": "02/03/2024"}).start()
    flash.do("INSERT INTO events VALUES (1, '2024-02-29 12:00:00+00', '2024-02-03')")
    (change,) = flash.delivered()
    assert change.new["at"].isoformat() == "2024-02-29T12:00:00+00:00"
    assert change.new["day"].isoformat() == "2024-02-03"


def test_session_settings_of_a_database_do_not_change_constants_of_where(flash, alter):
    flash.database.execute("CREATE TABLE lists (id int PRIMARY KEY, tags text[], day date)")
    alter(array_nulls="off", datestyle="German, DMY")
    flash.handler("lists", where={"tags": ["a", None], "day": "02/03/2024"}).start()
    flash.do("INSERT INTO lists VALUES (1, ARRAY['a', NULL], '2024-02-03')")
    assert [change.new["id"] for change in flash.delivered()] == [1]


def test_session_limits_of_a_database_are_switched_off(database, alter):
    limits = {name: "7s" for name in connections.LIMITS if name != "transaction_timeout"}
    if int(database.one("SHOW server_version_num")) >= 170000:
        limits["transaction_timeout"] = "9s"
    alter(**limits, synchronous_commit="off", quote_all_identifiers="on", jit="on")
    assert shown(database.dsn, *limits) == ["0"] * len(limits)
    assert shown(database.dsn, "synchronous_commit", "quote_all_identifiers") == ["local", "off"]
    assert shown(database.dsn, "jit") == ["off"]
    own = make_conninfo(database.dsn, options="-c lock_timeout=3s")
    assert shown(own, "lock_timeout", "statement_timeout") == ["3s", "0"]


def test_session_settings_of_the_catalog_are_those_of_postgresql(flash, alter):
    """An object of the project with the name of one of PostgreSQL's is not taken for it."""
    flash.database.execute(
        "CREATE SCHEMA app",
        "CREATE TABLE app.pg_publication (pubname name)",
        "CREATE FUNCTION app.pg_is_in_recovery() RETURNS bool LANGUAGE sql AS 'SELECT true'",
        "CREATE TABLE app.items (id int PRIMARY KEY)",
    )
    flash.database.execute(
        f'ALTER DATABASE "{flash.database.name}" SET search_path = app, pg_catalog'
    )
    with connect(flash.database.dsn) as connection:
        found = connection.execute("SELECT 'pg_class'::regclass, 'items'::regclass").fetchone()
        assert found == ("pg_class", "items")  # the rest of the path stays
    flash.handler("app.items").start()
    insert = "SET search_path TO DEFAULT; INSERT INTO app.items VALUES (1)"
    with psycopg.connect(flash.database.dsn, autocommit=True) as connection:
        connection.execute(insert)
    flash.wait(lambda: flash.publisher.queues.get("flash"))
    assert [change.new["id"] for change in flash.delivered()] == [1]


def test_session_messages_are_those_that_the_worker_reads(database, alter):
    alter(client_min_messages="error", exit_on_error="on", timezone_abbreviations="Australia")
    names = "client_min_messages", "exit_on_error", "timezone_abbreviations"
    assert shown(database.dsn, *names) == ["notice", "off", "Default"]


def test_session_settings_of_money_are_those_of_the_role_on_both_connections(database, alter):
    """They are part of the meaning of a value: a yen has no cents. So they are not ours."""
    alter(lc_monetary="POSIX")
    assert shown(database.dsn, "lc_monetary") == ["POSIX"]


def test_session_options_of_environment_and_service_are_kept(database, monkeypatch, tmp_path):
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=7MB")
    assert shown(database.dsn, "work_mem") == ["7MB"]
    services = tmp_path / "services"
    services.write_text(
        f"[shop]\nhost=127.0.0.1\nport={database.server.port}\nuser=postgres\n"
        f"dbname={database.name}\noptions=-c work_mem=8MB\nclient_encoding=LATIN1\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    assert shown("service=shop", "work_mem", "client_encoding") == ["8MB", "UTF8"]
    monkeypatch.setenv("PGSERVICE", "shop")
    assert shown("", "work_mem", "client_encoding") == ["8MB", "UTF8"]


def test_session_settings_that_are_overridden_are_listed_by_doctor(database, alter, app):
    app.conf.flash_dsn = database.dsn
    assert list(server_checks.session_findings(Settings.from_app(app))) == []
    alter(lock_timeout="7s")
    app.conf.flash_dsn = make_conninfo(database.dsn, client_encoding="LATIN1")
    (finding,) = server_checks.session_findings(Settings.from_app(app))
    assert doctor.as_text(finding) == (
        "ok       session settings: client_encoding = LATIN1 of the DSN or the environment, "
        "lock_timeout = 7000ms of the database: not used by flash-celery"
    )
    assert overridden(make_conninfo(database.dsn, client_encoding="SQL_ASCII"))


def test_session_lock_timeout_does_not_end_the_wait_for_a_slot(flash, alter):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    alter(lock_timeout="100ms")
    with psycopg.connect(flash.database.dsn) as writer:
        writer.execute("CREATE TABLE other ()")
        with closing(ReplicationConnection(flash.database.dsn)) as stream:
            waited = []

            def on_wait(seconds):
                waited.append(seconds)
                if seconds > 1:
                    writer.commit()

            slots.create(stream, flash.database.slot, on_wait=on_wait)
    assert waited[-1] > 1


@pytest.fixture
def login(database):
    """A role that may replicate, and becomes the owner of the tables when it logs in."""
    database.execute(
        "CREATE ROLE field_owner",
        f'GRANT CREATE ON DATABASE "{database.name}" TO field_owner',
        "CREATE ROLE field_login LOGIN REPLICATION IN ROLE field_owner",
        "ALTER ROLE field_login SET role = 'field_owner'",
        "CREATE TABLE items (id int PRIMARY KEY, name text)",
        "ALTER TABLE items OWNER TO field_owner",
    )
    yield make_conninfo(database.dsn, user="field_login")
    database.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active",
        "DROP OWNED BY field_owner CASCADE",
        "DROP ROLE field_login",
        "DROP ROLE field_owner",
    )


def test_session_role_of_the_owner_may_replicate_as_its_login_role(flash, login):
    flash.handler("items").start(flash_dsn=login, flash_replay_window=3600)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    assert [change.new["id"] for change in flash.delivered()] == [1]
    owner = "SELECT DISTINCT pg_get_userbyid(pubowner) FROM pg_publication"
    assert flash.database.one(owner) == "field_owner"
    replay_slot = f"{flash.database.slot}_replay"
    names = flash.database.execute("SELECT slot_name FROM pg_replication_slots")
    assert len(names) == 2, replay_slot
    flash.stop()
    with connect(login) as connection:
        for (name,) in names:
            slots.drop(connection, name)


def test_session_that_is_read_only_is_refused_with_the_statement(flash, alter):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    alter(default_transaction_read_only="on")
    flash.handler("items")
    message = 'ALTER ROLE "postgres" SET default_transaction_read_only = off;'
    with pytest.raises(CatalogError, match=message):
        flash.start()


def test_session_role_that_does_not_inherit_is_advised_to(flash, login):
    database = flash.database
    database.execute("ALTER ROLE field_login RESET role", "ALTER ROLE field_login NOINHERIT")
    advice = 'ALTER ROLE "field_login" INHERIT;'
    if int(database.one("SHOW server_version_num")) >= 160000:
        advice = 'TO "field_login" WITH INHERIT TRUE;'
        database.execute("GRANT field_owner TO field_login WITH INHERIT FALSE")
    database.execute(f'GRANT CREATE ON DATABASE "{database.name}" TO field_login')
    try:
        with pytest.raises(CatalogError, match=advice):
            flash.handler("items").start(flash_dsn=login)
    finally:
        database.execute(f'REVOKE CREATE ON DATABASE "{database.name}" FROM field_login')
