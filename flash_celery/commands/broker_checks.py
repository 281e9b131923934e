"""Checks of the broker: what a restart would lose, what can fill it, and the handlers' queues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import FlashError, PublishError
from ..handlers.subscriptions import Subscription
from ..messages.task_options import TaskOptions, lossy_options
from ..provisioning.findings import OK, WARNING, Finding, stop
from ..publishing.brokers.base import ConnectedPublisher
from ..settings import Settings

#: A delivery limit that only a change reaches which kills its worker again and again.
_ENOUGH_DELIVERIES = 100


def findings(
    app: Any, settings: Settings, queues: Sequence[str], own_queues: Sequence[str] = ()
) -> Iterator[Finding]:
    """Connect to the broker and check it. The first finding states whether it answers.

    Args:
        app: The Celery app.
        settings: The settings of the source.
        queues: The names of the handlers' queues.
        own_queues: The names of the dead-letter queue and of hold queues.
    """
    publisher = ConnectedPublisher(app)
    try:
        publisher.open([])
    except PublishError as error:
        yield Finding("broker", WARNING, f"{error} `replicate` waits until it answers")
        return
    try:
        yield Finding("broker", OK, publisher.url)
        if publisher.unverified:
            yield Finding(
                "broker TLS",
                WARNING,
                "the broker's certificate is not verified, so any server may impersonate it; give "
                "broker_use_ssl an authority and CERT_REQUIRED (docs/security.md)",
            )
        if publisher.driver == "redis":
            with publisher.errors():
                yield from _redis(publisher, settings.flash_max_queue_length)
        elif publisher.driver == "amqp":
            with publisher.errors():
                yield from _rabbitmq(publisher, app, queues)
                yield from _own_queues(publisher.channel, own_queues)
    except PublishError as error:
        yield Finding("broker", WARNING, f"its settings cannot be read: {error}")
    finally:
        publisher.close()


def _redis(publisher: ConnectedPublisher, max_queue_length: int) -> Iterator[Finding]:
    timeout = publisher.visibility_timeout
    yield Finding(
        "visibility_timeout",
        OK,
        f"a task whose worker was killed comes back after {timeout:g} s "
        "(broker_transport_options); it must be longer than any handler runs",
    )
    settings = publisher.redis_settings(
        "appendonly", "appendfsync", "maxmemory", "maxmemory-policy"
    )
    yield _redis_durability(settings)
    policy = settings.get("maxmemory-policy")
    if policy not in (None, "noeviction"):
        yield Finding(
            "broker eviction",
            WARNING,
            f"maxmemory-policy is {policy}: Redis may delete queues when it is full: "
            "CONFIG SET maxmemory-policy noeviction",
        )
    memory = int(settings.get("maxmemory") or 0)
    if memory and not max_queue_length:
        yield Finding(
            "broker memory",
            WARNING,
            f"maxmemory is {memory} bytes: a large transaction can fill Redis, and its Celery "
            "workers fail then, too: set flash_max_queue_length",
        )


def _redis_durability(settings: dict[str, str]) -> Finding:
    subject = "broker durability"
    if "appendonly" not in settings:
        return Finding(
            subject,
            WARNING,
            "Redis does not report its settings (CONFIG GET); make sure that it has appendonly "
            "yes, appendfsync always and maxmemory-policy noeviction",
        )
    if settings["appendonly"] != "yes":
        return Finding(
            subject,
            WARNING,
            "appendonly is off: a restart of Redis loses queued tasks: CONFIG SET appendonly yes",
        )
    if settings.get("appendfsync") != "always":
        return Finding(
            subject,
            WARNING,
            f"appendfsync is {settings.get('appendfsync')}: a crash of Redis loses the last second "
            "of tasks: CONFIG SET appendfsync always",
        )
    return Finding(subject, OK, "appendonly, appendfsync always")


def _rabbitmq(publisher: ConnectedPublisher, app: Any, names: Sequence[str]) -> Iterator[Finding]:
    from ..publishing.brokers.amqp import refused

    queues = [app.amqp.queues[name] for name in names]
    classic = [
        queue.name
        for queue in queues
        if (queue.queue_arguments or {}).get("x-queue-type", "classic") == "classic"
    ]
    if classic and app.conf.get("task_default_queue_type") == "quorum":
        yield Finding(
            "queue type",
            WARNING,
            f"classic: {', '.join(classic)}; task_default_queue_type applies to Celery's own queue "
            "only, so also set task_create_missing_queue_type = 'quorum' (Celery 5.6), or name "
            "them in task_queues with queue_arguments={'x-queue-type': 'quorum'}",
        )
    for queue in queues:
        if not queue.durable:
            yield Finding(
                "queue",
                WARNING,
                f"{queue.name} does not survive a restart of RabbitMQ (durable=False): remove that",
            )
        yield from _delivery_limit(publisher, queue)
        if reason := refused(publisher.channel, queue):
            yield Finding(
                "queue",
                WARNING,
                f"{queue.name} exists with other arguments, so neither `replicate` nor workers can "
                f"use it ({reason}); declare it with those, or delete it once it is empty",
            )


def _delivery_limit(publisher: ConnectedPublisher, queue: Any) -> Iterator[Finding]:
    """Warn of an `x-delivery-limit` with which RabbitMQ soon drops a change unhandled."""
    limit = (queue.queue_arguments or {}).get("x-delivery-limit")
    if not isinstance(limit, int) or limit >= _ENOUGH_DELIVERIES:
        return
    major = str(publisher.channel.connection.server_properties.get("version", "")).split(".")[0]
    if limit < 0 and major not in ("2", "3"):  # from 4.0 on it means no limit
        return
    effect = "workers have received" if limit > 0 else "comes back from a worker that was lost"
    times = f" {limit} times" if limit > 0 else ""
    yield Finding(
        "queue",
        WARNING,
        f"{queue.name} has x-delivery-limit={limit}: RabbitMQ drops a change that {effect}{times}; "
        "each lost connection counts for all that its worker had prefetched. Give the queue a "
        "limit of 100 or more, and a new name, because a queue keeps its arguments",
    )


def _own_queues(channel: Any, names: Sequence[str]) -> Iterator[Finding]:
    """Check the dead-letter queue and hold queues, which are used as they exist."""
    from ..publishing.brokers.amqp import existing

    for name in names:
        queue = existing(channel, name)
        options = lossy_options(queue) if queue is not None else []
        if queue is not None and not queue.durable:
            options.append("durable=False")
        if options:
            yield Finding(
                "queue",
                WARNING,
                f"{name} exists and does not keep what is in it ({', '.join(options)}): read it, "
                "and delete it; flash-celery declares it as it must be",
            )


def route_finding(
    app: Any, settings: Settings, subscriptions: Sequence[Subscription]
) -> tuple[list[str], Finding]:
    """Return the names of the handlers' queues, and whether all changes can be routed to them."""
    try:
        names = TaskOptions(app, settings, subscriptions).queues
    except FlashError as error:
        return [], stop("queues", error)
    return names, Finding("queues", OK, ", ".join(names) or "none")
