"""Scenarios of the Go library that this one descends from which need processes.

The table of all of them is in tests/integration/test_ancestor.py.
"""

import signal

import psycopg


def test_changes_after_kill_9_are_delivered_after_the_restart(shop):
    for round_ in range(2):
        shop.end(shop.replicate(), signal.SIGKILL)
        first = round_ * 5 + 1
        shop.database.execute(
            f"INSERT INTO items SELECT n, 'a' FROM generate_series({first}, {first + 4}) AS n"
        )
    shop.replicate()
    shop.worker()
    notes = shop.until_noted(10)
    assert {note["new"]["id"] for note in notes} == set(range(1, 11))
    # The same slot and publications each time.
    assert shop.database.one("SELECT count(*) FROM pg_publication") == 4
    slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    assert shop.database.one(slots) == 1


def test_stopped_process_loses_the_slot_to_another(shop):
    dsn = psycopg.conninfo.make_conninfo(shop.database.dsn, options="-c wal_sender_timeout=2s")
    first = shop.replicate(SHOP_DSN=dsn)
    second = shop.replicate(wait=False)
    shop.until_said(second, "is active for PID")
    first.send_signal(signal.SIGSTOP)
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    shop.until_said(second, "Replicating the slot")
    shop.database.execute("INSERT INTO items VALUES (2, 'a')")
    shop.worker()
    assert {note["new"]["id"] for note in shop.until_noted(2)} == {1, 2}
    # It comes to, finds that it no longer reads, and stands by.
    first.send_signal(signal.SIGCONT)
    shop.until_said(first, "is active for PID")
    assert shop.end(second) == 0
    shop.database.execute("INSERT INTO items VALUES (3, 'a')")
    assert {note["new"]["id"] for note in shop.until_noted(3)} == {1, 2, 3}
    assert shop.end(first) == 0
