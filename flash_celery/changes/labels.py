"""What changes are called: the end of an id, a key, a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .operations import Part

#: The end of an id, by `Part`.
_PARTS = "", "-", "+", "m"


def id_suffix(part: Part, number: int) -> str:
    """Return the end of a change's id, which distinguishes parts and subscriptions."""
    return f"{_PARTS[part]}{f'#{number}' if number else ''}"


def key_shown(key: Iterable[tuple[str, Any]]) -> str:
    """A key in the name of a change. Without a primary key it is the whole row: not all of it."""
    return "".join(
        # Most keys are numbers, which need no second look.
        [
            f" {name}={value}" if type(value) is int else f" {name}={value!s:.200}"
            for name, value in key
        ]
    )


def counted(count: int) -> str:
    """How many changes there are."""
    return f"{count} change" if count == 1 else f"{count} changes"


def batch(count: int, first: object) -> str:
    """What a message of a batch is called, by the first of its changes."""
    return f"{counted(count)} from {first!r}"
