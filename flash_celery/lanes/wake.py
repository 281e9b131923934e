"""The task that a wake runs, which drains one lane, and its part in Celery's main process.

The task belongs to the worker, not to the project, so it has none of the project's options for
tasks: no time limit, no rate limit, no result.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from contextlib import suppress
from typing import Any

from billiard.exceptions import Terminated, WorkerLostError
from billiard.process import current_process
from celery.worker.request import Request
from celery.worker.strategy import default

from ..backoff import delays
from ..dead_letters import outcome
from ..dead_letters.failed_tasks import setting
from ..errors import FlashError, PublishError
from ..escaping import escaped
from ..messages.deduplication import now
from ..messages.lane_messages import REGISTRY
from ..publishing.brokers.amqp_wakes import Lane
from ..publishing.brokers.lane_letters import LaneLetters
from ..publishing.brokers.lane_store import LostLease
from . import amqp_sweep, amqp_wake, connection
from .alarms import Alarm, call_at
from .calls import HandlerCalls, traced
from .drain import Drain, HeldLease, Limits, Step
from .superseding import Superseding

try:
    import redis
except ImportError:  # with another broker, whose workers receive no wakes
    redis = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: Seconds between two sweeps of a worker, and of one whose project has no ordered handler: lanes of
#: a handler that was one may not be empty.
SWEEP_SECONDS = 2.0
_SWEEP_OTHERS_SECONDS = 20.0
#: Seconds before a lane is given back after an error that is not the handler's.
_PAUSE_SECONDS = 1.0
#: A lease is renewed this many times before it runs out.
_RENEWALS = 3
#: How Redis begins a refusal of writes that may pass. redis-py removes the first word of some.
_REFUSED_FOR_NOW = re.compile(
    "OOM|NOREPLICAS|MISCONF|READONLY|LOADING|BUSY|command not allowed when used memory"
)
#: Seconds between two warnings of a sweep that keeps failing.
_WARN_SECONDS = 60.0
#: The errors of a task whose worker process has ended.
_PROCESS_ENDED = (WorkerLostError, SystemExit, KeyboardInterrupt)


def wake(task: Any, source: str, handler: str, lane: str) -> None:
    """Drain a lane: the body of the task `flash_celery.wake`."""
    app, request = task.app, task.request
    hostname = str(request.hostname)
    if handler not in app.tasks:
        logger.error(
            "This worker has no task %s, whose lane %s waits; another worker of its queue must "
            "have it",
            escaped(handler),
            escaped(lane),
        )
        return
    main_process = os.getppid() if _in_child() else os.getpid()
    calls = HandlerCalls(app, traced(app, handler, hostname), source, hostname, main_process)
    if connection.is_rabbitmq(app):
        address = amqp_wake.address((source, handler, lane), request.delivery_info)
        amqp_wake.drain(task, calls, address)
        return
    store = connection.store(app, source, handler)
    seconds = float(setting(app, "flash_lane_lease"))
    token = f"{_beginning(request.id, hostname)}{uuid.uuid4().hex}"
    lease = HeldLease(store, lane, token, seconds, now)
    letters = LaneLetters(store.client, store.key)
    calls.superseding = Superseding(letters, source, int(lane), calls.subscriptions)
    budget = Limits(float(setting(app, "flash_lane_budget")))
    drain = Drain(lease, calls, budget, outcome.is_stopping)
    calls.on_limit = drain.end_with
    calls.former = store.former_layout
    _run(drain, lease)


def _in_child() -> bool:
    """Return whether this is a child process of prefork."""
    return bool(current_process()._identity)


def _beginning(wake_id: Any, hostname: str) -> str:
    """Return how the tokens of a wake's drains begin in this worker."""
    return f"{wake_id}|{hostname}|"


def _run(drain: Drain, lease: HeldLease) -> None:
    """Run the steps of a drain, while another thread renews its lease."""
    renewal = _Renewal(lease)
    steps = drain.steps()
    reply = None
    try:
        try:
            while True:
                try:
                    step = steps.send(reply)
                except StopIteration:
                    return
                reply = _attempt(step, lease)
                renewal.begin()
        finally:
            renewal.end()
    except LostLease:
        logger.info("The lane %s is another worker's now", lease.lane)
    except redis.RedisError:
        # The handler may have succeeded: that Redis does not take the result is no death.
        _give_back(lease, died=False)
        raise
    except BaseException:
        _give_back(lease, died=not outcome.is_stopping())
        raise


def _attempt(step: Step, lease: HeldLease) -> Any:
    """Make a request, again if the broker fails, as long as the lease is certain to run."""
    pauses = None
    while True:
        try:
            return step()
        except redis.RedisError as error:
            if not (_may_pass(error) and lease.certain):
                raise
            pauses = pauses or delays(0.1, 1.0)
            time.sleep(next(pauses))


def _may_pass(error: redis.RedisError) -> bool:
    """Return whether Redis may accept the same request later."""
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
        return True
    return isinstance(error, redis.ResponseError) and bool(_REFUSED_FOR_NOW.search(str(error)))


def _give_back(lease: HeldLease, died: bool) -> None:
    """Let another worker go on, after an error here."""
    if not outcome.is_stopping():
        time.sleep(_PAUSE_SECONDS)  # not too often: it may fail again at once
    # Unless the release arrives, the next claim counts a death.
    for pause in delays(0.1, 1.0):
        try:
            lease.store.release(lease.lane, lease.token, died)
            return
        except redis.RedisError as error:
            if died or not _may_pass(error) or now() > lease.until:
                logger.warning(
                    "The lane %s waits until its lease has run out: %s", lease.lane, error
                )
                return
            time.sleep(pause)


class _Renewal:
    """Renews a lease while a drain has it."""

    def __init__(self, lease: HeldLease) -> None:
        self._lease = lease
        self._alarm: Alarm | None = None
        self._ended = False

    def begin(self) -> None:
        """Begin, unless it has begun."""
        if self._alarm is None:
            self._schedule()

    def end(self) -> None:
        """Stop; once this returns, nothing is renewed any more."""
        self._ended = True
        if self._alarm is not None:
            self._alarm.cancel()

    def _schedule(self) -> None:
        self._alarm = call_at(now() + self._lease.seconds / _RENEWALS, self._renew)

    def _renew(self) -> None:
        if self._ended:
            return
        try:
            going_on = self._lease.renew()
        except redis.RedisError as error:
            logger.warning(
                "The lease of the lane %s could not be renewed: %s", self._lease.lane, error
            )
            going_on = True
        if going_on:
            self._schedule()


class WakeRequest(Request):  # type: ignore[misc] # Celery ships no types
    """A wake that a worker has received."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if connection.is_rabbitmq(self.app):
            with suppress(TypeError, ValueError):  # a wake that cannot be read
                amqp_sweep.watch(self.app, [self._address])

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Give the lane back if the process that drained it has ended, then do what Celery does."""
        error = exc_info.exception
        error = getattr(error, "exc", error)
        if isinstance(error, (Terminated, *_PROCESS_ENDED)):
            stopping = isinstance(error, Terminated) or outcome.is_stopping()
            self._release(died=not stopping)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _release(self, died: bool) -> None:
        if connection.is_rabbitmq(self.app):
            with suppress(TypeError, ValueError):  # a wake that cannot be read
                amqp_wake.wake_again(self.app, self._address, died)
            return
        try:
            source, handler, lane = self.args
            store = connection.store(self.app, source, handler)
            store.release(lane, _beginning(self.id, self.hostname), died)
        except (FlashError, redis.RedisError, TypeError, ValueError) as failure:
            logger.warning("A lane waits until its lease has run out: %s", escaped(str(failure)))

    @property
    def _address(self) -> Lane:
        return amqp_wake.address(self.args, self.delivery_info)


def strategy(task: Any, app: Any, consumer: Any) -> Any:
    """Return the function that receives wakes. Celery calls this when a worker starts."""
    if connection.fills_lanes(app):
        _sweep_regularly(app, consumer)
    return default(task, app, consumer)


def _sweep_regularly(app: Any, consumer: Any) -> None:
    earlier = getattr(consumer, "_flash_sweep", None)
    if earlier is not None:
        earlier.cancel()
    needed = _has_ordered_handlers(app)
    if needed or _has_lanes(app):
        seconds = SWEEP_SECONDS if needed else _SWEEP_OTHERS_SECONDS
        consumer._flash_sweep = consumer.timer.call_repeatedly(seconds, sweep, (app, needed))


def _has_lanes(app: Any) -> bool:
    """Return whether a handler on this broker is, or was, an ordered one; True if unknown."""
    if connection.is_rabbitmq(app):
        return True  # a process sweeps only lanes of which it has seen a wake
    try:
        if connection.connection(app).all_keys():
            return True
    except redis.exceptions.NoPermissionError:
        pass  # an ACL forbids lanes to this project
    except (PublishError, redis.RedisError):
        return True
    connection.close(app)
    return False


def _has_ordered_handlers(app: Any) -> bool:
    return any(
        declaration.subscription is not None and declaration.subscription.ordered is not None
        for task in app.tasks.values()
        for declaration in task.__dict__.get("flash_subscriptions", ())
    )


def sweep(app: Any, needed: bool = True) -> None:
    """Wake the lanes of all handlers on the broker whose time has come.

    Args:
        app: The Celery app.
        needed: Whether it has ordered handlers; an ACL may forbid lanes to others.
    """
    if connection.is_rabbitmq(app):
        amqp_wake.sweep_known(app)
        return
    try:
        here = connection.connection(app)
        for key in here.all_keys():
            try:
                here.store(key).sweep()
            except redis.ResponseError as error:  # it must not stop the lanes of other handlers
                _warn(key, error)
    except redis.ResponseError as error:
        if needed or not isinstance(error, redis.exceptions.NoPermissionError):
            _warn(REGISTRY, error)
    except (PublishError, redis.RedisError) as error:
        logger.debug("Cannot sweep %s: %s", REGISTRY, error)


#: When each sweep that fails may be warned of again, by its key.
_silent_until: dict[str, float] = {}


def _warn(key: str, error: Exception) -> None:
    """Warn that lanes cannot be swept, once a minute at most."""
    if now() >= _silent_until.get(key, 0.0):
        _silent_until[key] = now() + _WARN_SECONDS
        logger.warning(
            "Cannot wake the lanes of %s, whose retries and killed workers' changes wait: %s",
            escaped(key),
            escaped(str(error)),
        )
