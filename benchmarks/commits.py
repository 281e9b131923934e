"""`python -m benchmarks.commits RATE SECONDS [delay]`: an application that commits row by row.

Prints the key of each row and when its COMMIT had returned. With `delay` it then enqueues a task.
"""

import json
import os
import sys
import time

import psycopg

from benchmarks.app import row

ONE = """
INSERT INTO orders (customer_id, status, total, note)
VALUES (%s, 'paid', 12.34, 'please leave it at the door') RETURNING id"""


def commit(rate, count, enqueue):
    """The keys and times."""
    noted = []
    with psycopg.connect(os.environ["BENCH_DSN"]) as connection:
        begun = time.time()
        for number in range(count):
            time.sleep(max(0.0, begun + number / rate - time.time()))
            key = connection.execute(ONE, [number]).fetchone()[0]
            connection.commit()
            noted.append((key, time.time()))
            if enqueue:
                row.delay({"id": key})
    return noted


if __name__ == "__main__":
    per_second, seconds = float(sys.argv[1]), float(sys.argv[2])
    print(json.dumps(commit(per_second, int(per_second * seconds), "delay" in sys.argv)))
