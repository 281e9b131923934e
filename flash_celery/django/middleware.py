"""Middleware that has what a request writes carry who and what it was: `change.context`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from inspect import iscoroutinefunction
from typing import Any

from asgiref.sync import markcoroutinefunction

from ..changes.transaction_context import encode, every_connection, layer

logger = logging.getLogger(__name__)

#: Characters of a text from the request; the context is in each task message.
_LONGEST = 200


class ContextMiddleware:
    """Give the transactions of a request a context: `user`, `path`, `request_id`, `traceparent`.

    `user` is the primary key, and is asked for when the request writes first. `request_id` and
    `traceparent` are headers of the request, `X-Request-ID` and that of W3C Trace Context. Unknown
    values are left out. Each transaction that writes has one message more; one that only reads has
    none. Put it below AuthenticationMiddleware. A subclass may say more: `values`.
    """

    sync_capable = async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self._get_response = get_response
        self._async = iscoroutinefunction(get_response)
        if self._async:
            markcoroutinefunction(self)

    def __call__(self, request: Any) -> Any:
        """Handle a request, in a block in which the values hold."""
        if self._async:
            return self._handle(request)
        with layer(every_connection, lambda: self._values(request)):
            return self._get_response(request)

    async def _handle(self, request: Any) -> Any:
        with layer(every_connection, lambda: self._values(request)):
            response: Awaitable[Any] = self._get_response(request)
            return await response

    def _values(self, request: Any) -> Mapping[str, Any]:
        """Return the values; those of the request cannot make its writes fail."""
        try:
            values = self.values(request)
            encode(values)
        except Exception:
            logger.warning("The context of a request is unknown", exc_info=True)
            return {}
        return values

    def values(self, request: Any) -> dict[str, Any]:
        """Return the values of a request's context; 4,096 bytes of JSON at most."""
        headers = request.headers
        values = {
            "user": _user(request),
            "path": request.path[:_LONGEST],
            "request_id": headers.get("x-request-id", "")[:_LONGEST],
            "traceparent": headers.get("traceparent", "")[:_LONGEST],
        }
        return {name: value for name, value in values.items() if value not in (None, "")}


def _user(request: Any) -> int | str | None:
    """Return the primary key of the user, if one has logged in."""
    user = getattr(request, "user", None)
    if user is None or not user.is_authenticated:
        return None
    return user.pk if isinstance(user.pk, int) else str(user.pk)[:_LONGEST]
