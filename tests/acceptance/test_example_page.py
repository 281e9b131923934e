"""The shop as its compose file runs it, and its page in a browser."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest
import yaml
from psycopg import sql

from example_project.servers import end_with_parent, free_port, wait_until
from tests import browser
from tests.conftest import Database, missing

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "example_project"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
EVIL = "<img src=x onerror=document.title=1>"


class Shop:
    """The services of the compose file, on a database, a broker and a cache of the test."""

    def __init__(self, database, broker, cache, folder):
        self.database = database
        self.cache = cache
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.children = []
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SHOP_DATABASE_URL": database.dsn,
            "SHOP_BROKER_URL": broker.url,
            "SHOP_CACHE_URL": cache.url,
        }

    def command(self, service):
        words = shlex.split(COMPOSE["services"][service]["command"])
        return [word.replace("0.0.0.0:8000", f"127.0.0.1:{self.port}") for word in words]

    def start(self, service):
        with (self.folder / service).open("w") as log:
            child = subprocess.Popen(
                self.command(service),
                cwd=EXAMPLE,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGKILL),
            )
        self.children.append(child)

    def __enter__(self):
        migrated = subprocess.run(
            self.command("migrate"),
            cwd=EXAMPLE,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert migrated.returncode == 0, migrated.stderr
        for service in ("worker", "replicate", "web"):
            self.start(service)
        wait_until(lambda: "ready." in self.log("worker"), "the worker")
        wait_until(lambda: "Replicating the slot" in self.log("replicate"), "replication")
        wait_until(self.page, "the page of the shop")
        return self

    def __exit__(self, *_):
        for child in reversed(self.children):
            os.killpg(child.pid, signal.SIGTERM)
        for child in self.children:
            child.wait(30)
            assert child.returncode in (0, -signal.SIGTERM)

    def log(self, service):
        return (self.folder / service).read_text()

    def page(self):
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    def last_transaction(self):
        return self.database.one("SELECT pg_current_xact_id()::xid::text::int")

    def events(self, count, after=None):
        """The next events of the stream, with their ids."""
        headers = {"Last-Event-ID": after} if after else {}
        request = urllib.request.Request(f"{self.url}/activity", headers=headers)
        events_read, number = [], None
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            while len(events_read) < count:
                name, _, value = answer.readline().decode().rstrip("\n").partition(": ")
                if name == "id":
                    number = value
                elif name == "data":
                    events_read.append((number, json.loads(value)))
        return events_read


@pytest.fixture(scope="module", params=["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)])
def shop(request, postgres, valkey, tmp_path_factory):
    import redis

    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    broker = valkey
    if request.param == "rabbitmq":
        broker = request.getfixturevalue("rabbit")
        broker.empty()
    database = Database(postgres, f"page_{request.param}")
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database.name)))
    try:
        with Shop(database, broker, valkey, tmp_path_factory.mktemp(request.param)) as running:
            yield running
    finally:
        database.drop()


@pytest.fixture(scope="module")
def chromium():
    if not browser.installed():
        missing("chromium with its driver")
    with browser.browser() as opened:
        yield opened


@pytest.fixture
def driver(chromium):
    """With no page open, and nothing in its log of what another test did."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    return chromium


def test_compose_file_variables_are_read():
    settings = (EXAMPLE / "shop" / "settings.py").read_text()
    for name in COMPOSE["x-app"]["environment"]:
        assert f'"{name}"' in settings
    assert COMPOSE["services"]["postgres"]["command"].endswith("-c wal_level=logical")
    assert COMPOSE["services"]["rabbitmq"]["profiles"] == ["rabbitmq"]
    assert set(COMPOSE["services"]) == {
        *("postgres", "redis", "rabbitmq", "migrate", "worker", "replicate", "web"),
    }


def test_example_readme_has_the_commands_and_variables():
    text = (EXAMPLE / "README.md").read_text()
    lines = [line.strip() for line in text.splitlines()]
    for service in ("migrate", "worker", "replicate", "web"):
        command = COMPOSE["services"][service]["command"]
        assert command.replace("0.0.0.0", "127.0.0.1") in lines
    settings = (EXAMPLE / "shop" / "settings.py").read_text()
    read = set(re.findall(r'environ\.get\(\s*"(SHOP_\w+)"', settings))
    assert set(re.findall(r"^\| `(SHOP_\w+)`", text, re.MULTILINE)) == read
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXAMPLE / target).exists(), target


def test_compose_file_commands_run(shop):
    shop.database.execute(
        "INSERT INTO shop_customer (name, email) VALUES ('Ada', 'ada@example.com')",
        "INSERT INTO shop_order (customer_id, status, total) VALUES (1, 'open', 5)",
    )
    wait_until(lambda: "insert shop_order" in shop.page(), "the audit on the page")
    pay(shop.url)
    wait_until(lambda: "You paid 5.00 for order 1." in shop.log("worker"), "a receipt")


def pay(url):
    """Press the button of the page, without a browser that runs scripts."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        cookie = answer.headers["Set-Cookie"].partition(";")[0]
        token = re.search(r"value=\"?(\w+)", answer.read().decode()).group(1)
    request = urllib.request.Request(f"{url}/pay/1", method="POST")
    request.data = f"csrfmiddlewaretoken={token}".encode()
    request.add_header("Cookie", cookie)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def text(driver, selector):
    """Of an element that may be replaced at any time."""
    script = "return document.querySelector(arguments[0])?.innerText ?? ''"
    return driver.execute_script(script, selector)


def press(shop, driver, selector, *words):
    """Press a button, and wait until the card of a new commit says all of this."""
    before = shop.last_transaction()
    wait_until(
        lambda: driver.execute_script(
            "const found = document.querySelector(arguments[0]); found?.click(); return !!found",
            selector,
        ),
        selector,
    )
    return until_said(driver, before, *words)


def until_said(driver, before, *words):
    def says():
        commit = text(driver, "#feed > .commit")
        number = re.search(r"transaction (\d+)", commit)
        fresh = number and int(number.group(1)) > before
        return commit if fresh and all(word in commit for word in words) else None

    try:
        return wait_until(says, f"a card of {words}")
    except TimeoutError as error:
        raise AssertionError(f"{error}: {text(driver, '#feed')}") from None


def test_page_shows_the_handlers_of_a_payment_without_a_reload(shop, driver):
    browser.show(driver, shop.url)
    wait_until(lambda: text(driver, "#state") == "Live", "the stream")
    driver.execute_script("window.loaded = 'once'")
    feed = press(
        shop,
        driver,
        "#add",
        "ORM",
        'INSERT INTO "shop_order"',
        "keep_total",
        "then keep_total wrote",
    )
    assert "insert shop_orderline" in feed
    feed = press(shop, driver, ".order:first-child [id^=pay-]", "send_receipt", "audit")
    assert "status open → paid" in feed
    assert 'UPDATE "shop_order" SET "status" = \'paid\'' in feed
    assert re.search(r"\d ms\n", feed)
    wait_until(lambda: "paid" in text(driver, ".order:first-child"), "the order to be paid")
    # The keyboard stays where it was.
    driver.execute_script("document.querySelector('.order [id^=more-]').focus()")
    focused = driver.execute_script("return document.activeElement.id")
    press(shop, driver, ".order [id^=more-]", "quantity", "then keep_total wrote")
    assert driver.execute_script("return document.activeElement.id") == focused
    assert driver.execute_script("return window.loaded") == "once"
    assert driver.get_log("browser") == []


def test_page_names_each_way_of_changing_rows(shop, driver):
    browser.show(driver, shop.url, width=390, height=800, dark=True)
    press(shop, driver, "#add", "ORM", "insert shop_order ")
    press(shop, driver, "#pay-all", "Bulk update", "\"status\" = 'open'", "send_receipt")
    press(shop, driver, "#sql-names", "Raw SQL", "forget_product", "index_products")
    press(shop, driver, "#sql-nothing", "Raw SQL", "No handler subscribes to this change.")
    before = shop.last_transaction()
    shop.database.execute(f"UPDATE shop_customer SET name = '{EVIL}' WHERE id = 1")
    until_said(driver, before, "psql, or another program", "audit", f"name {EVIL}")
    wait_until(lambda: EVIL in text(driver, "#orders"), "the name among the orders")
    assert driver.title == "The flash-celery shop"
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    # Neither a script error nor a violation of the policy.
    assert driver.get_log("browser") == []


def test_page_resumes_after_a_reconnect(shop):
    shop.database.execute("UPDATE shop_order SET total = total WHERE id = 1")
    shown = shop.events(4)
    (first, _), *rest = shown
    assert shop.events(3, after=first) == rest
    # An invalid id counts as none.
    assert shop.events(4, after="'") == shown


def test_page_stream_ends_when_its_reader_is_gone(shop, driver):
    import redis

    with redis.Redis(port=shop.cache.port) as client:

        def reading():
            clients = client.client_list()
            return sum(
                connected["cmd"] == "xread" and "b" in connected["flags"] for connected in clients
            )

        browser.show(driver, shop.url)
        wait_until(reading, "the stream of the page")
        driver.get("about:blank")
        wait_until(lambda: reading() == 0, "the end of every stream")


@pytest.mark.soak
def test_page_survives_its_server_and_its_connections(shop, driver):
    import redis

    browser.show(driver, shop.url)
    press(shop, driver, "#add", "ORM", "then keep_total wrote")
    with redis.Redis(port=shop.cache.port) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    press(shop, driver, "#add", "ORM", "then keep_total wrote")
    web = shop.children.pop()
    os.killpg(web.pid, signal.SIGKILL)
    web.wait(30)
    wait_until(lambda: text(driver, "#state") == "Reconnecting", "the page to notice")
    before = shop.last_transaction()
    shop.database.execute("UPDATE shop_order SET total = total + 1 WHERE id = 1")
    shop.start("web")
    until_said(driver, before, "psql, or another program", "audit")
    wait_until(lambda: text(driver, "#state") == "Live", "the page to be live again")
    shown = re.findall(r"transaction \d+", text(driver, "#feed"))
    assert len(shown) == len(set(shown))


def test_page_refuses_requests_from_other_sites(shop):
    def status(path, method):
        request = urllib.request.Request(shop.url + path, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    assert status("/add", "POST") == 403
    assert status("/add", "GET") == 405
    with urllib.request.urlopen(shop.url, timeout=30) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


def test_page_shows_the_lanes_of_the_orders(shop, driver):
    browser.show(driver, shop.url)
    press(shop, driver, "#add", "ORM", "keep_total")
    shop.database.execute("UPDATE shop_order SET total = 0")
    press(shop, driver, "#sql-often", "Raw SQL", "keep_total", "then keep_total wrote")
    wait_until(lambda: "Nothing waits" in text(driver, "#lanes"), "the lanes to be empty")
    wrong = (
        "SELECT count(*) FROM shop_order AS o WHERE total <> (SELECT sum(quantity * price) "
        "FROM shop_orderline WHERE order_id = o.id) AND id > (SELECT max(id) - 3 FROM shop_order)"
    )
    wait_until(lambda: shop.database.one(wrong) == 0, "the totals")
    worker = shop.children[0]
    os.killpg(worker.pid, signal.SIGSTOP)
    try:
        before = shop.last_transaction()
        shop.database.execute("UPDATE shop_orderline SET quantity = quantity + 1")
        assert shop.last_transaction() > before
        wait_until(lambda: re.search(r"\d changes?\b", lanes(shop)), "a lane on the page")
    finally:
        os.killpg(worker.pid, signal.SIGCONT)
    wait_until(lambda: "Nothing waits" in lanes(shop), "the lanes to be empty again")


def lanes(shop):
    """What the page says of them, without a browser."""
    return shop.page().partition('id="lanes"')[2].partition("</ul>")[0]
