"""The task message of a single change.

This is the hot path of handlers without `batch=`. A message keeps no body: publishers put it
together from its parts, of which all but the row are made once for a delivery.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..changes.alone import Alone
from ..changes.deliveries import Delivery
from ..changes.payload import CHANGE
from .deduplication import Covered, chunk_rows, identity
from .task_message import EMBEDDED, Form, Message

#: What precedes the JSON value of a change in the body, and what follows it.
BEGINNING = f'[[{{"__type__":"{CHANGE}","__value__":'
END = f"}}],{{}},{EMBEDDED}]"
#: How many characters both have.
SIZE = len(BEGINNING) + len(END)
#: Bytes of memory that a message takes, with its id and its label, roughly.
_MEMORY = 500


class ChangeMessage(Message):
    """The task message of one change.

    Args:
        form: The queue, the task, and the headers and properties that many messages share.
        changes: The changes of its delivery.
        position: Which of them it holds.
        task_id: The id of the task.
        argsrepr: The arguments as Celery's logs and Flower show them.
        length: How many characters the body has, at most.
    """

    __slots__ = ("changes", "position")

    def __init__(
        self,
        form: Form,
        changes: Alone,
        position: int,
        task_id: str,
        argsrepr: str,
        length: int,
    ) -> None:
        # Without a call of `Message`, which takes as long as the rest.
        self.form = form
        self.changes = changes
        self.position = position
        self.id = task_id
        self.argsrepr = argsrepr
        self.length = length
        self.part = self._headers = self._properties = None

    @property
    def body(self) -> str:
        """The body."""
        return f"{BEGINNING}{self.changes.value(self.position)}{END}"

    @property
    def covered(self) -> Covered:
        """The change that it holds, for deduplication."""
        delivery = self.changes.delivery
        transaction = delivery.transaction
        if transaction.backfill is not None:
            return (), (), (chunk_rows(delivery.row(self.position)),)
        mark = transaction.commit_lsn, delivery.ordinal + self.position, delivery.part
        return ((delivery.number, mark),), (identity(transaction),), ()

    def is_covered_by(self, later: Message) -> bool:
        """Return whether a later message has a higher mark of the same subscription.

        Those of a backfill have no marks.
        """
        same = isinstance(later, ChangeMessage) and later.changes is self.changes
        return same and self.changes.delivery.transaction.backfill is None

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """The change in it."""
        return [self.changes.delivery.row(self.position)]

    @property
    def memory(self) -> int:
        """How many bytes of memory it takes, roughly, beside its row."""
        return _MEMORY

    @property
    def plain(self) -> bool:
        """Whether it can be encoded with its form: its headers are unaltered."""
        return self._headers is self._properties is None
