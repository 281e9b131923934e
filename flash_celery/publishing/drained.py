"""Checks whether the workers have handled everything that was enqueued."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from typing import Any

from ..errors import PublishError
from . import brokers


def is_drained(app: Any, queues: Sequence[str], more: Collection[str] = ()) -> bool:
    """Return whether these queues or lanes are empty and workers hold no message of any queue.

    `more` are queues that another thread adds to.

    Returns False if that is unknown, because the broker does not answer or is not Redis.
    """
    with closing(brokers.for_app(app)) as publisher:
        unacknowledged = getattr(publisher, "unacknowledged", None)
        if unacknowledged is None:
            return False
        try:
            publisher.open([])
            return not any(map(publisher.depth, {*queues, *more})) and unacknowledged() == 0
        except PublishError:
            return False
