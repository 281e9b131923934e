"""Whether the client library of the broker is there: Redis' is an extra."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from typing import Any

from .errors import ConfigurationError

#: What the transports of `kombu.transport.redis` are called in a broker's URL.
_REDIS = re.compile(r"\b(redis|rediss|sentinel)(\+\w+)?://")
_URLS = "broker_url", "broker_read_url", "broker_write_url"


def require(app: Any) -> None:
    """Raise `ConfigurationError` if the app's broker is Redis and kombu has no client for it."""
    if not any(_REDIS.search(str(app.conf.get(name))) for name in _URLS):
        return
    try:
        missing = import_module("kombu.transport.redis").redis is None
    except ImportError:
        missing = True
    if missing:
        raise ConfigurationError(
            "The broker is Redis, and its client is not installed: "
            "pip install 'flash-celery[redis]'."
        )


def refuse(instance: Any, **_: Any) -> None:
    """End a Celery worker that starts without it: what Celery raises names neither."""
    try:
        require(instance.app)
    except ConfigurationError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)
