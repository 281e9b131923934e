"""A project without handlers, whose transactions carry tasks; `python -m carried` sends them."""

import json
import os
import random
import sys

import psycopg
from celery import Celery

from flash_celery import transactional

app = Celery("carried", broker=os.environ.get("SHOP_BROKER"))
app.conf.flash_dsn = os.environ.get("SHOP_DSN")
app.conf.flash_replication_slot = os.environ.get("SHOP_SLOT", "flash_replication")
app.conf.flash_signing_key = "a secret of the tests"
app.conf.flash_status_interval = 2
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_hijack_root_logger = False
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))


@app.task(name="receipt")
def receipt(number, place=0): ...


def write(first, count):
    """Write orders with their receipts, of which some transactions and savepoints are undone."""
    chance = random.Random(first)
    # A pooler does not know statements that were prepared on another connection.
    with psycopg.connect(os.environ["SHOP_DSN"], prepare_threshold=None) as connection:
        for number in range(first, first + count):
            with connection.transaction(force_rollback=chance.random() < 0.2):
                connection.execute("INSERT INTO items (id) VALUES (%s)", [number])
                with transactional(connection):
                    receipt.delay(number)
                    with connection.transaction(force_rollback=chance.random() < 0.5):
                        connection.execute("INSERT INTO items (id) VALUES (%s)", [-number])
                        receipt.delay(-number)


def prepare():
    """Prepare two transactions, each with a task, and leave them open."""
    for number, name in enumerate(("kept", "dropped"), 1):
        connection = psycopg.connect(os.environ["SHOP_DSN"])
        connection.tpc_begin(name)
        with transactional(connection):
            receipt.delay(number)
            connection.tpc_prepare()
        connection.close()


if __name__ == "__main__":
    prepare() if sys.argv[1:] == ["prepare"] else write(*map(int, sys.argv[1:]))
