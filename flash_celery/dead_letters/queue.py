"""The dead-letter queue: find, read, retry and drop dead letters, for `flash dead`.

A dead letter is removed only after the command has finished with it, so a command that is killed
loses none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kombu.utils.json import loads

from ..errors import ConfigurationError, NoSuchLetter, PayloadError, SubscriptionError
from ..handlers.celery_tasks import NOTED
from ..publishing import brokers
from ..publishing.brokers import lane_access, redis_keys
from ..publishing.brokers.base import ConnectedPublisher, queue_depths
from ..table_name import TableName
from ..transactional_tasks.signing import PREFIX
from . import letters
from .letters import DeadLetter

#: Seconds in each unit of an age.
AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
#: The first characters of an id, as many as it takes to name a dead letter.
ID_PREFIX_LENGTH = 8

#: Messages read from Redis at a time; the message of a batch may have megabytes.
_REDIS_CHUNK = 20
#: The most seconds to wait until RabbitMQ has requeued the messages that a command read.
_REQUEUE_SECONDS = 5.0

#: Message bodies, each with a function that removes its message from the queue.
_Bodies = Generator[tuple[Any, Callable[[], object]], None, None]


@dataclass(frozen=True)
class DeadLetterFilter:
    """The dead letters a command is about: those that match every field that is set."""

    #: Ids, or the first 8 or more characters of ids.
    ids: tuple[str, ...] = ()
    #: The task's name, or the last part of it.
    handler: str | None = None
    #: The table of a change, or the prefix of a logical message.
    table: str | None = None
    #: The least and the greatest age in seconds.
    older: float | None = None
    newer: float | None = None

    @classmethod
    def parse(
        cls,
        ids: Sequence[str] = (),
        handler: str | None = None,
        table: str | None = None,
        older: str | None = None,
        newer: str | None = None,
    ) -> DeadLetterFilter:
        """Parse the options of the command line, where an age is text such as `15m`.

        Raises:
            ConfigurationError: An age cannot be parsed.
        """
        return cls(tuple(ids), handler, table, _parse_age(older), _parse_age(newer))

    @property
    def matches_all(self) -> bool:
        """Whether no field is set."""
        return self == DeadLetterFilter()

    def matches(self, letter: DeadLetter) -> bool:
        """Return whether the dead letter matches every field that is set."""
        if self.ids and not any(_has_id(letter, id) for id in self.ids):
            return False
        if self.handler and self.handler not in (letter.handler, letter.handler.split(".")[-1]):
            return False
        if self.table and not {self.table, _full_table_name(self.table)} & set(letter.tables):
            return False
        if self.older is not None and letter.age < self.older:
            return False
        return self.newer is None or letter.age <= self.newer


def _has_id(letter: DeadLetter, text: str) -> bool:
    """Return whether the text is the letter's id, or a long enough beginning of it."""
    return letter.id == text or (len(text) >= ID_PREFIX_LENGTH and letter.id.startswith(text))


def _complete_id(text: str, matching: Sequence[DeadLetter]) -> str:
    """Return the one id that the text stands for. Raise `NoSuchLetter` for none or several."""
    ids = {letter.id for letter in matching if _has_id(letter, text)}
    if text in ids:
        return text
    if not ids:
        raise NoSuchLetter(f"There is no dead letter {text}; see `flash dead list`.")
    if len(ids) > 1:
        raise NoSuchLetter(f"{text} may be any of {', '.join(sorted(ids))}.")
    return ids.pop()


def _full_table_name(name: str) -> str:
    try:
        return str(TableName.parse(name))
    except SubscriptionError:
        return name  # the prefix of a logical message need not be a valid table name


def _parse_age(age: str | None) -> float | None:
    if age is None:
        return None
    number, unit = (age[:-1], age[-1:]) if age[-1:] in AGE_UNITS else (age, "s")
    try:
        return float(number) * AGE_UNITS[unit]
    except ValueError:
        raise ConfigurationError(
            f"{age!r} is not an age; write seconds, or a number with s, m, h or d, as in 90, 15m "
            "or 2d."
        ) from None


class DeadLetterQueue:
    """The queue of an app's dead letters."""

    def __init__(self, app: Any, name: str) -> None:
        self._app = app
        self._name = name
        #: The number of messages that are not dead letters, found in the last reading.
        self.other_messages = 0

    def count(self) -> int:
        """Return the number of messages in the queue.

        Raises:
            PublishError: The broker does not answer.
        """
        return queue_depths(self._app, [self._name])[self._name] or 0

    def find(self, criteria: DeadLetterFilter) -> list[DeadLetter]:
        """Return the dead letters that match, oldest first, without `headers` and `body`.

        Leaving the messages out bounds the memory; see `read`.

        Raises:
            NoSuchLetter: An id of the criteria is that of no dead letter, or of several.
        """
        matching = []
        with self._open() as entries:
            for letter, _ in entries:
                if criteria.matches(letter):
                    matching.append(replace(letter, headers={}, body=""))
        # A quorum queue does not keep the order of requeued messages.
        matching.sort(key=lambda letter: letter.failed_at)
        if not criteria.ids:
            return matching
        ids = {_complete_id(text, matching) for text in criteria.ids}
        return [letter for letter in matching if letter.id in ids]

    def read(self, chosen: Iterable[DeadLetter]) -> list[DeadLetter]:
        """Return the dead letters that `find` returned, now with `headers` and `body`."""
        keys = {_key(letter) for letter in chosen}
        with self._open() as entries:
            return [letter for letter, _ in entries if _key(letter) in keys]

    def drop(self, chosen: Sequence[DeadLetter]) -> int:
        """Delete dead letters; return how many were still in the queue."""
        with closing(_Notes(self._app)) as notes:
            return self._process(chosen, notes.forget)

    def retry(self, chosen: Sequence[DeadLetter], split: bool) -> int:
        """Send dead letters back to the queues they came from; return how many.

        Each is removed once the broker has confirmed the task's message.

        Args:
            chosen: The dead letters, as `find` returns them.
            split: Whether to send each change of a batch in a message of its own.

        Raises:
            ConfigurationError: The app does not have the task or the queue.
        """
        names = sorted({letter.queue for letter in chosen})
        if any(letter.handler == PREFIX for letter in chosen):
            raise ConfigurationError(
                f"The dead letters of {PREFIX} report messages that were refused, and hold no "
                f"task; drop them (`flash dead drop --handler {PREFIX}`), and retry the others."
            )
        for handler in sorted({letter.handler for letter in chosen} - set(self._app.tasks)):
            raise ConfigurationError(
                f"{handler} is not a task of this app, so a worker would discard its change; to "
                "discard it on purpose, use `flash dead drop`."
            )
        try:
            queues = [self._app.amqp.queues[name] for name in names]
        except KeyError as error:
            raise ConfigurationError(f"The queue {error} is not in task_queues; add it.") from None
        with closing(brokers.for_app(self._app)) as publisher:
            publisher.open(queues)

            def send(letter: DeadLetter) -> None:
                if split:
                    publisher.publish(letters.split_retry_messages(letter))
                else:
                    publisher.publish([letters.retry_message(letter)])

            return self._process(chosen, send)

    def _process(self, chosen: Sequence[DeadLetter], action: Callable[[DeadLetter], None]) -> int:
        """Call the action for each of these dead letters, then remove it; return how many."""
        keys = {_key(letter) for letter in chosen}
        processed = 0
        with self._open() as entries:
            for letter, remove in entries:
                if _key(letter) in keys:
                    action(letter)
                    remove()
                    processed += 1
        return processed

    @contextmanager
    def _open(self) -> Iterator[Iterator[tuple[DeadLetter, Callable[[], object]]]]:
        """Yield the dead letters, oldest first, each with a function that removes it."""
        self.other_messages = 0
        connection = ConnectedPublisher(self._app)
        # Read no more than are there now: a retried task may fail at once and come back, forever.
        count = self.count()
        connection.open([])
        try:
            with connection.errors():
                read = _read_redis if connection.driver == "redis" else _read_amqp
                with closing(read(connection.channel, self._name, count)) as bodies:
                    yield self._decoded(bodies)
        finally:
            connection.close()

    def _decoded(self, bodies: _Bodies) -> Iterator[tuple[DeadLetter, Callable[[], object]]]:
        for body, remove in bodies:
            try:
                yield letters.decode(body), remove
            except PayloadError:
                self.other_messages += 1


class _Notes:
    """The notes of dead letters, beside the lanes that they came from."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._publisher: ConnectedPublisher | None = None

    def forget(self, letter: DeadLetter) -> None:
        """Forget the notes of a dead letter, if there are any."""
        noted = letter.headers.get(NOTED)
        if noted is None:
            return
        if self._publisher is None:
            self._publisher = ConnectedPublisher(self._app)
            self._publisher.open([])
        changes = letter.changes
        with suppress(PayloadError):
            changes = [change.id for change in letters.changes_of(letter)]
        lane_access.forget_letter(self._publisher, letter.handler, noted, changes)

    def close(self) -> None:
        """Close the connection."""
        if self._publisher is not None:
            self._publisher.close()


def _key(letter: DeadLetter) -> tuple[str, str]:
    """Identify a dead letter; a task that is retried and fails again makes another one."""
    return letter.id, letter.failed_at


def _read_amqp(channel: Any, name: str, count: int) -> _Bodies:
    """Get messages without acknowledging them, and requeue those that were not removed.

    If this process dies, RabbitMQ requeues them all; a classic queue keeps their order.
    """
    unacknowledged: dict[Any, None] = {}

    def remove(tag: Any) -> None:
        channel.basic_ack(tag)
        del unacknowledged[tag]

    try:
        for _ in range(count):
            message = channel.basic_get(name, no_ack=False)
            if message is None:
                return
            if hasattr(channel, "message_to_python"):
                message = channel.message_to_python(message)
            unacknowledged[message.delivery_tag] = None
            yield message.body, partial(remove, message.delivery_tag)
    finally:
        for tag in unacknowledged:
            channel.basic_reject(tag, requeue=True)
        if unacknowledged:
            _wait_until_requeued(channel, name, len(unacknowledged))


def _wait_until_requeued(channel: Any, name: str, count: int) -> None:
    """Wait until the rejected messages are in the queue again.

    A quorum queue requeues them asynchronously, and the next reader would find it empty. The wait
    has a limit, because another reader may have taken the messages.
    """
    deadline = time.monotonic() + _REQUEUE_SECONDS
    while time.monotonic() < deadline:
        if channel.queue_declare(name, passive=True).message_count >= count:
            return
        time.sleep(0.01)


def _read_redis(channel: Any, name: str, count: int) -> _Bodies:
    """Read the list of the queue from its tail and leave it as it is; new messages come in front.

    kombu keeps the messages of a queue in a Redis list, the oldest at its tail.
    """
    key = redis_keys.queue_key(channel, name)
    with redis_keys.literal_client(channel) as client:
        kept = 0
        while count > 0:
            chunk = client.lrange(key, -kept - min(_REDIS_CHUNK, count), -kept - 1)
            if not chunk:
                return
            for raw in reversed(chunk):
                removed = 0

                def remove(raw: Any = raw) -> None:
                    nonlocal removed
                    removed += client.lrem(key, -1, raw)

                yield _body_of(channel, raw), remove
                kept += 1 - removed
                count -= 1


def _body_of(channel: Any, raw: bytes) -> Any:
    """Return the body of a message in a Redis list, or b"" if kombu cannot read the message."""
    try:
        return channel.message_to_python(loads(raw)).body
    except Exception:  # anyone may have written to the list
        return b""
