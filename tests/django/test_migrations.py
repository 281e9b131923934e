"""Migrations know nothing of flash-celery, and it has none of its own."""

from django.core.management import call_command
from psycopg import sql


def test_migrations_of_flash_celery_do_not_exist(migrated, capsys):
    call_command("makemigrations", check=True, dry_run=True)
    assert capsys.readouterr().out == "No changes detected\n"
    call_command("migrate", verbosity=0)
    types = migrated.execute("SELECT app_label FROM django_content_type")
    assert ("sales",) in types
    assert ("flash_celery",) not in types


def test_migrations_run_without_the_app_and_as_a_role_that_may_nothing_else(site, database):
    role = sql.Identifier(f"migrator_{database.name}")
    database.execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'pw'").format(role),
        sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(sql.Identifier(database.name), role),
        sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(role),
    )
    dsn = database.dsn.replace("postgres@", f"migrator_{database.name}:pw@")
    assert dsn != database.dsn
    migrated = site.manage("migrate", BOOKSHOP_DSN=dsn, BOOKSHOP_APPS="")
    assert migrated.returncode == 0, migrated.stderr
    assert database.one("SELECT count(*) FROM sales.orders") == 0
    assert database.one("SELECT count(*) FROM pg_publication") == 0
    # With the app, and a broker that cannot be reached.
    down = site.manage(
        "migrate", "sales", "zero", BOOKSHOP_DSN=dsn, BOOKSHOP_BROKER="amqp://127.0.0.1:1//"
    )
    assert down.returncode == 0, down.stderr
    assert database.one("SELECT to_regclass('sales.orders')") is None
    database.execute(sql.SQL("DROP OWNED BY {}").format(role), sql.SQL("DROP ROLE {}").format(role))


def test_check_names_the_migration_that_would_break_a_handler(site):
    fits = site.manage("check", "--database", "default")
    assert (fits.returncode, fits.stdout) == (
        0,
        "System check identified no issues (0 silenced).\n",
    )
    site.migration("0002_tidy", "migrations.RemoveField('order', 'status')")
    ended = site.manage("check", "--database", "default")
    assert ended.returncode == 1
    assert (
        "sales.handlers.look: (flash_celery.E002) The migration sales.0002_tidy (Remove field "
        "status from order) removes sales.orders.status." in ended.stderr
    )
    assert "HINT: Correct the handler, or deploy" in ended.stderr


def test_checks_run_by_celery_import_tasks_once(site):
    output = site.manage("shell", "-c", "from bookshop import celery_app as app\n"
        "from celery.signals import import_modules\n"
        "count = []\n"
        "import_modules.connect(lambda **_: count.append(1), weak=False)\n"
        "app.loader.import_default_modules()\n"
        "print('imported', len(count), 'finalized', app.finalized)")  # fmt: skip
    assert "imported 1 finalized False" in output.stdout, output.stderr
