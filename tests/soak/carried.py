"""Tasks that transactions carry: an application that sends them, and the reckoning.

Each is sent beside a row of `sent`, in the same savepoint. So the rows that are there in the end
are the tasks that were committed. `python -m tests.soak.carried psycopg` is the application.
"""

import json
import os
import random
import sys
import time
import uuid
from collections import Counter, defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import psycopg
import sqlalchemy
from celery import group
from sqlalchemy.orm import Session

from flash_celery import transactional

#: The queue of the tasks that are read by a witness, and that of those that run; also their names.
QUEUE, RUN = "carried", "ran"
#: A rollback takes no place back, so the places tell how many tasks were sent.
SCHEMA = (
    "CREATE SEQUENCE places",
    "CREATE TABLE sent (task_id text PRIMARY KEY, place bigint, sender text, queue text, "
    "at float8 DEFAULT extract(epoch FROM clock_timestamp()))",
)
APPLICATION = "soak_application"
_INSERT = "INSERT INTO sent VALUES (%s, %s, %s, %s)"
_ROW = "INSERT INTO items VALUES (nextval('keys'), 0, 'beside a task')"


class Psycopg:
    """Transactions of psycopg.

    Args:
        dsn: The database.
    """

    errors = psycopg.Error

    def __init__(self, dsn):
        self._connection = psycopg.connect(dsn, connect_timeout=5, application_name=APPLICATION)

    def execute(self, statement, *parameters):
        """Return the first row, if there are any."""
        cursor = self._connection.execute(statement, parameters or None)
        return cursor.fetchone() if cursor.description else None

    @contextmanager
    def transaction(self, undone):
        """Begin a transaction, and roll it back in the end if it is to be undone."""
        yield self._connection
        self.end(undone)

    def end(self, undone):
        """End the transaction in a block; the next statement begins another."""
        self._connection.rollback() if undone else self._connection.commit()

    def savepoint(self, undone):
        """Begin a savepoint."""
        return self._connection.transaction(force_rollback=undone)


class Sqlalchemy:
    """Sessions of SQLAlchemy, over psycopg2.

    Args:
        dsn: The database.
    """

    errors = sqlalchemy.exc.SQLAlchemyError

    def __init__(self, dsn):
        self._engine = sqlalchemy.create_engine(
            dsn.replace("postgresql:", "postgresql+psycopg2:"),
            connect_args={"connect_timeout": 5, "application_name": APPLICATION},
        )
        self._session = Session(self._engine)

    def execute(self, statement, *parameters):
        """Return the first row, if there are any."""
        result = self._session.connection().exec_driver_sql(statement, parameters or None)
        return result.first() if result.returns_rows else None

    @contextmanager
    def transaction(self, undone):
        """Begin a transaction, and roll it back in the end if it is to be undone."""
        with Session(self._engine) as self._session:
            yield self._session
            self.end(undone)

    def end(self, undone):
        """End the transaction in a block; the next statement begins another."""
        self._session.rollback() if undone else self._session.commit()

    @contextmanager
    def savepoint(self, undone):
        """Begin a savepoint."""
        nested = self._session.begin_nested()
        yield
        nested.rollback() if undone else nested.commit()


DATABASES = {"psycopg": Psycopg, "sqlalchemy": Sqlalchemy}


class Sender:
    """One transaction after another, on one connection.

    Args:
        database: The connection.
        choose: A `Random`.
    """

    def __init__(self, database, choose):
        self._database = database
        self._choose = choose
        self._name = uuid.uuid4().hex

    def transact(self):
        """Send some tasks in a transaction, and commit it or roll it back."""
        choose, database = self._choose, self._database
        with database.transaction(undone=choose.random() < 0.2) as target, transactional(target):
            for _ in range(choose.choice([1, 1, 2, 4])):
                self._send_some()
                if choose.random() < 0.1:
                    database.end(undone=choose.random() < 0.5)

    def _send_some(self):
        choose, database = self._choose, self._database
        if choose.random() < 0.1:
            database.execute(_ROW)
        if choose.random() < 0.4:
            with database.savepoint(undone=choose.random() < 0.5):
                self._send()
                if choose.random() < 0.3:
                    with database.savepoint(undone=choose.random() < 0.5):
                        self._send()
        else:
            self._send()

    def _send(self):
        from tests.soak import project

        choose = self._choose
        queue = choose.choice([QUEUE, QUEUE, RUN])
        task = getattr(project, queue)
        places = [self._place() for _ in range(choose.choice([1, 1, 1, 3]))]
        # Now and then so large that PostgreSQL streams the transaction before its end.
        rest = "x" * choose.choice([0, 0, 100, 30_000 * (choose.random() < 0.1)])
        if len(places) > 1:
            results = group(task.s(place, rest) for place in places).apply_async().results
        elif choose.random() < 0.3:
            results = [task.app.send_task(task.name, (*places, rest))]
        else:
            results = [task.delay(*places, rest)]
        for place, result in zip(places, results, strict=True):
            self._database.execute(_INSERT, result.id, place, self._name, queue)

    def _place(self):
        return self._database.execute("SELECT nextval('places')")[0]


def main(kind):
    """Send tasks until the process is ended."""
    choose = random.Random()
    database = DATABASES[kind]
    while True:
        try:
            sender = Sender(database(os.environ["SOAK_DSN"]), choose)
            while True:
                sender.transact()
                time.sleep(choose.random() * 0.15)
        except database.errors:
            time.sleep(0.2)  # the server is away


class Sent(NamedTuple):
    """A task that was committed."""

    place: int
    sender: str
    queue: str
    at: float


class Carried:
    """What became of the tasks.

    Args:
        execute: Runs a statement in the database.
    """

    def __init__(self, execute):
        self._execute = execute
        #: What was committed, by task id.
        self.sent = {}
        #: What was met, in the order of the queue or of the notes: task id, place and time.
        self.seen = {QUEUE: [], RUN: []}
        self.latest = 0

    def enqueue(self, place, task_id, at):
        """The witness has found a task in the queue."""
        self.seen[QUEUE].append((task_id, place, at))
        self.latest = max(self.latest, place)

    def run(self, at, task_id, place):
        """A task has noted that it ran."""
        self.seen[RUN].append((task_id, place, at))

    def read(self):
        """Read what was committed."""
        rows = self._execute("SELECT task_id, place, sender, queue, at FROM sent")
        self.sent = {task_id: Sent(*rest) for task_id, *rest in rows}

    @property
    def undone(self):
        """How many tasks were sent in vain: rolled back, or with an application that died."""
        ((last,),) = self._execute("SELECT last_value FROM places")
        return last - len(self.sent)

    def missing(self, queue):
        """Committed, and never met."""
        met = {task_id for task_id, _, _ in self.seen[queue]}
        return {task_id for task_id, sent in self.sent.items() if sent.queue == queue} - met

    @property
    def strangers(self):
        """Met and never committed, or not as it was sent."""
        return {
            task_id
            for queue, met in self.seen.items()
            for task_id, place, _ in met
            if (known := self.sent.get(task_id)) is None
            or (place, queue) != (known.place, known.queue)
        }

    @property
    def misordered(self):
        """Enqueued before an earlier one of the same sender, at the first time."""
        latest, known, late = defaultdict(int), set(), set()
        for task_id, place, _ in self.seen[QUEUE]:
            if task_id in known or task_id not in self.sent:
                continue
            known.add(task_id)
            sender = self.sent[task_id].sender
            if place < latest[sender]:
                late.add(task_id)
            latest[sender] = max(latest[sender], place)
        return late

    def again(self, queue):
        """Yield each task that was met another time: its id, when it was committed, and when."""
        counts = Counter()
        for task_id, _, at in self.seen[queue]:
            counts[task_id] += 1
            if counts[task_id] > 1 and task_id in self.sent:
                yield task_id, self.sent[task_id].at, at

    def unexplained(self, queue, intervals):
        """Met another time though no fault struck between its commit and then, as in `again`."""
        return {
            (task_id, since, until)
            for task_id, since, until in self.again(queue)
            if not any(begin <= until and end >= since for begin, end in intervals)
        }


def argument(body):
    """Return the first argument of a task, in a list: what the witness reads of a message."""
    return json.loads(body)[0][:1]


if __name__ == "__main__":
    main(*sys.argv[1:])
