"""Operations on rows, and the parts into which a change of a key is split."""

from __future__ import annotations

import enum


class Operation(enum.Flag):
    """What happened."""

    INSERT = enum.auto()
    UPDATE = enum.auto()
    DELETE = enum.auto()
    TRUNCATE = enum.auto()
    #: For `on_message`; not an operation on a table, so not in `ALL`.
    MESSAGE = enum.auto()
    ALL = INSERT | UPDATE | DELETE | TRUNCATE

    def names(self) -> tuple[str, ...]:
        """Return the names of the single operations in it, in lower case."""
        return tuple(name for name, operation in _SINGLE.items() if operation in self)


_SINGLE = {
    name: Operation[name.upper()] for name in ("insert", "update", "delete", "truncate", "message")
}


class Part(enum.IntEnum):
    """Which part of a row's operation a change is. The numbers travel in messages."""

    WHOLE = 0
    #: The Delete of an UPDATE that changed the subscription's `key=`.
    KEY_DELETE = 1
    #: The Insert of the same UPDATE.
    KEY_INSERT = 2
    #: A logical message; messages are numbered apart from rows.
    MESSAGE = 3
