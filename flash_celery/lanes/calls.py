"""Call a handler for the changes at the head of a lane, through Celery's own tracer.

So `self.request`, signals, retries, results and `on_failure` are those of an ordinary task. What
differs: a retry publishes nothing, because the change stays where it is.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any, NamedTuple

from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject, Retry, TimeLimitExceeded
from celery.utils.serialization import UnpickleableExceptionWrapper

from ..changes import labels, payload
from ..changes.change import Call, Change, Changes
from ..changes.payload import CHANGE, CHANGES, delivery_of
from ..dead_letters import letters, outcome
from ..dead_letters.failed_tasks import setting, store_letter
from ..errors import ProcessKilled
from ..escaping import escaped, text_of
from ..handlers import once
from ..handlers.app_subscriptions import subscriptions_of_task
from ..handlers.celery_tasks import NOTED
from ..handlers.databases import Database
from ..handlers.subscriptions import Subscription
from ..messages.task_ids import task_id_of_batch, task_id_of_change
from ..messages.task_message import Form, Message
from .connection import is_rabbitmq
from .drain import Blocked, Head, Later, Step, Verdict
from .marks import LaneMark, Layout
from .superseding import Superseding
from .time_limits import time_limits

logger = logging.getLogger(__name__)

#: Seconds until a change that has neither succeeded nor failed is handled again: its dead letter
#: cannot be stored, or the handler has rejected it to receive it again.
_AGAIN_SECONDS = 1.0
#: The same while the database of `once=` is not set up.
_WAIT_SECONDS = 5.0
_NO_LIMITS: tuple[float | None, float | None] = (None, None)
#: Characters of `argsrepr`.
_ARGUMENT_LENGTH = 200


@dataclass(frozen=True)
class Traced:
    """A handler's task, and Celery's function that runs it."""

    task: Any
    trace: Callable[..., Any]
    #: The most changes of one call, or None for one change that is no batch.
    batch: int | None
    #: Whether a change that has failed for good blocks its lane.
    blocks: bool
    #: The database in whose transaction it runs, with marks of what was handled (`once=`).
    database: Database | None = None
    subscriptions: Sequence[Subscription] = ()


class _Call(NamedTuple):
    """One call of the handler."""

    head: Head
    #: The id of the task.
    id: str
    argsrepr: str
    #: Seconds since 1970.
    started_at: float


_traced: dict[tuple[int, Any, str], Traced] = {}


def traced(app: Any, handler: str, hostname: str) -> Traced:
    """Return a handler's task with its tracer, which is made once for each process."""
    key = os.getpid(), app, handler
    found = _traced.get(key)
    if found is None:
        task = app.tasks[handler]
        _keep_retries(task)
        tracer = build_tracer(task.name, task, app=app, hostname=hostname)
        subscriptions = subscriptions_of_task(task)
        batch = subscriptions[0].batch if subscriptions else None
        order = subscriptions[0].ordered if subscriptions else None

        def trace(*args: Any) -> tuple[int, Any, float]:
            result, info, duration, shown = tracer(*args)
            return (1, result, duration) if info else (0, shown, duration)

        blocks = order is not None and order.on_failure == "block"
        database = subscriptions[0].once if subscriptions else None
        size = batch.size if batch else None
        found = Traced(task, trace, size, blocks, database, subscriptions)
        _traced[key] = found
    return found


def _keep_retries(task: Any) -> None:
    """Have the retries of a task publish nothing in a lane, where the change stays.

    It notes them on the request, because with `throw=False` none is raised.
    """
    if "_flash_keeps_retries" in task.__dict__:
        return
    retry, signature = task.retry, task.signature_from_request

    def noted_on() -> list[Any] | None:
        return getattr(task.request, "flash_retries", None)

    def noted(*args: Any, **kwargs: Any) -> Any:
        result, noted = retry(*args, **kwargs), noted_on()
        if noted is not None:
            noted.append(result)
        return result

    def unpublished(*args: Any, **kwargs: Any) -> Any:
        # Celery makes it in `retry`, and publishes it. It would not publish that of an eager
        # request, but an eager task closes no dead connection of Django's, and replaces itself
        # within the worker.
        result = signature(*args, **kwargs)
        if noted_on() is not None:
            result.apply_async = lambda *_, **__: None
        return result

    task.__dict__.update(retry=noted, signature_from_request=unpublished, _flash_keeps_retries=True)


class HandlerCalls:
    """Calls one handler for one drain.

    Args:
        app: The Celery app.
        handler: Its task.
        source: The server and the slot, for the ids of tasks.
        hostname: The name of the worker.
        main_process: The process id of the worker's main process.
    """

    def __init__(
        self, app: Any, handler: Traced, source: str, hostname: str, main_process: int
    ) -> None:
        self._app = app
        self._handler = handler
        self._task = handler.task
        self._source = source
        self._hostname = hostname
        self._main_process = main_process
        self._form = Form("", str(handler.task.name), {}, {})
        #: The request of a call: each replaces what is its own in that of the last, because most is
        #: the same. Celery copies it.
        self._request: dict[str, Any] = {}
        #: The soft and the hard time limit of a call, in seconds.
        self._limits: tuple[float | None, float | None] = _NO_LIMITS
        self._layout = Layout("", 0)
        #: Returns the digest of the layout before the present one, whose lanes were empty.
        self.former: Callable[[], str] = lambda: ""
        self.size = handler.batch or 1
        self.subscriptions = handler.subscriptions
        #: Notes dead letters, where the broker has room for that.
        self.superseding: Superseding | None = None
        #: Whether the last call of the handler has ended well.
        self._ended_well = False
        #: Called with the verdict on changes whose handler has reached its hard time limit, and
        #: their number, on another thread and before the process is killed.
        self.on_limit: Callable[[Verdict, int], object] = lambda verdict, changes: None

    def read_form(self, text: bytes) -> None:
        """Read the text with everything that the handler's messages have in common."""
        value = json.loads(text)
        headers, properties = value["headers"], value["properties"]
        self._form = Form(value["queue"], str(self._task.name), headers, properties)
        self._layout = Layout(value.get("layout", ""), value.get("lanes", 0), self.former)
        self._request = {
            **headers,
            "hostname": self._hostname,
            "reply_to": properties.get("reply_to"),
            "delivery_info": {
                "exchange": "",
                "routing_key": value["queue"],
                "priority": properties.get("priority") or 0,
                "redelivered": False,
            },
            # Celery would look for custom headers among all of these, for each call.
            "headers": {},
        }
        if os.getpid() != self._main_process:  # Celery enforces none in other pools either
            hard, soft = headers.get("timelimit") or (None, None)
            self._limits = (
                soft or self._task.soft_time_limit or None,
                hard or self._task.time_limit or None,
            )

    def remaining(self, head: Head) -> Step | None:
        """Return what marks the dead letters that changes supersede which were handled, if any."""
        superseding = self.superseding
        if superseding is None or not self._ended_well:
            return None
        if not head.supersedes and not superseding.has_noted:
            return None
        return partial(superseding.handled, head.changes)

    def handle(self, head: Head) -> Verdict:
        """Handle changes, and store a dead letter if they fail for good."""
        call = self._call(head)
        self._ended_well = False
        if head.expires is not None and time.time() > head.expires:
            logger.info("Discarding expired task: %s", self._described(call))
            return None
        if head.deaths and head.deaths >= setting(self._app, "flash_max_deaths"):
            late = " or taken longer than RabbitMQ's consumer_timeout"
            how = f"died{late if is_rabbitmq(self._app) else ''}"
            killed = ProcessKilled(f"Its worker process has {how} {head.deaths} times")
            return self._failed(call, killed, "")
        retries: list[Any] = []
        mark = self._mark(head)
        request = self._request
        request["id"] = request["root_id"] = request["correlation_id"] = call.id
        request["argsrepr"] = call.argsrepr
        request["retries"] = head.retries
        request["flash_retries"] = retries
        request[once.MARK] = mark
        in_call = Call(head.fence, superseded=False)
        for change in head.changes:
            change._call = in_call
        arguments = [self._argument(head.changes)]
        trace = self._handler.trace
        run = partial(outcome.run, self._main_process, trace, call.id, arguments, {}, request)
        try:
            if self._limits == _NO_LIMITS:
                failed, result, _ = run()
            else:
                with time_limits(*self._limits, partial(self._reached_limit, call)):
                    failed, result, _ = run()
        finally:
            # `retry(max_retries=)` leaves it on the task, for the next change.
            self._task.__dict__.pop("override_max_retries", None)
        if mark is not None and mark.waits:
            return Later(_WAIT_SECONDS, head.retries)
        error = _restored(result) if failed else None
        if retries and not isinstance(error, Retry):
            error = retries[-1]
        if isinstance(error, Retry):
            return Later(_seconds_until(error.when), head.retries + 1)
        if isinstance(error, Reject) and error.requeue:
            return Later(_AGAIN_SECONDS, head.retries)
        if error is None or isinstance(error, (Reject, Ignore)):
            self._ended_well = True
            return None
        return self._failed(call, error, str(result.traceback))

    def _mark(self, head: Head) -> LaneMark | None:
        """Return the mark of the changes' lane; None if they are to be handled in any case."""
        if self._handler.database is None or head.again:
            return None
        name = str(self._task.name)
        return LaneMark(name, self._source, self._layout, head.lane, head.fence or 0)

    def _pass_over(self, head: Head) -> None:
        """Move the mark past changes that are a dead letter now, which alone is retried."""
        mark, database = self._mark(head), self._handler.database
        if mark is None or database is None:
            return
        try:
            once.pass_over(database, mark, head.changes)
        except Exception as error:  # of a database that is down, for example
            logger.warning(
                "The mark of %s is not moved past its dead letter, because its database fails (%s)",
                escaped(self._form.task),
                type(error).__name__,
            )

    def _call(self, head: Head) -> _Call:
        changes = head.changes
        if self._handler.batch is None:
            task_id = task_id_of_change(self._source, self._task.name, changes[0].id)
            argsrepr = repr(changes[0])
        else:
            task_id = task_id_of_batch()
            argsrepr = labels.batch(len(changes), changes[0])
        return _Call(head, task_id, argsrepr[:_ARGUMENT_LENGTH], time.time())

    def _argument(self, changes: Sequence[Change]) -> Any:
        return changes[0] if self._handler.batch is None else Changes(changes)

    def _reached_limit(self, call: _Call) -> None:
        """Store the dead letter of changes whose handler does not end, then end this process."""
        hard = self._limits[1]
        logger.error("Hard time limit (%ss) exceeded for %s", hard, self._described(call))
        try:
            verdict = self._failed(call, TimeLimitExceeded(hard), "")
            self.on_limit(verdict, len(call.head.changes))
        finally:
            # Also if neither could be stored: the next drain tries again.
            os.kill(os.getpid(), signal.SIGKILL)

    def _failed(self, call: _Call, error: BaseException, traceback: str) -> Verdict:
        """Return what to do with changes that have failed for good."""
        head, name = call.head, type(error).__name__
        if isinstance(error, UnpickleableExceptionWrapper):
            name = str(error.exc_cls_name)
        if self._handler.blocks:
            logger.error(
                "%s has failed, and blocks its lane until `flash lanes skip` or `flash lanes "
                "retry`: %s",
                self._described(call),
                escaped(text_of(error)),
            )
            reason = {
                "id": head.changes[0].id,
                "changes": len(head.changes),
                "error": name,
                "message": escaped(text_of(error))[:500],
                "failed_at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            }
            return Blocked(json.dumps(reason))
        noted = self.superseding.note(head.changes) if self.superseding is not None else None
        letter = letters.from_message(
            self._message(call, noted),
            self._form.queue,
            error=name,
            text=text_of(error),
            traceback=traceback,
            arguments=[self._argument(head.changes)],
            started_at=call.started_at,
            worker=self._hostname,
        )
        if store_letter(self._app, letter):
            self._pass_over(head)
            return None
        return Later(_AGAIN_SECONDS, head.retries)

    def _message(self, call: _Call, noted: Any) -> Message:
        """Return the task message that the changes would have without lanes.

        Args:
            call: The call.
            noted: What it has to know of the lanes, or None.
        """
        own = {
            "id": call.id,
            "root_id": call.id,
            "argsrepr": call.argsrepr,
            "retries": call.head.retries,
            letters.DEATHS: call.head.deaths,
        }
        if noted is not None:
            own[NOTED] = noted
        headers = {**self._form.headers, **own}
        properties = {**self._form.properties, "correlation_id": call.id}
        kind = CHANGE if self._handler.batch is None else CHANGES
        form = Form(self._form.queue, self._form.task, headers, properties)
        return Message.alone(form, _body(kind, call.head.changes))

    def _described(self, call: _Call) -> str:
        return escaped(f"{self._form.task}[{call.id}] ({call.argsrepr})")


def _body(kind: str, changes: Sequence[Change]) -> str:
    value = payload.encode([delivery_of(change) for change in changes])
    return (
        f'[[{{"__type__":"{kind}","__value__":{value}}}],{{}},'
        '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'
    )


def _restored(result: Any) -> BaseException:
    error = result.exception
    return error.restored() if isinstance(error, outcome.Failure) else error


def _seconds_until(when: Any) -> float:
    """Return the countdown of a `Retry`, whose `when` is seconds or a moment."""
    if when is None:
        return 0.0
    if isinstance(when, datetime):
        now = datetime.now(timezone.utc) if when.tzinfo else datetime.now()
        return max((when - now).total_seconds(), 0.0)
    return max(float(when), 0.0)
