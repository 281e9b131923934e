"""Task messages as kombu stores them in Redis. What many of them share is made once.

The messages of single changes share most of their text, so it is sent once for many of them, and a
script puts each together: sending and escaping all of it would take Python most of the time.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, groupby, zip_longest
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple

from kombu.utils.json import dumps

from ...changes.alone import Alone, encoded
from ...messages.change_message import BEGINNING, END, ChangeMessage
from ...messages.task_message import Form, Message

#: The parts that differ between messages of one form, found in the text that kombu makes of one.
_VARYING = ("id", "argsrepr", "body", "tag")
#: Where they are found, for messages that a script puts together.
_PLACES = ["body", "id", "id", "argsrepr", "id", "tag"]
#: The name of the command that pushes messages of single changes, in place of one of Redis.
TOGETHER = "FLASH.TASKS"
#: Defines the function that executes it. Its words are the key, the lines, and what the messages
#: share: the text around each of `_PLACES`. A message has three lines: its id, of 36 characters,
#: and `argsrepr`; what its body has for itself; and its tag.
SCRIPT = """
local function push_tasks(at, last)
    local key, lines = ARGV[at + 1], ARGV[at + 2]
    local a, b, c, d, e, f, g = unpack(ARGV, at + 3, last)
    local find, sub = string.find, string.sub
    local texts, count, from = {}, 0, 1
    while from <= #lines do
        local first = find(lines, '\\n', from, true)
        local second = find(lines, '\\n', first + 1, true)
        local third = find(lines, '\\n', second + 1, true)
        local id, argsrepr = sub(lines, from, from + 35), sub(lines, from + 36, first - 1)
        local body, tag = sub(lines, first + 1, second - 1), sub(lines, second + 1, third - 1)
        count = count + 1
        texts[count] = a .. body .. b .. id .. c .. id .. d .. argsrepr .. e .. id .. f .. tag .. g
        from = third + 1
    end
    redis.call('LPUSH', key, unpack(texts, 1, count))
end
"""


class _Shape(NamedTuple):
    """What the messages of one form have in common."""

    #: The key without prefix.
    key: str
    #: The text around the parts that differ.
    texts: list[str]
    #: Which parts these are.
    varying: list[str]


class RedisTexts:
    """Makes the texts of messages.

    Args:
        channel: kombu's channel, which knows the keys of queues and the envelope of a message.
        prepare: Returns a message in the form that the transport sends.
    """

    def __init__(self, channel: Any, prepare: Callable[[Message], Any]) -> None:
        self._channel = channel
        self._prepare = prepare
        self._shapes: dict[Form, _Shape] = {}
        #: Delivery tags, unique among all messages; a UUID each would take longer than the rest.
        self.tags = map(f"{uuid.uuid4()}-{{}}".format, count())

    def of(self, message: Message) -> tuple[str, str]:
        """Return the key without prefix, and the message as kombu stores it."""
        if not message.plain:
            return self.written(message)
        shape = self._shape(message.form)
        values = {
            "id": message.id,
            "argsrepr": encode_basestring_ascii(message.argsrepr),
            "body": _quoted(str(message.body)),
            "tag": next(self.tags),
        }
        parts = zip_longest(shape.texts, map(values.__getitem__, shape.varying), fillvalue="")
        return shape.key, "".join(chain.from_iterable(parts))

    def written(self, message: Message, tag: str | None = None) -> tuple[str, str]:
        """Return the same for a message whose headers or properties may be its own.

        Args:
            message: The message.
            tag: Its delivery tag. Default: a new one.
        """
        channel = self._channel
        raw = self._prepare(message)
        channel._inplace_augment_message(raw, "", message.queue)
        if isinstance(message.body, str):
            # kombu uses Base64, which text does not need; consumers go by this property.
            raw["body"], raw["properties"]["body_encoding"] = message.body, None
        raw["properties"]["delivery_tag"] = tag or next(self.tags)
        priority = channel._get_message_priority(raw, reverse=False)
        return channel._q_for_pri(message.queue, priority), dumps(raw)

    def together(self, messages: Sequence[ChangeMessage]) -> tuple[str, Sequence[str]] | None:
        """Return the key without prefix, and further words of the command that pushes messages.

        None if a script cannot put them together.

        Args:
            messages: Plain messages of one form and one table.
        """
        shape = self._shape(messages[0].form)
        if shape.varying != _PLACES:
            return None
        before, after, *others = shape.texts
        beginning = _quoted(BEGINNING + messages[0].changes.beginning)
        lines = "".join(self._lines(messages))
        return shape.key, [lines, before + beginning, _quoted(Alone.END + END) + after, *others]

    def _lines(self, messages: Iterable[ChangeMessage]) -> Iterator[str]:
        quoted = encode_basestring_ascii
        for changes, run in groupby(messages, lambda message: message.changes):
            opening, middle = _quoted(changes.opening), _quoted(changes.middle)
            first, rows = changes.delivery.ordinal, changes.delivery.rows
            for message, tag in zip(run, self.tags, strict=False):
                n = message.position
                yield (
                    f"{message.id}{quoted(message.argsrepr)}\n"
                    f"{opening}{first + n}{middle}{encoded(rows[n])}\n{tag}\n"
                )

    def _shape(self, form: Form) -> _Shape:
        shape = self._shapes.get(form)
        if shape is None:
            shape = self._shapes[form] = self._encode(form)
        return shape

    def _encode(self, form: Form) -> _Shape:
        marks = {uuid.uuid4().hex: name for name in _VARYING}
        task_id, argsrepr, body, tag = marks
        key, text = self.written(Message(form, task_id, argsrepr, body), tag)
        # A shown text is quoted with its own marks, so that it need not be cut out of them.
        marks[f'"{argsrepr}"'] = marks.pop(argsrepr)
        texts = re.split(f"({'|'.join(marks)})", text)
        return _Shape(key, texts[::2], [marks[mark] for mark in texts[1::2]])


def _quoted(json: str) -> str:
    """Return JSON in ASCII as it stands in a string of JSON: only two characters are escaped."""
    return json.replace("\\", "\\\\").replace('"', '\\"')
