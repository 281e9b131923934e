"""Dead letters as text and JSON, for `flash dead`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..dead_letters import letters
from ..dead_letters.letters import DeadLetter
from ..dead_letters.queue import AGE_UNITS, ID_PREFIX_LENGTH
from ..errors import PayloadError
from ..escaping import escaped


def as_table(dead_letters: Sequence[DeadLetter]) -> list[str]:
    """Return one line for each dead letter, under a heading."""
    rows = [("id", "age", "handler", "change", "error")]
    rows += [
        (
            _short_id(letter, dead_letters),
            _age(letter.age),
            letter.handler,
            letter.argsrepr,
            letter.summary,
        )
        for letter in dead_letters
    ]
    cells = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = 0
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]


def _short_id(letter: DeadLetter, others: Sequence[DeadLetter]) -> str:
    """Return the first characters of an id if they are unique among `others`, else all of it."""
    prefix = letter.id[:ID_PREFIX_LENGTH]
    matches = {other.id for other in others if other.id.startswith(prefix)}
    return prefix if len(matches) == 1 else letter.id


def _age(seconds: float) -> str:
    for unit, size in reversed(AGE_UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return "0s"


def as_text(letter: DeadLetter) -> list[str]:
    """Return everything about one dead letter: facts, changes and traceback."""
    priority = "" if letter.priority is None else f", priority {letter.priority}"
    facts = {
        "id": letter.id,
        "handler": letter.handler,
        "queue": f"{letter.queue}{priority}",
        "failed": f"{letter.failed_at} ({_age(letter.age)} ago) on {letter.worker}",
        "first failed": letter.first_failed_at,
        "last attempt": letter.started_at or "never began",
        "committed": f"{letter.committed_at} @{letter.commit_lsn}" if letter.changes else "unknown",
        "retries": str(letter.retries),
        "processes ended": str(letter.deaths),
        "error": f"{letter.error}: {letter.message}",
    }
    width = max(map(len, facts)) + 2
    lines = [f"{name:<{width}}{value}" for name, value in facts.items()]
    lines += ["", "changes", *(f"  {line}" for line in change_lines(letter))]
    # Indented, so that a line of the traceback cannot be taken for one of the facts.
    lines += ["", "traceback", *(f"  {line}" for line in letter.traceback.rstrip().splitlines())]
    return lines


def change_lines(letter: DeadLetter) -> list[str]:
    """Return one line for each change of a dead letter; a change that cannot be read is noted."""
    from ..commands.tail import as_text

    try:
        changes = letters.changes_of(letter)
    except PayloadError as error:
        return [letter.argsrepr, str(error)]
    lines = []
    for change in changes:
        try:
            lines.append(f"{change.id}  {as_text(change)}")
        except Exception as error:  # the loader of a value may raise anything
            lines.append(f"{change.id}  {type(error).__name__}: {error}")
    return lines


def as_json(letter: DeadLetter) -> dict[str, Any]:
    """Return a dead letter, without its message, ready for JSON."""
    fields = asdict(letter)
    for name in ("headers", "body", "binary", "content_type", "content_encoding"):
        del fields[name]
    return fields | {"age": round(letter.age, 3)}
