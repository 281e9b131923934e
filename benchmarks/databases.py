"""Databases, and changes that wait in their slots to be drained as often as wanted."""

import itertools
import time
from dataclasses import dataclass

import psycopg

from benchmarks.project import Project
from benchmarks.verify import Wrong, written
from example_project.servers import wait_until

TABLE = """
CREATE TABLE orders (
    id bigserial PRIMARY KEY,
    customer_id bigint NOT NULL,
    status text NOT NULL,
    total numeric(12,2) NOT NULL,
    note text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
)"""

#: One row in a hundred is refunded.
INSERT = """
INSERT INTO orders (customer_id, status, total, note)
SELECT i % 1000,
       CASE WHEN i % 100 = 0 THEN 'refunded'
            ELSE (ARRAY['new', 'paid', 'sent', 'done'])[1 + i % 4] END,
       (i % 100000) / 100.0,
       'please leave it at the door, order ' || i
FROM generate_series({first}::int, {last}::int) AS i"""

FILL = f"""
CREATE PROCEDURE fill(rows int, per int) LANGUAGE plpgsql AS $$
BEGIN
    FOR n IN 0 .. (rows + per - 1) / per - 1 LOOP
        {INSERT.format(first="n * per + 1", last="least(rows, n * per + per)")};
        COMMIT;
    END LOOP;
END $$"""

UPDATE = "UPDATE orders SET status = 'archived', updated_at = now()"


#: Tells `benchmarks.rivals.notify`.
TRIGGER = """
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('orders', json_build_object('operation', TG_OP, 'id', NEW.id)::text);
    RETURN NEW;
END $$;
CREATE TRIGGER tell AFTER INSERT OR UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION tell()"""


@dataclass(frozen=True)
class Workload:
    """So many rows in transactions of so many (0: all in one)."""

    rows: int
    per: int = 0
    #: `insert`, or `update` of rows that are there, under REPLICA IDENTITY FULL.
    kind: str = "insert"
    #: Tables beside `orders`, which stay empty.
    others: int = 0
    #: The handler whose publications the slot is read with.
    handler: str = "batched"


class Database:
    """A database with the table."""

    def __init__(self, server, name, others=0):
        self.server = server
        self.name = name
        self.dsn = server.dsn(name)
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        self.execute(TABLE, FILL)
        self.execute(*(f"CREATE TABLE other_{n} (id int PRIMARY KEY)" for n in range(others)))

    def connect(self):
        """A connection that commits each statement."""
        return psycopg.connect(self.dsn, autocommit=True)

    def execute(self, *statements):
        """Run each in a transaction of its own; the first row of the last."""
        with self.connect() as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchone() if statements and cursor.description else None

    def fill(self, rows, per=0):
        """Insert rows, in transactions of so many."""
        with self.connect() as connection:
            connection.execute("SET synchronous_commit = off")
            connection.execute(f"CALL fill({rows}, {per or rows})")

    def end_of_wal(self):
        """The position up to which everything has been written."""
        # A commit that waits for the disk takes along those that did not.
        self.execute("SELECT pg_logical_emit_message(true, 'end', '')")
        return self.execute("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint")[0]

    def until_confirmed(self, slot, end, alive):
        """Wait until the slot has passed a position; when that was seen."""
        query = (
            "SELECT confirmed_flush_lsn >= '0/0'::pg_lsn + %s::numeric "
            "FROM pg_replication_slots WHERE slot_name = %s"
        )
        with self.connect() as connection:
            while not connection.execute(query, [end, slot], prepare=True).fetchone()[0]:
                alive()
                time.sleep(0.01)
        return time.time()

    def drop_slot(self, slot):
        """Drop it once its reader has let go."""
        query = f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{slot}' AND active"
        wait_until(lambda: not self.execute(query), f"the slot {slot} to be free")
        self.execute(f"SELECT pg_drop_replication_slot('{slot}')")

    def drop(self):
        """Drop it with its slots."""
        slots = f"FROM pg_replication_slots WHERE database = '{self.name}'"
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            wait_until(
                lambda: not connection.execute(f"SELECT 1 {slots} AND active").fetchall(),
                f"the slots of {self.name} to be free",
            )
            connection.execute(f"SELECT pg_drop_replication_slot(slot_name) {slots}")
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)")


class Source:
    """A database that `flash replicate` has set up; its slot waits, and so does a copy of it."""

    def __init__(self, database, broker, handler):
        self.database = database
        self.dsn = database.dsn
        self.slot = f"flash_{database.name}"
        self.kept = f"{self.slot}_kept"
        self._copies = itertools.count(1)
        with Project(self.dsn, broker, handler, self.slot) as project:
            project.set_up()
        self._copy(self.slot, self.kept)

    def written(self):
        """The places since the slot was made, or marked, and the last commit's end."""
        return written(self.dsn, self.kept)

    def mark(self):
        """From here on, once everything so far has been read."""
        self.database.drop_slot(self.kept)
        self._copy(self.slot, self.kept)

    def again(self):
        """The slot of `flash replicate`, as if nothing had been read from it."""
        self.database.drop_slot(self.slot)
        self._copy(self.kept, self.slot)
        return self.slot

    def copy(self):
        """An identical slot of another name."""
        name = f"{self.slot}_{next(self._copies)}"
        self._copy(self.kept, name)
        return name

    def _copy(self, slot, name):
        self.database.execute(f"SELECT pg_copy_logical_replication_slot('{slot}', '{name}')")


class Backlog(Source):
    """A workload that has been written and waits in the slot."""

    def __init__(self, database, broker, workload):
        self.workload = workload
        self.rows = workload.rows
        if workload.kind == "update":
            database.fill(workload.rows)
            database.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
        super().__init__(database, broker, workload.handler)
        if workload.kind == "update":
            database.execute(UPDATE)
        else:
            database.fill(workload.rows, workload.per)
        database.end_of_wal()  # which puts it on the disk, where it is read from
        # Not that position: it is confirmed, and `pg_recvlogical` done, once all the WAL of
        # others has been passed over too.
        self.places, self.end = self.written()
        if len(self.places) != self.rows:
            raise Wrong(f"{len(self.places)} of {self.rows} rows are in the slot {self.slot}")
