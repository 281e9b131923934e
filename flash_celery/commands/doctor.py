"""What `flash doctor` looks at beyond what stops `replicate`: the broker and the Celery workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from ..capture.spool import default_directory, file_system
from ..errors import ConfigurationError, FlashError, PublishError
from ..handlers.subscriptions import Subscription
from ..messages.templates import Templates
from ..provisioning import pauses
from ..provisioning.findings import OK, STOP, WARNING, Finding, stop
from ..provisioning.pauses import queue_of
from ..provisioning.publications import Record
from ..publishing.brokers.base import ConnectedPublisher, queue_depths
from ..settings import Settings

_INSPECT_SECONDS = 1.0
_MARKS = {OK: "ok     ", WARNING: "warning", STOP: "STOP   "}


def broker(app: Any, settings: Settings, queues: Sequence[str]) -> Iterator[Finding]:
    """Whether it answers, what a restart of it would lose, what can fill it, and whether it takes
    these queues."""
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
                "the broker's certificate is not checked, so anybody may pass for it; give "
                "broker_use_ssl an authority and CERT_REQUIRED (docs/security.md)",
            )
        if publisher.driver == "redis":
            with publisher.errors():
                yield from _redis(publisher, settings.flash_max_queue_length)
        elif publisher.driver == "amqp":
            with publisher.errors():
                yield from _rabbitmq(publisher, app, queues)
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
    if "appendonly" not in settings:
        yield Finding(
            "broker durability",
            WARNING,
            "Redis does not tell its settings (CONFIG GET); see to it that it has appendonly yes, "
            "appendfsync always and maxmemory-policy noeviction",
        )
    elif settings["appendonly"] != "yes":
        yield Finding(
            "broker durability",
            WARNING,
            "appendonly is off: a restart of Redis loses queued tasks: CONFIG SET appendonly yes",
        )
    elif settings.get("appendfsync") != "always":
        yield Finding(
            "broker durability",
            WARNING,
            f"appendfsync is {settings.get('appendfsync')}: a crash of Redis loses the last second "
            "of tasks: CONFIG SET appendfsync always",
        )
    else:
        yield Finding("broker durability", OK, "appendonly, appendfsync always")
    policy = settings.get("maxmemory-policy")
    if policy not in (None, "noeviction"):
        yield Finding(
            "broker eviction",
            WARNING,
            f"maxmemory-policy is {policy}: Redis may throw queues away when it is full: "
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
            f"classic: {', '.join(classic)}; task_default_queue_type is of Celery's own queue "
            "alone, so set task_create_missing_queue_type = 'quorum' too (Celery 5.6), or name "
            "them in task_queues with queue_arguments={'x-queue-type': 'quorum'}",
        )
    for queue in queues:
        if loses := _loses(queue):
            yield Finding(
                "queue",
                WARNING,
                f"{queue.name} throws away what waits in it ({', '.join(loses)}): leave that out",
            )
        if reason := refused(publisher.channel, queue):
            yield Finding(
                "queue",
                WARNING,
                f"{queue.name} is there with other arguments, so neither `replicate` nor workers "
                f"go on ({reason}); declare it as it is, or delete it once it is empty",
            )


def _loses(queue: Any) -> list[str]:
    """What a queue was given that makes RabbitMQ forget messages."""
    given = queue.queue_arguments or {}
    names = ["expires", "message_ttl"]
    if not str(given.get("x-overflow")).startswith("reject-publish"):
        names += ["max_length", "max_length_bytes"]
    found = [
        name
        for name in names
        if getattr(queue, name) is not None or f"x-{name.replace('_', '-')}" in given
    ]
    found += [name for name in ("auto_delete", "exclusive") if getattr(queue, name)]
    return found if queue.durable else ["durable=False", *found]


def routes(
    app: Any, settings: Settings, subscriptions: Sequence[Subscription]
) -> tuple[list[str], Finding]:
    """The queues that the handlers' changes go to, and whether they can."""
    try:
        names = Templates(app, settings, subscriptions).queues
    except FlashError as error:
        return [], stop("queues", error)
    return names, Finding("queues", OK, ", ".join(names) or "none")


def refuse_eager(app: Any) -> None:
    """Raise `ConfigurationError` where Celery runs tasks in the process that sends them.

    A worker would run a retry inside the first attempt, and forget it if it fails.
    """
    if app.conf.task_always_eager:
        raise ConfigurationError(
            "task_always_eager is on, which is for tests: workers would lose the changes whose "
            "retries fail; turn it off where `flash replicate` and workers run."
        )


def eager(app: Any) -> Iterator[Finding]:
    """The same for `doctor`."""
    try:
        refuse_eager(app)
    except ConfigurationError as error:
        yield stop("task_always_eager", error)


def spool(settings: Settings) -> Iterator[Finding]:
    """Whether what streaming spools goes to a disk."""
    if not settings.flash_use_streaming:
        return
    directory = settings.flash_spool_directory or default_directory()
    kind = file_system(directory)
    if kind in ("tmpfs", "ramfs"):
        message = (
            f"{directory} is memory ({kind}): large transactions fill it while they are open; "
            "set flash_spool_directory to a folder on a disk"
        )
        yield Finding("spool", WARNING, message)
    else:
        yield Finding("spool", OK, f"{directory} ({kind})" if kind else directory)


def workers(app: Any, subscriptions: Sequence[Subscription]) -> Iterator[Finding]:
    """Handlers that no running Celery worker knows: it would throw their tasks away."""
    missing = unhandled(app, subscriptions)
    if missing is None:
        yield Finding(
            "workers", WARNING, "no Celery worker answers; changes will wait in the queue"
        )
        return
    if missing:
        yield Finding(
            "workers",
            WARNING,
            f"no running worker knows {', '.join(missing)}; start workers with this code first, "
            "for a worker throws away a task it does not know",
        )
    else:
        yield Finding("workers", OK, "they know every handler")


def paused(app: Any, record: Record, source: str) -> Iterator[Finding]:
    """What is paused, and workers that consume what is parked: they would run it."""
    if pauses.SOURCE in record.paused:
        since = record.paused[pauses.SOURCE]
        yield Finding("paused", WARNING, f"nothing is read since {since}; `flash resume` goes on")
    parked = pauses.parked(record, source)
    for handler in parked:
        if handler in record.paused:
            since = record.paused[handler]
            said = f"{handler}, since {since}: `flash resume {handler}` goes on"
            yield Finding("paused", WARNING, said)
    active: Any = None
    with suppress(Exception):
        active = parked and app.control.inspect(timeout=_INSPECT_SECONDS).active_queues()
    for worker, queues in (active or {}).items():
        for queue in {str(one["name"]) for one in queues} & set(parked.values()):
            said = f"{worker} consumes {queue}, which is for nobody; take it out of -Q"
            yield Finding("paused", WARNING, said)


def forgotten(app: Any, record: Record, source: str, handlers: Sequence[str]) -> Iterator[Finding]:
    """What is parked for handlers that are not paused, which nobody will send back: the database
    was restored, or a standby was promoted, that does not know of the pause."""
    parked = pauses.parked(record, source)
    queues = {queue_of(one, source): one for one in handlers if one not in parked}
    try:
        depths = queue_depths(app, list(queues))
    except PublishError as error:
        yield Finding("paused", WARNING, f"what is parked cannot be counted: {error}")
        return
    for queue, depth in depths.items():
        if depth:
            one = queues[queue]
            said = (
                f"{depth} messages are parked in {queue}, and {one} is not paused: `flash pause "
                f"{one}` and `flash resume {one}` send them to their queue"
            )
            yield Finding("paused", WARNING, said)


def unhandled(app: Any, subscriptions: Sequence[Subscription]) -> list[str] | None:
    """The handlers that no running worker has registered; None if no worker answers."""
    registered = None
    with suppress(Exception):
        registered = app.control.inspect(timeout=_INSPECT_SECONDS).registered()
    if not registered:
        return None
    known = {str(task).split(" ")[0] for tasks in registered.values() for task in tasks}
    return sorted({one.handler for one in subscriptions} - known)


def line(finding: Finding) -> str:
    """A finding for people."""
    return f"{_MARKS[finding.level]}  {finding.subject}: {finding.message}"
