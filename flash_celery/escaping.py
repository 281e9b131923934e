"""Names and values of the database, as they may stand in a log line or on a terminal.

Whoever may write a row or create a table chooses them: newlines would forge lines, escape sequences
drive the terminal, and marks of direction show a text as another one.
"""

from __future__ import annotations


def escaped(text: str) -> str:
    """The text with whatever does not print written as Python writes it: `\\n`, `\\x1b`, `\\u202e`.

    What prints stays as it is, in any script.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def one_line(error: object) -> str:
    """Return the text of an error on one line; those of PostgreSQL have several."""
    return " ".join(str(error).split())
