"""An event trigger by which tables join a pattern in the very transaction that creates them.

Only a superuser may create one, so it is offered as SQL. Without it a table joins within a second,
and is backfilled.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from ..changes.operations import Operation
from ..handlers.subscriptions import Subscription, of_patterns
from ..postgres.catalog import named
from ..postgres.source import OPERATIONS, publication_name
from .requirements import REWRITES

# CREATE TABLE AS writes rows before the table can be published, so such a table joins later.
_FUNCTION = """\
CREATE OR REPLACE FUNCTION public.{function}() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $flash$
DECLARE
    made record;
    publication text;
BEGIN
    FOR made IN
        SELECT c.oid, n.nspname, c.relname, c.relkind,
               ARRAY(SELECT attname::text FROM pg_attribute
                     WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns,
               ARRAY(SELECT a.attname::text FROM pg_index i JOIN pg_attribute a
                         ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey::int2[])
                     WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate) AS key
        FROM pg_event_trigger_ddl_commands() AS command
        JOIN pg_class c ON command.classid = 'pg_class'::regclass AND c.oid = command.objid
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE command.command_tag = 'CREATE TABLE' AND c.relkind IN ('r', 'p')
        AND c.relpersistence = 'p' AND NOT c.relispartition
    LOOP{patterns}
    END LOOP;
END $flash$;
DROP EVENT TRIGGER IF EXISTS {function};
CREATE EVENT TRIGGER {function} ON ddl_command_end WHEN TAG IN ('CREATE TABLE')
EXECUTE FUNCTION public.{function}();"""
_PATTERN = """
        IF EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                   WHERE c.oid = made.oid AND {named})
        AND {columns}::text[] <@ made.columns
        AND (made.relkind = 'r' OR NOT {rewrites} OR made.key <> '{{}}') THEN
            IF {rewrites} AND (made.key = '{{}}' OR NOT {old_columns}::text[] <@ made.key) THEN
                EXECUTE format('ALTER TABLE ONLY %I.%I REPLICA IDENTITY FULL',
                               made.nspname, made.relname);
            END IF;
            FOR publication IN
                SELECT p.pubname FROM pg_publication p WHERE p.pubname = ANY({publications})
                AND NOT EXISTS (SELECT FROM pg_publication_rel r
                                WHERE r.prpubid = p.oid AND r.prrelid = made.oid)
            LOOP
                EXECUTE format('ALTER PUBLICATION %I ADD TABLE ONLY %I.%I',
                               publication, made.nspname, made.relname);
            END LOOP;
        END IF;"""


def script(prefix: str, subscriptions: Sequence[Subscription]) -> str:
    """Return the SQL that creates the event trigger; "" without patterns.

    Args:
        prefix: The prefix of the publications.
        subscriptions: The subscriptions to the source.
    """
    patterns = [_pattern(prefix, each) for each in of_patterns(subscriptions)]
    if not patterns:
        return ""
    text = sql.SQL(_FUNCTION).format(
        function=sql.Identifier(f"flash_celery_join_{prefix}"[:63]), patterns=sql.Composed(patterns)
    )
    return text.as_string(None)


def _pattern(prefix: str, subscription: Subscription) -> sql.Composed:
    assert subscription.pattern is not None
    captured = subscription.captured
    old_columns = subscription.old_columns(Operation.UPDATE)
    old_columns |= subscription.old_columns(Operation.DELETE)
    names = [publication_name(prefix, each) for each in OPERATIONS if each in captured]
    return sql.SQL(_PATTERN).format(
        named=named([subscription.pattern]),
        columns=sql.Literal(sorted(subscription.columns)),
        old_columns=sql.Literal(sorted(old_columns)),
        rewrites=sql.SQL("true" if captured & REWRITES else "false"),
        publications=sql.Literal(names),
    )
