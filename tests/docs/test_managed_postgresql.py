"""docs/howto/managed-postgresql.md: the roles that it makes suffice."""

import psycopg
import pytest

from flash_celery.conditions import parsing
from flash_celery.handlers.subscriptions import Subscription
from flash_celery.postgres import slots
from flash_celery.postgres.connection import connect
from flash_celery.postgres.source import Source, publication_names
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.provisioning import ddl, preflight
from flash_celery.settings import Settings
from flash_celery.table_name import TableName

from .conftest import Page

PAGE = Page("howto/managed-postgresql.md")
PROVIDERS = ("rds", "cloudsql", "supabase", "azure")


@pytest.fixture
def owned(database):
    """A table of the application's role, and what the providers have besides."""
    database.execute(
        "CREATE ROLE shop_owner",
        "CREATE ROLE rds_replication",
        "CREATE TABLE orders (id int PRIMARY KEY, status text)",
        "ALTER TABLE orders OWNER TO shop_owner",
    )
    yield database
    for role in ("flash", "shop_owner", "rds_replication"):
        if database.one(f"SELECT count(*) FROM pg_roles WHERE rolname = '{role}'"):
            database.execute(f"DROP OWNED BY {role} CASCADE", f"DROP ROLE {role}")


def test_managed_postgresql_page_blocks_are_run():
    assert set(PAGE.blocks) == set(PROVIDERS)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_managed_postgresql_page_role_suffices(owned, provider):
    database = owned
    for statement in PAGE.statements(provider):
        here = statement.replace("DATABASE shop", f"DATABASE {database.name}")
        # Supabase's tables belong to `postgres`, who is a superuser only here.
        here = here.replace("DATABASE postgres", f"DATABASE {database.name}")
        database.execute(here.replace("GRANT postgres TO", "GRANT shop_owner TO"))
    dsn = psycopg.conninfo.make_conninfo(database.dsn, user="flash")
    where = parsing.parse({"status": "paid"})
    subscription = Subscription("shop.handle", TableName("public", "orders"), where=where)
    with connect(dsn) as connection:
        settings = Settings(flash_replication_slot=database.slot)
        report = preflight.examine(Source(connection, settings), [subscription])
        report.raise_first()
        ddl.apply(connection, report.steps)
    if provider == "rds":
        return  # whom a member of rds_replication may replicate as is RDS' own doing
    stream = ReplicationConnection(dsn)
    slots.create(stream, database.slot)
    stream.start(database.slot, publication_names("flash_publication"))
    stream.close()
