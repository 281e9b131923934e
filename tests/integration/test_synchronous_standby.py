"""Servers whose synchronous_standby_names makes the replication worker a synchronous standby."""

import contextlib
import threading

import pytest

from flash_celery.handlers.decorators import subscriptions_of
from flash_celery.postgres.source import connected
from flash_celery.provisioning import preflight
from flash_celery.settings import Settings

from .conftest import shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
COUNTED = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"


@contextlib.contextmanager
def standby_names(flash, names):
    """Set synchronous_standby_names in this block; its own statements write no rows."""
    setting, reload = "synchronous_standby_names", "SELECT pg_reload_conf()"
    flash.database.execute(f"ALTER SYSTEM SET {setting} = '{names}'", reload)
    try:
        flash.wait(lambda: flash.database.one(f"SHOW {setting}") == names)
        yield
    finally:
        flash.database.execute(f"ALTER SYSTEM RESET {setting}", reload)
        flash.wait(lambda: flash.database.one(WAITING) == 0)


@pytest.mark.parametrize("names", ["*", "FIRST 1 (*)", "ANY 1 (Flash_Celery)"])
def test_commits_go_on_where_the_worker_is_a_synchronous_standby(flash, caplog, names):
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY)")
    flash.handler("items", "insert").handler("others", "insert", name="other")
    with standby_names(flash, names):
        # The commits of set-up wait for no standby either: there is none before the stream.
        flash.start()
        flash.wait(lambda: flash.database.one(COUNTED) == 1)
        writer = threading.Thread(
            target=flash.do,
            args=[
                "INSERT INTO items VALUES (1, 'a')",
                "CREATE TEMP TABLE mine (); INSERT INTO others VALUES (2)",
            ],
        )
        writer.start()
        writer.join(15)
        assert not writer.is_alive(), caplog.text
        assert shown(flash.delivered()) == ["insert 1,a"]
        assert shown(flash.delivered("other")) == ["insert 2"]
        flash.wait(lambda: "as a synchronous standby" in caplog.text)
        assert "reconnecting" not in caplog.text


def test_table_altered_by_a_commit_that_waits_for_the_worker_is_not_guessed(flash, caplog):
    """Its place among partitions becomes visible only after the commit, so the log has the fix."""
    flash.database.execute(
        "CREATE TABLE one (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE two (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE leaf PARTITION OF one FOR VALUES FROM (0) TO (100)",
    )
    flash.handler("one", "insert", name="one").handler("two", "insert", name="two").start()
    move = (
        "ALTER TABLE one DETACH PARTITION leaf; "
        "ALTER TABLE two ATTACH PARTITION leaf FOR VALUES FROM (0) TO (100); "
        "INSERT INTO two VALUES (5)"
    )
    writer = threading.Thread(target=flash.database.execute, args=[move])
    with standby_names(flash, "*"):
        flash.wait(lambda: flash.database.one(COUNTED) == 1)
        writer.start()
        flash.wait(lambda: "waits for this worker as its synchronous standby" in caplog.text)
    writer.join(20)
    flash.do("INSERT INTO two VALUES (6)")
    assert [change.new["id"] for change in flash.delivered("two")] == [5, 6]


@pytest.mark.parametrize(
    ("names", "counts"), [("*", True), ("flash_celery, a", True), ("FIRST 1 (a, b)", False)]
)
def test_doctor_warns_if_the_worker_counts_as_a_synchronous_standby(flash, names, counts):
    flash.database.execute(ITEMS)
    flash.handler("items")
    flash.app.finalize()
    with standby_names(flash, names), connected(Settings.from_app(flash.app)) as source:
        report = preflight.examine(source, subscriptions_of(flash.app))
    messages = [
        finding.message for finding in report.findings if "standby_names" in finding.subject
    ]
    assert bool(messages) is counts
    assert all("ALTER SYSTEM SET synchronous_standby_names" in message for message in messages)
