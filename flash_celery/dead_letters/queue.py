"""The queue of dead letters, as `flash dead` reads it.

Nothing is taken out before it is done with: whoever is killed in the middle leaves the letters
there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kombu.utils.json import loads

from ..errors import ConfigurationError, NoSuchLetter, PayloadError, SubscriptionError
from ..publishing import brokers
from ..publishing.brokers.base import ConnectedPublisher, queue_depths
from ..table_name import TableName
from . import letters
from .letters import Letter

#: Letters that Redis is asked for at a time. A batch's may have megabytes.
_CHUNK = 20
#: The longest that a queue is given to put back what was given back to it.
_SETTLE_SECONDS = 5.0
#: Seconds of what an age is given in.
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
#: Bodies, each with what takes its message out.
_Messages = Generator[tuple[Any, Callable[[], object]], None, None]
#: As much of an id names a letter.
SHORT = 8


@dataclass(frozen=True)
class Wanted:
    """Which letters a command is about."""

    ids: tuple[str, ...] = ()
    handler: str | None = None
    table: str | None = None
    older: float | None = None
    newer: float | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[str] = (),
        handler: str | None = None,
        table: str | None = None,
        older: str | None = None,
        newer: str | None = None,
    ) -> Wanted:
        """Read what the command line says. Raises `ConfigurationError`."""
        return cls(tuple(ids), handler, table, _seconds(older), _seconds(newer))

    @property
    def everything(self) -> bool:
        """Whether it leaves nothing out."""
        return self == Wanted()

    def __contains__(self, letter: Letter) -> bool:
        if self.ids and not any(_named(letter, one) for one in self.ids):
            return False
        # A handler may be called by the last part of its name.
        if self.handler and self.handler not in (letter.handler, letter.handler.split(".")[-1]):
            return False
        if self.table and not {self.table, _table(self.table)} & set(letter.tables):
            return False
        if self.older is not None and letter.age < self.older:
            return False
        return self.newer is None or letter.age <= self.newer


def _named(letter: Letter, text: str) -> bool:
    return letter.id == text or (len(text) >= SHORT and letter.id.startswith(text))


def _the_one(text: str, found: Sequence[Letter]) -> str:
    ids = {letter.id for letter in found if _named(letter, text)}
    if text in ids:
        return text
    if not ids:
        raise NoSuchLetter(f"There is no dead letter {text}; see `flash dead list`.")
    if len(ids) > 1:
        raise NoSuchLetter(f"{text} may be any of {', '.join(sorted(ids))}.")
    return ids.pop()


def _table(name: str) -> str:
    try:
        return str(TableName.parse(name))
    except SubscriptionError:
        return name  # the prefix of messages need not be a table's name


def _seconds(age: str | None) -> float | None:
    if age is None:
        return None
    number, unit = (age[:-1], age[-1:]) if age[-1:] in UNITS else (age, "s")
    try:
        return float(number) * UNITS[unit]
    except ValueError:
        raise ConfigurationError(
            f"{age!r} is no age; write seconds, or a number with s, m, h or d, as in 90, 15m or 2d."
        ) from None


class LetterBox:
    """The queue of an app's dead letters."""

    def __init__(self, app: Any, name: str) -> None:
        self._app = app
        self._name = name
        #: Messages in the queue that are no dead letters, at the last reading.
        self.strangers = 0

    def count(self) -> int:
        """How many letters there are. Raises `PublishError` if the broker cannot be asked."""
        return queue_depths(self._app, [self._name])[self._name] or 0

    def find(self, wanted: Wanted) -> list[Letter]:
        """The letters that are wanted, the oldest first, without their messages.

        Raises `NoSuchLetter` for an id that none has, or several.
        """
        found = []
        with self._open() as read:
            for letter, _ in read:
                if letter in wanted:
                    found.append(replace(letter, headers={}, body=""))
        # A quorum queue shuffles what was given back to it.
        found.sort(key=lambda letter: letter.failed_at)
        if not wanted.ids:
            return found
        ids = {_the_one(text, found) for text in wanted.ids}
        return [letter for letter in found if letter.id in ids]

    def read(self, found: Iterable[Letter]) -> list[Letter]:
        """The same letters with their messages."""
        keys = {_key(letter) for letter in found}
        with self._open() as read:
            return [letter for letter, _ in read if _key(letter) in keys]

    def drop(self, found: Sequence[Letter]) -> int:
        """Take them out for good; how many were there still."""
        return self._each(found, lambda letter: None)

    def retry(self, found: Sequence[Letter], split: bool) -> int:
        """Send them to their handlers' queues; how many.

        One is taken out when the broker has confirmed its message. Raises `ConfigurationError`
        where it would be thrown away there.
        """
        names = sorted({letter.queue for letter in found})
        for handler in sorted({letter.handler for letter in found} - set(self._app.tasks)):
            raise ConfigurationError(
                f"{handler} is no task of this app, so a worker would throw its change away; "
                "`flash dead drop` does that if you mean it."
            )
        try:
            queues = [self._app.amqp.queues[name] for name in names]
        except KeyError as error:
            raise ConfigurationError(f"The queue {error} is not in task_queues; add it.") from None
        with closing(brokers.for_app(self._app)) as publisher:
            publisher.open(queues)

            def send(letter: Letter) -> None:
                whole = [letters.again(letter)]
                publisher.publish(letters.split(letter) if split else whole)

            return self._each(found, send)

    def _each(self, found: Sequence[Letter], act: Callable[[Letter], None]) -> int:
        keys = {_key(letter) for letter in found}
        done = 0
        with self._open() as read:
            for letter, remove in read:
                if _key(letter) in keys:
                    act(letter)
                    remove()
                    done += 1
        return done

    @contextmanager
    def _open(self) -> Iterator[Iterator[tuple[Letter, Callable[[], object]]]]:
        """The letters, the oldest first, each with what takes it out."""
        self.strangers = 0
        connection = ConnectedPublisher(self._app)
        # Those that come meanwhile are not read: a retried one that fails at once would come again
        # and again.
        count = self.count()
        connection.open([])
        try:
            with connection.errors():
                read = _lists if connection.driver == "redis" else _gets
                messages = read(connection.channel, self._name, count)
                with closing(messages):
                    yield self._letters(messages)
        finally:
            connection.close()

    def _letters(self, messages: _Messages) -> Iterator[tuple[Letter, Callable[[], object]]]:
        for body, remove in messages:
            try:
                yield letters.unseal(body), remove
            except PayloadError:
                self.strangers += 1


def _key(letter: Letter) -> tuple[str, str]:
    return letter.id, letter.failed_at


def _gets(channel: Any, name: str, count: int) -> _Messages:
    """Take messages without acknowledging them, and give back what was not removed.

    RabbitMQ has them all again if this process dies, a classic queue where they were.
    """
    held: dict[Any, None] = {}

    def remove(tag: Any) -> None:
        channel.basic_ack(tag)
        del held[tag]

    try:
        for _ in range(count):
            message = channel.basic_get(name, no_ack=False)
            if message is None:
                return
            if hasattr(channel, "message_to_python"):
                message = channel.message_to_python(message)
            held[message.delivery_tag] = None
            yield message.body, partial(remove, message.delivery_tag)
    finally:
        for tag in held:
            channel.basic_reject(tag, requeue=True)
        if held:
            _settle(channel, name, len(held))


def _settle(channel: Any, name: str, count: int) -> None:
    """Wait until a quorum queue has what was given back to it, which it does in its own time.

    Whoever reads next would find it empty. Another reader may have taken them, so not for ever.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        if channel.queue_declare(name, passive=True).message_count >= count:
            return
        time.sleep(0.01)


def _lists(channel: Any, name: str, count: int) -> _Messages:
    """Read Redis' list and leave it as it is. New letters come at its head."""
    key = channel._q_for_pri(name, 0)
    with channel.conn_or_acquire() as client:
        prefix = getattr(channel, "global_keyprefix", "")
        if prefix and "LRANGE" not in getattr(client, "PREFIXED_SIMPLE_COMMANDS", ()):
            key = prefix + key
        kept = 0
        while count > 0:
            chunk = client.lrange(key, -kept - min(_CHUNK, count), -kept - 1)
            if not chunk:
                return
            for raw in reversed(chunk):
                removed = 0

                def remove(raw: Any = raw) -> None:
                    nonlocal removed
                    removed += client.lrem(key, -1, raw)

                yield _body(channel, raw), remove
                kept += 1 - removed
                count -= 1


def _body(channel: Any, raw: bytes) -> Any:
    """The body of what Redis' list holds, which may be anybody's."""
    try:
        return channel.message_to_python(loads(raw)).body
    except Exception:
        return b""  # no letter
