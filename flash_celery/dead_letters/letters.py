"""Dead letters: what is kept of a task that failed for good, as a message of the queue for them.

The queue holds messages of a task that nobody runs: a worker that consumes the queue by mistake
puts them back (see `dead`). Version 1; docs/reliability.md says what is in one.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from typing import Any

from kombu.utils.json import dumps, loads

from ..changes import labels, payload
from ..changes.change import Change, Changes
from ..errors import PayloadError
from ..escaping import escaped
from ..messages.templates import PARKED, Form, Message
from ..table_name import TableName

VERSION = 1
#: The name in the headers of the messages. No app has a task of this name.
TASK = "flash_celery.dead"
#: How often the process of a task has died, in the headers of its message.
DEATHS = "flash_deaths"
#: When a task failed for good for the first time, in the headers of its message.
FIRST_FAILED = "flash_first_failed_at"

_PERSISTENT = 2
#: How many characters of a traceback and of an error are kept, and how many ids of a batch.
_TRACEBACK, _MESSAGE, _IDS = 16_000, 2_000, 100
#: Headers that say how a message travelled, or when it should have run.
_NOT_KEPT = {"compression", "eta", "expires", "retries", DEATHS, FIRST_FAILED, PARKED}


@dataclass(frozen=True)
class Letter:
    """A task that failed for good, with its message as it was received."""

    id: str
    handler: str
    #: The queue it came from, and its priority there.
    queue: str
    priority: int | None
    #: Type of the exception, what it says, and the traceback.
    error: str
    message: str
    traceback: str
    #: Times are ISO 8601, UTC. `started_at` is of the last attempt.
    failed_at: str
    first_failed_at: str
    started_at: str | None
    #: Retries before it failed, and processes it has ended.
    retries: int
    deaths: int
    worker: str
    #: What the changes are; empty where the message cannot be read.
    tables: list[str]
    changes: list[str]
    count: int
    commit_lsn: str | None
    committed_at: str | None
    argsrepr: str
    #: The message.
    headers: dict[str, Any] = field(repr=False)
    body: str = field(repr=False)
    #: Whether the body is in base64, for it is no text.
    binary: bool
    content_type: str
    content_encoding: str

    @property
    def summary(self) -> str:
        """The error in one line."""
        first = self.message.strip().splitlines()[:1]
        return f"{self.error}: {first[0]}" if first else self.error

    @property
    def age(self) -> float:
        """Seconds since it failed."""
        failed = datetime.fromisoformat(self.failed_at)
        return (datetime.now(timezone.utc) - failed).total_seconds()


def write(
    message: Any,
    where: str,
    error: str,
    text: str,
    traceback: str,
    arguments: Any = (),
    started_at: float | None = None,
    worker: str = "",
) -> Letter:
    """A letter about a message that a worker received from the queue `where`."""
    headers, properties = message.headers, message.properties or {}
    priority = properties.get("priority")
    now = _iso(datetime.now(timezone.utc))
    changes = _changes(arguments)
    tables = dict.fromkeys(_table(change) for change in changes)
    body, binary = _text(message.body)
    return Letter(
        id=_task_id(headers.get("id")),
        handler=str(headers.get("task")),
        queue=where,
        priority=priority if isinstance(priority, int) else None,
        error=error,
        message=_bounded(text, _MESSAGE),
        traceback=_bounded(traceback, _TRACEBACK),
        failed_at=now,
        first_failed_at=str(headers.get(FIRST_FAILED) or now)[:40],
        started_at=None
        if started_at is None
        else _iso(datetime.fromtimestamp(started_at, timezone.utc)),
        retries=_count(headers.get("retries")),
        deaths=deaths_of(headers),
        worker=worker,
        tables=list(tables),
        changes=[change.id for change in changes[:_IDS]],
        count=len(changes),
        commit_lsn=str(changes[0].commit_lsn) if changes else None,
        committed_at=_iso(changes[0].committed_at) if changes else None,
        argsrepr=_described(changes) or escaped(str(headers.get("argsrepr") or "")[:200]),
        headers={
            name: value
            for name, value in headers.items()
            if name not in _NOT_KEPT and not name.startswith("x-")
        },
        body=body,
        binary=binary,
        content_type=message.content_type or "application/json",
        content_encoding=message.content_encoding or "utf-8",
    )


def seal(app: Any, letter: Letter, name: str) -> Message:
    """The message that keeps a letter in the queue `name`."""
    made = app.amqp.as_task_v2(
        letter.id,
        TASK,
        argsrepr=escaped(f"{letter.handler}: {_bounded(letter.summary, 200)}"),
        kwargsrepr="{}",
        ignore_result=True,
    )
    body = dumps([[{"v": VERSION, **asdict(letter)}], {}, made.body[2]])
    properties = {**made.properties, "delivery_mode": _PERSISTENT}
    return Message.alone(Form(name, TASK, made.headers, properties), body)


def unseal(body: str | bytes) -> Letter:
    """The letter in a message's body. Raises `PayloadError` if it is none, or of another version.

    Nothing in it is decoded: the changes may be what could not be.
    """
    try:
        value = loads(body)[0][0]
        if value.pop("v") != VERSION:
            raise PayloadError("This dead letter is of another version of flash-celery.")
        return _checked(Letter(**value))
    except PayloadError:
        raise
    except Exception as error:  # whatever the readers of kombu's types raise
        raise PayloadError(f"This is not a dead letter: {error!r:.200}.") from error


def _checked(letter: Letter) -> Letter:
    """The letter, if everything in it is of its type: the queue may hold anybody's."""
    for one in fields(Letter):
        value = getattr(letter, one.name)
        if not isinstance(value, _KINDS[str(one.type)]):
            raise TypeError(f"{one.name} is {value!r:.50}")
    if not all(isinstance(one, str) for one in (*letter.tables, *letter.changes)):
        raise TypeError("tables and changes are names")
    if datetime.fromisoformat(letter.failed_at).tzinfo is None:
        raise ValueError("failed_at is in no time zone")
    return letter


_KINDS: dict[str, Any] = {
    "str": str,
    "str | None": (str, type(None)),
    "int": int,
    "int | None": (int, type(None)),
    "bool": bool,
    "list[str]": list,
    "dict[str, Any]": dict,
}


def again(letter: Letter) -> Message:
    """The message for its queue, to be handled afresh: the same task id and the same changes."""
    body = b64decode(letter.body) if letter.binary else letter.body
    return _message(letter, letter.id, letter.argsrepr, body)


def split(letter: Letter) -> list[Message]:
    """The same, with a message for each change of a batch. Raises `PayloadError`."""
    changes = contents(letter)
    if len(changes) < 2:
        return [again(letter)]
    arguments, keywords, embedded = json.loads(letter.body)
    messages = []
    for number, change in enumerate(changes):
        value = json.loads(payload.encode([payload.delivery_of(change)]))
        one = [{"__type__": payload.CHANGES, "__value__": value}, *arguments[1:]]
        body = json.dumps([one, keywords, embedded])
        # Not the whole batch's id, and the same if it is sent again.
        task_id = f"{letter.id}-{number}"
        messages.append(_message(letter, task_id, labels.batch(1, change)[:200], body))
    return messages


def contents(letter: Letter) -> list[Change]:
    """Its changes. Raises `PayloadError` where they cannot be read."""
    return changes_in(letter.body)


def changes_in(body: str | bytes) -> list[Change]:
    """The changes in a message's body. Raises `PayloadError` where they cannot be read."""
    try:
        value = json.loads(body)[0][0]["__value__"]
    except (KeyError, IndexError, RecursionError, TypeError, ValueError):
        raise PayloadError("No changes can be read from its message.") from None
    return payload.decode(value)


def _message(letter: Letter, task_id: str, argsrepr: str, body: str | bytes) -> Message:
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
    kind = letter.content_type, letter.content_encoding
    return Message.alone(Form(letter.queue, letter.handler, headers, properties, *kind), body)


def deaths_of(headers: Mapping[str, Any]) -> int:
    """How often the process of a task has died, as its message says."""
    return _count(headers.get(DEATHS))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _task_id(value: Any) -> str:
    """The id, or as much of it as AMQP takes for a correlation id."""
    return str(value).encode("ascii", "backslashreplace").decode()[:200]


def _changes(arguments: Any) -> list[Change]:
    found: list[Change] = []
    # Of a forged message they may be anything.
    for argument in arguments if isinstance(arguments, (list, tuple)) else ():
        if isinstance(argument, Change):
            found.append(argument)
        elif isinstance(argument, Changes):
            found += argument
    return found


def _described(changes: Sequence[Change]) -> str:
    """What a message's argsrepr says, which a retry of Celery's writes anew."""
    if not changes:
        return ""
    first = changes[0]
    return (repr(first) if len(changes) == 1 else labels.batch(len(changes), first))[:200]


def _table(change: Change) -> str:
    return str(TableName(change.schema, change.table)) if change.schema else change.table


def _text(body: Any) -> tuple[str, bool]:
    if isinstance(body, str):
        return body, False
    try:
        return bytes(body).decode(), False
    except UnicodeDecodeError:
        return b64encode(body).decode(), True


def _bounded(text: str, limit: int) -> str:
    """Its beginning and its end; of a traceback the end says most."""
    if len(text) <= limit:
        return text
    head = limit // 4
    return f"{text[:head]}\n… {len(text) - limit} characters …\n{text[head - limit :]}"


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
