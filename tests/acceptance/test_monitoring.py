"""The HTTP server of the replication worker, its page in a browser, and its log."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
from dataclasses import fields, replace

import pytest
from rich.console import Console

from example_project.servers import end_with_parent, free_port, wait_until
from flash_celery.commands import status_watch
from flash_celery.commands.status import (
    BrokerStatus,
    DatabaseStatus,
    DeadLetterStatus,
    HandlerStatus,
    PausedHandler,
    ProjectStatus,
    Reader,
    ReplaySlotStatus,
    SlotStatus,
    StatusReport,
)
from tests import browser
from tests.acceptance.steps import http_get
from tests.conftest import missing

EVIL = "<img src=x onerror=document.title=1>"


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def ready(address, query=""):
    status, body, _ = http_get(address, f"/ready{query}")
    reply = json.loads(body)
    assert reply["ready"] is (status == 200)
    return status, reply


def samples(text):
    """Prometheus' lines: name, labels and value."""
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            named, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line).groups()
            pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")
            values.setdefault(named, []).append((dict(pairs), float(value)))
    return values


def test_metrics_count_ten_thousand_rows_and_logs_do_not(shop, address):
    from flash_celery.monitoring.metrics import METRICS

    evil = f'"{EVIL}"'
    shop.database.execute(f"CREATE TABLE {evil} (id int PRIMARY KEY, name text, note text)")
    options = ("--log-json", "--http", address)
    worker = shop.replicate(*options, SHOP_ALSO=evil, SHOP_BATCH="1")
    # Clients that say nothing neither hold it up nor, later, its end.
    idle = [socket.create_connection(address.split(":"), timeout=10) for _ in range(3)]
    shop.database.execute(
        "INSERT INTO items SELECT g, 'x', 'y' FROM generate_series(1, 10000) g",
        *(f"UPDATE items SET name = 'z' WHERE id = {number}" for number in range(1, 51)),
        "TRUNCATE items",
        f"INSERT INTO {evil} VALUES (1)",
    )

    def counted():
        metrics = samples(http_get(address, "/metrics")[1])
        enqueued = metrics["flash_changes_enqueued_total"]
        done = sum(value for _, value in enqueued) == 20_052
        return metrics if done and "flash_slot_active" in metrics else None

    metrics = wait_until(counted, "everything to be counted")
    expected = {
        name if kind != "histogram" else f"{name}_bucket" for name, (kind, *_) in METRICS.items()
    }
    rare = {
        *("flash_changes_unjudged_total", "flash_publish_failures_total"),
        *("flash_slot_safe_bytes", "flash_queue_limit_messages"),
        *("flash_lanes", "flash_lane_changes", "flash_lane_oldest_seconds"),
        *("flash_backfill_rows", "flash_backfill_estimated_rows", "flash_backfill_idle_seconds"),
    }
    assert expected - rare <= metrics.keys()
    for name in metrics.keys() & METRICS.keys():
        assert metrics[name][0][0].keys() == {"source", *METRICS[name].labels}, name
    items = {"source": "default", "table": "public.items"}
    assert ({**items, "operation": "insert"}, 10_000) in metrics["flash_changes_received_total"]
    assert ({**items, "operation": "update"}, 50) in metrics["flash_changes_received_total"]
    assert ({**items, "operation": "truncate"}, 1) in metrics["flash_changes_received_total"]
    many = {**items, "operation": "insert", "handler": "shop.many", "queue": "batches"}
    assert (many, 10_000) in metrics["flash_changes_enqueued_total"]
    (count,) = metrics["flash_enqueue_delay_seconds_count"]
    assert count[1] > 0
    if shutil.which("promtool"):
        text = http_get(address, "/metrics")[1].encode()
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=120
        )
        assert not checked.returncode, checked.stderr

    assert http_get(address, "/live")[0] == 200
    assert ready(address)[0] == 200
    assert http_get(address, "/nothing")[0] == 404
    assert http_get(address, "/status.json", "POST")[0] == 501
    assert http_get(address, "/", "HEAD")[1] == ""
    status = json.loads(http_get(address, "/status.json")[1])
    reported = json.loads(shop.run("flash", "status", "--json").stdout)
    # The others depend on the environment of the process.
    shared_keys = reported.keys() - {"subscriptions", "queues", "unhandled"}
    assert shared_keys <= status.keys()
    assert status["slot"].keys() == reported["slot"].keys()
    if browser.installed():
        _see(address)
    elif os.environ.get("CI"):
        missing("chromium with its driver")
    assert shop.end(worker) == 0
    for client in idle:
        client.close()
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert len(lines) < 10, lines
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    reading = [line for line in lines if line["message"].startswith("Replicating the slot")]
    assert [line["slot"] for line in reading] == [shop.database.slot]
    assert lines[-1]["message"].startswith("Ended")


def _see(address):
    """The page in a browser, which finds nothing to complain of."""
    with browser.browser() as driver:
        for width, dark in ((390, True), (1120, False)):
            browser.show(driver, f"http://{address}/", width=width, dark=dark)
            assert browser.text(driver, "#state") == "Streaming"
            wide = driver.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width
        assert EVIL in browser.text(driver, "#changes").replace("\n", "")
        assert "10,000" in browser.text(driver, "#changes")
        assert "shop.each" in browser.text(driver, "#handlers")
        assert "batches" in browser.text(driver, "#queues")
        assert "reserved" in browser.text(driver, "#slot")
        assert driver.title == "flash-celery"
        assert driver.execute_script("return document.querySelectorAll('.chart .curve').length") > 0
        assert driver.execute_script("return document.querySelectorAll('img').length") == 0
        _see_backfills(driver)
        # Neither a script error nor a violation of the policy.
        assert driver.get_log("browser") == []


def _see_backfills(driver):
    """Those of long names leave room for the rest, and a telephone shows how to go on."""
    one = {
        "handler": "shop.search.update_index",
        "table": "tenant_1.invoices_of_customers",
        "state": "paused",
        "queue": None,
        "seconds_left": None,
        "rows": 3,
        "estimate": 400_000,
        "rows_per_second": 1.0,
        "error": "No.",
        "fix": "flash backfill resume b1",
    }
    for width in (1120, 390):
        browser.resize(driver, width)
        driver.execute_script("show({...shown, backfills: [arguments[0]]})", one)
        assert "paused, No., then `flash backfill resume b1`" in browser.text(driver, "#backfills")
        measure = "return [document.documentElement, document.querySelector('#slot dd')]"
        page, fact = driver.execute_script(f"{measure}.map(one => one.scrollWidth)")
        assert page <= width
        assert fact > 100


def test_probes_of_a_hot_spare_and_without_a_broker_are_live_and_not_ready(shop, address):
    other = f"127.0.0.1:{free_port()}"
    first = shop.replicate("--http", address, SHOP_BROKER="redis://:secret@127.0.0.1:1/0")
    second = shop.replicate("--http", other, wait=False)
    shop.database.execute("INSERT INTO items VALUES (1)")

    def waits():
        status, reply = ready(address)
        return reply if status == 503 and reply["state"] == "streaming" else None

    (reason,) = wait_until(waits, "the broker to be missed")["reasons"]
    assert re.match(r"The broker has failed for \d+ s\. The broker redis://", reason)
    assert "secret" not in http_get(address, "/status.json")[1] + http_get(address, "/metrics")[1]
    assert http_get(address, "/live")[0] == 200
    shop.until_said(second, "is active for PID")
    status, reply = ready(other)
    assert (status, reply["state"]) == (503, "standby")
    assert ready(other, "?standby=ok")[0] == 200
    assert ready(address, "?standby=ok")[0] == 503
    first.kill()
    wait_until(lambda: ready(other)[0] == 200, "the standby to read")
    shop.database.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots "
        f"WHERE slot_name = '{shop.database.slot}'"
    )

    def reconnected():
        ((_, count),) = samples(http_get(other, "/metrics")[1])["flash_reconnections_total"]
        return count == 1 and ready(other)[0] == 200

    wait_until(reconnected, "the stream to begin again")
    (error,) = json.loads(http_get(other, "/status.json")[1])["errors"][:1]
    assert error["solution"]
    assert shop.end(second) == 0


def report_of(reported):
    """Read back what `flash status --json` printed."""
    parts = [
        part(**{field.name: reported[field.name] for field in fields(part)})
        for part in (ProjectStatus, DatabaseStatus, BrokerStatus)
    ]
    project, database, broker = parts
    slot = database.slot and SlotStatus(**database.slot)
    return StatusReport(
        replace(
            project, subscriptions=[HandlerStatus(**handler) for handler in project.subscriptions]
        ),
        replace(
            database,
            slot=slot and replace(slot, reader=slot.reader and Reader(**slot.reader)),
            history=database.history and ReplaySlotStatus(**database.history),
            paused_handlers=[PausedHandler(**handler) for handler in database.paused_handlers],
        ),
        replace(broker, dead_letters=DeadLetterStatus(**broker.dead_letters)),
        reported["unhandled"],
    )


def test_paused_handlers_are_shown(shop, address):
    worker = shop.replicate("--http", address)
    assert shop.run("flash", "pause", "each").returncode == 0
    shop.until_said(worker, "its changes wait in the queue")
    shop.database.execute("INSERT INTO items SELECT g FROM generate_series(1, 30) g")
    assert shop.run("flash", "pause").returncode == 0

    def shown():
        status = json.loads(http_get(address, "/status.json")[1])
        return status if status["paused"] and status["paused_handlers"][0]["parked"] == 30 else None

    status = wait_until(shown, "it to be shown how much is parked")
    assert status["ready"]
    paused = samples(http_get(address, "/metrics")[1])["flash_paused"]
    handlers = {labels["handler"]: value for labels, value in paused}
    assert handlers == {"": 1, "shop.each": 1}
    reported = json.loads(shop.run("flash", "status", "--json").stdout)
    assert list(report_of(reported).as_json().items()) == list(reported.items())
    assert reported["paused_handlers"] == status["paused_handlers"]
    console = Console(file=io.StringIO(), width=200)
    console.print(status_watch.render(report_of(reported), None, ""))
    drawn = console.file.getvalue()
    assert "nothing is read until `flash resume`" in drawn
    assert "30 held in flash.paused.shop.each" in drawn
    if browser.installed():
        with browser.browser() as driver:
            browser.show(driver, f"http://{address}/", width=390, dark=True)
            assert browser.text(driver, "#state") == "Paused"
            problems = browser.text(driver, "#problems")
            assert driver.get_log("browser") == []
        assert "nothing is read until `flash resume`" in problems
        assert (
            "30 held in flash.paused.shop.each. Resume it with `flash resume shop.each`."
            in problems
        )
    elif os.environ.get("CI"):
        missing("chromium with its driver")


def test_port_in_use_creates_nothing(shop):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = shop.run("flash", "replicate", "--http", address, "--log-json")
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    error = f"Cannot listen on flash_http = '{address}': Address already in use; "
    assert json.loads(line)["message"].startswith(error)
    assert not shop.database.one("SELECT count(*) FROM pg_publication")
    assert not shop.database.one(
        "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    )


def read_terminal(screen, seconds=60):
    """Return the next output of a process on a terminal; fail if there is none for so long."""
    ready, _, _ = select.select([screen], [], [], seconds)
    assert ready, f"no output in {seconds} s"
    return os.read(screen, 65536).decode()


def test_status_is_watched_until_ctrl_c(shop):
    shop.database.execute("INSERT INTO items VALUES (1)")
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        shop.command("flash", "status", "--watch", "--interval", "0.1"),
        env={**shop.environment, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=end_with_parent(signal.SIGKILL),
    )
    shop.processes.append(process)
    os.close(terminal)
    shown = ""
    while shown.count("Press Ctrl-C to end") < 2:
        shown += read_terminal(screen)
    assert "does not exist yet" in shown
    assert "shop.each" in shown
    process.send_signal(signal.SIGINT)
    while True:
        try:
            left = read_terminal(screen)
        except OSError:  # it has ended
            break
        shown += left
    os.close(screen)
    assert process.wait(10) == 0
    assert "Traceback" not in shown
    assert "Aborted" not in shown


def test_alerts_fire_when_they_should():
    if shutil.which("promtool") is None:
        missing("promtool (prometheus)")
    subprocess.run(
        ["promtool", "check", "rules", "docs/monitoring/alerts.yml"], check=True, timeout=120
    )
    subprocess.run(
        ["promtool", "test", "rules", "tests/acceptance/alerts.yml"], check=True, timeout=120
    )
