"""`flash status`, `doctor`, `reset`, `tail`, and what bad input gets."""

import json
import re
import signal
import subprocess
import sys

import psycopg
import pytest
from click.testing import CliRunner

from example_project.servers import Postgres, wait_until
from flash_celery.cli import flash
from tests.acceptance.steps import assert_refused, created_nothing, publications, slots


def test_status_shows_the_slot_the_handlers_and_their_queues(shop):
    before = shop.run("flash", "status")
    assert before.returncode == 0, before.stderr
    assert "does not exist yet" in before.stdout
    replicate = shop.replicate()
    shop.database.execute("INSERT INTO items VALUES (1, 'a'), (2, 'b')")

    def enqueued():
        status = json.loads(shop.run("flash", "status", "--json").stdout)
        return (
            status if status["queues"]["flash"] == 2 and not status["slot"]["lag_bytes"] else None
        )

    status = wait_until(enqueued, "two changes in the queue")
    assert status["slot"]["name"] == shop.database.slot
    assert status["slot"]["active"] is True
    assert status["slot"]["wal_status"] == "reserved"
    assert status["slot"]["lag_seconds"] < 60
    assert status["slot"]["reader"]["application_name"] == "flash_celery"
    assert status["subscriptions"] == [
        {
            "handler": "shop.each",
            "table": "public.items",
            "operations": ["insert", "update", "delete", "truncate"],
            "fields": None,
            "queues": ["cleanup", "flash"],
        }
    ]
    assert status["unhandled"] is None
    shown = shop.run("flash", "status").stdout
    assert "no Celery worker answers" in shown
    for text in (shop.database.slot, "read by    PID", "flash  2 waiting", "shop.each", "of WAL"):
        assert text in shown
    shop.end(replicate)
    shop.database.execute("INSERT INTO items VALUES (3, 'c')")
    status = json.loads(shop.run("flash", "status", "--json").stdout)
    assert status["slot"]["active"] is False
    assert status["slot"]["lag_bytes"] > 0


def test_status_and_doctor_work_without_a_broker(shop):
    gone = {"SHOP_BROKER": "redis://127.0.0.1:1/0"}
    status = shop.run("flash", "status", **gone)
    assert status.returncode == 0
    assert "flash  unknown" in status.stdout
    doctor = shop.run("flash", "doctor", **gone)
    assert doctor.returncode == 0
    assert re.search("warning  broker: The broker redis://127.0.0.1:1.* failed", doctor.stdout)


def test_doctor_passes_a_correct_setup(shop):
    shop.worker()
    shop.replicate()
    doctor = shop.run("flash", "doctor", "--explain")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "\npublic.items\n  PostgreSQL       sends each insert\n" in doctor.stdout
    assert "  the worker       shop.each: passes rows on unchanged\n" in doctor.stdout
    for text in (
        "ok       server: PostgreSQL",
        "ok       wal_level: logical",
        "ok       role: postgres may replicate",
        f"ok       slot: {shop.database.slot} exists",
        "ok       shop.each on public.items",
        "ok       publications: as required",
        "ok       replication connection: works",
        "ok       broker durability: appendonly, appendfsync always",
        "warning  max_slot_wal_keep_size",
        "ok       visibility_timeout: a task whose worker was killed comes back after 3600 s",
        "ok       workers: they know every handler",
    ):
        assert text in doctor.stdout, doctor.stdout


def test_doctor_names_a_queue_that_no_worker_consumes(shop):
    shop.until_said(shop.worker(queues="celery,cleanup", options=["-l", "INFO"]), "ready.")
    doctor = shop.run("flash", "doctor")
    assert re.findall("(.*) workers: (.*)", doctor.stdout) == [
        ("ok      ", "they know every handler"),
        ("warning ", "no worker that answers consumes flash, so changes wait there; add it to -Q"),
    ]


def test_doctor_checks_the_spool_directory(shop):
    doctor = shop.run("flash", "doctor", SHOP_CONF='{"flash_use_streaming": true}')
    assert re.search(r"(ok     |warning)  spool: /", doctor.stdout)


def test_doctor_names_problems_and_their_fixes(shop):
    shop.database.execute("ALTER TABLE items RENAME TO goods")
    doctor = shop.run("flash", "doctor")
    assert doctor.returncode == 1
    assert "STOP     shop.each on public.items: shop.each: there is no table" in doctor.stdout
    assert "warning  workers: no Celery worker answers" in doctor.stdout
    assert created_nothing(shop.database)


def test_reset_shows_its_steps_asks_and_undoes_everything(shop):
    shop.environment["SHOP_WHERE"] = "1"
    replicate = shop.replicate()
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    record = (
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication "
        "WHERE pubname = 'flash_publication_insert'"
    )
    before = shop.database.one(record)
    in_use = shop.run("flash", "reset", "--yes")
    assert in_use.returncode == 2
    assert "is being read by PID" in in_use.stderr
    assert shop.database.one(record) == before
    shop.end(replicate)
    shop.database.execute("INSERT INTO items VALUES (2, 'a')")
    command = shop.command("flash", "reset")
    reset = subprocess.run(
        command, env=shop.environment, capture_output=True, text=True, input="n\n", timeout=60
    )
    assert reset.returncode == 1
    assert re.search(r"[\d.]+ (bytes|kB|MB) of WAL after", reset.stdout)
    assert 'ALTER TABLE ONLY "public"."items" REPLICA IDENTITY DEFAULT' in reset.stdout
    assert slots(shop.database) == [shop.database.slot]
    done = shop.run("flash", "reset", "--yes")
    assert done.returncode == 0, done.stderr
    assert created_nothing(shop.database)
    assert shop.database.one("SELECT relreplident FROM pg_class WHERE relname = 'items'") == "d"
    again = shop.run("flash", "reset", "--yes")
    assert again.returncode == 0
    assert "Nothing to reset" in again.stdout


def test_reset_force_ends_the_replication_worker(shop):
    replicate = shop.replicate()
    done = shop.run("flash", "reset", "--yes", "--force")
    assert done.returncode == 0, done.stderr
    assert created_nothing(shop.database)
    assert replicate.wait(30) == 2
    assert "was dropped while it was read" in replicate.log.read_text()
    assert created_nothing(shop.database)


def test_reset_of_another_slot_keeps_the_publications(shop):
    # Whose they are is no assertion, which Python leaves out here.
    shop.environment["PYTHONOPTIMIZE"] = "2"
    shop.end(shop.replicate())
    name = f"{shop.database.slot}_old"
    shop.database.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
    done = shop.run("flash", "reset", "--yes", "--slot", name)
    assert done.returncode == 0, done.stderr
    assert "leave the publications" in done.stdout
    assert slots(shop.database) == [shop.database.slot]
    assert len(publications(shop.database)) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_tail_prints_changes_and_leaves_nothing_behind(shop, number):
    shop.database.execute("CREATE TABLE logs (line text)")
    tail = shop.start("flash", "tail", "items", "logs")
    shop.until_said(tail, "Following public.items, public.logs")
    shop.database.execute(
        "INSERT INTO items VALUES (1, 'a', NULL)",
        "UPDATE items SET name = 'b'",
        "DELETE FROM items",
        "TRUNCATE items",
        "INSERT INTO logs VALUES ('x')",
        "UPDATE logs SET line = 'y'",
        "DELETE FROM logs",
    )
    shop.until_said(tail, "insert public.logs")
    output = tail.log.read_text()
    assert "insert public.items id=1 @" in output
    assert "id=1, name='a', note=None" in output
    assert "update public.items id=1 @" in output
    assert "delete public.items id=1 @" in output
    assert "truncate public.items @" in output
    assert re.fullmatch(r"\['flash_tail_\d+'\]", str(slots(shop.database)))
    assert shop.end(tail, number) == 0
    wait_until(lambda: created_nothing(shop.database), "the slot to end")


def test_tail_ends_at_its_limit_and_cleans_up_after_a_killed_tail(shop):
    killed = shop.start("flash", "tail")
    shop.until_said(killed, "Following public.items")
    shop.end(killed, signal.SIGKILL)
    wait_until(lambda: not slots(shop.database), "the slot to end")
    tail = shop.start("flash", "tail", "--limit", "2")
    shop.until_said(tail, "Following public.items")
    shop.database.execute("INSERT INTO items VALUES (1, 'a'), (2, 'b'), (3, 'c')")
    assert tail.wait(30) == 0
    assert tail.log.read_text().count("insert public.items") == 2
    wait_until(lambda: created_nothing(shop.database), "the slot to end")


BAD = {
    "no dsn": ({"SHOP_DSN": ""}, "flash_dsn is not set"),
    "bad dsn": ({"SHOP_DSN": "nonsense"}, "flash_dsn is not a connection string"),
    "setting": (
        {"SHOP_CONF": '{"flash_dns": "x"}'},
        "no setting flash_dns; did you mean flash_dsn",
    ),
    "where": ({"SHOP_BAD": "where"}, "shop.bad: .*no lookup __gte_"),
    "operation": ({"SHOP_BAD": "operation"}, "no operation 'upsert'"),
    "table": ({"SHOP_BAD": "table"}, "shop.bad: there is no table public.item .*public.items"),
    "column": ({"SHOP_BAD": "column"}, "shop.bad: public.items has no column nam; .* name"),
    "contradiction": ({"SHOP_BAD": "contradiction"}, "shop.bad is declared twice, .* batch="),
    "serializer": ({"SHOP_BAD": "serializer"}, "shop.bad has serializer='pickle'"),
    "sources that are no dicts": (
        {"SHOP_CONF": '{"flash_sources": {"billing": "dbname=b"}}'},
        r"flash_sources\['billing'\] must be a dict",
    ),
    "a source without a dsn": (
        {"SHOP_CONF": '{"flash_sources": {"billing": {"dns": "dbname=b"}}}'},
        "'billing'.* has no key 'dns'; did you mean dsn",
    ),
    "a handler of no source": (
        {"SHOP_BAD": "source", "SHOP_CONF": '{"flash_sources": {"billing": {"dsn": "dbname=b"}}}'},
        "shop.bad: There is no source 'biling' in flash_sources; did you mean billing",
    ),
    "a handler of two sources": ({"SHOP_BAD": "sources"}, "shop.bad: .*'billing', .*'shipping'"),
    "no handler of the default source": (
        {
            "SHOP_ITEMS": "billing:items",
            "SHOP_CONF": '{"flash_sources": {"billing": {"dsn": "dbname=b"}}}',
        },
        "choose by --source: billing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_gets_one_sentence_and_creates_nothing(shop, case):
    environment, message = BAD[case]
    ended = shop.run("flash", "replicate", **environment)
    assert ended.returncode == 2, ended.stderr
    assert_refused(ended, message)
    assert created_nothing(shop.database)


@pytest.mark.parametrize("command", ["replicate", "status", "doctor", "reset", "tail"])
def test_wrong_database_is_refused_by_every_command(shop, command):
    for change, message in (
        ({"dbname": "nowhere"}, 'database "nowhere" does not exist'),
        ({"user": "nobody"}, 'role "nobody" does not exist'),
    ):
        dsn = psycopg.conninfo.make_conninfo(shop.database.dsn, password="s3cret", **change)
        ended = shop.run("flash", command, SHOP_DSN=dsn)
        assert ended.returncode == 2, ended.stderr
        assert_refused(ended, message)
        assert "s3cret" not in ended.stderr + ended.stdout
    assert created_nothing(shop.database)


def test_commands_without_an_app_are_refused(shop):
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "flash", "status"],
        env=shop.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert_refused(ended, "celery -A your_project flash")


@pytest.fixture(scope="module")
def strict():
    """A server with a password, one slot, and no logical decoding at first."""
    with Postgres(wal_level="replica", max_replication_slots=1) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
            connection.execute("CREATE ROLE shop LOGIN SUPERUSER PASSWORD 'right'")
            connection.execute("CREATE ROLE weak LOGIN")
        hba = server.data / "pg_hba.conf"
        hba.write_text("host all shop all scram-sha-256\n" + hba.read_text())
        server.stop()
        server.start()
        yield server


def strictly(server, **change):
    return psycopg.conninfo.make_conninfo(server.dsn(), **change)


def test_replicate_names_wal_level_password_and_privilege_problems(shop, strict):
    # From 19 on `replica` suffices: test_wal_level.py.
    with psycopg.connect(strict.dsn()) as connection:
        sufficient = connection.info.server_version >= 190000
    for dsn, message in (
        *(
            []
            if sufficient
            else [(strictly(strict), "wal_level is replica.*ALTER SYSTEM SET wal_level")]
        ),
        (strictly(strict, user="shop", password="s3cret"), "password authentication failed"),
        (strictly(strict, user="shop"), "no password supplied"),
    ):
        ended = shop.run("flash", "replicate", SHOP_DSN=dsn)
        assert ended.returncode == 2
        assert_refused(ended, message)
        assert "s3cret" not in ended.stderr
    doctor = shop.run("flash", "doctor", SHOP_DSN=strictly(strict, user="weak"))
    assert doctor.returncode == 1
    assert 'STOP     role: The role weak may not replicate: ALTER ROLE "weak"' in doctor.stdout
    assert ("STOP     wal_level" in doctor.stdout) != sufficient
    assert "STOP     replication connection" in doctor.stdout
    weak = shop.run("flash", "replicate", SHOP_DSN=strictly(strict, user="weak"))
    assert weak.returncode == 2


def test_replicate_names_a_missing_free_slot(shop, strict):
    strict.stop()
    strict.options["wal_level"] = "logical"
    strict.start()
    with psycopg.connect(strict.dsn(), autocommit=True) as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('taken')")
    ended = shop.run("flash", "replicate", SHOP_DSN=strict.dsn())
    assert ended.returncode == 2
    assert_refused(ended, "All 1 of max_replication_slots are in use")
    with psycopg.connect(strict.dsn()) as connection:
        assert connection.execute("SELECT count(*) FROM pg_publication").fetchone() == (0,)


def test_slot_of_another_plugin_or_database_is_refused(shop, postgres):
    with psycopg.connect(postgres.dsn(), autocommit=True) as elsewhere:
        name = shop.database.slot
        elsewhere.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
        try:
            ended = shop.run("flash", "replicate")
            assert ended.returncode == 2
            assert_refused(ended, f"{name} is a slot of the database postgres")
        finally:
            elsewhere.execute(f"SELECT pg_drop_replication_slot('{name}')")
    assert created_nothing(shop.database)
    shop.database.execute(f"SELECT pg_create_physical_replication_slot('{name}')")
    try:
        ended = shop.run("flash", "replicate")
        assert ended.returncode == 2
        assert_refused(ended, f"{name} is a physical slot")
    finally:
        shop.database.execute(f"SELECT pg_drop_replication_slot('{name}')")
    assert created_nothing(shop.database)


@pytest.mark.parametrize("command", ["replicate", "doctor"])
def test_pooler_is_named(shop, pooler, command):
    dsn = psycopg.conninfo.make_conninfo(shop.database.dsn, port=pooler)
    ended = shop.run("flash", command, SHOP_DSN=dsn)
    assert ended.returncode == 2, ended.stdout
    assert_refused(ended, "this is a pooler: flash_dsn must lead to PostgreSQL itself")
    assert created_nothing(shop.database)


def test_publication_altered_by_hand_is_named(shop):
    shop.end(shop.replicate())
    shop.database.execute(
        "CREATE TABLE other (id int)",
        "ALTER PUBLICATION flash_publication_insert ADD TABLE other",
    )
    ended = shop.run("flash", "replicate")
    assert ended.returncode == 2
    sentence = "flash_publication_insert was altered by hand: it also has public.other; undo that"
    assert_refused(ended, sentence)
    shop.database.execute("ALTER PUBLICATION flash_publication_insert DROP TABLE other, items")
    ended = shop.run("flash", "replicate")
    assert_refused(ended, "was altered by hand: it lacks public.items; undo that")


def test_dropped_slot_is_not_recreated_silently(shop):
    shop.end(shop.replicate())
    shop.database.execute(f"SELECT pg_drop_replication_slot('{shop.database.slot}')")
    ended = shop.run("flash", "replicate")
    assert ended.returncode == 2
    assert_refused(ended, "existed and is gone")
    assert slots(shop.database) == []
    assert shop.run("flash", "reset", "--yes").returncode == 0
    shop.end(shop.replicate())


def test_dsn_to_another_service_is_retried(shop, valkey):
    replicate = shop.replicate(wait=False, SHOP_DSN=f"host=127.0.0.1 port={valkey.port} dbname=x")
    shop.until_said(replicate, "The connection to PostgreSQL failed")
    assert shop.end(replicate) == 0


def test_help_names_every_command(shop):
    shown = shop.run("flash", "--help").stdout
    for command in ("replicate", "status", "doctor", "reset", "tail", "dead"):
        assert command in shown
        assert "Options:" in CliRunner().invoke(flash, [command, "--help"]).output
