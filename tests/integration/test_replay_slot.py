"""The slot that stays behind, and how far back a replay can go."""

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from flash_celery.commands import replay
from flash_celery.commands.reset import plan_reset, run_reset
from flash_celery.errors import ConfigurationError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.postgres import slots
from flash_celery.postgres.source import Source
from flash_celery.protocol.lsn import Lsn
from flash_celery.provisioning import replay_slot
from flash_celery.provisioning.findings import OK, WARNING
from flash_celery.settings import Settings

SLOTS = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"


@pytest.fixture
def flash(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    return flash.handler("items")


def span(flash, since, until=None):
    with flash.database.connect() as connection:
        return replay.parse_span(Source(connection, Settings.from_app(flash.app)), since, until)


def levels(flash, **conf):
    flash.app.conf.update(conf)
    with flash.database.connect() as connection:
        findings = replay_slot.findings(Source(connection, Settings.from_app(flash.app)))
        return [finding.level for finding in findings]


def oldest(flash):
    """Once the slot has been made."""
    with flash.database.connect() as connection:
        settings = Settings.from_app(flash.app)
        flash.wait(lambda: replay_slot.oldest(Source(connection, settings)))
        return replay_slot.oldest(Source(connection, settings))


def restart(flash, **conf):
    flash.stop()
    flash.start(**conf)


def test_replay_refuses_wal_that_is_not_retained(flash):
    flash.start()
    with pytest.raises(ConfigurationError, match="No past changes are retained"):
        span(flash, "0/1")
    assert levels(flash) == []
    before = datetime.now(timezone.utc)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    restart(flash, flash_replay_window=3600)
    oldest(flash)
    for since in ("0/1", str(before), "yesterday"):
        with pytest.raises(
            ConfigurationError, match=r"the oldest that can be replayed is [\dA-F]+/"
        ):
            span(flash, since)
    for since in ("teatime", "infinity"):
        with pytest.raises(ConfigurationError, match="neither a position nor a time"):
            span(flash, since)
    assert levels(flash) == [OK]
    now = str(flash.database.one("SELECT clock_timestamp()"))
    flash.do("INSERT INTO items VALUES (2, 'a')", "INSERT INTO items VALUES (3, 'a')")
    count = replay.Count()
    wanted = span(flash, now)
    settings, subscriptions = Settings.from_app(flash.app), subscriptions_of(flash.app)
    with flash.database.connect() as connection:
        at = Source(connection, settings)
        replay.read_changes(at, subscriptions, "handler", wanted, count)
    assert (count.changes, count.transactions) == (2, 2)
    assert count.first.commit_lsn < count.last.commit_lsn < wanted.end
    assert levels(flash, flash_replay_window=0) == [WARNING]
    restart(flash, flash_replay_window=0)
    flash.wait(lambda: flash.database.one(SLOTS) == 1)
    with pytest.raises(ConfigurationError, match="No past changes are retained"):
        span(flash, now)


def test_replay_slot_follows_and_is_dropped_by_a_reset(flash):
    flash.start(flash_replay_window=1)
    settings = Settings.from_app(flash.app)
    before = oldest(flash)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    passed = Lsn.parse(flash.database.one("SELECT pg_current_wal_insert_lsn()::text"))
    flash.do("INSERT INTO items VALUES (2, 'a')")
    flash.wait(lambda: oldest(flash).lsn >= passed)
    assert oldest(flash).time > before.time
    position = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{}'"
    moved = position.format(settings.replay_slot)
    flash.wait(lambda: Lsn.parse(flash.database.one(moved)) >= passed)
    flash.stop()
    flash.wait(lambda: flash.database.one(flash.slot("active_pid")) is None)
    with flash.database.connect() as connection:
        undo = plan_reset(Source(connection, settings), settings.flash_replication_slot)
        assert any("past changes can no longer be replayed" in line for line in undo.lines())
        run_reset(undo, force=False)
    assert flash.database.one(SLOTS) == 0


def test_replay_slot_advances_across_restarts(flash):
    """Otherwise each start would begin a new window, and the WAL of all of them would be kept."""
    flash.start(flash_replay_window=3600)
    settings = Settings.from_app(flash.app)
    before = oldest(flash)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    restart(flash)
    with flash.database.connect() as connection:
        flash.wait(lambda: replay_slot._next(Source(connection, settings)))
        then = replay_slot._next(Source(connection, settings))
        assert before.lsn < then.lsn
        restart(flash)
        flash.do("INSERT INTO items VALUES (2, 'a')")
        assert replay_slot._next(Source(connection, settings)) == then
        flash.stop()
        an_hour_ago = then._replace(time=then.time - timedelta(hours=1))
        at = Source(connection, settings)
        replay_slot._record(at, before, an_hour_ago)
        restart(flash)
        flash.wait(lambda: oldest(flash) == an_hour_ago)
        assert then.lsn < replay_slot._next(Source(connection, settings)).lsn


def test_replay_slot_advances_after_its_connection_ended(flash):
    """The worker's own may live for months."""
    flash.start(flash_replay_window=1)
    keeper = (
        "FROM pg_stat_activity WHERE datname = current_database() "
        "AND query ~ '^(SELECT (obj_description|pg_replication_slot_advance)|COMMIT)'"
    )
    oldest(flash)
    flash.wait(lambda: flash.database.one(flash.slot("active_pid")))
    reader = flash.database.one(flash.slot("active_pid"))
    flash.wait(lambda: flash.database.one(f"SELECT count(*) {keeper}"))
    flash.database.execute(f"SELECT pg_terminate_backend(pid) {keeper}")
    flash.do("INSERT INTO items VALUES (1, 'a')")
    passed = Lsn.parse(flash.database.one("SELECT pg_current_wal_insert_lsn()::text"))
    flash.do("INSERT INTO items VALUES (2, 'a')")
    flash.wait(lambda: oldest(flash).lsn >= passed)
    assert flash.database.one(flash.slot("active_pid")) == reader


def test_replay_slot_advances_after_an_error_of_any_kind(flash, caplog, monkeypatch):
    """As a client library may raise one; the thread runs as long as the session."""
    position, failures = replay_slot._position, [AttributeError("of a library")]

    def fail_once(source):
        if failures:
            raise failures.pop()
        return position(source)

    flash.start(flash_replay_window=1)
    mark = oldest(flash)
    monkeypatch.setattr(replay_slot, "_position", fail_once)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    flash.wait(lambda: mark.lsn < oldest(flash).lsn)
    assert not failures
    assert "AttributeError: of a library" in caplog.text


def test_replay_notices_wal_that_is_no_longer_retained(flash):
    """While a person reads how many changes there are."""
    flash.start(flash_replay_window=3600)
    before = oldest(flash)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    wanted = span(flash, str(before.lsn))
    settings, subscriptions = Settings.from_app(flash.app), subscriptions_of(flash.app)
    with flash.database.connect() as connection:
        at = Source(connection, settings)
        replay_slot._record(at, before._replace(lsn=wanted.end))
        with pytest.raises(ConfigurationError, match="are no longer retained"):
            replay.read_changes(at, subscriptions, "handler", wanted, replay.Count())


def test_replay_slot_is_not_idle_for_postgresql(flash):
    """Version 18 invalidates one that is, however little is written."""
    if flash.database.connect().info.server_version < 180000:
        pytest.skip("this PostgreSQL has no idle_replication_slot_timeout")
    flash.start(flash_replay_window=20)
    oldest(flash)
    name = Settings.from_app(flash.app).replay_slot
    idle = f"SELECT inactive_since FROM pg_replication_slots WHERE slot_name = '{name}'"
    since, setting = flash.database.one(idle), "idle_replication_slot_timeout"
    try:
        flash.database.execute(f"ALTER SYSTEM SET {setting} = '1d'", "SELECT pg_reload_conf()")
        flash.wait(lambda: flash.database.one(idle) not in (since, None))
    finally:
        flash.database.execute(f"ALTER SYSTEM RESET {setting}", "SELECT pg_reload_conf()")


def test_replay_slot_that_is_lost_is_created_again_while_the_worker_runs(
    flash, caplog, monkeypatch
):
    flash.start(flash_replay_window=20)
    name, before = Settings.from_app(flash.app).replay_slot, oldest(flash)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    find = slots.find

    def found(connection, wanted):
        slot = find(connection, wanted)
        lost = wanted == name and slot and slot.confirmed == str(before.lsn)
        return replace(slot, reason="idle_timeout") if lost else slot

    monkeypatch.setattr(slots, "find", found)
    flash.wait(lambda: oldest(flash).lsn > before.lsn)
    assert f"The slot {name} was lost (idle_timeout); creating it again" in caplog.text


def test_replay_slot_of_another_owner_is_left_alone(flash):
    name = f"{flash.database.slot}_history"
    flash.database.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
    flash.start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    flash.stop()
    assert flash.database.one(SLOTS) == 2
    with pytest.raises(ConfigurationError, match="that `flash replicate` did not create"):
        flash.start(flash_replay_window=60)
    assert flash.database.one(SLOTS) == 2


def test_replay_slot_left_half_created_is_recreated(flash):
    """The process was killed before the slot's position was noted."""
    flash.start(flash_replay_window=3600)
    settings = Settings.from_app(flash.app)
    mark = oldest(flash)
    flash.do("INSERT INTO items VALUES (1, 'a')")
    flash.stop()  # the running worker could write the note at the same time
    with flash.database.connect() as connection:
        replay_slot._record(Source(connection, settings), mark._replace(lsn=replay_slot._UNKNOWN))
    with pytest.raises(ConfigurationError, match="No past changes are retained"):
        span(flash, str(mark.lsn))
    assert levels(flash) == [WARNING]
    flash.start()
    flash.wait(lambda: mark.lsn < oldest(flash).lsn < replay_slot._UNKNOWN)
