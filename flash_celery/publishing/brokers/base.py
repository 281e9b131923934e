"""The interface of publishers (`Publisher`), and the kombu connection that most of them share."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from kombu.utils.json import dumps
from kombu.utils.url import maybe_sanitize_url

from ...errors import ConfigurationError, PublishError, Unroutable
from ...escaping import escaped
from ...handlers import redis_extra
from ...messages.deduplication import Deduplicator, Lease
from ...messages.lane_messages import LaneForm
from ...messages.task_message import Message
from ...transactional_tasks import records

logger = logging.getLogger(__name__)

#: What Redis adds to the name of a command that it does not know.
_ARGUMENTS = re.compile(r", with args beginning with:.*", re.DOTALL)
#: What helps, by the words of an error of Redis that repeats until it is done.
_CURES = {
    "don't hash to the same slot": "this is a Redis Cluster, which Celery does not support",
    "unknown command 'EVAL": "scripts must be allowed (docs/redis.md, What an ACL must allow)",
    "invalid bulk length": "a message is larger than proto-max-bulk-len: raise it, or set "
    "flash_max_change_size to less than three quarters of it and restart",
}

#: Default seconds without an answer after which a broker counts as unreachable.
TIMEOUT = 20.0


class Publisher(Protocol):
    """Publishes messages to queues of the broker. Only the publishing thread uses it."""

    #: Whether it can fill the lanes of ordered handlers.
    fills_lanes: bool

    def open(self, queues: Sequence[Any]) -> None:
        """Connect and declare the queues.

        Raises:
            PublishError: The broker does not answer, or refuses a queue.
        """

    def claim(self, lease: Lease) -> Deduplicator:
        """Begin a session, and return a filter for changes that earlier sessions have enqueued.

        From here on the broker refuses everything that earlier sessions publish, if it can.

        Raises:
            PublishError: The broker does not answer.
        """

    def prepare(self, lanes: Sequence[LaneForm]) -> None:
        """Set up the lanes of ordered handlers, and let their drains go on or pause.

        Publishers that fill no lanes are asked for none.

        Raises:
            PublishError: The broker failed, or the lanes cannot be filled yet.
        """

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages, each queue's in this order; return once the broker confirmed them all.

        Raises:
            PublishError: The broker has not confirmed them all. Its `confirmed` counts the
                confirmed messages, from the first one; the broker may have any of the others.
        """

    def requeue(
        self, queue: str, restored: Callable[[Any], Message], admit: Callable[[list[Message]], int]
    ) -> bool:
        """Move some messages from a hold queue to their own queues, the oldest first.

        A held message is removed once the broker has confirmed the message published in its place.

        Args:
            queue: The name of the hold queue.
            restored: Returns the message to publish in place of a held one.
            admit: Returns how many of these messages may be published, counted from the first.

        Returns:
            Whether the hold queue may have more messages.

        Raises:
            PublishError: The broker has not confirmed a message.
        """

    def encodes(self, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Return whether a message may have these headers and properties; never raises."""

    def check(self) -> None:
        """Check that the broker answers, and has what it had confirmed, if the transport can.

        Raises:
            PublishError: The broker does not answer.
            TakenOver: Another session has claimed the lease.
            ConfirmedLost: It has lost something.
        """

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue.

        Raises:
            PublishError: The broker does not answer.
        """

    def close(self) -> None:
        """Disconnect; never raises."""


def connection_to(app: Any, **options: Any) -> Any:
    """Return a kombu connection to the app's broker, not opened yet.

    Raises:
        ConfigurationError: The URL is invalid, or the client library is not installed.
    """
    redis_extra.require(app)
    urls = f"{app.conf.broker_write_url} {app.conf.broker_url}"
    with _url_errors(urls):
        connection = app.connection_for_write(**options)
        _ = connection.transport
        if "@" in str(connection.virtual_host) and "%40" not in urls:
            raise ValueError  # it is a part of the password, which errors would show
    return connection


#: Python's text about an argument that a function does not have.
_UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")
#: A ? in front of the @ begins no options: it is a part of the password.
_PASSWORD_WITH_MARK = re.compile(r"\?[^ ;]*@")


@contextmanager
def _url_errors(urls: str = "") -> Iterator[None]:
    """Turn kombu's errors about a broker URL into one that shows no part of a password.

    Args:
        urls: The URLs, if options may follow a ? in them.
    """
    try:
        yield
    except OSError:
        raise  # a certificate that fails verification is also a ValueError
    except (TypeError, ValueError) as error:
        option = _UNKNOWN_OPTION.search(str(error))
        if option and not _PASSWORD_WITH_MARK.search(urls):
            raise ConfigurationError(
                f"broker_url has the option {option[1]}=, which kombu does not take there; remove "
                "it from the URL (options of the transport belong in broker_transport_options)."
            ) from None
        raise ConfigurationError(
            "broker_url is not the URL of a broker; write redis://:password@host:6379/0 or "
            "amqp://user:password@host:5672/vhost, with %40 for an @ in the password, %2F for a /, "
            "%3F for a ? and %23 for a #."
        ) from None
    except (ImportError, KeyError) as error:
        raise ConfigurationError(
            f"broker_url names a transport that is not installed: {error}."
        ) from None


def json_encodes(headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
    """Return whether kombu's JSON can have these headers and properties."""
    return encodes_with(lambda: dumps([headers, properties]))


def encodes_with(encode: Callable[[], object]) -> bool:
    """Return whether a function ends without an error, which code of a value may raise."""
    try:
        encode()
    except KeyboardInterrupt:
        raise
    except BaseException:  # of any type: a value may have a `__json__` of its own
        return False
    return True


class ConnectedPublisher:
    """A publisher with a kombu connection of its own."""

    fills_lanes = False
    #: Seconds of the broker's heartbeats; None for none.
    heartbeat: int | None = None
    #: Transport options; those of the app take precedence.
    transport_options: Mapping[str, Any] = {}
    #: Names of the transport options that are set to `timeout`.
    timeouts: Sequence[str] = ()

    def __init__(self, app: Any, timeout: float = TIMEOUT) -> None:
        self._app = app
        #: Seconds without an answer after which the broker counts as unreachable.
        self.timeout = timeout
        self._connection: Any = None
        #: The descriptions of what was declared for messages on this connection.
        self._declared: set[str] = set()
        self._channel: Any = None
        #: How many messages of the current call the broker has confirmed, from the first one.
        self.confirmed = 0

    def open(self, queues: Sequence[Any]) -> None:
        """Connect and declare the queues.

        Raises:
            PublishError: The broker does not answer, or refuses a queue.
        """
        self.close()
        self._declared = set()
        self.confirmed = 0  # the count of an earlier call must not reach the next error
        self._connection = connection_to(
            self._app,
            transport_options=self.options(),
            heartbeat=self.heartbeat,
            connect_timeout=self._app.conf.broker_connection_timeout,
        )
        # Try each host once (kombu counts all Sentinels as one); the caller tries again.
        hosts = 1 if self._connection.transport_cls == "sentinel" else len(self._connection.alt)
        with self.errors(), _url_errors():
            self._connection.ensure_connection(
                max_retries=max(hosts, 1) - 1, reraise_as_library_errors=False
            )
            self._channel = self._connection.channel()
        with self.errors():
            for queue in queues:
                queue(self._channel).declare()

    def _declare(self, messages: Sequence[Message]) -> None:
        """Declare the queues and exchanges that messages name, once for each connection."""
        named = {each for message in messages if message.declare for each in message.declare}
        for description in named - self._declared:
            self._declare_entity(description)
            self._declared.add(description)

    def _declare_entity(self, description: str) -> None:
        """Declare a queue or an exchange, if the transport can."""
        try:
            records.entity_of(description)(self._channel).declare()
        except Exception as error:  # of any type: an application has chosen the values
            if self._is_of_broker(error):
                raise
            warn_of_undeclared(description, error)

    def options(self) -> dict[str, Any]:
        """Return the options of the transport."""
        timeouts = dict.fromkeys(self.timeouts, self.timeout)
        return {**self.transport_options, **timeouts, **self._app.conf.broker_transport_options}

    def claim(self, lease: Lease) -> Deduplicator:
        """Begin a session. Nothing is known of earlier ones: this broker keeps no position."""
        return Deduplicator({}, ())

    def prepare(self, lanes: Sequence[LaneForm]) -> None:
        """Do nothing: this broker has no lanes."""

    def check(self) -> None:
        """Do nothing: the transport has no request for this."""

    def encodes(self, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Return whether the broker's messages, in JSON, can have these."""
        return json_encodes(headers, properties)

    def close(self) -> None:
        """Disconnect; never raises."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            with suppress(Exception):
                connection.release()

    def prepared(self, message: Message) -> Any:
        """Return the message in the form that the transport sends."""
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
        """The open channel, for features of a single transport."""
        return self._channel

    @property
    def url(self) -> str:
        """The broker's address, without a password."""
        url = str(maybe_sanitize_url(self._connection.as_uri()))
        return url.replace("//:**@", "//")  # kombu shows a password even if there is none

    @property
    def unverified(self) -> bool:
        """Whether TLS is used without verifying the certificate, kombu's default for rediss://."""
        options = self._connection.ssl if isinstance(self._connection.ssl, dict) else {}
        levels = [options[name] for name in ("ssl_cert_reqs", "cert_reqs") if name in options]
        return any(not level or str(level).lower() in ("none", "cert_none") for level in levels)

    @property
    def driver(self) -> str:
        """The type of kombu's transport: `redis`, `amqp` or another."""
        return str(self._connection.transport.driver_type)

    @property
    def visibility_timeout(self) -> float:
        """Seconds after which kombu redelivers an unacknowledged message on Redis."""
        return float(self._channel.visibility_timeout)

    def redis_settings(self, *names: str) -> dict[str, str]:
        """Return settings of the Redis server, by CONFIG GET."""
        with self._channel.conn_or_acquire() as client:
            values: dict[str, str] = {}
            for name in names:
                values.update(client.config_get(name))
            return values

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue.

        A missing queue is empty on Redis; elsewhere it is a `PublishError` (`is_missing_queue`).

        Raises:
            PublishError: The broker does not answer.
        """
        self.confirmed = 0
        with self.errors():
            if self._is_virtual:
                return int(self._channel._size(queue))
            return int(self._channel.queue_declare(queue=queue, passive=True).message_count)

    def unroutable(self, message: Message) -> Unroutable:
        """Return the error of a message for which its exchange has no queue."""
        error = Unroutable(
            f"No queue is bound to the exchange {escaped(message.exchange)} for the routing key "
            f"{escaped(message.routing_key)}."
        )
        error.confirmed, error.refused = self.confirmed, True
        return error

    def unsendable(self, message: Message, error: Exception) -> PublishError:
        """Return the error of a task whose values the transport cannot send."""
        failure = PublishError(
            f"The message of {escaped(message.task)} cannot be sent ({type(error).__name__}: "
            f"{escaped(str(error))})."
        )
        failure.confirmed, failure.refused = self.confirmed, True
        return failure

    def consumers(self, queue: str) -> int:
        """Return how many consumers a queue has; 0 if the broker does not count them.

        Raises:
            PublishError: The broker does not answer.
        """
        if self._is_virtual:
            return 0
        with self.errors():
            return int(self._channel.queue_declare(queue=queue, passive=True).consumer_count)

    @property
    def _is_virtual(self) -> bool:
        """Whether kombu emulates AMQP for this broker, as for Redis."""
        return hasattr(self._channel, "_size")

    def reason(self, error: BaseException) -> str:
        """Return the transport's message for an error, without the full stop, and what helps."""
        text = _ARGUMENTS.sub("", str(error)).rstrip(".") or type(error).__name__
        cures = (cure for said, cure in _CURES.items() if said in text)
        return "; ".join([text, *cures])

    @property
    def _transport_errors(self) -> tuple[type[Exception], ...]:
        """What the transport raises if the broker does not answer, or refuses something."""
        connection = self._connection
        return *connection.connection_errors, *connection.channel_errors, OSError

    def _is_of_broker(self, error: Exception) -> bool:
        """Return whether an error comes from the broker, or from the connection to it.

        kombu counts each KeyError on Redis as one, but a value of a task can also cause it.
        """
        return isinstance(error, self._transport_errors) and not isinstance(error, KeyError)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the transport's errors into `PublishError`."""
        try:
            yield
        except self._transport_errors as error:
            failure = PublishError(f"The broker {self.url} failed: {self.reason(error)}.")
            failure.confirmed = self.confirmed
            raise failure from error


def warn_of_undeclared(description: str, error: Exception) -> None:
    """Log that what a task names could not be declared."""
    logger.warning(
        "The broker refuses to declare what a task in a transaction names, and gets the task "
        "nevertheless (%s): %s",
        escaped(description),
        escaped(str(error)),
    )


def is_missing_queue(error: PublishError) -> bool:
    """Return whether an error is the broker's reply that a queue does not exist (AMQP's 404).

    The broker has closed the channel then.
    """
    return str(getattr(error.__cause__, "reply_code", "")) == "404"


def admit_all(messages: Sequence[Message]) -> int:
    """Admit all messages: the `admit` of `Publisher.requeue` where no limit applies."""
    return len(messages)


def queue_depths(app: Any, queues: Sequence[str]) -> dict[str, int | None]:
    """Return how many messages wait in each queue; None for a queue that does not exist.

    Raises:
        PublishError: The broker does not answer.
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
                if not is_missing_queue(error):
                    raise
                depths[queue] = None
                publisher.close()
    finally:
        publisher.close()
    return depths
