"""An application that does everything a database lets it do, at random."""

import random
import threading

import psycopg

SCHEMA = (
    "CREATE TABLE items (id bigint PRIMARY KEY, n int, note text)",
    "CREATE TABLE orders (id bigint PRIMARY KEY, n int, note text)",
    "CREATE TABLE probes (id bigint PRIMARY KEY)",
    "CREATE SEQUENCE keys",
)
#: Changes that may wait for a handler before the writers slow down.
_BEHIND = 3000
_LARGEST = 4000


class Writer(threading.Thread):
    """One connection, and one transaction after another."""

    def __init__(self, dsn, ledger, seed):
        super().__init__(daemon=True)
        self._dsn = dsn
        self._ledger = ledger
        self._random = random.Random(seed)
        self._ending = threading.Event()
        self._actions = {
            self.insert: 30,
            self.update: 30,
            self.delete: 15,
            self.change_keys: 6,
            self.roll_back_to_a_savepoint: 6,
            self.roll_back: 3,
            self.take_long: 2,
            self.write_much: 0.3,
            self.truncate: 0.1,
        }

    def run(self):
        while not self._ending.is_set():
            try:
                with psycopg.connect(self._dsn, connect_timeout=5) as connection:
                    while not self._ending.is_set():
                        self._transaction(connection)
            except psycopg.Error:
                self._ending.wait(0.2)  # the server is away, or it was a deadlock

    def end(self):
        self._ending.set()
        self.join(60)

    def _transaction(self, connection):
        choose = self._random
        actions, weights = zip(*self._actions.items(), strict=True)
        for action in choose.choices(actions, weights, k=choose.choice([1, 1, 1, 2, 4])):
            action(connection)
        connection.commit()
        self._ending.wait(choose.random() * 0.15)
        while self._ledger.behind > _BEHIND and not self._ending.is_set():
            self._ending.wait(0.5)

    def _table(self):
        return self._random.choice(["items", "items", "orders"])

    def _some(self, table):
        """A condition on a few of the rows."""
        first, count = self._random.random(), self._random.choice([1, 1, 2, 5, 20])
        return (
            f"id IN (SELECT id FROM {table} WHERE id >= (SELECT {first} * max(id) FROM {table}) "
            f"ORDER BY id LIMIT {count})"
        )

    def _note(self):
        """A text that is now and then too large for the page of its row."""
        size = self._random.choice(
            [0, 10, 10, 50, 50, 200] + [3000] * (self._random.random() < 0.1)
        )
        return self._random.randbytes(size).hex()

    def insert(self, connection):
        rows = self._random.choice([1, 1, 1, 3, 10])
        connection.execute(
            f"INSERT INTO {self._table()} SELECT nextval('keys'), n, %s "
            f"FROM generate_series(1, {rows}) AS n",
            [self._note()],
        )

    def update(self, connection):
        table = self._table()
        note = self._random.choice(["note", "note", "%(note)s"])
        connection.execute(
            f"UPDATE {table} SET n = n + 1, note = {note} WHERE {self._some(table)}",
            {"note": self._note()},
        )

    def delete(self, connection):
        table = self._table()
        connection.execute(f"DELETE FROM {table} WHERE {self._some(table)}")

    def change_keys(self, connection):
        table = self._table()
        connection.execute(f"UPDATE {table} SET id = nextval('keys') WHERE {self._some(table)}")

    def roll_back_to_a_savepoint(self, connection):
        connection.execute("SAVEPOINT s")
        self.insert(connection)
        self.update(connection)
        connection.execute("ROLLBACK TO SAVEPOINT s")
        connection.execute("SAVEPOINT t")
        self.insert(connection)
        connection.execute("RELEASE SAVEPOINT t")

    def roll_back(self, connection):
        self.delete(connection)
        self.insert(connection)
        connection.rollback()

    def take_long(self, connection):
        self.insert(connection)
        self._ending.wait(self._random.uniform(0.2, 2))
        self.update(connection)

    def write_much(self, connection):
        rows = self._random.randrange(500, _LARGEST)
        connection.execute(
            "INSERT INTO orders SELECT nextval('keys'), n, md5(n::text) "
            f"FROM generate_series(1, {rows}) AS n"
        )
        # … and the table stays small.
        connection.execute(
            f"DELETE FROM orders WHERE id IN (SELECT id FROM orders ORDER BY id LIMIT {rows})"
        )

    def truncate(self, connection):
        connection.execute(f"TRUNCATE {self._random.choice(['items', 'orders', 'items, orders'])}")
