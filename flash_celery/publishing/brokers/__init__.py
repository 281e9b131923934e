"""Publishers, one for each kind of broker. `for_app` returns the one for an app."""

from __future__ import annotations

from typing import Any

from .base import TIMEOUT, Publisher, connection_to


def for_app(app: Any, timeout: float = TIMEOUT) -> Publisher:
    """Return the publisher for the broker of an app. It does not connect yet.

    Args:
        app: The Celery app.
        timeout: The seconds after which a broker that does not answer counts as unreachable.

    Raises:
        ConfigurationError: The URL is invalid, or the client library is not installed.
    """
    with connection_to(app) as connection:
        driver = connection.transport.driver_type, connection.transport.driver_name
    if driver[0] == "redis":
        from .redis import RedisPublisher

        return RedisPublisher(app, timeout)
    if driver == ("amqp", "py-amqp"):
        from .amqp import AmqpPublisher

        return AmqpPublisher(app, timeout)
    from .kombu import KombuPublisher

    return KombuPublisher(app, timeout)
