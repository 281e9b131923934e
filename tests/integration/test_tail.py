"""`flash tail` beside another one."""

import threading

from flash_celery.commands.tail import follow
from flash_celery.settings import Settings
from flash_celery.table_name import TableName
from flash_celery.worker.control import Control


class Tail(threading.Thread):
    """Follows a table until it has seen a change."""

    def __init__(self, dsn):
        super().__init__()
        self.settings = Settings(flash_dsn=dsn)
        self.ready, self.seen, self.error = threading.Event(), [], None

    def show(self, change):
        self.seen.append(change.new["id"])
        return False

    def run(self):
        try:
            follow(
                self.settings, [TableName("public", "items")], self.show, self.ready.set, Control()
            )
        except Exception as error:
            self.error = error
            self.ready.set()


def test_tail_works_twice_with_the_same_pid(database):
    database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    tails = [Tail(database.dsn), Tail(database.dsn)]
    for tail in tails:
        tail.start()
        assert tail.ready.wait(30)
    database.execute("INSERT INTO items VALUES (7)")
    for tail in tails:
        tail.join(30)
        assert tail.error is None
        assert tail.seen == [7]
    assert database.one("SELECT count(*) FROM pg_publication") == 0
