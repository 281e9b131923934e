"""Tools for your tests: build changes, run handlers on them, and inspect the enqueued tasks.

Nothing here needs a broker; only `Live` needs a database. See docs/testing.md.
"""

from .applying import Enqueued, Flash, Run
from .building import backfill_end, delete, insert, message, transaction, truncate, update
from .carried import CarriedTask, CarriedTasks, carried_tasks
from .live import Live

__all__ = [
    "CarriedTask",
    "CarriedTasks",
    "Enqueued",
    "Flash",
    "Live",
    "Run",
    "backfill_end",
    "carried_tasks",
    "delete",
    "insert",
    "message",
    "transaction",
    "truncate",
    "update",
]
