"""A role that may not set up what the handlers need is refused with the SQL that helps."""

import re

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from flash_celery.errors import CatalogError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.postgres.source import connected
from flash_celery.provisioning import preflight
from flash_celery.provisioning.findings import WARNING
from flash_celery.settings import Settings

from .conftest import shown

CREATED = """
SELECT (SELECT count(*) FROM pg_publication)
     + (SELECT count(*) FROM pg_replication_slots WHERE database = current_database())
"""


@pytest.fixture
def roles(database):
    """Owns the table `items`; a role that may replicate and create publications; one between."""
    database.execute(
        "CREATE ROLE field_owner",
        "CREATE ROLE field_login LOGIN REPLICATION",
        "CREATE ROLE field_group",
        f'GRANT CREATE ON DATABASE "{database.name}" TO field_login, field_owner',
        "CREATE SCHEMA sales AUTHORIZATION field_owner",
        "CREATE TABLE sales.items (id int PRIMARY KEY, name text)",
        "ALTER TABLE sales.items OWNER TO field_owner",
        "GRANT USAGE ON SCHEMA sales TO field_login",
    )
    yield make_conninfo(database.dsn, user="field_login")
    database.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
    for role in ("field_owner", "field_login", "field_group"):
        database.execute(f"DROP OWNED BY {role} CASCADE")
    for role in ("field_login", "field_owner", "field_group"):
        database.execute(f"DROP ROLE {role}")


def test_role_is_not_advised_to_get_the_privileges_of_a_superuser(flash, roles):
    flash.database.execute("ALTER TABLE sales.items OWNER TO postgres")
    flash.handler("sales.items")
    text = refusal(flash, roles)
    assert "as its owner postgres run: ALTER PUBLICATION" in text
    assert "GRANT" not in text


def findings(flash, dsn):
    flash.app.conf.flash_dsn = dsn
    flash.app.finalize()
    with connected(Settings.from_app(flash.app)) as source:
        return preflight.examine(source, subscriptions_of(flash.app)).findings


def refusal(flash, dsn):
    """The error of the start, which is what doctor says; nothing is created."""
    created = flash.database.one(CREATED)
    with pytest.raises(CatalogError) as refused:
        flash.start(flash_dsn=dsn)
    flash.thread.join(20)
    flash.error = None
    text = str(refused.value)
    assert text in [finding.message for finding in findings(flash, dsn)]
    assert flash.database.one(CREATED) == created
    return text


def followed(flash, advice, dsn):
    """Follow advice of an error; the start then works."""
    flash.database.execute(*re.split(r";\s*", advice.rstrip("; ")))
    flash.start(flash_dsn=dsn)
    flash.do("INSERT INTO sales.items VALUES (1, 'a')")
    assert shown(flash.delivered()) == ["insert 1,a"]
    flash.stop()


def test_schema_without_usage_is_named_with_the_grant(flash, roles):
    flash.handler("sales.items")
    flash.database.execute(
        "GRANT field_owner TO field_login",
        "REVOKE USAGE ON SCHEMA sales FROM field_login",
        "REVOKE USAGE ON SCHEMA sales FROM field_owner",
    )
    text = refusal(flash, roles)
    (grant,) = re.findall('GRANT USAGE ON SCHEMA "sales" TO "field_login";', text)
    assert "as field_owner, who owns it" in text
    followed(flash, grant, roles)


def test_schema_of_a_table_that_leaves_the_publications_needs_usage_too(flash, roles):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items").handler("sales.items", name="sales").start().stop()
    flash.database.execute(
        *(f"ALTER PUBLICATION flash_publication_{o} OWNER TO field_login"
          for o in ("insert", "update", "delete", "truncate")),
        "REVOKE USAGE ON SCHEMA sales FROM field_login",
    )  # fmt: skip
    del flash.app.tasks["sales"]
    assert 'GRANT USAGE ON SCHEMA "sales" TO "field_login";' in refusal(flash, roles)


def test_publications_of_another_owner_are_named_with_the_grant(flash, roles):
    flash.handler("sales.items").start().stop()
    (warned,) = [finding for finding in findings(flash, roles) if finding.subject == "publications"]
    assert warned.level == WARNING
    assert "flash_publication_update belong to the role postgres" in warned.message
    assert "GRANT" not in warned.message  # not the privileges of a superuser
    # As long as nothing is to be altered, that is all.
    flash.start(flash_dsn=roles).stop()
    flash.database.execute("CREATE TABLE sales.more (id int PRIMARY KEY)")
    flash.database.execute("ALTER TABLE sales.more OWNER TO field_login")
    flash.handler("sales.more", name="more")
    text = refusal(flash, roles)
    (transfers,) = re.findall("as a superuser: (ALTER PUBLICATION.*;)", text)
    assert transfers.count("OWNER TO") == 4
    followed(flash, transfers, roles)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("member", [False, True])
def test_role_without_the_owners_privileges_is_advised_to_get_them(flash, roles, member, between):
    """Until PostgreSQL 15 a role inherits or not; since 16 each grant says so."""
    database = flash.database
    new = int(database.one("SHOW server_version_num")) >= 160000
    database.execute("ALTER ROLE field_group NOINHERIT", "ALTER ROLE field_login NOINHERIT")
    if between:
        database.execute("ALTER ROLE field_login INHERIT")
    group = "field_group" if between else "field_login"
    if member:
        no = " WITH INHERIT FALSE" if new else ""
        database.execute(f"GRANT field_owner TO {group}{no}")
        if between:
            database.execute("GRANT field_group TO field_login")
    flash.handler("sales.items")
    text = refusal(flash, roles)
    (advice,) = re.findall("let this role do so: (.*)", text)
    if member and between and not new:
        (option,) = re.findall("options='(.*)' to flash_dsn", advice)
        flash.start(flash_dsn=make_conninfo(roles, options=option))
        return
    followed(flash, advice, roles)


REFUSING = """
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF tg_tag = '{tag}' THEN RAISE EXCEPTION 'no {tag} outside of a deployment'; END IF;
END $$;
CREATE EVENT TRIGGER guard ON {event} EXECUTE FUNCTION refuse()
"""


@pytest.mark.parametrize(
    ("event", "tag"),
    [("ddl_command_start", "CREATE PUBLICATION"), ("ddl_command_end", "ALTER TABLE")],
)
def test_event_trigger_that_refuses_is_named_before_anything_is_created(flash, event, tag):
    dsn = flash.database.dsn
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text)", REFUSING.format(event=event, tag=tag)
    )
    flash.handler("items", fields=["name"])
    text = refusal(flash, dsn)
    assert f"is refused: no {tag} outside of a deployment." in text
    disable, enable = re.findall("run: (.*?);", text)
    flash.database.execute(disable)
    flash.start(flash_dsn=dsn)
    flash.database.execute(enable)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    assert len(flash.delivered()) == 1


def test_event_trigger_that_only_looks_is_no_obstacle(flash):
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY)",
        REFUSING.format(event="ddl_command_end", tag="CREATE VIEW"),
    )
    flash.handler("items").start()
    assert flash.database.one("SELECT evtenabled FROM pg_event_trigger") in ("O", b"O")


def test_event_trigger_is_not_tried_on_a_table_that_is_locked(flash):
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text)",
        REFUSING.format(event="ddl_command_end", tag="CREATE VIEW"),
    )
    flash.handler("items", fields=["name"])
    with psycopg.connect(flash.database.dsn) as other:
        other.execute("LOCK TABLE items")
        (publications_finding,) = [
            finding
            for finding in findings(flash, flash.database.dsn)
            if finding.subject == "publications"
        ]
    assert publications_finding.message.endswith("statements to run")
