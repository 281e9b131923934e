"""The example project: its demo, and Django's own command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from example_project.servers import end_with_parent, wait_until

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "example_project"


@pytest.fixture
def folder():
    """Where the demo's servers live; also what their processes are known by."""
    made = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def demo(*arguments, folder):
    return subprocess.Popen(
        [sys.executable, "-m", "example_project.demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "FLASH_FOLDER": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=end_with_parent(signal.SIGKILL),
    )


def nothing_is_left(folder):
    """No file, and no process that was started for this folder."""
    mark = f"FLASH_FOLDER={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert mark not in (process / "environ").read_bytes(), (process / "cmdline").read_text()
        except OSError:
            continue
    return list(folder.iterdir()) == []


def test_demo_ends_by_itself_with_everything_handled(folder):
    process = demo("--once", folder=folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Every change reached its handlers." in output
    for text in ("ORM: ", "Bulk update", "Raw SQL", "send_receipt", "index_products", "ms after"):
        assert text in output
    assert "Traceback" not in output
    assert nothing_is_left(folder)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_leaves_nothing_behind_when_stopped(folder, number):
    process = demo(folder=folder)
    pages = []
    deadline = threading.Timer(120, process.kill)  # ends the output, too
    deadline.start()
    for line in process.stdout:
        if address := re.search(r"The page +(http://127\.0\.0\.1:\d+/)$", line):
            with urllib.request.urlopen(address.group(1), timeout=30) as answer:
                pages.append(answer.read().decode())
        if "Bulk update" in line:
            break
    deadline.cancel()
    (page,) = pages
    assert "No button calls a handler" in page
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGINT else 143), output
    assert "Traceback" not in output
    assert nothing_is_left(folder)


def test_demo_reports_a_port_in_use_before_it_starts(valkey, folder):
    process = demo("--port", str(valkey.port), folder=folder)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"port {valkey.port} is not available; choose another one" in output
    assert "PostgreSQL" not in output
    assert nothing_is_left(folder)


@pytest.fixture
def environment(database, valkey):
    import redis

    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SHOP_DATABASE_URL": database.dsn,
        "SHOP_BROKER_URL": valkey.url,
        "SHOP_CACHE_URL": valkey.url,
    }


def manage(environment, *arguments):
    return subprocess.run(
        [sys.executable, "manage.py", "flash", *arguments],
        cwd=EXAMPLE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_manage_py_has_the_commands_of_celery(environment, database):
    subprocess.run(
        [sys.executable, "manage.py", "migrate"],
        cwd=EXAMPLE,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    helped = manage(environment, "--help")
    assert helped.returncode == 0
    for name in ("replicate", "status", "doctor", "reset", "tail"):
        assert name in helped.stdout
    doctor = manage(environment, "doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "shop.handlers.keep_total on public.shop_orderline" in doctor.stdout
    assert "FULL will be set on public.shop_order, public.shop_orderline" in doctor.stdout
    status = json.loads(manage(environment, "status", "--json").stdout)
    assert {subscription["handler"] for subscription in status["subscriptions"]} == {
        f"shop.handlers.{name}"
        for name in ("audit", "forget_product", "index_products", "keep_total", "send_receipt")
    }
    assert json.loads(manage(environment, "dead", "list", "--json").stdout) == []
    again = manage(environment, "reset", "--yes")
    assert again.returncode == 0
    assert "Nothing to reset" in again.stdout
    wrong = manage(environment, "stats")
    assert wrong.returncode == 2
    assert "No such command 'stats'" in wrong.stderr


def test_example_handlers_settle_without_changes(environment, database, tmp_path):
    """Handlers that write tables others watch must not go round for ever."""
    subprocess.run(
        [sys.executable, "manage.py", "migrate"],
        cwd=EXAMPLE,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    processes = []
    for name in (("worker", "-Q", "flash", "-P", "solo"), ("flash", "replicate")):
        with (tmp_path / name[0]).open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "shop", *name],
                    cwd=EXAMPLE,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    preexec_fn=end_with_parent(signal.SIGKILL),
                )
            )
    try:
        wait_until(lambda: "Replicating" in (tmp_path / "flash").read_text(), "replication")
        database.execute(
            "INSERT INTO shop_customer (name, email) VALUES ('Ada', 'ada@example.com')",
            "INSERT INTO shop_product (name, price) VALUES ('Tea', 4.5)",
            "INSERT INTO shop_order (customer_id, status, total) VALUES (1, 'open', 0)",
            "INSERT INTO shop_orderline (order_id, product_id, quantity, price) "
            "VALUES (1, 1, 2, 4.5)",
        )
        indexed = "SELECT count(*) FROM shop_searchentry WHERE words = 'tea'"
        wait_until(lambda: database.one("SELECT total FROM shop_order") == 9, "the total")
        wait_until(lambda: database.one(indexed) == 1, "the search index")
        wait_until(lambda: database.one("SELECT count(*) FROM shop_auditentry") == 3, "the audit")
        time.sleep(1)
        assert database.one("SELECT count(*) FROM shop_auditentry") == 3
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)
