"""The tasks that transactions carry, for tests whose transactions never commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

from kombu import compression, serialization

from ..messages.sent_tasks import SentTask
from ..transactional_tasks import blocks
from ..transactional_tasks.connections import DjangoLink, Link
from ..transactional_tasks.records import TaskRecord
from .applying import Run, run_of

#: The formats that can be read without running what they hold.
_READABLE = "application/json", "application/x-yaml", "application/x-msgpack"


@dataclass(frozen=True)
class CarriedTask:
    """A task that a transaction carries.

    Attributes:
        name: The task's name.
        id: The task's id.
        args: Its positional arguments; empty if they are in a format other than JSON, YAML or
            msgpack.
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
        self._written += [(written, read_carried(record)) for record in records]


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


def read_carried(record: TaskRecord) -> CarriedTask:
    """Return the task of a record."""
    message = SentTask(record)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if record.content_type in _READABLE:
        body = record.content
        if encoding := message.headers.get("compression"):
            body = compression.decompress(body, encoding)
        form = record.content_type, record.content_encoding
        args, kwargs, _ = serialization.loads(body, *form, accept=_READABLE)
    return CarriedTask(
        record.task,
        record.id,
        list(args),
        kwargs,
        message.queue,
        record.priority,
        message.headers,
    )


def run_carried(app: Any, task: CarriedTask) -> Run:
    """Run a task in this process."""
    outcome = app.tasks[task.name].apply(task.args, task.kwargs, task_id=task.id, throw=False)
    return run_of(task.name, task, outcome)


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
