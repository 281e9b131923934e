"""What a publisher promises, and the connection that each of them has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from kombu.utils.url import maybe_sanitize_url

from ... import redis_extra
from ...errors import ConfigurationError, PublishError
from ...messages.deduplication import Enqueued, Lease
from ...messages.templates import Message

#: Seconds without an answer after which a broker counts as gone, by default.
TIMEOUT = 20.0


class Publisher(Protocol):
    """Puts messages into queues of the broker."""

    def open(self, queues: Sequence[Any]) -> None:
        """Connect and declare the queues. Raises `PublishError`."""

    def claim(self, lease: Lease) -> Enqueued:
        """Begin a session: what the broker knows that earlier ones have enqueued.

        Where it can, it takes nothing more from them. Raises `PublishError`.
        """

    def publish(self, messages: Sequence[Message]) -> None:
        """Return once the broker has confirmed every message, each queue's in this order.

        Raises `PublishError` if it has not; any of them may be in the broker then.
        """

    def unpark(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move some messages out of a queue, the oldest first, to where `restored` sends them.

        Each is taken out once the broker has the new one. `admit` says how many may be published,
        from the first on. Whether there may be more. Raises `PublishError`.
        """

    def check(self) -> None:
        """See that the broker answers, where the transport can. Raises `PublishError`."""

    def depth(self, queue: str) -> int:
        """How many messages wait in a queue. Raises `PublishError`."""

    def close(self) -> None:
        """Disconnect; never raises."""


def connection_to(app: Any, **options: Any) -> Any:
    """A kombu connection to the app's broker, not made yet.

    Raises `ConfigurationError` for a URL that cannot be right, and where its client is missing.
    """
    redis_extra.require(app)
    with _readable():
        connection = app.connection_for_write(**options)
        _ = connection.transport
        given = f"{app.conf.broker_write_url} {app.conf.broker_url}"
        if "@" in str(connection.virtual_host) and "%40" not in given:
            raise ValueError  # a part of the password, which errors would name
    return connection


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what kombu says of a broker URL into an error without the URL, or parts of it."""
    try:
        yield
    except OSError:
        raise  # a certificate that does not verify is a ValueError too
    except (TypeError, ValueError):
        raise ConfigurationError(
            "broker_url is not a broker's URL; write redis://:password@host:6379/0 or "
            "amqp://user:password@host:5672/vhost, with %40 for an @ in the password, %2F for a /, "
            "%3F for a ? and %23 for a #."
        ) from None
    except (ImportError, KeyError) as error:
        raise ConfigurationError(
            f"broker_url names a transport that is not there: {error}."
        ) from None


class ConnectedPublisher:
    """A publisher with a kombu connection of its own."""

    #: Transport options, and those that are set to `timeout`; the app's own go before.
    transport_options: Mapping[str, Any] = {}
    timeouts: Sequence[str] = ()

    def __init__(self, app: Any, timeout: float = TIMEOUT) -> None:
        self._app = app
        #: Seconds without an answer after which the broker counts as gone.
        self.timeout = timeout
        self._connection: Any = None
        self._channel: Any = None
        #: How many messages of the present call the broker has, from the first on.
        self.confirmed = 0

    def open(self, queues: Sequence[Any]) -> None:
        """Connect and declare the queues. Raises `PublishError`."""
        self.close()
        self.confirmed = 0  # what an earlier call got through says nothing of the next one
        self._connection = connection_to(
            self._app,
            transport_options=self.options(),
            connect_timeout=self._app.conf.broker_connection_timeout,
        )
        # Each host once, or those of Sentinel, which are one to kombu: who opens it tries again.
        hosts = 1 if self._connection.transport_cls == "sentinel" else len(self._connection.alt)
        with self.errors(), _readable():
            self._connection.ensure_connection(
                max_retries=max(hosts, 1) - 1, reraise_as_library_errors=False
            )
            self._channel = self._connection.channel()
        with self.errors():
            for queue in queues:
                queue(self._channel).declare()

    def options(self) -> dict[str, Any]:
        """What the transport is told."""
        timeouts = dict.fromkeys(self.timeouts, self.timeout)
        return {**self.transport_options, **timeouts, **self._app.conf.broker_transport_options}

    def claim(self, lease: Lease) -> Enqueued:
        """Begin a session; this broker keeps no position."""
        return Enqueued({}, ())

    def check(self) -> None:
        """Nothing, where the transport has no question to ask."""

    def close(self) -> None:
        """Disconnect; never raises."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            with suppress(Exception):
                connection.release()

    def prepared(self, message: Message) -> Any:
        """The message as the transport sends it."""
        properties = dict(message.properties)
        return self._channel.prepare_message(
            message.body,
            properties.pop("priority", None),
            message.content_type,
            message.content_encoding,
            message.headers,
            properties,
        )

    @property
    def channel(self) -> Any:
        """The open channel, for what only one transport can do."""
        return self._channel

    @property
    def url(self) -> str:
        """The broker's address, without a password."""
        shown = str(maybe_sanitize_url(self._connection.as_uri()))
        return shown.replace("//:**@", "//")  # a password where there is none

    @property
    def unverified(self) -> bool:
        """Whether TLS is spoken with whoever answers: with rediss:// alone kombu does so."""
        given = self._connection.ssl
        asked = given if isinstance(given, dict) else {}
        found = [asked[name] for name in ("ssl_cert_reqs", "cert_reqs") if name in asked]
        return any(not one or str(one).lower() in ("none", "cert_none") for one in found)

    @property
    def driver(self) -> str:
        """`redis`, `amqp` or another of kombu's."""
        return str(self._connection.transport.driver_type)

    @property
    def visibility_timeout(self) -> float:
        """Seconds after which Redis' consumers give an unacknowledged message to another."""
        return float(self._channel.visibility_timeout)

    def redis_settings(self, *names: str) -> dict[str, str]:
        """What CONFIG GET says."""
        with self._channel.conn_or_acquire() as client:
            found: dict[str, str] = {}
            for name in names:
                found.update(client.config_get(name))
            return found

    def depth(self, queue: str) -> int:
        """How many messages wait in a queue. Raises `PublishError`.

        A list of Redis' that is not there is an empty one; elsewhere it is an error.
        """
        self.confirmed = 0
        with self.errors():
            if hasattr(self._channel, "_size"):
                return int(self._channel._size(queue))
            return int(self._channel.queue_declare(queue=queue, passive=True).message_count)

    def consumers(self, queue: str) -> int:
        """How many consumers a queue has, where the broker counts them. Raises `PublishError`."""
        if hasattr(self._channel, "_size"):
            return 0
        with self.errors():
            return int(self._channel.queue_declare(queue=queue, passive=True).consumer_count)

    def reason(self, error: BaseException) -> str:
        """What the transport says of it, without the full stop."""
        return str(error).rstrip(".") or type(error).__name__

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the transport's errors into `PublishError`."""
        known = (*self._connection.connection_errors, *self._connection.channel_errors, OSError)
        try:
            yield
        except known as error:
            failed = PublishError(f"The broker {self.url} failed: {self.reason(error)}.")
            failed.confirmed = self.confirmed
            raise failed from error


def queue_depths(app: Any, queues: Sequence[str]) -> dict[str, int | None]:
    """How many messages wait in each queue; None for a queue that does not exist.

    Raises `PublishError` if the broker cannot be asked.
    """
    publisher = ConnectedPublisher(app)
    depths: dict[str, int | None] = {}
    try:
        for queue in queues:
            if publisher.channel is None:
                publisher.open([])
            try:
                depths[queue] = publisher.depth(queue)
            except PublishError as error:
                if str(getattr(error.__cause__, "reply_code", "")) != "404":
                    raise
                depths[queue] = None
                publisher.close()  # the error has closed the channel
    finally:
        publisher.close()
    return depths
