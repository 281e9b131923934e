"""The parents that a row's partition had when the row was written, as far as known."""

import pytest

from flash_celery.capture.partition_history import PartitionHistory
from flash_celery.protocol.lsn import Lsn
from flash_celery.table_name import TableName

A, B, C = (TableName("public", name) for name in "abc")


def belongs(history, position):
    """To what a row belongs that was committed there."""
    ancestors = history.at(1, Lsn(position)).items()
    return {str(name)[-1] for name, until in ancestors if until is None or position < until}


def looked_at(noted, *looks):
    history = PartitionHistory({1: noted} if noted else {})
    for position, *ancestors in looks:
        history.observe(1, Lsn(position), ancestors)
    return history


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (looked_at([]), {7: set()}),
        (looked_at([A]), {7: {"a"}}),
        (looked_at([A], (10, A)), {7: {"a"}, 10: {"a"}}),
        (looked_at([A], (10,)), {7: {"a"}, 10: set()}),
        (looked_at([A], (10, B)), {7: {"a", "b"}, 10: {"b"}}),
        (looked_at([A, B], (10, A)), {7: {"a", "b"}, 10: {"a"}}),
        (looked_at([], (10, A)), {7: {"a"}, 10: {"a"}}),
        (looked_at([A], (5, B), (8, B), (20, C)), {3: {"a", "b"}, 7: {"b", "c"}, 20: {"c"}}),
        (looked_at([A], (10,), (20, B)), {7: {"a"}, 15: {"b"}}),
        # The server was restored: the first look is not of what is there now.
        (looked_at([], (20, B), (5, A)), {7: {"a"}, 20: {"a"}}),
        (looked_at([], (10, A), (20,)), {7: {"a"}, 15: {"a"}, 20: set()}),
    ],
)
def test_partition_row_belongs_to_the_parents_of_both_snapshots(history, expected):
    assert {position: belongs(history, position) for position in expected} == expected


def test_partition_dropped_before_a_snapshot_has_no_parents_after_it():
    history = PartitionHistory({1: [A], 2: [B]})
    history.add_snapshot(Lsn(10), {2: [B]})
    assert (belongs(history, 9), belongs(history, 10)) == ({"a"}, set())
    assert (history.latest(1), history.latest(2)) == (frozenset(), {B})
