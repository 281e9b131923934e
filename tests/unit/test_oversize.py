"""What stands for a message that is too large for its broker."""

import random

import pytest

from flash_celery import UNCHANGED, on_change
from flash_celery.changes.change import Operation
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.payload import changes_of
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.dead_letters import letters
from flash_celery.dead_letters.oversize import Oversize, _halves
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from tests.unit.builders import templates_of

COLUMNS = tuple(Column(name, 25, "text", name == "id") for name in ("id", "note", "other"))
TABLE = Table("public", "orders", None, "d", ("id",), COLUMNS)
#: Text that hardly packs.
LONG = bytes(random.Random(1).choices(b"abcdefghijklmnopqrstuvwxyz", k=10_000))


@pytest.fixture
def templates(app):
    @on_change("orders", batch=10)
    @app.task(name="shop.handle", shared=False)
    def handle(change):
        pass

    def make(**conf):
        app.conf.update(broker_url="memory://", **conf)
        app.finalize()
        return templates_of(app, subscriptions_of(app))

    return make


def delivery(*rows):
    written = [encode_row("I", 0, None, None, list(row)) for row in rows]
    return Delivery(TABLE, Transaction(Lsn(0x16B3748), 7, 0), 3, 0, 0, written)


def test_oversize_batch_becomes_smaller_batches_and_dead_letters(templates, app):
    all_of_them = templates(task_compression="zlib")
    oversize = Oversize(app, "flash.dead", all_of_them)
    template = all_of_them[all_of_them.task_options.subscriptions[0], Operation.INSERT]
    rows = [(b"%d" % n, LONG if n == 2 else b"a", b"b") for n in range(5)]
    small, large = template.together([delivery(rows[0])]), template.together([delivery(*rows)])
    most = len(large.body) - 1
    unchanged, first, second, third = oversize.fitting([small, large], 3000)
    assert unchanged is small
    assert len(large.body) > 3000
    assert all(len(message.body) <= 3000 for message in (first, second, third))
    assert (first.queue, second.queue, third.queue) == ("flash", "flash.dead", "flash")
    kept = letters.decode(second.body)
    (change,) = letters.changes_of(kept)
    assert (change.new["id"], change.new["note"], change.new["other"]) == ("2", UNCHANGED, "b")
    assert (change.id, kept.error, kept.queue) == ("0/16B3748:5", "ChangeTooLarge", "flash")
    assert second.form.template == template.key
    halves = oversize.fitting([large], most)
    assert [message.queue for message in halves] == ["flash", "flash"]


def test_oversize_dead_letter_is_shortened(templates, app):
    all_of_them = templates(flash_max_change_size=25_000)
    oversize = Oversize(app, "flash.dead", all_of_them)
    template = all_of_them[all_of_them.task_options.subscriptions[0], Operation.INSERT]
    sealed = oversize.letter(template, delivery((b"1", LONG + LONG, LONG)))
    assert len(sealed.body) > len(LONG)
    (smaller,) = oversize.fitting([sealed], 5000)
    assert len(smaller.body) <= 5000
    (change,) = letters.changes_of(letters.decode(smaller.body))
    assert change.new == {"id": "1", "note": UNCHANGED, "other": UNCHANGED}
    assert change.id == "0/16B3748:3"


def test_oversize_message_whose_dead_letter_does_not_fit_is_unchanged(templates, app, caplog):
    all_of_them = templates()
    oversize = Oversize(app, "flash.dead", all_of_them)
    template = all_of_them[all_of_them.task_options.subscriptions[0], Operation.INSERT]
    message = template.together([delivery((b"1", LONG, b"b"))])
    assert oversize.fitting([message], 500) == [message]
    assert "dead letter" not in caplog.text


@pytest.mark.parametrize("counts", [[2], [1, 1], [1, 3], [3, 1, 1], [4, 4]])
def test_oversize_batch_is_halved_by_rows(counts):
    rows = iter(range(sum(counts)))
    deliveries = [delivery(*((b"%d" % next(rows), b"a", b"b") for _ in range(n))) for n in counts]
    halves = _halves(deliveries)
    assert [sum(len(part.rows) for part in half) for half in halves] == [
        sum(counts) // 2,
        sum(counts) - sum(counts) // 2,
    ]
    changes = [change for half in halves for part in half for change in changes_of(part)]
    assert changes == [change for part in deliveries for change in changes_of(part)]


def test_message_remembers_its_deliveries(templates):
    all_of_them = templates()
    template = all_of_them[all_of_them.task_options.subscriptions[0], Operation.INSERT]
    run = delivery((b"1", b"a", b"b"), (b"2", b"a", b"b"))
    assert template.together([run]).deliveries == [run]
    first, second = template.each(run)
    assert [*changes_of(*first.deliveries), *changes_of(*second.deliveries)] == changes_of(run)
