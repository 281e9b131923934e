"""Checks of the table that `once=` needs, and the SQL that creates it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from ..escaping import escaped
from ..handlers.databases import MARKS_TABLE, Database
from ..handlers.subscriptions import Subscription
from ..lanes import marks_table
from ..provisioning.findings import OK, WARNING, Finding

#: The role, the name of the database, and what identifies it among all servers.
_WHERE = """
SELECT current_user::text, current_database()::text,
    (SELECT system_identifier::text FROM pg_control_system()) || '/' || current_database()
"""


@dataclass(frozen=True)
class Marks:
    """A database of `once=`, as it is seen from here."""

    #: The handlers that have it.
    handlers: Sequence[str]
    #: The role that handlers have there, and the name of the database; "" if it is unreachable.
    role: str = ""
    database: str = ""
    #: The same for all connections to the database.
    identity: str = ""
    exists: bool = False
    writable: bool = False
    #: The name of the error, if it is unreachable.
    error: str = ""


def examine(subscriptions: Iterable[Subscription]) -> list[Marks]:
    """Look at each database of `once=`; change nothing."""
    handlers: list[tuple[Database, list[str]]] = []
    for subscription in subscriptions:
        if subscription.once is None:
            continue
        found = [names for database, names in handlers if database == subscription.once]
        names = found[0] if found else []
        if not found:
            handlers.append((subscription.once, names))
        if subscription.handler not in names:
            names.append(subscription.handler)
    return [_look(database, names) for database, names in handlers]


def _look(database: Database, handlers: Sequence[str]) -> Marks:
    try:
        with database.transaction() as session:
            ((role, name, identity),) = session.execute(_WHERE, ())
            ((writable,),) = session.execute(marks_table.CHECK, ())
    except Exception as error:  # a function of the application; its text may hold a password
        return Marks(handlers, error=type(error).__name__)
    return Marks(handlers, role, name, identity, writable is not None, bool(writable))


def findings(subscriptions: Iterable[Subscription]) -> Iterator[Finding]:
    """Check that each database of `once=` has the table, and that its role may write there."""
    for marks in examine(subscriptions):
        names = ", ".join(marks.handlers)
        if marks.error:
            problem = (
                f"its database cannot be looked at from here ({marks.error}); it needs the table "
                f"{MARKS_TABLE}"
            )
        elif not marks.exists:
            problem = (
                f"the database {marks.database} has no table {MARKS_TABLE}, so the changes wait; "
                "run what `flash doctor --sql` prints, or the migration of "
                "flash_celery.django.once"
            )
        elif not marks.writable:
            grant = _grant(marks.role)
            problem = f"the role {marks.role} may not write {MARKS_TABLE}: {grant}"
        else:
            text = f"{names}: {MARKS_TABLE} in {marks.database}"
            yield Finding("once", OK, escaped(text))
            continue
        yield Finding("once", WARNING, escaped(f"{names}: {problem}"))


def script(
    subscriptions: Iterable[Subscription], connection: psycopg.Connection[Any]
) -> Iterator[str]:
    """Yield the lines of SQL that create what is missing.

    Args:
        subscriptions: All subscriptions.
        connection: To the database that the rest of the script is for. The statements for another
            one are comments.
    """
    ((_, _, source),) = connection.execute(_WHERE).fetchall()
    for marks in examine(subscriptions):
        if marks.writable:
            continue
        names, database = ", ".join(marks.handlers), marks.database or "their database"
        yield f"-- For once= of {names}, in {database}:"
        statements = [] if marks.exists else [f"{marks_table.CREATE_TABLE};"]
        statements.append(_grant(marks.role or "the_role_of_the_workers"))
        prefix = "" if marks.identity == source else "-- "
        for line in "\n".join(statements).splitlines():
            yield f"{prefix}{line}"


def _grant(role: Any) -> str:
    name = sql.Identifier(role).as_string(None)
    return f"GRANT {marks_table.PRIVILEGES} ON {MARKS_TABLE} TO {name};"
