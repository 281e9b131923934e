"""A source: one database, and the names of our slots and publications in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psycopg
from psycopg import errors as postgres

from ..changes.operations import Operation
from ..settings import Settings
from .connection import connect

#: The operations. Each has a publication of its own.
OPERATIONS = (Operation.INSERT, Operation.UPDATE, Operation.DELETE, Operation.TRUNCATE)


def publication_name(prefix: str, operation: Operation) -> str:
    """Return the name of the publication of one operation."""
    return f"{prefix}_{operation.names()[0]}"


def publication_names(prefix: str) -> list[str]:
    """Return the names of all four publications."""
    return [publication_name(prefix, operation) for operation in OPERATIONS]


@dataclass(frozen=True)
class Source:
    """An ordinary connection to the database of a source, and the settings of that source."""

    connection: psycopg.Connection[Any]
    settings: Settings

    @cached_property
    def system(self) -> str:
        """The system identifier of the server; "" if the role may not read it."""
        try:
            row = self.connection.execute(
                "SELECT system_identifier::text FROM pg_control_system()"
            ).fetchone()
        except postgres.InsufficientPrivilege:
            return ""
        return str(row[0]) if row else ""

    @cached_property
    def database(self) -> str:
        """The name of the database; that of the DSN may be another one's of a pooler."""
        row = self.connection.execute("SELECT current_database()::text").fetchone()
        assert row is not None
        return str(row[0])

    @property
    def lanes(self) -> str:
        """The server and the slot, as in the names of lanes and the ids of tasks."""
        return f"{self.system}/{self.slot}"

    @property
    def slot(self) -> str:
        """The name of the replication slot."""
        return self.settings.flash_replication_slot

    @property
    def replay_slot(self) -> str:
        """The name of the replay slot, which trails the replication slot."""
        return self.settings.replay_slot

    @property
    def prefix(self) -> str:
        """The prefix of the publications' names."""
        return self.settings.flash_publication_slot_prefix


@contextmanager
def connected(settings: Settings, patience: float = float("inf")) -> Iterator[Source]:
    """Connect to a source, and close the connection afterwards.

    Args:
        settings: The settings of the source.
        patience: The seconds after which a statement that still runs closes the connection.

    Raises:
        ConfigurationError: There is no usable DSN.
        ReplicationError: The server cannot be reached.
    """
    with connect(settings.require_dsn(), patience) as connection:
        yield Source(connection, settings)
