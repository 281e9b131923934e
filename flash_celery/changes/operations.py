"""What can happen to a row, as flags."""

from __future__ import annotations

import enum


class Operation(enum.Flag):
    """What happened."""

    INSERT = enum.auto()
    UPDATE = enum.auto()
    DELETE = enum.auto()
    TRUNCATE = enum.auto()
    #: Of `on_message`; not one of a table's, so not in `ALL`.
    MESSAGE = enum.auto()
    ALL = INSERT | UPDATE | DELETE | TRUNCATE

    def names(self) -> tuple[str, ...]:
        """The single operations in it, in lower case."""
        return tuple(name for name, one in _SINGLE.items() if one in self)


_SINGLE = {
    name: Operation[name.upper()] for name in ("insert", "update", "delete", "truncate", "message")
}
