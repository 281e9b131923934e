"""`flash wait`: 0 means that every handler has done everything up to a position."""

import pytest

from example_project.servers import wait_until
from tests.acceptance.test_faults import insert


def wait(shop, *arguments):
    ran = shop.run("flash", "wait", *arguments)
    return ran.returncode, ran.stdout + ran.stderr


def test_it_returns_when_handlers_are_done(any_shop):
    shop = any_shop
    shop.environment |= {"SHOP_BATCH": "1", "SHOP_SLEEP": "0.05"}
    shop.worker("threads")
    shop.replicate()
    insert(shop.database, 1, 40)
    code, said = wait(shop)
    assert code == 0, said
    assert len(shop.notes()) == len(shop.notes("many")) == 40
    # What is handled while it looks, and an idle server.
    code, said = wait(shop, "each")
    assert (code, said[:11]) == (0, "Done up to ")


def test_what_waits_what_runs_and_what_has_failed(shop):
    says_what_is_not_done(shop)


@pytest.mark.soak
def test_what_waits_what_runs_and_what_has_failed_on_rabbitmq(make_shop, rabbit):
    rabbit.empty()
    says_what_is_not_done(make_shop(rabbit))


def says_what_is_not_done(shop):
    code, said = wait(shop)
    assert (code, "does not exist" in said) == (2, True)
    shop.replicate()
    insert(shop.database, 1, 3)
    code, said = wait(shop, "--timeout", "1")
    assert (code, "in the queue flash" in said) == (1, True), said
    assert "3 messages" in said
    before = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")
    shop.worker("threads")
    shop.until_noted(3)
    shop.database.execute("INSERT INTO items VALUES (4, 'wait')")
    wait_until(shop.notes_file.with_name("notes.wait").exists, "the handler to begin")
    code, said = wait(shop, "--timeout", "1")
    assert code == 1, said
    assert "with a worker" in said or "is active on" in said
    assert "shop.each" in said
    assert wait(shop, "--lsn", before) == (0, f"Done up to {before}.\n")

    shop.notes_file.with_name("notes.go").touch()
    code, said = wait(shop)
    assert (code, "have failed for good" in said) == (1, True), said
    assert wait(shop, "--lsn", before)[0] == 0
    assert shop.run("flash", "dead", "drop", "--all", "--yes").returncode == 0
    assert wait(shop)[0] == 0

    assert shop.run("flash", "pause", "each").returncode == 0
    code, said = wait(shop)
    assert (code, "shop.each is paused since" in said) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lsn", "yesterday"], "'yesterday' is no position in the WAL; write one such as"),
        (["eech"], "There is no handler eech"),
        (["--timeout", "-1"], "--timeout"),
    ],
)
def test_what_cannot_be_waited_for(shop, arguments, sentence):
    code, said = wait(shop, *arguments)
    assert (code, sentence in said) == (2, True), said
