"""Several databases in one project: a replication worker for each, the same Celery workers."""

import json
import signal

import psycopg
import pytest

from tests.acceptance.steps import assert_refused, created_nothing, publications, slots


@pytest.fixture
def billing(new_database):
    database = new_database()
    database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
    return database


def configured(*databases, **more):
    sources = {name: {"dsn": dsn} for name, dsn in databases}
    return json.dumps({"flash_sources": sources, **more})


@pytest.fixture
def shops(shop, billing):
    """The project of `shop`, with a handler on a table of each of two databases."""
    shop.environment |= {
        "SHOP_ALSO": "billing:items",
        "SHOP_CONF": configured(("billing", billing.dsn), ("unused", "dbname=unused")),
    }
    return shop


def test_sources_feed_the_same_handler(shops, billing):
    shops.worker()
    here, there = shops.replicate(), shops.replicate("--source", "billing")
    shops.database.execute("INSERT INTO items VALUES (1, 'here')")
    billing.execute("INSERT INTO items VALUES (1, 'there')", "DELETE FROM items")
    notes = shops.until_noted(3)
    handled = sorted((note["source"], note["operation"]) for note in notes)
    assert handled == [("", "insert"), ("billing", "delete"), ("billing", "insert")]
    assert len({note["task_id"] for note in notes}) == 3
    assert slots(shops.database) == [shops.database.slot]
    assert slots(billing) == [f"{shops.database.slot}_billing"]
    assert publications(billing)[0] == "flash_publication_billing_delete"
    # Either may be killed without the other.
    shops.end(there, signal.SIGKILL)
    billing.execute("INSERT INTO items VALUES (2, 'later')")
    shops.database.execute("INSERT INTO items VALUES (2, 'later')")
    shops.until_noted(4)
    shops.replicate("--source", "billing")
    assert {note["source"] for note in shops.until_noted(5)[3:]} == {"", "billing"}
    assert shops.end(here) == 0


def test_commands_concern_one_source(shops, billing):
    shops.worker()
    replicate = shops.replicate("--source", "billing")
    billing.execute("INSERT INTO items VALUES (1, 'a')")
    shops.until_noted(1)
    shown = shops.run("flash", "status").stdout
    assert "other sources: billing, unused (flash status --source NAME)" in shown
    assert "does not exist yet" in shown
    status = json.loads(shops.run("flash", "status", "--json", "--source", "billing").stdout)
    assert status["source"] == "billing"
    assert status["slot"]["active"] is True
    assert [subscription["table"] for subscription in status["subscriptions"]] == [
        "billing:public.items"
    ]
    assert "source     billing" in shops.run("flash", "status", "--source", "billing").stdout
    doctor = shops.run("flash", "doctor", "--source", "billing")
    assert doctor.returncode == 0, doctor.stdout
    assert f"slot: {shops.database.slot}_billing exists" in doctor.stdout
    assert "other sources" not in doctor.stdout
    assert "ok       other sources: billing, unused" in shops.run("flash", "doctor").stdout
    shops.end(replicate)
    done = shops.run("flash", "reset", "--yes", "--source", "billing")
    assert done.returncode == 0, done.stderr
    assert created_nothing(billing)
    assert created_nothing(shops.database)


def test_tail_follows_a_source(shops, billing):
    tail = shops.start("flash", "tail", "--limit", "1", "--source", "billing", "billing:items")
    shops.until_said(tail, "Following public.items")
    billing.execute("INSERT INTO items VALUES (1, 'a')")
    assert tail.wait(30) == 0
    assert "insert billing:public.items id=1 @" in tail.log.read_text()
    elsewhere = shops.run("flash", "tail", "billing:items")
    assert elsewhere.returncode == 2
    assert_refused(elsewhere, "billing:items belongs to another source; use --source billing")


NOT_THERE = {
    "biling": "no source 'biling' in flash_sources; did you mean billing",
    "": "no source ''",
}


@pytest.mark.parametrize(
    ("command", "source"),
    [
        *((command, "biling") for command in ("replicate", "status", "doctor", "reset", "tail")),
        ("replicate", ""),
    ],
)
def test_unknown_source_is_named(shops, billing, command, source):
    ended = shops.run("flash", command, "--source", source)
    assert ended.returncode == 2
    assert_refused(ended, NOT_THERE[source])
    assert created_nothing(shops.database)


def test_source_without_a_handler_is_named(shops, billing):
    shops.environment["SHOP_CONF"] = configured(("billing", billing.dsn), ("unused", billing.dsn))
    ended = shops.run("flash", "replicate", "--source", "unused")
    assert ended.returncode == 2
    assert_refused(ended, "No handler names the source unused; declare one with")
    doctor = shops.run("flash", "doctor", "--source", "unused")
    assert doctor.returncode == 1
    assert "STOP     sources: No handler names the source unused" in doctor.stdout
    assert created_nothing(billing)


def test_doctor_names_a_handler_of_an_unknown_source(shops):
    for arguments in ((), ("--source", "billing")):
        doctor = shops.run("flash", "doctor", *arguments, SHOP_BAD="source")
        assert doctor.returncode == 1
        assert "STOP     sources: shop.bad: There is no source 'biling'" in doctor.stdout


def test_source_that_refuses_connections_is_named_as_written(shops, billing):
    dsn = psycopg.conninfo.make_conninfo(billing.dsn, user="nobody", password="s3cret")
    shops.environment["SHOP_CONF"] = configured(("billing", dsn))
    for command in ("replicate", "doctor"):
        ended = shops.run("flash", command, "--source", "billing")
        assert ended.returncode == 2
        assert_refused(ended, r"correct flash_sources\['billing'\]\['dsn'\], or")
        assert "s3cret" not in ended.stderr


def test_wait_for_workers_asks_only_for_handlers_of_its_source(shops, billing):
    shops.environment |= {"SHOP_WHERE": "1", "SHOP_ITEMS": "billing:items", "SHOP_ALSO": ""}
    shops.worker(SHOP_WHERE="")
    replicate = shops.replicate("--wait-for-workers", "--source", "billing")
    assert shops.end(replicate) == 0
    doctor = shops.run("flash", "doctor").stdout
    assert "no running worker knows shop.paid" in doctor


def test_sources_work_without_a_default_database(shops, billing):
    """There need not be one."""
    shops.environment |= {"SHOP_DSN": "", "SHOP_ITEMS": "billing:items", "SHOP_ALSO": ""}
    ended = shops.run("flash", "status")
    assert ended.returncode == 2
    assert_refused(ended, "flash_dsn is not set: .* with --source: billing, unused")
    shops.worker()
    shops.replicate("--source", "billing")
    billing.execute("INSERT INTO items VALUES (1, 'a')")
    assert shops.until_noted(1)[0]["source"] == "billing"
