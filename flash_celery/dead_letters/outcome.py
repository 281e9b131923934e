"""Run a handler's task so that whatever it raises gets safely to the worker's main process.

`run` is called where the handler runs: in a child process of prefork, in a thread, or in the main
process (solo). Celery and billiard hand an exception of the handler over as an object, whose own
code then runs in the main process: unpickling it calls its `__init__` or `__reduce__`, and a
failure there ends the worker. They also lose a `SystemExit` or `CancelledError` under threads and
solo. So `run` catches everything, and replaces the exception by a `Failure`, which can always be
unpickled. `failed_tasks.HandlerRequest` restores the exception from it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from traceback import walk_tb
from typing import Any

from amqp.exceptions import IrrecoverableChannelError
from billiard import common
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown, WorkerTerminate
from celery.platforms import EX_FAILURE
from celery.utils.serialization import UnpickleableExceptionWrapper
from celery.worker import state
from kombu.exceptions import OperationalError

from ..escaping import text_of

#: Where Celery handles the signals that stop a worker.
_SIGNALS = "celery.apps.worker"
#: The packages whose exceptions are signals of a pool of greenlets, not errors of a handler.
_GREENLETS = {"gevent", "eventlet", "greenlet"}


class Failure(Exception):
    """What a task raised, in a form that every process can unpickle.

    Args:
        pickled: The exception, pickled; empty if that is not possible.
        stand_in: Describes the exception where it cannot be unpickled.
        recorded: Whether Celery has stored the failure and sent its signals, as it does for a
            handler's ordinary exceptions.
    """

    def __init__(self, pickled: bytes, stand_in: Exception, recorded: bool) -> None:
        super().__init__(pickled, stand_in, recorded)
        self._pickled = pickled
        self._stand_in = stand_in
        self.recorded = recorded

    @classmethod
    def of(cls, error: BaseException, recorded: bool) -> Failure:
        """Return the form in which an exception is sent."""
        pickled = b""
        # The main process would take the others (SystemExit, KeyboardInterrupt) for its own.
        if isinstance(error, Exception):
            try:
                pickled = pickle.dumps(error)
            except KeyboardInterrupt:
                raise
            except BaseException:  # its own code may even exit
                pickled = b""
        return cls(pickled, _stand_in(error), recorded)

    def restored(self) -> Exception:
        """Return the exception, or its stand-in if the exception cannot be unpickled."""
        if self._pickled:
            try:
                error = pickle.loads(self._pickled)  # noqa: S301 - from this worker's own process
            except KeyboardInterrupt:
                raise
            except BaseException:  # its own code may even exit
                return self._stand_in
            if isinstance(error, Exception):
                return error
        return self._stand_in


def guarded_pool(pool: Any) -> Any:
    """Return the worker's pool for handlers' tasks: it calls `run` with what Celery would call."""
    return _GuardedPool(pool)


class _GuardedPool:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def apply_async(self, trace: Any, args: Any = (), **options: Any) -> Any:
        return self._pool.apply_async(run, args=(os.getpid(), trace, *args), **options)


def run(main_process: int, trace: Callable[..., Any], *args: Any) -> Any:
    """Run a task with Celery's tracer, and return the tracer's outcome with a safe exception.

    Args:
        main_process: The process id of the worker's main process.
        trace: `fast_trace_task` or `trace_task_ret` of Celery, which return whether the task
            failed, its exception or the text of its result, and its duration.
        *args: The arguments of `trace`.
    """
    try:
        failed, outcome, duration = trace(*args)
    except BaseException as error:
        if ends_the_process(error, os.getpid() == main_process):
            raise
        return 1, _exception_info(Failure.of(error, recorded=False), ExceptionInfo()), 0.0
    if not failed or not isinstance(outcome, ExceptionInfo):
        return failed, outcome, duration
    raised = outcome.exception
    if isinstance(raised, ExceptionWithTraceback):
        raised = raised.exc
    if _comes_from_a_signal(raised):
        raise WorkerTerminate(EX_FAILURE) from raised
    unsent = _unsent_retry(raised)
    failure = Failure.of(raised, True) if unsent is None else Failure.of(unsent, recorded=False)
    return failed, _exception_info(failure, outcome), duration


def is_stopping() -> bool:
    """Return whether this worker is being stopped."""
    # Celery keeps exit codes in these two, and 0 is one.
    return _is_set(state.should_stop) or _is_set(state.should_terminate)


def _is_set(exit_code: Any) -> bool:
    return exit_code is not None and exit_code is not False


def _exception_info(failure: Failure, described: Any) -> Any:
    """Return billiard's description of an exception, with a `Failure` in place of the exception."""
    described.type, described.exception = Failure, failure
    return described


def ends_the_process(error: BaseException, in_main_process: bool) -> bool:
    """Return whether an exception is meant for the pool or the worker, not an error of the task."""
    if isinstance(error, Exception):
        return False
    if isinstance(error, (WorkerShutdown, WorkerTerminate)):
        return True
    if any(base.__module__.partition(".")[0] in _GREENLETS for base in type(error).__mro__):
        return True
    if in_main_process:
        return is_stopping()
    # The pool replaces a process that exits, and billiard knows whether it was asked to.
    was_stopped: Callable[[], bool] = getattr(common, "terminate_handler_fired", lambda: False)
    return isinstance(error, (SystemExit, KeyboardInterrupt)) or was_stopped()


def _comes_from_a_signal(error: BaseException) -> bool:
    """Return whether Celery raised an exception because it could not stop the worker as asked to.

    In the solo pool a task runs where signals are handled. A cold shutdown cannot cancel it there,
    which raises NotImplementedError (celery/worker/request.py, `cancel`).
    """
    return any(
        frame.f_globals.get("__name__") == _SIGNALS for frame, _ in walk_tb(error.__traceback__)
    )


def _unsent_retry(error: BaseException) -> BaseException | None:
    """Return why `Task.retry` could not send its message, if that will not pass; else None.

    `Task.retry` raises `Reject` for any error of `apply_async`, with which Celery discards the
    task. A handler may raise the same `Reject`; only the place where it was raised differs.
    """
    if not isinstance(error, Reject) or not isinstance(error.reason, BaseException):
        return None
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return None
    frame = traceback.tb_frame
    place = frame.f_globals.get("__name__"), frame.f_code.co_name
    if place != ("celery.app.task", "retry"):
        return None
    reason = error.reason
    if isinstance(reason, OperationalError):
        # The broker cannot be reached for now, unless it has refused the message.
        refused = isinstance(reason.__cause__, IrrecoverableChannelError)
        return reason if refused else None
    return reason


def _stand_in(error: BaseException) -> Exception:
    """Return a description of an exception, of which only built-in types and Celery's are part."""
    text = text_of(error)
    stand_in: Exception
    if isinstance(error, Reject):
        stand_in = Reject(text_of(error.reason), requeue=bool(error.requeue))
    elif isinstance(error, Ignore):
        stand_in = Ignore(text)
    elif isinstance(error, Retry):
        stand_in = Retry(text)
    else:
        module, name = str(type(error).__module__), type(error).__name__
        if isinstance(error, UnpickleableExceptionWrapper):
            module, name = str(error.exc_module), str(error.exc_cls_name)
        stand_in = UnpickleableExceptionWrapper(module, name, (text,), text)
    return stand_in
