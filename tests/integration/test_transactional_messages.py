"""What a transaction carries reaches the broker as Celery would have sent it."""

import json
from datetime import datetime, timedelta, timezone

import psycopg
import pytest
from celery import chain, chord, group
from kombu import Connection, Exchange, Queue

from flash_celery import transactional
from flash_celery.dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from flash_celery.errors import TransactionError
from flash_celery.publishing import brokers
from flash_celery.settings import Settings
from flash_celery.transactional_tasks import records, signing

from .conftest import Flash

SOON = datetime.now(timezone.utc) + timedelta(hours=1)


class OnBroker(Flash):
    """A replication worker in this process that publishes to a real broker."""

    def __init__(self, database, app, url):
        super().__init__(database, app)
        app.conf.update(
            broker_url=url,
            result_backend="cache+memory://",
            flash_signing_key="a secret of the tests",
            task_default_queue=database.name,
            broker_connection_retry_on_startup=True,
        )
        self.publisher = brokers.for_app(app)

    def taken(self, *queues):
        """Return everything that waits in these queues, and take it out."""
        messages = []
        with Connection(self.app.conf.broker_url) as connection:
            for queue in queues or [self.database.name]:
                channel = connection.channel()
                while (message := self.get(channel, queue)) is not None:
                    messages.append(message)
                channel.close()
        return messages

    def get(self, channel, queue):
        message = channel.basic_get(queue, no_ack=True)
        if message is None:
            return None
        message = channel.message_to_python(message)
        properties = dict(message.properties)
        for name in ("delivery_tag", "application_headers"):
            properties.pop(name, None)
        info = dict(message.delivery_info)
        for name in ("delivery_tag", "redelivered", "message_count"):
            info.pop(name, None)
            properties.get("delivery_info", {}).pop(name, None)
        body = bytes(message.body) if isinstance(message.body, memoryview) else message.body
        return (
            body,
            message.content_type,
            message.content_encoding,
            json.loads(json.dumps(dict(message.headers), default=str)),
            json.loads(json.dumps(properties, default=str)),
            info,
        )


@pytest.fixture(params=["valkey", "rabbit"])
def flash(request, database, new_app):
    flash = OnBroker(database, new_app(), request.getfixturevalue(request.param).url)

    @flash.app.task(name="receipt", shared=False)
    def receipt(*args, **kwargs): ...

    @flash.app.task(name="ship", shared=False, expires=900)
    def ship(*args, **kwargs): ...

    flash.receipt, flash.ship = receipt, ship
    yield flash
    flash.stop()


def both_ways(flash, send, *queues):
    """Return the messages of a function that sends, published by Celery and by a transaction."""
    send()
    published = flash.taken(*queues)
    with psycopg.connect(flash.database.dsn) as connection, transactional(connection):
        send()
    flash.do("SELECT 1")
    return published, flash.taken(*queues)


def without(message, *names):
    """Leave out what differs between two calls: moments that are counted from now."""
    body, kind, encoding, headers, properties, info = message
    headers = {name: value for name, value in headers.items() if name not in names}
    properties = {name: value for name, value in properties.items() if name not in names}
    return body, kind, encoding, headers, properties, info


OPTIONS = [
    {},
    {"countdown": 60},
    {"eta": SOON},
    {"expires": 300},
    {"expires": SOON},
    {"priority": 7},
    {"headers": {"tenant": "a", "n": 5, "when": None, "list": [1, {"x": True}]}},
    {"link": "ship"},
    {"link_error": "ship"},
    {"serializer": "pickle"},
    {"serializer": "yaml"},
    {"compression": "zlib"},
    {"shadow": "another name"},
    {"time_limit": 30, "soft_time_limit": 20},
    {"ignore_result": True},
    {"retry": False},
    {"delivery_mode": "transient"},
    {"reply_to": "someone"},
    {"message_id": "m-1", "app_id": "shop", "user_id": None},
    {"group_id": "g", "root_id": "r", "parent_id": "p"},
]


def test_every_option_arrives_as_celery_sends_it(flash):
    flash.start()
    signatures = {"ship": flash.ship.si(2)}
    is_redis = flash.app.conf.broker_url.startswith("redis")
    # AMQP has no priorities that are texts.
    all_options = [*OPTIONS, *[{"priority": "7"}] * is_redis]

    def send():
        for number, options in enumerate(all_options):
            if "yaml" in options.values():
                pytest.importorskip("yaml")
            given = {name: signatures.get(str(value), value) for name, value in options.items()}
            args, kwargs = ('é\\"%', number, None), {"key": [1.5, {"a": SOON.isoformat()}]}
            flash.receipt.apply_async(args, kwargs, task_id=f"task-{number}", **given)
        flash.app.send_task("elsewhere", [1], {"a": 2}, task_id="by-name", priority=2)

    published, carried = both_ways(flash, send)
    assert len(carried) == len(all_options) + 1
    # Priorities are queues of their own on Redis, and sort before others there.
    for normal, ours in zip(published, carried, strict=True):
        names = ["eta"] if normal[3]["id"] == "task-1" else []
        names += ["expires", "expiration"] if normal[3]["id"] in ("task-3",) else []
        names += ["expiration"] if normal[3]["id"] == "task-4" else []
        assert without(ours, *names) == without(normal, *names)


def test_canvas_arrives_as_celery_sends_it(flash):
    """Ids are given, so that both are the same; on RabbitMQ and Redis alike."""
    receipt, ship = flash.receipt, flash.ship
    flash.start()

    def send():
        named = [receipt.si(n).set(task_id=f"member-{n}") for n in range(3)]
        group(named).apply_async(task_id="group")
        chain(receipt.si(1).set(task_id="a"), ship.si(2).set(task_id="b")).apply_async()
        chord(
            [receipt.si(n).set(task_id=f"part-{n}") for n in range(2)],
            ship.s().set(task_id="body"),
            task_id="chord",
        ).apply_async()

    published, carried = both_ways(flash, send)
    assert [message[3]["task"] for message in carried] == [
        message[3]["task"] for message in published
    ]
    assert len(carried) >= 6
    for normal, ours in zip(published, carried, strict=True):
        if normal[3]["task"] != "celery.chord_unlock":  # its id is random
            names = ["expires", "expiration", "group", "root_id"]
            assert without(ours, *names)[1:] == without(normal, *names)[1:]


def test_task_for_a_topic_exchange_reaches_every_queue_bound_to_it(flash, request):
    name = flash.database.name
    exchange = Exchange(f"{name}-topic", type="topic")
    queues = [Queue(f"{name}-{key}", exchange, routing_key=key) for key in ("a.#", "a.b")]
    flash.app.conf.task_queues = [Queue(name), *queues]
    with Connection(flash.app.conf.broker_url) as connection:
        for queue in queues:
            queue(connection.channel()).declare()
    flash.start()

    def send():
        options = {"exchange": exchange.name, "routing_key": "a.b", "exchange_type": "topic"}
        flash.receipt.apply_async((2,), task_id="x", queue=queues[1].name)
        flash.receipt.apply_async((1,), task_id="y", **options)

    published, carried = both_ways(flash, send, *[queue.name for queue in queues])
    assert [message[3]["id"] for message in carried] == [*"xyxy"]
    assert [m[3]["id"] for m in published] == [*"xyxy"]
    assert carried == published


def test_task_for_a_fanout_exchange_is_refused_in_the_transaction(flash):
    exchange = Exchange(f"{flash.database.name}-all", type="fanout")
    everywhere = Queue(f"{flash.database.name}-1", exchange)
    flash.app.conf.task_queues = [Queue(flash.database.name), everywhere]
    with psycopg.connect(flash.database.dsn) as connection:
        for options in ({"queue": everywhere.name}, {"exchange": exchange, "routing_key": "x"}):
            with pytest.raises(TransactionError, match="fanout"), transactional(connection):
                flash.receipt.apply_async((1,), **options)


REFUSED = {
    "unbound": {"exchange": "amq.direct", "routing_key": "unbound"},
    "missing": {"exchange": "missing", "routing_key": "x"},
    "type": {"queue": Queue("typed", Exchange("typed", type="x-unknown"), routing_key="x")},
    "user": {"user_id": "someone else"},
    "expiration": {"expiration": -1},
}


def letters_of(flash):
    queue = DeadLetterQueue(flash.app, Settings.from_app(flash.app).flash_dead_queue)
    found = queue.find(DeadLetterFilter())
    return queue, {letter.id: letter for letter in found}


def test_tasks_that_the_broker_refuses_are_dead_letters_and_hold_up_nothing(flash):
    flash.app.conf.flash_dead_queue = f"{flash.database.name}-dead"
    flash.app.conf.task_queues = [Queue(flash.database.name)]
    is_rabbit = flash.app.conf.broker_url.startswith("amqp")
    refused = REFUSED if is_rabbit else {"missing": REFUSED["missing"]}
    flash.start()
    with psycopg.connect(flash.database.dsn) as connection, transactional(connection):
        for name, options in refused.items():
            flash.receipt.apply_async((name,), task_id=name, **options)
            flash.receipt.apply_async((name,), task_id=f"after {name}")
        for number in range(50):
            flash.receipt.apply_async((1,), task_id=f"more {number}", **refused["missing"])
        flash.receipt.apply_async((1,), task_id="last")
    flash.do("SELECT 1")
    # RabbitMQ may have those twice whose confirm was lost with the channel.
    arrived = dict.fromkeys(message[3]["id"] for message in flash.taken())
    assert list(arrived) == [*(f"after {name}" for name in refused), "last"]
    queue, letters = letters_of(flash)
    assert set(letters) == {*refused, *(f"more {number}" for number in range(50))}
    assert letters["missing"].error == "Unroutable"
    assert "exchange" in letters["missing"].message
    assert queue.retry([letters["missing"]], split=False) == 1
    assert [message[3]["id"] for message in flash.taken()] == ["missing"]


def test_task_for_a_queue_without_a_name_is_refused_in_the_transaction(flash):
    queue = Queue("own", queue_arguments={"x-max-priority": object()})
    odd = {"queue": 5}, {"queue": queue}, {"exchange": "x", "routing_key": 5}
    with psycopg.connect(flash.database.dsn) as connection:
        for options in odd:
            with pytest.raises(TransactionError, match="text"), transactional(connection):
                flash.receipt.apply_async((1,), **options)


def written_by_another_version(flash, *changes):
    """Commit tasks with values that this version would not have written."""
    with psycopg.connect(flash.database.dsn, autocommit=True) as connection:
        database = connection.execute(
            "SELECT system_identifier::text, current_database() FROM pg_control_system()"
        ).fetchone()
        (key,) = signing.keys_of(flash.replicator._settings)
        for number, fields in enumerate(changes):
            record = records.TaskRecord(
                task="receipt",
                id=f"task {number}",
                exchange="",
                routing_key=flash.database.name,
                priority=None,
                content_type="application/json",
                content_encoding="utf-8",
                body="[[1], {}, {}]",
                binary=False,
                headers=json.dumps({"id": f"task {number}", "task": "receipt"}),
                properties=json.dumps({"delivery_mode": 2}),
                declare=(json.dumps({"queue": {"name": flash.database.name}}),),
            )
            body = records.encode([record._replace(**fields)])
            message = signing.sign(key, signing.Database(*database), body)
            emit = "SELECT pg_logical_emit_message(true, 'flash.task', %s)"
            connection.execute(emit, [message])


#: What other versions may have written, and whether the task can be delivered.
ODD = [
    ({}, True),
    ({"declare": ('{"queue": {"name": 5}}',)}, True),
    ({"declare": ('{"queue": {"unknown": 1, "name": "a"}}',)}, True),
    ({"declare": ('{"exchange": {"name": "x", "type": 7}}',)}, True),
    ({"declare": ("{}",)}, True),
    ({"properties": '{"priority": {}, "delivery_mode": "odd"}'}, False),
    ({}, True),
]


@pytest.mark.parametrize("transport", ["redis", "amqp", "memory"])
def test_task_of_another_version_holds_up_nothing(request, database, new_app, transport):
    servers = {"redis": "valkey", "amqp": "rabbit"}
    server = servers.get(transport)
    url = request.getfixturevalue(server).url if server else "memory://"
    flash = OnBroker(database, new_app(), url)
    flash.app.conf.flash_dead_queue = f"{database.name}-dead"
    flash.start()
    written_by_another_version(flash, *(fields for fields, _ in ODD))
    flash.do("SELECT 1")
    arrived = [message[3]["id"] for message in flash.taken()]
    assert arrived[-1] == f"task {len(ODD) - 1}"
    expected = {f"task {number}" for number, (_, deliverable) in enumerate(ODD) if deliverable}
    assert expected <= set(arrived)
    dead = flash.taken(flash.app.conf.flash_dead_queue)
    assert len(set(arrived)) + len(dead) == len(ODD)
    flash.stop()


def test_exchange_of_another_type_holds_up_nothing(flash):
    """Two applications disagree about it; kombu refuses the second declaration, too."""
    name = f"{flash.database.name}-exchange"
    flash.app.conf.flash_dead_queue = f"{name}-dead"
    flash.start()
    for number, kind in enumerate(("direct", "topic")):
        queue = Queue(name, Exchange(name, kind), routing_key=name)
        with psycopg.connect(flash.database.dsn) as connection, transactional(connection):
            flash.receipt.apply_async((number,), queue=queue, task_id=f"task {number}")
            flash.receipt.apply_async((number,), task_id=f"after {number}")
    flash.do("SELECT 1")
    assert [message[3]["id"] for message in flash.taken(name)] == ["task 0", "task 1"]
    assert [message[3]["id"] for message in flash.taken()] == ["after 0", "after 1"]


def test_task_that_other_transports_would_drop_is_a_dead_letter(database, new_app):
    flash = OnBroker(database, new_app(), "memory://")
    flash.app.conf.flash_dead_queue = f"{database.name}-dead"

    @flash.app.task(name="receipt", shared=False)
    def receipt(*args): ...

    flash.start()
    with psycopg.connect(database.dsn) as connection, transactional(connection):
        receipt.apply_async((1,), exchange="missing", routing_key="x", task_id="lost")
        receipt.apply_async((2,), task_id="after")
    flash.do("SELECT 1")
    assert [message[3]["id"] for message in flash.taken()] == ["after"]
    assert len(flash.taken(flash.app.conf.flash_dead_queue)) == 1
    flash.stop()


def test_length_limit_lets_tasks_pass_whose_queue_does_not_exist(flash):
    name = flash.database.name
    flash.app.conf.update(flash_max_queue_length=50, flash_dead_queue=f"{name}-dead")
    flash.start()
    with psycopg.connect(flash.database.dsn) as connection, transactional(connection):
        flash.receipt.apply_async((1,), task_id="first")
        flash.receipt.apply_async((2,), task_id="new", queue=f"{name}-new")
        flash.receipt.apply_async(("lost",), exchange="missing", routing_key="x", task_id="lost")
    flash.do("SELECT 1")
    for queue, task_id in ((name, "first"), (f"{name}-new", "new")):
        assert {message[3]["id"] for message in flash.taken(queue)} == {task_id}
    assert set(letters_of(flash)[1]) == {"lost"}


def test_task_that_the_client_of_rabbitmq_cannot_write_is_refused_in_the_transaction(flash):
    if not flash.app.conf.broker_url.startswith("amqp"):
        return
    with psycopg.connect(flash.database.dsn) as connection:
        for options in ({"priority": 300}, {"queue": "q" * 300}):
            with pytest.raises(TransactionError, match="RabbitMQ"), transactional(connection):
                flash.receipt.apply_async((1,), **options)


def test_task_for_a_queue_that_is_declared_with_the_task(flash):
    flash.start()
    options = {"queue_arguments": {"x-max-priority": 5}, "max_length": 7}
    name = f"{flash.database.name}-own"
    queue = Queue(name, Exchange(name), routing_key=name, **options)
    with psycopg.connect(flash.database.dsn) as connection, transactional(connection):
        flash.receipt.apply_async((1,), queue=queue, priority=4)
        flash.receipt.apply_async((2,), queue=f"{name}-missing")
    flash.do("SELECT 1")
    assert [len(flash.taken(each)) for each in (name, f"{name}-missing")] == [1, 1]
    if flash.app.conf.broker_url.startswith("amqp"):
        with Connection(flash.app.conf.broker_url) as connection:
            queue(connection.channel()).declare()  # with these arguments, or RabbitMQ refuses
