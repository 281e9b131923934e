"""Ordered handlers: how they are declared, and in which lane a change is placed."""

import json
from contextlib import nullcontext
from dataclasses import replace
from random import Random

import pytest

from flash_celery import Ordered, on_backfill_end, on_change, on_message
from flash_celery.changes.deliveries import TRUNCATED, Delivery, message_row, prefixed
from flash_celery.changes.operations import Part
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.errors import ConfigurationError, SubscriptionError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.handlers.celery_tasks import WAKE_TASK
from flash_celery.messages import lane_entries, lane_messages, lane_transports
from flash_celery.messages.lane_messages import LaneForm, LaneGroup, barrier_lanes
from flash_celery.messages.lane_placing import Place, hashes, placer
from flash_celery.messages.task_message import Form
from flash_celery.messages.task_options import TaskOptions, TaskOrder
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import UNCHANGED_TOAST, encode_row
from flash_celery.publishing.brokers.memory import MemoryPublisher
from flash_celery.settings import Settings
from flash_celery.worker.replicator import Replicator


@pytest.fixture
def declare(new_app):
    """Declares one task with these decorators, and returns its subscriptions."""
    app = new_app(broker_url="memory://", flash_dsn="host=x dbname=x")

    def make(*decorators, name="handler", **options):
        @app.task(name=name, **options)
        def handler(change): ...

        for decorate in decorators:
            decorate(handler)
        return app, subscriptions_of(app)

    return make


@pytest.mark.parametrize(
    ("ordered", "columns"),
    [
        (True, None),
        ("order_id", ("order_id",)),
        (["a", "b"], ("a", "b")),
        (Ordered(), None),
        (Ordered(by="a", lanes=8), ("a",)),
    ],
)
def test_ordered_names_the_ordering_key(declare, ordered, columns):
    app, (subscription,) = declare(on_change("orders", ordered=ordered))
    assert subscription.ordered.by == columns
    assert subscription.columns == frozenset(columns or ())
    assert WAKE_TASK in app.tasks


def test_wakes_have_none_of_the_options_that_the_project_gives_to_all_tasks(new_app):
    options = {"rate_limit": "1/m", "acks_late": False, "ignore_result": False}
    app = new_app(task_annotations={"*": options}, task_default_rate_limit="2/m")

    @on_change("orders", ordered=True)
    @app.task(name="handle", shared=False)
    def handle(change): ...

    app.finalize()
    wake = app.tasks[WAKE_TASK]
    assert (wake.rate_limit, wake.acks_late, wake.ignore_result) == (None, True, True)


@pytest.mark.parametrize("ordered", [None, False])
def test_handler_is_not_ordered_unless_it_says_so(declare, ordered):
    app, (subscription,) = declare(on_change("orders", ordered=ordered))
    assert subscription.ordered is None
    assert WAKE_TASK in app.tasks  # for lanes of when it was


@pytest.mark.parametrize(
    ("ordered", "reason"),
    [
        (5, "ordered is a list of column names"),
        ([], "ordered is empty"),
        (Ordered(lanes=0), "lanes=0"),
        (Ordered(lanes=True), "lanes=True"),
        (Ordered(on_failure="wait"), "'dead' or 'block'"),
    ],
)
def test_ordered_refuses_a_wrong_argument(declare, ordered, reason):
    with pytest.raises(SubscriptionError, match="handler: .*" + reason):
        declare(on_change("orders", ordered=ordered))


@pytest.mark.parametrize(
    ("others", "options", "reason"),
    [
        ([on_change("lines")], {}, "give every on_change of it ordered="),
        ([on_change("lines", ordered=Ordered(lanes=4))], {}, "the same lanes"),
    ],
)
def test_ordered_must_be_the_same_for_a_whole_task(declare, others, options, reason):
    with pytest.raises(SubscriptionError, match=reason):
        declare(on_change("orders", ordered=True), *others, **options)


def test_ordered_batch_does_not_wait(declare):
    from flash_celery import Batch

    with pytest.raises(SubscriptionError, match="leave out wait"):
        declare(on_change("orders", ordered=True, batch=Batch(5, wait=1.0)))


def test_ordered_handler_has_its_messages_in_the_same_order(declare):
    _, (rows, messages) = declare(on_change("orders", ordered="a"), on_message("said"))
    assert (rows.ordered.by, messages.ordered.by) == (("a",), None)


def test_ordered_handler_may_not_have_a_rate_limit(declare):
    app, subscriptions = declare(on_change("orders", ordered=True), rate_limit="5/s")
    with pytest.raises(SubscriptionError, match="rate_limit='5/s'"):
        TaskOptions(app, Settings.from_app(app), subscriptions)


def test_ordered_handler_has_one_queue(declare):
    app, subscriptions = declare(on_change("orders", ordered=True))
    app.conf.flash_routes = {"*.delete": "cleanup"}
    with pytest.raises(SubscriptionError, match="flash_routes gives its operations different"):
        TaskOptions(app, Settings.from_app(app), subscriptions)


def test_ordered_handler_needs_a_broker_with_lanes(declare):
    app, subscriptions = declare(on_change("orders", ordered=True))
    with pytest.raises(ConfigurationError, match="the broker must be Redis, Valkey or RabbitMQ"):
        Replicator(app, Settings.from_app(app), subscriptions, MemoryPublisher())


COLUMNS = tuple(Column(name, 25, "text", name != "note") for name in ("id", "part", "note"))
TABLE = Table("public", "t", None, "i", ("id",), COLUMNS)


def row(operation, new=None, old=None, kind=None):
    return encode_row(operation, 1, kind, old, new)


def test_place_is_a_function_of_the_bytes_of_the_key():
    place = placer(TABLE, ["id", "part"])
    inserted = place(row("I", [b"a", b"bc", b"x"]))
    # In every process and release.
    assert inserted == Place(1650811397, 1650811397)
    assert place(row("I", [b"a", b"bc", b"y"])) == inserted
    assert place(row("D", old=[b"a", b"bc", None], kind="K")) == inserted
    assert place(row("U", [b"a", b"bc", b"z"])) == inserted
    others = [[b"ab", b"c", b""], [b"a", None, b""], [b"a", b"", b""], [None, b"a", b""]]
    places = {place(row("I", other)).key for other in others} | {inserted.key}
    assert len(places) == 5


def test_place_of_an_update_of_the_key_has_both_keys():
    place = placer(TABLE, None)
    before, after = (place(row("I", [key, b"", b""])).key for key in (b"1", b"2"))
    moved = row("U", [b"2", b"p", UNCHANGED_TOAST], [b"1", b"p", None], "K")
    assert place(moved) == Place(after, before)
    unsent = row("U", [UNCHANGED_TOAST, b"q", b""], [b"1", b"p", b""], "O")
    assert place(unsent) == Place(before, before)


@pytest.mark.parametrize(
    "unknown",
    [
        row("U", [b"1", b"p", b"n"], [b"2", b"p", None], "K"),
        row("U", [b"1", b"p", b"n"]),
        row("D", old=[b"2", b"p", None], kind="K"),
    ],
    ids=["update of the identity", "update", "delete"],
)
def test_place_does_not_take_an_unknown_old_key_for_another(unknown):
    """Rows that were written before the replica identity was set lack the old value."""
    assert placer(TABLE, ["note"])(unknown) is None


def test_place_of_a_row_with_all_old_values_is_known():
    place = placer(TABLE, ["note"])
    inserted = place(row("I", [b"1", b"p", b"n"]))
    assert place(row("D", old=[b"1", b"p", b"n"], kind="O")) == inserted
    assert place(row("U", [b"1", b"q", b"n"], [b"1", b"p", b"n"], "O")) == inserted


def any_row(random):
    def cell():
        size = random.choice([0, 1, 3, 63, 64, 300])
        return random.choice([None, UNCHANGED_TOAST, b"7" * size, b"x" * size])

    cells = [cell(), cell(), cell()]
    whole = row(
        *random.choice(
            [
                ("I", cells),
                ("U", cells),
                ("U", cells, [b"1", b"p", b"n"], "K"),
                ("U", cells, [b"1", b"p", b"n"], "O"),
                ("D", None, cells, "K"),
                ("D", None, cells, "O"),
            ]
        )
    )
    if random.random() < 0.1:
        return random.choice([TRUNCATED, message_row(b"content"), prefixed(whole, 1, b"i" * 16)])
    return whole


@pytest.mark.parametrize("seed", [0, 12345])
@pytest.mark.parametrize("columns", [None, ["id"], ["part"], ["note"], ["id", "part"]])
def test_hashes_of_many_rows_are_those_of_their_places(columns, seed):
    rows = [any_row(Random(number)) for number in range(2000)]
    hashes_of = hashes(TABLE, columns, seed)
    if hashes_of is None:
        assert len(columns or TABLE.key) > 1
        return
    place, found = placer(TABLE, columns, seed=seed), hashes_of(rows)
    for each, key in zip(rows, found, strict=True):
        assert key is None or place(each) == Place(key, key)
    plain = [row("I", [b"%d" % n, b"p" * n, b"n"]) for n in range(100)]
    assert None not in hashes_of(plain)
    # The placer says what is wrong.
    damaged = [plain[-1][:end] for end in range(8, 15)] + [b"I\0\0\0\1N\0\3xxx"]
    assert hashes_of(damaged) == [None] * len(damaged)


@pytest.mark.parametrize("count", [7, 70, 9000])
def test_changes_that_are_placed_together_are_placed_as_each_alone(count, monkeypatch):
    rows = [
        row("I", [b"%d" % (n % 300), b"p", b"n" * (70_000 if n % 4000 == 17 else n % 400)])
        for n in range(10_000)
    ]
    rows[77::1000] = [row("U", [b"1", b"p", b"n"], [b"17", b"p", b"n"], "O")] * 10
    transactions = [Transaction(Lsn(9 + n), n, 0) for n in range(3)]
    form = LaneForm("key", "1/slot", "handler", 16, Form("flash", "handler", {}, {}))

    def messages():
        group = LaneGroup(form, [["id"], ["id"]])
        for n, first in enumerate(range(0, len(rows), count)):
            some = rows[first : first + count]
            transaction = transactions[n // 5 % 3]
            yield from group.add(Delivery(TABLE, transaction, first, 0, n // 40 % 2, some), None)
        yield from group.flush(None)

    def described():
        # The order of different lanes does not matter.
        return [
            (sorted(message.pushes, key=lambda push: push[0]), message.covered)
            for message in messages()
        ]

    together = described()
    monkeypatch.setattr(lane_messages, "hashes", lambda *_: None)
    assert described() == together
    assert len(together) > 2


def test_tables_of_a_pattern_have_keys_of_their_own(declare):
    """The order 1 of each tenant is another order, but belongs to the lines of that tenant."""

    def in_table(schema, name):
        return replace(TABLE, schema=schema, name=name)

    def keys(*tables):
        deliveries = [
            Delivery(table, Transaction(Lsn(9), 9, 0), n, 0, number, [row("I", [b"1", b"p", b"n"])])
            for n, (table, number) in enumerate(tables)
        ]
        group = LaneGroup(form, order.columns, patterns=order.patterns)
        (message,) = [m for each in deliveries for m in group.add(each, None)] or group.flush(None)
        return [key for *_, text in message.pushes for key in json.loads(text)["keys"]]

    tables = "tenant_*.orders", "tenant_*.lines", "t"
    _, subscriptions = declare(*(on_change(table, ordered="id") for table in tables))
    order = TaskOrder.of(subscriptions, 1, lane_transports.REDIS)
    form = LaneForm("key", "1/slot", "handler", 1, Form("flash", "handler", {}, {}))
    numbers = {str(each.declared): each.number for each in subscriptions}
    orders, lines = numbers["tenant_*.orders"], numbers["tenant_*.lines"]
    first, second, third = keys(
        (in_table("tenant_1", "orders"), orders),
        (in_table("tenant_2", "orders"), orders),
        (in_table("tenant_1", "lines"), lines),
    )
    assert first == third != second
    place = placer(TABLE, ["id"])(row("I", [b"1", b"p", b"n"]))
    assert keys((TABLE, numbers["public.t"])) == [place.key]


def test_barrier_is_for_what_has_no_key_or_two_lanes():
    place = placer(TABLE, None)
    assert place(TRUNCATED) is None
    assert list(barrier_lanes(None, 3)) == [0, 1, 2]
    assert not barrier_lanes(Place(5, 5), 4)
    assert not barrier_lanes(Place(5, 9), 4)
    assert barrier_lanes(Place(5, 2), 4) == [1, 2]


def test_barrier_within_a_delivery_divides_it():
    keys = [(b"1", b"1"), (b"2", b"2"), (b"1", b"2"), (b"3", b"3")]
    rows = [row("U", [new, b"p", b"n"], [old, b"p", b"n"], "O") for old, new in keys]
    delivery = Delivery(TABLE, Transaction(Lsn(9), 7, 0), 5, Part.WHOLE, 0, rows)
    form = LaneForm("key", "1/slot", "handler", 1000, Form("flash", "handler", {}, {}))
    group = LaneGroup(form, [None])
    messages = [*group.add(delivery, None), *group.flush(None)]
    changes = [
        [change.ordinal for _, _, text in message.pushes for change in decoded(text)]
        for message in messages
    ]
    assert changes == [[5, 6], [7], [8]]
    assert [len(message.barrier) for message in messages] == [0, 2, 0]
    # The high-water mark of each is its last change.
    assert [message.covered[0][0][1][1] for message in messages] == [6, 7, 8]


def decoded(text):
    """The changes of an entry."""
    return lane_entries.decode(text.encode()).changes


RABBITMQ = {"broker_url": "amqp://127.0.0.1"}


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ([on_change("orders", ordered=True)], "leave them out: on_change.'public.orders', 'insert"),
        ([on_change("orders", "insert", ordered=True), on_message("said")], "a task of its own"),
        (
            [on_change("orders", "insert", ordered=True), on_backfill_end()],
            "give the end to a task of its own: on_backfill_end.'",
        ),
        (
            [on_change("orders", "insert", ordered=Ordered(on_failure="block"))],
            "leave on_failure out",
        ),
        (
            [on_change("orders", "insert", ordered=Ordered(coalesce=1.0), once=nullcontext)],
            "leave one of the two out",
        ),
    ],
    ids=["truncate", "messages", "end", "block", "once"],
)
def test_ordered_handler_is_refused_if_it_needs_more_than_rabbitmq_has(declare, declared, reason):
    app, subscriptions = declare(*declared)
    app.conf.update(RABBITMQ)
    with pytest.raises(SubscriptionError, match=reason):
        TaskOptions(app, Settings.from_app(app), subscriptions)


def test_ordered_handler_whose_name_is_too_long_for_rabbitmq_is_refused(declare):
    app, subscriptions = declare(on_change("orders", "insert", ordered=True), name="h" * 141)
    TaskOptions(app, Settings.from_app(app), subscriptions)
    app.conf.update(RABBITMQ)
    with pytest.raises(SubscriptionError, match="a name= of 140 bytes at most"):
        TaskOptions(app, Settings.from_app(app), subscriptions)


def test_ordered_handler_has_the_number_of_lanes_that_suits_its_broker(declare):
    app, subscriptions = declare(on_change("orders", "insert", ordered=True))
    for conf, lanes in [({}, 256), (RABBITMQ, 16), ({"flash_lanes": 3}, 3)]:
        app.conf.update(conf)
        options = TaskOptions(app, Settings.from_app(app), subscriptions)
        assert options.orders[subscriptions[0].handler].lanes == lanes
