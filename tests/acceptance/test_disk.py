"""A disk that takes no more, where transactions are spooled while they are open."""

import os
import resource
import sys

import pytest
import redis

from example_project.servers import wait_until
from tests.acceptance.steps import use_streaming, wait_until_confirmed

MANY = "INSERT INTO items SELECT n, repeat('x', 300) FROM generate_series({}, {}) AS n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="has no prlimit")
def test_full_disk_for_the_spool_is_retried(shop, tmp_path):
    """PostgreSQL keeps the transaction on its own disk then, and nothing waits for room."""
    folder = tmp_path / "spool"
    folder.mkdir()
    shop.environment["SHOP_BATCH"] = "only"
    use_streaming(shop, flash_spool_directory=str(folder))
    replicate = shop.replicate()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file may not grow beyond this, as if there were no room (EFBIG for ENOSPC).
    resource.prlimit(replicate.pid, resource.RLIMIT_FSIZE, (1 << 20, most))
    with shop.database.connect() as connection:
        connection.execute(f"BEGIN; {MANY.format(1, 20_000)}")
        shop.until_said(replicate, "A large transaction cannot be spooled")
        shop.until_said(replicate, "Continuing without flash_use_streaming")
        # Others do not wait for it.
        shop.database.execute(MANY.format(30_001, 30_100))
        with redis.Redis(port=shop.broker.port) as client:
            wait_until(lambda: client.llen("batches"), "the small transaction")
        connection.execute("COMMIT")
    wait_until_confirmed(shop)
    assert list(folder.iterdir()) == []
    shop.worker(queues="batches")
    notes = shop.until_noted(20_100, "many", timeout=120)
    ids = list(dict.fromkeys(note["new"]["id"] for note in notes))
    assert ids == [*range(30_001, 30_101), *range(1, 20_001)]
    assert shop.end(replicate) == 0


@pytest.mark.parametrize("kind", ["missing", "read-only"])
def test_spool_directory_that_is_not_writable_stops_the_start(shop, tmp_path, kind):
    folder = tmp_path / "spool"
    if kind == "read-only":
        if os.geteuid() == 0:
            folder = "/proc/self"  # even root may not
        else:
            folder.mkdir(mode=0o500)
    use_streaming(shop, flash_spool_directory=str(folder))
    done = shop.run("flash", "replicate")
    assert done.returncode == 2
    assert str(folder) in done.stderr
    assert "flash_spool_directory" in done.stderr
    assert shop.database.one("SELECT count(*) FROM pg_publication") == 0
