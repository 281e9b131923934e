"""Gaps in the record."""

from dataclasses import replace

from flash_celery.postgres.gaps import Gap
from flash_celery.provisioning.record import Record

OPEN = Gap("slot", "rows_removed", "0/10", "2026-01-01")
OTHER = Gap("slot", "of open transactions", None, None, "0/20", "2026-01-02")


def test_gap_stays_open_if_another_is_added():
    """Otherwise a process that ends right then would leave no sign of it."""
    record = Record().with_gap(OPEN).with_gap(OTHER)
    assert record.open_gap == OPEN
    closed = replace(OPEN, until="0/30", until_time="2026-01-03")
    assert record.with_gap(closed).gaps == [OTHER.to_json(), closed.to_json()]
