"""REPLICA IDENTITY FULL, which we set, beside publications of others: the application can write."""

import re

import pytest

from flash_celery.commands.reset import plan_reset, run_reset
from flash_celery.errors import ReplicaIdentityMissing
from flash_celery.postgres.source import connected
from flash_celery.settings import Settings

from .conftest import shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"
IDENTITY = "SELECT relreplident::text FROM pg_class WHERE relname = 'items'"
WRITE = (
    "INSERT INTO items (id, name) VALUES (100, 'x')",
    "UPDATE items SET name = 'y' WHERE id = 100",
    "DELETE FROM items WHERE id = 100",
)


@pytest.fixture
def version(database):
    return int(database.one("SHOW server_version_num"))


@pytest.fixture
def since(version):
    def need(major):
        if version < major * 10000:
            pytest.skip(f"PostgreSQL {major} or later")

    return need


#: What makes PostgreSQL refuse UPDATE and DELETE of a table with FULL: since which version, what is
#: there before, what is run while the worker runs, and what it says.
REFUSED = {
    "virtual column, all tables": (
        18,
        "CREATE PUBLICATION theirs FOR ALL TABLES",
        "ALTER TABLE items ADD b int GENERATED ALWAYS AS (id * 2) VIRTUAL",
        "virtual column b",
    ),
    "virtual column, schema": (
        18,
        "CREATE PUBLICATION theirs FOR TABLES IN SCHEMA public",
        "ALTER TABLE items ADD b int GENERATED ALWAYS AS (id * 2) VIRTUAL",
        "virtual column b",
    ),
    "virtual column, row filter of the key": (
        18,
        "CREATE PUBLICATION theirs FOR TABLE items WHERE (id > 0)",
        "ALTER TABLE items ADD b int GENERATED ALWAYS AS (id * 2) VIRTUAL",
        "virtual column b",
    ),
    "stored column": (
        18,
        "CREATE PUBLICATION theirs FOR ALL TABLES",
        "ALTER TABLE items ADD b int GENERATED ALWAYS AS (id * 2) STORED",
        "the publication theirs leaves out the generated column b; run "
        'ALTER PUBLICATION "theirs" SET',
    ),
    "column list": (
        15,
        "SELECT 1",
        "CREATE PUBLICATION theirs FOR TABLE items (id)",
        "the publication theirs lists columns",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_identity_that_postgresql_refuses_is_given_back_beside_other_publications(
    flash, since, how
):
    major, before, alteration, message = REFUSED[how]
    since(major)
    flash.database.execute(ITEMS, before)
    flash.handler("items", where={"name": "a"}).start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    assert flash.database.one(IDENTITY) == "f"
    flash.database.execute(alteration)
    flash.thread.join(20)
    assert isinstance(flash.error, ReplicaIdentityMissing)
    assert message in str(flash.error)
    assert flash.database.one(IDENTITY) == "d"
    flash.database.execute(*WRITE)
    assert shown(flash.delivered())[0].startswith("insert 1,a")


@pytest.mark.parametrize("how", REFUSED)
def test_reset_gives_back_an_identity_that_postgresql_refuses(flash, since, how):
    major, before, alteration, _ = REFUSED[how]
    since(major)
    flash.database.execute(ITEMS, before)
    flash.handler("items", where={"name": "a"}).start()
    flash.stop()
    flash.database.execute(alteration)
    assert reset(flash) == ""
    assert flash.database.one(IDENTITY) == "d"
    flash.database.execute(*WRITE)


@pytest.mark.parametrize("how", ["before", "running"])
def test_identity_refused_with_and_without_full_is_named(flash, since, how):
    since(18)
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text, size int)",
        "CREATE PUBLICATION theirs FOR TABLE items WHERE (size > 0)",
    )
    virtual = "ALTER TABLE items ADD b int GENERATED ALWAYS AS (id * 2) VIRTUAL"
    if how == "before":
        flash.database.execute("ALTER TABLE items REPLICA IDENTITY FULL", virtual)
        flash.handler("items", where={"name": "a"})
        with pytest.raises(ReplicaIdentityMissing, match="virtual column b"):
            flash.start()
        return
    flash.handler("items", where={"name": "a"}).start()
    flash.database.execute(virtual)
    flash.thread.join(20)
    both = "refuses its UPDATE and DELETE with it, because of the virtual column b.*, and without"
    assert re.search(both, str(flash.error))
    assert flash.database.one(IDENTITY) == "f"
    kept = reset(flash)
    assert "leave REPLICA IDENTITY FULL on public.items: PostgreSQL refuses" in kept
    assert "the row filter of the publication theirs reads size" in kept
    flash.database.execute("ALTER TABLE items DROP b", *WRITE)


def test_reset_names_the_publication_for_which_an_identity_stays(flash):
    flash.database.execute(ITEMS, "CREATE PUBLICATION theirs FOR ALL TABLES")
    flash.handler("items", where={"name": "a"}).start()
    flash.stop()
    kept = reset(flash)
    assert "FULL on public.items: the publication theirs may need it" in kept
    assert flash.database.one(IDENTITY) == "f"
    flash.database.execute(*WRITE)


@pytest.mark.parametrize("left_out", ["virtual", "stored"])
def test_full_identity_that_another_publication_would_refuse_is_not_set(flash, since, left_out):
    since(18)
    column = f"b int GENERATED ALWAYS AS (id * 2) {left_out}"
    flash.database.execute(
        f"CREATE TABLE items (id int PRIMARY KEY, name text, {column})",
        "CREATE PUBLICATION theirs FOR ALL TABLES",
    )
    flash.handler("items", where={"name": "a"})
    with pytest.raises(ReplicaIdentityMissing, match="would refuse its UPDATE and DELETE because"):
        flash.start()
    flash.database.execute(*WRITE)
    assert flash.database.one("SELECT count(*) FROM pg_publication") == 1
    if left_out == "stored":
        flash.database.execute("ALTER PUBLICATION theirs SET (publish_generated_columns = stored)")
        flash.error = None
        flash.start()
        flash.database.execute(*WRITE)


@pytest.mark.parametrize("table", ["items", "parts"])
def test_table_that_another_publication_leaves_out_is_not_published_by_it(flash, since, table):
    since(19)
    flash.database.execute(
        ITEMS,
        "CREATE TABLE parts (id int PRIMARY KEY, name text) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parts FOR VALUES FROM (0) TO (1000)",
        "ALTER TABLE part ALTER name SET NOT NULL",
        f"CREATE PUBLICATION theirs FOR ALL TABLES EXCEPT (TABLE {table})",
    )
    identity = IDENTITY.replace("items", {"items": "items", "parts": "part"}[table])
    flash.handler(table, where={"name": "a"}).start()
    assert flash.database.one(identity) == "f"
    flash.stop()
    assert reset(flash) == ""
    assert flash.database.one(identity) == "d"


def reset(flash):
    """Reset, and return what is said about identities that stay."""
    flash.stop()
    flash.error = None
    flash.wait(lambda: not flash.database.execute(flash.slot("1") + " AND active"))
    settings = Settings.from_app(flash.app)
    with connected(settings, 30) as source:
        undo = plan_reset(source, source.slot)
        run_reset(undo, force=False)
    return undo.note
