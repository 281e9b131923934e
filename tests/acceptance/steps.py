"""Steps that acceptance tests share: write rows, start workers, wait, check the outcome."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psycopg

from example_project.servers import wait_until
from tests.conftest import missing


def insert_rows(database, first, last, per_transaction=10):
    with database.connect() as connection:
        for start in range(first, last + 1, per_transaction):
            end = min(start + per_transaction - 1, last)
            connection.execute(
                f"INSERT INTO items SELECT n, 'a' FROM generate_series({start}, {end}) AS n"
            )


def assert_handled(shop, first, last, timeout=120.0, ordered=True):
    """Check that each row was handled once by identity, in commit order, under one task id."""
    notes = shop.until_noted(last - first + 1, timeout=timeout)
    order = list(dict.fromkeys(note["new"]["id"] for note in notes))
    assert (order if ordered else sorted(order)) == list(range(first, last + 1))
    assert len({(note["id"], note["task_id"]) for note in notes}) == last - first + 1
    return notes, order


def wait_until_confirmed(shop):
    """Wait until everything written so far is acknowledged: the queue has all of it."""
    goal = shop.database.one("SELECT pg_current_wal_insert_lsn()")
    wait_until(
        lambda: shop.database.one(
            f"SELECT confirmed_flush_lsn >= '{goal}'::pg_lsn FROM pg_replication_slots "
            f"WHERE slot_name = '{shop.database.slot}'"
        ),
        "the slot to be acknowledged",
    )


def slots(database):
    return [
        row[0]
        for row in database.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
        )
    ]


def publications(database):
    return [row[0] for row in database.execute("SELECT pubname FROM pg_publication ORDER BY 1")]


def created_nothing(database):
    return slots(database) == [] and publications(database) == []


def assert_refused(ended, message):
    *before, refusal = ended.stderr.strip().splitlines()
    assert not any("Traceback" in line for line in before), ended.stderr
    assert refusal.startswith("Error: ")
    assert re.search(message, refusal), refusal


def psql(shop, script, dsn):
    binary = shop.database.server.binaries / "psql"
    if not binary.exists():
        missing("psql")
    command = [binary, "-X", "-q", "-d", dsn]
    ran = subprocess.run(command, input=script.encode(), capture_output=True, cwd="/", timeout=120)
    ran.stderr = ran.stderr.decode()
    return ran


def use_streaming(shop, **conf):
    """Let the server send transactions of a megabyte while they are open."""
    options = "-c logical_decoding_work_mem=1MB"
    shop.environment["SHOP_DSN"] = psycopg.conninfo.make_conninfo(
        shop.database.dsn, options=options
    )
    shop.environment["SHOP_CONF"] = json.dumps({"flash_use_streaming": True, **conf})


def start_with_failpoints(shop, *failpoints):
    command = shop.command
    shop.command = lambda *arguments: [
        *(sys.executable, "-m", "tests.acceptance.failpoints", *failpoints),
        *("--", "-A", shop.project),
        *arguments,
    ]
    try:
        return shop.start("flash", "replicate")
    finally:
        shop.command = command


def replicate_through(shop, *failpoints):
    """Start replication workers that are killed at these steps; the last one is alive."""
    process = start_with_failpoints(shop, *failpoints)
    shop.until_said(process, "The last one", timeout=600)
    last = process.log.read_text().rindex("The last one")

    def replicating():
        return "Replicating the slot" in process.log.read_text()[last:]

    deadline = time.monotonic() + 60
    while not replicating():
        assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.05)
    for failpoint in failpoints:
        assert f"Killed at {failpoint}" in process.log.read_text(), failpoint
    return process


def broker_failpoints(shop, *failpoints):
    """Return the failpoints that the shop's broker can reach."""
    others = {"sent", "half a frame"}
    if shop.broker.url.startswith("amqp"):
        others = {"pushed", "half a push"}
    return [failpoint for failpoint in failpoints if failpoint.partition(":")[0] not in others]


def http_get(address, path, method="GET"):
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        answer = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read().decode(), dict(answer.headers)
