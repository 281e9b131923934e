"""For the tests of those who use flash-celery: build changes, run handlers, see what is enqueued.

Nothing here needs a broker; only `Live` needs a database. See docs/testing.md.
"""

from .applying import Enqueued, Flash, Run
from .building import delete, insert, message, transaction, truncate, update
from .live import Live

__all__ = [
    "Enqueued",
    "Flash",
    "Live",
    "Run",
    "delete",
    "insert",
    "message",
    "transaction",
    "truncate",
    "update",
]
