"""Failed tasks in a Celery worker, with messages and brokers in memory."""

from types import SimpleNamespace

import pytest
from billiard.einfo import ExceptionInfo
from celery import shared_task
from celery.exceptions import Ignore, Reject, Retry, Terminated, WorkerLostError
from celery.worker import state
from celery.worker.request import Request
from celery.worker.strategy import default
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.utils.json import loads

from flash_celery import on_change
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.payload import encode
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.dead_letters import failed_tasks, letters
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing import brokers
from flash_celery.publishing.brokers.memory import MemoryPublisher

TABLE = Table("public", "items", None, "d", ("id",), (Column("id", 20, "int8", identity=True),))
DELIVERY = Delivery(
    TABLE, Transaction(Lsn(16), 1, 0), 0, 0, 0, [encode_row("I", 0, None, None, [b"5"])]
)


@pytest.fixture
def broker(monkeypatch):
    broker = MemoryPublisher()
    monkeypatch.setattr(brokers, "for_app", lambda app: broker)
    monkeypatch.setattr(failed_tasks, "_sender", failed_tasks._Sender())
    monkeypatch.setattr(failed_tasks, "_PUBLISH_SECONDS", 0)
    return broker


@pytest.fixture
def receive(app):
    """Makes the request of a worker that has received a change."""

    def receive(acks_late=True, **headers):
        own = headers.pop("request", Request)
        if "shop.handle" not in app.tasks:

            @on_change("items", acks_late=acks_late)
            @app.task(name="shop.handle", Request=own)
            def handle(change): ...

            app.finalize()
        task = app.tasks["shop.handle"]
        failed_tasks._set_request_class(task)
        value = f'{{"__type__":"flash_celery.change","__value__":{encode([DELIVERY])}}}'
        body = f'[[{value}],{{}},{{"callbacks":null}}]'
        message = SimpleNamespace(
            headers={"id": "1", "task": task.name, "retries": 2, "x-death": [], **headers},
            properties={"priority": 3, "correlation_id": "1", "delivery_tag": "x"},
            delivery_info={"exchange": "", "routing_key": "flash"},
            body=body.encode(),
            payload=loads(body),
            content_type="application/json",
            content_encoding="utf-8",
        )
        done = []
        request = task.Request(
            message,
            app=app,
            task=task,
            hostname="worker@host",
            on_ack=lambda *_: done.append("acknowledged"),
            on_reject=lambda logger, errors, requeue: done.append(("rejected", requeue)),
        )
        request.done = done
        return request

    return receive


def failure(error):
    try:
        raise error
    except BaseException:
        return ExceptionInfo()


def letter_of(broker):
    (message,) = broker.queues["flash.dead"]
    return letters.decode(message.body)


def test_failed_task_is_a_dead_letter_before_it_is_acknowledged(receive, broker):
    request = receive()
    request.on_failure(failure(ValueError("no\nsuch item")), return_ok=True)
    assert request.done == ["acknowledged"]
    letter = letter_of(broker)
    assert (letter.id, letter.handler, letter.queue, letter.priority) == (
        "1",
        "shop.handle",
        "flash",
        3,
    )
    assert letter.summary == "ValueError: no"
    assert "ValueError: no\nsuch item" in letter.traceback
    assert (letter.tables, letter.changes, letter.commit_lsn) == (
        ["public.items"],
        ["0/10:0"],
        "0/10",
    )
    assert letter.argsrepr == "insert public.items id=5 @0/10"
    (message,) = broker.queues["flash.dead"]
    assert message.headers["task"] == letters.TASK not in request.app.tasks

    again = letters.retry_message(letter)
    assert again.body == request.message.body.decode()
    assert again.headers["id"] == "1"
    assert again.headers["retries"] == 0
    assert "x-death" not in again.headers
    assert again.headers[letters.FIRST_FAILED] == letter.failed_at
    assert again.properties == {"correlation_id": "1", "delivery_mode": 2, "priority": 3}


def test_failed_task_is_requeued_if_its_dead_letter_cannot_be_stored(receive, broker):
    broker.broken = True
    request = receive()
    request.on_failure(failure(ValueError("x")), return_ok=True)
    assert request.done == [("rejected", True)]


def test_task_end_without_failure_is_left_to_celery(receive, broker):
    for error, done in (
        (Retry(), ["acknowledged"]),
        (Ignore(), ["acknowledged"]),
        (Reject("x", requeue=False), [("rejected", False)]),
        (Reject("x", requeue=True), [("rejected", True)]),
        (Terminated("9"), ["acknowledged"]),
    ):
        request = receive()
        request.on_failure(failure(error), return_ok=True)
        assert request.done == done
    assert broker.queues == {}


def test_retry_that_cannot_be_sent_is_kept(receive, broker):
    request = receive()
    request.on_failure(failure(Reject(OperationalError("gone"), requeue=False)), return_ok=True)
    assert request.done == [("rejected", True)]


def test_out_of_memory_does_not_end_the_celery_worker(receive, broker):
    request = receive()
    request.on_failure(failure(MemoryError("x")), return_ok=True)
    assert request.done == ["acknowledged"]
    assert letter_of(broker).error == "MemoryError"


@pytest.mark.parametrize("error", [WorkerLostError("signal 9"), SystemExit(1)])
def test_process_deaths_are_counted_up_to_a_dead_letter(receive, broker, error):
    deaths = {}
    for number in (1, 2):
        request = receive(**deaths)
        request.on_failure(failure(error))
        assert request.done == ["acknowledged"]
        message = broker.queues["flash"].pop()
        assert message.headers == {
            "id": "1",
            "task": "shop.handle",
            "retries": 2,
            letters.DEATHS: number,
        }
        assert message.body == request.message.body
        assert message.properties["priority"] == 3
        deaths = {letters.DEATHS: number}
    request = receive(**deaths)
    request.on_failure(failure(error))
    assert request.done == ["acknowledged"]
    assert broker.queues["flash"] == []
    letter = letter_of(broker)
    assert (letter.error, letter.deaths) == ("ProcessKilled", 3)
    assert letters.DEATHS not in letters.retry_message(letter).headers


def test_process_deaths_during_a_shutdown_are_not_counted(receive, broker, monkeypatch):
    monkeypatch.setattr(state, "should_stop", 0)
    request = receive()
    request.on_failure(failure(WorkerLostError("signal 15")))
    assert request.done == [("rejected", True)]
    assert broker.queues == {}


def test_process_death_without_acks_late_is_final(receive, broker):
    request = receive(acks_late=False)
    request.on_failure(failure(WorkerLostError("signal 9")))
    assert letter_of(broker).error == "WorkerLostError"


def test_process_death_while_the_broker_fails_requeues_the_task(receive, broker):
    broker.broken = True
    request = receive()
    request.on_failure(failure(WorkerLostError("signal 9")))
    assert request.done == [("rejected", True)]


class OwnRequest(Request):
    failed = False

    def on_failure(self, *args, **kwargs):
        self.failed = True
        return super().on_failure(*args, **kwargs)


def test_request_class_of_a_task_is_kept(receive, broker):
    request = receive(request=OwnRequest)
    request.on_failure(failure(ValueError("x")), return_ok=True)
    assert request.failed
    assert letter_of(broker).error == "ValueError"


def test_strategy_is_set_for_handlers_without_their_own(app):
    @on_change("items")
    @shared_task(name="shop.handle")
    def handle(change): ...

    @on_change("items")
    @shared_task(name="shop.own", Strategy="celery.worker.strategy:default ")
    def own(change): ...

    @shared_task(name="shop.other")
    def other(): ...

    app.finalize()
    strategies = {
        name: app.tasks[name].Strategy for name in ("shop.handle", "shop.own", "shop.other")
    }
    assert strategies == {
        "shop.handle": "flash_celery.dead_letters.failed_tasks:strategy",
        "shop.own": "celery.worker.strategy:default ",
        "shop.other": f"{default.__module__}:{default.__name__}",
    }


def test_long_traceback_keeps_its_end(receive, broker):
    request = receive()
    request.on_failure(failure(ValueError("begin" + "x" * 100_000 + "end")), return_ok=True)
    letter = letter_of(broker)
    assert len(letter.traceback) < 17_000
    assert letter.traceback.rstrip().strip('"').endswith("end")
    assert len(letter.message) < 3_000


def test_retry_delayed_by_rabbitmq_has_its_queue(app):
    """Celery's native delayed delivery leaves the delay in the routing key."""
    app.conf.task_queues = [
        Queue("slow", Exchange("slow", type="topic"), routing_key="slow.key"),
        Queue("flash", Exchange("flash", type="topic"), routing_key="flash"),
    ]
    delay = ".".join(f"{5:028b}")
    for key, name in (("flash", "flash"), ("slow.key", "slow")):
        delayed = {"exchange": "celery_delayed_delivery", "routing_key": f"{delay}.{key}"}
        assert failed_tasks._queue_of(app, delayed) == name
        assert failed_tasks._queue_of(app, {"exchange": name, "routing_key": key}) == name
    assert failed_tasks._queue_of(app, {"exchange": "", "routing_key": "1.0.flash"}) == "1.0.flash"
