"""The queues of lanes on RabbitMQ.

Each lane is a queue that hands its messages to one consumer at a time
(`x-single-active-consumer`). Where `H` is `_flash.ordered.<source>.<handler>`:

- `H.<lane>`: the changes, one in a message.
- `H.<lane>.head`: at most one message, about the first change of the lane: how often it was
  retried, how many processes have died on it, and until when it waits. See `lanes.amqp_drain`.
- `H.layout`: at most one message, which says how the changes were placed, and before that.
- `H.paused`: has a message while drains must leave the lanes alone.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from amqp import NotFound, PreconditionFailed

from ...errors import LanesNotReady
from ...messages.lane_messages import LaneForm, LaneMessage
from ...messages.task_message import PERSISTENT, Form, Message
from .. import declared_queues
from .amqp_wakes import Lane, Wakes

#: How often a message is read that another process may be reading (`flash lanes list`), and seconds
#: between two attempts.
_READS = 3
_READ_SECONDS = 0.05
#: Headers of a change: the layout and the number of the lanes.
LAYOUT = "flash_layout"
LANES = "flash_lanes"
#: Forms of messages that are kept.
_MOST_FORMS = 10_000
#: A quorum queue drops a message after so many redeliveries. Since RabbitMQ 4 there is a default,
#: and -1 is no limit; before, there is none, and -1 drops each message.
_UNLIMITED = {"x-delivery-limit": -1}


class Depth(NamedTuple):
    """What RabbitMQ says of a queue."""

    #: How many messages wait that no consumer has.
    ready: int
    consumers: int

    @property
    def idle(self) -> bool:
        """Whether nothing waits and no drain runs. Exact, because drains close their channels."""
        return not self.ready and not self.consumers


def lane_queue(key: str, number: int) -> str:
    """Return the name of a lane's queue."""
    return f"{key}.{number}"


def head_queue(lane: str) -> str:
    """Return the name of the queue with the memory of the first change of a lane."""
    return f"{lane}.head"


def layout_queue(key: str) -> str:
    """Return the name of the queue that has the layout."""
    return f"{key}.layout"


def number_of(lane: str) -> int:
    """Return the number of the lane with this queue."""
    return int(lane.rpartition(".")[2])


def paused_queue(key: str) -> str:
    """Return the name of the queue that has a message while a handler is paused."""
    return f"{key}.paused"


def look(channel: Any, name: str) -> Depth | None:
    """Return what waits in a queue; None if it does not exist.

    py-amqp opens the channel again that RabbitMQ closes if there is no such queue.
    """
    try:
        declared = channel.queue_declare(name, passive=True)
    except NotFound:
        return None
    return Depth(declared.message_count, declared.consumer_count)


def peek(channel: Any, name: str) -> Any:
    """Return the message of a queue that has one at most; None if it is empty.

    The message goes back at once, so that it is there for the next reader.
    """
    message = channel.basic_get(name, no_ack=False)
    if message is not None:
        channel.basic_reject(message.delivery_tag, requeue=True)
    return message


def recorded(channel: Any, key: str) -> dict[str, Any]:
    """Return the layout of a handler's lanes as they are; empty if they are not set up."""
    name = layout_queue(key)
    if look(channel, name) is None:
        return {}
    for _ in range(_READS):
        if (message := peek(channel, name)) is not None:
            found: dict[str, Any] = json.loads(message.body)
            return found
        time.sleep(_READ_SECONDS)
    return {}


def note(queue: str, content: Mapping[str, Any]) -> Message:
    """Return a message for a queue that has one at most."""
    form = Form(queue, "", {}, {"delivery_mode": PERSISTENT})
    return Message(form, "", "", json.dumps(content))


class AmqpLanes:
    """Sets up the lanes of handlers on one connection, and makes the messages for them.

    Args:
        app: The Celery app.
        channel: A channel of py-amqp that nothing else uses.
        publish: Publishes messages, and waits for the confirms.
    """

    def __init__(
        self, app: Any, channel: Any, publish: Callable[[Sequence[Message]], None]
    ) -> None:
        self._app = app
        self._channel = channel
        self._publish = publish
        self._wakes = Wakes(app)
        #: The lanes as they are set up, by their key.
        self._set_up: dict[str, LaneForm] = {}
        #: The form of the messages in each lane.
        self._forms: dict[tuple[LaneForm, int], Form] = {}
        #: The keys of the handlers that are paused.
        self._paused: set[str] = set()

    def has(self, form: LaneForm) -> bool:
        """Return whether these lanes are set up."""
        return self._set_up.get(form.key) is form

    def prepare(self, form: LaneForm, paused: bool | None) -> None:
        """Set up lanes, unless they are; wake those in which changes wait.

        Args:
            form: The lanes.
            paused: Whether drains must leave the lanes alone; None leaves that as it is.

        Raises:
            LanesNotReady: Changes wait that were placed by another layout.
        """
        found = recorded(self._channel, form.key)
        layout, lanes = found.get("layout"), int(found.get("lanes") or 0)
        self._set_paused(form, paused)
        if layout not in (None, form.layout):
            self._wake_waiting(form, lanes)
            if not all(depth.idle for _, depth in self._depths(form.key, lanes)):
                raise LanesNotReady(
                    f"The changes in the lanes of {form.handler} were placed by another ordering "
                    "key or number of lanes; new ones wait until workers have handled them "
                    "(`flash lanes list`)."
                )
            self._delete(form.key, range(form.lanes, lanes))
        for number in range(form.lanes):
            self._declare_lane(form, lane_queue(form.key, number))
        if layout != form.layout:
            content = {"layout": form.layout, "lanes": form.lanes, "former": layout or ""}
            self._publish([note(layout_queue(form.key), content)])
        self._set_up[form.key] = form
        if len(self._forms) > _MOST_FORMS:  # a session makes new ones for a table's new key
            self._forms.clear()
        self._wake_waiting(form, form.lanes)

    def messages(self, message: LaneMessage) -> list[Message]:
        """Return the messages for the queues of lanes."""
        form, task_id = message.lane_form, str(uuid.uuid4())
        return [
            Message(self._form(form, number), task_id, "", text)
            for number, _, text in message.pushes
        ]

    def wakes(self, messages: Sequence[LaneMessage]) -> list[Message]:
        """Return a wake for each lane that got changes and needs one."""
        touched = Counter(
            (message.lane_form, number)
            for message in messages
            if message.lane_form.key not in self._paused
            for number, *_ in message.pushes
        )
        return [
            self._wakes.to(address(form, number))
            for (form, number), count in touched.items()
            if self._needs_wake(lane_queue(form.key, number), count)
        ]

    def depth(self, key: str) -> int:
        """Return how many changes wait in the lanes of a key."""
        form = self._set_up.get(key)
        lanes = form.lanes if form else int(recorded(self._channel, key).get("lanes") or 0)
        return sum(depth.ready for _, depth in self._depths(key, lanes))

    def waiting(self, queue: str) -> int:
        """Return how many messages wait in a queue; 0 if it does not exist."""
        # Not on the channel that publishes, which RabbitMQ would close.
        depth = look(self._channel, queue)
        return depth.ready if depth is not None else 0

    def _needs_wake(self, lane: str, count: int) -> bool:
        """Return whether a lane that got so many changes has to be woken.

        A drain that has it looks again when it ends. If changes wait that came before, the wake for
        them has not been received, or they wait for a retry.
        """
        depth = look(self._channel, lane)
        return depth is None or (not depth.consumers and depth.ready <= count)

    def _form(self, form: LaneForm, number: int) -> Form:
        found = self._forms.get((form, number))
        if found is None:
            queue = lane_queue(form.key, number)
            headers = {**form.form.headers, LAYOUT: form.layout, LANES: form.lanes}
            found = replace(form.form, queue=queue, headers=headers)
            self._forms[form, number] = found
        return found

    def _set_paused(self, form: LaneForm, paused: bool | None) -> None:
        for name in (layout_queue(form.key), paused_queue(form.key)):
            self._declare(name, self._of_one_message(form))
        name = paused_queue(form.key)
        depth = look(self._channel, name)
        is_paused = depth is not None and depth.ready > 0
        if paused is None:
            paused = is_paused
        if paused and not is_paused:
            self._publish([note(name, {})])
        elif is_paused and not paused:
            self._channel.queue_purge(name)
        (self._paused.add if paused else self._paused.discard)(form.key)

    def _wake_waiting(self, form: LaneForm, lanes: int) -> None:
        if form.key in self._paused:
            return
        waiting = [number for number, depth in self._depths(form.key, lanes) if depth.ready]
        self._publish([self._wakes.to(address(form, number)) for number in waiting])

    def _depths(self, key: str, lanes: int) -> Iterator[tuple[int, Depth]]:
        for number in range(lanes):
            depth = look(self._channel, lane_queue(key, number))
            if depth is not None:
                yield number, depth

    def _declare_lane(self, form: LaneForm, name: str) -> None:
        # If a policy bounds the queue, it refuses new messages instead of dropping old ones.
        arguments = {"x-single-active-consumer": True, "x-overflow": "reject-publish"}
        self._declare(name, {**arguments, **self._type(form)})
        self._declare(head_queue(name), self._of_one_message(form))

    def _of_one_message(self, form: LaneForm) -> dict[str, Any]:
        return {"x-max-length": 1, "x-overflow": "drop-head", **self._type(form)}

    def _type(self, form: LaneForm) -> dict[str, Any]:
        """Return the arguments for the type of queue: that of the handler's queue."""
        queue = self._app.amqp.queues[form.form.queue]
        named = (queue.queue_arguments or {}).get("x-queue-type")
        if named != "quorum" and not declared_queues.is_quorum(self._app):
            return {"x-queue-type": "classic"}
        version = str(self._channel.connection.server_properties.get("version", ""))
        unlimited = _UNLIMITED if int(version.partition(".")[0] or 0) >= 4 else {}
        return {"x-queue-type": "quorum", **unlimited}

    def _declare(self, name: str, arguments: dict[str, Any]) -> None:
        """Declare a queue, again if it has other arguments and is empty.

        Raises:
            LanesNotReady: It has other arguments, and changes.
        """
        options = {"durable": True, "auto_delete": False, "arguments": arguments}
        try:
            self._channel.queue_declare(name, **options)
            return
        except PreconditionFailed as error:
            depth = look(self._channel, name)
            if depth is not None and not depth.idle and "x-max-length" not in arguments:
                raise LanesNotReady(
                    f"The lane {name} has other arguments than this project's ("
                    f"{error.reply_text}); it is declared again when workers have emptied it."
                ) from error
        self._channel.queue_delete(name)
        self._channel.queue_declare(name, **options)

    def _delete(self, key: str, numbers: Sequence[int]) -> None:
        for number in numbers:
            name = lane_queue(key, number)
            self._channel.queue_delete(head_queue(name))
            self._channel.queue_delete(name)


def address(form: LaneForm, number: int) -> Lane:
    """Return a lane with where its wakes go."""
    return Lane(
        lane_queue(form.key, number),
        form.source,
        form.handler,
        form.form.queue,
        form.form.properties.get("priority"),
    )
