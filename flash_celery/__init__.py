"""PostgreSQL changes as Celery tasks.

WAL → replication → pgoutput → transactions → routing → payload → publishers → broker → handler
"""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """`__version__`, which nobody waits for who does not ask."""
        if name == "__version__":
            from importlib.metadata import version

            return version("flash-celery")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
