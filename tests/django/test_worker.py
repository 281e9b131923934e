"""A Celery worker of a Django project: `change.instance()` in its child processes."""

import json

import pytest

from example_project.servers import wait_until
from tests.django.rows import CUSTOMER, ORDER

HANDLER = """
import json
from django.db import connection

@on_change(Order, "insert|update", fields=["status"])
@shared_task
def tell(change):
    order = change.instance()
    told = {"status": order.status, "model": order._meta.label}
    told["deferred"] = sorted(order.get_deferred_fields())[:2]
    told["customer"] = order.customer.name  # loaded by a query
    if order.status == "open":
        order.status = "paid"
        order.save()
    else:
        told["was"] = change.instance("old").status
    with open(os.environ["NOTES"], "a") as notes:
        print(json.dumps(told), file=notes)

@on_change(Order, "insert", ordered="customer_id")
@shared_task
def tell_in_order(change):
    order = change.instance()
    if order.status == "cut":  # as after a restart of PostgreSQL
        connection.cursor().execute("SELECT pg_terminate_backend(pg_backend_pid())")
    with open(os.environ["NOTES"] + " in order", "a") as notes:
        print(order.status, order.customer.name, file=notes)
"""


@pytest.fixture
def running(site, valkey, tmp_path):
    """The project with `replicate` and a worker; what the handler has noted."""
    notes = tmp_path / "notes"
    notes.touch()
    site.environment |= {
        "DJANGO_SETTINGS_MODULE": "bookshop.settings",
        "BOOKSHOP_BROKER": valkey.url,
        "HANDLERS": HANDLER,
        "NOTES": str(notes),
    }
    migrated = site.manage("migrate", "sales")
    assert migrated.returncode == 0, migrated.stderr
    with site.start("manage.py", "flash", "replicate") as replicate:
        wait_until(lambda: "Created the slot" in replicate.said(), "the slot")
        worker = ("-m", "celery", "-A", "bookshop", "worker", "-Q", "flash", "-c", "2")
        with site.start(*worker, "--pool", "prefork", "--without-mingle", "--without-gossip"):
            yield lambda: [json.loads(line) for line in notes.read_text().splitlines()]


def test_instance_is_read_loaded_and_saved_in_a_worker(running, database):
    database.execute(CUSTOMER, ORDER)
    first, second = wait_until(lambda: len(running()) == 2 and running(), "both changes")
    customer = {"customer": "Ada", "model": "sales.Order", "deferred": ["address", "created"]}
    assert first == {"status": "open", **customer}
    assert second == {"status": "paid", "was": "open", **customer}
    assert database.one("SELECT status FROM sales.orders") == "paid"


def test_ordered_handler_whose_connection_is_lost_gets_another_for_the_next_change(
    running, database, tmp_path
):
    """The changes of a lane are handled one after another in one Celery task."""
    cut = ORDER.replace("'open'", "'cut'")
    database.execute(CUSTOMER, "; ".join([cut, *[ORDER] * 5]))
    file = tmp_path / "notes in order"
    wait_until(lambda: file.exists() and len(file.read_text().splitlines()) == 5, "all but one")
