"""The slot is watched: neighbours, owners that are stopped or cut off, and slots that are lost."""

import json
import signal
import time

import pytest

from example_project.servers import Postgres, Valkey, wait_until
from tests.acceptance.steps import assert_handled, insert_rows
from tests.proxy import Proxy


def one_of_the_slot(shop, column):
    return shop.database.one(
        f"SELECT {column} FROM pg_replication_slots WHERE slot_name = '{shop.database.slot}'"
    )


def until_confirmed(shop):
    goal = shop.database.one("SELECT pg_current_wal_insert_lsn()")
    wait_until(lambda: one_of_the_slot(shop, f"confirmed_flush_lsn >= '{goal}'"), "the slot")


def reader(shop):
    return one_of_the_slot(shop, "active_pid")


# Neighbours.


def written_elsewhere(shop, neighbour, rows, chunk):
    """Write to another table and another database; return the largest lag of the slot."""
    behind = 0
    shop.database.execute("CREATE TABLE other (id int, text text)")
    neighbour.execute("CREATE TABLE other (id int, text text)")
    for _ in range(0, rows, 2 * chunk):
        for database in (shop.database, neighbour):
            database.execute(
                f"INSERT INTO other SELECT n, repeat('x', 50) FROM generate_series(1, {chunk}) n",
                "TRUNCATE other",
            )
        lag = one_of_the_slot(shop, "pg_current_wal_insert_lsn() - confirmed_flush_lsn")
        behind = max(behind, int(lag))
    return behind


def busy_neighbours(shop, new_database, rows, chunk):
    replicate = shop.replicate()
    shop.worker()
    insert_rows(shop.database, 1, 10)
    assert_handled(shop, 1, 10)
    with shop.database.connect() as connection, connection.transaction():
        connection.execute("INSERT INTO items VALUES (11, 'open')")
        start = shop.database.one("SELECT pg_current_wal_insert_lsn()")
        held = one_of_the_slot(shop, "restart_lsn")
        behind = written_elsewhere(shop, new_database(), rows, chunk)
        written = int(shop.database.one(f"SELECT pg_current_wal_insert_lsn() - '{start}'"))
        assert written > rows * 80
        # The slot follows, except for the WAL written since the last reply.
        assert behind < written / 2
        until_confirmed(shop)
        # PostgreSQL's own rule: it keeps what it needs to decode a transaction that is open.
        assert one_of_the_slot(shop, f"restart_lsn <= '{start}' AND restart_lsn >= '{held}'")
    assert_handled(shop, 1, 11)
    goal = shop.database.one("SELECT pg_current_wal_insert_lsn()")

    def let_go():
        # The server learns what it needs no more from what it notes about transactions.
        shop.database.execute("CHECKPOINT")
        return one_of_the_slot(shop, f"restart_lsn >= '{goal}'")

    wait_until(let_go, "the WAL to be let go of")
    assert shop.end(replicate) == 0


def test_slot_follows_busy_neighbours_during_an_open_transaction(shop, new_database):
    busy_neighbours(shop, new_database, 200_000, 10_000)


@pytest.mark.soak
def test_slot_follows_10_million_rows_of_neighbours(shop, new_database):
    busy_neighbours(shop, new_database, 10_000_000, 100_000)


# Owners.


def test_hot_spare_takes_over_from_a_killed_owner(shop):
    first = shop.replicate()
    second = shop.replicate(wait=False)
    shop.until_said(second, "waiting until it is free")
    shop.worker()
    insert_rows(shop.database, 1, 1000)
    shop.end(first, signal.SIGKILL)
    insert_rows(shop.database, 1001, 1010)
    shop.until_said(second, "Replicating the slot", timeout=10)  # 3 s on a machine that is not busy
    assert_handled(shop, 1, 1010)


def test_owner_stopped_by_sigstop_publishes_nothing_after_a_takeover(shop):
    first = shop.replicate()
    second = shop.replicate(wait=False)
    shop.until_said(second, "waiting until it is free")
    shop.worker()
    insert_rows(shop.database, 1, 100)
    assert_handled(shop, 1, 100)
    until_confirmed(shop)
    first.send_signal(signal.SIGSTOP)
    # These wait in its socket.
    insert_rows(shop.database, 101, 1000)
    shop.until_said(second, "Replicating the slot")
    insert_rows(shop.database, 1001, 1100)
    assert_handled(shop, 1, 1100)
    first.send_signal(signal.SIGCONT)
    shop.until_said(first, "waiting until it is free")
    insert_rows(shop.database, 1101, 1110)
    notes, _ = assert_handled(shop, 1, 1110)
    assert len(notes) == 1110
    assert shop.end(second) == 0
    wait_until(lambda: first.log.read_text().count("Replicating the slot") == 2, "the first")


@pytest.mark.soak  # as test_networks.py does it in short
def test_owner_without_network_loses_the_slot(shop):
    direct = shop.database.dsn
    with Proxy(shop.database.server.port) as proxy:
        there = direct.replace(str(shop.database.server.port), str(proxy.port))
        first = shop.replicate(SHOP_DSN=f"{there}?sslmode=disable&connect_timeout=3")
        second = shop.replicate(wait=False)
        shop.until_said(second, "waiting until it is free")
        shop.worker()
        proxy.stall()
        insert_rows(shop.database, 1, 100)
        shop.until_said(second, "Replicating the slot")
        assert_handled(shop, 1, 100)
        shop.until_said(first, "has not been answered for 6 s")
        proxy.heal()
        shop.until_said(first, "waiting until it is free")
        insert_rows(shop.database, 101, 110)
        notes, _ = assert_handled(shop, 1, 110)
        assert len(notes) == 110


@pytest.mark.soak
def test_silent_catalog_connection_is_replaced(shop):
    with Proxy(shop.database.server.port) as proxy:
        there = shop.database.dsn.replace(str(shop.database.server.port), str(proxy.port))
        replicate = shop.replicate(SHOP_DSN=f"{there}?sslmode=disable&connect_timeout=3")
        shop.worker()
        insert_rows(shop.database, 1, 10)
        assert_handled(shop, 1, 10)
        proxy.stall(only=lambda opening: b"replication\0" not in opening)
        shop.until_said(replicate, "a statement has not been answered for 6 s", timeout=30)
        insert_rows(shop.database, 11, 20)
        proxy.heal()
        assert_handled(shop, 1, 20)
        assert shop.end(replicate) == 0


# Slots that are lost.

#: Little WAL is kept for slots, and little else.
SCARCE = {"max_slot_wal_keep_size": "48MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}


@pytest.fixture
def scarce(make_shop, database):
    """A shop on a PostgreSQL that keeps little WAL, with a broker that may be stopped."""
    shared, before = database.server, database.dsn
    with Postgres(**SCARCE) as own, Valkey() as broker:
        database.server, database.dsn = own, own.dsn()
        yield lambda **conf: make_shop(broker, SHOP_CONF=json.dumps(conf))
    database.server, database.dsn = shared, before


def fill(shop, megabytes, then="CHECKPOINT"):
    shop.database.execute("CREATE TABLE IF NOT EXISTS filling (text text)")
    for _ in range(megabytes // 8):
        shop.database.execute(
            "INSERT INTO filling SELECT repeat('x', 1000) FROM generate_series(1, 8000)",
            "TRUNCATE filling",
        )
    shop.database.execute("SELECT pg_switch_wal()", then)


def lose_while_the_broker_is_down(shop, replicate):
    """The slot is lost to a worker that has read up to here; the position of that."""
    insert_rows(shop.database, 1, 10)
    shop.worker()
    assert_handled(shop, 1, 10)
    until_confirmed(shop)
    time.sleep(3)  # it has looked, and has looked again
    until_confirmed(shop)
    shop.broker.stop()
    insert_rows(shop.database, 11, 20)
    shop.until_said(replicate, "Nothing is acknowledged until it works again")
    fill(shop, 32, "SELECT 1")
    shop.until_said(replicate, "is lost after")
    confirmed = one_of_the_slot(shop, "confirmed_flush_lsn")
    fill(shop, 64)
    return confirmed


def test_lost_slot_ends_replicate_and_names_the_gap(scarce):
    shop = scarce()
    replicate = shop.replicate()
    confirmed = lose_while_the_broker_is_down(shop, replicate)
    assert replicate.wait(60) == 2
    log = replicate.log.read_text()
    assert f"was invalidated: changes from {confirmed} (20" in log
    assert f"are missing ({shop.database.slot}: wal_removed); run `flash reset`" in log
    assert log.count("is lost after") == 1
    # Another process knows the position still, and not the time.
    again = shop.run("flash", "replicate")
    assert again.returncode == 2
    assert f"changes from {confirmed} (at an unknown time) to " in again.stderr


@pytest.mark.soak
def test_slot_that_was_idle_for_too_long_ends_the_start(scarce):
    """PostgreSQL 18 invalidates it at a checkpoint, and says why."""
    shop = scarce()
    if int(shop.database.one("SHOW server_version_num")) < 180000:
        pytest.skip("PostgreSQL has idle_replication_slot_timeout from 18 on")
    shop.end(shop.replicate())
    timeout = "ALTER SYSTEM SET idle_replication_slot_timeout = '1s'"
    shop.database.execute(timeout, "SELECT pg_reload_conf()")
    wait_until(
        lambda: shop.database.execute("CHECKPOINT") or one_of_the_slot(shop, "invalidation_reason"),
        "PostgreSQL to invalidate the slot",
    )
    ended = shop.run("flash", "replicate")
    assert ended.returncode == 2
    assert f"are missing ({shop.database.slot}: idle_timeout); run `flash reset`" in ended.stderr


@pytest.mark.soak
def test_lost_slot_is_recreated_on_request_and_the_gap_is_reported(scarce):
    shop = scarce(flash_on_lost_slot="recreate")
    replicate = shop.replicate()
    confirmed = lose_while_the_broker_is_down(shop, replicate)
    shop.until_said(replicate, "rebuild what depends on them")
    assert f"changes from {confirmed} (20" in replicate.log.read_text()
    shop.broker.start()
    insert_rows(shop.database, 21, 30)
    notes = shop.until_noted(20)
    assert [note["new"]["id"] for note in notes] == [*range(1, 11), *range(21, 31)]
    status = json.loads(shop.run("flash", "status", "--json").stdout)
    (gap,) = status["gaps"]
    assert (gap["since"], gap["reason"]) == (confirmed, "wal_removed")
    assert gap["since_time"] < gap["until_time"]
    assert "gap        changes from " in shop.run("flash", "status").stdout
    assert "warning  gap: changes from " in shop.run("flash", "doctor").stdout


def drop_the_slot(shop):
    shop.database.execute(f"SELECT pg_terminate_backend({reader(shop)})")
    wait_until(lambda: reader(shop) is None, "the reader to end")
    shop.database.execute(f"SELECT pg_drop_replication_slot('{shop.database.slot}')")


def test_dropped_slot_is_never_recreated_without_a_report(shop):
    shop.end(shop.replicate())
    drop = f"SELECT pg_drop_replication_slot('{shop.database.slot}')"
    wait_until(lambda: reader(shop) is None, "the reader to end")
    shop.database.execute(drop)
    halted = shop.run("flash", "replicate")
    assert halted.returncode == 2
    assert "existed and is gone: changes from an unknown position to " in halted.stderr
    insert_rows(shop.database, 1, 5)
    replicate = shop.replicate(SHOP_CONF='{"flash_on_lost_slot": "recreate"}')
    log = replicate.log.read_text()
    assert "changes from an unknown position to " in log
    assert f"are missing ({shop.database.slot}: dropped); rebuild what depends on them" in log
    shop.worker()
    insert_rows(shop.database, 6, 10)
    assert_handled(shop, 6, 10)
    assert shop.end(replicate) == 0


def test_reset_in_progress_is_no_lost_slot(shop):
    replicate = shop.replicate(SHOP_CONF='{"flash_on_lost_slot": "recreate"}')
    done = shop.run("flash", "reset", "--yes", "--force")
    assert done.returncode == 0, done.stderr
    assert replicate.wait(30) == 2
    assert "was dropped while it was read (`flash reset`?)" in replicate.log.read_text()
    assert not shop.database.execute(
        f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{shop.database.slot}'"
    )
