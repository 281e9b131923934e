"""Messages → broker. `for_app` picks the publisher for an app's transport."""

from __future__ import annotations

from typing import Any

from .base import TIMEOUT, Publisher, connection_to


def for_app(app: Any, timeout: float = TIMEOUT) -> Publisher:
    """The publisher for the transport of the app's broker URL; opens nothing.

    A broker that does not answer for `timeout` seconds counts as gone. Raises `ConfigurationError`
    for a URL that cannot be right.
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
