"""Check that the role may run the statements of the set-up, before the first of them runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from psycopg import errors as postgres
from psycopg import sql

from ..errors import CatalogError
from ..postgres.source import OPERATIONS, Source, publication_names
from .ddl import Step
from .publications import ExistingPublications
from .requirements import RequiredTables
from .server_checks import Role

#: How long a trial of the statements waits for a lock. Writers would wait behind it.
_TRIAL_LOCK_TIMEOUT = "50ms"
#: Since this version each grant states whether its privileges are inherited.
_INHERIT_OPTION = 160000
_NOT_OWNED = """
SELECT array_agg(pubname::text ORDER BY pubname), pg_get_userbyid(pubowner)
FROM pg_publication WHERE pubname = ANY(%s) AND NOT pg_has_role(pubowner, 'USAGE')
GROUP BY pubowner ORDER BY 1 LIMIT 1
"""
_SCHEMAS = """
SELECT nspname, pg_get_userbyid(nspowner) FROM pg_namespace
WHERE nspname = ANY(%s) AND NOT has_schema_privilege(oid, 'USAGE') ORDER BY 1
"""
_EVENT_TRIGGERS = """
SELECT evtname FROM pg_event_trigger
WHERE evtenabled <> 'D' AND evtevent IN ('ddl_command_start', 'ddl_command_end', 'sql_drop')
AND (evttags IS NULL OR evttags && '{CREATE PUBLICATION,ALTER PUBLICATION,ALTER TABLE,COMMENT}')
ORDER BY 1
"""
_IS_SUPERUSER = "SELECT rolsuper FROM pg_roles WHERE rolname = %s"
_INHERITANCE = """
SELECT rolinherit, pg_has_role(current_user, %s, 'MEMBER') FROM pg_roles
WHERE rolname = current_user
"""


def check(
    source: Source,
    role: Role,
    existing: ExistingPublications,
    required: RequiredTables,
    steps: Sequence[Step],
) -> None:
    """Raise `CatalogError`, with the SQL that helps, if a statement of the set-up would fail."""
    if len(existing.by_operation) < len(OPERATIONS) and not role.creates:
        database = sql.Identifier(role.database).as_string(None)
        raise CatalogError(
            f"The role {role.name} may not create publications: "
            f"GRANT CREATE ON DATABASE {database} TO {role};"
        )
    recorded = existing.record is not None and existing.record.slot == source.slot
    if not steps and recorded:
        return
    connection = source.connection
    _check_read_only(connection, role)
    _check_schemas(connection, role, _schemas(existing, required, steps))
    for step in steps:
        table = next((each for each in step.tables if not each.owned), None)
        if table is not None:
            owner = _owner(connection, table.oid)
            inheriting = _inheriting(source, role, owner)
            let = f" or let this role do so: {inheriting}" if inheriting else ""
            raise CatalogError(
                f"The role {role.name} does not own {table.name}; as its owner {owner} run: "
                f"{step};{let}"
            )
    if foreign := foreign_publications(source, role):
        raise CatalogError(f"{foreign}.")
    _try_event_triggers(connection, role, steps)


def foreign_publications(source: Source, role: Role) -> str:
    """Describe the publications of another owner, and the SQL that helps; "" if there are none."""
    row = source.connection.execute(_NOT_OWNED, [publication_names(source.prefix)]).fetchone()
    if row is None:
        return ""
    names, owner = row
    transfers = "; ".join(
        sql.SQL("ALTER PUBLICATION {} OWNER TO {}")
        .format(sql.Identifier(name), sql.Identifier(role.name))
        .as_string(None)
        for name in names
    )
    inheriting = _inheriting(source, role, owner)
    return (
        f"{', '.join(names)} belong to the role {owner}, and {role.name} may not alter them or "
        f"their comments: {f'{inheriting} or, ' if inheriting else ''}as a superuser: {transfers};"
    )


def _check_read_only(connection: psycopg.Connection[Any], role: Role) -> None:
    row = connection.execute("SHOW default_transaction_read_only").fetchone()
    if row == ("on",):
        login = sql.Identifier(role.login).as_string(None)
        raise CatalogError(
            "default_transaction_read_only is on, so the publications cannot be altered: "
            f"ALTER ROLE {login} SET default_transaction_read_only = off;"
        )


def _schemas(
    existing: ExistingPublications, required: RequiredTables, steps: Sequence[Step]
) -> set[str]:
    """Return the schemas of the tables that the statements name."""
    altered = {table.name.schema for step in steps for table in step.tables}
    dropped = {
        name.schema
        for operation, publication in existing.by_operation.items()
        for oid, name in publication.tables.items()
        if oid not in required.tables[operation]
    }
    return altered | dropped


def _check_schemas(connection: psycopg.Connection[Any], role: Role, schemas: set[str]) -> None:
    rows = connection.execute(_SCHEMAS, [sorted(schemas)]).fetchall()
    if rows:
        names = ", ".join(sql.Identifier(name).as_string(None) for name, _ in rows)
        raise CatalogError(
            f"The role {role.name} may not use the schema of a handler's table; as {rows[0][1]}, "
            f"who owns it, run: GRANT USAGE ON SCHEMA {names} TO {role};"
        )


def _owner(connection: psycopg.Connection[Any], table: int) -> str:
    query = "SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = %s"
    row = connection.execute(query, [table]).fetchone()
    return str(row[0]) if row else "?"


def _inheriting(source: Source, role: Role, owner: str) -> str:
    """Return the SQL, up to its semicolon, that gives the role the privileges of an owner.

    Even a member may lack them: until PostgreSQL 15 a role with NOINHERIT inherits nothing, and
    since 16 each grant states whether its privileges are inherited. Return "" if the owner is a
    superuser, who has too many.
    """
    if source.connection.execute(_IS_SUPERUSER, [owner]).fetchone() == (True,):
        return ""
    connection, name = source.connection, sql.Identifier(owner).as_string(None)
    grant = f"GRANT {name} TO {role}"
    if connection.info.server_version >= _INHERIT_OPTION:
        return f"{grant} WITH INHERIT TRUE;"
    inherits, member = connection.execute(_INHERITANCE, [owner]).fetchone() or (True, False)
    statements = [] if member else [grant]
    if not inherits:
        statements.append(f"ALTER ROLE {role} INHERIT")
    if statements:
        return f"{'; '.join(statements)};"
    # A role between the two does not inherit.
    dsn = source.settings.called("flash_dsn")
    return f"{grant}; (or act as {owner}: add options='-c role={owner}' to {dsn});"


def _try_event_triggers(
    connection: psycopg.Connection[Any], role: Role, steps: Sequence[Step]
) -> None:
    """Raise `CatalogError` if an event trigger refuses a statement.

    Only running the statements shows that, so they run in a transaction that is rolled back, and
    that does not wait for locked tables.
    """
    triggers = [name for (name,) in connection.execute(_EVENT_TRIGGERS).fetchall()] if steps else []
    if not triggers:
        return
    for step, error in _refused(connection, steps):
        names = ", ".join(triggers)
        disable, enable = (
            "; ".join(
                sql.SQL("ALTER EVENT TRIGGER {} {}")
                .format(sql.Identifier(name), sql.SQL(state))
                .as_string(None)
                for name in triggers
            )
            for state in ("DISABLE", "ENABLE")
        )
        raise CatalogError(
            f"{step} is refused: {error.diag.message_primary}. An event trigger ({names}) sees "
            f"every DDL statement; let its function pass for the role {role.name}, or as a "
            f"superuser run: {disable}; start `flash replicate`, and run: {enable};"
        )


def _refused(
    connection: psycopg.Connection[Any], steps: Sequence[Step]
) -> Iterator[tuple[Step, psycopg.Error]]:
    """Yield the first statement that fails, with its error, and undo all of them."""
    step = steps[0]
    try:
        with connection.transaction() as transaction:
            connection.execute(f"SET LOCAL lock_timeout = '{_TRIAL_LOCK_TIMEOUT}'")
            for step in steps:
                connection.execute(step.statement)
            raise psycopg.Rollback(transaction)
    except postgres.LockNotAvailable:
        return
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        yield step, error
