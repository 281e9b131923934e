"""Capture messages of pgoutput from a real server: `python tests/golden/capture.py BIN…`.

Each BIN is the folder of a version's `postgres`; the result is `pg<major>.jsonl` beside this file.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import psycopg

from example_project.servers import Postgres

HERE = Path(__file__).parent
#: Different messages that are kept of each type.
KEPT = 4

SCENARIO = """
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TABLE items (id int PRIMARY KEY, name text, total numeric(10, 2), feeling mood, n positive);
CREATE TABLE whole (id int, note text); ALTER TABLE whole REPLICA IDENTITY FULL;
CREATE TABLE indexed (id int NOT NULL, note text); CREATE UNIQUE INDEX by_id ON indexed (id);
ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_id;
CREATE TABLE toasted (id int PRIMARY KEY, small int, big text);
ALTER TABLE toasted ALTER big SET STORAGE EXTERNAL;
CREATE SCHEMA "Odd ""one"; CREATE TABLE "Odd ""one"."Täble .'" ("Ein Näme" int PRIMARY KEY);
CREATE PUBLICATION everything FOR ALL TABLES;
SELECT pg_replication_origin_create('elsewhere');
--
SELECT pg_create_logical_replication_slot('golden', 'pgoutput');
--
INSERT INTO items VALUES (1, 'é', 1.50, 'happy', 7), (2, NULL, 'NaN', NULL, NULL);
--
UPDATE items SET name = '' WHERE id = 1;
--
UPDATE items SET id = 3 WHERE id = 1;
--
DELETE FROM items;
--
INSERT INTO whole VALUES (1, NULL); UPDATE whole SET note = 'x'; DELETE FROM whole;
--
INSERT INTO indexed VALUES (1, 'x'); UPDATE indexed SET id = 2; DELETE FROM indexed;
--
INSERT INTO toasted SELECT 1, 1, string_agg(md5(n::text), '') FROM generate_series(1, 100) AS n;
--
UPDATE toasted SET small = 2;
--
INSERT INTO "Odd ""one"."Täble .'" VALUES (1);
--
TRUNCATE items, whole RESTART IDENTITY CASCADE;
--
SELECT pg_logical_emit_message(true, 'greeting', 'hello');
SELECT pg_logical_emit_message(false, 'aside', '');
--
SELECT pg_replication_origin_session_setup('elsewhere');
SELECT pg_replication_origin_xact_setup('0/1234', '2026-01-01');
INSERT INTO items VALUES (5, 'from elsewhere', 1, 'sad', 1);
--
SELECT pg_replication_origin_session_reset();
--
BEGIN;
INSERT INTO items SELECT n, repeat('x', 100), n, 'sad', n FROM generate_series(10, 1000) AS n;
SAVEPOINT one;
INSERT INTO whole SELECT n, repeat('y', 100) FROM generate_series(10, 1000) AS n;
ROLLBACK TO one;
UPDATE items SET name = repeat('z', 200);
SELECT pg_logical_emit_message(true, 'inside', 'a stream');
TRUNCATE indexed;
COMMIT;
--
BEGIN;
INSERT INTO items SELECT n, repeat('x', 100), n, 'sad', n FROM generate_series(2000, 3000) AS n;
ROLLBACK;
"""


def capture(binaries):
    os.environ["FLASH_PG_BIN"] = binaries
    with (
        Postgres(logical_decoding_work_mem="64kB") as server,
        psycopg.connect(server.dsn(), autocommit=True) as connection,
    ):
        for statements in SCENARIO.split("--\n"):
            connection.execute(statements)
        rows = []
        for streaming in ("off", "on"):
            rows += connection.execute(
                "SELECT data FROM pg_logical_slot_peek_binary_changes('golden', NULL, NULL, "
                "'proto_version', '2', 'publication_names', 'everything', 'messages', 'true', "
                f"'streaming', '{streaming}')"
            ).fetchall()
        return connection.info.server_version // 10000, [bytes(data) for (data,) in rows]


def chosen(rows):
    """A few of each kind: by tag, whether it is within a stream, and the shape of the row."""
    counts = {}
    within = False
    for data in rows:
        tag = chr(data[0])
        within = (within or tag == "S") and tag != "E"
        streamed = within and tag in "IUDTRYM"
        start = 9 if streamed else 5
        kind = tag, streamed, data[start : start + 1] if tag in "UD" else len(data) % 7
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= KEPT and len(data) < 5000:
            yield {"tag": tag, "streamed": streamed, "data": data.hex()}


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        version, captured = capture(folder)
        lines = [json.dumps(line) for line in chosen(captured)]
        (HERE / f"pg{version}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"PostgreSQL {version}: {len(lines)} messages")
