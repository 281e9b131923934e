"""What a task raised, on its way to the worker's main process."""

import asyncio
import os
import pickle

import pytest
from amqp.exceptions import PreconditionFailed
from billiard.einfo import ExceptionInfo
from celery import Task
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown, WorkerTerminate
from celery.worker import state
from kombu.exceptions import OperationalError

from flash_celery.dead_letters import outcome


class Two(Exception):
    def __init__(self, argument, two):
        super().__init__(argument)


class Unreduced(Exception):
    def __reduce__(self):
        raise ValueError


class Exits(Exception):
    """Its own code exits wherever it is called."""

    def __str__(self):
        raise SystemExit(1)

    __repr__ = __str__

    def __reduce__(self):
        return (leave, ()) if self.args else self.__str__()


def leave():
    raise SystemExit(1)


def ran(error, main_process=None):
    """Run a task that raises, and return the failure as the main process receives it."""

    def trace():
        try:
            raise error
        except Exception:
            return 1, ExceptionInfo(), 1.0

    failed, described, _ = outcome.run(main_process or os.getpid(), trace)
    assert failed
    return pickle.loads(pickle.dumps(described)).exception


@pytest.mark.parametrize(
    ("error", "restored", "text"),
    [
        (ValueError("x"), ValueError, "x"),
        (Two(1, 2), None, "1"),
        (Unreduced("x"), None, "x"),
        (Reject(Two(1, 2), requeue=True), Reject, ""),
        (Retry("later", exc=Two(1, 2)), Retry, "later"),
        (Ignore("x"), Ignore, "x"),
        (asyncio.CancelledError("x"), None, "x"),
        (SystemExit("x"), None, "x"),
        (KeyboardInterrupt("x"), None, "x"),
    ],
)
def test_exception_can_be_restored_in_the_main_process(error, restored, text):
    failure = ran(error)
    raised = failure.restored()
    if restored is None:
        assert raised.exc_cls_name == type(error).__name__
    else:
        assert type(raised) is restored
    if restored is Reject:
        assert (raised.reason, raised.requeue) == ("1", True)
    else:
        assert str(raised) == text
    assert failure.recorded is isinstance(error, Exception)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_exit_of_a_pool_process_ends_it(error):
    with pytest.raises(type(error)):
        ran(error, main_process=-1)


@pytest.mark.parametrize("error", [Exits(), Exits("when it is unpickled")])
def test_exception_whose_own_code_exits_is_described(error):
    restored = ran(error).restored()
    assert restored.exc_cls_name == "Exits"
    assert "whose text cannot be read" in str(restored)


def test_exit_of_a_worker_that_is_being_stopped_ends_it(monkeypatch):
    with pytest.raises(WorkerShutdown):
        ran(WorkerShutdown(0))
    monkeypatch.setattr(state, "should_terminate", 0)
    with pytest.raises(SystemExit):
        ran(SystemExit(0))


def test_task_that_a_cold_shutdown_cannot_cancel_has_not_failed():
    """In the solo pool Celery handles the signal within the task."""
    of_celery = {"__name__": "celery.apps.worker"}
    exec("def on_signal(): raise NotImplementedError('kill_job')", of_celery)

    def trace():
        try:
            of_celery["on_signal"]()
        except NotImplementedError:
            return 1, ExceptionInfo(), 1.0

    with pytest.raises(WorkerTerminate):
        outcome.run(os.getpid(), trace)


class Refusing(Task):
    """A task whose retry cannot be sent."""

    name = "refusing"

    def __init__(self, error):
        self.error = error

    def apply_async(self, *args, **options):
        raise self.error

    def signature_from_request(self, *args, **options):
        return self


def retry_with(app, error):
    task = Refusing(error)
    task.bind(app)
    task.push_request(called_directly=False, retries=0, id="1", args=(), kwargs={})
    try:
        task.retry(countdown=0)
    except Reject as reject:
        return ran(reject)
    raise AssertionError("Celery raises Reject")


def test_retry_that_cannot_be_sent_fails_with_its_error(app):
    failure = retry_with(app, ValueError("it cannot be encoded"))
    assert repr(failure.restored()) == "ValueError('it cannot be encoded')"
    assert not failure.recorded


def test_retry_that_the_broker_cannot_take_now_is_requeued(app):
    restored = retry_with(app, OperationalError("gone")).restored()
    assert isinstance(restored, Reject)
    assert isinstance(restored.reason, OperationalError)


def test_retry_that_the_broker_refuses_fails_with_its_error(app):
    error = OperationalError("too large")
    error.__cause__ = PreconditionFailed("too large")
    assert isinstance(retry_with(app, error).restored(), OperationalError)


def test_reject_of_a_handler_keeps_its_meaning():
    try:
        try:
            raise ValueError("x")
        except ValueError as error:
            # As Celery's retry does, and yet the handler's own.
            raise Reject(error, requeue=False) from None
    except Reject as reject:
        failure = ran(reject)
    assert isinstance(failure.restored(), Reject)
    assert failure.recorded
