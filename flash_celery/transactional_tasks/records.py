"""The tasks in a message: everything that their sender gave to the broker.

The body of a message is JSON: the queues to declare, and for each task a list of the fields of
`TaskRecord`, in their order. Headers and properties are JSON in JSON, because the replication
worker forwards their text.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from kombu.entity import Exchange, Queue, binding

from ..errors import TaskRefused, TransactionError

#: Characters after which gathered tasks are written.
MOST_CHARACTERS = 1 << 20
#: JSON writes a character in at most so many bytes, a surrogate pair.
_LONGEST_CHARACTER = 12
#: The attributes of kombu's entities that a declaration consists of.
_EXCHANGE = ("name", "type", "arguments", "durable", "auto_delete", "delivery_mode", "no_declare")
_QUEUE = (
    "name",
    "routing_key",
    "queue_arguments",
    "binding_arguments",
    "durable",
    "exclusive",
    "auto_delete",
    "no_declare",
    "expires",
    "message_ttl",
    "max_length",
    "max_length_bytes",
    "max_priority",
)


class TaskRecord(NamedTuple):
    """A task message as Celery gave it to kombu, and kombu to the broker's client."""

    task: str
    id: str
    exchange: str
    routing_key: str
    priority: int | None
    content_type: str
    content_encoding: str
    #: The body; in Base64 if `binary`.
    body: str
    binary: bool
    #: JSON as kombu writes it.
    headers: str
    properties: str
    #: The descriptions of what is declared first (`describe`).
    declare: tuple[str, ...]

    @property
    def content(self) -> str | bytes:
        """The body as it was given."""
        return b64decode(self.body) if self.binary else self.body

    @property
    def size(self) -> int:
        """How many characters it takes, roughly."""
        return len(self.body) + len(self.headers) + len(self.properties) + 200


def encode_content(body: str | bytes) -> tuple[str, bool]:
    """Return the `body` and `binary` of a record."""
    return (body, False) if isinstance(body, str) else (b64encode(body).decode(), True)


def longest(max_size: int) -> int:
    """Return the most bytes that the body of a message can have.

    Args:
        max_size: The most characters of a task (`flash_max_change_size`).
    """
    # The quotation marks of a body in JSON are escaped.
    return 2 * max_size + _LONGEST_CHARACTER * MOST_CHARACTERS


def encode(records: Sequence[TaskRecord]) -> bytes:
    """Return the body of a message."""
    declared = list(dict.fromkeys(each for record in records for each in record.declare))
    place = {each: number for number, each in enumerate(declared)}
    tasks = [[*record[:-1], [place[each] for each in record.declare]] for record in records]
    return json.dumps([declared, tasks], separators=(",", ":")).encode()


def decode(body: bytes) -> list[TaskRecord]:
    """Return the tasks in the body of a message.

    Raises:
        TaskRefused: They cannot be read.
    """
    try:
        declared, tasks = json.loads(body)
        return [
            TaskRecord._make([*fields, tuple([declared[place] for place in places])])
            for *fields, places in tasks
        ]
    except (IndexError, TypeError, ValueError) as error:
        raise TaskRefused(f"it cannot be read ({type(error).__name__})") from None


@lru_cache(1000)
def describe(entity: Any) -> str:
    """Return a description of a queue or an exchange, of which `entity_of` makes one.

    Raises:
        TransactionError: Its name is no text, or an argument is not one of JSON.
    """
    try:
        description = _description(entity)
        exchanges = entity, getattr(entity, "exchange", None)
        names = [each.name for each in exchanges if each is not None]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name is no text")
    except (TypeError, ValueError) as error:
        raise TransactionError(
            f"{type(entity).__name__} {entity.name!r} cannot be declared with a task ({error}); "
            "give names that are texts, and arguments that JSON has."
        ) from None
    return description


def _description(entity: Any) -> str:
    if isinstance(entity, Exchange):
        return json.dumps({"exchange": _exchange(entity)})
    values = _given(entity, Queue(), _QUEUE)
    values["bindings"] = [
        {
            "exchange": _exchange(each.exchange),
            "routing_key": each.routing_key,
            "arguments": each.arguments,
        }
        for each in entity.bindings or ()
    ]
    values["exchange"] = _exchange(entity.exchange)
    return json.dumps({"queue": {name: value for name, value in values.items() if value}})


def _exchange(exchange: Any) -> dict[str, Any]:
    return _given(exchange, Exchange(), _EXCHANGE) if exchange is not None else {}


def _given(entity: Any, default: Any, names: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(entity, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def entity_of(description: str) -> Any:
    """Return the queue or the exchange of a description."""
    value = json.loads(description)
    if "exchange" in value:
        return Exchange(**value["exchange"])
    queue = dict(value["queue"])
    bindings = [
        binding(Exchange(**each["exchange"]), each["routing_key"], each["arguments"])
        for each in queue.pop("bindings", ())
    ]
    return Queue(exchange=Exchange(**queue.pop("exchange", {})), bindings=bindings, **queue)


@lru_cache(1000)
def queue_name(description: str) -> str:
    """Return the name of the queue of a description; "" for an exchange."""
    return str(json.loads(description).get("queue", {}).get("name", ""))
