"""`make demo`: changes becoming tasks, on servers of its own that leave nothing behind.

With --once it ends by itself: 0 if every expected handler was told, else 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path

from rich.console import Console

from example_project.servers import Postgres, Valkey, end_with_parent

HERE = Path(__file__).parent
PATIENCE = 60
console = Console(highlight=False, soft_wrap=True)


class Told:
    """What handlers say, as it comes (`shop.activity`)."""

    def __init__(self, url):
        from redis import Redis
        from shop.activity import CHANNEL

        self.subscriber = Redis.from_url(url).pubsub(ignore_subscribe_messages=True)
        self.subscriber.subscribe(CHANNEL)

    def events(self, patience):
        """What comes, for so many seconds."""
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            message = self.subscriber.get_message(timeout=left)
            if message is not None:
                yield json.loads(message["data"])

    def wait_for(self, expected):
        """Show what handlers are told until each (handler, operation, table) has been seen."""
        missing = Counter(expected)
        for event in self.events(PATIENCE):
            show(event)
            for change in event["changes"]:
                missing[event["handler"], change["operation"], change["table"]] -= 1
            if not +missing:
                return True
        for (handler, operation, table), count in (+missing).items():
            console.print(f"   [red]missing[/]  {handler}: {count} of {operation} {table}")
        return False


def show(event):
    for change in event["changes"]:
        what = f"{change['operation']} {change['table']} {change['key']}{change['changed']}"
        console.print(
            f"   [green]{event['handler']:<16}[/] {what:<52} "
            f"[cyan]{event['milliseconds']:6.1f} ms[/] after the commit"
        )


def order_through_the_orm():
    from django.db import transaction
    from shop.models import Customer, Order, OrderLine, Product

    with transaction.atomic():
        customer = Customer.objects.create(name="Ada", email="ada@example.com")
        tea = Product.objects.create(name="Tea", price=Decimal("4.50"))
        cup = Product.objects.create(name="Cup", price=Decimal("9.00"))
        order = Order.objects.create(customer=customer)
        OrderLine.objects.create(order=order, product=tea, quantity=2, price=tea.price)
        OrderLine.objects.create(order=order, product=cup, quantity=1, price=cup.price)
    return {
        ("audit", "insert", "shop_customer"): 1,
        ("audit", "insert", "shop_order"): 1,
        ("keep_total", "insert", "shop_orderline"): 2,
        ("index_products", "insert", "shop_product"): 2,
        ("audit", "update", "shop_order"): 1,
    }


def pay_with_a_bulk_update():
    from shop.models import Order

    count = Order.objects.filter(status="open").update(status="paid")
    return {
        ("send_receipt", "insert", "shop_order"): count,
        ("audit", "update", "shop_order"): count,
    }


def change_with_raw_sql():
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("UPDATE shop_product SET price = price * 1.1, name = name || ' (new)'")
        count = cursor.rowcount
        cursor.execute("DELETE FROM shop_orderline WHERE id = (SELECT max(id) FROM shop_orderline)")
    return {
        ("forget_product", "update", "shop_product"): count,
        ("index_products", "update", "shop_product"): count,
        ("keep_total", "delete", "shop_orderline"): 1,
        ("audit", "update", "shop_order"): 1,
    }


STEPS = [
    ("ORM: a customer orders two products, in one transaction", order_through_the_orm),
    ("Bulk update (no Django signal): every open order is paid", pay_with_a_bulk_update),
    ("Raw SQL: prices and names change, an order line goes", change_with_raw_sql),
]


@contextmanager
def process(name, *command, folder):
    """A child that ends before its servers do, and never outlives us."""
    with (folder / f"{name}.log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "shop", *command],
            cwd=HERE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us
            preexec_fn=end_with_parent(signal.SIGTERM),
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def run(once):
    with ExitStack() as stack:
        started = time.monotonic()
        postgres = stack.enter_context(Postgres())
        valkey = stack.enter_context(Valkey())
        os.environ["SHOP_DATABASE_URL"] = postgres.dsn()
        os.environ["SHOP_BROKER_URL"] = valkey.url
        os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
        paths = [str(HERE), str(HERE.parent)]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path[:0] = paths
        migrate()
        told = Told(valkey.url)
        worker = stack.enter_context(
            process("worker", "worker", "-Q", "flash", "-c", "2", folder=postgres.folder)
        )
        replicate = stack.enter_context(
            process(
                "replicate", *("flash", "replicate", "--wait-for-workers"), folder=postgres.folder
            )
        )
        console.print(f"PostgreSQL   {postgres.dsn()}\nValkey       {valkey.url}")
        await_slot(replicate, postgres)
        console.print(f"Ready after {time.monotonic() - started:.1f} s.\n")
        complete = True
        while complete and worker.poll() is None and replicate.poll() is None:
            for title, step in STEPS:
                console.print(f"[bold]{title}[/]")
                complete = told.wait_for(step()) and complete
                time.sleep(0 if once else 1)
                console.print()
            if once or not complete:
                break
        if not complete:
            for name in ("replicate", "worker"):
                console.print((postgres.folder / f"{name}.log").read_text()[-3000:])
        console.print(
            "Every change reached its handlers." if complete else "[red]Changes are missing.[/]"
        )
        close_connections()
        return 0 if complete else 1


def migrate():
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


def close_connections():
    from django.db import connections

    connections.close_all()


def await_slot(replicate, postgres):
    import psycopg

    from example_project.servers import wait_until

    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:

        def active():
            if replicate.poll() is not None:
                log = (postgres.folder / "replicate.log").read_text()
                raise RuntimeError(f"the replication worker ended: {log}")
            query = "SELECT 1 FROM pg_replication_slots WHERE active"
            return connection.execute(query).fetchone()

        wait_until(active, "the replication worker")


def main():
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end when everything was handled")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(arguments.once)
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left behind.")
        return 0


if __name__ == "__main__":
    sys.exit(main())
