"""A loop of `task.apply_async`, as applications enqueue tasks today."""

import json
import sys
import time

from benchmarks.app import row

ORDER = {
    "id": 1,
    "customer_id": 1,
    "status": "paid",
    "total": "1234.56",
    "note": "please leave it at the door, order 123456",
    "created_at": "2026-01-01 12:00:00.123456+00",
    "updated_at": "2026-01-01 12:00:00.123456+00",
}


def enqueue(count):
    """Enqueue messages; return messages per second."""
    for _ in range(20):
        row.apply_async((ORDER,), queue="rows")
    started = time.time()
    for number in range(count):
        row.apply_async(({**ORDER, "id": number},), queue="rows")
    return count / (time.time() - started)


if __name__ == "__main__":
    print(json.dumps({"rate": enqueue(int(sys.argv[1]))}))
