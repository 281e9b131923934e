"""What the owner of the tables runs in psql where `replicate` may not (`flash_manage = False`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from psycopg import sql

from .ddl import LOCK_TIMEOUT, Step


def create_slot(slot: str, failover: bool) -> Step:
    """The statement that makes the slot, for whoever is not on a replication connection.

    Source: PostgreSQL documentation, "Replication Management Functions"; `failover` is 17's.
    """
    more = ", failover => true" if failover else ""
    create = sql.SQL("SELECT pg_create_logical_replication_slot({}, 'pgoutput'{})")
    return Step(create.format(sql.Literal(slot), sql.SQL(more)))


def lines(steps: Iterable[Step]) -> Iterator[str]:
    """The statements, each step in a transaction of its own as `ddl.apply` runs it."""
    yield "-- For psql. It stops at the first error, or after two seconds of waiting for a lock;"
    yield "-- then make it anew: it holds what is left to do."
    yield "\\set ON_ERROR_STOP on"
    yield "SET client_encoding = 'UTF8';"
    yield f"SET lock_timeout = '{LOCK_TIMEOUT}';"
    for step in steps:
        yield f"BEGIN; {step}; COMMIT;"
