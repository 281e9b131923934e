"""Batches and positions."""

from flash_celery.changes import payload
from flash_celery.changes.payload import Delivery
from flash_celery.changes.rows import Transaction
from flash_celery.messages.batcher import Batcher
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from tests.unit.builders import TABLE, Clock, delivery, template


def ids(message):
    import json

    ((argument,), _, _) = json.loads(message.body)
    return [int(change.new["id"]) for change in payload.decode(argument["__value__"])]


def test_batcher_makes_a_message_of_each_change_in_order(app):
    outbox, single = Batcher(None), template(app)
    for number in (1, 2, 3):
        outbox.add(single, delivery(number))
        outbox.commit(Lsn(number * 16 + 8))
    unit = outbox.collect()
    assert [ids(message) for message in unit.messages] == [[1], [2], [3]]
    assert unit.position == 56
    assert outbox.collect().messages == []


def test_batch_holds_changes_that_arrived_together(app):
    outbox, batch = Batcher(None), template(app, batch=2)
    for number in (1, 2, 3):
        outbox.add(batch, delivery(number))
        outbox.commit(Lsn(number * 16 + 8))
    unit = outbox.collect()
    assert [ids(message) for message in unit.messages] == [[1, 2], [3]]
    assert unit.position == 56


def test_waiting_batch_holds_the_position_before_its_first_change(app):
    from flash_celery import Batch

    clock = Clock()
    outbox, batch = Batcher(None, clock), template(app, batch=Batch(10, wait=5))
    outbox.commit(Lsn(8))
    outbox.add(batch, delivery(1))
    outbox.commit(Lsn(24))
    clock.now = 3.0
    outbox.add(batch, delivery(2))
    outbox.commit(Lsn(40))
    unit = outbox.collect()
    assert (unit.messages, unit.position) == ([], 8)
    assert outbox.due == 5.0
    clock.now = 5.0
    unit = outbox.collect()
    assert [ids(message) for message in unit.messages] == [[1, 2]]
    assert unit.position == 40
    assert outbox.due is None


def test_waiting_batch_is_published_at_the_end(app):
    from flash_celery import Batch

    outbox, batch = Batcher(None, Clock()), template(app, batch=Batch(10, wait=5))
    outbox.add(batch, delivery(1))
    assert len(outbox.collect(everything=True).messages) == 1


def test_batch_is_bounded_in_bytes(app, monkeypatch):
    monkeypatch.setattr("flash_celery.messages.batcher.BATCH_BYTES", 100)
    outbox, batch = Batcher(None), template(app, batch=10)
    for number in range(1, 5):
        outbox.add(batch, delivery(number, size=40))
    assert [len(ids(message)) for message in outbox.collect().messages] == [1, 1, 1, 1]


def test_open_transaction_does_not_move_the_position(app):
    outbox, single = Batcher(None), template(app)
    outbox.commit(Lsn(8))
    outbox.add(single, delivery(1))
    unit = outbox.collect()
    assert (len(unit.messages), unit.position) == (1, 8)


def rows(*sizes):
    encoded = [encode_row("I", 0, None, None, [b"7".zfill(size)]) for size in sizes]
    return Delivery(TABLE, Transaction(Lsn(16), 7, 0), 0, 0, 0, encoded)


def delivered(message):
    import json

    ((argument,), _, _) = json.loads(message.body)
    return payload.decode(argument["__value__"])


def test_run_of_rows_is_split_where_a_batch_is_full(app):
    outbox, batch = Batcher(None), template(app, batch=4)
    outbox.add(batch, rows(1, 1, 1))
    outbox.add(batch, rows(*[1] * 7)._replace(ordinal=3))
    messages = outbox.collect().messages
    assert [[change.ordinal for change in delivered(message)] for message in messages] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


def test_row_larger_than_a_batch_is_published_alone(app, monkeypatch):
    monkeypatch.setattr("flash_celery.messages.batcher.BATCH_BYTES", 100)
    outbox, batch = Batcher(None), template(app, batch=10)
    outbox.add(batch, rows(1, 1, 500, 1, 1, 500, 500))
    outbox.add(batch, rows(1)._replace(ordinal=7))
    messages = outbox.collect().messages
    assert [[change.ordinal for change in delivered(message)] for message in messages] == [
        [0, 1],
        [2],
        [3, 4],
        [5],
        [6],
        [7],
    ]


def test_batch_can_be_held_beyond_its_time(app):
    clock = Clock()
    outbox, batch = Batcher(None, clock), template(app, batch=10)
    outbox.add(batch, delivery(1))
    assert outbox.collect(held=0.5).messages == []
    outbox.add(batch, delivery(2))
    clock.now = 0.5
    assert [ids(message) for message in outbox.collect(held=0.5).messages] == [[1, 2]]
