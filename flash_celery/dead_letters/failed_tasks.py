"""Make a dead letter of each handler's task that fails for good, in a Celery worker.

The flow, all of it in the main process of a Celery worker:

1. When the worker starts, Celery calls `strategy` for each task with an `on_change` or `on_message`
   (`handlers.decorators` sets the task's `Strategy`). `strategy` makes `HandlerRequest` the task's
   request class, and returns a function that checks each message before Celery decodes it.
2. Celery runs the task through `outcome.run`, so that no exception of a handler can stop the main
   process. This module does nothing while `autoretry_for` or `retry()` retries it.
3. When it has failed for good, Celery calls `HandlerRequest.on_failure`, which publishes the dead
   letter to the queue `flash_dead_queue` and waits for the broker's confirm.
4. Only then is the task's message acknowledged. If the broker cannot store the dead letter, the
   message is requeued, and the task runs again. So a failed task can leave two dead letters, but
   never none.

Two cases differ:

- The worker process that runs the task dies (killed, out of memory). The message is published again
  with a counter in its headers; after `flash_max_deaths` deaths the task becomes a dead letter.
- The message cannot be read (forged, or of an unknown content type). Celery would discard it or end
  the worker. Instead it becomes a dead letter at once.

Changes of ordered handlers fail in `lanes.calls`, which stores their dead letters with
`store_letter`. `queue` reads the dead letters and retries them. A task that sets its own `Strategy`
gets no dead letters.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry, Terminated, WorkerLostError
from celery.utils.imports import symbol_by_name
from celery.utils.serialization import UnpickleableExceptionWrapper
from celery.worker import state
from celery.worker.request import Request
from celery.worker.strategy import default
from kombu.exceptions import OperationalError

from ..backoff import delays
from ..errors import ConfigurationError, ProcessKilled, PublishError
from ..escaping import escaped, text_of
from ..messages import task_options
from ..messages.task_message import HELD, Message, received_again
from ..publishing import brokers, declared_queues
from ..publishing.brokers.base import Publisher
from ..settings import Settings
from . import letters, outcome, oversize
from .letters import DeadLetter

logger = logging.getLogger(__package__)

#: Seconds to retry publishing before the task's message is requeued.
_PUBLISH_SECONDS = 5.0
#: Seconds before a message is requeued for which both the outcome and the dead letter failed.
_REQUEUE_SECONDS = 1.0
#: The prefix of a routing key in Celery's native delayed delivery (RabbitMQ): the delay in binary.
_DELAY = re.compile(r"(?:[01]\.){28}")
#: The errors that Celery raises for malformed headers; they would end the worker.
_MALFORMED = (InvalidTaskError, AttributeError, LookupError, OverflowError, TypeError, ValueError)
#: The errors of a task whose worker process has ended.
_PROCESS_ENDED = (WorkerLostError, SystemExit, KeyboardInterrupt)


def strategy(task: Any, app: Any, consumer: Any) -> Any:
    """Return the function that receives a worker's messages for a handler's task.

    Celery calls this for `task.Strategy` when a worker starts. The function works like Celery's
    own, and makes a dead letter of a message that cannot be read.
    """
    _refuse_protocol_1(app)
    _set_request_class(task)
    receive_valid = default(task, app, _GuardedConsumer(consumer))
    stop_dead = _stop_consuming(
        consumer, "dead letters, which no worker can run", "flash dead list"
    )
    stop_held = _stop_consuming(consumer, "held messages of a paused handler", "flash status")
    consumer.strategies.setdefault(letters.TASK, stop_dead)

    def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:
        if HELD in message.headers:
            return stop_held(message, body, ack, reject, callbacks)
        try:
            _check(message)
        except Exception as error:
            return _on_unreadable(app, consumer, message, error, ack, reject)
        try:
            return receive_valid(message, body, ack, reject, callbacks)
        except _MALFORMED as error:
            if message.acknowledged:
                raise  # the message was read; the error is not about it
            return _on_unreadable(app, consumer, message, error, ack, reject)
        except Exception:
            raise  # of the pool or the connection, not of this message
        except BaseException as error:
            # A receiver of task_received: Celery logs only its `Exception`s.
            if message.acknowledged or outcome.ends_the_process(error, in_main_process=True):
                raise
            return _on_unreadable(app, consumer, message, error, ack, reject)

    return receive


def _refuse_protocol_1(app: Any) -> None:
    """End a worker of handlers whose retries would have the format of Celery 3."""
    try:
        task_options.require_protocol_2(app)
    except ConfigurationError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(2) from None


def _check(message: Any) -> None:
    """Raise an error for a message that Celery would discard or that would end the worker."""
    if "args" not in message.payload:
        _, keywords, _ = message.payload
        if not isinstance(keywords, dict):
            raise InvalidTaskError(f"invalid keyword arguments {keywords!r:.50}")
    for limit in message.headers.get("timelimit") or ():
        if not isinstance(limit, (int, float, type(None))):
            raise InvalidTaskError(f"invalid time limit {limit!r:.50}")


def _on_unreadable(
    app: Any, consumer: Any, message: Any, error: BaseException, ack: Any, reject: Any
) -> None:
    letter = letters.from_message(
        message,
        _queue_of(app, message.delivery_info),
        error=type(error).__name__,
        text=text_of(error),
        traceback=ExceptionInfo().traceback,
        worker=str(consumer.hostname),
    )
    if store_letter(app, letter):
        ack(logger, consumer.connection_errors)
    else:
        reject(logger, consumer.connection_errors, True)


def _stop_consuming(consumer: Any, content: str, command: str) -> Any:
    """Return a function that requeues the message and stops consuming its queue.

    Workers must not consume dead letters or held messages.
    """

    def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
        name = message.delivery_info["routing_key"]
        logger.error(
            "The queue %s holds %s; this worker has stopped consuming it. Remove the queue from -Q "
            "and from task_queues; see `%s`",
            escaped(name),
            content,
            command,
        )
        consumer.cancel_task_queue(name)
        reject(logger, consumer.connection_errors, True)

    return receive


def _set_request_class(task: Any) -> None:
    """Put `HandlerRequest` in front of the task's own request class."""
    own = symbol_by_name(task.Request)
    if not issubclass(own, HandlerRequest):
        bases = (HandlerRequest,) if own is Request else (HandlerRequest, own)
        task.Request = type("HandlerRequest", bases, {})


class _GuardedConsumer:
    """The worker's consumer for handlers' tasks: its pool runs them through `outcome.run`."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.pool = outcome.guarded_pool(consumer.pool)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)


class HandlerRequest(Request):  # type: ignore[misc] # Celery ships no types
    """A task that a worker has received; it becomes a dead letter when it fails for good.

    Celery calls its methods in the main process of the worker, and a task may have a class of
    requests of its own below this one. An error there is logged; it must not end the worker, nor
    leave the message unacknowledged until the worker takes no more.
    """

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(message, *args, **kwargs)
        except _MALFORMED:
            raise
        except BaseException as error:
            if outcome.ends_the_process(error, in_main_process=True):
                raise
            text = f"its request cannot be made: {type(error).__name__}: {text_of(error)}"
            raise InvalidTaskError(text) from error

    def on_accepted(self, pid: Any, time_accepted: Any) -> None:
        """Do what Celery does when the task starts."""
        with self._errors_logged():
            super().on_accepted(pid, time_accepted)
            return
        if not self.task.acks_late:
            self.acknowledge()

    def on_timeout(self, soft: Any, timeout: Any) -> None:
        """Do what Celery does when the task has reached a time limit."""
        with self._errors_logged():
            super().on_timeout(soft, timeout)

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Store the dead letter, then do what Celery does.

        Celery calls this before it acknowledges the message, when the task has failed or its worker
        process has died.

        Args:
            exc_info: The error, as Celery describes it.
            send_failed_event: Whether Celery sends the event `task-failed`.
            return_ok: Whether the process survived and has recorded the failure.
        """
        failure = exc_info.exception
        if isinstance(failure, outcome.Failure):
            exc_info.exception = failure.restored()
            exc_info.type = type(exc_info.exception)
            return_ok = return_ok and failure.recorded
        with self._errors_logged():
            return self._on_failure(exc_info, send_failed_event, return_ok)
        if not self.acknowledged:
            error = exc_info.exception
            if isinstance(error, (Retry, Ignore)):
                self.acknowledge()  # a retry has been sent
            else:
                # Not too often: it may fail again at once.
                time.sleep(_REQUEUE_SECONDS)
                self.reject(requeue=error.requeue if isinstance(error, Reject) else True)
        return None

    def revoked(self) -> bool:
        """Return whether the task was revoked, as Celery does."""
        with self._errors_logged():
            return bool(super().revoked())
        return False

    def send_event(self, *args: Any, **fields: Any) -> None:
        """Send an event, as Celery does."""
        with self._errors_logged():
            super().send_event(*args, **fields)

    def acknowledge(self) -> None:
        """Acknowledge the message, as Celery does."""
        with self._errors_logged():
            super().acknowledge()
            return
        Request.acknowledge(self)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message, as Celery does."""
        with self._errors_logged():
            super().reject(requeue)
            return
        Request.reject(self, requeue)

    @contextmanager
    def _errors_logged(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if outcome.ends_the_process(error, in_main_process=True):
                raise
            task = _described(self.name, self.id, self.argsrepr)
            logger.exception("An error outside of the handler, after %s had been received", task)

    def _on_failure(self, exc_info: Any, send_failed_event: bool, return_ok: bool) -> Any:
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, Reject) and isinstance(error.reason, OperationalError):
            # Celery could not send a retry and would discard the task.
            self.reject(requeue=True)
        if not self._failed_for_good(error):
            return super().on_failure(exc_info, send_failed_event, return_ok)
        if isinstance(error, _PROCESS_ENDED) and self.task.acks_late:
            deaths = letters.deaths_of(self.message.headers) + 1
            if deaths < setting(self.app, "flash_max_deaths"):
                return self._run_again(deaths, error)
            error = ProcessKilled(
                f"Its worker process has died {deaths} times, most recently with: {text_of(error)}"
            )
            exc_info = _raised(error)
            self.message.headers[letters.DEATHS] = deaths
        self._store_dead_letter(error, exc_info.traceback)
        if isinstance(error, MemoryError):
            # Celery would end the worker, then the next one that receives the task.
            exc_info = _raised(RuntimeError(f"MemoryError: {text_of(error)}"))
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _failed_for_good(self, error: BaseException) -> bool:
        if isinstance(error, (Terminated, Reject, Ignore, Retry)):
            return False
        if isinstance(error, _PROCESS_ENDED):
            if outcome.is_stopping():
                return False
            return not (self._already_cancelled or self._already_revoked or self._succeeded())
        return True

    def _succeeded(self) -> bool:
        """Return whether the task had succeeded before its process ended."""
        # Celery has the method since 5.7.
        return bool(hasattr(self, "_success_was_stored") and self._success_was_stored())

    @property
    def _queue(self) -> str:
        return _queue_of(self.app, self.delivery_info)

    def _run_again(self, deaths: int, error: BaseException) -> None:
        """Publish the message once more, with the number of deaths in its headers."""
        state.task_ready(self)
        logger.error(
            "The worker process that ran %s has died (death %d of this task); it runs again: %s",
            _described(self.name, self.id, self.argsrepr),
            deaths,
            escaped(text_of(error)),
        )
        message = received_again(self.message, self._queue, {letters.DEATHS: deaths})
        try:
            _sender.send(self.app, message, self.app.amqp.queues[message.queue])
        except PublishError as publish_error:
            logger.error(
                "The broker has failed, so the task's message is requeued, and the death is not "
                "counted: %s",
                publish_error,
            )
            self.reject(requeue=True)
        else:
            self.acknowledge()
            self.send_event("task-rejected", requeue=True)

    def _store_dead_letter(self, error: BaseException, traceback: str) -> None:
        """Store the dead letter and acknowledge the message, or requeue the message.

        `Request.on_failure`, which runs next, ignores a message that is already acknowledged.
        """
        name = type(error).__name__
        if isinstance(error, UnpickleableExceptionWrapper):
            name = str(error.exc_cls_name)
        letter = letters.from_message(
            self.message,
            self._queue,
            error=name,
            text=text_of(error),
            traceback=str(traceback),
            arguments=self.args,
            started_at=self.time_start,
            worker=str(self.hostname),
        )
        if store_letter(self.app, letter):
            self.acknowledge()
        else:
            self.reject(requeue=True)


def store_letter(app: Any, letter: DeadLetter) -> bool:
    """Publish a dead letter; return whether the broker has confirmed it."""
    name = setting(app, "flash_dead_queue")
    task = _described(letter.handler, letter.id, letter.argsrepr)
    queue = declared_queues.queue(app, name)
    try:
        try:
            _sender.send(app, letters.encode(app, letter, name), queue)
        except PublishError as error:
            limit = error.size_limit
            smaller = oversize.fitting_letter(app, letter, name, limit) if limit else None
            if smaller is None:
                raise
            _sender.send(app, letters.encode(app, smaller, name), queue)
    except PublishError as error:
        logger.error(
            "%s has failed; its message is requeued, because its dead letter cannot be stored: %s",
            task,
            error,
        )
        return False
    logger.error("%s is a dead letter now: %s", task, escaped(letter.summary))
    return True


def _described(handler: object, task_id: object, argsrepr: object) -> str:
    """Describe a task for the log; its message may be forged, so all of it is escaped."""
    return escaped(f"{handler}[{task_id}] ({argsrepr})")


class _Sender:
    """A publisher that a worker process keeps open; the threads of a thread pool share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._app: Any = None
        self._publisher: Publisher | None = None
        #: The process that has opened the publisher; a forked one must not use its connection.
        self._pid = 0
        self._declared: set[str] = set()

    def send(self, app: Any, message: Message, queue: Any) -> None:
        """Publish a message and wait for the broker's confirm; retry for 5 seconds.

        Raises:
            PublishError: The broker has not confirmed it.
        """
        deadline = time.monotonic() + _PUBLISH_SECONDS
        if self._pid != os.getpid():
            self._lock, self._publisher, self._pid = threading.Lock(), None, os.getpid()
            self._declared = set()
        with self._lock:
            for pause in delays(0.1, 1.0):
                try:
                    self._publish(app, message, queue)
                    return
                except PublishError as error:
                    self._close()
                    if error.size_limit or time.monotonic() + pause > deadline:
                        raise
                time.sleep(pause)

    def _publish(self, app: Any, message: Message, queue: Any) -> None:
        if self._publisher is None or self._app is not app:
            self._close()
            self._app, self._publisher = app, brokers.for_app(app)
        if queue.name not in self._declared:
            self._publisher.open([queue])
            self._declared = {queue.name}
        self._publisher.publish([message])

    def _close(self) -> None:
        """Disconnect; the publisher remembers why it has failed."""
        self._declared = set()
        if self._publisher is not None:
            self._publisher.close()


_sender = _Sender()


def _queue_of(app: Any, delivery_info: Any) -> str:
    """Return the name of the queue that a message was in."""
    exchange = delivery_info.get("exchange")
    routing_key = str(delivery_info.get("routing_key"))
    delay = _DELAY.match(routing_key)
    if delay:  # the message came through Celery's exchange of delayed messages
        routing_key = routing_key[delay.end() :]
    if exchange:
        for queue in app.amqp.queues.values():
            if (delay or queue.exchange.name == exchange) and queue.routing_key == routing_key:
                return str(queue.name)
    return routing_key


def setting(app: Any, name: str) -> Any:
    """Read one setting without checking the others: a mistake there must not lose a dead letter."""
    return app.conf.get(name) or getattr(Settings, name)


def _raised(error: BaseException) -> Any:
    """Raise the error and return billiard's description of it, with a traceback."""
    try:
        raise error
    except BaseException:
        return ExceptionInfo()
