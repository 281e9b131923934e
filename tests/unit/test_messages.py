"""Task messages: options, queues, ids."""

import json
import time
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import celery
import pytest
from kombu import Exchange, Queue
from kombu.common import Broadcast
from kombu.serialization import register, registry
from kombu.utils import json as kombu_json

from flash_celery import Backfill, on_backfill_end, on_change, on_message
from flash_celery.changes import json_codec
from flash_celery.changes.change import Operation
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.dead_letters.oversize import Oversize
from flash_celery.errors import ConfigurationError, SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.messages import sent_tasks
from flash_celery.messages.sent_tasks import SentTask
from flash_celery.messages.task_options import TaskOptions
from flash_celery.messages.templates import Templates
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing.hold_queues import restored
from flash_celery.settings import Settings
from flash_celery.transactional_tasks.records import TaskRecord
from tests.unit.builders import templates_of

# Celery would rather see queue= and routing_key= in task_routes; they work all the same.
pytestmark = pytest.mark.filterwarnings("ignore::celery.exceptions.CDeprecationWarning")

TABLE = Table("public", "orders", None, "d", ("id",), (Column("id", 23, "integer", True),))
DELIVERY = Delivery(
    TABLE, Transaction(Lsn(0x16B3748), 7, 0), 3, 0, 0, [encode_row("I", 0, None, None, [b"5"])]
)
INSERT, DELETE = Operation.INSERT, Operation.DELETE


@pytest.fixture
def make(new_app, monkeypatch):
    def make(task_options=None, conf=None, source="", **subscription):
        monkeypatch.setattr(celery._state, "_on_app_finalizers", set())
        app = new_app(broker_url="memory://", **(conf or {}))

        @on_change("orders", **subscription)
        @app.task(name="shop.handle", **(task_options or {}))
        def handle(change):
            pass

        app.finalize()
        (declared,) = subscriptions_of(app)
        made = templates_of(app, [declared], source)
        return lambda operation=INSERT: made[declared, operation]

    return make


def test_logical_message_is_routed_by_its_prefix(app):
    @on_message("order.paid")
    @app.task(name="shop.paid", shared=False)
    def paid(message):
        pass

    app.conf.update(broker_url="memory://", flash_routes={"order.*.message": {"queue": "mail"}})
    app.finalize()
    (declared,) = subscriptions_of(app)
    assert templates_of(app, [declared])[declared, Operation.MESSAGE].queue == "mail"


def test_flash_routes_names_begin_with_the_source(app):
    @on_message("order.paid", source="billing")
    @on_change("billing:orders")
    @on_change("orders")
    @app.task(name="shop.handle", shared=False)
    def handle(change):
        pass

    routes = {
        "public.orders.insert": "here",
        "billing:public.orders.insert": "there",
        "billing:order.*": "mail",
        "*.*.delete": "cleanup",
        "public.*": "rest",
    }
    app.conf.update(broker_url="memory://", flash_routes=routes)
    app.finalize()
    here, there, message = subscriptions_of(app)
    templates = templates_of(app, [here, there, message])
    assert templates[here, INSERT].queue == "here"
    assert templates[there, INSERT].queue == "there"
    assert templates[here, DELETE].queue == templates[there, DELETE].queue == "cleanup"
    assert templates[here, Operation.UPDATE].queue == "rest"
    assert templates[there, Operation.UPDATE].queue == "flash"
    assert templates[message, Operation.MESSAGE].queue == "mail"


def test_message_is_accepted_by_a_celery_worker(make):
    message = make()().each(DELIVERY)[0]
    assert message.queue == "flash"
    assert message.headers["task"] == "shop.handle"
    assert message.headers["id"] == message.headers["root_id"]
    assert message.headers["argsrepr"] == "insert public.orders id=5 @0/16B3748"
    assert message.headers["kwargsrepr"] == "{}"
    assert message.properties == {
        "correlation_id": message.headers["id"],
        "reply_to": "",
        "delivery_mode": 2,
    }
    (argument,), kwargs, embed = json.loads(message.body)
    assert argument["__type__"] == "flash_celery.change"
    assert kwargs == {}
    assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}


def test_message_headers_equal_those_of_celery(make, app):
    theirs = app.amqp.as_task_v2("id", "shop.handle", argsrepr="", kwargsrepr="")
    assert set(make()().each(DELIVERY)[0].headers) == set(theirs.headers)


def test_task_id_is_stable_and_unique_for_a_change(make):
    first, again = make(source="a")(), make(source="a")()
    assert first.each(DELIVERY)[0].headers["id"] == again.each(DELIVERY)[0].headers["id"]
    elsewhere = make(source="b")().each(DELIVERY)[0]
    assert first.each(DELIVERY)[0].headers["id"] != elsewhere.headers["id"]
    other = DELIVERY._replace(ordinal=4)
    assert first.each(DELIVERY)[0].headers["id"] != first.each(other)[0].headers["id"]


def test_batch_is_one_message(make):
    template = make(batch=10)()
    message = template.together([DELIVERY, DELIVERY._replace(ordinal=4)])
    (argument,), _, _ = json.loads(message.body)
    assert argument["__type__"] == "flash_celery.changes"
    assert message.headers["argsrepr"] == "2 changes from insert public.orders id=5 @0/16B3748"
    alone = template.together([DELIVERY])
    assert alone.headers["argsrepr"] == "1 change from insert public.orders id=5 @0/16B3748"


ROUTES = {"public.orders.delete": {"queue": "cleanup", "priority": 9}, "public.*.*": "tables"}


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ("mine", {"queue": "mine", "task_options": {"queue": "own"}}),
        ("own", {"task_options": {"queue": "own"}, "conf": {"flash_routes": ROUTES}}),
        ("tables", {"conf": {"flash_routes": ROUTES, "task_routes": {"shop.*": "celerys"}}}),
        ("celerys", {"conf": {"task_routes": {"shop.*": {"queue": "celerys"}}}}),
        ("other", {"conf": {"flash_queue": "other"}}),
        ("flash", {}),
    ],
)
def test_queue_is_the_first_that_is_configured(make, expected, options):
    assert make(**options)().queue == expected


def test_flash_routes_go_by_operation(make):
    template = make(conf={"flash_routes": ROUTES})
    assert template(INSERT).queue == "tables"
    assert template(DELETE).queue == "cleanup"
    assert template(DELETE).each(DELIVERY)[0].properties["priority"] == 9


def test_task_options_are_honoured(make):
    options = {"time_limit": 30, "soft_time_limit": 20, "priority": 3, "expires": 60}
    message = make(task_options={**options, "ignore_result": True})().each(DELIVERY)[0]
    assert message.headers["timelimit"] == [30, 20]
    assert message.headers["ignore_result"] is True
    assert message.headers["expires"].startswith("20")
    assert message.properties["priority"] == 3


def test_routing_key_leads_to_its_queue(make):
    queues = [Queue("bills", routing_key="billing")]
    conf = {"task_queues": queues, "task_routes": {"shop.*": {"routing_key": "billing"}}}
    assert make(conf=conf)().queue == "bills"
    with pytest.raises(ConfigurationError, match="routing_key='nowhere'"):
        make(task_options={"routing_key": "nowhere"})


@pytest.mark.parametrize("where", ["task_routes", "flash_routes"])
def test_exchange_without_a_routing_key_is_refused(make, where):
    """Celery would send the task to no queue, and say nothing."""
    pattern = {"task_routes": "shop.*", "flash_routes": "public.*"}[where]
    with pytest.raises(ConfigurationError, match="exchange='bills' leads to no queue without"):
        make(conf={where: {pattern: {"exchange": "bills"}}})


@pytest.mark.parametrize(
    "options",
    [
        {"queue": "flash.dead"},
        {"task_options": {"queue": "flash.dead"}},
        {"conf": {"flash_routes": {"public.*": "flash.dead"}}},
        {"conf": {"task_routes": {"shop.*": "graves"}, "flash_dead_queue": "graves"}},
    ],
)
def test_dead_letter_queue_is_refused_for_changes(make, options):
    with pytest.raises(ConfigurationError, match=r"shop\.handle goes to the queue .* dead letters"):
        make(**options)


def test_serializer_other_than_json_is_refused(make):
    with pytest.raises(SubscriptionError, match=r"shop\.handle has serializer='pickle'"):
        make(task_options={"serializer": "pickle"})


@pytest.mark.parametrize("accepted", [["pickle"], [], ["of workers alone"]])
def test_workers_that_would_refuse_json_are_refused(make, accepted):
    with pytest.raises(ConfigurationError, match="travel as JSON; add 'json' to it"):
        make(conf={"accept_content": accepted})


def test_retries_of_protocol_1_are_refused(make):
    with pytest.raises(ConfigurationError, match="task_protocol is 1, .* set it to 2"):
        make(conf={"task_protocol": 1})


@pytest.mark.parametrize("accepted", [None, ["application/json"], ["json", "of workers alone"]])
def test_workers_that_accept_json_among_others_are_fine(make, accepted):
    assert make(conf={"accept_content": accepted})().queue == "flash"


def test_serializer_of_the_app_other_than_json_needs_one_for_the_task(make):
    conf = {"task_serializer": "pickle", "accept_content": ["pickle", "json"]}
    with pytest.raises(SubscriptionError, match=r"serializer='pickle'; .* serializer='json'\."):
        make(conf=conf)
    message = make(conf=conf, task_options={"serializer": "json"})().each(DELIVERY)[0]
    assert message.content_type == "application/json"


def test_queue_can_be_named_by_its_alias(make):
    conf = {"task_queues": [Queue("shop-7f3a", alias="flash")]}
    assert make(conf=conf)().queue == "shop-7f3a"


def test_queue_that_cannot_be_declared_is_refused(make):
    conf = {"task_create_missing_queues": False, "task_queues": [Queue("celery")]}
    with pytest.raises(ConfigurationError, match="'flash', which is not in task_queues"):
        make(conf=conf)


@pytest.mark.parametrize(
    ("queue", "option"),
    [
        (Broadcast("flash"), "Broadcast"),
        (Broadcast("flash", queue="everyone"), "Broadcast"),
        (Queue("flash", Exchange("news", type="fanout")), "fanout exchange"),
        (Queue("", alias="flash"), "no name"),
        (Queue("flash", queue_arguments={"x-queue-type": "stream"}), "stream"),
        (Queue("flash", exclusive=True), "auto_delete, exclusive"),
        (Queue("flash", auto_delete=True), "auto_delete"),
        (Queue("flash", no_ack=True), "no_ack"),
        (Queue("flash", expires=60), "expires"),
        (Queue("flash", message_ttl=60), "message_ttl"),
        (Queue("flash", max_length=10), "max_length"),
        (
            Queue("flash", queue_arguments={"x-expires": 60_000, "x-max-length-bytes": 9}),
            "expires, max_length_bytes",
        ),
        (
            Queue("flash", queue_arguments={"x-max-length": 9, "x-overflow": "drop-head"}),
            "max_length",
        ),
    ],
)
def test_queue_that_does_not_keep_changes_is_refused(make, queue, option):
    message = rf"shop\.handle goes to the queue 'flash', which does not keep .* \({option}\);"
    with pytest.raises(ConfigurationError, match=message):
        make(conf={"task_queues": [queue]})


@pytest.fixture
def backfilled(new_app):
    """Makes the templates, by operation, of a handler whose backfilled rows go to "rows"."""

    def make(queue="rows", held=None, conf=None, **options):
        app = new_app(broker_url="memory://", **(conf or {}))

        @on_backfill_end()
        @on_change("orders", backfill=Backfill(queue=queue), **options)
        @app.task(name="shop.handle")
        def handle(change):
            pass

        app.finalize()
        settings, subscriptions = Settings.from_app(app), subscriptions_of(app)
        task_options = TaskOptions(app, settings, subscriptions)
        return Templates(app, settings, task_options, hold_queues=held or {}), subscriptions

    return make


def test_rows_of_a_backfill_go_to_a_queue_of_their_own(backfilled):
    templates, (changes, end) = backfilled()
    keys, options = list(templates.keys), templates.task_options
    for subscription, operation in [(changes, INSERT), (end, Operation.MESSAGE)]:
        template = templates.backfilled(subscription, operation, "rows")
        (message,) = template.each(DELIVERY)
        assert (message.queue, templates[subscription, operation].queue) == ("rows", "flash")
        assert templates.of(message) is template  # for its dead letter
    # Positions on Redis outlive the backfill.
    assert templates.keys == keys
    assert options.queues == options.queues_for("shop.handle") == ["flash", "rows"]
    assert options.change_queues_for("shop.handle") == ["flash"]
    assert templates.backfilled(changes, INSERT, None) is templates[changes, INSERT]


def test_held_row_of_a_backfill_comes_back_to_its_queue(backfilled):
    templates, (changes, _) = backfilled(held={"shop.handle": "held"})
    (message,) = templates.backfilled(changes, INSERT, "rows").each(DELIVERY)
    assert message.queue == "held"
    held = SimpleNamespace(
        headers=message.headers,
        properties=message.properties,
        body=message.body,
        content_type="application/json",
        content_encoding="utf-8",
    )
    assert restored(templates.task_options.queues_for("shop.handle"), held).queue == "rows"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ordered": True}, "has ordered=, so its rows go through its lanes"),
        ({"queue": "flash.dead"}, "which is for dead letters and consumed by no worker"),
        ({"conf": {"task_queues": [Queue("rows", message_ttl=9)]}}, r"not keep .* \(message_ttl\)"),
        (
            {"conf": {"task_create_missing_queues": False, "task_queues": [Queue("flash")]}},
            "A backfill of shop.handle goes to the queue 'rows', which is not in task_queues",
        ),
    ],
)
def test_queue_that_cannot_take_the_rows_of_a_backfill_is_refused(backfilled, options, reason):
    with pytest.raises(ConfigurationError, match=reason):
        backfilled(**options)


def test_queue_that_refuses_messages_or_dies_with_the_broker_is_not_refused(make):
    refuses = {"x-overflow": "reject-publish", "x-max-length": 9}
    assert make(conf={"task_queues": [Queue("flash", queue_arguments=refuses)]})().queue == "flash"
    assert make(conf={"task_queues": [Queue("flash", durable=False)]})().queue == "flash"


def _raising(name, args, *rest, **named):
    return args[0]


class _Exacting:
    def route_for_task(self, task, args, kwargs):
        raise LookupError("no such\ncustomer")


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (_raising, r"^the router tests\.unit\.test_messages\._raising of task_routes raised "
         r"IndexError for shop\.handle \(tuple index out of range\): it is called once,"),
        (_Exacting(), r"\._Exacting of task_routes raised LookupError for .* \(no such customer\)"),
        ("tests.unit.test_messages._raising", r"the router tests.*_raising of task_routes raised"),
        ("tests.unit.nowhere", r"^the router tests\.unit\.nowhere of task_routes raised"),
        ({"shop.*": 5}, "^the dict of task_routes raised TypeError"),
        (lambda *_, **__: ["a", "b"], r"<lambda> of task_routes returned \['a', 'b'\] for shop"),
        (lambda *_, **__: {"queue": 5}, r"shop\.handle goes to the queue 5; give the name of"),
    ],
)  # fmt: skip
def test_router_that_fails_is_named(make, router, message):
    with pytest.raises(ConfigurationError, match=message):
        make(conf={"task_routes": [router]})


def test_first_router_that_knows_the_task_counts(make):
    routers = [lambda *_, **__: None, lambda *_, **__: "second", lambda *_, **__: "third"]
    assert make(conf={"task_routes": routers})().queue == "second"


@pytest.fixture
def replaced_json():
    """Register another serializer for JSON, as projects do with orjson."""
    encoders, decoders = registry._encoders.copy(), registry._decoders.copy()

    def replace(encode=json.dumps, decode=json.loads):
        register("json", encode, decode, content_type="application/json")

    yield replace
    registry._encoders, registry._decoders = encoders, decoders


@pytest.mark.parametrize("encode", [json.dumps, kombu_json.dumps])
def test_json_serializer_that_does_not_decode_changes_is_refused(make, replaced_json, encode):
    replaced_json(encode)
    with pytest.raises(ConfigurationError, match="'json' of this project has replaced .* a dict;"):
        make()


def test_json_serializer_with_a_decoder_of_kombu_is_accepted(make, replaced_json):
    replaced_json(kombu_json.dumps, kombu_json.loads)
    assert make()().queue == "flash"


def test_worker_with_another_json_serializer_ends(app, replaced_json, capsys):
    worker = SimpleNamespace(app=app)
    replaced_json()
    json_codec.refuse(worker)  # it has no handlers

    @on_change("orders")
    @app.task(name="shop.handle", shared=False)
    def handle(change): ...

    with pytest.raises(SystemExit):
        json_codec.refuse(worker)
    assert "makes of a change a dict; register it" in capsys.readouterr().err


def test_compression_is_honoured(make):
    from kombu.compression import decompress

    message = make(task_options={"compression": "gzip"})().each(DELIVERY)[0]
    assert b"flash_celery.change" in decompress(message.body, message.headers["compression"])


@pytest.mark.parametrize("priority", [-1, 256, "high"])
def test_priority_unknown_to_brokers_is_refused(make, priority):
    with pytest.raises(ConfigurationError, match="is a number from 0 to 255"):
        make(conf={"flash_routes": {"*": {"priority": priority}}})


def test_sent_task_counts_its_times_again_and_may_be_too_large(new_app, monkeypatch):
    """A native delay of Celery's, and the expiration, are counted from the publishing on."""
    delivery = pytest.importorskip("kombu.transport.native_delayed_delivery")  # kombu 5.5
    calculate_routing_key = delivery.calculate_routing_key
    now = datetime.now(timezone.utc)
    headers = {
        "id": "x",
        "task": "t",
        "eta": (now + timedelta(seconds=100.9)).isoformat(),
        "expires": (now + timedelta(seconds=50)).isoformat(),
    }
    record = TaskRecord(
        "t",
        "x",
        "celery_delayed_27",
        calculate_routing_key(5000, "a.b"),
        None,
        "application/json",
        "utf-8",
        "[]",
        False,
        json.dumps(headers),
        json.dumps({"expiration": "9000000"}),
        (),
    )
    sent = SentTask(record)
    assert sent.routing_key in {calculate_routing_key(n, "a.b") for n in range(91, 102)}
    assert 40_000 <= int(sent.properties["expiration"]) <= 50_000
    oversize = Oversize(new_app(), "flash.dead", templates_of(new_app(), []))
    letter = oversize.fitting([sent], 1)
    assert [message.queue for message in letter] == ["flash.dead"]
    assert "The message of t[x]" in letter[0].body
    late = record._replace(headers=json.dumps({**headers, "eta": now.isoformat()}))
    time.sleep(0.001)
    assert SentTask(late).routing_key == ".".join(["0"] * 28) + ".a.b"
    monkeypatch.setattr(sent_tasks, "_seconds_until", lambda moment: 2.1)
    assert SentTask(record).routing_key == calculate_routing_key(3, "a.b")
