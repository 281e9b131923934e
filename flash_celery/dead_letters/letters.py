"""The format of a dead letter: the record of a task that failed for good.

A dead letter holds the task's message as the worker received it, so that the task can be retried
unchanged, and the error. It travels as the only argument of a message for the task
`flash_celery.dead`. No app has a task of that name: a worker that consumes the dead-letter queue by
mistake requeues the messages (see `failed_tasks`). This is version 1 of the format;
docs/howto/dead-letters.md describes the fields.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from typing import Any

from kombu.utils.json import dumps, loads

from ..changes import labels, payload
from ..changes.change import Change, Changes
from ..errors import PayloadError
from ..escaping import escaped
from ..messages.task_message import HELD, Form, Message
from ..table_name import TableName

VERSION = 1
#: The task name in the headers of a dead letter's message. No app has a task of this name.
TASK = "flash_celery.dead"
#: The header of a task message that counts the worker processes that died while running the task.
DEATHS = "flash_deaths"
#: The header of a task message with the time at which the task first failed for good.
FIRST_FAILED = "flash_first_failed_at"

_PERSISTENT = 2
#: The most characters kept of a traceback.
_MAX_TRACEBACK = 16_000
#: The most characters kept of an error's text.
_MAX_ERROR_TEXT = 2_000
#: The most change ids kept of a batch.
_MAX_CHANGE_IDS = 100
#: The most characters kept of an `argsrepr`.
_MAX_ARGSREPR = 200
#: Headers of one delivery (its schedule, its transport), which a retry must not repeat.
_DROPPED_HEADERS = {"compression", "eta", "expires", "retries", DEATHS, FIRST_FAILED, HELD}


@dataclass(frozen=True)
class DeadLetter:
    """A task that failed for good, with its message as the worker received it."""

    #: The task's id.
    id: str
    #: The task's name.
    handler: str
    #: The queue the message came from, and the message's priority there.
    queue: str
    priority: int | None
    #: The exception's class name, text and traceback.
    error: str
    message: str
    traceback: str
    #: Times are ISO 8601 in UTC. `started_at` is when the last attempt started.
    failed_at: str
    first_failed_at: str
    started_at: str | None
    #: How many times Celery retried the task before it failed.
    retries: int
    #: How many worker processes died while running the task.
    deaths: int
    #: Host name of the worker.
    worker: str
    #: The tables and ids of the changes; empty if the message cannot be read.
    tables: list[str]
    changes: list[str]
    #: The number of changes; `changes` lists the first 100.
    count: int
    commit_lsn: str | None
    committed_at: str | None
    argsrepr: str
    #: The headers and the body of the task's message.
    headers: dict[str, Any] = field(repr=False)
    body: str = field(repr=False)
    #: Whether `body` is in base64, because it is not UTF-8 text.
    binary: bool
    content_type: str
    content_encoding: str

    @property
    def summary(self) -> str:
        """The error in one line."""
        first_lines = self.message.strip().splitlines()[:1]
        return f"{self.error}: {first_lines[0]}" if first_lines else self.error

    @property
    def age(self) -> float:
        """Seconds since the task failed."""
        failed = datetime.fromisoformat(self.failed_at)
        return (datetime.now(timezone.utc) - failed).total_seconds()


def from_message(
    message: Any,
    queue: str,
    *,
    error: str,
    text: str,
    traceback: str,
    arguments: Any = (),
    started_at: float | None = None,
    worker: str = "",
) -> DeadLetter:
    """Make a dead letter of a task message that a worker received.

    Args:
        message: The message as kombu delivers it.
        queue: The queue that it came from.
        error: The class name of the exception.
        text: The exception's text; shortened to 2,000 characters.
        traceback: The traceback; shortened to 16,000 characters.
        arguments: The task's positional arguments, if they could be decoded.
        started_at: When the last attempt started, in seconds since 1970.
        worker: Host name of the worker.
    """
    headers, properties = message.headers, message.properties or {}
    priority = properties.get("priority")
    now = _iso(datetime.now(timezone.utc))
    changes = _changes_among(arguments)
    tables = dict.fromkeys(_table(change) for change in changes)
    body, binary = _as_text(message.body)
    return DeadLetter(
        id=_task_id(headers.get("id")),
        handler=str(headers.get("task")),
        queue=queue,
        priority=priority if isinstance(priority, int) else None,
        error=error,
        message=_shortened(text, _MAX_ERROR_TEXT),
        traceback=_shortened(traceback, _MAX_TRACEBACK),
        failed_at=now,
        first_failed_at=str(headers.get(FIRST_FAILED) or now)[:40],
        started_at=None
        if started_at is None
        else _iso(datetime.fromtimestamp(started_at, timezone.utc)),
        retries=_count(headers.get("retries")),
        deaths=deaths_of(headers),
        worker=worker,
        tables=list(tables),
        changes=[change.id for change in changes[:_MAX_CHANGE_IDS]],
        count=len(changes),
        commit_lsn=str(changes[0].commit_lsn) if changes else None,
        committed_at=_iso(changes[0].committed_at) if changes else None,
        argsrepr=_argsrepr(changes) or escaped(str(headers.get("argsrepr") or "")[:_MAX_ARGSREPR]),
        headers={
            name: value
            for name, value in headers.items()
            if name not in _DROPPED_HEADERS and not name.startswith("x-")
        },
        body=body,
        binary=binary,
        content_type=message.content_type or "application/json",
        content_encoding=message.content_encoding or "utf-8",
    )


def encode(app: Any, letter: DeadLetter, queue: str) -> Message:
    """Return the message that stores a dead letter in the queue of this name."""
    task_message = app.amqp.as_task_v2(
        letter.id,
        TASK,
        argsrepr=escaped(f"{letter.handler}: {_shortened(letter.summary, 200)}"),
        kwargsrepr="{}",
        ignore_result=True,
    )
    body = dumps([[{"v": VERSION, **asdict(letter)}], {}, task_message.body[2]])
    properties = {**task_message.properties, "delivery_mode": _PERSISTENT}
    return Message.alone(Form(queue, TASK, task_message.headers, properties), body)


def decode(body: str | bytes) -> DeadLetter:
    """Return the dead letter in a message's body.

    The changes in it stay encoded: they may be the reason why the task failed.

    Raises:
        PayloadError: The body is not a dead letter, or has another version.
    """
    try:
        value = loads(body)[0][0]
        if value.pop("v") != VERSION:
            raise PayloadError("This dead letter was written by another version of flash-celery.")
        return _checked(DeadLetter(**value))
    except PayloadError:
        raise
    except Exception as error:  # kombu's decoders of custom types may raise anything
        raise PayloadError(f"This is not a dead letter: {error!r:.200}.") from error


def _checked(letter: DeadLetter) -> DeadLetter:
    """Return the letter if each field has its type: anyone may have written to the queue."""
    for dataclass_field in fields(DeadLetter):
        value = getattr(letter, dataclass_field.name)
        if not isinstance(value, _FIELD_TYPES[str(dataclass_field.type)]):
            raise TypeError(f"{dataclass_field.name} is {value!r:.50}")
    if not all(isinstance(name, str) for name in (*letter.tables, *letter.changes)):
        raise TypeError("tables and changes must be strings")
    if datetime.fromisoformat(letter.failed_at).tzinfo is None:
        raise ValueError("failed_at has no time zone")
    return letter


_FIELD_TYPES: dict[str, Any] = {
    "str": str,
    "str | None": (str, type(None)),
    "int": int,
    "int | None": (int, type(None)),
    "bool": bool,
    "list[str]": list,
    "dict[str, Any]": dict,
}


def retry_message(letter: DeadLetter) -> Message:
    """Return the task's message for its queue, with the same task id and no retries used."""
    body = b64decode(letter.body) if letter.binary else letter.body
    return _task_message(letter, letter.id, letter.argsrepr, body)


def split_retry_messages(letter: DeadLetter) -> list[Message]:
    """Return the messages that retry each change of a batch in a task of its own.

    Raises:
        PayloadError: The changes cannot be read.
    """
    changes = changes_of(letter)
    if len(changes) < 2:
        return [retry_message(letter)]
    arguments, keywords, embedded = json.loads(letter.body)
    messages = []
    for position, change in enumerate(changes):
        value = payload.value_of([change])
        batch_of_one = {"__type__": payload.CHANGES, "__value__": value}
        body = json.dumps([[batch_of_one, *arguments[1:]], keywords, embedded])
        # Different from the batch's id, and the same each time the letter is split.
        task_id = f"{letter.id}-{position}"
        argsrepr = labels.batch(1, change)[:_MAX_ARGSREPR]
        messages.append(_task_message(letter, task_id, argsrepr, body))
    return messages


def changes_of(letter: DeadLetter) -> list[Change]:
    """Return the changes of the failed task.

    Raises:
        PayloadError: They cannot be read.
    """
    return changes_in(letter.body)


def with_changes(letter: DeadLetter, changes: Sequence[Change]) -> DeadLetter:
    """Return a letter with other changes in its message, whose changes can be read."""
    arguments, keywords, embedded = json.loads(letter.body)
    # A batch of one transaction has the number of its part beside the changes.
    value = {**arguments[0]["__value__"], **payload.value_of(changes)}
    argument = {**arguments[0], "__value__": value}
    return replace(letter, body=json.dumps([[argument, *arguments[1:]], keywords, embedded]))


def changes_in(body: str | bytes) -> list[Change]:
    """Return the changes in the body of a task message.

    Raises:
        PayloadError: They cannot be read.
    """
    try:
        value = json.loads(body)[0][0]["__value__"]
    except (KeyError, IndexError, RecursionError, TypeError, ValueError):
        raise PayloadError("No changes can be read from its message.") from None
    return payload.decode(value)


def _task_message(letter: DeadLetter, task_id: str, argsrepr: str, body: str | bytes) -> Message:
    headers = {
        **letter.headers,
        "id": task_id,
        "retries": 0,
        "argsrepr": argsrepr,
        "eta": None,
        "expires": None,
        FIRST_FAILED: letter.first_failed_at,
    }
    if headers.get("root_id") == letter.id:
        headers["root_id"] = task_id
    properties: dict[str, Any] = {"correlation_id": task_id, "delivery_mode": _PERSISTENT}
    if letter.priority is not None:
        properties["priority"] = letter.priority
    form = Form(
        letter.queue,
        letter.handler,
        headers,
        properties,
        letter.content_type,
        letter.content_encoding,
    )
    return Message.alone(form, body)


def deaths_of(headers: Mapping[str, Any]) -> int:
    """Return how many worker processes have died while running a task, by its headers."""
    return _count(headers.get(DEATHS))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _task_id(value: Any) -> str:
    """Return the id as ASCII, cut to what AMQP accepts as a correlation id."""
    return str(value).encode("ascii", "backslashreplace").decode()[:200]


def _changes_among(arguments: Any) -> list[Change]:
    changes: list[Change] = []
    # The arguments of a forged message may have any type.
    for argument in arguments if isinstance(arguments, (list, tuple)) else ():
        if isinstance(argument, Change):
            changes.append(argument)
        elif isinstance(argument, Changes):
            changes += argument
    return changes


def _argsrepr(changes: Sequence[Change]) -> str:
    """Return the `argsrepr` of the first attempt; Celery's retries overwrite the header."""
    if not changes:
        return ""
    first = changes[0]
    described = repr(first) if len(changes) == 1 else labels.batch(len(changes), first)
    return described[:_MAX_ARGSREPR]


def _table(change: Change) -> str:
    return str(TableName(change.schema, change.table)) if change.schema else change.table


def _as_text(body: Any) -> tuple[str, bool]:
    """Return the body as text, and whether the text is base64."""
    if isinstance(body, str):
        return body, False
    try:
        return bytes(body).decode(), False
    except UnicodeDecodeError:
        return b64encode(body).decode(), True


def _shortened(text: str, limit: int) -> str:
    """Cut the middle out of a long text; a traceback's end matters most."""
    if len(text) <= limit:
        return text
    head = limit // 4
    return f"{text[:head]}\n… {len(text) - limit} characters …\n{text[head - limit :]}"


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
