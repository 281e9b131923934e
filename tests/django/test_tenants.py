"""docs/howto/django-tenants.md: a handler on a model whose table is in many schemas."""

import re

from celery import current_app
from django.db import connection

from .conftest import ROOT

PAGE = (ROOT / "docs" / "howto/django-tenants.md").read_text()


def create_tenant(schema):
    """Create a tenant's tables, as its migrations do under its search path."""
    from sales.models import Customer

    with connection.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {schema}")
        cursor.execute(f"SET search_path = {schema}")
    with connection.schema_editor() as editor:
        editor.create_model(Customer)
    Customer.objects.create(name=f"of {schema}")
    with connection.cursor() as cursor:
        cursor.execute("RESET search_path")


def test_page_tells_changes_of_all_tenants(flash, migrated, capsys):
    (example,) = re.findall(r"<!-- run: tenants -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    create_tenant("acme")
    exec(example, {"__name__": "documented"})
    assert current_app == flash.app
    flash.start()
    create_tenant("globex")
    flash.wait(
        lambda: flash.database.one(
            "SELECT count(*) = 2 FROM pg_publication_rel r JOIN pg_publication p "
            "ON p.oid = r.prpubid WHERE p.pubname = 'flash_publication_insert'"
        )
    )
    done = "SELECT count(*) = 1 FROM flash_celery_backfills WHERE state = 'done'"
    flash.wait(
        lambda: flash.database.one("SELECT to_regclass('flash_celery_backfills') IS NOT NULL")
    )
    flash.wait(lambda: flash.database.one(done), timeout=120)
    flash.do(
        "INSERT INTO sales_customer (full_name) VALUES ('not of a tenant')",
        "UPDATE acme.sales_customer SET full_name = 'renamed'",
        "DELETE FROM globex.sales_customer",
    )
    handler = flash.app.tasks["documented.index_customer"]
    for change in flash.delivered("documented.index_customer"):
        handler(change)
    assert capsys.readouterr().out.splitlines() == [
        "globex: put 1 of globex",
        "acme: put 1 renamed",
        "globex: remove 1",
    ]
