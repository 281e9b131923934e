"""Take the messages that Celery publishes in a block, in place of the broker.

Celery gets each producer from `Celery.producer_or_acquire`: `apply_async` and `send_task`, groups,
chains and chords. (`apply_async(producer=)` would not do: a chain and a chord drop it.) In a block
that method gives a `CollectingProducer`, which prepares a message as kombu does, and hands it over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from celery import Celery, Task
from kombu.entity import Exchange
from kombu.messaging import Producer
from kombu.utils.json import dumps, loads

from ..errors import TransactionError
from .records import TaskRecord, describe, encode_content
from .tracing import end_publishing_span

_lock = threading.Lock()
_DEFAULT = Exchange("")
#: AMQP's longest short string, in bytes.
_LONGEST_NAME = 255


class Collector(Protocol):
    """Takes the tasks that are sent."""

    def is_active(self) -> bool:
        """Return whether it still takes tasks."""

    def collect(self, app: Celery, record: TaskRecord) -> None:
        """Take a task that an app sends.

        Raises:
            FlashError: The transaction cannot carry it.
        """


#: The collector of the innermost block of this thread or asyncio task, and of those around it.
current: ContextVar[tuple[Collector, ...]] = ContextVar("flash_celery_collectors", default=())
#: Returns the collector for what is sent outside all blocks, if there is one.
otherwise: list[Callable[[Celery], Collector | None]] = []


def _collector(app: Celery) -> Collector | None:
    """Return the innermost collector that takes tasks.

    An asyncio task that was created in a block may outlive it, and then publishes as ever.
    """
    collectors = current.get()
    for collector in reversed(collectors):
        if collector.is_active():
            return collector
    if collectors is _SUSPENDED:
        return None
    return next((found for each in otherwise if (found := each(app)) is not None), None)


class _Inactive:
    def is_active(self) -> bool:
        return False

    def collect(self, app: Celery, record: TaskRecord) -> None:
        raise NotImplementedError


#: While Celery sends something on behalf of the running task.
_SUSPENDED: tuple[Collector, ...] = (_Inactive(),)


@contextmanager
def suspended() -> Iterator[None]:
    """Publish what is sent as ever."""
    token = current.set(_SUSPENDED)
    try:
        yield
    finally:
        current.reset(token)


def install() -> None:
    """Have every app ask for a collector. Without one, an app publishes as ever."""
    with _lock:
        if hasattr(Celery.producer_or_acquire, "__wrapped__"):
            return
        Celery.producer_or_acquire = _collecting(Celery.producer_or_acquire)
        # What these send belongs to the running task, which the worker acknowledges: a retry that
        # is rolled back would be lost.
        for name in ("retry", "replace", "add_to_chord"):
            setattr(Task, name, _suspending(getattr(Task, name)))


def _suspending(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def past_the_block(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return method(*args, **kwargs)

    return past_the_block


def _collecting(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def producer_or_acquire(self: Celery, producer: Any = None) -> Any:
        if isinstance(producer, CollectingProducer):
            return _Lent(producer)
        collector = _collector(self) if producer is None else None
        if collector is None:
            return original(self, producer)
        return _Lent(CollectingProducer(self, collector, lambda: original(self)))

    return producer_or_acquire


class _Collected(Exception):
    """Ends Celery's function after a message was collected, before it reports it as published."""


class _Lent:
    """The context in which Celery uses a producer."""

    def __init__(self, producer: CollectingProducer) -> None:
        self._producer = producer

    def __enter__(self) -> CollectingProducer:
        return self._producer

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        self._producer.release()
        return kind is _Collected


class _Connection:
    """The part of a kombu connection that Celery uses before it publishes."""

    _reraise_as_library_errors = staticmethod(nullcontext)


class _Channel:
    """The part of a channel that a producer uses; for others, that of a real one is acquired."""

    def __init__(self, take: Callable[..., None], acquire: Callable[[], Any]) -> None:
        self._take = take
        self._acquire = acquire
        self._acquired = ExitStack()
        self._real: Any = None

    def prepare_message(self, *prepared: Any) -> Any:
        return prepared

    def basic_publish(self, message: Any, exchange: str, routing_key: str, **_: Any) -> None:
        self._take(*message, exchange=exchange, routing_key=routing_key)

    def __getattr__(self, name: str) -> Any:
        # The result backend rpc:// declares its queue of replies here.
        if self._real is None:
            self._real = self._acquired.enter_context(self._acquire()).channel
        return getattr(self._real, name)

    def release(self) -> None:
        self._real = None
        self._acquired.close()


class CollectingProducer(Producer):
    """A producer of kombu's whose messages go to a collector."""

    connection = _Connection()

    def __init__(self, app: Celery, collector: Collector, acquire: Callable[[], Any]) -> None:
        self._app = app
        self._collector = collector
        self._declared: list[Any] = []
        self._lent = _Channel(self._take, acquire)
        super().__init__(None, exchange=_DEFAULT, auto_declare=False)  # type: ignore[no-untyped-call]
        # Not given above, where kombu would bind an exchange to it that is not used.
        self._channel = self._lent

    def maybe_declare(self, entity: Any, *args: Any, **kwargs: Any) -> None:
        """Note what Celery would declare."""
        self._declared.append(entity)

    def publish(self, body: Any, **options: Any) -> None:  # type: ignore[override]
        """Prepare a message, and hand it over.

        Raises:
            TransactionError: The transaction cannot carry it.
            kombu.exceptions.EncodeError: It cannot be serialised.
        """
        exchange = options.get("exchange")
        refuse_fanout(self._app, exchange)
        self._declared = []
        options["retry"] = False
        super().publish(body, **options)  # type: ignore[no-untyped-call]
        headers = options.get("headers") or {}
        end_publishing_span(str(headers.get("task")), str(headers.get("id")))
        raise _Collected

    def release(self) -> None:
        """Give back the channel that was acquired, if any."""
        self._lent.release()

    def _take(
        self,
        body: str | bytes,
        priority: int | None,
        content_type: str,
        content_encoding: str,
        headers: Any,
        properties: Any,
        *,
        exchange: str,
        routing_key: str,
    ) -> None:
        for name in (exchange, routing_key):
            if not isinstance(name, str | None):
                raise TransactionError(
                    f"The exchange or routing key {name!r} of a task is no text; give its name."
                )
        _refuse_unsendable(self._app, priority, headers, properties)
        if _driver(self._app) == "amqp":
            _refuse_long_names(exchange, routing_key or "")
        text, binary = encode_content(body)
        self._collector.collect(
            self._app,
            TaskRecord(
                str(headers.get("task")),
                str(headers.get("id")),
                exchange,
                routing_key or "",
                priority,
                content_type,
                content_encoding,
                text,
                binary,
                dumps(headers),
                dumps(properties),
                tuple(describe(each) for each in self._declared),
            ),
        )


def refuse_fanout(app: Celery, exchange: Any) -> None:
    """Raise `TransactionError` for a fanout exchange: its messages are in no queue on Redis."""
    if isinstance(exchange, Exchange):
        fanout, name = exchange.type == "fanout", exchange.name
    else:
        name = exchange or ""
        fanout = any(
            queue.exchange is not None
            and queue.exchange.name == name
            and queue.exchange.type == "fanout"
            for queue in (app.amqp.queues.values() if name else ())
        )
    if fanout:
        raise TransactionError(
            f"A transaction cannot carry a task for the fanout exchange {name} (a Broadcast "
            "queue), which keeps no message until it is confirmed; send it outside transactional()."
        )


def _refuse_long_names(*names: str) -> None:
    for name in names:
        if len(name.encode(errors="replace")) > _LONGEST_NAME:
            raise TransactionError(
                f"RabbitMQ has no names of more than {_LONGEST_NAME} bytes, and the exchange or "
                f"routing key {name[:50]}… is longer; give a shorter one."
            )


def _refuse_unsendable(app: Celery, priority: int | None, headers: Any, properties: Any) -> None:
    """Raise `TransactionError` for values that the broker's client could not write later."""
    if _driver(app) != "amqp":
        return
    import amqp

    try:
        # What travels in JSON is what the replication worker reads.
        headers, properties = loads(dumps(headers)), loads(dumps(properties))
        if priority is not None:
            properties["priority"] = priority
        amqp.Message("", application_headers=headers, **properties)._serialize_properties()
    except Exception as error:
        raise TransactionError(
            f"The properties or headers of the task cannot be sent to RabbitMQ ({error}); give "
            "values that AMQP has."
        ) from error


def _driver(app: Celery) -> str:
    """Return the type of the app's transport."""
    driver = _drivers.get(app)
    if driver is None:
        driver = _drivers[app] = str(app.connection_for_write().transport.driver_type)
    return driver


_drivers: WeakKeyDictionary[Celery, str] = WeakKeyDictionary()
