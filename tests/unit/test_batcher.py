"""Batches and positions."""

import json
from types import SimpleNamespace

from flash_celery import Batch
from flash_celery.changes import payload
from flash_celery.changes.deliveries import Delivery, prefixed
from flash_celery.changes.rows import Transaction
from flash_celery.dead_letters.oversize import Oversize
from flash_celery.messages.batcher import Batcher
from flash_celery.messages.deduplication import Deduplicator
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


def parts(messages):
    """Of each message the ids of its changes, its part, and whether it is the last."""
    found = []
    for message in messages:
        ((argument,), _, _) = json.loads(message.body)
        batch = payload.decode_batch(argument["__value__"])
        found.append(([int(change.new["id"]) for change in batch], batch.part, batch.last))
    return found


def written(commit_lsn, *numbers, first=0):
    """Rows of one transaction; one of more than 100 bytes for a negative number."""
    texts = [str(abs(n)).zfill(200 if n < 0 else 1).encode() for n in numbers]
    encoded = [encode_row("I", 0, None, None, [text]) for text in texts]
    return Delivery(TABLE, Transaction(Lsn(commit_lsn), 7, 0), first, 0, 0, encoded)


def test_transaction_batch_has_one_transaction_in_parts(app):
    batch = template(app, batch=Batch(3, transaction=True))
    outbox = Batcher(None)
    outbox.add(batch, written(16, 1, 2))
    assert outbox.collect(everything=True) == outbox.collect()
    assert outbox.due is None
    outbox.add(batch, written(16, 3, first=2))
    assert outbox.collect().messages == []  # it is unknown whether it is the last part
    outbox.commit(Lsn(24))
    outbox.add(batch, written(32, 4, 5, 6, 7, 8, 9, 10))
    outbox.commit(Lsn(40))
    outbox.add(batch, written(48, 11))
    unit = outbox.collect(everything=True)
    assert parts(unit.messages) == [
        *(([1, 2, 3], 0, True), ([4, 5, 6], 0, False), ([7, 8, 9], 1, False), ([10], 2, True)),
    ]
    assert unit.position == 40
    outbox.commit(Lsn(48))  # that of the transaction before
    assert outbox.collect(everything=True).messages == []
    outbox.add(batch, written(64, 12))  # the end of the one before was not seen
    assert parts(outbox.collect().messages) == [([11], 0, True)]
    assert len({message.id for message in unit.messages}) == 4


def test_transaction_batch_is_cut_in_the_same_places_and_enqueued_once(app):
    """Whatever part of it an earlier session has enqueued, letters included."""

    def letter(template, delivery):
        (made,) = template.each(delivery)
        made.argsrepr = "letter"
        return made

    batch = template(app, batch=Batch(2, transaction=True))
    batch.max_change_size = 100

    def read(deduplicator=None):
        outbox = Batcher(letter)
        if deduplicator is not None:
            outbox.deduplicate(deduplicator)
        outbox.add(batch, written(16, 1, 2, -3, -4, 5))
        outbox.add(batch, written(16, 6, 7, 8, first=5))
        outbox.add(batch, written(16, -9, first=8))
        outbox.commit(Lsn(24))
        return outbox.collect().messages

    def shown(messages):
        return [
            "letter" if message.argsrepr == "letter" else parts([message])[0]
            for message in messages
        ]

    messages = read()
    whole = shown(messages)
    assert whole == [
        *(([1, 2], 0, False), "letter", "letter", ([5, 6], 1, False), ([7, 8], 2, True), "letter"),
    ]
    for count in range(1, len(messages) + 1):
        marks, transactions = {}, set()
        for message in messages[:count]:
            for number, mark in message.covered[0]:
                marks[batch.key, number] = mark
            transactions |= set(message.covered[1])
        again = read(Deduplicator(marks, transactions))
        assert shown(again) == whole[count:]
        assert [each.id for each in again] == [each.id for each in messages[count:]]


def test_transaction_batch_split_for_the_broker_keeps_its_number(app):
    batch = template(app, batch="transaction")
    outbox = Batcher(None)
    outbox.add(batch, written(16, 1, 2, 3, 4))
    outbox.commit(Lsn(24))
    (message,) = outbox.collect().messages
    oversize = Oversize(app, "flash.dead", SimpleNamespace(of=lambda message: batch))
    halves = oversize.fitting([message], len(message.body) - 1)
    assert parts(halves) == [([1, 2], 0, False), ([3, 4], 0, True)]
    assert len({message.id, *(half.id for half in halves)}) == 2


def test_transaction_batch_leaves_rows_of_a_backfill_alone(app):
    batch, outbox = template(app, batch="transaction"), Batcher(None)
    outbox.add(batch, written(16, 1))
    row_ids = [prefixed(row, row_id=bytes(16)) for row in written(32, 2, 3).rows]
    chunk = Transaction(Lsn(31), 0, 0, backfill="b")
    outbox.add(batch, written(32)._replace(transaction=chunk, rows=row_ids))
    outbox.add(batch, written(32, 4))
    outbox.commit(Lsn(40))
    found = parts(outbox.collect(everything=True).messages)
    assert found == [([1], 0, True), ([2, 3], 0, True), ([4], 0, True)]
