"""Text about changes: the end of an id, a key, a batch."""

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
    """Return a key for the label of a change."""
    return "".join([value_shown(name, value) for name, value in key])


def value_shown(name: str, value: Any) -> str:
    """Return a value of a key for the label; long ones, of whole rows for example, are cut."""
    # Most keys are numbers, which need no cutting.
    return f" {name}={value}" if type(value) is int else f" {name}={value!s:.200}"


def counted(count: int) -> str:
    """Return a number of changes in words."""
    return f"{count} change" if count == 1 else f"{count} changes"


def batch(count: int, first: object) -> str:
    """Return the label of a batch that begins with this change."""
    return f"{counted(count)} from {first!r}"
