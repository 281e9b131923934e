"""`flash_transactional_database`: every task that is sent inside `atomic()` is transactional."""

from __future__ import annotations

from celery import Celery

from . import collecting
from .blocks import Writer
from .connections import DjangoLink, of_django
from .records import TaskRecord


class _AtBlock:
    """Writes each task at once, into the savepoint that is open."""

    def __init__(self, link: DjangoLink) -> None:
        self._writer = Writer(link)

    def is_active(self) -> bool:
        """Return whether it takes tasks."""
        return True

    def collect(self, app: Celery, record: TaskRecord) -> None:
        """Write a task.

        Raises:
            FlashError: The transaction cannot carry it.
        """
        self._writer.accept(app, record)
        self._writer.link.drive(self._writer.statements([record]))


def collector(app: Celery) -> _AtBlock | None:
    """Return what takes a task that an app sends now; None outside `atomic()`."""
    alias = app.conf.get("flash_transactional_database")
    if not alias:
        return None
    connection = of_django(alias)
    if not connection.in_atomic_block:
        return None
    return _AtBlock(DjangoLink(connection, strict=True))


def install() -> None:
    """Have every app of this process look for an `atomic()` block."""
    collecting.install()
    if collector not in collecting.otherwise:
        collecting.otherwise.append(collector)
