"""The table of marks, `flash_celery_marks`, and the statements on it.

The placeholders are those of psycopg, psycopg2, Django and pg8000. All parameters are texts and
integers, which every driver can send.
"""

from __future__ import annotations

from ..handlers.written_context import WRITES_CONTEXT

#: A mark is updated in place, so there must be room in its page.
CREATE_TABLE = """CREATE TABLE flash_celery_marks (
    handler text NOT NULL,
    source text NOT NULL,
    lane integer NOT NULL,
    layout text NOT NULL,
    fence bigint NOT NULL DEFAULT 0,
    history text NOT NULL DEFAULT 'null',
    commit_lsn pg_lsn NOT NULL DEFAULT '0/0',
    row_place bigint[] NOT NULL DEFAULT '{}',
    message_place bigint[] NOT NULL DEFAULT '{}',
    committed_at bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (handler, source, lane)
) WITH (fillfactor = 50)"""

#: What a handler's role needs on it.
PRIVILEGES = "SELECT, INSERT, UPDATE, DELETE"

#: Whether it exists, and whether this role has the privileges; NULL if it does not exist.
CHECK = """
SELECT bool_and(has_table_privilege(to_regclass('flash_celery_marks'), privilege))
FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) privilege
"""

#: The lane that stands for the floor.
FLOOR = -1

#: Moves a mark of the same layout and history past rows, if it is before the first of them. The
#: place of a message in an earlier transaction means nothing in this one.
MOVE_PAST_ROWS = """
UPDATE flash_celery_marks SET commit_lsn = %s::pg_lsn, row_place = %s::int8[],
    message_place = CASE WHEN commit_lsn = %s::pg_lsn THEN message_place ELSE '{}' END,
    committed_at = greatest(committed_at, %s)
WHERE handler = %s AND source = %s AND lane = %s AND layout = %s AND history = %s
    AND (commit_lsn, row_place) < (%s::pg_lsn, %s::int8[])
"""
#: The same for messages.
MOVE_PAST_MESSAGES = """
UPDATE flash_celery_marks SET commit_lsn = %s::pg_lsn, message_place = %s::int8[],
    row_place = CASE WHEN commit_lsn = %s::pg_lsn THEN row_place ELSE '{}' END,
    committed_at = greatest(committed_at, %s)
WHERE handler = %s AND source = %s AND lane = %s AND layout = %s AND history = %s
    AND (commit_lsn, message_place) < (%s::pg_lsn, %s::int8[])
"""
#: What these end with to write the context of what the handler writes. It goes with the mark,
#: because a statement of its own takes as long.
WITH_CONTEXT = f"RETURNING {WRITES_CONTEXT}"
LOCK = """
SELECT layout, history, commit_lsn::text, row_place::text, message_place::text,
    committed_at
FROM flash_celery_marks WHERE handler = %s AND source = %s AND lane = %s FOR UPDATE
"""
READ = """
SELECT lane, layout, history, commit_lsn::text, row_place::text, message_place::text,
    committed_at
FROM flash_celery_marks WHERE handler = %s AND source = %s
"""
SET = """
UPDATE flash_celery_marks SET history = %s, commit_lsn = %s::pg_lsn, row_place = %s::int8[],
    message_place = %s::int8[], committed_at = %s
WHERE handler = %s AND source = %s AND lane = %s
"""
#: Creates a mark at the floor.
CREATE = """
INSERT INTO flash_celery_marks
    (handler, source, lane, layout, history, commit_lsn, row_place, message_place, committed_at)
SELECT handler, source, %s, layout, history, commit_lsn, row_place, message_place, committed_at
FROM flash_celery_marks WHERE handler = %s AND source = %s AND lane = -1
ON CONFLICT DO NOTHING
"""

CREATE_FLOOR = """
INSERT INTO flash_celery_marks (handler, source, lane, layout, fence) VALUES (%s, %s, -1, %s, %s)
ON CONFLICT DO NOTHING
"""
LOCK_FLOOR = """
SELECT layout, fence FROM flash_celery_marks
WHERE handler = %s AND source = %s AND lane = -1 FOR UPDATE
"""
#: Moves the floor to the greatest mark, and sets the next layout.
RAISE_FLOOR_TO_GREATEST = """
UPDATE flash_celery_marks floor SET history = mark.history, commit_lsn = mark.commit_lsn,
    row_place = mark.row_place, message_place = mark.message_place, committed_at = mark.latest
FROM (
    SELECT *, max(committed_at) OVER () AS latest
    FROM flash_celery_marks WHERE handler = %s AND source = %s AND lane >= 0
    ORDER BY commit_lsn DESC, row_place DESC, message_place DESC LIMIT 1
) mark
WHERE floor.handler = mark.handler AND floor.source = mark.source AND floor.lane = -1
"""
#: Moves the floor to the least mark, if each of the former lanes (the third parameter) has one.
RAISE_FLOOR_TO_LEAST = """
UPDATE flash_celery_marks floor SET history = mark.history, commit_lsn = mark.commit_lsn,
    row_place = mark.row_place, message_place = mark.message_place, committed_at = mark.latest
FROM (
    SELECT *, count(*) OVER () AS marks, max(committed_at) OVER () AS latest
    FROM flash_celery_marks
    WHERE handler = %s AND source = %s AND lane >= 0
    ORDER BY commit_lsn, row_place, message_place LIMIT 1
) mark
WHERE floor.handler = mark.handler AND floor.source = mark.source AND floor.lane = -1
    AND mark.marks = %s
"""
SET_LAYOUT = """
UPDATE flash_celery_marks SET layout = %s, fence = %s
WHERE handler = %s AND source = %s AND lane = -1
"""
FORGET = "DELETE FROM flash_celery_marks WHERE handler = %s AND source = %s AND lane >= 0"
