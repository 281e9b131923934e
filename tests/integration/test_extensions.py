"""The table of docs/reference/extension-types.md is how handlers and conditions read the types."""

import ast
from itertools import groupby
from pathlib import Path

import psycopg
import pytest

from flash_celery.conditions.parsing import parse
from flash_celery.errors import SubscriptionError
from flash_celery.postgres import catalog, column_types
from flash_celery.postgres.connection import connect
from flash_celery.table_name import TableName
from tests.integration.conftest import shown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "extension-types.md"
#: Not among the extensions that come with the tests' server.
PACKAGED = {"ip4r", "postgis"}
BAR = "\\|"


def documented():
    """Yield extension, type, SQL, Python value and whether `where` compares, of each row."""
    table = PAGE.read_text().partition("<!-- table: extension types -->")[2].partition("\n\n")[0]
    for line in table.strip().splitlines()[2:]:
        cells = [cell.strip().strip("`") for cell in line.replace(BAR, "\0").split("|")[1:-1]]
        extension, kind, literal, value, where = (cell.replace("\0", "|") for cell in cells)
        yield extension.split()[0], kind, literal, ast.literal_eval(value), where == "compares"


ROWS = {name: list(rows) for name, rows in groupby(documented(), lambda row: row[0])}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.soak) if name in PACKAGED else name for name in ROWS
    ]
)
def rows(request, database):
    """The rows of an extension, which is created in the database."""
    try:
        database.execute(f"CREATE EXTENSION {request.param} CASCADE")
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile) as error:
        pytest.skip(f"{error.diag.message_primary} (packages: tests/debian_postgres.py)")
    return ROWS[request.param]


def created(database, rows):
    columns = ", ".join(f"c{n} {kind}" for n, (_, kind, *_) in enumerate(rows))
    database.execute(f"CREATE TABLE items (id int PRIMARY KEY, {columns})")
    literals = ", ".join(literal for _, _, literal, *_ in rows)
    return f"INSERT INTO items VALUES (1, {literals})"


def test_extension_types_reach_handlers_as_documented(rows, flash):
    insert = created(flash.database, rows)
    flash.handler("items").start()
    flash.do(insert, "UPDATE items SET id = 2", "DELETE FROM items")
    expected = [value for *_, value, _ in rows]
    inserted, updated, deleted = flash.delivered()
    assert list(inserted.new.values()) == [1, *expected]
    assert list(updated.new.values()) == [2, *expected]
    assert dict(deleted.key) == {"id": 2}


def test_conditions_on_extension_types_are_exact_or_refused(rows, database):
    insert = created(database, rows)
    database.execute(insert)
    with connect(database.dsn) as connection:
        table = catalog.find(connection, TableName("public", "items"))
        types = {name: column.type_oid for name, column in table.columns.items()}
        for number, (_, _, literal, _, compares) in enumerate(rows):
            column, constant = f"c{number}", ast.literal_eval(literal)
            text = database.one(f"SELECT {column}::text FROM items").encode()

            def verdict(lookup, column=column, constant=constant, text=text):
                condition = parse({column + lookup: constant})
                matches = column_types.matcher(connection, table.oid, condition, types)
                return matches({column: text}.get)

            for lookup, operator in ("", "="), ("__ne", "<>"), ("__lt", "<"), ("__gte", ">="):
                if compares:
                    query = f"SELECT {column} {operator} {literal} FROM items"
                    assert verdict(lookup) is database.one(query)
                else:
                    with pytest.raises(SubscriptionError, match=r"compares .*, which only Postgre"):
                        verdict(lookup)
            matches = column_types.matcher(
                connection, table.oid, parse({f"{column}__isnull": False}), types
            )
            assert matches({column: text}.get)


def test_condition_on_an_extension_type_stops_the_start(flash):
    flash.database.execute("CREATE EXTENSION citext", "CREATE TABLE users (email citext)")
    flash.handler("users", where={"email": "Ann"})
    with pytest.raises(SubscriptionError) as refused:
        flash.start()
    assert str(refused.value) in PAGE.read_text()


def test_keys_of_extension_types_differ_if_their_texts_do(flash):
    flash.database.execute("CREATE EXTENSION citext", "CREATE TABLE users (email citext)")
    flash.handler("users", key=["email"]).start()
    flash.do("INSERT INTO users VALUES ('Ann')", "UPDATE users SET email = 'ann'")
    assert shown(flash.delivered()) == ["insert Ann", "delete Ann", "insert ann"]
