"""`transactional` in Django: atomic(), savepoints, ATOMIC_REQUESTS, several databases, TestCase."""

# Which block an exception leaves is the subject here.

import json
import unittest
from contextlib import nullcontext, suppress

import pytest
from celery import chain
from celery.contrib.django.task import DjangoTask
from celery.exceptions import Ignore, Retry
from django.conf import settings
from django.db import connections, transaction
from django.db.utils import DataError, IntegrityError
from django.http import HttpResponse
from django.test import Client, TestCase, TransactionTestCase, override_settings
from django.urls import path

from flash_celery import transactional
from flash_celery.commands.doctor import atomic_findings
from flash_celery.errors import ConfigurationError, TransactionError
from flash_celery.settings import Settings
from flash_celery.testing import Live, carried_tasks
from flash_celery.transactional_tasks import signing
from tests.django.conftest import use
from tests.docs.conftest import Page

ON_COMMIT = Page("howto/from-on-commit.md")
TRANSACTIONAL = Page("howto/transactional-tasks.md")
#: Django 6.1 has another name for it.
create_savepoint = getattr(transaction, "savepoint_create", None) or transaction.savepoint


@pytest.fixture
def shop(configured, database, new_app):
    """An app with a task; nothing reads the database."""
    use(database)
    app = new_app(broker_url="memory://", flash_dsn=database.dsn)
    app.set_default()

    @app.task(name="receipt", shared=False)
    def receipt(*args, **kwargs): ...

    app.receipt = receipt
    yield app
    use(None)


def args(tasks):
    return [tuple(task.args) for task in tasks]


def test_blocks_in_atomic_follow_their_savepoints(shop, flash):
    flash.app.set_default()
    flash.start()

    @flash.app.task(name="receipt", shared=False)
    def receipt(*args): ...

    with carried_tasks() as tasks:
        with transaction.atomic(), transactional():
            receipt.delay(1)
            with suppress(ZeroDivisionError), transaction.atomic():
                receipt.delay(2)
                raise ZeroDivisionError
            with transaction.atomic():
                receipt.delay(3)
            receipt.delay(4)
            assert args(tasks) == [(1,), (3,)]
        assert args(tasks) == [(1,), (3,), (4,)]
        with suppress(ZeroDivisionError), transaction.atomic():
            with transactional():
                receipt.delay(5)
            raise ZeroDivisionError
        with transaction.atomic():
            savepoint = create_savepoint()
            with transactional():
                receipt.delay(6)
                transaction.savepoint_rollback(savepoint)
                receipt.delay(7)
        with pytest.raises(TransactionError, match="nothing to join"), transactional():
            receipt.delay(8)
        with transactional(connections["default"], strict=False):
            receipt.delay(9)
        with suppress(ZeroDivisionError), transactional():
            with transaction.atomic():
                receipt.delay(10)
            with transaction.atomic():
                receipt.delay(11)
            with transaction.atomic():
                receipt.delay("undone")
                raise ZeroDivisionError
        with transaction.atomic(), transactional():
            receipt.delay(12)
            savepoint = create_savepoint()
            receipt.delay("undone")
            with suppress(DataError), connections["default"].cursor() as cursor:
                cursor.execute("SELECT 1 / 0")
            transaction.savepoint_rollback(savepoint)
    expected = [(1,), (3,), (4,), (7,), (9,), (10,), (11,), (12,)]
    assert args(tasks) == expected
    flash.do("SELECT 1")
    sent = flash.publisher.queues["celery"]
    assert [tuple(json.loads(message.body)[0]) for message in sent] == expected


def test_order_of_tasks_is_kept_across_savepoints_and_a_failed_statement(shop):
    with carried_tasks() as tasks, transaction.atomic(), transactional():
        for number in range(3):
            shop.receipt.delay(number)
            with suppress(Exception), transaction.atomic():
                shop.receipt.delay("gone")
                with connections["default"].cursor() as cursor:
                    cursor.execute("SELECT 1 / 0")
    assert args(tasks) == [(0,), (1,), (2,)]


def test_tasks_of_a_transaction_that_is_to_be_rolled_back_are_dropped(shop):
    with carried_tasks() as tasks:
        with transaction.atomic(), transactional():
            shop.receipt.delay("a dry run")
            transaction.set_rollback(True)
        with transaction.atomic(), transactional():
            shop.receipt.delay("with a statement that failed")
            with suppress(IntegrityError), transaction.atomic(savepoint=False):
                raise IntegrityError
        with transaction.atomic(durable=True), transactional():
            shop.receipt.delay(1)
    assert args(tasks) == [(1,)]


def test_transactions_without_autocommit_carry_tasks(shop):
    transaction.set_autocommit(False)
    with carried_tasks() as tasks, transactional():
        shop.receipt.delay("undone")
        transaction.rollback()
        shop.receipt.delay(1)
        transaction.commit()
    transaction.set_autocommit(True)
    assert args(tasks) == [(1,)]


@pytest.mark.parametrize("setting", [False, True], ids=["block", "setting"])
def test_atomic_requests_carry_the_tasks_of_a_view(shop, database, setting):
    use(database, ATOMIC_REQUESTS=True)

    def order(request):
        shop.receipt.delay(request.GET["n"])
        if request.GET["n"] == "2":
            raise IntegrityError
        return HttpResponse()

    @transaction.non_atomic_requests
    def outside(request):
        with pytest.raises(TransactionError, match="nothing to join"), transactional():
            shop.receipt.delay("outside")
        return HttpResponse()

    if setting:
        shop.conf.flash_transactional_database = "default"
    view = order if setting else transactional()(order)
    urls = path("order", view), path("outside", outside)
    client = Client(raise_request_exception=False)
    with override_settings(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"]), carried_tasks() as tasks:
        assert client.get("/order?n=1").status_code == 200
        assert client.get("/order?n=2").status_code == 500
        assert client.get("/outside").status_code == 200
    assert args(tasks) == [("1",)]


def test_setting_makes_every_task_in_atomic_transactional(shop):
    shop.conf.update(flash_transactional_database="default", task_default_queue="outside")
    receipt = shop.receipt
    with carried_tasks() as tasks, transaction.atomic():
        receipt.delay(1)
        with suppress(ZeroDivisionError), transaction.atomic():
            receipt.delay(2)
            raise ZeroDivisionError
        transaction.on_commit(lambda: receipt.delay("after the commit"))
        with transactional():
            receipt.delay(3)
        receipt.delay(4)
    receipt.delay("outside")
    assert args(tasks) == [(1,), (3,), (4,)]
    with shop.connection_for_write() as connection:
        take = connection.default_channel.basic_get
        bodies = [json.loads(take("outside", no_ack=True).body)[0] for _ in range(2)]
        assert take("outside") is None
    assert bodies == [["after the commit"], ["outside"]]


def test_doctor_says_if_the_setting_has_no_effect(shop):
    def found(alias):
        (finding,) = atomic_findings(Settings(flash_transactional_database=alias))
        return finding.level, finding.message.removeprefix("flash_transactional_database has no ")

    assert list(atomic_findings(Settings())) == []
    assert found("default")[0] == "ok"
    assert found("third") == ("warning", "effect: DATABASES has no 'third'")
    without = [name for name in settings.INSTALLED_APPS if name != "flash_celery.django"]
    with override_settings(INSTALLED_APPS=without):
        assert found("default") == (
            "warning",
            "effect: add flash_celery.django to INSTALLED_APPS",
        )


@pytest.mark.parametrize("setting", [False, True], ids=["block", "setting"])
def test_what_celery_sends_for_a_running_task_goes_past_atomic(shop, valkey, setting):
    """A retry that is rolled back with the transaction of its task would be lost."""
    shop.conf.update(
        flash_transactional_database="default" if setting else "",
        result_backend=f"redis://127.0.0.1:{valkey.port}/5",
        task_default_queue="past",
    )
    receipt = shop.receipt

    def act(action):
        with transaction.atomic(), nullcontext() if setting else transactional():
            receipt.delay("undone")
            action()
            raise ZeroDivisionError

    @shop.task(name="retries", bind=True, shared=False)
    def retries(self):
        act(lambda: self.retry(countdown=0))

    @shop.task(name="replaces", bind=True, shared=False)
    def replaces(self):
        act(lambda: self.replace(receipt.si("replaced")))

    @shop.task(name="adds", bind=True, shared=False)
    def adds(self):
        act(lambda: self.add_to_chord(receipt.si("added")))

    with carried_tasks() as tasks:
        for task in (retries, replaces, adds):
            task.push_request(
                id=task.name, group="a group", chord=receipt.s(), called_directly=False
            )
            try:
                with pytest.raises((Retry, Ignore, ZeroDivisionError)):
                    task.run()
            finally:
                task.pop_request()
    assert args(tasks) == []
    with shop.connection_for_write() as connection:
        take = connection.default_channel.basic_get
        sent = [take("past", no_ack=True) for _ in range(3)]
        assert take("past") is None
    assert [message.headers["id"] for message in sent[:2]] == ["retries", "replaces"]
    assert [json.loads(message.body)[0] for message in sent[1:]] == [["replaced"], ["added"]]


def test_message_goes_into_the_database_that_is_named(shop, new_database):
    other = new_database()
    settings = {**connections.databases["default"], "NAME": other.name}
    connections.databases["ledger"] = connections.configure_settings(
        {"default": {}, "ledger": settings}
    )["ledger"]
    written = []
    try:
        with carried_tasks() as tasks, suppress(ZeroDivisionError), transaction.atomic("ledger"):
            with transaction.atomic(), transactional(using="default"):
                shop.receipt.delay("default")
            with transactional(using="ledger"):
                shop.receipt.delay("other")
                written = args(tasks)
            raise ZeroDivisionError
        assert (written, args(tasks)) == ([("default",)], [("default",)])
        with (
            pytest.raises(ConfigurationError, match="DATABASES has no 'third'"),
            transactional(using="third"),
        ):
            pass
    finally:
        connections["ledger"].close()
        del connections["ledger"]
        del connections.databases["ledger"]


def test_keys_are_those_of_django_unless_there_is_one(configured):
    with override_settings(SECRET_KEY="the new secret", SECRET_KEY_FALLBACKS=["the old secret"]):
        assert signing.keys_of(Settings()) == [
            signing._derived("the new secret"),
            signing._derived("the old secret"),
        ]
        given = Settings(flash_signing_key="a secret of its own")
        assert signing.keys_of(given) == [signing._derived("a secret of its own")]


def test_other_databases_are_refused(shop):
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    connections.databases["lite"] = connections.configure_settings({"default": {}, "lite": sqlite})[
        "lite"
    ]
    try:
        with (
            pytest.raises(ConfigurationError, match="is one of sqlite"),
            transactional(using="lite"),
        ):
            pass
    finally:
        del connections["lite"]
        del connections.databases["lite"]


def test_test_case_shows_what_would_be_enqueued(shop):
    seen = []

    class Orders(TestCase):
        databases = {"default"}

        def test_order(self):
            with carried_tasks() as tasks, transactional():
                shop.receipt.apply_async((1,), {"a": 2}, queue="mail")
            (task,) = tasks
            seen.append((task.name, task.args, task.kwargs, task.queue))
            assert task.id == task.headers["id"]

    result = unittest.TestResult()
    unittest.TestSuite([Orders("test_order")]).run(result)
    assert result.wasSuccessful(), result.errors + result.failures
    assert seen == [("receipt", [1], {"a": 2}, "mail")]


def test_test_case_needs_no_slot_where_the_tasks_are_looked_at(shop):
    """The setting is that of production, and a test database has no slot."""
    shop.conf.flash_transactional_strict = True
    with carried_tasks() as tasks, transaction.atomic(), transactional():
        shop.receipt.apply_async((1,), serializer="yaml", compression="gzip")
    assert args(tasks) == [(1,)]
    with (
        pytest.raises(TransactionError, match="has no slot"),
        transaction.atomic(),
        transactional(),
    ):
        shop.receipt.delay(2)


def test_replication_worker_of_a_test_runs_the_tasks_that_were_committed(shop):
    shop.conf.update(flash_transactional_strict=True, flash_signing_key="a secret of the tests")
    ran = []

    @shop.task(name="note", shared=False)
    def note(number, *, doubled=False):
        ran.append(number * 2 if doubled else number)
        return number

    class Orders(TransactionTestCase):
        databases = {"default"}

        def test_order(self):
            with Live(shop) as live:
                with transaction.atomic(), transactional():
                    note.delay(1)
                    note.apply_async((2,), {"doubled": True}, queue="mail")
                    with suppress(ZeroDivisionError), transaction.atomic():
                        note.delay(3)
                        raise ZeroDivisionError
                with suppress(ZeroDivisionError), transaction.atomic(), transactional():
                    note.delay(4)
                    raise ZeroDivisionError
                assert [(run.handler, run.result) for run in live.wait_for()] == [
                    ("note", 1),
                    ("note", 2),
                ]
                assert [task.queue for task in live.carried] == ["celery", "mail"]
                assert live.enqueued == []

    result = unittest.TestResult()
    unittest.TestSuite([Orders("test_order")]).run(result)
    assert result.wasSuccessful(), result.errors + result.failures
    assert ran == [1, 4]


def tasks_of(shop, *names):
    """Return functions of an example, as tasks."""

    def function(*args): ...

    make = shop.task
    return {name: make(name=name, shared=False, base=DjangoTask)(function) for name in names}


def test_on_commit_page_sends_the_same_tasks_before_and_after(shop, migrated):
    from sales.models import Customer, Order

    customer = Customer.objects.create(name="Ada")
    names = {"Order": Order, "transaction": transaction}
    names.update(tasks_of(shop, "send_receipt", "reserve"))
    sent = []
    for example in (ON_COMMIT.files["before.py"], ON_COMMIT.files["after.py"]):
        exec(example, names)
        with carried_tasks() as tasks:
            order = names["place_order"](customer.pk, 5)
        with shop.connection_for_write() as connection:
            messages = []
            while message := connection.default_channel.basic_get("celery", no_ack=True):
                messages.append((message.headers["task"], *json.loads(message.body)[0]))
        sent.append([*messages, *((task.name, *task.args) for task in tasks)])
        assert sent[-1] == [("send_receipt", order.pk), ("reserve", order.pk)]
    assert messages == []  # the second time


def test_page_of_transactional_tasks_runs(shop, database):
    import sqlalchemy
    from sqlalchemy.orm import Session

    class Order:
        pk = id = 1

        def save(self):
            pass

    class Client:
        def post(self, path, values):
            with transaction.atomic(), transactional():
                names["send_receipt"].delay(values["item"])

    place = f"postgres@127.0.0.1:{database.server.port}/{database.name}"
    engine = sqlalchemy.create_engine(f"postgresql+psycopg://{place}")
    names = {
        "Session": Session,
        "chain": chain,
        "client": Client(),
        "engine": engine,
        "order": Order(),
        "transaction": transaction,
        **tasks_of(shop, "send_receipt", "charge", "ship"),
    }
    names["send_receipt"].name = "shop.send_receipt"
    sqlalchemy_session, *others = TRANSACTIONAL.python()[1:]
    with carried_tasks() as tasks:
        exec(TRANSACTIONAL.python()[0], names)
        exec(sqlalchemy_session.replace("session.add(order)", "pass"), names)
    assert [task.name for task in tasks] == ["shop.send_receipt", "charge", "shop.send_receipt"]
    for example in others:
        exec(example, names)
    engine.dispose()
