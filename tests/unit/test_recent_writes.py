"""Rows of a chunk are brought up to date by what the stream has brought since its snapshot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_celery.backfill.moved_rows import MovedRows
from flash_celery.backfill.recent_writes import RecentWrites
from flash_celery.backfill.snapshots import Snapshot
from flash_celery.changes.rows import Transaction
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import UNCHANGED_TOAST, Column, Relation, encode_row, read_row

OID = 77
U = UNCHANGED_TOAST
COLUMNS = Column(True, "id", 23, -1), Column(False, "note", 25, -1)


def transaction(xid, lsn=None):
    return Transaction(Lsn(lsn or xid * 100), xid, 0)


def cells(*values):
    return [value if value is None or value is U else str(value).encode() for value in values]


def insert(*new):
    return encode_row("I", OID, None, None, cells(*new))


def update(*new, old=None, kind="K"):
    return encode_row("U", OID, kind if old else None, cells(*old) if old else None, cells(*new))


def delete(key):
    return encode_row("D", OID, "K", cells(key, None), None)


@pytest.fixture
def writes():
    return described()


def described():
    writes = RecentWrites(["id"])
    writes.describe(relation().columns)
    return writes


def relation(columns=COLUMNS):
    return Relation(None, OID, "public", "items", "d", columns)


def chunk(*rows):
    return {(str(key).encode(),): insert(key, note) for key, note in rows}


def merged(writes, snapshot, *rows):
    return {
        tuple(None if cell is None else cell.decode() for cell in read_row(row)[0].new)
        for row in writes.merge(Snapshot.parse(snapshot), chunk(*rows)).values()
    }


@pytest.mark.parametrize(
    ("snapshot", "xid", "shows"),
    [
        ("10:20:12,14", 9, True),
        ("10:20:12,14", 13, True),
        ("10:20:12,14", 12, False),
        ("10:20:12,14", 20, False),
        # The stream has 32 bits of the id: the epoch is the snapshot's, or the one beside it.
        (f"{(3 << 32) + 10}:{(3 << 32) + 20}:{(3 << 32) + 12}", 12, False),
        (f"{(3 << 32) + 10}:{(3 << 32) + 20}:{(3 << 32) + 12}", 13, True),
        (f"{(3 << 32) - 5}:{(3 << 32) + 20}:", (1 << 32) - 9, True),
        (f"{(3 << 32) - 5}:{(3 << 32) - 2}:", 7, False),
    ],
)
def test_snapshot_shows_what_has_ended(snapshot, xid, shows):
    assert Snapshot.parse(snapshot).shows(xid) is shows


def test_row_is_as_the_snapshot_shows_it_if_nothing_was_written(writes):
    assert merged(writes, "10:10:", (1, "a"), (2, "b")) == {("1", "a"), ("2", "b")}


def test_write_that_the_snapshot_shows_is_left_out(writes):
    writes.note([update(1, "old news")], transaction(9))
    assert merged(writes, "10:10:", (1, "a")) == {("1", "a")}


def test_write_that_the_snapshot_does_not_show_is_the_state_of_the_row(writes):
    writes.note([update(1, "b")], transaction(12))
    writes.note([delete(2)], transaction(13))
    found = merged(writes, "10:20:12,13", (1, "a"), (2, "gone"), (3, "c"))
    assert found == {("1", "b"), ("3", "c")}


def test_value_that_was_not_sent_is_the_one_of_the_chunk(writes):
    writes.note([update(1, U)], transaction(12))
    assert merged(writes, "10:12:", (1, "kept")) == {("1", "kept")}


def test_value_that_was_not_sent_is_the_one_of_the_write_before(writes):
    writes.note([update(1, "set"), update(1, U)], transaction(12))
    writes.note([update(1, U)], transaction(13))
    assert merged(writes, "10:12:", (1, "a")) == {("1", "set")}


def test_row_that_moves_takes_its_value_along(writes):
    writes.note([update(5, U, old=(1, None))], transaction(12))
    assert merged(writes, "10:12:", (1, "kept")) == {("5", "kept")}


def test_rows_that_swap_their_keys_keep_their_values(writes):
    swap = [update(0, U, old=(1, None)), update(1, U, old=(2, None)), update(2, U, old=(0, None))]
    writes.note(swap, transaction(12))
    found = merged(writes, "10:12:", (1, "first"), (2, "second"))
    assert found == {("2", "first"), ("1", "second")}


def test_row_under_the_key_of_a_deleted_one_is_another(writes):
    writes.note([delete(5), update(5, U, old=(1, None)), update(5, "new")], transaction(12))
    found = merged(writes, "10:12:", (1, "kept"), (5, "gone"))
    assert found == {("5", "new")}


def test_row_that_is_inserted_after_the_snapshot_is_not_of_the_chunk(writes):
    writes.note([insert(9, "new")], transaction(12))
    writes.note([delete(1)], transaction(13))
    writes.note([insert(1, "again")], transaction(14))
    assert merged(writes, "10:12:", (1, "a")) == set()


def test_truncate_leaves_no_row_of_the_chunk(writes):
    writes.note([update(1, "b")], transaction(12))
    writes.truncate(transaction(13))
    assert merged(writes, "10:12:", (1, "a"), (2, "c")) == set()
    assert merged(writes, "14:14:", (1, "a")) == {("1", "a")}


def test_transaction_that_writes_too_much_makes_a_chunk_unusable_until_it_is_visible(writes):
    large = transaction(12)
    rows = [insert(number, "many") for number in range(10_001)]
    for first in range(0, len(rows), 100):
        assert not writes.hides_any(Snapshot.parse("10:12:"), COLUMNS)
        writes.note(rows[first : first + 100], large)
    assert writes.hides_any(Snapshot.parse("10:12:"), COLUMNS)
    assert not writes.hides_any(Snapshot.parse("13:13:"), COLUMNS)


def test_only_writes_that_the_snapshot_lacks_need_its_columns(writes):
    """A table that was altered, and is not written since, does not hold up its backfill."""
    writes.note([update(1, "b")], transaction(12))
    more = *COLUMNS, Column(False, "added", 23, -1)
    assert not writes.hides_any(Snapshot.parse("13:13:"), more)
    assert writes.hides_any(Snapshot.parse("12:12:"), more)
    writes.describe(relation(more).columns)
    writes.note([update(1, "c", 1)], transaction(14))
    assert not writes.hides_any(Snapshot.parse("13:14:"), more)
    assert writes.hides_any(Snapshot.parse("12:12:"), more)


def test_transaction_that_alters_the_table_between_its_writes_is_not_merged(writes):
    writes.note([update(1, "b")], transaction(12))
    more = *COLUMNS, Column(False, "added", 23, -1)
    altering = transaction(13)
    writes.note([update(1, "b")], altering)
    writes.describe(relation(more).columns)
    writes.note([update(1, "c", 1)], altering)
    assert writes.hides_any(Snapshot.parse("13:13:"), more)


def test_forgotten_writes_change_nothing_any_more(writes):
    writes.note([update(1, "b")], transaction(12))
    writes.forget(Snapshot.parse("13:13:"))
    assert merged(writes, "10:12:", (1, "a")) == {("1", "a")}


@pytest.fixture
def moved():
    moved = MovedRows("b1", ["id"])
    moved.describe(relation().columns)
    return moved


def move(before, now):
    return update(now, U, old=(before, None))


def test_moved_row_is_read_under_its_new_key_if_a_value_was_not_sent(moved):
    moved.note([update(1, U), update(6, "whole", old=(2, None)), move(1, 5)], transaction(12))
    assert moved.take() == [{"id": "5"}]
    assert moved.take() == []


def test_moved_row_is_read_if_its_update_may_not_be_delivered():
    """As to a handler of `insert`, or with `fields`."""
    moved = MovedRows("b1", ["id"], every=True)
    moved.describe(relation().columns)
    moved.note([update(1, "b"), update(6, "whole", old=(2, None))], transaction(12))
    assert moved.take() == [{"id": "6"}]


def test_every_moved_row_of_a_large_transaction_is_found(moved):
    """Those after the 10,000th too, which are not kept for merging."""
    moved.note([move(number, -number) for number in range(1, 12_001)], transaction(12))
    assert len(moved.take()) == 12_000


def test_row_that_is_owed_is_followed_after_the_table_was_read(moved):
    """It was recorded under the key 5, where reading would find nothing any more."""
    moved.note([move(1, 5)], transaction(12))
    moved.has_all = True
    moved.note([move(5, 6), move(2, 7)], transaction(13))
    moved.note([move(6, 8)], transaction(14))
    assert moved.take() == [{"id": "5"}, {"id": "6"}, {"id": "8"}]


def test_row_that_was_delivered_is_not_followed_any_more(moved):
    moved.note([move(1, 5)], transaction(12))
    moved.has_all = True
    moved.deliver([(b"5",)])
    moved.take()
    moved.note([move(5, 6)], transaction(13))
    assert moved.take() == []


def test_row_that_was_recorded_by_another_session_is_followed():
    moved = MovedRows("b1", ["id"], [(b"5",)])
    moved.describe(relation().columns)
    moved.has_all = True
    moved.note([move(5, 6)], transaction(13))
    assert moved.take() == [{"id": "6"}]


KEYS = st.integers(1, 6)
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), KEYS, st.sampled_from("pqr")),
    st.tuples(st.just("touch"), KEYS),
    st.tuples(st.just("move"), KEYS, KEYS),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("insert"), KEYS),
)


@given(st.lists(st.lists(OPERATIONS, max_size=6), max_size=4))
def test_merged_rows_are_those_of_the_table(transactions):
    """Every row of the chunk that still exists, by whatever key, has its present values."""
    writes = described()
    state = {key: (f"row {key}", f"value {key}") for key in range(1, 6)}
    rows = chunk(*((key, value) for key, (_, value) in state.items()))
    for xid, operations in enumerate(transactions, 12):
        current, sent = transaction(xid), []
        for operation, key, *more in operations:
            if operation == "insert" and key not in state:
                state[key] = None, "inserted"
                sent.append(insert(key, "inserted"))
            elif key not in state:
                continue
            elif operation == "set":
                state[key] = state[key][0], more[0]
                sent.append(update(key, more[0]))
            elif operation == "touch":
                sent.append(update(key, U))
            elif operation == "move" and more[0] not in state:
                state[more[0]] = state.pop(key)
                sent.append(update(more[0], U, old=(key, None)))
            elif operation == "delete":
                del state[key]
                sent.append(delete(key))
        for row in sent:
            writes.note([row], current)
    found = writes.merge(Snapshot.parse("10:12:"), rows).values()
    new = [read_row(row)[0].new for row in found]
    found = {int(key): note.decode() for key, note in new}
    assert found.keys() >= {key for key, (row, _) in state.items() if row is not None}
    assert found.items() <= {key: value for key, (_, value) in state.items()}.items()


def test_ended_writes_keep_nothing(writes):
    writes.note([update(1, "b")], transaction(12))
    writes.end()
    writes.note([update(1, "c"), update(5, U, old=(1, None))], transaction(13))
    writes.truncate(transaction(14))
    assert merged(writes, "10:12:", (1, "a")) == {("1", "a")}


def by_position(position, commit_lsn, rows):
    """The naive rule: what was committed before the chunk's position is in the chunk."""
    return {} if commit_lsn >= position else rows


def test_position_does_not_say_what_a_snapshot_shows(writes):
    """Under commit_delay, a commit is in the WAL, and sent to us, before others see it."""
    seen = chunk((1, "old"))
    writes.note([update(1, "new")], transaction(12, lsn=1200))
    assert by_position(Lsn(1300), Lsn(1200), seen) == seen  # the old value comes after the new one
    assert merged(writes, "12:13:12", (1, "old")) == {("1", "new")}


def without_streamed(rows, streamed):
    """The naive rule: a row that the stream has brought is not delivered by the chunk."""
    return {key: row for key, row in rows.items() if key not in streamed}


def test_row_that_was_streamed_is_still_needed(writes):
    """Its text was not sent, so only the chunk can deliver it."""
    seen = chunk((1, "kept"))
    writes.note([update(1, U)], transaction(12))
    assert without_streamed(seen, {(b"1",)}) == {}
    assert merged(writes, "10:12:", (1, "kept")) == {("1", "kept")}


def test_hot_row_does_not_make_a_chunk_be_read_again(writes):
    """A rule that reads written rows again never ends, because they are always written again."""
    for xid in range(12, 1012):
        writes.note([update(1, xid)], transaction(xid))
        assert not writes.hides_any(Snapshot.parse(f"{xid}:{xid}:"), COLUMNS)
    assert merged(writes, "1000:1000:", (1, "999")) == {("1", "1011")}
