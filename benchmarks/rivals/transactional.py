"""Tasks of a transaction: sent after its commit with `delay`, or carried by it."""

import json
import os
import sys
import time
from statistics import median

import psycopg

from benchmarks.app import row
from benchmarks.rivals.apply_async import ORDER
from benchmarks.verify import total_of_ids
from flash_celery import transactional

#: Tasks of a transaction.
TASKS = 10


def send():
    """Send the tasks of one transaction; return their ids."""
    return [row.delay({**ORDER, "id": number}).id for number in range(TASKS)]


def after_commit(connection):
    """Send them after the commit; return the seconds that this took."""
    with connection.transaction():
        connection.execute("SELECT 1")
    started = time.perf_counter()
    send()
    return time.perf_counter() - started


def carried(connection):
    """Have the transaction carry them; return the seconds that this took."""
    with connection.transaction():
        connection.execute("SELECT 1")
        started = time.perf_counter()
        with transactional(connection):
            send()
        return time.perf_counter() - started


def compare(connection, count):
    """Return the median seconds of both, of as many transactions, alternating."""
    seconds = {"after_commit": [], "carried": []}
    for _ in range(count + 5):
        seconds["after_commit"].append(after_commit(connection))
        seconds["carried"].append(carried(connection))
    return {name: median(values[5:]) for name, values in seconds.items()}


def write(connection, count):
    """Write transactions that carry so many tasks; return the total of their ids."""
    found = 0
    for _ in range(count // TASKS):
        with connection.transaction(), transactional(connection):
            found += int(total_of_ids(send()))
    return {"total": str(found)}


if __name__ == "__main__":
    with psycopg.connect(os.environ["BENCH_DSN"]) as connected:
        measure = {"compare": compare, "write": write}[sys.argv[1]]
        print(json.dumps(measure(connected, int(sys.argv[2]))))
