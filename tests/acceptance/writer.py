"""An application that writes while a test disturbs the replication worker."""

import itertools
import threading

import psycopg
import redis


class Writer:
    """An application that writes all the time, and whose statements must never fail or wait.

    `changes` are what it has committed, in order.
    """

    def __init__(self, database, tables=("items",), pause=0.02):
        self.database = database
        self.tables = tables
        self.pause = pause
        self.changes = []
        self.error = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exit_):
        self.stop()

    def stop(self):
        self._ending.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def _run(self):
        try:
            with self.database.connect() as connection:
                connection.execute("SET lock_timeout = '10s'")
                for number in itertools.count(1):
                    if self._ending.wait(self.pause):
                        break
                    self._write(connection, number)
        except psycopg.Error as error:
            self.error = error

    def _write(self, connection, number):
        for table in self.tables:
            written = [("insert", number), ("update", number)]
            statements = [
                f"INSERT INTO {table} VALUES ({number}, 'a')",
                f"UPDATE {table} SET name = 'b' WHERE id = {number}",
            ]
            if number % 5 == 0:
                written.append(("delete", number))
                statements.append(f"DELETE FROM {table} WHERE id = {number}")
            if number % 3 == 0:
                with connection.transaction():
                    for statement in statements:
                        connection.execute(statement)
            else:
                for statement in statements:
                    connection.execute(statement)
            if table == self.tables[0]:
                self.changes += written


def assert_writes_handled(shop, writer, handler="each", since=0):
    """Check that the changes since that index were handled, in order on each queue.

    A change that was handled again had the same ids.
    """
    expected = writer.changes[since:]
    # It ends before the limit of the test, and so with the logs.
    notes = shop.until_noted(len(expected), handler, timeout=150)
    handled = {}
    for note in notes:
        change = note["operation"], note["key"]["id"]
        assert handled.setdefault(change, (note["id"], note["task_id"])) == (
            note["id"],
            note["task_id"],
        )
    for queue in ({"insert", "update"}, {"delete"}):
        assert [change for change in handled if change[0] in queue] == [
            change for change in expected if change[0] in queue
        ]


def assert_writes_enqueued_once(shop, writer):
    """Check that no message is on Redis twice, at whichever step the process was killed."""
    if shop.broker.url.startswith("redis"):
        with redis.Redis.from_url(shop.broker.url) as client:
            assert client.llen("flash") + client.llen("cleanup") == len(writer.changes)
