"""Make text from the database safe for log lines and terminals.

Any user who can write a row or create a table chooses it: newlines would forge log lines, escape
sequences would control the terminal, and bidirectional marks would disguise text.
"""

from __future__ import annotations


def escaped(text: str) -> str:
    """Return the text with unprintable characters escaped as in Python: `\\n`, `\\x1b`, `\\u202e`.

    Printable characters of all scripts stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(error: object) -> str:
    """Return the text of an error on one line; those of PostgreSQL have several."""
    return " ".join(str(error).split())
