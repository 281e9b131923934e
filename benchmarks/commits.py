"""`python -m benchmarks.commits RATE SECONDS [WAY]`: an application that commits row by row.

Prints the key of each row and the time at which its COMMIT returned. With `delay` it enqueues a
task after each commit; with `carried` the transaction carries the task.
"""

import json
import os
import sys
import time

import psycopg

from benchmarks.app import row
from flash_celery import transactional

INSERT_ROW = """
INSERT INTO orders (customer_id, status, total, note)
VALUES (%s, 'paid', 12.34, 'please leave it at the door') RETURNING id"""


def commit(rate, count, way=""):
    """Commit rows; return their keys and times."""
    commits = []
    with psycopg.connect(os.environ["BENCH_DSN"]) as connection:
        begun = time.time()
        for number in range(count):
            time.sleep(max(0.0, begun + number / rate - time.time()))
            key = connection.execute(INSERT_ROW, [number]).fetchone()[0]
            if way == "carried":
                with transactional(connection):
                    row.delay({"id": key})
            connection.commit()
            commits.append((key, time.time()))
            if way == "delay":
                row.delay({"id": key})
    return commits


if __name__ == "__main__":
    per_second, seconds = float(sys.argv[1]), float(sys.argv[2])
    print(json.dumps(commit(per_second, int(per_second * seconds), *sys.argv[3:])))
