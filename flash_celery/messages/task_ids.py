"""The ids of tasks.

The id of a task for one change is a hash of the change's id, so it is the same at every
redelivery and after `flash replay`, and users can find the task of a change. A batch is filled
differently at every redelivery, so its task has a random id.
"""

from __future__ import annotations

import hashlib
import uuid


def task_id_of_change(source: str, task: str, change_id: str) -> str:
    """Return the id of the task for a change, in the form of a UUID.

    Args:
        source: The server's system identifier and the slot (`7357…/flash`), because positions in
            the WAL mean nothing elsewhere.
        task: The name of the task.
        change_id: `change.id`.
    """
    digest = short_digest(f"{source}|{task}|{change_id}", 16)
    return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:]}"


def task_id_of_batch() -> str:
    """Return a random id."""
    return str(uuid.uuid4())


def short_digest(text: str, size: int) -> str:
    """Return a hash of `size` bytes in hexadecimal, the same in every process."""
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()
