"""`make screenshots`: take the pictures of the status page in docs/ from a real run of 5 minutes.

The run has a replication worker and a Celery worker of the shop, orders and price changes, bulk
updates, a broker that is down for a while, and a handler that fails.
"""

import base64
import io
import os
import random
import sys
import time
from contextlib import ExitStack

import psycopg
from PIL import Image

from example_project.demo import HERE, close_connections, migrate, process
from example_project.servers import Postgres, Valkey, free_port, wait_until
from tests.browser import browser, picture, show

IMAGES = HERE.parent / "docs" / "images"
#: Name, width, height, dark, and device pixels for each pixel.
PICTURES = [
    ("status-light", 1120, 1580, False, 1.0),
    ("status-dark", 1120, 1580, True, 1.0),
    ("status-phone", 390, 1400, False, 1.5),
]
MINUTES = float(os.environ.get("MINUTES", 5.5))


def write(connection, rng, started):
    """Write some orders; the rate rises and falls."""
    phase = (time.monotonic() - started) / 60
    busy = 0.4 + 1.6 * abs((phase * 1.3) % 2 - 1)
    for _ in range(int(rng.expovariate(1 / busy)) + 1):
        customer = rng.randrange(1, 200)
        (order,) = connection.execute(
            "INSERT INTO shop_order (customer_id, status, total) VALUES (%s, 'open', 0) "
            "RETURNING id",
            [customer],
        ).fetchone()
        for _ in range(rng.randrange(1, 4)):
            connection.execute(
                "INSERT INTO shop_orderline (order_id, product_id, quantity, price) "
                "VALUES (%s, %s, %s, %s)",
                [order, rng.randrange(1, 300), rng.randrange(1, 5), 4],
            )
        if rng.random() < 0.6:
            connection.execute("UPDATE shop_order SET status = 'paid' WHERE id = %s", [order])
    if rng.random() < 0.01:
        connection.execute("UPDATE shop_product SET price = price * 1.01, name = name || ''")


def fail(connection, number):
    """Write a paid order and delete its customer, so that `send_receipt` fails."""
    for statement in (
        "INSERT INTO shop_customer (id, name, email) VALUES (%s, 'Eve', 'eve@example.com')",
        "INSERT INTO shop_order (customer_id, status, total) VALUES (%s, 'paid', 12)",
        "DELETE FROM shop_order WHERE customer_id = %s",
        "DELETE FROM shop_customer WHERE id = %s",
    ):
        connection.execute(statement, [number])


def prepare(connection):
    connection.execute(
        "INSERT INTO shop_customer (name, email) "
        "SELECT 'customer ' || g, g || '@example.com' FROM generate_series(1, 200) g"
    )
    connection.execute(
        "INSERT INTO shop_product (name, price) "
        "SELECT 'product ' || g, 4 FROM generate_series(1, 300) g"
    )


def run():
    IMAGES.mkdir(exist_ok=True)
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres(max_slot_wal_keep_size="2GB"))
        valkey = stack.enter_context(Valkey())
        os.environ["SHOP_DATABASE_URL"] = postgres.dsn()
        os.environ["SHOP_BROKER_URL"] = valkey.url
        os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
        paths = [str(HERE), str(HERE.parent)]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path[:0] = paths
        migrate()
        close_connections()
        address = f"127.0.0.1:{free_port()}"
        folder = postgres.folder
        worker = ("worker", "-Q", "flash", "-c", "2", "-l", "WARNING")
        stack.enter_context(process("worker", *worker, folder=folder))
        replicate = ("flash", "replicate", "--wait-for-workers", "--http", address)
        stack.enter_context(process("replicate", *replicate, folder=folder))
        log = folder / "replicate.log"
        wait_until(lambda: "Replicating the slot" in log.read_text(), "the slot to be read")
        connection = stack.enter_context(psycopg.connect(postgres.dsn(), autocommit=True))
        prepare(connection)
        rng, started = random.Random(7), time.monotonic()
        broker_was_down = False
        failures = [0.05, 0.15]
        while (passed := time.monotonic() - started) < 60 * MINUTES:
            write(connection, rng, started)
            time.sleep(rng.expovariate(4))
            if failures and passed > 60 * MINUTES * failures[0]:
                failures.pop(0)
                fail(connection, 1000 + len(failures))
            if not broker_was_down and passed > 60 * MINUTES * 0.55:
                broker_was_down = True
                valkey.stop()
                until = time.monotonic() + 14
                while time.monotonic() < until:
                    write(connection, rng, started)
                    time.sleep(0.2)
                valkey.start()
        with browser() as driver:
            for name, width, height, dark, scale in PICTURES:
                show(driver, f"http://{address}/", width, height, dark, scale)
                image = Image.open(io.BytesIO(base64.b64decode(picture(driver, width > 600))))
                file = IMAGES / f"{name}.png"
                reduced = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
                reduced.save(file, optimize=True)
                print(f"{file.relative_to(HERE.parent)}: {file.stat().st_size // 1024} kB")


if __name__ == "__main__":
    run()
