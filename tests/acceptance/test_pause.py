"""`flash pause` and `flash resume`: what is held back is neither lost nor overtaken."""

import json
import signal
import subprocess

import pytest
import redis

from example_project.servers import wait_until
from tests.acceptance.steps import (
    broker_failpoints,
    insert_rows,
    replicate_through,
    wait_until_confirmed,
)


def flash(shop, *arguments, code=0):
    ran = shop.run("flash", *arguments)
    assert ran.returncode == code, ran.stderr
    return ran.stdout + ran.stderr


def status(shop):
    return json.loads(flash(shop, "status", "--json"))


def until_noted_as_done(shop):
    noted = "SELECT bool_or(obj_description(oid) ~ '\"resuming\": {}') FROM pg_publication"
    wait_until(lambda: shop.database.one(noted), "it to be noted that what was parked is back")


def numbers(notes):
    return list(dict.fromkeys(note["key"]["id"] for note in notes if note["operation"] == "insert"))


def count_of(shop, *queues):
    with redis.Redis.from_url(shop.broker.url) as client:
        return sum(client.llen(queue) for queue in queues)


@pytest.mark.parametrize(
    "any_shop", [pytest.param("redis", marks=pytest.mark.soak), "rabbitmq"], indirect=True
)
def test_paused_handler_receives_its_changes_later_in_order(any_shop):
    shop = any_shop
    shop.environment |= {"SHOP_BATCH": "1"}
    shop.worker()
    first = shop.replicate()
    insert_rows(shop.database, 1, 5)
    shop.until_noted(5)
    assert "flash.paused.shop.each" in flash(shop, "pause", "each")
    shop.until_said(first, "its changes wait in the queue flash.paused.shop.each")
    insert_rows(shop.database, 6, 30)
    shop.database.execute("DELETE FROM items WHERE id = 7")
    shop.until_noted(30, "many")
    wait_until_confirmed(shop)
    shop.end(first, signal.SIGKILL)
    second = shop.replicate()
    insert_rows(shop.database, 31, 40)
    shop.until_noted(40, "many")
    wait_until_confirmed(shop)
    status = flash(shop, "status")
    assert "shop.each (paused since" in status
    assert "36 held in flash.paused.shop.each" in status
    assert len(shop.notes()) == 5

    insert_rows(shop.database, 41, 50)
    assert "shop.each continues." in flash(shop, "resume", "shop.each")
    shop.until_said(second, "back to their queues")
    insert_rows(shop.database, 51, 60)
    assert numbers(shop.until_noted(61)) == list(range(1, 61))
    assert [note["key"] for note in shop.notes() if note["operation"] == "delete"] == [{"id": 7}]
    until_noted_as_done(shop)
    assert shop.end(second) == 0


@pytest.mark.soak
def test_sigkill_during_a_resume_loses_nothing(any_shop):
    shop = any_shop
    first = shop.replicate()
    flash(shop, "pause", "each")
    shop.until_said(first, "its changes wait")
    insert_rows(shop.database, 1, 100)
    wait_until_confirmed(shop)
    shop.end(first)
    flash(shop, "resume", "each")
    insert_rows(shop.database, 101, 110)
    steps = ("half a push:2", "half a frame:1", "pushed:1", "sent:1", "moved:1", "confirmed:1")
    last = replicate_through(shop, *broker_failpoints(shop, *steps))
    wait_until_confirmed(shop)
    if shop.broker.url.startswith("redis"):
        assert count_of(shop, "flash", "flash.paused.shop.each") == 110
    shop.worker()
    notes = shop.until_noted(110)
    assert numbers(notes) == list(range(1, 111))
    assert len({(note["id"], note["task_id"]) for note in notes}) == 110
    until_noted_as_done(shop)
    assert shop.end(last) == 0


@pytest.mark.soak
def test_paused_source_is_not_read_and_its_worker_stays_up(any_shop):
    shop = any_shop
    shop.worker()
    first = shop.replicate()
    output = flash(shop, "pause")
    assert "max_slot_wal_keep_size" in output
    shop.until_said(first, "Paused since")
    second = shop.replicate(wait=False)
    shop.until_said(second, "waiting until it is free")
    before = shop.database.one("SELECT confirmed_flush_lsn FROM pg_replication_slots")
    insert_rows(shop.database, 1, 20)
    assert "nothing is read until `flash resume`" in flash(shop, "status")
    shop.end(first, signal.SIGKILL)
    shop.until_said(second, "Paused since")
    assert shop.database.one("SELECT confirmed_flush_lsn FROM pg_replication_slots") == before
    assert shop.notes() == []
    assert "Reading continues." in flash(shop, "resume")
    assert "Reading was not paused." in flash(shop, "resume")
    assert numbers(shop.until_noted(20)) == list(range(1, 21))
    assert second.log.read_text().count("Paused since") == 1


@pytest.mark.soak
def test_pause_refuses_unknown_names(shop):
    assert "start `flash replicate` first" in flash(shop, "pause", code=2)
    shop.end(shop.replicate())
    assert "There is no handler eech; there are shop.each" in flash(shop, "pause", "eech", code=2)
    assert "shop.each was not paused" in flash(shop, "resume", "each")
    flash(shop, "pause", "each")
    with redis.Redis.from_url(shop.broker.url) as client:
        client.lpush("flash.paused.shop.each", "a message")
        renamed = shop.run("flash", "resume", "each", SHOP_BATCH="only")
        client.delete("flash.paused.shop.each")
    assert renamed.returncode == 2
    assert "is no longer a handler of this app" in renamed.stderr
    renamed = shop.run("flash", "resume", "each", SHOP_BATCH="only")
    assert "shop.each is no longer a handler; its pause is forgotten" in renamed.stdout
    assert status(shop)["paused_handlers"] == []
    flash(shop, "pause", "each")
    since = status(shop)["paused_handlers"][0]["since"]
    assert f"shop.each has been paused since {since}" in flash(shop, "pause", "each")
    assert "Still paused: shop.each." in flash(shop, "resume")


@pytest.mark.soak
def test_pause_that_the_database_lost_is_resumed(any_shop):
    """It was restored, or the primary lost what a standby had not read."""
    shop = any_shop
    publication = "flash_publication_insert"
    noted = f"SELECT obj_description(oid) FROM pg_publication WHERE pubname = '{publication}'"
    replicate = shop.replicate()
    before = shop.database.one(noted)
    flash(shop, "pause", "each")
    shop.until_said(replicate, "its changes wait")
    insert_rows(shop.database, 1, 30)
    wait_until_confirmed(shop)
    shop.database.execute(f"COMMENT ON PUBLICATION {publication} IS '{before}'")
    shop.until_said(replicate, "shop.each continues")
    findings = flash(shop, "doctor")
    assert "30 messages are held in flash.paused.shop.each, and shop.each is not paused" in findings
    flash(shop, "pause", "each")
    flash(shop, "resume", "each")
    until_noted_as_done(shop)
    shop.worker()
    assert numbers(shop.until_noted(30)) == list(range(1, 31))
    assert "not paused" not in flash(shop, "doctor")


@pytest.mark.soak
def test_reset_requeues_messages_held_during_its_prompt(shop):
    replicate = shop.replicate()
    flash(shop, "pause", "each")
    shop.until_said(replicate, "its changes wait")
    with subprocess.Popen(
        shop.command("flash", "reset", "--force"),
        env=shop.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reset:
        shop.processes.append(reset)
        assert "This will" in reset.stdout.readline()
        insert_rows(shop.database, 1, 30)
        wait_until_confirmed(shop)
        assert "Done." in reset.communicate("y\n", timeout=60)[0]
    assert count_of(shop, "flash.paused.shop.each") == 0
    assert count_of(shop, "flash") == 30


@pytest.mark.soak
def test_reset_requeues_held_messages(any_shop):
    shop = any_shop
    first = shop.replicate()
    flash(shop, "pause", "each")
    shop.until_said(first, "its changes wait")
    insert_rows(shop.database, 1, 30)
    wait_until_confirmed(shop)
    mistaken = shop.worker(queues="flash.paused.shop.each")
    if shop.broker.url.startswith("redis"):
        shop.until_said(mistaken, "this worker has stopped consuming it")
    else:
        shop.until_said(mistaken, "inequivalent arg")
    shop.end(mistaken)
    assert "paused: shop.each, since" in flash(shop, "doctor")
    shop.end(first)
    assert "send 30 messages of the paused handler shop.each" in flash(shop, "reset", "--yes")
    shop.worker()
    # (Redis takes what a worker puts back for the newest one.)
    assert sorted(numbers(shop.until_noted(30))) == list(range(1, 31))
