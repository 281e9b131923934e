"""Make text from the database safe for log lines and terminals.

Any user who can write a row or create a table chooses it: newlines would forge log lines, escape
sequences would control the terminal, and bidirectional marks would disguise text.
"""

from __future__ import annotations

from collections.abc import Sequence


def escaped(text: str) -> str:
    r"""Return the text with unprintable characters escaped as in Python: `\n`, `\x1b`, `\u202e`.

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
    return " ".join(text_of(error).split())


def first_of(names: Sequence[str], most: int) -> str:
    """Return names as text; of more than `most` the first ones, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def text_of(error: object) -> str:
    """Return the text of an error that code of the application may have defined.

    Its `__str__` or `__repr__` may raise anything, which must not stop the worker that reports it.
    """
    for describe in (str, repr):
        try:
            # Not a subclass of str, whose methods are the application's too.
            return str.__str__(describe(error))
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: S112 - this is what reports errors
            continue
    return f"<{type(error).__name__}, whose text cannot be read>"
