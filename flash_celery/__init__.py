"""PostgreSQL changes as Celery tasks.

WAL → postgres → protocol → capture → messages → publishing → broker → Celery worker → handler
"""

from typing import TYPE_CHECKING

from .changes import payload as _payload  # noqa: F401 - registers changes as task arguments
from .changes.change import (
    BackfillEnd,
    Change,
    Changes,
    Delete,
    Insert,
    LogicalMessage,
    Operation,
    Truncate,
    Update,
)
from .changes.rows import UNCHANGED
from .errors import FlashError
from .handlers.decorators import on_backfill_end, on_change, on_message
from .handlers.existing_rows import Backfill
from .handlers.subscriptions import Batch, Ordered
from .protocol.lsn import Lsn

__all__ = [
    "UNCHANGED",
    "Backfill",
    "BackfillEnd",
    "Batch",
    "Change",
    "Changes",
    "Delete",
    "FlashError",
    "Insert",
    "LogicalMessage",
    "Lsn",
    "Operation",
    "Ordered",
    "Truncate",
    "Update",
    "context",
    "on_backfill_end",
    "on_change",
    "on_message",
    "transactional",
    "wait_for",
]

if TYPE_CHECKING:
    from .commands.wait import wait_for
    from .handlers.context import context
    from .transactional_tasks.blocks import transactional

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """Load what is slow to import when it is used."""
        if name == "context":
            from .handlers.context import context

            return context
        if name == "wait_for":
            from .commands.wait import wait_for

            return wait_for
        if name == "transactional":
            from .transactional_tasks.blocks import transactional

            return transactional
        if name == "__version__":
            from importlib.metadata import version

            return version("flash-celery")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
