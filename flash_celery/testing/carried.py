"""The tasks that transactions carry, for tests whose transactions never commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

from kombu.utils.json import loads

from ..messages.sent_tasks import SentTask
from ..transactional_tasks import blocks
from ..transactional_tasks.connections import DjangoLink, Link
from ..transactional_tasks.records import TaskRecord


@dataclass(frozen=True)
class CarriedTask:
    """A task that a transaction carries.

    Attributes:
        name: The task's name.
        id: The task's id.
        args: Its positional arguments, if the message is JSON.
        kwargs: Its keyword arguments.
        queue: The name of its queue.
        priority: Its priority, or None.
        headers: The headers of its message.
    """

    name: str
    id: str
    args: list[Any]
    kwargs: dict[str, Any]
    queue: str
    priority: int | None
    headers: dict[str, Any] = field(repr=False)


class CarriedTasks(Sequence[CarriedTask]):
    """The tasks that would be enqueued if the transactions were committed now, in their order."""

    def __init__(self) -> None:
        self._written: list[tuple[_Written, CarriedTask]] = []

    @overload
    def __getitem__(self, index: int) -> CarriedTask: ...
    @overload
    def __getitem__(self, index: slice) -> list[CarriedTask]: ...
    def __getitem__(self, index: int | slice) -> CarriedTask | list[CarriedTask]:
        """Return a task by its place."""
        return self._current[index]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._current)

    def __repr__(self) -> str:
        """Return them as a list."""
        return repr(self._current)

    @property
    def _current(self) -> list[CarriedTask]:
        return [task for written, task in self._written if written.holds]

    def note(self, link: Link, records: Sequence[TaskRecord]) -> None:
        """Note tasks that were written through a link."""
        written = _Written(link)
        self._written += [(written, _carried(record)) for record in records]


class _Written:
    """Knows whether what was written has been rolled back, in Django."""

    def __init__(self, link: Link) -> None:
        self._connection = None
        self._committed = False
        # With autocommit off, Django takes no callbacks.
        if isinstance(link, DjangoLink) and link.sees_commits:
            self._connection = link._connection
            # Django forgets the callback if a savepoint or the transaction is rolled back.
            self._connection.on_commit(self._commit)

    def _commit(self) -> None:
        self._committed = True

    @property
    def holds(self) -> bool:
        if self._connection is None or self._committed:
            return True
        return any(callback[1] == self._commit for callback in self._connection.run_on_commit)


def _carried(record: TaskRecord) -> CarriedTask:
    message = SentTask(record)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if record.content_type == "application/json" and not record.binary:
        args, kwargs, _ = loads(record.body)
    return CarriedTask(
        record.task, record.id, args, kwargs, message.queue, record.priority, message.headers
    )


@contextmanager
def carried_tasks() -> Iterator[CarriedTasks]:
    """Collect the tasks that are written into transactions in the block.

    A `TestCase` of Django never commits, so no worker would get them. Tasks of a savepoint that
    Django has rolled back are not among them. With other libraries all tasks are that were written.

    Yields:
        The tasks, a sequence of `CarriedTask`.
    """
    tasks = CarriedTasks()
    blocks.observers.append(tasks.note)
    try:
        yield tasks
    finally:
        blocks.observers.remove(tasks.note)
