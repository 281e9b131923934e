"""The requested backfills and their progress, in tables of the source's database.

The commands write the requests, and the replication worker the progress. So both outlive every
process, and a second worker goes on where the first one was.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import psycopg
from psycopg import errors, sql
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from ..errors import ConfigurationError
from ..postgres.connection import is_standby
from ..postgres.source import Source
from .chunks import Cursor

#: The states in which the replication worker has something to do.
ACTIVE = ("requested", "running")
#: How the error begins of one that waits for workers.
WAITS_FOR_ROOM = "waiting until workers have handled what is in "
#: The bytes of an id. Thousands are requested together, and no two may be equal.
_ID_BYTES = 6
CREATE = """
CREATE TABLE IF NOT EXISTS public.flash_celery_backfills (
    id text PRIMARY KEY,
    slot text NOT NULL,
    handler text NOT NULL,
    table_name text NOT NULL,
    state text NOT NULL DEFAULT 'requested',
    rate double precision,
    chunk_rows integer NOT NULL,
    estimate bigint NOT NULL,
    requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    advanced_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    chunks bigint NOT NULL DEFAULT 0,
    row_count bigint NOT NULL DEFAULT 0,
    options jsonb NOT NULL DEFAULT '{}',
    progress jsonb,
    error text
)"""
#: Keys that rows have got while their table was read, so that they may have been passed by.
CREATE_MOVES = """
CREATE TABLE IF NOT EXISTS public.flash_celery_backfill_moves (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    backfill text NOT NULL REFERENCES public.flash_celery_backfills ON DELETE CASCADE,
    table_oid bigint NOT NULL,
    keys jsonb NOT NULL
)"""
_FIELDS = """id, slot, handler, table_name, state, rate, chunk_rows, estimate, requested_at,
       ended_at, advanced_at, chunks, row_count, options, progress, error"""
_INSERT = f"""
INSERT INTO public.flash_celery_backfills
    (id, slot, handler, table_name, rate, chunk_rows, estimate, options)
SELECT id, %(slot)s, handler, table_name, rate, chunk_rows, estimate,
       jsonb_build_object('since', pg_current_wal_insert_lsn()::text) || options
FROM unnest(%(id)s::text[], %(handler)s::text[], %(table_name)s::text[],
            %(rate)s::float8[], %(chunk_rows)s::int[], %(estimate)s::int8[], %(options)s::jsonb[])
     AS wanted(id, handler, table_name, rate, chunk_rows, estimate, options)
RETURNING {_FIELDS}"""  # noqa: S608 - constants only
#: Of those that have something to do, the first of each handler: it may have thousands. Those that
#: show an error are counted by themselves, because they must not hold up the others.
_SELECT = f"""
SELECT {_FIELDS} FROM public.flash_celery_backfills
WHERE slot = coalesce(%(slot)s, slot) AND id = coalesce(%(id)s, id)
  AND (NOT %(active)s OR id IN (
      SELECT id FROM (
          SELECT id, row_number() OVER (
              PARTITION BY slot, handler, error IS NULL ORDER BY requested_at) AS place
          FROM public.flash_celery_backfills WHERE state IN ('requested', 'running')) AS numbered
      WHERE place <= 20))
  AND (NOT %(begun)s OR (ended_at IS NULL AND progress IS NOT NULL))
  AND (NOT %(failed)s OR (state = 'paused' AND error IS NOT NULL))
ORDER BY requested_at"""  # noqa: S608 - constants only
#: Those of the last day, and how many there are of each state.
_RECENT = f"""
SELECT {_FIELDS} FROM public.flash_celery_backfills
WHERE slot = %(slot)s AND coalesce(ended_at > clock_timestamp() - interval '1 day', true)
ORDER BY ended_at IS NOT NULL, state = 'requested', requested_at LIMIT %(most)s"""  # noqa: S608
_COUNTS = """
SELECT state, count(*) FROM public.flash_celery_backfills
WHERE slot = %s AND coalesce(ended_at > clock_timestamp() - interval '1 day', true)
GROUP BY state"""
_UNDER_WAY = """
SELECT handler, table_name, id, state FROM public.flash_celery_backfills
WHERE slot = %s AND ended_at IS NULL"""
_STOP = """
WITH stopped AS (
    UPDATE public.flash_celery_backfills
    SET state = 'stopped', error = %(error)s, ended_at = clock_timestamp()
    WHERE id = ANY(%(ids)s) AND ended_at IS NULL RETURNING id)
DELETE FROM public.flash_celery_backfill_moves AS moves USING stopped
WHERE moves.backfill = stopped.id"""
_QUEUES = """
SELECT DISTINCT handler, options->>'queue' FROM public.flash_celery_backfills
WHERE slot = %s AND options->>'queue' IS NOT NULL"""
_EXISTS = "SELECT to_regclass('public.flash_celery_backfills') IS NOT NULL"
_USABLE = """
SELECT coalesce(bool_and(has_table_privilege(to_regclass('public.' || name), privilege)), false)
       AND count(to_regclass('public.' || name)) = 8
FROM unnest('{flash_celery_backfills,flash_celery_backfill_moves}'::text[]) AS name,
     unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS privilege"""
#: The pace is an average of the rows a second in which the last PACE_SECONDS count most. There is
#: none before the second chunk, because the wait for the first may have been long. Its weight
#: is how much was measured: the first chunks, which may come in a burst, count no more than others.
#: The bounds keep it from numbers that PostgreSQL refuses as too small, after hours without rows.
PACE_SECONDS = 30
_PROGRESS = f"""
UPDATE public.flash_celery_backfills
SET advanced_at = clock_timestamp(), chunks = chunks + 1, row_count = row_count + %(rows)s,
    error = NULL, progress = jsonb_build_object('cursor', %(cursor)s,
        'chunk', coalesce(%(chunk)s, progress->>'chunk', ''), 'pace', now.pace,
        'weight', now.weight)
FROM (SELECT id, weight, CASE WHEN progress IS NOT NULL THEN
          (greatest((progress->>'pace')::float8, 1e-6) * before * fade
           + %(rows)s / seconds * (1 - fade)) / weight END AS pace
      FROM public.flash_celery_backfills,
      LATERAL (SELECT greatest(extract(epoch FROM clock_timestamp() - advanced_at)::float8, 0.001)
               AS seconds) AS since,
      LATERAL (SELECT exp(-least(seconds / {PACE_SECONDS}, 20)) AS fade,
                      CASE WHEN progress->>'pace' IS NULL THEN 0
                           ELSE coalesce((progress->>'weight')::float8, 1) END AS before) AS faded,
      LATERAL (SELECT before * fade + 1 - fade AS weight) AS weights
      WHERE id = %(id)s) AS now
WHERE flash_celery_backfills.id = now.id"""  # noqa: S608 - constants only
_VOUCH = """
UPDATE public.flash_celery_backfills
SET progress = jsonb_set(progress, '{chunk}', to_jsonb(%(chunk)s::text))
WHERE slot = %(slot)s AND id <> %(id)s AND ended_at IS NULL
  AND progress->>'chunk' = ANY(%(known)s)"""
#: All rows will be read as they are by then, also those that have moved. The keys of these may have
#: another type by now.
_BEGIN_AGAIN = """
WITH forgotten AS (DELETE FROM public.flash_celery_backfill_moves WHERE backfill = %(id)s)
UPDATE public.flash_celery_backfills
SET progress = NULL, options = jsonb_set(
    options, '{beginnings}', to_jsonb(coalesce((options->>'beginnings')::int, 0) + 1))
WHERE id = %(id)s"""
#: One that has ended, or was deleted, needs none.
_MOVED = """
INSERT INTO public.flash_celery_backfill_moves (backfill, table_oid, keys)
SELECT id, %s, %s FROM public.flash_celery_backfills WHERE id = %s AND ended_at IS NULL"""
_MOVES = """
SELECT number, table_oid, keys FROM public.flash_celery_backfill_moves WHERE backfill = %s
ORDER BY number LIMIT 5"""
_ALL_MOVES = """
SELECT keys FROM public.flash_celery_backfill_moves WHERE backfill = %s AND table_oid = %s
LIMIT %s"""
#: Until the end of the transaction, so that two requests do not miss each other.
_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('public.flash_celery_backfills'))"
_DROP = "DROP TABLE public.flash_celery_backfill_moves, public.flash_celery_backfills"
_READ = "DELETE FROM public.flash_celery_backfill_moves WHERE backfill = %s AND number <= %s"
#: One that has ended needs no keys of rows that have moved.
_STATE = """
WITH entered AS (
    UPDATE public.flash_celery_backfills
    SET state = %(state)s, error = %(error)s,
        advanced_at = CASE WHEN %(state)s = 'requested' THEN clock_timestamp() ELSE advanced_at END,
        ended_at = CASE WHEN %(state)s IN ('done', 'stopped') THEN clock_timestamp() END
    WHERE id = %(id)s AND state = ANY (%(allowed)s) RETURNING id
), forgotten AS (
    DELETE FROM public.flash_celery_backfill_moves AS moves USING entered
    WHERE moves.backfill = entered.id AND %(state)s IN ('done', 'stopped')
)
SELECT id FROM entered"""


class Progress(TypedDict):
    """How far a backfill has come."""

    #: None if no chunk was read in the order of the key.
    cursor: Cursor | None
    #: Identifies the last chunk that has brought rows, as the broker knows it; "" for none.
    chunk: str
    #: Rows a second, lately; None if it is unknown.
    pace: float | None
    #: Of the pace, up to 1; None or absent in what an earlier release has recorded.
    weight: float | None


@dataclass(frozen=True)
class RequestedBackfill:
    """One backfill: a table for a handler."""

    id: str
    slot: str
    handler: str
    table_name: str
    #: `requested`, `running`, `paused`, `done` or `stopped`.
    state: str
    #: The most rows a second; None without a limit.
    rate: float | None
    chunk_rows: int
    #: The number of rows when it was requested, as PostgreSQL estimates it.
    estimate: int
    requested_at: datetime
    ended_at: datetime | None
    #: When the broker confirmed the last chunk, or it was requested or resumed.
    advanced_at: datetime
    chunks: int
    row_count: int
    #: `since`: where it was requested in the WAL. `truncate`: whether a Truncate comes before all
    #: rows. `where`: lookups, if not all rows are to be read. `queue`: where the rows go, if not
    #: where the handler's changes go. `beginnings`: how often it has begun again.
    options: dict[str, Any]
    #: Where to go on, and what the broker has of the last chunk.
    progress: Progress | None
    #: The last error, while it is not overcome, or what it waits for.
    error: str | None

    @property
    def has_failed(self) -> bool:
        """Whether its last attempt to go on has failed."""
        return self.error is not None and not self.error.startswith(WAITS_FOR_ROOM)


class Draft(NamedTuple):
    """A request that is not recorded yet; its fields are columns of the table."""

    handler: str
    table_name: str
    rate: float | None
    chunk_rows: int
    estimate: int
    options: Mapping[str, Any] = MappingProxyType({})


def request(source: Source, drafts: Sequence[Draft]) -> list[RequestedBackfill]:
    """Record that tables are to be backfilled. Call it in a transaction.

    Raises:
        ConfigurationError: One is under way already, or the tables of backfills are missing and
            cannot be created.
    """
    if not drafts:
        return []
    prepare(source)
    present = under_way(source)
    for each in drafts:
        if (found := present.get((each.handler, each.table_name))) is not None:
            raise ConfigurationError(
                f"The backfill {found[0]} of {each.table_name} for {each.handler} is {found[1]}; "
                f"stop it by `flash backfill stop {found[0]}` to begin another."
            )
    values: dict[str, Any] = {
        name: list(column)
        for name, column in zip(Draft._fields, zip(*drafts, strict=True), strict=True)
    }
    values["options"] = [Jsonb(dict(options)) for options in values["options"]]
    values["id"] = [secrets.token_hex(_ID_BYTES) for _ in drafts]
    with source.connection.cursor(row_factory=class_row(RequestedBackfill)) as cursor:
        return cursor.execute(_INSERT, {"slot": source.slot, **values}).fetchall()


def prepare(source: Source) -> None:
    """Create the tables of backfills if they are missing, and keep out other requests.

    Call it in a transaction.

    Raises:
        ConfigurationError: They are missing and cannot be created.
    """
    connection = source.connection
    usable = _usable(connection)
    if not usable and source.settings.flash_manage:
        with suppress(errors.InsufficientPrivilege), connection.transaction():
            connection.execute(CREATE)
            connection.execute(CREATE_MOVES)
        usable = _usable(connection)
    if not usable:
        raise ConfigurationError(
            "The tables of backfills are missing, or this role may not write to them; as the owner "
            f"of the database run: {statements(connection.info.user)}"
        )
    connection.execute(_ONE_AT_A_TIME)


def statements(role: str) -> str:
    """Return the SQL for the tables, with the privileges that a role needs."""
    grant = sql.SQL(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON public.flash_celery_backfills, "
        "public.flash_celery_backfill_moves TO {}"
    ).format(sql.Identifier(role))
    parts = [" ".join(each.split()) for each in (CREATE, CREATE_MOVES, grant.as_string(None))]
    return "; ".join(parts) + ";"


def _usable(connection: psycopg.Connection[Any]) -> bool:
    """Return whether there are the tables of backfills, and our role may use them."""
    return connection.execute(_USABLE).fetchone() == (True,)


def all_of(source: Source) -> list[RequestedBackfill]:
    """Return all backfills of a source, in the order in which they were requested."""
    return _select(source.connection, source.slot)


def recent(source: Source, most: int) -> tuple[list[RequestedBackfill], dict[str, int]]:
    """Return backfills that have not ended, or on the last day only.

    Args:
        source: The source.
        most: The most of them. Those that are running or paused come before others.

    Returns:
        These, in the order in which they were requested, and how many others there are, by state.
    """
    connection = source.connection
    if not _usable(connection):
        return [], {}
    others = Counter(dict(connection.execute(_COUNTS, [source.slot]).fetchall()))
    with connection.cursor(row_factory=class_row(RequestedBackfill)) as cursor:
        found = cursor.execute(_RECENT, {"slot": source.slot, "most": most}).fetchall()
    others.subtract(each.state for each in found)
    return sorted(found, key=lambda each: each.requested_at), dict(+others)


def under_way(source: Source) -> dict[tuple[str, str], tuple[str, str]]:
    """Return the id and the state of each backfill under way, by its handler and table."""
    if not _usable(source.connection):
        return {}
    rows = source.connection.execute(_UNDER_WAY, [source.slot]).fetchall()
    return {(handler, table): (id, state) for handler, table, id, state in rows}


def stop(source: Source, error: str, only: Collection[tuple[str, str]] | None = None) -> None:
    """Stop backfills that are under way, so that others can be requested in their place.

    Call it in the transaction of that request: it keeps out others until then. Does nothing if the
    tables of backfills are damaged, which the request reports.

    Args:
        source: The source.
        error: What they show as their last error.
        only: Of these handlers and tables. Default: all.
    """
    connection = source.connection
    with suppress(psycopg.ProgrammingError), connection.transaction():
        connection.execute(_ONE_AT_A_TIME)
        present = under_way(source).items()
        ids = [id for pair, (id, _) in present if only is None or pair in only]
        if ids:
            connection.execute(_STOP, {"ids": ids, "error": error})


def queues(source: Source) -> list[tuple[str, str]]:
    """Return the handlers with backfills that have queues of their own, and these queues.

    Also of those that have ended: their rows may still be in the queue, or held for it.
    """
    with suppress(psycopg.ProgrammingError):  # damaged tables hold up no change
        if _usable(source.connection):
            return source.connection.execute(_QUEUES, [source.slot]).fetchall()
    return []


def active(source: Source) -> list[RequestedBackfill]:
    """Return the backfills that the replication worker has to do, as they were requested.

    A worker that reads a standby has none: they are those of the primary.

    Raises:
        ConfigurationError: There are tables of backfills that our role may not use.
    """
    connection = source.connection
    if not _usable(connection):
        if connection.execute(_EXISTS).fetchone() != (True,):
            return []
        raise ConfigurationError(
            "This role may not use the tables of backfills; run as one that may: "
            f"{statements(connection.info.user)}"
        )
    return [] if is_standby(connection) else _select(connection, source.slot, active=True)


def begun(source: Source) -> list[RequestedBackfill]:
    """Return the backfills that have read something and have not ended, also paused ones.

    As with `active`, a worker that reads a standby has none.
    """
    if is_standby(source.connection):
        return []
    return _select(source.connection, source.slot, begun=True)


def absence_of(backfill: RequestedBackfill) -> str:
    """Return the error of a backfill that is paused because its handler is gone."""
    name, table = backfill.handler, backfill.table_name
    return f"{name} is no handler of {table}; it goes on when {name} is one again."


def resume_present(source: Source, is_present: Callable[[RequestedBackfill], bool]) -> None:
    """Let backfills go on that are paused because their handler was gone, and that have it now."""
    if is_standby(source.connection):
        return
    for backfill in _select(source.connection, source.slot, failed=True):
        if backfill.error == absence_of(backfill) and is_present(backfill):
            enter(source.connection, backfill.id, "requested", ["paused"])


def find(connection: psycopg.Connection[Any], id: str) -> RequestedBackfill | None:
    """Return a backfill by its id."""
    found = _select(connection, id=id)
    return found[0] if found else None


def _select(
    connection: psycopg.Connection[Any],
    slot: str | None = None,
    id: str | None = None,
    active: bool = False,
    begun: bool = False,
    failed: bool = False,
) -> list[RequestedBackfill]:
    if not _usable(connection):
        return []
    values = {"slot": slot, "id": id, "active": active, "begun": begun, "failed": failed}
    with connection.cursor(row_factory=class_row(RequestedBackfill)) as cursor:
        return cursor.execute(_SELECT, values).fetchall()


def count_of(connection: psycopg.Connection[Any], slot: str) -> int:
    """Return how many backfills are recorded for a slot."""
    return len(_select(connection, slot))


def forget_slot(source: Source, slot: str) -> None:
    """Forget the backfills of a slot, and drop the tables that no other slot needs."""
    connection = source.connection
    connection.execute("DELETE FROM public.flash_celery_backfills WHERE slot = %s", [slot])
    others = connection.execute("SELECT FROM public.flash_celery_backfills LIMIT 1").fetchone()
    if others is None and source.settings.flash_manage:
        with suppress(errors.InsufficientPrivilege), connection.transaction():
            connection.execute(_DROP)


def advance(
    connection: psycopg.Connection[Any],
    id: str,
    rows: int,
    cursor: Cursor | None,
    chunk: str = "",
) -> None:
    """Record that the broker has the rows of a chunk.

    Args:
        connection: To the source's database.
        id: The backfill.
        rows: How many rows were enqueued.
        cursor: Where to go on.
        chunk: What the broker knows the chunk by; "" if it had no message.
    """
    values = {"rows": rows, "cursor": Jsonb(cursor), "chunk": chunk or None, "id": id}
    connection.execute(_PROGRESS, values)


def vouch(
    connection: psycopg.Connection[Any],
    backfill: RequestedBackfill,
    chunk: str,
    known: Sequence[str],
) -> None:
    """Record that a broker which knows a chunk has the rows of other backfills, too.

    It knows the last chunks only, so those of a backfill that is paused are forgotten.

    Args:
        connection: To the source's database.
        backfill: The one that the chunk is of.
        chunk: What the broker knows the chunk by.
        known: Chunks that it knew when it got this one.
    """
    values = {"chunk": chunk, "slot": backfill.slot, "id": backfill.id, "known": list(known)}
    connection.execute(_VOUCH, values)


def begin_again(connection: psycopg.Connection[Any], id: str) -> None:
    """Forget up to which row the table was read, and which rows have moved."""
    connection.execute(_BEGIN_AGAIN, {"id": id})


def remember_moved(
    connection: psycopg.Connection[Any], id: str, table: int, keys: Sequence[Mapping[str, str]]
) -> None:
    """Record keys that rows of a table (its OID) have got, which are read by themselves."""
    connection.execute(_MOVED, [table, Jsonb(keys), id])


def moved(connection: psycopg.Connection[Any], id: str) -> tuple[int, int, list[dict[str, str]]]:
    """Return the oldest keys of `remember_moved`.

    Returns:
        The number up to which these are, the OID of their table, and the keys.
    """
    rows = connection.execute(_MOVES, [id]).fetchall()
    table = rows[0][1] if rows else 0
    same = list(takewhile(lambda row: row[1] == table, rows))
    return (same[-1][0] if same else 0), table, [key for *_, keys in same for key in keys]


def all_moved(
    connection: psycopg.Connection[Any], id: str, table: int, most: int
) -> list[dict[str, str]]:
    """Return the keys of `remember_moved` for a table, at least `most` if there are so many."""
    return [key for (keys,) in connection.execute(_ALL_MOVES, [id, table, most]) for key in keys]


def forget_moved(connection: psycopg.Connection[Any], id: str, number: int) -> None:
    """Forget the keys up to a number: the broker has their rows."""
    connection.execute(_READ, [id, number])


def enter(
    connection: psycopg.Connection[Any],
    id: str,
    state: str,
    allowed: Sequence[str],
    error: str | None = None,
) -> bool:
    """Move a backfill to another state; return False if it is in none of the allowed ones."""
    values = {"state": state, "error": error, "id": id, "allowed": list(allowed)}
    return connection.execute(_STATE, values).fetchone() is not None
