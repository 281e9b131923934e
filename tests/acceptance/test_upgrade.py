"""The revision before the last version of the wire format runs beside this one."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from example_project.servers import wait_until
from tests.acceptance.conftest import HERE, Shop
from tests.acceptance.steps import insert_rows, wait_until_confirmed
from tests.processes import LoggedProcess

ROOT = Path(__file__).parents[2]
PAYLOAD = "flash_celery/changes/payload.py"
pytestmark = [
    pytest.mark.soak,
    pytest.mark.parametrize("any_shop", ["redis", "rabbitmq"], indirect=True),
]


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=False).stdout


@pytest.fixture(scope="module")
def revision(tmp_path_factory):
    """A folder with the package of the last revision that wrote version 1."""
    log = git("log", "--format=%H", "-G", "^VERSION = 2$", "--", PAYLOAD)
    archive = git("archive", f"{log.decode().split()[-1]}~", "flash_celery") if log else b""
    if not archive:
        pytest.skip("needs the history of git")
    folder = tmp_path_factory.mktemp("former")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    assert "\nVERSION = 1\n" in (folder / PAYLOAD).read_text()
    return folder


class FormerShop(Shop):
    """The shop with another revision of the package, which is in a folder."""

    def __init__(self, shop, revision):
        folder = shop.folder / "former"
        folder.mkdir()
        super().__init__(shop.database, shop.broker, folder, **shop.environment)
        self.environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT)])
        self.revision = revision

    def start(self, *arguments, **environment):
        # `python -m` imports from the current folder first.
        process = LoggedProcess(
            self.command(*arguments),
            self.folder / f"{len(self.processes)}.log",
            env={**self.environment, **environment},
            cwd=self.revision,
        )
        self.processes.append(process)
        return process


@pytest.fixture
def former(any_shop, revision):
    any_shop.environment |= {"SHOP_BATCH": "1", "SHOP_RETRY": "1"}
    former = FormerShop(any_shop, revision)
    yield former
    former.close()


def old_worker(former):
    return former.worker(options=("-n", "former@%h"))


def test_upgrade_of_the_workers_first_handles_every_change(any_shop, former):
    """A task that a new worker retries may be received by an old one."""
    shop = any_shop
    worker, replicate = old_worker(former), former.replicate()
    insert_rows(shop.database, 1, 100)
    shop.until_noted(100)
    shop.worker()
    insert_rows(shop.database, 101, 500)
    shop.until_noted(500)
    former.end(worker)
    insert_rows(shop.database, 501, 600)
    shop.until_noted(600)
    wait_until_confirmed(shop)
    former.end(replicate)
    shop.replicate()
    insert_rows(shop.database, 601, 700)
    for handler in ("each", "many", "stubborn"):
        notes = shop.until_noted(700, handler)
        assert {note["key"]["id"] for note in notes} == set(range(1, 701))
    wait_until(lambda: len(shop.notes("stubborn")) >= 2100, "the last retries")
    assert "dead letter" not in shop.processes[0].log.read_text()
    assert "dead letter" not in worker.log.read_text()


def test_upgrade_of_the_replication_worker_first_loses_nothing(any_shop, former):
    shop = any_shop
    worker = old_worker(former)
    shop.replicate()
    insert_rows(shop.database, 1, 20)
    said = "has version 2; version 1 is known"
    # 20 tasks of `each`, and a batch of each of the others at least
    wait_until(lambda: worker.log.read_text().count(said) >= 22, "the dead letters")
    former.end(worker)
    shop.worker()
    ran = shop.run("flash", "dead", "retry", "--all")
    assert ran.returncode == 0, ran.stderr
    for handler in ("each", "many", "stubborn"):
        notes = shop.until_noted(20, handler)
        assert {note["key"]["id"] for note in notes} == set(range(1, 21))
