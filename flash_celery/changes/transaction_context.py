"""The context of a transaction: what the application says about it, for `change.context`.

It travels as a logical message with the prefix `flash.context`, whose content is a JSON object in
ASCII. It holds for the changes behind it, until the next such message of the transaction. This
module has the format, and the values that hold where the application writes. `handlers.context`
writes them into transactions.

Any role may call pg_logical_emit_message. So nothing is decided by a context alone that would lose
a change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

#: The prefix of the messages.
PREFIX = "flash.context"
#: Bytes of a context at most: it is in each task message of the transaction's changes.
MAX_BYTES = 4096
#: What handlers say about themselves.
HANDLER, CHANGE, DEPTH = "handler", "change", "depth"
RESERVED = frozenset({HANDLER, CHANGE, DEPTH})
#: `json.dumps` with options would make one each time.
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def encode(values: Mapping[str, Any]) -> str:
    """Return the JSON text of a context.

    Raises:
        ValueError: A value is not one of JSON, or the context is too large.
    """
    try:
        text = _ENCODER.encode(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"A context takes texts, numbers, booleans, None, lists and dicts: {error}."
        ) from None
    if len(text) > MAX_BYTES:
        raise ValueError(
            f"The context has {len(text)} bytes of JSON, and {MAX_BYTES} at most; leave out or "
            f"shorten some of {', '.join(values)}."
        )
    return text


def decode(content: bytes) -> str:
    """Return the JSON text of the context in a message; "" for an empty one.

    Raises:
        ValueError: It is not a context. Anyone may have written it.
    """
    if len(content) > MAX_BYTES:
        raise ValueError("it is too large")
    try:
        values = json.loads(content, parse_constant=_refuse)
        # A lone surrogate has no UTF-8, so the task message would not be readable.
        json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    text = json.dumps(values, separators=(",", ":"))
    if len(text) > MAX_BYTES:
        raise ValueError("it is too large")
    return text if values else ""


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class Layer(NamedTuple):
    """Values that hold in a block of the application."""

    #: Returns whether it holds for a connection.
    matches: Callable[[Any], bool]
    #: The values, or what returns them when they are first written.
    values: Mapping[str, Any] | Callable[[], Mapping[str, Any]]


def every_connection(connection: Any) -> bool:
    """Return True: a layer holds for each connection."""
    return True


_layers: ContextVar[tuple[Layer, ...]] = ContextVar("flash_celery_context", default=())


def layers() -> tuple[Layer, ...]:
    """Return the layers that hold here, the innermost last."""
    return _layers.get()


class layer:  # noqa: N801 - used as a function
    """Have values hold in the block, on top of those around it.

    Each call of a handler has one, and a generator would take three times as long.

    Args:
        matches: Returns whether they hold for a connection.
        values: The values, or what returns them when they are first written.
    """

    __slots__ = ("_layer", "_token")

    def __init__(
        self,
        matches: Callable[[Any], bool],
        values: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    ) -> None:
        self._layer = Layer(matches, values)
        self._token: Token[tuple[Layer, ...]]

    def __enter__(self) -> None:
        self._token = _layers.set((*_layers.get(), self._layer))

    def __exit__(self, *error: object) -> None:
        _layers.reset(self._token)


def text_for(connection: Any, some: tuple[Layer, ...]) -> str:
    """Return the JSON text of the context that layers give a connection; "" if they give none.

    Raises:
        ValueError: As for `encode`.
    """
    merged: dict[str, Any] = {}
    for matches, values in some:
        if matches(connection):
            merged.update(values() if callable(values) else values)
    return encode(merged) if merged else ""
