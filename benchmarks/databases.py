"""Databases, and changes that wait in their slots, which can be drained repeatedly."""

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


#: Notifies `benchmarks.rivals.notify`.
TRIGGER = """
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('orders', json_build_object('operation', TG_OP, 'id', NEW.id)::text);
    RETURN NEW;
END $$;
CREATE TRIGGER tell AFTER INSERT OR UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION tell()"""


@dataclass(frozen=True)
class Workload:
    """Rows to write."""

    rows: int
    #: The number of rows of each transaction; 0 for one transaction.
    per: int = 0
    #: `insert`, or `update` of existing rows under REPLICA IDENTITY FULL.
    kind: str = "insert"
    #: The number of other tables, which stay empty.
    others: int = 0
    #: The handler for which the publications are created.
    handler: str = "batched"


class Database:
    """A database with the table `orders`."""

    def __init__(self, server, name, others=0):
        self.server = server
        self.name = name
        self.dsn = server.dsn(name)
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        self.execute(TABLE, FILL)
        self.execute(*(f"CREATE TABLE other_{n} (id int PRIMARY KEY)" for n in range(others)))

    def connect(self):
        """Return a connection that commits each statement."""
        return psycopg.connect(self.dsn, autocommit=True)

    def execute(self, *statements):
        """Run each statement in its own transaction; return the first row of the last."""
        with self.connect() as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchone() if statements and cursor.description else None

    def rows(self, query):
        """Return the rows of a query."""
        with self.connect() as connection:
            return connection.execute(query).fetchall()

    def fill(self, rows, per=0):
        """Insert rows, in transactions of `per` rows; 0 for one transaction."""
        with self.connect() as connection:
            connection.execute("SET synchronous_commit = off")
            connection.execute(f"CALL fill({rows}, {per or rows})")

    def end_of_wal(self):
        """Return the position up to which the WAL is on disk."""
        # A synchronous commit flushes the asynchronous ones before it, too.
        self.execute("SELECT pg_logical_emit_message(true, 'end', '')")
        return self.execute("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint")[0]

    def until_confirmed(self, slot, end, alive):
        """Wait until the slot has passed a position; return the time of that."""
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
        """Drop a slot once its reader has released it."""
        query = f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{slot}' AND active"
        wait_until(lambda: not self.execute(query), f"the slot {slot} to be free")
        self.execute(f"SELECT pg_drop_replication_slot('{slot}')")

    def drop(self):
        """Drop the database and its slots."""
        slots = f"FROM pg_replication_slots WHERE database = '{self.name}'"
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            wait_until(
                lambda: not connection.execute(f"SELECT 1 {slots} AND active").fetchall(),
                f"the slots of {self.name} to be free",
            )
            connection.execute(f"SELECT pg_drop_replication_slot(slot_name) {slots}")
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)")


class Source:
    """A database that `flash replicate` has set up, with its slot and a copy of the slot."""

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
        """Return the places of the rows since the last `mark`, and the end of the last commit."""
        return written(self.dsn, self.kept)

    def mark(self):
        """Start `written` here; everything so far must have been read."""
        self.database.drop_slot(self.kept)
        self._copy(self.slot, self.kept)

    def again(self):
        """Reset the slot of `flash replicate` to its beginning; return its name."""
        self.database.drop_slot(self.slot)
        self._copy(self.kept, self.slot)
        return self.slot

    def copy(self):
        """Return the name of a new copy of the slot."""
        name = f"{self.slot}_{next(self._copies)}"
        self._copy(self.kept, name)
        return name

    def _copy(self, slot, name):
        self.database.execute(f"SELECT pg_copy_logical_replication_slot('{slot}', '{name}')")


class Backlog(Source):
    """A workload that is written and waits in the slot."""

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
        database.end_of_wal()  # flushes the WAL, so that it is read from disk
        # The end is that of the last commit: the position above is confirmed only once the WAL of
        # other databases has been read, too.
        self.places, self.end = self.written()
        if len(self.places) != self.rows:
            raise Wrong(f"{len(self.places)} of {self.rows} rows are in the slot {self.slot}")
