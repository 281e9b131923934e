"""What every publisher promises, on each broker and on the twin in memory."""

import itertools
import json
import re
import threading
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from urllib.parse import urlsplit
from uuid import uuid4

import amqp
import pytest
import redis
from celery import Celery
from kombu import Queue

from example_project.servers import Valkey, free_port, wait_until
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.history import History
from flash_celery.changes.operations import Part
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.errors import PublishError, Unroutable
from flash_celery.messages.deduplication import NOTHING
from flash_celery.messages.task_message import HELD, Form, Message
from flash_celery.messages.templates import Template
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing import declared_queues
from flash_celery.publishing.brokers import for_app
from flash_celery.publishing.brokers.amqp import AmqpPublisher
from flash_celery.publishing.brokers.base import queue_depths
from flash_celery.publishing.brokers.kombu import KombuPublisher
from flash_celery.publishing.brokers.memory import MemoryPublisher
from flash_celery.publishing.brokers.redis import RedisPublisher
from flash_celery.publishing.hold_queues import restored
from tests.proxy import Proxy
from tests.sentinel import OPTIONS, Sentinel


class Broker:
    """A publisher, and a way to look into the queues it fills."""

    def __init__(self, app):
        self.app = app
        self.publisher = for_app(app)

    def read(self, queue):
        return [message.headers["id"] for message in self.messages(queue)]

    def messages(self, queue):
        with self.app.connection_for_read() as connection:
            bound = self.app.amqp.queues[queue](connection.default_channel)
            received = []
            while (message := bound.get(no_ack=True)) is not None:
                received.append(message)
            return received


class Twin:
    def __init__(self, app):
        self.app = app
        self.publisher = MemoryPublisher()

    def read(self, queue):
        return [message.headers["id"] for message in self.messages(queue)]

    def messages(self, queue):
        received, self.publisher.queues[queue] = self.publisher.queues[queue], []
        return received


KINDS = ["memory", "redis", "prefixed", "sentinel", "rabbitmq", "quorum", "kombu"]


@pytest.fixture(scope="session")
def sentinel(valkey):
    """The URL of a Sentinel that watches Valkey."""
    with Sentinel(valkey) as server:
        yield server.url


@pytest.fixture(params=KINDS)
def broker(request):
    app = Celery("shop", set_as_current=False)
    if request.param in ("redis", "prefixed"):
        app.conf.broker_url = request.getfixturevalue("valkey").url
        if request.param == "prefixed":
            app.conf.broker_transport_options = {"global_keyprefix": "shop:"}
    elif request.param == "sentinel":
        app.conf.broker_url = request.getfixturevalue("sentinel")
        app.conf.broker_transport_options = OPTIONS
    elif request.param in ("rabbitmq", "quorum"):
        app.conf.broker_url = request.getfixturevalue("rabbit").url
        if request.param == "quorum":
            arguments = {"x-queue-type": "quorum"}
            app.conf.task_queues = [
                Queue(name, durable=True, queue_arguments=arguments) for name in ("first", "second")
            ]
            app.conf.task_default_queue = "first"
    else:
        app.conf.broker_url = "memory://"
    broker = (Twin if request.param == "memory" else Broker)(app)
    queues = [app.amqp.queues[name] for name in ("first", "second")]
    broker.publisher.open(queues)
    yield broker
    broker.publisher.close()
    if request.param in ("rabbitmq", "quorum"):
        with app.connection_for_write() as connection:
            for queue in queues:
                queue(connection.default_channel).delete()


FORMS = {}


def message(number, queue="first", **properties):
    form = FORMS.setdefault(
        (queue, *properties.items()),
        Form(queue, "shop.handle", {"task": "shop.handle"}, {"delivery_mode": 2, **properties}),
    )
    return Message(form, str(number), f'the "{number}"th: 5 %', f'"é{number}"')


def test_publisher_delivers_messages_once_in_order(broker):
    broker.publisher.publish([message(n, "first" if n % 3 else "second") for n in range(1, 2500)])
    assert broker.read("first") == [str(n) for n in range(1, 2500) if n % 3]
    assert broker.read("second") == [str(n) for n in range(1, 2500) if not n % 3]


def test_publisher_keeps_every_property_of_a_message(broker):
    first, altered = message(1, priority=4), message(2, priority=4)
    altered.headers["trace"] = "abc"
    packed = message(3, priority=4).with_body(b"\x00\xff", NOTHING)
    broker.publisher.publish([first, altered, packed])
    plain, other, binary = broker.messages("first")
    for number, received in enumerate((plain, other), 1):
        assert received.headers["task"] == "shop.handle"
        assert received.headers["argsrepr"] == f'the "{number}"th: 5 %'
        assert received.headers["id"] == received.headers["root_id"] == str(number)
        assert received.properties["correlation_id"] == str(number)
        assert received.properties["priority"] == 4
        body = received.body if isinstance(received.body, str) else bytes(received.body).decode()
        assert body == f'"é{number}"'
        assert received.content_type == "application/json"
    assert (plain.headers.get("trace"), other.headers["trace"]) == (None, "abc")
    assert bytes(binary.body) == b"\x00\xff"


#: What a row or a table may bring into a message: each needs escaping somewhere.
HOSTILE = 'a"b\\"\\n\\\\%(id)s\né\U0001f600\x7f\u2028\'{}'


def changes_of(app):
    """Messages of single changes: of two tables, in runs of different lengths."""

    @app.task(name="shop.handle", shared=False)
    def task(change): ...

    template = Template(app, task, {"queue": "first", "priority": 3}, None, "1/slot", 1 << 20)
    made = []
    for number, length in enumerate((1, 7, 600, 1, 1, 30, 2, 9) * 2):
        name = HOSTILE if number % 3 else "orders"
        columns = Column("id", 25, "text", True), Column(HOSTILE, 25, "text", False)
        table = TABLES.setdefault(name, Table(name, name, None, "d", ("id",), columns))
        history = History("7", 1) if number % 2 else None
        context = json.dumps({"user": HOSTILE}) if number % 4 == 1 else ""
        transaction = Transaction(Lsn(number << 30), number, number, history, context)
        rows = [
            encode_row("I", 1, None, None, [f"{n}{HOSTILE}".encode(), bytes(n % 7)])
            for n in range(length)
        ]
        made += template.each(
            Delivery(table, transaction, 95, Part(number % 3), number % 2, rows, 0)
        )
    made[300].headers["trace"] = "abc"
    return made


TABLES = {}


def test_publisher_writes_single_changes_like_any_message(broker):
    messages = changes_of(broker.app)
    broker.publisher.publish(messages)
    received = broker.messages("first")
    for sent, found in zip(messages, received, strict=True):
        assert found.headers.items() >= sent.headers.items()
        assert found.properties.items() >= sent.properties.items()
        body = found.body if isinstance(found.body, str) else bytes(found.body).decode()
        assert body == sent.body
        assert json.loads(body)


def test_publisher_writes_single_changes_on_redis_as_kombu_does(valkey):
    app = Celery("shop", broker=valkey.url, set_as_current=False)
    publisher = RedisPublisher(app)
    publisher.open([app.amqp.queues["first"]])
    messages = changes_of(app)
    publisher.publish(messages)
    assert publisher._texts.together(messages[8:100])
    with redis.Redis(port=valkey.port) as client:
        stored = client.lrange("first\x06\x163", 0, -1)[::-1]
        client.delete("first\x06\x163")
    tags = [json.loads(text)["properties"]["delivery_tag"] for text in stored]
    assert len({*tags}) == len(messages)
    for sent, tag, text in zip(messages, tags, stored, strict=True):
        assert sent.headers  # so that it is encoded by itself
        assert publisher._texts.written(sent, tag) == ("first\x06\x163", text.decode())
    publisher.close()


def test_publisher_writes_the_frames_of_py_amqp():
    from kombu.transport.pyamqp import Channel

    publisher = AmqpPublisher(Celery("shop", set_as_current=False))
    publisher._channel = SimpleNamespace(prepare_message=partial(Channel.prepare_message, None))
    publisher._forms = {}
    for length in range(300):
        form = Form("a % b", "shop.handle", {"shadow": "%" * length}, {"priority": 37})
        message = Message(form, str(uuid4()), "é" * (length // 2), "body")
        assert message.plain
        fast = publisher._written(message)
        assert message.headers["shadow"] == "%" * length
        assert not message.plain
        assert publisher._written(message) == fast


def test_publisher_accepts_no_messages(broker):
    broker.publisher.publish([])
    assert broker.read("first") == []


def test_publisher_can_be_reopened(broker):
    broker.publisher.close()
    broker.publisher.close()
    broker.publisher.open([broker.app.amqp.queues["first"]])
    broker.publisher.publish([message(1)])
    assert broker.read("first") == ["1"]


@pytest.fixture(params=["redis", "rabbitmq"])
def unreachable(request):
    scheme = {"redis": "redis", "rabbitmq": "amqp"}[request.param]
    return Celery("shop", broker=f"{scheme}://me:s3cret@127.0.0.1:1//", set_as_current=False)


def test_publisher_error_without_a_broker_hides_the_password(unreachable):
    publisher = for_app(unreachable)
    with pytest.raises(PublishError, match=r"127\.0\.0\.1:1") as caught:
        publisher.open([unreachable.amqp.queues["flash"]])
    assert "s3cret" not in str(caught.value)
    publisher.close()


@pytest.mark.parametrize("given", [{}, {"sentinel_kwargs": {"password": "s3cret"}}])
def test_publisher_asks_a_silent_sentinel_once(sentinel, given):
    """Where redis-py and kombu try again and again, nothing is logged for minutes."""
    with Proxy(urlsplit(sentinel).port) as proxy:
        app = Celery("shop", broker=f"sentinel://127.0.0.1:{proxy.port}/0", set_as_current=False)
        app.conf.broker_transport_options = {**OPTIONS, **given}
        publisher = for_app(app, timeout=0.5)
        proxy.stall()
        with pytest.raises(PublishError, match="and 1 of its Sentinels gave no answer") as caught:
            publisher.open([app.amqp.queues["first"]])
        assert proxy.accepted == 1
        assert "s3cret" not in str(caught.value)
        proxy.heal()
        if not given:
            publisher.open([app.amqp.queues["first"]])
        publisher.close()


def test_publisher_asks_a_silent_redis_once(valkey):
    with Proxy(valkey.port) as proxy:
        app = Celery("shop", broker=f"redis://127.0.0.1:{proxy.port}/0", set_as_current=False)
        publisher = for_app(app, timeout=0.5)
        proxy.stall()
        with pytest.raises(PublishError):
            publisher.open([app.amqp.queues["first"]])
        assert proxy.accepted == 1


@pytest.mark.parametrize("kind", ["valkey", "rabbit"])
def test_publisher_tries_every_host_of_a_url(kind, request):
    url = request.getfixturevalue(kind).url
    dead = f"{url.partition(':')[0]}://127.0.0.1:1"
    app = Celery("shop", broker=f"{dead};{dead};{url}", set_as_current=False)
    publisher = for_app(app)
    publisher.open([])
    publisher.check()
    publisher.close()


def test_publisher_reports_messages_for_a_deleted_queue_as_unroutable(rabbit):
    app = Celery("shop", broker=rabbit.url, set_as_current=False)
    publisher = for_app(app)
    publisher.open([])
    with pytest.raises(Unroutable, match="no queue nowhere"):
        publisher.publish([message(1, "nowhere")])
    publisher.close()


def test_publisher_declares_queues_like_a_celery_worker(rabbit):
    app = Celery("shop", broker=rabbit.url, set_as_current=False)
    app.conf.task_queue_max_priority = 9
    queue = app.amqp.queues["priorities"]
    publisher = for_app(app)
    publisher.open([queue])
    publisher.publish([message(1, "priorities", priority=2), message(2, "priorities", priority=8)])
    publisher.close()
    with app.connection_for_read() as connection:
        bound = queue(connection.default_channel)
        bound.queue_declare()
        assert [bound.get(no_ack=True).headers["id"] for _ in range(2)] == ["2", "1"]
        bound.delete()


def test_publisher_uses_the_priority_keys_of_redis(valkey):
    app = Celery("shop", broker=valkey.url, set_as_current=False)
    publisher = for_app(app)
    publisher.open([app.amqp.queues["ordered"]])
    publisher.publish([message(1, "ordered", priority=9), message(2, "ordered", priority=0)])
    publisher.close()
    with redis.Redis(port=valkey.port) as client:
        assert client.llen("ordered\x06\x169") == 1
        assert client.llen("ordered") == 1
        client.delete("ordered", "ordered\x06\x169")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cluster-enabled": "yes"}, "this is a Redis Cluster, which Celery does not support"),
        ({"rename-command": "EVAL no"}, "unknown command 'EVAL'; scripts must be allowed"),
    ],
    ids=["cluster", "no scripts"],
)
def test_publisher_says_what_helps_where_redis_refuses_every_push(options, said):
    own_ports = {"cluster-port": free_port()} if "cluster-enabled" in options else {}
    with Valkey(**options, **own_ports) as own, redis.Redis(port=own.port) as client:
        if own_ports:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: "'ok'" in str(client.execute_command("CLUSTER INFO")), "slots")
        app = Celery("shop", broker=own.url, set_as_current=False)
        publisher = for_app(app)

        def push():
            publisher.open([app.amqp.queues["first"]])
            publisher.publish([message(1), message(2, "second")])

        with pytest.raises(PublishError, match=re.escape(said)):
            push()
        publisher.close()


def test_publisher_counts_the_messages_of_a_queue(broker):
    if isinstance(broker, Twin) or broker.app.conf.broker_url == "memory://":
        return  # the broker lives in this process
    broker.publisher.publish([message(n) for n in range(3)])
    missing = None if isinstance(broker.publisher, AmqpPublisher) else 0
    assert queue_depths(broker.app, ["first", "nowhere"]) == {"first": 3, "nowhere": missing}
    broker.read("first")


def test_publisher_counts_many_queues_on_one_connection(valkey):
    app = Celery("shop", broker=valkey.url, set_as_current=False)
    with redis.Redis(port=valkey.port) as client:

        def connections(queues):
            before = client.info()["total_connections_received"]
            queue_depths(app, queues)
            return client.info()["total_connections_received"] - before

        assert connections(["first", "second", "third"]) == connections(["first"]) > 0


def test_publisher_is_chosen_by_transport():
    kinds = {
        "redis://": RedisPublisher,
        "rediss://": RedisPublisher,
        "sentinel://": RedisPublisher,
        "amqp://": AmqpPublisher,
        "pyamqp://": AmqpPublisher,
        "memory://": KombuPublisher,
    }
    for url, kind in kinds.items():
        assert type(for_app(Celery("shop", broker=url, set_as_current=False))) is kind, url


def test_publisher_keeps_order_and_repeats_nothing_if_a_queue_refuses(rabbit):
    arguments = {"x-max-length": 10, "x-overflow": "reject-publish"}
    queue = Queue("short", durable=True, queue_arguments=arguments)
    app = Celery("shop", broker=rabbit.url, set_as_current=False)
    app.conf.task_queues = [queue]
    publisher = for_app(app)
    left = [message(n, "short") for n in range(60)]
    read = []
    with app.connection_for_read() as connection:
        bound = queue(connection.default_channel)
        for _ in range(200):
            publisher.open([queue])
            try:
                publisher.publish(left)
                left = []
            except PublishError as error:
                left = left[error.confirmed :]
            publisher.close()
            for _ in range(5):
                if (received := bound.get(no_ack=True)) is not None:
                    read.append(int(received.headers["id"]))
            if not left and len(set(read)) == 60:
                break
        bound.delete()
    assert sorted(set(read)) == list(range(60))
    # Messages accepted after the first refusal are sent again; no later ones are.
    assert len(read) <= 60 + 10


@contextmanager
def consuming(rabbit, queue):
    """Consume in the background; yield the numbers of the messages in their order."""
    read, end = [], threading.Event()

    def take(received):
        read.append(int(received.headers["id"]))
        received.channel.basic_ack(received.delivery_tag)

    def consume():
        with amqp.Connection(host=f"127.0.0.1:{rabbit.port}") as connection:
            channel = connection.channel()
            channel.basic_qos(0, 5, False)
            channel.basic_consume(queue, callback=take)
            while not end.is_set():
                with suppress(TimeoutError):
                    connection.drain_events(timeout=0.1)

    thread = threading.Thread(target=consume)
    thread.start()
    try:
        yield read
    finally:
        end.set()
        thread.join(30)


BOUNDS = {"max-length": 20, "overflow": "reject-publish"}


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_publisher_lets_no_message_overtake_a_refused_one(rabbit, kind):
    arguments = {f"x-{name}": value for name, value in BOUNDS.items()}
    queue = Queue("short", durable=True, queue_arguments={**arguments, "x-queue-type": kind})
    publisher = for_app(Celery("shop", broker=rabbit.url, set_as_current=False))
    publisher.open([queue])
    left = messages = [message(number, "short") for number in range(500)]
    with consuming(rabbit, "short") as read:
        while left:
            try:
                publisher.publish(left)
                left = []
            except PublishError as error:
                left = left[error.confirmed :]
                publisher.open([queue])
        wait_until(lambda: len(set(read)) == len(messages), "all of them")
    publisher.channel.queue_delete("short")
    publisher.close()
    assert read == list(range(len(messages)))


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_publisher_has_few_messages_unconfirmed_on_a_queue_with_a_policy(rabbit, kind, caplog):
    """RabbitMQ does not announce policies. Messages could overtake a refused one if a consumer
    makes room in between."""
    rabbit.control("set_policy", "short", "^short$", json.dumps(BOUNDS), "--apply-to", "queues")
    queue = Queue("short", durable=True, queue_arguments={"x-queue-type": kind})
    publisher = for_app(Celery("shop", broker=rabbit.url, set_as_current=False))
    publisher.open([queue])
    with pytest.raises(PublishError, match="no room") as caught:
        publisher.publish([message(number, "short") for number in range(1000)])
    assert caught.value.confirmed < publisher._sent < 100
    for _ in range(2):
        publisher.open([queue])
        with pytest.raises(PublishError, match="no room") as caught:
            publisher.publish([message(number, "short") for number in range(1000)])
        assert (caught.value.confirmed, publisher._sent) == (0, 1)
    assert caplog.text.count("it gets one message at a time") == 1
    publisher.channel.queue_delete("short")
    publisher.close()
    rabbit.control("clear_policy", "short")


def test_publisher_confirms_nothing_after_the_broker_is_lost():
    with Valkey() as own:
        app = Celery("shop", broker=own.url, set_as_current=False)
        publisher = for_app(app)
        queue = app.amqp.queues["first"]
        publisher.open([queue])
        publisher.publish([message(n) for n in range(10)])
    with pytest.raises(PublishError) as caught:
        publisher.open([queue])
    assert caught.value.confirmed == 0
    publisher.close()


def test_held_messages_are_requeued_in_order_and_unchanged(broker):
    """Only as much as may be published, and with the priority it had."""
    name = f"flash.paused.{uuid4()}"
    broker.publisher.open(
        [broker.app.amqp.queues["first"], declared_queues.queue(broker.app, name)]
    )

    def parked(number):
        headers = {HELD: {"queue": "first" if number % 2 else "gone", "priority": number % 10}}
        form = Form(name, "shop.handle", {"task": "shop.handle", **headers}, {"delivery_mode": 2})
        return Message(form, str(number), "é", f'"é{number}"')

    broker.publisher.publish([parked(number) for number in range(100)])
    rest = [30, 0]

    def admit(messages):
        count = min(len(messages), rest[0]) if rest else len(messages)
        rest[:1] = [rest[0] - count] if rest and rest[0] > count else []
        return count

    calls = 0
    while broker.publisher.requeue(name, partial(restored, ["first"]), admit):
        calls += 1
        assert calls <= 110
    received = sorted(broker.messages("first"), key=lambda message: int(message.headers["id"]))
    assert [message.headers["id"] for message in received] == [str(number) for number in range(100)]
    assert [message.properties["priority"] for message in received] == [n % 10 for n in range(100)]
    assert not any(HELD in message.headers for message in received)
    assert broker.publisher.depth(name) == 0
    broker.publisher.publish([parked(number) for number in (1, 11, 21, 31)])
    while broker.publisher.requeue(name, partial(restored, ["first"]), len):
        pass
    assert broker.read("first") == ["1", "11", "21", "31"]


def test_hold_queue_of_type_quorum_keeps_its_order(rabbit):
    """Whether a process has died with some of it in its hands, or there was no room for all."""
    app = Celery("shop", broker=rabbit.url, set_as_current=False)
    app.conf.task_default_queue_type = "quorum"
    name = f"flash.paused.{uuid4()}"
    queues = [app.amqp.queues["moved"], declared_queues.queue(app, name)]
    first, other = for_app(app), for_app(app)
    first.open(queues)
    first.publish([message(number, name) for number in range(1000)])
    other.open([])
    taken = other._get(other._connection.channel(), name)
    assert [requeued.headers["id"] for requeued in taken] == [
        str(number) for number in range(len(taken))
    ]
    other._connection.connection.transport.sock.close()
    rooms = itertools.cycle(range(12))

    def admit(messages):
        return min(len(messages), next(rooms))

    wait_until(lambda: first.depth(name) == 1000, "what was held to be back")
    while first.requeue(name, partial(restored, ["moved"]), admit):
        pass
    channel = first.channel
    read = iter(lambda: channel.basic_get("moved", no_ack=True), None)
    assert [requeued.headers["id"] for requeued in read] == [str(number) for number in range(1000)]
    first.close()
    rabbit.control("delete_queue", "moved")
    rabbit.control("delete_queue", name)


def test_held_messages_that_cannot_be_read_are_set_aside(valkey, caplog):
    """Every client that can write to Redis could end the replication worker again and again."""
    app = Celery("shop", broker=valkey.url, set_as_current=False)
    name = f"flash.paused.{uuid4()}"
    publisher = for_app(app)
    publisher.open([])
    publisher.publish([message(1, name), message(2, name)])
    with redis.Redis.from_url(valkey.url) as client:
        broken = [b"\xff", b"5", b"[]", b'{"headers": 5, "properties": {}, "body": ""}']
        client.lpush(name, *broken)
        publisher.publish([message(3, name)])
        while publisher.requeue(name, partial(restored, ["first"]), len):
            pass
        assert client.lrange(f"{name}.unreadable", 0, -1) == broken[::-1]
        client.delete(f"{name}.unreadable")
    publisher.close()
    assert [requeued.headers["id"] for requeued in Broker(app).messages("first")] == ["1", "2", "3"]
    assert caplog.text.count("cannot be read") == len(broken)


def test_held_messages_are_requeued_by_one_process(rabbit):
    """A stopped process holds messages that no other sees."""
    app = Celery("shop", broker=rabbit.url, set_as_current=False)
    name = f"flash.paused.{uuid4()}"
    queues = [app.amqp.queues["moved"], declared_queues.queue(app, name)]
    first, other = for_app(app), for_app(app)
    for publisher in (first, other):
        publisher.open(queues)
    first.publish([message(number, name) for number in range(3)])
    back = partial(restored, ["moved"])

    def admit(messages):
        with pytest.raises(PublishError, match="RESOURCE_LOCKED"):
            other.requeue(name, back, len)
        return 1

    assert first.requeue(name, back, admit)
    other.open(queues)
    assert other.requeue(name, back, len)
    assert not other.requeue(name, back, len)
    assert first.depth("moved") == 3
    for publisher in (first, other):
        publisher.close()
    rabbit.control("delete_queue", "moved")
    rabbit.control("delete_queue", name)
