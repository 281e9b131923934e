"""The ids of tasks.

The id of a task for one change is a hash of the change's id, so it is the same at every
redelivery and after `flash replay`, and users can find the task of a change. A batch is filled
differently at every redelivery, so its task has a random id.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from operator import itemgetter

#: Cuts a digest of 16 bytes in hexadecimal as UUIDs are written.
_cut = itemgetter(slice(8), slice(8, 12), slice(12, 16), slice(16, 20), slice(20, None))


class TaskIds:
    """Makes the ids of the tasks for changes, in the form of UUIDs.

    Args:
        source: The server's system identifier and the slot (`7357…/flash`), because positions in
            the WAL mean nothing elsewhere.
        task: The name of the task.
    """

    def __init__(self, source: str, task: str) -> None:
        self._digest = hashlib.blake2b(f"{source}|{task}|".encode(), digest_size=16)

    def of(self, change_id: str) -> str:
        """Return the id of the task for a change.

        Args:
            change_id: `change.id`.
        """
        return self.each(change_id, [""])[0]

    def each(self, beginning: str, ends: Iterable[str]) -> list[str]:
        """Return the ids of the tasks for several changes.

        Args:
            beginning: What the ids of the changes begin with.
            ends: The rest of each.
        """
        shared = self._digest.copy()
        shared.update(beginning.encode())
        copy, join, cut = shared.copy, "-".join, _cut
        ids = []
        for end in ends:
            digest = copy()
            digest.update(end.encode())
            ids.append(join(cut(digest.hexdigest())))
        return ids


def task_id_of_change(source: str, task: str, change_id: str) -> str:
    """Return the id of the task for one change; the arguments are those of `TaskIds`."""
    return TaskIds(source, task).of(change_id)


def task_id_of_batch() -> str:
    """Return a random id."""
    return str(uuid.uuid4())


def short_digest(text: str, size: int) -> str:
    """Return a hash of `size` bytes in hexadecimal, the same in every process."""
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()
