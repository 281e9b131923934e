"""The tasks that transactions carry, as messages for the broker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from math import ceil
from typing import Any

from kombu.utils.json import loads

from ..changes.deliveries import Delivery
from ..changes.operations import Part
from ..changes.rows import Table, Transaction
from ..errors import TaskRefused
from ..protocol import timestamps
from ..protocol.pgoutput import LogicalMessage
from ..telemetry import Telemetry
from ..transactional_tasks import records
from ..transactional_tasks.records import TaskRecord
from ..transactional_tasks.signing import PREFIX, Verifier
from .deduplication import identity
from .task_message import Form, Message

#: The name of the mark up to which tasks were enqueued, in place of a template's key.
TEMPLATE = "tasks"
#: The ordinal of a task is that of its message times this, and its place in the message.
_TASKS_OF_MESSAGE = 1 << 20
#: The exchange and the levels of Celery's native delayed delivery.
_DELAYED = "celery_delayed_27"
_LEVELS = 28
_TABLE = Table("", PREFIX, None, "n", (), ())


class SentTask(Message):
    """A task message that Celery has prepared."""

    __slots__ = ("record", "refused")

    def __init__(self, record: TaskRecord) -> None:
        named = record.declare, "" if record.exchange else record.routing_key
        form = _form(record.task, *named, record.content_type, record.content_encoding)
        super().__init__(form, record.id, "", record.content)
        self.record = record
        #: Whether the broker has refused it, so that a dead letter takes its place.
        self.refused = False

    @property
    def exchange(self) -> str:
        """The exchange that it is published to; "" for the default exchange."""
        return self.record.exchange

    @property
    def routing_key(self) -> str:
        """The routing key; of a delayed task, for the delay that is left."""
        if self.record.exchange != _DELAYED:
            return self.record.routing_key
        return _delayed(self.record.routing_key, self.headers.get("eta"))

    @property
    def declare(self) -> Sequence[str]:
        """Descriptions of the queues and exchanges to declare before it is published."""
        return self.record.declare

    @property
    def headers(self) -> dict[str, Any]:
        """Its headers, the same object each time."""
        if self._headers is None:
            self._headers = loads(self.record.headers)
        return self._headers

    @property
    def properties(self) -> dict[str, Any]:
        """Its properties, the same object each time."""
        if self._properties is None:
            self._properties = loads(self.record.properties)
            if self.record.priority is not None:
                self._properties["priority"] = self.record.priority
            if "expiration" in self._properties:
                expires = _seconds_until(self.headers.get("expires"))
                if expires is not None:
                    self._properties["expiration"] = str(int(max(expires, 0) * 1000))
        return self._properties

    @property
    def size(self) -> int:
        """How many characters its record has."""
        return self.record.size

    @property
    def plain(self) -> bool:
        """Whether it can be encoded with its form: it has none in common with others."""
        return False

    @property
    def forwards(self) -> bool:
        """Whether the texts of its record can be forwarded: nothing was read or is computed."""
        unread = self._headers is self._properties is None
        return unread and '"expiration"' not in self.record.properties


@lru_cache(1000)
def _form(
    task: str, declare: tuple[str, ...], queue: str, content_type: str, content_encoding: str
) -> Form:
    """Return the form of a task; its queue is the first that is declared, or `queue`."""
    queue = next(filter(None, map(records.queue_name, declare)), queue)
    return Form(queue, task, {}, {}, content_type, content_encoding, TEMPLATE)


def _seconds_until(moment: Any) -> float | None:
    """Return the seconds until a time as Celery writes it; None if there is none."""
    if not isinstance(moment, str):
        return None
    time = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    time = time if time.tzinfo else time.replace(tzinfo=timezone.utc)
    return (time - datetime.now(timezone.utc)).total_seconds()


def _delayed(routing_key: str, eta: Any) -> str:
    """Return the routing key for the delay that is left: its first words are the bits of it.

    Whole seconds, and not fewer than are left, as a worker would hold a message that is early.
    """
    target = routing_key.split(".", _LEVELS)[-1]
    seconds = ceil(max(_seconds_until(eta) or 0, 0))
    return ".".join([*f"{seconds:0{_LEVELS}b}", target])


class SentTasks:
    """Takes the logical messages that carry tasks.

    Args:
        verifier: Verifies them.
        add: Takes the tasks of a message.
        refuse: Takes a message that is refused, with the reason.
        telemetry: Counts tasks.
    """

    def __init__(
        self,
        verifier: Verifier,
        add: Callable[[Delivery, Sequence[Message]], None],
        refuse: Callable[[LogicalMessage, Transaction, str], None],
        telemetry: Telemetry,
    ) -> None:
        self._verifier = verifier
        self._add = add
        self._refuse = refuse
        self._tally = telemetry.tally(PREFIX, "task")

    def receive(self, message: LogicalMessage, transaction: Transaction, ordinal: int) -> None:
        """Take a message.

        Args:
            message: The message.
            transaction: The transaction that wrote it.
            ordinal: How many messages of the transaction precede it.
        """
        committed = timestamps.to_unix(transaction.committed_at)
        try:
            body = self._verifier.verify(message.content, committed)
            messages = [SentTask(record) for record in records.decode(body)]
        except TaskRefused as error:
            self._refuse(message, transaction, str(error))
            return
        self._tally.number += len(messages)
        first = ordinal * _TASKS_OF_MESSAGE
        transactions = (identity(transaction),)
        for place, sent in enumerate(messages, first):
            mark = transaction.commit_lsn, place, Part.MESSAGE
            sent.cover((((0, mark),), transactions, ()))
        rows = [sent.record.task.encode() for sent in messages]
        delivery = Delivery(_TABLE, transaction, first, Part.MESSAGE, 0, rows, 0)
        self._add(delivery, messages)
