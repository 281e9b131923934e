"""`manage.py check`: handlers that do not fit the models, the migrations or the database."""

import shutil

import pytest
from django.test.utils import override_settings

from flash_celery import on_change

from .conftest import PROJECT, use


@pytest.fixture
def sales(configured):
    from sales import models

    return models


@pytest.fixture
def handle(app):
    def declare(table, name="shop.handle", **options):
        @app.task(name=name, shared=False)
        def handler(change): ...

        on_change(table, **options)(handler)

    return declare


@pytest.fixture
def after(configured, tmp_path, monkeypatch):
    """Add a migration with these operations, here `0002_tidy`."""
    package = f"migrations_{tmp_path.name}".replace("-", "_")
    shutil.copytree(PROJECT / "sales" / "migrations", tmp_path / package)
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(operations):
        (tmp_path / package / "0002_tidy.py").write_text(
            "from django.db import migrations, models\n\n\n"
            "class Migration(migrations.Migration):\n"
            "    dependencies = [('sales', '0001_initial')]\n"
            f"    operations = [{operations}]\n"
        )

    with override_settings(MIGRATION_MODULES={"sales": package}):
        yield add


def said():
    from flash_celery.django import checks

    return [
        (message.id.partition(".")[2], message.obj, message.msg) for message in checks.handlers()
    ]


def said_within():
    from flash_celery.django import checks

    return [(message.id.partition(".")[2], message.msg) for message in checks.database(["default"])]


def test_check_passes_fitting_handlers(sales, handle):
    handle(sales.Order, "a", fields=["customer"], where={"pk": 1})
    handle("sales.orders", "b", fields=["customer_id"])
    handle("sales_item_buyers", "c", fields=["item_id"])
    handle("auth_user", "d", fields=["username"])
    handle("billing:nowhere", "e")
    assert said() == []


def test_check_names_an_invalid_declaration(sales, handle):
    handle(sales.Order, "a", fields=["statsu"])
    handle(sales.Order, "b", operations="insrt")
    (a, b) = said()
    assert a[:2] == ("E001", "a")
    assert a[2] == "sales.Order has no field 'statsu'; did you mean status?"
    assert b[:2] == ("E001", "b")


def test_check_names_tables_and_columns_without_a_model(sales, handle):
    handle("sales.order")
    handle("sales_customer", "customers", fields=["full_nam"])
    assert said() == [
        ("W002", "customers", "No model of public.sales_customer has the column full_nam; did you "
         "mean full_name?"),
        ("W001", "shop.handle", "No model has the table sales.order; did you mean sales.orders?"),
    ]  # fmt: skip


def test_check_knows_the_tables_of_tenants(sales, handle, after):
    """A tenant's table is in a schema of its own, and its model names none."""
    handle("acme.sales_customer", "a", fields=["full_name"])
    handle("acme.sales_item_buyers", "b", fields=["item_id"])
    assert said() == []
    handle("acme.sales_customer", "c", fields=["full_nam"])
    handle("acme.orders", "d")  # its model names another schema
    assert [(id, handler) for id, handler, _ in said()] == [("W002", "c"), ("W001", "d")]
    assert "No model of acme.sales_customer has the column full_nam" in said()[0][2]
    after("migrations.RemoveField('customer', 'name')")
    assert ("E002", "a") in [(id, handler) for id, handler, _ in said()]
    assert any("removes acme.sales_customer.full_name" in text for _, _, text in said())


@pytest.mark.parametrize(
    ("operations", "gone"),
    [
        ("migrations.RemoveField('order', 'status')", "sales.orders.status"),
        ("migrations.RenameField('order', 'status', 'state')", "sales.orders.status"),
        (
            "migrations.AlterField('order', 'status', models.TextField(db_column='state'))",
            "sales.orders.status",
        ),
        ("migrations.DeleteModel('UrgentOrder'), migrations.DeleteModel('Order')", "sales.orders"),
        ("migrations.AlterModelTable('order', 'orders')", "sales.orders"),
        ("migrations.RenameModel('Customer', 'Buyer')", "public.sales_customer"),
        ("migrations.RemoveField('item', 'buyers')", "public.sales_item_buyers"),
        (
            "migrations.SeparateDatabaseAndState([migrations.RunSQL('…')], "
            "[migrations.RemoveField('order', 'status')])",
            "sales.orders.status",
        ),
    ],
)
def test_check_names_a_migration_that_removes_a_column_of_a_handler(
    sales, handle, after, operations, gone
):
    handle(sales.Order, "orders", fields=["status"])
    handle("sales_customer", "customers")
    handle("sales_item_buyers", "buyers")
    after(operations)
    ((id, handler, text),) = said()
    assert (id, handler) == ("E002", {"o": "orders", "c": "customers", "i": "buyers"}[
        gone.removeprefix("sales.").removeprefix("public.sales_")[0]
    ])  # fmt: skip
    assert text.startswith("The migration sales.0002_tidy (")
    what = gone if gone.endswith(".status") else f"the table {gone}"
    assert text.endswith(f") removes {what}.")


@pytest.mark.parametrize(
    "operations",
    [
        "migrations.RemoveField('order', 'note')",
        "migrations.AlterField('order', 'status', models.CharField(max_length=9))",
        "migrations.RenameModel('Order', 'Purchase')",
        "migrations.RenameField('order', 'status', 'state'),"
        "migrations.AddField('order', 'status', models.TextField())",
        "migrations.SeparateDatabaseAndState([], [migrations.RemoveField('order', 'status')])",
    ],
)
def test_check_passes_a_migration_that_keeps_the_columns(sales, handle, after, operations):
    handle(sales.Order, fields=["status"])
    after(operations)
    assert said() == []


def test_check_survives_unreadable_migrations(sales, handle, after):
    handle(sales.Order, fields=["status"])
    after("migrations.RemoveField('order', 'nothing')")
    ((id, _, text),) = said()
    assert id == "W004"
    assert text.startswith("The migrations cannot be read: ")


def test_check_survives_handlers_that_cannot_be_imported(sales, app):
    app.conf.imports = ["not_there"]
    ((id, _, text),) = said()
    assert (id, text.partition(",")[0]) == ("W004", "The tasks cannot be imported")


def test_check_names_a_wrong_setting(sales, app):
    app.conf.flash_replica_identity = "ato"
    ((id, _, text),) = said()
    assert (id, text[:39]) == ("W005", "flash_replica_identity must be 'auto' o")


def test_check_hints_at_a_missing_celery_app(configured, monkeypatch):
    from types import SimpleNamespace

    from celery import Celery

    from flash_celery.django import checks, project

    default = Celery("default", set_as_current=False)
    current = SimpleNamespace(_get_current_object=lambda: default)
    monkeypatch.setattr(project, "current_app", current)
    (message,) = checks.handlers()
    assert message.id == "flash_celery.W004"
    assert "from .celery import app" in message.msg


def test_check_database_names_missing_objects(sales, migrated, handle):
    migrated.execute("CREATE VIEW looked AS SELECT 1", "CREATE TABLE extra (id int PRIMARY KEY)")
    handle(sales.Order, "fits", fields=["customer"], where={"total__gte": 1})
    handle("extra", "made_in_sql", fields=["id"])
    handle("extr", "a")
    handle("looked", "b")
    handle("extra", "c", fields=["idd"])
    handle("extra", "d", where={"id": "x"})
    handle("billing:extr", "elsewhere")
    from django.core.management import call_command

    unapplied = said_within()
    assert [id for id, _ in unapplied] == ["W006"] * 4
    call_command("migrate", verbosity=0)
    (a, b, c, d) = said_within()
    assert a[0] == b[0] == "E003"
    assert a[1].startswith("there is no table public.extr in the database test_")
    assert a[1].endswith("; did you mean public.extra?")
    assert b[1].startswith("public.looked is a view")
    assert c == ("E004", "public.extra has no column idd; did you mean id?")
    assert d[0] == "E004"
    # Nothing of the check's own is in the database.
    assert migrated.one("SELECT count(*) FROM pg_publication") == 0


def test_check_database_ignores_objects_of_pending_migrations(sales, handle, configured, database):
    use(database)
    try:
        handle(sales.Order, fields=["status"])
        assert said_within() == []
        handle("made_by_run_sql", "other")
        ((id, text),) = said_within()
        assert (id, text[:40]) == ("W006", "there is no table public.made_by_run_sql")
    finally:
        use(None)


def test_check_database_reports_an_unreachable_database(sales, handle, configured, database):
    use(database, PORT=1, PASSWORD="hunter2")
    try:
        handle(sales.Order)
        ((id, text),) = said_within()
        assert (id, text[:44]) == ("W003", "The tables of the handlers cannot be checked")
        assert "hunter2" not in text
    finally:
        use(None)


def test_check_database_asks_callables_for_their_database(sales, migrated, handle, app):
    handle("made_by_run_sql", "other")
    app.conf.flash_dsn = lambda: migrated.dsn
    assert [id for id, _ in said_within()] == ["W006"]
    app.conf.flash_dsn = lambda: 1 / 0
    ((id, text),) = said_within()
    assert id == "W003"
    assert text.startswith("flash_dsn has given no connection string: ")
    app.conf.flash_dsn = lambda: "host=127.0.0.1 dbname=other"
    assert said_within() == []


def test_check_database_covers_named_sources_of_django(sales, migrated, handle, app):
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    app.conf.flash_dsn = "host=nowhere dbname=other"
    app.conf.flash_sources = {"billing": {"dsn": migrated.dsn}}
    handle("billing:extr", "a")
    handle("extr", "of_the_other_database")
    ((id, text),) = said_within()
    assert id == "E003"
    assert text.startswith("there is no table public.extr")
