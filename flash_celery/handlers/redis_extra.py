"""The optional client library of Redis: refuse to start without it if the broker is Redis."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from typing import Any

from ..errors import ConfigurationError

#: The schemes that kombu maps to its Redis transports.
_REDIS = re.compile(r"\b(redis|rediss|sentinel)(\+\w+)?://")
_URLS = "broker_url", "broker_read_url", "broker_write_url"


def require(app: Any) -> None:
    """Raise `ConfigurationError` if the app's broker is Redis and the client is not installed."""
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
    """Exit from a Celery worker that lacks the client; Celery's own error would not name it.

    A receiver of Celery's signal `celeryd_init`.
    """
    try:
        require(instance.app)
    except ConfigurationError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)
