"""A trigger with pg_notify, and a listener that enqueues a task for each notification."""

import os

import psycopg

from benchmarks.app import row


def listen():
    """Enqueue a task for each notification, forever."""
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        connection.execute("LISTEN orders")
        print("0 listening", flush=True)
        for notification in connection.notifies():
            row.apply_async((notification.payload,), queue="rows")


if __name__ == "__main__":
    listen()
