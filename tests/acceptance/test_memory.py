"""Large transactions in bounded memory, and files that leave nothing behind."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import redis

from example_project.servers import Valkey, wait_until
from flash_celery.changes import payload
from tests.acceptance.steps import use_streaming

LIMIT = 150_000_000
STREAMED = "SELECT stream_txns > 0 FROM pg_stat_replication_slots WHERE slot_name = '{}'"

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def peak(process):
    """The most memory it has had, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def enqueued(client, count):
    """The ids in the batches as they arrive, taken away so that the broker stays small."""
    total = 0
    while total < count:
        messages = wait_until(lambda: client.rpop("batches", 100), "batches", timeout=300)
        for message in messages:
            body = json.loads(json.loads(message)["body"])
            for change in payload.decode(body[0][0]["__value__"]):
                total += 1
                assert change.new["id"] == total


@linux
@pytest.mark.parametrize(
    "rows", [300_000, pytest.param(5_000_000, marks=pytest.mark.soak)], ids=["300k", "5M"]
)
@pytest.mark.parametrize("mode", ["whole", pytest.param("streamed", marks=pytest.mark.soak)])
def test_large_commit_takes_bounded_memory(shop, mode, rows):
    shop.environment["SHOP_BATCH"] = "only"
    if mode == "streamed":
        use_streaming(shop)
    replicate = shop.replicate()
    shop.database.execute(
        f"INSERT INTO items SELECT n, 'name', 'note' FROM generate_series(1, {rows}) AS n"
    )
    with redis.Redis(port=shop.broker.port) as client:
        enqueued(client, rows)
        assert client.llen("batches") == 0
    assert peak(replicate) < LIMIT
    assert shop.end(replicate) == 0
    streamed = STREAMED.format(shop.database.slot)
    wait_until(lambda: shop.database.one(streamed) is (mode == "streamed"), "statistics")


@linux
def test_large_commit_waits_for_the_broker_in_bounded_memory(make_shop):
    rows = 100_000
    with Valkey(appendfsync="everysec") as own:
        shop = make_shop(own, SHOP_BATCH="only")
        replicate = shop.replicate()
        own.stop()
        shop.database.execute(
            f"INSERT INTO items SELECT n, repeat('x', 500) FROM generate_series(1, {rows}) AS n"
        )
        shop.until_said(replicate, "Nothing is acknowledged until it works again")
        # It reads until it has as much in flight as it may, and then no more.
        before = 0
        while peak(replicate) != before:
            before = peak(replicate)
            time.sleep(1)
        own.start()
        with redis.Redis(port=own.port) as client:
            enqueued(client, rows)
        assert peak(replicate) < LIMIT
        assert shop.end(replicate) == 0


@linux
def test_spool_leaves_no_files_behind(shop, tmp_path):
    folder = tmp_path / "spool"
    folder.mkdir()
    shop.environment["SHOP_BATCH"] = "only"
    use_streaming(shop, flash_spool_directory=str(folder))
    replicate = shop.replicate()

    def spools():
        """The files without a name that it has open there."""
        sizes = []
        for handle in Path(f"/proc/{replicate.pid}/fd").iterdir():
            target = os.readlink(handle)
            if target.startswith(f"{folder}/"):
                assert target.endswith(" (deleted)")
                sizes.append(target)
        return sizes

    many = "INSERT INTO items SELECT n, repeat('x', 300) FROM generate_series({}, {}) AS n"
    with shop.database.connect() as connection:
        for number, end in enumerate(("ROLLBACK", "COMMIT")):
            connection.execute(f"BEGIN; {many.format(number * 20_000, number * 20_000 + 19_999)}")
            wait_until(spools, "a spool")
            assert list(folder.iterdir()) == []
            connection.execute(end)
            wait_until(lambda: not spools(), f"the end of the spool after {end}")
        for number in (signal.SIGTERM, signal.SIGKILL):
            connection.execute(f"BEGIN; {many.format(100_000, 119_999)}")
            wait_until(spools, "a spool")
            shop.end(replicate, number)
            assert list(folder.iterdir()) == []
            connection.execute("ROLLBACK")
            replicate = shop.replicate()
    shop.database.execute("INSERT INTO items VALUES (-1)")
    with redis.Redis(port=shop.broker.port) as client:
        wait_until(lambda: client.llen("batches") >= 200, "the batches")
    shop.end(replicate)
