"""Neighbouring changes of a row that become one, and what a crash finds then."""

import os
import random
from dataclasses import dataclass, field

import pytest

from flash_celery import Ordered, on_change, on_message
from flash_celery.capture.transitions import Transitions
from flash_celery.changes.change import Delete, Insert, Operation, Truncate, Update
from flash_celery.changes.deliveries import TRUNCATED, Delivery, message_row
from flash_celery.changes.operations import Part
from flash_celery.changes.rows import UNCHANGED, Column, Table, Transaction
from flash_celery.conditions.evaluation import bind
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.messages import lane_entries
from flash_celery.messages.batcher import Batcher
from flash_celery.messages.deduplication import Deduplicator
from flash_celery.protocol import pgoutput
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import UNCHANGED_TOAST, encode_row
from flash_celery.values.comparison import ColumnType
from tests.unit.builders import Clock, templates_of

#: Sequences of each kind; `make long` runs many more.
SEQUENCES = int(os.environ.get("FLASH_EXAMPLES", "50"))
NAMES = ("id", "part_of", "amount", "long")
SECONDS = 5.0


def table_of(identity, fields=None, key=("id",)):
    columns = [
        Column(
            n, 23 if n != "long" else 25, "", identity == "f" or n == "id", n in (fields or NAMES)
        )
        for n in NAMES
    ]
    return Table("public", "items", None, identity, tuple(key), tuple(columns))


def text(values):
    return [v if v is None or v is UNCHANGED_TOAST else str(v).encode() for v in values]


class Source:
    """One table of a database, and its changes as PostgreSQL sends them."""

    def __init__(self, identity):
        self.identity = identity
        self.rows = {}

    def insert(self, *row):
        self.rows[row[0]] = row
        return encode_row("I", 0, None, None, text(row))

    def update(self, number, **values):
        """Update a row; `long` is stored out of line, and not sent unless it is set."""
        old = self.rows.pop(number)
        new = tuple(values.get(name, value) for name, value in zip(NAMES, old, strict=True))
        self.rows[new[0]] = new
        sent = [*new[:3], new[3] if "long" in values else UNCHANGED_TOAST]
        if self.identity == "f":
            return encode_row("U", 0, "O", text(old), text(sent))
        if new[0] != old[0]:
            return encode_row("U", 0, "K", text([old[0], None, None, None]), text(sent))
        return encode_row("U", 0, None, None, text(sent))

    def delete(self, number):
        old = self.rows.pop(number)
        if self.identity == "f":
            return encode_row("D", 0, "O", text(old), None)
        return encode_row("D", 0, "K", text([old[0], None, None, None]), None)


class Handler:
    """The way of rows from the router to lanes, for one task with some subscriptions."""

    def __init__(self, new_app, identity, *decorators):
        app = new_app(broker_url="memory://")

        @app.task(name="handler", shared=False)
        def handler(change): ...

        for decorate in decorators:
            decorate(handler)
        self.subscriptions = subscriptions_of(app)
        self.templates = templates_of(app, self.subscriptions)
        self.identity = identity
        self.alter()
        self.restart()

    def restart(self, deduplicator=None, acknowledged=0):
        self.clock = Clock()
        self.batcher = Batcher(None, self.clock)
        self.batcher.commit(Lsn(acknowledged))
        if deduplicator is not None:
            self.batcher.deduplicate(deduplicator)

    def alter(self):
        """Give the table another description, as after an ALTER TABLE."""
        self.transitions = {}
        columns = [
            pgoutput.Column(self.identity == "f" or name == "id", name, 25, -1) for name in NAMES
        ]
        types = {name: ColumnType(23, name) for name in NAMES}
        for each in self.subscriptions:
            table = table_of(self.identity, each.fields, each.key or ("id",))
            matches = bind(each.where, types, lambda oid, text: text) if each.where else None
            self.transitions[each.number] = table, Transitions(each, table, columns, matches)

    def deliver(self, row, transaction, ordinal):
        """Route one row, a TRUNCATE or the content of a message."""
        for each in self.subscriptions:
            table, transitions = self.transitions[each.number]
            if each.prefix is not None:
                if isinstance(row, str):
                    rows = [message_row(row.encode())]
                    made = Delivery(table, transaction, ordinal, Part.MESSAGE, each.number, rows)
                    self.batcher.add(self.templates[each, Operation.MESSAGE], made)
            elif row == TRUNCATED:
                if Operation.TRUNCATE in each.operations:
                    made = Delivery(table, transaction, ordinal, Part.WHOLE, each.number, [row])
                    self.batcher.add(self.templates[each, Operation.TRUNCATE], made)
            elif not isinstance(row, str):
                for operation, part, first, rows in transitions.evaluate([row], ordinal):
                    made = Delivery(table, transaction, first, part, each.number, rows)
                    self.batcher.add(self.templates[each, operation], made)


def changes_in(messages):
    """The changes of messages, those of one message in the order of the WAL."""
    found = []
    for message in messages:
        together = []
        for _, count, entry in message.pushes:
            changes = lane_entries.decode(entry.encode()).changes
            assert len(changes) == count
            assert changes == sorted(changes, key=lambda change: change._position)
            together += changes
        found += sorted(together, key=lambda change: change._position)
    return found


def shown(changes):
    """Each change as a letter, its `old` and `new`, and how many it was made of."""
    return [
        (
            type(change).__name__[0],
            {**change.old} if hasattr(change, "old") else None,
            {**change.new} if hasattr(change, "new") else None,
            change.coalesced,
        )
        for change in changes
    ]


@dataclass
class Applied:
    """A handler that applies what it receives to a table of its own, and adds up amounts."""

    rows: dict = field(default_factory=dict)
    #: The sum of what each change has added: it shows a change that is missing, or there twice.
    total: int = 0
    #: Whether it receives all operations.
    sees_all: bool = True

    def apply(self, change):
        if isinstance(change, Truncate):
            self.rows = {key: row for key, row in self.rows.items() if key[0] != change.number}
            return
        if not isinstance(change, (Insert, Update, Delete)):
            return
        place = change.number, *change.key.values()
        if isinstance(change, Insert):
            self.rows[place] = dict(change.new)
            self.total += change.new["amount"]
            return
        known = self.rows.get(place, {})
        old = dict(change.old)
        before = change.number, *(old.get(name, value) for name, value in change.key.items())
        if self.sees_all and before == place:
            for name in old.keys() & known.keys():
                assert old[name] == known[name], f"{change!r}: {name} was {known[name]}"
        if isinstance(change, Delete):
            self.rows.pop(place, None)
            self.total -= old.get("amount", 0)
            return
        sent = {name: value for name, value in change.new.items() if value is not UNCHANGED}
        known = self.rows.pop(before, {})
        self.rows[place] = {**known, **sent}
        self.total += change.new["amount"] - old.get("amount", change.new["amount"])


def applied(changes, kind):
    """The effect of changes on a handler of this kind."""
    identity, _, options = KINDS[kind]
    state = Applied(sees_all=not any("operations" in each for each in options))
    for change in changes:
        state.apply(change)
    return state.rows, state.total if identity == "f" and state.sees_all else None


@pytest.fixture
def handle(new_app):
    """Makes one handler of a table whose old rows are known, and pushes what it is given."""

    def make(*rows, identity="f", **options):
        ordered = Ordered(coalesce=SECONDS, **options.pop("ordered", {}))
        handler = Handler(new_app, identity, on_change("items", ordered=ordered, **options))
        for number, row in enumerate(rows, 1):
            handler.deliver(row, Transaction(Lsn(number * 16), number, 0), 0)
            handler.batcher.commit(Lsn(number * 16 + 8))
        return handler

    return make


def row_of(number=1, part_of=0, amount=0, long="x"):
    return {"id": number, "part_of": part_of, "amount": amount, "long": long}


def test_coalesced_changes_have_the_old_row_of_the_first_and_the_new_one_of_the_last(handle):
    source = Source("f")
    source.insert(1, 0, 1, "x")
    rows = [source.update(1, amount=2), source.update(1, amount=3), source.update(1, amount=4)]
    (change,) = changes_in(handle(*rows).batcher.collect(everything=True).messages)
    assert shown([change]) == [("U", row_of(amount=1), row_of(amount=4), 3)]
    assert (change.id, change.commit_lsn, change.changed) == ("0/30:0", 48, {"amount"})


@pytest.mark.parametrize(
    ("operations", "left"),
    [
        ("iu", [("I", None, row_of(amount=2), 2)]),
        ("id", []),
        ("iud", []),
        ("idi", [("I", None, row_of(amount=1), 1)]),
        ("ud", [("D", row_of(amount=0), None, 2)]),
        ("di", [("U", row_of(amount=0), row_of(amount=1), 2)]),
        ("did", [("D", row_of(amount=0), None, 3)]),
        ("udiu", [("U", row_of(amount=0), row_of(amount=2), 4)]),
    ],
)
def test_coalesced_operations_are_one_operation(handle, operations, left):
    source = Source("f")
    if operations[0] != "i":
        source.insert(1, 0, 0, "x")
    rows = [
        {
            "i": lambda: source.insert(1, 0, 1, "x"),
            "u": lambda: source.update(1, amount=2),
            "d": lambda: source.delete(1),
        }[operation]()
        for operation in operations
    ]
    messages = handle(*rows).batcher.collect(everything=True).messages
    assert shown(changes_in(messages)) == left
    # Also what is not there any more counts as enqueued.
    assert [list(message.covered[0]) for message in messages] == [[(0, (16 * len(rows), 0, 0))]]
    assert len(messages[0].covered[1]) == len(rows)


def test_coalesced_value_that_was_not_sent_is_the_one_known_before(handle):
    source = Source("d")
    rows = [source.insert(1, 0, 0, "first"), source.update(1, amount=1)]
    assert shown(changes_in(handle(*rows, identity="d").batcher.collect(True).messages)) == [
        ("I", None, row_of(amount=1, long="first"), 2)
    ]
    rows = [source.update(1, long="second"), source.update(1, amount=2)]
    assert shown(changes_in(handle(*rows, identity="d").batcher.collect(True).messages)) == [
        ("U", {"id": 1}, row_of(amount=2, long="second"), 2)
    ]
    rows = [source.update(1, amount=3), source.update(1, amount=4)]
    (change,) = changes_in(handle(*rows, identity="d").batcher.collect(True).messages)
    assert change.new["long"] is UNCHANGED


def test_coalesced_changes_of_one_ordering_key_are_neighbours(handle):
    """No row of an order overtakes another one of the same order."""
    source = Source("f")
    rows = [
        source.insert(1, 7, 0, "x"),
        source.insert(2, 7, 0, "x"),
        source.update(1, amount=1),
        source.insert(3, 8, 0, "x"),
        source.update(1, amount=2),
    ]
    changes = changes_in(handle(*rows, ordered={"by": "part_of"}).batcher.collect(True).messages)
    seven = [(change.key["id"], change.coalesced) for change in changes if change.key["id"] != 3]
    assert seven == [(1, 1), (2, 1), (1, 2)]


def test_coalescing_keeps_a_delete_if_the_row_may_have_been_elsewhere_before_its_insert(handle):
    """With another ordering key, whose changes are in another lane."""
    source = Source("f")
    source.insert(1, 7, 0, "x")
    rows = [
        source.delete(1),
        source.insert(1, 8, 1, "x"),
        source.delete(1),
        source.insert(1, 7, 0, "x"),
    ]
    changes = changes_in(handle(*rows, ordered={"by": "part_of"}).batcher.collect(True).messages)
    assert [kind for kind, *_ in shown(changes)] == ["D", "I"]


def test_coalescing_makes_no_update_that_the_handler_does_not_receive(handle):
    source = Source("f")
    source.insert(1, 0, 0, "x")
    rows = [source.delete(1), source.insert(1, 0, 1, "x")]
    changes = changes_in(handle(*rows, operations="insert|delete").batcher.collect(True).messages)
    assert [kind for kind, *_ in shown(changes)] == ["D", "I"]


def test_coalesced_update_that_changes_no_named_field_is_not_delivered(handle):
    source = Source("f")
    source.insert(1, 0, 0, "x")
    rows = [source.update(1, amount=1), source.update(1, amount=0)]
    assert changes_in(handle(*rows, fields=["amount"]).batcher.collect(True).messages) == []
    source = Source("f")
    source.insert(1, 0, 0, "x")
    rows = [source.update(1, amount=1), source.update(1, amount=0)]
    (change,) = changes_in(handle(*rows).batcher.collect(True).messages)
    assert change.changed == frozenset()


def test_coalesced_row_is_never_larger_than_a_change_may_be(handle):
    source = Source("f")
    source.insert(1, 0, 0, "x" * 60)
    handler = handle()
    (template,) = {handler.templates[each] for each in handler.templates.task_options}
    rows = [source.delete(1), source.insert(1, 0, 0, "y" * 60)]
    template.max_change_size = max(map(len, rows))
    for number, row in enumerate(rows, 1):
        handler.deliver(row, Transaction(Lsn(number * 16), number, 0), 0)
    changes = changes_in(handler.batcher.collect(everything=True).messages)
    assert [kind for kind, *_ in shown(changes)] == ["D", "I"]


def test_changes_wait_no_longer_than_they_may_and_hold_the_position(handle):
    source = Source("f")
    handler = handle(source.insert(1, 0, 0, "x"))
    handler.batcher.commit(Lsn(24))
    assert handler.batcher.collect()[:2] == ([], 0)
    assert handler.batcher.due == SECONDS
    handler.clock.now = 3.0
    handler.deliver(source.update(1, amount=1), Transaction(Lsn(32), 2, 0), 0)
    handler.batcher.commit(Lsn(40))
    assert handler.batcher.collect()[:2] == ([], 0)
    handler.clock.now = SECONDS
    batch = handler.batcher.collect()
    assert shown(changes_in(batch.messages)) == [("I", None, row_of(amount=1), 2)]
    assert (batch.position, handler.batcher.due) == (40, None)


def test_changes_of_which_nothing_is_left_are_acknowledged(handle):
    source = Source("f")
    handler = handle(source.insert(1, 0, 0, "x"), source.delete(1))
    assert handler.batcher.collect()[:2] == ([], 0)
    handler.clock.now = SECONDS
    batch = handler.batcher.collect()
    assert (changes_in(batch.messages), batch.position) == ([], 40)


@pytest.mark.parametrize("barrier", [TRUNCATED, "moved"])
def test_barrier_ends_the_wait_of_what_came_before(handle, barrier):
    source = Source("f")
    rows = [source.insert(1, 0, 0, "x"), source.update(1, amount=1)]
    rows += [source.update(1, id=2) if barrier == "moved" else barrier]
    handler = handle(*rows, ordered={"lanes": 7})
    messages = handler.batcher.collect().messages
    assert [(bool(message.barrier), len(message.pushes)) for message in messages] == [
        (False, 1),
        (True, 1),
    ]
    assert handler.batcher.due is None


def test_many_changes_leave_before_their_time(handle, monkeypatch):
    monkeypatch.setattr("flash_celery.messages.lane_messages._COALESCED_CHANGES", 3)
    source = Source("f")
    rows = [source.insert(1, 0, 0, "x"), *(source.update(1, amount=n) for n in (1, 2, 3))]
    handler = handle(*rows)
    batch = handler.batcher.collect()
    assert shown(changes_in(batch.messages)) == [("I", None, row_of(amount=2), 3)]
    assert batch.position == 56
    assert handler.batcher.due == SECONDS


KINDS = {
    "by the row's key": ("d", {}, [{}]),
    "old rows": ("f", {}, [{}]),
    "by a column": ("f", {"by": "part_of"}, [{}]),
    "condition": ("f", {}, [{"where": {"amount__gt": 2}}]),
    "fields": ("f", {"by": "part_of"}, [{"fields": ["id", "amount"]}]),
    "key": ("f", {}, [{"key": ["part_of"]}]),
    "some operations": ("f", {}, [{"operations": "insert|delete|truncate"}]),
    "two subscriptions": ("f", {"by": "part_of"}, [{}, {"where": {"amount__gt": 2}}]),
}


def transactions_of(chance, source, unique, moves):
    """Random transactions: rows as PostgreSQL sends them, a TRUNCATE, messages, ALTER TABLE.

    Args:
        chance: Where random numbers come from.
        source: The table.
        unique: Whether `part_of` is a key too.
        moves: Whether the primary key changes. A handler that receives no updates misses that.
    """
    for _ in range(chance.randint(1, 30)):
        rows = []
        for _ in range(chance.randint(1, 4)):
            number, kind = chance.randrange(4), chance.random()
            group = number if unique else chance.randrange(2)
            amount = chance.randrange(5)
            if kind < 0.03:
                source.rows.clear()
                rows.append(TRUNCATED)
            elif kind < 0.06:
                rows.append("said")
            elif kind < 0.08:
                rows.append(None)
            elif number not in source.rows:
                rows.append(source.insert(number, group, amount, chance.choice("xy")))
            elif kind < 0.35:
                rows.append(source.delete(number))
            elif moves and kind < 0.40 and 9 not in source.rows:
                rows.append(source.update(number, id=9))
            elif kind < 0.45 and not unique:
                rows.append(source.update(number, part_of=group))
            elif kind < 0.60:
                rows.append(source.update(number, long=chance.choice("xy")))
            else:
                rows.append(source.update(number, amount=amount))
        yield rows


class Run:
    """One sequence of transactions, read by workers that may be killed."""

    def __init__(self, handler, transactions, chance):
        self.handler, self.transactions, self.chance = handler, transactions, chance
        #: What the broker has, and up to where PostgreSQL sends nothing again.
        self.published, self.acknowledged = [], 0

    def read(self, crash_after=None):
        """Read to the end, or until so many messages are published."""
        handler, batcher = self.handler, self.handler.batcher
        for number, rows in enumerate(self.transactions, 1):
            if number * 16 + 8 <= self.acknowledged:
                continue
            ordinal = 0
            for row in rows:
                if row is None:
                    handler.alter()
                    continue
                handler.deliver(row, Transaction(Lsn(number * 16), number, 0), ordinal)
                ordinal += 1
                if self.chance.random() < 0.05 and self.publish(batcher.collect(), crash_after):
                    return
            batcher.commit(Lsn(number * 16 + 8))
            handler.clock.now += self.chance.choice([0, 0.5, 2])
            if self.publish(batcher.collect(), crash_after):
                return
        self.publish(batcher.collect(everything=True), None)

    def publish(self, batch, crash_after):
        for message in batch.messages:
            if crash_after is not None and len(self.published) >= crash_after:
                return True
            self.published.append(message)
        if self.chance.random() < 0.5:
            self.acknowledged = max(self.acknowledged, batch.position)
        return False

    def restart(self):
        marks, transactions = {}, set()
        for message in self.published:
            for number, mark in message.covered[0]:
                marks[message.form.template, number] = mark
            transactions.update(message.covered[1])
        found = Deduplicator(marks, transactions)
        self.handler.restart(found, self.acknowledged)


@pytest.fixture
def changes_of(new_app):
    """Returns the changes that are published of a random sequence, whatever is killed."""
    handlers = {}

    def handler_of(kind, lanes, seconds):
        identity, ordered, options = KINDS[kind]
        order = Ordered(coalesce=seconds, lanes=lanes, **ordered)
        decorators = [on_change("items", ordered=order, **each) for each in options]
        return Handler(new_app, identity, *decorators, on_message("said"))

    def make(kind, seed, seconds, crashes=()):
        chance = random.Random(seed)
        moves = kind not in ("key", "some operations")
        source = Source(KINDS[kind][0])
        transactions = list(transactions_of(chance, source, kind == "key", moves))
        known = kind, chance.choice([1, 3, 16]), seconds
        handler = handlers[known] = handlers.get(known) or handler_of(*known)
        handler.restart()
        run = Run(handler, transactions, chance)
        for crash in crashes:
            run.read(crash)
            run.restart()
        run.read()
        return changes_in(run.published)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_coalesced_changes_have_the_effect_of_all_changes(changes_of, kind):
    fewer = 0
    for seed in range(SEQUENCES):
        every, some = changes_of(kind, seed, 0), changes_of(kind, seed, SECONDS)
        assert applied(some, kind) == applied(every, kind), f"seed {seed}"
        fewer += len(every) - len(some)
    assert fewer > 0


@pytest.mark.parametrize("kind", KINDS)
def test_coalesced_changes_are_enqueued_once_whenever_their_worker_is_killed(changes_of, kind):
    for seed in range(SEQUENCES):
        every = changes_of(kind, seed, 0)
        crashes = sorted(random.Random(seed).choices(range(20), k=2))
        some = changes_of(kind, seed, SECONDS, crashes)
        assert applied(some, kind) == applied(every, kind), f"seed {seed}, {crashes}"
