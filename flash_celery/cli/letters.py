"""Dead letters as `flash dead` shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..dead_letters import letters
from ..dead_letters.letters import DeadLetter
from ..dead_letters.queue import AGE_UNITS, ID_PREFIX_LENGTH
from ..errors import PayloadError
from ..escaping import escaped


def table(found: Sequence[DeadLetter]) -> list[str]:
    """Letters for people, one a line."""
    rows = [("id", "age", "handler", "change", "error")]
    for one in found:
        rows.append((_short(one, found), _age(one.age), one.handler, one.argsrepr, one.summary))
    shown = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in shown) for place in range(4)]
    said = []
    for row in shown:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        said.append("  ".join([*cells, row[4]]))
    return said


def _short(letter: DeadLetter, found: Sequence[DeadLetter]) -> str:
    short = letter.id[:ID_PREFIX_LENGTH]
    alone = len({other.id for other in found if other.id.startswith(short)}) == 1
    return short if alone else letter.id


def _age(seconds: float) -> str:
    for unit, size in reversed(AGE_UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return "0s"


def whole(letter: DeadLetter, line: Callable[[Any], str]) -> list[str]:
    """Everything about one letter, for people; `line` says what a change is."""
    facts = {
        "id": letter.id,
        "handler": letter.handler,
        "queue": letter.queue
        + ("" if letter.priority is None else f", priority {letter.priority}"),
        "failed": f"{letter.failed_at} ({_age(letter.age)} ago) on {letter.worker}",
        "first failed": letter.first_failed_at,
        "last attempt": letter.started_at or "never began",
        "committed": f"{letter.committed_at} @{letter.commit_lsn}" if letter.changes else "unknown",
        "retries": str(letter.retries),
        "processes ended": str(letter.deaths),
        "error": f"{letter.error}: {letter.message}",
    }
    width = max(map(len, facts)) + 2
    said = [f"{name:<{width}}{value}" for name, value in facts.items()]
    said += ["", "changes", *(f"  {text}" for text in changes(letter, line))]
    # Set in, so that no line of it passes for one of ours.
    said += ["", "traceback", *(f"  {text}" for text in letter.traceback.rstrip().splitlines())]
    return said


def changes(letter: DeadLetter, line: Callable[[Any], str]) -> list[str]:
    """What it was about, each change in a line; what cannot be decoded is said so."""
    try:
        found = letters.changes_of(letter)
    except PayloadError as error:
        return [letter.argsrepr, str(error)]
    said = []
    for change in found:
        try:
            said.append(f"{change.id}  {line(change)}")
        except Exception as error:  # whatever a value's loader raises
            said.append(f"{change.id}  {type(error).__name__}: {error}")
    return said


def as_json(letter: DeadLetter) -> dict[str, Any]:
    """A letter without its message, ready for JSON."""
    found = asdict(letter)
    for name in ("headers", "body", "binary", "content_type", "content_encoding"):
        del found[name]
    return found | {"age": round(letter.age, 3)}
