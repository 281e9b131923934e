"""`once=`: marks in one transaction with what a handler writes, by each kind of connection."""

import os
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace

import psycopg
import pytest
import sqlalchemy
from django.core.management import call_command
from django.db import connections

from example_project.servers import wait_until
from flash_celery import Changes, Insert, on_change, on_message
from flash_celery.changes.change import LogicalMessage
from flash_celery.changes.history import Ancestor, History
from flash_celery.changes.operations import Part
from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.commands import once_checks
from flash_celery.errors import SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.lanes import marks, marks_table
from flash_celery.lanes.calls import HandlerCalls, traced
from flash_celery.lanes.drain import Blocked, Head, Later
from flash_celery.messages.lane_entries import encode_form
from flash_celery.protocol.lsn import Lsn
from tests.django.conftest import use

KINDS = ("django", "psycopg", "function", "engine", "psycopg2", "sqlalchemy")
TABLE = Table("public", "orders", None, "d", ("id",), (Column("id", 23, "integer", True),))
ONE = History("7412345678901234567", 1)
TWO = History(ONE.system, 2, (Ancestor(1, Lsn(0x500)),))


def change(lsn, ordinal=0, history=ONE, part=Part.WHOLE, number=0, message=False, at=None):
    transaction = Transaction(Lsn(lsn), 1, lsn if at is None else at, history)
    origin = Origin(TABLE, transaction, ordinal, part, number)
    return LogicalMessage(b"", origin) if message else Insert([str(lsn).encode()], origin)


def ignore(change):
    """Do nothing."""


class World:
    """A handler with `once=`, which writes the positions that it handles into `effects`."""

    def __init__(self, app, database, kind):
        self.app = app
        self.database = database
        self.kind = kind
        driver = "psycopg2" if kind == "psycopg2" else "psycopg"
        self.engine = sqlalchemy.create_engine(
            f"postgresql+{driver}://postgres@127.0.0.1:{database.server.port}/{database.name}"
        )
        database.execute(marks_table.CREATE_TABLE, "CREATE TABLE effects (position text)")
        self.layout, self.lanes, self.former = "one", 4, ""
        self.fence = 0
        #: Whether a failure blocks its lane, instead of becoming a dead letter.
        self.blocking = False

    def once(self):
        @contextmanager
        def function():
            with psycopg.connect(self.database.dsn) as connection:
                yield connection

        return {
            "django": "default",
            "psycopg": lambda: psycopg.connect(self.database.dsn, autocommit=True),
            "function": function,
            "engine": self.engine,
            "psycopg2": self.engine,
            "sqlalchemy": self.engine.connect,
        }[self.kind]

    def write(self, handled):
        for one in handled if isinstance(handled, Changes) else [handled]:
            statement = f"INSERT INTO effects VALUES ('{one.commit_lsn}:{one.ordinal}')"
            if self.kind == "django":
                assert one.connection is connections["default"]
                assert one.connection.in_atomic_block
                with one.connection.cursor() as cursor:
                    cursor.execute(statement)
            elif self.kind in ("engine", "psycopg2", "sqlalchemy"):
                one.connection.execute(sqlalchemy.text(statement))
            else:
                one.connection.execute(statement)

    def declare(self, function=None, batch=None, messages=False, **options):
        def handler(self_, handled):
            self.write(handled)
            return (function or (lambda task, handled: None))(self_, handled)

        task = self.app.task(bind=True, name="handler", **options)(handler)
        on_change("orders", ordered=True, once=self.once(), batch=batch)(task)
        if messages:
            on_message("orders")(task)
        self.app.finalize()
        subscriptions_of(self.app)
        return self

    def handle(self, *changes, lane=0, again=False):
        """Call the handler as a drain of another process would."""
        self.fence += 1
        handler = replace(traced(self.app, "handler", "w@host"), blocks=self.blocking)
        calls = HandlerCalls(self.app, handler, "1/slot", "w@host", os.getpid())
        calls.former = lambda: self.former
        form = encode_form("flash", {"task": "handler"}, {}, self.layout, self.lanes)
        calls.read_form(form)
        head = Head(list(changes), 0, 0, self.fence, None, again, lane)
        return calls.handle(head)

    @property
    def effects(self):
        return [text for (text,) in self.database.execute("SELECT position FROM effects")]

    def close(self):
        self.engine.dispose()
        if self.kind == "django":
            use(None)


@pytest.fixture
def make(new_app, configured, database):
    made = []

    def make(kind):
        app = new_app(broker_url="memory://", task_eager_propagates=False)
        if kind == "django":
            use(database)
        made.append(World(app, database, kind))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture(params=KINDS)
def world(request, make):
    return make(request.param)


@pytest.fixture
def psycopg_world(make):
    return make("psycopg")


def test_once_skips_what_was_handled(world):
    world.declare()
    for lsn, ordinal in [(0x100, 0), (0x100, 1), (0x200, 0)]:
        assert world.handle(change(lsn, ordinal)) is None
    for lsn, ordinal in [(0x100, 0), (0x100, 1), (0x200, 0), (0x200, 1)]:
        assert world.handle(change(lsn, ordinal)) is None
    assert world.effects == ["0/100:0", "0/100:1", "0/200:0", "0/200:1"]


def test_once_failure_rolls_back_effects_and_mark(world):
    fails = [True]

    def fail(task, handled):
        if fails:
            raise ValueError

    world.declare(fail)
    world.blocking = True
    assert isinstance(world.handle(change(0x100)), Blocked)
    assert world.effects == []
    fails.clear()
    world.handle(change(0x100))
    assert world.effects == ["0/100:0"]


@pytest.mark.parametrize("throw", [True, False])
def test_once_retry_rolls_back_effects_and_mark(world, throw):
    def retry(task, handled):
        if not again:
            task.retry(countdown=5, throw=throw)

    again = []
    world.declare(retry)
    assert world.handle(change(0x100)) == Later(5.0, 1)
    assert world.effects == []
    again.append(1)
    assert world.handle(change(0x100)) is None
    assert world.effects == ["0/100:0"]


def test_once_again_passes_by_the_mark(world):
    world.declare()
    world.handle(change(0x100))
    world.handle(change(0x200))
    world.handle(change(0x100), again=True)
    world.handle(change(0x200))
    assert world.effects == ["0/100:0", "0/200:0", "0/100:0"]


def test_once_gives_a_call_outside_lanes_its_transaction(world):
    """A dead letter that is retried, and a user's test."""
    world.declare()
    world.handle(change(0x200))
    world.app.tasks["handler"](change(0x100))
    world.app.tasks["handler"].apply([change(0x100)])
    assert world.effects == ["0/200:0", "0/100:0", "0/100:0"]


def test_once_mark_moves_past_a_dead_letter(world):
    """What comes again must not be handled beside the dead letter."""
    fails = [True]

    def fail(task, handled):
        if fails:
            raise ValueError

    world.declare(fail)
    assert world.handle(change(0x100)) is None
    fails.clear()
    assert world.handle(change(0x100)) is None
    assert world.effects == []
    world.app.tasks["handler"].apply([change(0x100)])
    assert world.effects == ["0/100:0"]


def test_once_plain_function_has_one_transaction_however_it_is_called(new_app, database):
    connections_of = []

    def connect():
        connections_of.append(psycopg.connect(database.dsn))
        return connections_of[-1]

    @on_change("orders", ordered=True, once=connect)
    def handler(change):
        return change.connection

    app = new_app(broker_url="memory://")
    app.finalize()
    assert handler(change(0x100)) is connections_of[0]
    (task,) = [task for task in app.tasks.values() if task.name.endswith(".handler")]
    assert task.apply([change(0x100)]).get() is connections_of[1]
    assert len(connections_of) == 2


def test_once_leaves_out_of_a_batch_what_was_handled(world):
    sizes = []
    world.declare(lambda task, handled: sizes.append(len(handled)), batch=10)
    world.handle(change(0x100), change(0x200))
    world.handle(change(0x100), change(0x200), change(0x200, 1), change(0x300))
    world.handle(change(0x200, 1), change(0x300))
    world.handle(change(0x300), change(0x400), change(0x400))
    assert sizes == [2, 2, 1]
    assert world.effects == ["0/100:0", "0/200:0", "0/200:1", "0/300:0", "0/400:0"]


def test_once_log_says_that_a_lane_waits_for_its_mark(psycopg_world, caplog, monkeypatch):
    """Another process stands still in a call, whose transaction is open."""
    monkeypatch.setattr(marks, "_locked", marks._Locked(0.05))
    world = psycopg_world.declare()
    world.handle(change(0x100))
    caplog.clear()
    frozen = psycopg.connect(world.database.dsn)
    frozen.execute("UPDATE flash_celery_marks SET commit_lsn = '0/200'")
    waiting = threading.Thread(target=world.handle, args=[change(0x200)], daemon=True)
    waiting.start()

    def twice():
        return caplog.text.count("lane 0 has waited for its mark") >= 2

    wait_until(twice, "two warnings", timeout=20)
    frozen.close()
    waiting.join(20)
    assert world.effects == ["0/100:0", "0/200:0"]


def test_once_each_lane_has_a_mark_of_its_own(psycopg_world):
    world = psycopg_world.declare()
    world.handle(change(0x200), lane=1)
    world.handle(change(0x100), lane=2)
    world.handle(change(0x200), lane=1)
    assert world.effects == ["0/200:0", "0/100:0"]


def test_once_tells_stacked_handlers_halves_and_messages_apart(psycopg_world):
    """In the order in which lanes deliver them; none is taken for another."""
    world = psycopg_world.declare(messages=True)
    delivered = [
        change(0x100, 0, message=True, number=2),
        change(0x100, 0, number=0),
        change(0x100, 0, number=1),
        change(0x100, 1, part=Part(1)),
        change(0x100, 1, part=Part(2)),
        change(0x100, 1, message=True, number=2),
        change(0x100, 2, number=3),
        change(0x200, 0, message=True, number=2),
        change(0x200, 0),
    ]
    for each in delivered:
        world.handle(each)
    assert len(world.effects) == len(delivered)
    for each in delivered:
        world.handle(each)
    assert len(world.effects) == len(delivered)


def test_once_goes_back_with_a_restored_database(psycopg_world):
    world = psycopg_world.declare()
    world.handle(change(0x100))
    backup = world.database.execute("SELECT * FROM flash_celery_marks")
    world.handle(change(0x200))
    world.database.execute(
        "TRUNCATE flash_celery_marks", "DELETE FROM effects WHERE position > '0/1'"
    )
    with world.database.connect() as connection:
        for row in backup:
            values = ", ".join(["%s"] * len(row))
            connection.execute(f"INSERT INTO flash_celery_marks VALUES ({values})", row)
    world.handle(change(0x100))
    world.handle(change(0x200))
    assert world.effects == ["0/200:0"]


def test_once_marks_count_after_a_failover_up_to_where_the_timeline_ends(psycopg_world, caplog):
    world = psycopg_world.declare()
    world.handle(change(0x300))
    world.handle(change(0x300, history=TWO))  # the slot begins before the switch
    world.handle(change(0x400, history=TWO))
    world.handle(change(0x400))  # an old message
    world.handle(change(0x600, history=TWO))
    world.handle(change(0x400))
    assert world.effects == ["0/300:0", "0/400:0", "0/600:0"]
    assert "dropped" not in caplog.text


def test_once_mark_of_a_transaction_that_a_failover_lost_is_dropped(psycopg_world, caplog):
    world = psycopg_world.declare()
    world.handle(change(0x700))
    world.handle(change(0x400, history=TWO))  # handled before 0/700, on the old server
    world.handle(change(0x500, history=TWO))
    assert "The mark at 0/700" in caplog.text
    world.handle(change(0x500, history=TWO))
    assert world.effects == ["0/700:0", "0/500:0"]


def test_once_marks_of_another_server_are_dropped(psycopg_world, caplog):
    world = psycopg_world.declare()
    world.handle(change(0x700))
    world.handle(change(0x100, history=History("5", 1)))
    assert world.effects == ["0/700:0", "0/100:0"]
    assert "The mark at 0/700" in caplog.text


def test_once_handles_what_a_restored_source_writes_at_the_same_positions(psycopg_world, caplog):
    world = psycopg_world.declare()
    world.handle(change(0x100))
    world.handle(change(0x700))
    world.handle(change(0x100))  # it comes again
    world.handle(change(0x200, at=0x800))
    world.handle(change(0x200, at=0x800))
    world.handle(change(0x700, at=0x900))
    world.handle(change(0x700, at=0x900))
    assert world.effects == ["0/100:0", "0/700:0", "0/200:0", "0/700:0"]
    assert "The mark at 0/700" in caplog.text


def test_once_recognises_commits_whose_times_are_not_in_order(psycopg_world):
    """A server takes the time of a commit before it writes the commit."""
    world = psycopg_world.declare()
    commits = [change(0x100, at=50), change(0x200, at=90), change(0x300, at=70)]
    for each in commits * 2:
        world.handle(each)
    world.layout, world.former = "two", "one"
    for each in commits:
        world.handle(each, lane=3)
    assert world.effects == ["0/100:0", "0/200:0", "0/300:0"]


def test_once_keeps_a_floor_when_lanes_or_key_change(psycopg_world):
    world = psycopg_world.declare()
    world.handle(change(0x100), lane=0)
    world.handle(change(0x300), lane=3)
    world.layout, world.lanes, world.former = "two", 8, "one"
    world.handle(change(0x300), lane=5)
    world.handle(change(0x200), lane=6)
    world.handle(change(0x400), lane=6)
    world.handle(change(0x400), lane=6)
    assert world.effects == ["0/100:0", "0/300:0", "0/400:0"]


def test_once_floor_is_the_least_mark_if_the_broker_may_have_lost_lanes(psycopg_world):
    world = psycopg_world
    world.lanes = 2
    world.declare()
    world.handle(change(0x100), lane=0)
    world.handle(change(0x300), lane=1)
    world.layout, world.lanes = "two", 8
    world.handle(change(0x100), lane=5)
    world.handle(change(0x200), lane=6)
    assert world.effects == ["0/100:0", "0/300:0", "0/200:0"]


def test_once_has_no_floor_if_a_lane_may_have_lost_its_first_change(psycopg_world):
    world = psycopg_world.declare()
    world.handle(change(0x300), lane=1)
    world.layout, world.lanes = "two", 8
    world.handle(change(0x200), lane=5)
    assert world.effects == ["0/300:0", "0/200:0"]


def test_once_call_of_an_earlier_layout_waits(psycopg_world):
    world = psycopg_world.declare()
    world.handle(change(0x100))
    world.layout, world.former = "two", "one"
    world.handle(change(0x200))
    world.layout, world.fence = "one", 0
    assert isinstance(world.handle(change(0x300)), Later)
    assert world.effects == ["0/100:0", "0/200:0"]


def test_once_of_two_holders_of_a_lane_one_handles_a_change(psycopg_world):
    began, goes_on = threading.Event(), threading.Event()

    def wait(task, handled):
        began.set()
        assert goes_on.wait(30)

    world = psycopg_world.declare(wait)
    goes_on.set()
    world.handle(change(0x100))
    began.clear()
    goes_on.clear()
    frozen = threading.Thread(target=world.handle, args=[change(0x200)])
    frozen.start()
    assert began.wait(30)
    successor = threading.Thread(target=world.handle, args=[change(0x200)])
    successor.start()
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    while not world.database.one(waits):
        pass
    goes_on.set()
    frozen.join(30)
    successor.join(30)
    assert world.effects == ["0/100:0", "0/200:0"]


def test_once_change_of_an_older_message_becomes_a_dead_letter(psycopg_world):
    world = psycopg_world.declare()
    for head in [{"lane": None}, {"lane": 0, "history": None}]:
        history = head.pop("history", ONE)
        world.handle(change(0x100, history=history), **head)
    assert world.effects == []


def test_once_asks_the_mark_if_a_commit_has_no_answer(make):
    world = make("function")
    lost = [True]

    @contextmanager
    def loses_the_answer():
        with psycopg.connect(world.database.dsn) as connection:
            yield connection
        if lost:
            raise psycopg.OperationalError(lost.pop())

    world.once = lambda: loses_the_answer
    world.declare(autoretry_for=(Exception,))
    assert world.handle(change(0x100)) == Later(5.0, 0)
    assert world.handle(change(0x100)) is None
    assert world.effects == ["0/100:0"]


def test_once_deferred_constraint_fails_the_handler(psycopg_world):
    world = psycopg_world.declare()
    world.database.execute(
        "ALTER TABLE effects ADD UNIQUE (position) DEFERRABLE INITIALLY DEFERRED",
        "INSERT INTO effects VALUES ('0/100:0')",
    )
    world.blocking = True
    assert isinstance(world.handle(change(0x100)), Blocked)
    assert world.effects == ["0/100:0"]


def test_once_waits_while_its_database_is_down(world, caplog):
    world.declare(autoretry_for=(Exception,))
    world.handle(change(0x100))
    name = world.database.name
    with psycopg.connect(world.database.server.dsn(), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        try:
            for _ in range(2):  # the first finds out that its connection is dead
                assert world.handle(change(0x200)) == Later(5.0, 0)
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert "its database of once= fails (OperationalError: " in caplog.text
    assert world.handle(change(0x200)) is None
    assert world.effects == ["0/100:0", "0/200:0"]


def test_once_waits_for_its_table(world, caplog):
    world.declare(autoretry_for=(Exception,))
    world.database.execute("DROP TABLE flash_celery_marks")
    assert world.handle(change(0x100)) == Later(5.0, 0)
    assert "run what `flash doctor --sql` prints" in caplog.text
    assert world.effects == []
    world.database.execute(marks_table.CREATE_TABLE)
    assert world.handle(change(0x100)) is None
    assert world.effects == ["0/100:0"]


def test_once_refuses_a_context_manager_that_hides_an_error(make):
    world = make("psycopg")

    @contextmanager
    def hides():
        with psycopg.connect(world.database.dsn) as connection, suppress(ValueError):
            yield connection

    def fail(task, handled):
        raise ValueError

    world.once = lambda: hides
    world.declare(fail)
    result = world.app.tasks["handler"].apply([change(0x100)])
    assert "rolled back without an error" in str(result.result)


def test_once_refuses_a_connection_in_a_transaction(make):
    world = make("psycopg")

    @contextmanager
    def begun():
        with psycopg.connect(world.database.dsn) as connection:
            connection.execute("SELECT 1")
            yield connection

    world.once = lambda: begun
    world.declare()
    result = world.app.tasks["handler"].apply([change(0x100)])
    assert "in a transaction already" in str(result.result)


@pytest.mark.parametrize("kind", ["engine", "psycopg2", "sqlalchemy"])
def test_once_refuses_a_connection_that_commits_each_statement(make, caplog, kind):
    """The mark would be moved although the handler fails, and the change would be lost."""
    world = make(kind)
    world.engine = world.engine.execution_options(isolation_level="AUTOCOMMIT")

    def fail(task, handled):
        raise ValueError

    world.declare(fail, autoretry_for=(Exception,))
    for _ in range(2):
        assert world.handle(change(0x100)) == Later(5.0, 0)
    assert "the isolation level AUTOCOMMIT" in caplog.text
    assert world.effects == []


@pytest.mark.parametrize(
    ("once", "said"),
    [
        (3, "not 3"),
        ("", "is not among"),
        ("defualt", "did you mean default"),
        (sqlalchemy.create_engine("sqlite://"), "is for sqlite"),
        (psycopg, "not a module"),
    ],
)
def test_once_that_is_no_database_is_refused(new_app, configured, database, once, said):
    use(database)
    try:
        app = new_app(broker_url="memory://")
        task = app.task(name="handler")(ignore)
        on_change("orders", ordered=True, once=once)(task)
        with pytest.raises(SubscriptionError, match=said):
            subscriptions_of(app)
    finally:
        use(None)


def test_once_refuses_a_database_in_which_django_commits_nothing(new_app, configured, database):
    use(database, AUTOCOMMIT=False)
    try:
        app = new_app(broker_url="memory://")
        on_change("orders", ordered=True, once="default")(app.task(name="handler")(ignore))
        with pytest.raises(SubscriptionError, match="AUTOCOMMIT = False"):
            subscriptions_of(app)
    finally:
        use(None)


@pytest.mark.parametrize(
    ("decorators", "said"),
    [
        ([{"once": "x"}], "once= without ordered="),
        ([{"once": "x", "ordered": True}, {"ordered": True}], "the same once="),
    ],
)
def test_once_needs_ordered_and_one_database(new_app, decorators, said):
    app = new_app(broker_url="memory://")
    task = app.task(name="handler")(ignore)
    for number, options in enumerate(decorators):
        on_change(f"orders{number}", **options)(task)
    with pytest.raises(SubscriptionError, match=said):
        subscriptions_of(app)


def test_once_app_creates_the_table(migrated, capsys):
    exists = "SELECT to_regclass('flash_celery_marks') IS NOT NULL"
    call_command("sqlmigrate", "flash_celery_once", "0001")
    assert marks_table.CREATE_TABLE in capsys.readouterr().out
    call_command("migrate", "flash_celery_once", verbosity=0)
    assert migrated.one(exists)
    call_command("migrate", "flash_celery_once", "zero", verbosity=0)
    assert not migrated.one(exists)


def test_once_app_leaves_other_databases_alone(configured):
    settings = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    connections.databases["other"] = connections.configure_settings({"default": settings})[
        "default"
    ]
    try:
        call_command("migrate", "flash_celery_once", database="other", verbosity=0)
        assert "flash_celery_marks" not in connections["other"].introspection.table_names()
    finally:
        connections["other"].close()
        del connections.databases["other"]


def test_once_checks_name_what_is_missing(new_app, database):
    def texts():
        return [(each.level, each.message) for each in once_checks.findings(declared)]

    app = new_app(broker_url="memory://")
    role = f"worker_{database.name}"
    database.execute(f"CREATE ROLE {role} LOGIN", "CREATE TABLE effects ()")
    try:
        dsn = database.dsn.replace("postgres@", f"{role}@")
        task = app.task(name="handler")(ignore)
        on_change("orders", ordered=True, once=lambda: psycopg.connect(dsn))(task)
        declared = subscriptions_of(app)
        ((level, said),) = texts()
        assert (level, "has no table flash_celery_marks" in said) == ("warning", True)
        with database.connect() as connection:
            lines = list(once_checks.script(declared, connection))
        assert lines[0] == f"-- For once= of handler, in {database.name}:"
        create, grant = "\n".join(lines[1:]).rstrip(";").split(";\n")
        database.execute(create)
        ((level, said),) = texts()
        assert (level, said) == (
            "warning",
            f"handler: the role {role} may not write flash_celery_marks: {grant};",
        )
        database.execute(grant)
        assert texts() == [("ok", f"handler: flash_celery_marks in {database.name}")]
        with database.connect() as connection:
            assert list(once_checks.script(declared, connection)) == []
    finally:
        database.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_once_checks_show_no_secret_of_a_database_that_is_down(new_app):
    def down():
        raise RuntimeError("password=secret")

    app = new_app(broker_url="memory://")
    on_change("orders", ordered=True, once=down)(app.task(name="handler")(ignore))
    (found,) = once_checks.findings(subscriptions_of(app))
    assert "cannot be looked at from here (RuntimeError)" in found.message
    assert "secret" not in found.message


def test_once_table_cannot_have_a_handler(new_app):
    """Each call of a handler with `once=` writes there, so its own changes would never end."""
    app = new_app(broker_url="memory://")
    on_change("flash_celery_marks")(app.task(name="handler")(ignore))
    with pytest.raises(SubscriptionError, match="flash_celery_marks cannot have a handler"):
        subscriptions_of(app)
