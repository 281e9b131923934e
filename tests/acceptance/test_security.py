"""Secrets stay unsaid, hostile names do no harm, and forged messages are refused."""

import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import product
from pathlib import Path
from urllib.parse import quote

import celery
import psutil
import psycopg
import pytest
from kombu import Connection
from psycopg import sql
from psycopg.conninfo import make_conninfo

from example_project.servers import Postgres, Valkey, wait_until
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.payload import encode
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.dead_letters import letters
from flash_celery.dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing import declared_queues
from flash_celery.publishing.brokers.amqp import AmqpPublisher
from flash_celery.table_name import TableName
from tests.acceptance.steps import created_nothing, psql, publications

ROOT = Path(__file__).parents[2]

# --- Passwords ---------------------------------------------------------------------------------

#: Its ends are looked for in all that is said: so it is found whole, encoded, quoted or cut in two.
PASSWORD = "Zq9open/@:?#%41&= ;'\"\\éXw8shut"
SECRETS = ("Zq9open", "Xw8shut")
ENCODED = quote(PASSWORD, safe="")


@pytest.fixture(scope="module")
def strict():
    """A PostgreSQL and a Redis that ask for other passwords."""
    with Postgres() as server, Valkey(requirepass="right") as broker:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE TABLE items (id int PRIMARY KEY)")
            connection.execute("CREATE ROLE shop LOGIN SUPERUSER PASSWORD 'right'")
        hba = server.data / "pg_hba.conf"
        hba.write_text("host all shop all scram-sha-256\n" + hba.read_text())
        server.stop()
        server.start()
        yield server, broker


def run_all(cases, number):
    """What commands say that run one after another, with a slot of their own."""
    names = {
        "flash_replication_slot": f"leaks_{number}",
        "flash_publication_slot_prefix": f"leaks_{number}",
    }
    cases = [{**case, "conf": {**case["conf"], **names}} for case in cases]
    return subprocess.run(
        [sys.executable, "-m", "tests.acceptance.failures"],
        input=json.dumps(cases),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ).stdout


def test_failing_commands_print_no_password(strict):
    server, redis = strict
    right = make_conninfo(server.dsn(), user="shop", password="right")
    to_server = f"127.0.0.1:{server.port}/postgres"
    dsns = {
        "wrong password": f"postgresql://shop:{ENCODED}@{to_server}",
        "wrong password, key=value": make_conninfo(right, password=PASSWORD),
        "wrong port": f"postgresql://shop:{ENCODED}@127.0.0.1:1/postgres",
        "wrong host": make_conninfo(host="nowhere.invalid", password=PASSWORD, dbname="x"),
        "wrong database": f"postgresql://postgres:{ENCODED}@127.0.0.1:{server.port}/nowhere",
        "TLS": f"postgresql://shop:{ENCODED}@{to_server}?sslmode=verify-full&sslrootcert=/nowhere",
        "no PostgreSQL": f"postgresql://shop:{ENCODED}@127.0.0.1:{redis.port}/p?connect_timeout=2",
        "not encoded": f"postgresql://shop:{PASSWORD}@{to_server}",
        "an @ not encoded": f"postgresql://shop:Zq9open@Xw8shut@{to_server}",
        "a / not encoded": f"postgresql://shop:1/Zq9open@Xw8shut@{to_server}",
        "unknown option": f"postgresql://shop:{ENCODED}@{to_server}?nonsense=1",
        "not quoted": f"host=127.0.0.1 password={PASSWORD} dbname=x",
        "no DSN": f"{PASSWORD}",
    }
    brokers = {
        "down": f"redis://:{ENCODED}@127.0.0.1:1/0",
        "wrong password": f"redis://shop:{ENCODED}@127.0.0.1:{redis.port}/0",
        "TLS": f"rediss://:{ENCODED}@127.0.0.1:{redis.port}/0?ssl_cert_reqs=required",
        "AMQP down": f"amqp://shop:{ENCODED}@127.0.0.1:1//",
        "no AMQP": f"amqp://shop:{ENCODED}@127.0.0.1:{redis.port}//",
        "sentinel": f"sentinel://:{ENCODED}@127.0.0.1:1;sentinel://:{ENCODED}@127.0.0.1:2",
        "not encoded": f"redis://:{PASSWORD}@127.0.0.1:1/0",
        "a / not encoded": f"redis://:1/Zq9open@Xw8shut@127.0.0.1:{redis.port}/0",
        "a / not encoded, AMQP": "amqp://shop:1/Zq9open@Xw8shut@127.0.0.1:1//",
        "unknown transport": f"nonsense://shop:{ENCODED}@127.0.0.1/",
    }
    replicate = ("replicate", "--loglevel", "DEBUG")
    on_database = (replicate, ("status",), ("doctor",), ("doctor", "--sql"), ("reset", "--yes"))
    on_database += (("tail",),)
    on_broker = (replicate, ("doctor",), ("dead", "list"))
    common = {
        "result_backend": f"redis://:{ENCODED}@127.0.0.1:1/1",
        "worker_hijack_root_logger": False,
        # No test waits for the default timeouts.
        "broker_connection_timeout": 1,
        "broker_transport_options": {
            "max_retries": 1,
            "interval_start": 0,
            "interval_max": 0,
            "socket_timeout": 0.5,
            "socket_connect_timeout": 0.5,
            "read_timeout": 0.5,
            "write_timeout": 0.5,
        },
        "flash_shutdown_timeout": 0.1,
    }
    cases = []
    for (why, dsn), command in product(dsns.items(), on_database):
        if why == "no PostgreSQL" and command not in (replicate, ("status",)):
            continue  # each takes two seconds
        conf = {"flash_dsn": dsn, "broker_url": brokers["down"]}
        cases.append((f"{' '.join(command)}, DSN {why}", command, conf))
    for (why, url), command in product(brokers.items(), on_broker):
        conf = {"flash_dsn": right, "broker_url": url}
        cases.append((f"{' '.join(command)}, broker {why}", command, conf))
    for (why, dsn), command in product(dsns.items(), (replicate, ("status",))):
        conf = {"flash_sources": {"billing": {"dsn": dsn}}, "broker_url": brokers["down"]}
        arguments = (*command, "--source", "billing")
        cases.append((f"{' '.join(command)}, source {why}", arguments, conf))
    given = [
        {"name": name, "arguments": arguments, "conf": common | conf, "write": server.dsn()}
        | ({"table": "billing:items"} if "source" in name else {})
        for name, arguments, conf in cases
    ]
    # They wait most of the time.
    with ThreadPoolExecutor(4) as pool:
        output = "".join(pool.map(run_all, (given[number::4] for number in range(4)), range(4)))
    output_by_command = dict(part.split("\n", 1) for part in output.split("=== ")[1:])
    assert output_by_command.keys() == {case["name"] for case in given}, output[-3000:]
    for name, output in output_by_command.items():
        for secret in SECRETS:
            assert secret not in output, f"{name}: {output}"
        assert "Traceback" not in output, f"{name}: {output}"
        # A command that did not fail proves nothing.
        assert re.search("Error: |failed|warning |STOP ", output), f"{name}: {output}"


def test_failing_django_commands_print_no_password(strict):
    server, _ = strict
    dsn = f"postgresql://shop:{ENCODED}@127.0.0.1:{server.port}/postgres"
    for url in (dsn, dsn.replace(str(server.port), "1")):
        ended = subprocess.run(
            [sys.executable, "manage.py", "flash", "status"],
            cwd=ROOT / "example_project",
            env={
                **os.environ,
                "SHOP_DATABASE_URL": url,
                "SHOP_BROKER_URL": f"redis://:{ENCODED}@127.0.0.1:1/0",
                "SHOP_CACHE_URL": "",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("Error: "), ended.stderr
        assert not any(secret in ended.stdout + ended.stderr for secret in SECRETS)


# --- Names and values ---------------------------------------------------------------------------

FORGED = "FORGED CRITICAL everything is lost"
HOSTILE = f"x'\"; DROP TABLE canary; --%s%(a)s{{}}\\\n{FORGED}\r\x1b[2J\x1b]0;t\x07\u202ey"
#: An identifier has 63 bytes at most.
NAMES = ("t\"'; DROP TABLE canary;--", "%s%(a)s{}\\'$$;\t", f"n\n{FORGED}\r\x1b[31m\u202e"[:50])


def hostile(shop, number):
    """A table with such names for all there is, and its name in SQL and as a handler spells it."""
    name, column, kind = (NAMES[(number + place) % 3] for place in range(3))
    table, kind = sql.Identifier("public", name), sql.Identifier(f"k{kind}")
    column = sql.Identifier(column)
    for statement in (
        "CREATE TABLE canary (id int)",
        sql.SQL("CREATE TYPE {} AS ENUM ('a', {})").format(kind, sql.Literal(NAMES[number])),
        sql.SQL(
            "CREATE TABLE {} (id text PRIMARY KEY, name text, note text, {} text, kind {})"
        ).format(table, column, kind),
    ):
        shop.database.execute(statement)
    return table, column, str(TableName("public", name))


def printable(output):
    """Nothing drives a terminal, and no line is forged."""
    for line in output.split("\n"):
        assert line.isprintable(), repr(line)
        assert not line.startswith(FORGED)


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(number, marks=pytest.mark.soak) for number in (1, 2))]
)
def test_hostile_names_and_values_do_no_harm(shop, number):
    table, column, name = hostile(shop, number)
    prefix = NAMES[number][:40]
    shop.environment |= {
        "SHOP_ITEMS": f'"public".{sql.Identifier(NAMES[number]).as_string(None)}',
        "SHOP_CONF": json.dumps({"flash_publication_slot_prefix": prefix, "flash_push_down": True}),
    }
    script = shop.run("flash", "doctor", "--sql")
    assert script.returncode == 0, script.stderr
    assert psql(shop, script.stdout, shop.database.dsn).returncode == 0
    replicate = shop.replicate("--loglevel", "DEBUG")
    worker = shop.worker("solo")
    tail = shop.start("flash", "tail", "--limit", "2")
    shop.until_said(tail, "Following")
    insert = sql.SQL("INSERT INTO {} (id, name, note, {}, kind) VALUES ({}, {}, {}, {}, {})")
    with shop.database.connect() as connection:
        for key, what in ((f"1{HOSTILE}", HOSTILE), (f"2{HOSTILE}", "raise")):
            values = [sql.Literal(value) for value in (key, what, HOSTILE, HOSTILE, NAMES[number])]
            connection.execute(insert.format(table, column, *values))
    (note,) = shop.until_noted(1)
    assert note["new"]["name"] == note["new"]["note"] == HOSTILE
    assert note["new"]["kind"] == NAMES[number]
    box = DeadLetterQueue(celery.Celery(broker=shop.broker.url), "flash.dead")
    (letter,) = wait_until(lambda: box.find(DeadLetterFilter()), "a dead letter")
    assert tail.wait(30) == 0
    output = [process.log.read_text() for process in (replicate, tail)]
    for command in (
        ("status",),
        ("doctor", "--explain"),
        ("dead", "list"),
        ("dead", "show", letter.id),
        ("dead", "list", "--json"),
    ):
        ran = shop.run("flash", *command)
        assert ran.returncode == 0, ran.stderr
        output.append(ran.stdout + ran.stderr)
    shop.end(replicate)
    shop.end(worker)
    ran = shop.run("flash", "reset", "--yes")
    assert ran.returncode == 0, ran.stderr
    for text in (*output, ran.stdout):
        printable(text)
    # A handler's own traceback stands in the worker's log as Python writes it.
    assert FORGED not in re.sub(r"\\n" + FORGED, "", worker.log.read_text())
    assert "\x1b" not in worker.log.read_text()
    assert name
    assert created_nothing(shop.database)
    assert shop.database.one("SELECT count(*) FROM canary") == 0


def test_slot_names_are_restricted(shop):
    ended = shop.run("flash", "replicate", SHOP_SLOT=HOSTILE)
    assert ended.returncode == 2
    printable(ended.stderr)
    assert "must have 1 to 63 of the characters a-z, 0-9 and _" in ended.stderr
    assert publications(shop.database) == []


# --- Forged messages ----------------------------------------------------------------------------

TABLE = Table("public", "items", None, "d", ("id",), (Column("id", 23, "int4", identity=True),))
VALUE = json.loads(
    encode(
        [
            Delivery(
                TABLE, Transaction(Lsn(16), 1, 0), 0, 0, 0, [encode_row("I", 0, None, None, [b"5"])]
            )
        ]
    )
)
EMBEDDED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def body(value=VALUE, kind="flash_celery.change"):
    return json.dumps([[{"__type__": kind, "__value__": value}], {}, EMBEDDED])


HEADERS = {"id": "1", "task": "shop.each", "lang": "py", "retries": 0, "argsrepr": "forged"}
FORGERIES = {
    "another version": (body(VALUE | {"v": 9}), {}),
    "counts": (body(VALUE | {"runs": [[0, 0, 0, 10**12, 0, 0]]}), {}),
    "rows": (body(VALUE | {"rows": "AAAA"}), {}),
    "columns": (body(VALUE | {"tables": [VALUE["tables"][0] | {"columns": []}]}), {}),
    "time": (body(VALUE | {"transactions": [["0/10", 1, 10**18, {}]]}), {}),
    "nothing": (body(None), {}),
    "two as one": (body(VALUE | {"runs": [], "rows": ""}), {}),
    "nested": ("[" * 100_000, {}),
    "no JSON": ("\0", {}),
    "no arguments": ("[]", {}),
    "arguments of another kind": (json.dumps([5, {}, EMBEDDED]), {}),
    "keywords of another kind": (json.dumps([[], 5, EMBEDDED]), {}),
    "a number for a change": (json.dumps([[5], {}, EMBEDDED]), {}),
    "type": (body(kind="nonsense"), {}),
    "retries": (body(VALUE | {"v": 9}), {"retries": "x", "flash_deaths": "y"}),
    "no id": (body(VALUE | {"v": 9}), {"id": None}),
    "an id that is none": (body(), {"id": {"a": 1}}),
    "a long id": (body(VALUE | {"v": 9}), {"id": "é" * 400}),
    "time limit": (body(), {"timelimit": ["x", {}]}),
    "time limits": (body(), {"timelimit": 5}),
    "expires": (body(), {"expires": "x"}),
    "eta": (body(), {"eta": []}),
    "hostile": (body(VALUE | {"v": 9}), {"argsrepr": HOSTILE, "id": HOSTILE[:100]}),
}


def forge(shop, forgeries, content_type="application/json", **properties):
    """Put messages into the handlers' queue, past everything that is ours."""
    with Connection(shop.broker.url) as connection, closing(connection.channel()) as channel:
        queue = celery.Celery(broker=shop.broker.url).amqp.queues["flash"]
        queue(channel).declare()
        for number, (content, headers) in enumerate(forgeries):
            headers = {**HEADERS, "id": f"forged-{number}", **headers}
            message = channel.prepare_message(
                content, None, content_type, properties.get("encoding", "utf-8"), headers, {}
            )
            channel.basic_publish(message, exchange="", routing_key="flash")


def depth(shop):
    with Connection(shop.broker.url) as connection, closing(connection.channel()) as channel:
        if hasattr(channel, "_size"):
            return channel._size("flash")
        return channel.queue_declare("flash", passive=True).message_count


@pytest.mark.parametrize("pool", ["solo", pytest.param("prefork", marks=pytest.mark.soak)])
def test_forged_messages_are_kept_and_stop_no_worker(any_shop, pool):
    shop = any_shop
    forge(shop, FORGERIES.values())
    worker = shop.worker(pool)
    shop.replicate()
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    try:
        shop.until_noted(1)
    except AssertionError:
        raise AssertionError(worker.log.read_text()[-6000:]) from None
    box = DeadLetterQueue(celery.Celery(broker=shop.broker.url), "flash.dead")
    try:
        wait_until(lambda: box.count() >= len(FORGERIES), "a letter for each of them", 30)
    except TimeoutError:
        kept = {letter.id for letter in box.find(DeadLetterFilter())}
        raise AssertionError(f"{kept} {worker.log.read_text()[-6000:]}") from None
    assert worker.poll() is None
    assert shop.end(worker) == 0
    # None is on its way round.
    assert depth(shop) == 0
    assert box.count() == len(FORGERIES)
    assert len(shop.notes()) == 1
    for line in worker.log.read_text().split("\n"):
        assert not line.startswith(FORGED)
    listed = shop.run("flash", "dead", "list")
    assert listed.returncode == 0, listed.stderr
    printable(listed.stdout)
    assert len(listed.stdout.splitlines()) == len(FORGERIES) + 1


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("encoding", ["binary", pytest.param("base64", marks=pytest.mark.soak)])
def test_pickle_is_never_loaded(shop, tmp_path, encoding):
    trap = tmp_path / "unpickled"
    content = pickle.dumps([[Evil(trap)], {}, EMBEDDED], 0).decode("latin-1")
    for kind in ("application/x-python-serialize", "pickle"):
        forge(shop, [(content, {})], kind, encoding="binary")
    worker = shop.worker("solo")
    shop.replicate()
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    shop.until_noted(1)
    box = DeadLetterQueue(celery.Celery(broker=shop.broker.url), "flash.dead")
    wait_until(lambda: box.count() == 2, "their letters")
    assert {letter.error for letter in box.find(DeadLetterFilter())} <= {
        "ContentDisallowed",
        "DecodeError",
    }
    assert shop.run("flash", "dead", "show", box.find(DeadLetterFilter())[0].id).returncode == 0
    assert worker.poll() is None
    assert not trap.exists()


def test_foreign_messages_in_the_dead_letter_queue_stop_no_command(shop):
    strangers = ["no JSON", "{}", json.dumps({"body": "[]", "headers": {}, "properties": {}})]
    import redis

    with redis.Redis(port=shop.broker.port) as client:
        client.lpush("flash.dead", *strangers)
    listed = shop.run("flash", "dead", "list")
    assert listed.returncode == 0, listed.stderr
    assert "3 messages that are not dead letters" in listed.stderr


# --- Sockets, and what is kept ------------------------------------------------------------------


def listening(server):
    """The addresses that a server and its children listen on."""
    process = psutil.Process(server.process.pid)
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a backend comes and goes
            for connection in member.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip


@pytest.mark.parametrize("name", ["postgres", "valkey", "rabbit"])
def test_servers_of_demo_and_tests_listen_on_loopback_only(request, name):
    addresses = set(listening(request.getfixturevalue(name)))
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_dead_letter_that_was_retried_leaves_nothing_behind(rabbit):
    app = celery.Celery(broker=rabbit.url)
    rabbit.empty()
    queue = declared_queues.queue(app, "flash.dead")
    publisher = AmqpPublisher(app)
    message = type("Message", (), {"headers": {"id": "1"}, "properties": {}, "body": b"[]"})
    message.content_type = message.content_encoding = None
    with closing(publisher):
        publisher.open([queue])
        for _ in range(3):
            letter = letters.from_message(
                message, "flash", error="ValueError", text="bad", traceback=""
            )
            publisher.publish([letters.encode(app, letter, "flash.dead")])
        assert publisher._forms == {}
        assert publisher.depth("flash.dead") == 3


def test_doctor_compares_open_transactions_with_open_files(shop):
    few = ["sh", "-c", 'ulimit -n 150; exec "$@"', "sh", *shop.command("flash", "doctor")]
    conf = {"SHOP_CONF": '{"flash_use_streaming": true}'}
    ran = subprocess.run(
        few, env=shop.environment | conf, capture_output=True, text=True, timeout=120
    )
    assert "warning  files: 150 may be open, and up to 210 transactions" in ran.stdout
    ran = subprocess.run(few, env=shop.environment, capture_output=True, text=True, timeout=120)
    assert "files:" not in ran.stdout
