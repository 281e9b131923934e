"""Health, samples and metrics of a worker, and the documents that name them."""

import json
import logging
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from example_project.servers import wait_until
from flash_celery import on_change
from flash_celery.backfill.requests import RequestedBackfill
from flash_celery.cli import flash, logs
from flash_celery.commands import backfill as commands
from flash_celery.commands.status import SlotStatus, StatusReport, more_backfills
from flash_celery.errors import ConfigurationError
from flash_celery.monitoring import health
from flash_celery.monitoring.http_server import HttpServer
from flash_celery.monitoring.metrics import METRICS, Metrics
from flash_celery.monitoring.observer import Observer
from flash_celery.monitoring.samples import Counts, LastHour
from flash_celery.settings import Settings, http_address
from flash_celery.telemetry import CONNECTING, STANDBY, STREAMING, Telemetry, route

DOCS = Path(__file__).parents[2] / "docs"
SLOT = SlotStatus(
    name="flash",
    plugin="pgoutput",
    active=True,
    wal_status="reserved",
    confirmed_lsn="0/5",
    restart_lsn="0/1",
    lag_bytes=0,
    lag_seconds=0.0,
    retained_bytes=5,
    safe_wal_size=None,
    reader=None,
)


@pytest.fixture
def report(observer):
    """Make the report of a worker that streams."""

    def make(slot=SLOT, **more):
        streaming = {"state": STREAMING, "state_since": time.time(), "stuck_seconds": 0.0}
        database = replace(observer.report().database, slot=slot)
        return replace(observer.report(), database=database, **streaming | more)

    return make


def test_health_of_a_streaming_worker_is_ready(report):
    assert health.problems(report()) == []
    assert health.problems(report(slot=None)) == []


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"state": CONNECTING}, "Not reading (connecting)"),
        ({"state": STANDBY}, "another worker reads the slot"),
        ({"broker_failing_since": 1.0}, "The broker has failed for"),
        ({"held_back_since": 1.0}, "synchronized_standby_slots"),
        ({"slot": replace(SLOT, wal_status="unreserved")}, "max_slot_wal_keep_size"),
        ({"slot": replace(SLOT, safe_wal_size=4)}, "more than half"),
    ],
)
def test_health_names_every_problem(report, trouble, said):
    (problem,) = health.problems(report(**trouble))
    assert said in problem


def test_health_shows_each_problem_with_its_error(report):
    errors = [
        {"kind": "NotConfirmed", "message": "No room."},
        {"kind": "ReplicationError", "message": "No server."},
    ]
    problems = health.problems(report(errors=errors, state=CONNECTING, broker_failing_since=1.0))
    assert problems[0].endswith(" No server.")
    assert problems[1].endswith(" No room.")


def test_health_of_a_hot_spare_is_ready_unless_something_is_wrong(report):
    for more, ready in (({}, True), ({"broker_failing_since": 1.0}, False)):
        assert health.is_hot_spare(report(state=STANDBY, **more)) is ready


def test_health_of_a_stuck_loop_is_dead(report):
    limit = health.patience(Settings())
    assert limit == 90
    assert health.is_live(report(stuck_seconds=limit - 1), limit)
    assert not health.is_live(report(stuck_seconds=limit), limit)
    assert health.patience(Settings(flash_status_interval=1)) == 60


def test_rates_cover_a_minute_and_samples_an_hour():
    history = LastHour()
    for place in range(1000):
        counts = Counts(5.0 * place, {"a": 10 * place}, {"b": 5 * place})
        history.add(counts, 1, 2.0, 3)
    assert len(history.samples) == 720
    assert history.samples[-1] == (4995.0, 1, 2.0, 2.0, 1.0, 3)
    received, enqueued = history.rates(Counts(5000.0, {"a": 10_000, "new": 13}, {"b": 5000}))
    assert received == {"a": 2.0, "new": 0.2}
    assert enqueued == {"b": 1.0}


def test_keys_of_status_are_promised(observer):
    """Scripts read `flash status --json` and /status.json, which has the same keys and its own."""
    report = observer.report()
    keys = list(StatusReport(report.project, report.database, report.broker, None).as_json())
    assert keys == [
        *("source", "other_sources", "slot_name", "subscriptions", "carries_tasks"),
        *("slot", "history", "gaps", "paused", "paused_handlers", "backfills"),
        *("more_backfills", "left_out", "refused"),
        *("queues", "max_queue_length", "dead_letters", "broker_error", "lanes"),
        "unhandled",
    ]
    assert list(asdict(SLOT)) == [
        *("name", "plugin", "active", "wal_status", "confirmed_lsn", "restart_lsn", "lag_bytes"),
        *("lag_seconds", "retained_bytes", "safe_wal_size", "reader"),
    ]
    page = list(observer.page())
    assert [key for key in page if key in keys] == keys
    assert page[-5:] == ["live", "problems", "ready", "changes", "enqueued"]


@pytest.fixture
def observer(app):
    app.conf.flash_dsn = "postgresql://x@127.0.0.1:1/x"
    return Observer(app, Settings.from_app(app), [], Telemetry())


def lag(observer, state, behind=None, oldest=None, committed=0.0):
    telemetry = observer.telemetry
    telemetry.state, telemetry.committed = state, committed
    telemetry.unconfirmed = lambda: oldest
    slot = None if behind is None else replace(SLOT, lag_bytes=behind)
    observer._database = replace(observer._database, slot=slot)
    return observer.report().lag_seconds


def test_lag_is_zero_only_if_nothing_is_left(observer):
    ago = time.time() - 100
    assert lag(observer, STREAMING, 0, committed=ago) == 0
    assert lag(observer, STREAMING, 100, oldest=ago) == pytest.approx(100, abs=5)
    assert lag(observer, STREAMING, 1 << 20, committed=ago) == pytest.approx(100, abs=5)
    # PostgreSQL is down, so nothing is known of its objects.
    assert lag(observer, CONNECTING, None, committed=ago) == pytest.approx(100, abs=5)
    assert lag(observer, STREAMING, None) is None
    assert lag(observer, STANDBY, 1 << 20, committed=ago) is None


def test_status_of_an_unreachable_server_shows_no_password(app):
    app.conf.flash_dsn = "postgresql://x:secret@127.0.0.1:1/x"
    app.conf.broker_url = "redis://:secret@127.0.0.1:1/0"
    observer = Observer(app, Settings.from_app(app), [], Telemetry())
    observer._poll_database()
    observer._poll_broker()
    page = observer.page()
    assert "127.0.0.1" in page["database_error"]
    assert "127.0.0.1" in page["broker_error"]
    assert page["dead_letters"]["count"] is None
    text = json.dumps(page) + Metrics(observer.telemetry, observer.report).text().decode()
    assert "secret" not in text
    assert 'flash_broker_up{source="default"} 0.0' in text


def test_backfills_are_reported_until_they_end(observer):
    """One that has paused itself says what to do, and counts as standing still."""
    now = datetime.now(timezone.utc)

    def described(state, error=None, ended_at=None):
        times = now - timedelta(seconds=100), ended_at, now - timedelta(seconds=50)
        counts = 500, 1000, times[0], times[1], times[2], 2, 800
        return commands.as_json(
            RequestedBackfill("b1", "s", "h", "public.t", state, None, *counts, {}, None, error)
        )

    running, paused = described("running"), described("paused")
    failed, done = described("paused", "No."), described("done", ended_at=now)
    assert commands.summary(running) == (
        "public.t for h: running, 800 of about 1,000 rows, 16 rows/s, 12 s left"
    )
    assert commands.summary(done) == "public.t for h: done, 800 rows, 16 rows/s"
    assert done["estimate"] == 800
    assert commands.bar(running, 20) == "800/1,000  16 rows/s"
    assert commands.bar(running, 45) == "public.t  800/1,000  16 rows/s  12 s left"
    assert commands.bar(running, 60) == (
        "public.t  [############---]  800/1,000  16 rows/s  12 s left"
    )
    assert commands.bar(failed, 200).endswith("]  800/1,000  16 rows/s  No.")
    assert [commands.duration(each) for each in (12, 300, 20_000, 1e6)] == [
        *("12 s", "5.0 min", "5.6 h", "11.6 days")
    ]
    assert commands.summary(failed).endswith(", No., then `flash backfill resume b1`")
    idle = [each["idle_seconds"] for each in (running, paused, failed, done)]
    assert idle == [pytest.approx(50, abs=5), None, pytest.approx(50, abs=5), None]
    observer._database = replace(observer._database, backfills=[done, failed])
    many = replace(observer._database, more_backfills={"requested": 9999, "done": 1})
    assert more_backfills(many) == "10,000 more: 9,999 requested, 1 done"
    text = Metrics(observer.telemetry, observer.report).text().decode()
    labels = 'handler="h",source="default"'
    assert f'flash_backfill_rows{{{labels},state="paused",table="public.t"}} 800.0' in text
    assert f'flash_backfill_estimated_rows{{{labels},table="public.t"}} 1000.0' in text
    assert f'flash_backfill_idle_seconds{{{labels},table="public.t"}} 50' in text


def test_metrics_escape_names_in_labels(observer):
    name = 'a"b\\c\nflash_ready 9'
    observer.telemetry.enqueued[route(name, "insert", "handle", "flash")] = 1
    text = Metrics(observer.telemetry, observer.report).text().decode()
    assert r'table="a\"b\\c\nflash_ready 9"' in text
    assert [line for line in text.splitlines() if line.startswith("flash_ready ")] == []


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [
        ("127.0.0.1:9187", "127.0.0.1", 9187),
        ("[::1]:80", "::1", 80),
        ("db.internal:0", "db.internal", 0),
    ],
)
def test_flash_http_is_host_and_port(given, host, port):
    assert http_address(given) == (host, port)


@pytest.mark.parametrize("bad", ["9187", ":9187", "host", "host:", "host:http", "host:70000"])
def test_flash_http_refuses_a_bad_address_in_one_sentence(app, bad):
    app.conf.flash_http = bad
    with pytest.raises(ConfigurationError, match=r"flash_http must be host:port, .*, not '"):
        Settings.from_app(app)


def test_flash_http_refuses_a_bad_host_in_one_sentence(observer):
    with pytest.raises(ConfigurationError, match=r"Cannot listen on flash_http = 'a\.\.b:80'"):
        HttpServer("a..b:80", observer)


def test_json_log_line_is_one_object_with_its_extras():
    formatter = logs.JsonFormatter("billing")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = type(error), error, error.__traceback__
    record = logging.LogRecord("flash", logging.ERROR, "f.py", 1, "%s failed", ("ü\n",), info)
    record.lsn, record.message_ = "0/5", object()
    line = formatter.format(record)
    assert line.isascii()
    assert "\n" not in line
    logged = json.loads(line)
    assert logged["message"] == "ü\n failed"
    assert (logged["level"], logged["source"], logged["lsn"]) == ("error", "billing", "0/5")
    assert logged["exception"].endswith("ValueError: two\nlines")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", logged["time"])


def expressions():
    for group in yaml.safe_load((DOCS / "monitoring/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    board = json.loads((DOCS / "monitoring/grafana.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
FUNCTIONS = {
    "max",
    "min",
    "sum",
    "rate",
    "increase",
    "absent",
    "histogram_quantile",
    "label_values",
    "max_over_time",
}
WORDS = {"by", "or", "and", "on", "unless"}


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_dashboard_and_alerts_use_metrics_and_labels_that_exist(expression):
    labels = {"le", "source", "instance"}
    for name in re.findall(r"\b(?:flash|process)_\w+", re.sub(r'"[^"]*"', "", expression)):
        known = METRICS.get(name.removesuffix("_bucket"))
        assert known or name in PROCESS, name
        labels |= set(known.labels if known else ())
    for matchers in re.findall(r"\{(.*?)\}", expression):
        assert set(re.findall(r"(\w+)=", matchers)) <= labels, expression
    for grouped in re.findall(r"\b(?:by|on) \((.*?)\)", expression):
        assert set(grouped.split(", ")) <= labels, expression
    bare = re.sub(r'"[^"]*"|\{.*?\}|\[.*?\]|\((?:\w+, )*\w+\)', " ", expression)
    words = set(re.findall(r"\b[a-z_]+\b", bare))
    assert words <= FUNCTIONS | WORDS | PROCESS | {f"{n}_bucket" for n in METRICS} | METRICS.keys()


def test_alerts_describe_what_to_do():
    text = (DOCS / "monitoring.md").read_text()
    documented = re.findall(r"^\| `(Flash\w+)` \| .+ \|$", text, re.MULTILINE)
    (group,) = yaml.safe_load((DOCS / "monitoring/alerts.yml").read_text())["groups"]
    assert documented == [rule["alert"] for rule in group["rules"]]
    for rule in group["rules"]:
        assert rule["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize(
    ("library", "command", "extra"),
    [
        ("prometheus_client", ["replicate", "--http", "127.0.0.1:0"], "flash-celery[metrics]"),
        ("rich", ["status", "--watch"], "flash-celery[watch]"),
    ],
)
def test_missing_library_is_named(app, monkeypatch, library, command, extra):
    for name in list(sys.modules):
        if name.split(".")[0] == library or name.startswith(
            ("flash_celery.monitoring", "flash_celery.commands.status_watch")
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    for parent, child in (
        ("flash_celery.commands", "status_watch"),
        ("flash_celery", "monitoring"),
    ):
        monkeypatch.delattr(sys.modules[parent], child, raising=False)
    app.conf.update(
        flash_dsn="postgresql://x@127.0.0.1:1/x", broker_url="memory://", task_always_eager=False
    )

    @on_change("items")
    @app.task
    def handle(change): ...

    ran = CliRunner().invoke(flash, command, obj=SimpleNamespace(app=app))
    assert ran.exit_code == 2, ran.exception
    assert ran.stderr.startswith("Error: ")
    assert f"pip install '{extra}'" in ran.stderr


def test_probes_and_page_report_a_stuck_loop(observer):
    stuck = [0.0]
    observer.telemetry.stuck = lambda: stuck[0]
    observer.telemetry.enter(STREAMING)
    server = HttpServer("127.0.0.1:0", observer)
    server.start()
    try:
        assert urllib.request.urlopen(f"{server.url}live", timeout=30).status == 200
        stuck[0] = 90.0
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(f"{server.url}live", timeout=30)
        with failed.value as answer:
            assert answer.status == 503
            assert json.load(answer) == {"live": False, "stuck_seconds": 90.0}
    finally:
        server.close()


def test_http_server_limits_its_clients(observer):
    server = HttpServer("127.0.0.1:0", observer)
    server.start()
    place = server.server_address[:2]
    try:
        silent = [socket.create_connection(place, timeout=10) for _ in range(16)]
        with socket.create_connection(place, timeout=10) as client:
            client.settimeout(5)
            assert client.recv(1) == b""
        silent.pop().close()

        def answered():
            try:
                return urllib.request.urlopen(f"{server.url}live", timeout=30).status == 200
            except OSError:
                return False

        wait_until(answered, "a place to be free")
        for client in silent:
            client.close()
    finally:
        server.close()


def test_http_server_ends_slow_clients(observer, monkeypatch):
    """Each byte would give them as much time again."""
    monkeypatch.setattr("flash_celery.monitoring.http_server._CLIENT_SECONDS", 1.0)
    server = HttpServer("127.0.0.1:0", observer)
    server.start()
    slow = [socket.create_connection(server.server_address[:2], timeout=10) for _ in range(16)]
    try:

        def answered():
            for client in slow:
                with suppress(OSError):
                    client.send(b"G")
            try:
                return urllib.request.urlopen(f"{server.url}live", timeout=30).status == 200
            except OSError:
                return False

        wait_until(answered, "a place to be free")
    finally:
        for client in slow:
            client.close()
        server.close()
