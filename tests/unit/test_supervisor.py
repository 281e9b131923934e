"""Why a session has to end: what changed, and how long an open transaction may delay it."""

import time
from types import SimpleNamespace

import pytest

from flash_celery.errors import ReplicationError
from flash_celery.protocol.lsn import Lsn
from flash_celery.worker.lost_tables import LostTables
from flash_celery.worker.open_transactions import OpenTransactions
from flash_celery.worker.supervisor import Reason, Supervisor


class Source(SimpleNamespace):
    """A source, and all that a supervisor checks on it."""

    settings = SimpleNamespace(flash_shutdown_timeout=10)
    whole_source = False
    record_changed = False
    record_removed = False
    altered = False
    lost = False
    backfill = False
    confirmed = Lsn(0)
    streaming = OpenTransactions(wanted=True)

    def record(self, source):
        pass

    def take_turns(self):
        return self.backfill

    def changed(self, source):
        return self.record_changed

    def record_lost(self, source):
        return self.record_removed

    def tables_changed(self, source):
        return self.altered

    def check(self, received, listening):
        if self.lost:
            raise ReplicationError("The slot is not read by this worker.")


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def check(source):
    supervisor = Supervisor(
        source, source, source, source, LostTables(), source, source.streaming, source
    )

    def check(now, transaction_open=False):
        reason = supervisor.check(now, Lsn(1), True, transaction_open)
        assert supervisor.next_check == now + 1
        return reason

    return check


def test_nothing_changed(check):
    assert check(100) is None


def test_changed_table_waits_for_the_open_transaction(source, check):
    source.altered = True
    assert check(100, transaction_open=True) is None
    assert check(200, transaction_open=True) is None
    assert check(201) is Reason.TABLES_CHANGED


def test_changed_record_waits_for_the_open_transaction_for_a_while(source, check):
    source.record_changed = True
    assert check(100, transaction_open=True) is None
    assert check(104, transaction_open=True) is None
    assert check(106, transaction_open=True) is Reason.RECORD_CHANGED
    assert check(107) is Reason.RECORD_CHANGED


def test_removed_record_begins_a_new_session(source, check):
    source.record_removed = True
    assert check(100) is Reason.RECORD_CHANGED


def test_lost_slot_is_an_error(source, check):
    source.lost = True
    with pytest.raises(ReplicationError):
        check(100)


def test_each_reason_has_a_sentence():
    assert len({reason.sentence for reason in Reason}) == len(Reason)


def test_requested_backfill_waits_for_the_open_transaction(source, check):
    source.backfill = True
    assert check(100, transaction_open=True) is None
    assert check(101) is Reason.BACKFILL_REQUESTED


def test_streaming_returns_after_the_transaction_that_was_read_whole(source, check):
    source.streaming.read_whole(Lsn(50))
    later = time.monotonic() + 1
    source.confirmed = Lsn(50)
    assert check(later) is None
    source.confirmed = Lsn(51)
    assert check(time.monotonic() - 1) is None
    assert check(later, transaction_open=True) is None
    assert not source.streaming.streamed
    assert check(later) is Reason.STREAMING
    assert source.streaming.streamed
    assert check(later) is None
