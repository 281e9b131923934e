"""`make demo`: watch changes become tasks, on temporary servers that leave nothing behind.

Serves a page on which you change orders, and prints the handlers that run. With --once it serves no
page and ends by itself, with exit code 0 if every expected handler has run and 1 otherwise.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from example_project.servers import Postgres, Valkey, end_with_parent, free_port, wait_until

HERE = Path(__file__).parent
#: Seconds to wait for the handlers of a step.
TIMEOUT = 60
console = Console(highlight=False, soft_wrap=True)


class HandlerEvents:
    """The events of handlers that start, as `shop.activity` records them."""

    def __init__(self):
        from shop import activity

        self.activity = activity.events(activity.newest(), heartbeat=0.5)

    def events(self, timeout=float("inf")):
        """Yield the events of the next `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for _, text in self.activity:
            event = json.loads(text or "{}")
            if event.get("kind") == "start":
                yield event
            if time.monotonic() > deadline:
                return

    def wait_for(self, expected):
        """Print events until each expected (handler, operation, table) has occurred.

        Return False if some have not occurred in time.
        """
        missing = Counter(expected)
        for event in self.events(TIMEOUT):
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
        text = f"{change['operation']} {change['table']} {change['key']}{change['changed']}"
        console.print(
            f"   [green]{event['handler']:<16}[/] {escape(text):<52} "
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
    ("ORM", ": a customer orders two products, in one transaction", order_through_the_orm),
    ("Bulk update", " (no Django signal): every open order is paid", pay_with_a_bulk_update),
    ("Raw SQL", ": prices and names change, an order line is deleted", change_with_raw_sql),
]


@contextmanager
def process(name, *command, folder):
    """Run a child process that ends before its servers do, and never outlives this process."""
    with (folder / f"{name}.log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, *command],
            cwd=HERE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C must reach this process only
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
            child.wait(30)


def start(stack, port):
    """Start the servers and the shop's processes; return PostgreSQL and the processes."""
    postgres = stack.enter_context(Postgres())
    valkey = stack.enter_context(Valkey())
    psql = "psql" if shutil.which("psql") else postgres.binaries / "psql"
    os.environ["SHOP_DATABASE_URL"] = postgres.dsn()
    os.environ["SHOP_BROKER_URL"] = os.environ["SHOP_CACHE_URL"] = valkey.url
    os.environ["SHOP_PSQL"] = f"{psql} {postgres.dsn()}"
    os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
    paths = [str(HERE), str(HERE.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path[:0] = paths
    migrate()
    celery = ("-m", "celery", "-A", "shop")
    commands = {
        "worker": (*celery, "worker", "-Q", "flash", "-c", "4"),
        "replicate": (*celery, "flash", "replicate", "--wait-for-workers"),
    }
    if port:
        commands["page"] = ("manage.py", "runserver", f"127.0.0.1:{port}", "--noreload")
    children = {
        name: stack.enter_context(process(name, *command, folder=postgres.folder))
        for name, command in commands.items()
    }
    console.print(f"PostgreSQL   {postgres.dsn()}\nValkey       {valkey.url}")
    await_slot(children["replicate"], postgres)
    if port:
        wait_until(lambda: answers(port, children["page"], postgres), "the page")
        console.print(f"The page     [bold]http://127.0.0.1:{port}/[/]")
    return postgres, children


def run(once, port):
    with ExitStack() as stack:
        started = time.monotonic()
        postgres, children = start(stack, port)
        events = HandlerEvents()
        console.print(f"Ready after {time.monotonic() - started:.1f} s.\n")
        complete = all(run_step(step, events, once) for step in STEPS)
        if not complete:
            for name in children:
                console.print((postgres.folder / f"{name}.log").read_text()[-3000:], markup=False)
        console.print(
            "Every change reached its handlers." if complete else "[red]Changes are missing.[/]"
        )
        if complete and not once:
            console.print(
                f"\n[bold]Now you:[/] open http://127.0.0.1:{port}/, or change rows with\n"
                f"{os.environ['SHOP_PSQL']}\nThe handlers that run are printed here. "
                "Ctrl-C ends everything."
            )
            for event in events.events():
                show(event)
        close_connections()
        return 0 if complete else 1


def run_step(step, events, once):
    """Make the changes of a step; return whether all its handlers have run."""
    from shop import activity

    origin, title, change = step
    console.print(f"[bold]{origin}{title}[/]")
    with activity.written_by(origin):
        expected = change()
    complete = events.wait_for(expected)
    time.sleep(0 if once else 1)
    console.print()
    return complete


def answers(port, page, postgres):
    if page.poll() is not None:
        raise RuntimeError(f"the page ended: {(postgres.folder / 'page.log').read_text()}")
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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

    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:

        def active():
            if replicate.poll() is not None:
                log = (postgres.folder / "replicate.log").read_text()
                raise RuntimeError(f"the replication worker ended: {log}")
            query = "SELECT 1 FROM pg_replication_slots WHERE active"
            return connection.execute(query).fetchone()

        wait_until(active, "the replication worker")


def chosen_port(parser, port):
    """Return the port of the page, or end the program if it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            parser.error(f"port {port} is not available; choose another one, or omit --port")
    return port


def main():
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end when every change is handled")
    parser.add_argument("--port", type=int, help="port of the page; default: a free one")
    arguments = parser.parse_args()
    port = None if arguments.once else chosen_port(parser, arguments.port or free_port())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(arguments.once, port)
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left behind.")
        return 0


if __name__ == "__main__":
    sys.exit(main())
