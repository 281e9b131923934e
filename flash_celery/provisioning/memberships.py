"""Whether another tool has changed what our publications send of a table, even if it undid that.

PostgreSQL decodes a row with the publications of its time, so it leaves out what was written in
between. A row of `pg_publication_rel` is never altered: a row filter or a column list makes another
one, and so does a table that is taken out and added again. So the OIDs of these rows show it, with
the transactions that wrote the rows of `pg_publication`, which have the operations. They are
recorded in the comment on the publication of updates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

from ..changes.operations import Operation
from ..postgres import catalog
from ..postgres.source import Source, publication_names
from ..table_name import TableName
from . import ddl
from .record import Record, comment, part, part_step

_KEY = "flash_celery_memberships"
_MEMBERSHIPS = b"""
SELECT r.prrelid::int8, array_agg(concat(r.oid, '/', p.xmin) ORDER BY r.oid)
FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
WHERE p.pubname = ANY(%s) GROUP BY r.prrelid ORDER BY r.prrelid
"""
_PUBLICATIONS = b"""
SELECT string_agg(concat(oid, '/', pubowner), ' ' ORDER BY oid) FROM pg_publication
WHERE pubname = ANY(%s)
"""


def present(source: Source) -> dict[str, Any]:
    """Return the publications and the memberships of their tables as they are now."""
    connection, names = source.connection, [publication_names(source.prefix)]
    (publications,) = connection.execute(_PUBLICATIONS, names).fetchone() or (None,)
    rows = connection.execute(_MEMBERSHIPS, names).fetchall()
    return {
        "publications": publications,
        "tables": {str(oid): memberships for oid, memberships in rows},
    }


def altered(source: Source, now: dict[str, Any]) -> dict[int, TableName]:
    """Return the tables, by OID, of which another tool has changed a membership since `remember`.

    There are none where the owner has run statements of ours, which `plan` records, and none where
    the publications are others, as in a restored or upgraded database, or have another owner.

    Args:
        source: The source.
        now: The memberships as `present` has returned them.
    """
    recorded = part(source, Operation.UPDATE, _KEY)
    if not isinstance(recorded, dict) or recorded.get("plan") not in (None, _plan(source)):
        return {}
    if recorded.get("publications") != now["publications"]:
        return {}
    tables: dict[str, list[str]] = recorded.get("tables", {})
    oids = [int(oid) for oid, rows in tables.items() if {*rows} - {*now["tables"].get(oid, ())}]
    described = catalog.describe_all(source.connection, oids) if oids else {}
    return {oid: table.name for oid, table in described.items()}


def remember(source: Source, memberships: dict[str, Any]) -> None:
    """Record memberships as `present` has returned them, unless that is done.

    Raises:
        CatalogError: They cannot be recorded.
    """
    _write(source, memberships | {"plan": _plan(source)})


def forget(source: Source, but: Collection[int]) -> None:
    """Forget the memberships before they are altered, except those of some tables (OIDs).

    Those were altered by another tool, whatever the plan becomes now.

    Raises:
        CatalogError: The record cannot be written.
    """
    recorded = part(source, Operation.UPDATE, _KEY)
    if recorded:
        kept = {oid: rows for oid, rows in recorded["tables"].items() if int(oid) in but}
        _write(source, {**recorded, "plan": None, "tables": kept})


def _write(source: Source, value: dict[str, Any]) -> None:
    if part(source, Operation.UPDATE, _KEY) != value:
        ddl.apply(source.connection, [part_step(source, Operation.UPDATE, _KEY, value)])


def _plan(source: Source) -> str:
    """Return a hash of what our own statements have last made of the publications, and where."""
    record = Record.of_json(comment(source, Operation.INSERT)) or Record()
    parts = [source.system, record.tables, record.previous, record.narrowed]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
