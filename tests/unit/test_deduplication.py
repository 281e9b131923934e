"""The rest of a delivery that the broker may have in part."""

import pytest

from flash_celery.changes.deliveries import Delivery, prefixed
from flash_celery.changes.rows import ChunkTransaction, Transaction
from flash_celery.messages.deduplication import Deduplicator, chunk_of, covered_by, identity
from flash_celery.protocol.lsn import Lsn


def delivery(lsn=100, rows="abcd", ordinal=0, part=0, number=0, committed_at=1):
    return Delivery(None, Transaction(Lsn(lsn), 7, committed_at), ordinal, part, number, list(rows))


def enqueued(mark, *known, number=0):
    return Deduplicator({("one", number): mark}, {identity(row.transaction) for row in known})


def left(remaining):
    return remaining and (remaining.ordinal, "".join(remaining.rows))


@pytest.mark.parametrize(
    ("mark", "given", "rest"),
    [
        ((100, 1, 0), {}, (2, "cd")),
        ((100, 3, 0), {}, None),
        ((100, 9, 0), {}, None),
        ((100, 1, 0), {"ordinal": 2}, (2, "abcd")),
        ((200, 0, 0), {}, None),
        ((50, 9, 0), {}, (0, "abcd")),
        # The halves of a key change follow each other.
        ((100, 4, 1), {"ordinal": 4, "rows": "a", "part": 1}, None),
        ((100, 4, 1), {"ordinal": 4, "rows": "a", "part": 2}, (4, "a")),
        ((100, 4, 2), {"ordinal": 4, "rows": "a", "part": 2}, None),
        ((100, 4, 2), {"ordinal": 4, "rows": "ab"}, (5, "b")),
    ],
)
def test_deduplicator_keeps_only_what_the_broker_lacks(mark, given, rest):
    run = delivery(**given)
    assert left(enqueued(mark, run).filter("one", run)) == rest


def test_deduplicator_ignores_other_templates_and_subscriptions():
    run = delivery()
    known = enqueued((200, 0, 0), run)
    assert known.filter("two", run) == run
    assert known.filter("one", delivery(number=1)).rows == list("abcd")


@pytest.mark.parametrize("given", [{"lsn": 99}, {"committed_at": 2}])
def test_deduplicator_passes_a_transaction_of_another_timeline(given):
    known = enqueued((200, 0, 0), delivery())
    assert left(known.filter("one", delivery(**given))) == (0, "abcd")


def test_rows_of_a_backfill_leave_the_mark_of_changes_where_it_is():
    """Their position may be before changes that were delivered already."""
    chunk = ChunkTransaction(Lsn(90), 0, 1, None, "", "b1")
    chunk.chunk = bytes(8)
    ids = [bytes([n] * 16) for n in (1, 2)]
    rows = [prefixed(b"I", row_id=row_id) for row_id in ids]
    backfilled = Delivery(None, chunk, 0, 0, 3, rows)
    marks, transactions, chunks = covered_by([delivery(), backfilled])
    assert marks == [(0, (100, 3, 0))]
    assert list(transactions) == [identity(delivery().transaction)]
    assert chunks == [(chunk_of(bytes(16), 3), b"".join(ids))]
