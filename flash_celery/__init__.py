"""PostgreSQL changes as Celery tasks.

WAL → replication → pgoutput → transactions → routing → payload → publishers → broker → handler
"""

from . import payload as _payload  # noqa: F401 - makes changes travel as task arguments
from .changes import (
    Change,
    Changes,
    Delete,
    Insert,
    LogicalMessage,
    Operation,
    Truncate,
    Update,
)
from .errors import FlashError
from .handlers import on_change, on_message
from .protocol.lsn import Lsn
from .rows import UNCHANGED
from .subscriptions import Batch

__all__ = [
    "UNCHANGED",
    "Batch",
    "Change",
    "Changes",
    "Delete",
    "FlashError",
    "Insert",
    "LogicalMessage",
    "Lsn",
    "Operation",
    "Truncate",
    "Update",
    "on_change",
    "on_message",
]
