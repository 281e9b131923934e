"""Whether the JSON serializer of this process decodes changes: a project may replace it."""

from __future__ import annotations

import sys
from typing import Any

from kombu.serialization import dumps, loads

from ..errors import ConfigurationError
from ..protocol.lsn import Lsn
from ..protocol.pgoutput import encode_row
from . import deliveries, payload
from .operations import Part
from .rows import Column, Table, Transaction

_TABLE = Table("public", "orders", None, "d", ("id",), (Column("id", 23, "integer", True),))
_ROW = encode_row("I", 0, None, None, [b"5"])
_CHANGE = payload.change_of(
    deliveries.Delivery(_TABLE, Transaction(Lsn(1), 1, 0), 0, Part.WHOLE, 0, [_ROW])
)


def require_decodable() -> None:
    """Raise `ConfigurationError` unless kombu's serializer `json` encodes and decodes changes."""
    try:
        (received,) = loads(_body(), "application/json", "utf-8", force=True)
        if received == _CHANGE:  # a handler may also pass it on
            content_type, encoding, text = dumps([received], serializer="json")
            (received,) = loads(text, content_type, encoding, force=True)
        problem = "" if received == _CHANGE else f"a {type(received).__name__}"
    except Exception as error:  # whatever another serializer raises
        problem = f"the error {type(error).__name__}"
    if problem:
        raise ConfigurationError(
            "The serializer 'json' of this project has replaced kombu's own and makes of a change "
            f"{problem}; register it in kombu under a name and a content type of its own."
        )


def _body() -> str:
    """Return a change as the replication worker writes it."""
    value = payload.encode([payload.delivery_of(_CHANGE)])
    return f'[{{"__type__":"{payload.CHANGE}","__value__":{value}}}]'


def refuse(instance: Any, **_: Any) -> None:
    """Exit from a Celery worker with handlers whose JSON serializer does not decode changes.

    A receiver of Celery's signal `celeryd_init`.
    """
    if not any(hasattr(task, "flash_subscriptions") for task in instance.app.tasks.values()):
        return
    try:
        require_decodable()
    except ConfigurationError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)
