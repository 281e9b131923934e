"""What a Celery worker does with a handler's task that fails for good: it becomes a dead letter.

The worker's main process writes it, in the place where Celery acknowledges messages: a message is
acknowledged once its letter is on the broker, and goes back to its queue if it cannot be put there.
Celery imports this module for the strategy of handlers, when a worker starts.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry, Terminated, WorkerLostError
from celery.utils.imports import symbol_by_name
from celery.worker import state
from celery.worker.request import Request
from celery.worker.strategy import default
from kombu.exceptions import OperationalError

from ..backoff import delays
from ..errors import ProcessKilled, PublishError
from ..escaping import escaped
from ..messages.templates import PARKED, Message, received_again
from ..publishing import brokers, declared_queues
from ..publishing.brokers.base import Publisher
from ..settings import Settings
from . import letters
from .letters import Letter

logger = logging.getLogger(__package__)

#: Seconds for which the broker is tried before a message goes back to its queue.
_PATIENCE = 5.0
#: What stands before the routing key of a message that RabbitMQ has held back: its delay in binary.
_DELAY = re.compile(r"(?:[01]\.){28}")


def strategy(task: Any, app: Any, consumer: Any) -> Any:
    """Celery's own strategy, for a task that handles changes."""
    _give_request(task)
    inner = default(task, app, consumer)
    dead = _put_back(consumer, "dead letters, which no worker can run", "flash dead list")
    consumer.strategies.setdefault(letters.TASK, dead)

    put_back = _put_back(consumer, "what is parked for a paused handler", "flash status")

    def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:
        if PARKED in message.headers:
            return put_back(message, body, ack, reject, callbacks)
        try:
            _read(message)
        except Exception as error:
            return _unreadable(app, consumer, message, error, ack, reject)
        try:
            return inner(message, body, ack, reject, callbacks)
        except _MALFORMED as error:
            if message.acknowledged:
                raise  # it had been read
            return _unreadable(app, consumer, message, error, ack, reject)

    return receive


#: What Celery raises on headers that nobody wrote who means well. It would end the worker.
_MALFORMED = (InvalidTaskError, AttributeError, LookupError, OverflowError, TypeError, ValueError)


def _read(message: Any) -> None:
    """Raise here what would end in Celery throwing the message away, or in the worker's end."""
    if "args" not in message.payload:
        _, keywords, _ = message.payload
        if not isinstance(keywords, dict):
            raise InvalidTaskError(f"invalid keyword arguments {keywords!r:.50}")
    for limit in message.headers.get("timelimit") or ():
        if not isinstance(limit, (int, float, type(None))):
            raise InvalidTaskError(f"invalid time limit {limit!r:.50}")


def _unreadable(
    app: Any, consumer: Any, message: Any, error: Exception, ack: Any, reject: Any
) -> None:
    text = ExceptionInfo().traceback
    where = _queue_of(app, message.delivery_info)
    letter = letters.write(
        *(message, where, type(error).__name__, str(error), text), worker=str(consumer.hostname)
    )
    if _bury(app, letter):
        ack(logger, consumer.connection_errors)
    else:
        reject(logger, consumer.connection_errors, True)


def _put_back(consumer: Any, what: str, see: str) -> Any:
    """What a worker does that consumes what is for nobody: stop doing so, and leave it there."""

    def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
        name = message.delivery_info["routing_key"]
        logger.error(
            "The queue %s holds %s; this worker consumes it no longer. Take it out of -Q and of "
            "task_queues; see `%s`",
            *(escaped(name), what, see),
        )
        consumer.cancel_task_queue(name)
        reject(logger, consumer.connection_errors, True)

    return receive


def _give_request(task: Any) -> None:
    """Put ours around the task's own class of requests."""
    own = symbol_by_name(task.Request)
    if not issubclass(own, HandlerRequest):
        bases = (HandlerRequest,) if own is Request else (HandlerRequest, own)
        task.Request = type("HandlerRequest", bases, {})


class HandlerRequest(Request):  # type: ignore[misc] # Celery ships no types
    """A task that a worker has received; its failures become dead letters."""

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Celery calls this when a task has failed or its process has died, before it acknowledges.

        `return_ok` says whether the process lived to record the failure.
        """
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, Reject) and isinstance(error.reason, OperationalError):
            # What Celery raises where it cannot send a retry. It would throw the task away.
            self.reject(requeue=True)
        if self._is_no_failure(error):
            return super().on_failure(exc_info, send_failed_event, return_ok)
        lost = isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt))
        if lost and self.task.acks_late:
            deaths = letters.deaths_of(self.message.headers) + 1
            if deaths < _setting(self.app, "flash_max_deaths"):
                return self._try_again(deaths, error)
            error = ProcessKilled(f"Its process died {deaths} times, the last time so: {error}")
            exc_info = _raised(error)
            self.message.headers[letters.DEATHS] = deaths
        self._bury(error, exc_info.traceback)
        if isinstance(error, MemoryError):
            # Celery would end the worker, and the next one that gets the task.
            exc_info = _raised(RuntimeError(f"MemoryError: {error}"))
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _is_no_failure(self, error: BaseException) -> bool:
        if isinstance(error, (Terminated, Reject, Ignore, Retry)):
            return True
        if isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt)):
            # The worker is being stopped, or the task was revoked, or it had succeeded before.
            # (Celery keeps exit codes there, and 0 is one.)
            asked = state.should_stop, state.should_terminate
            stopped = any(code is not None and code is not False for code in asked)
            stored = getattr(self, "_success_was_stored", bool)  # since Celery 5.7
            return bool(stopped or self._already_cancelled or self._already_revoked or stored())
        return False

    @property
    def _where(self) -> str:
        return _queue_of(self.app, self.delivery_info)

    def _try_again(self, deaths: int, error: BaseException) -> None:
        """Send the message once more, with what it has done in its headers."""
        state.task_ready(self)
        logger.error(
            "%s has ended its process, for the %d. time; it is tried again: %s",
            *(_shown(self.name, self.id, self.argsrepr), deaths, escaped(str(error))),
        )
        message = received_again(self.message, self._where, {letters.DEATHS: deaths})
        try:
            _sender.send(self.app, message, self.app.amqp.queues[message.queue])
        except PublishError as failed:
            logger.error("It goes back to its queue uncounted, for the broker fails: %s", failed)
            self.reject(requeue=True)
        else:
            self.acknowledge()
            self.send_event("task-rejected", requeue=True)

    def _bury(self, error: BaseException, traceback: str) -> None:
        letter = letters.write(
            self.message,
            self._where,
            # An exception that cannot be pickled comes in a wrapper.
            getattr(error, "exc_cls_name", type(error).__name__),
            str(error),
            str(traceback),
            self.args,
            self.time_start,
            str(self.hostname),
        )
        # What follows finds the message dealt with.
        if _bury(self.app, letter):
            self.acknowledge()
        else:
            self.reject(requeue=True)


def _bury(app: Any, letter: Letter) -> bool:
    """Whether the letter is on the broker."""
    name = _setting(app, "flash_dead_queue")
    try:
        _sender.send(app, letters.seal(app, letter, name), declared_queues.queue(app, name))
    except PublishError as failed:
        logger.error(
            "%s has failed and goes back to its queue, for its dead letter cannot be stored: %s",
            *(_shown(letter.handler, letter.id, letter.argsrepr), failed),
        )
        return False
    logger.error(
        "%s is a dead letter now: %s",
        *(_shown(letter.handler, letter.id, letter.argsrepr), escaped(letter.summary)),
    )
    return True


def _shown(handler: object, task_id: object, argsrepr: object) -> str:
    """A task in a log line; the message says these, whoever wrote it."""
    return escaped(f"{handler}[{task_id}] ({argsrepr})")


class _Sender:
    """Publishes for the worker. The pool of threads calls it from several of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._app: Any = None
        self._publisher: Publisher | None = None
        self._declared: set[str] = set()

    def send(self, app: Any, message: Message, queue: Any) -> None:
        """Return once the broker has confirmed it. Raises `PublishError` after some attempts."""
        deadline = time.monotonic() + _PATIENCE
        with self._lock:
            for pause in delays(0.1, 1.0):
                try:
                    self._once(app, message, queue)
                    return
                except PublishError:
                    self._close()
                    if time.monotonic() + pause > deadline:
                        raise
                time.sleep(pause)

    def _once(self, app: Any, message: Message, queue: Any) -> None:
        if self._publisher is None or self._app is not app or queue.name not in self._declared:
            self._close()
            self._app, self._publisher = app, brokers.for_app(app)
            self._publisher.open([queue])
            self._declared = {queue.name}
        self._publisher.publish([message])

    def _close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
        self._publisher = None


_sender = _Sender()


def _queue_of(app: Any, delivery: Any) -> str:
    """The queue a message was in."""
    exchange, key = delivery.get("exchange"), str(delivery.get("routing_key"))
    delay = _DELAY.match(key)
    if delay:  # it came through the exchange of what is delayed
        key = key[delay.end() :]
    if exchange:
        for queue in app.amqp.queues.values():
            if (delay or queue.exchange.name == exchange) and queue.routing_key == key:
                return str(queue.name)
    return key


def _setting(app: Any, name: str) -> Any:
    """One setting, unchecked: a mistake in another one must not keep a letter from its queue."""
    return app.conf.get(name) or getattr(Settings, name)


def _raised(error: BaseException) -> Any:
    try:
        raise error
    except BaseException:
        return ExceptionInfo()
