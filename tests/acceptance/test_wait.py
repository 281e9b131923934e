"""`flash wait`: 0 means that every handler has done everything up to a position."""

from types import SimpleNamespace

import pytest
import redis

from example_project.servers import wait_until
from flash_celery import on_change
from flash_celery.commands import pending_changes
from flash_celery.commands.wait import wait_for
from flash_celery.errors import CatalogError, ConfigurationError, NotDone
from tests.acceptance.steps import insert_rows


def wait(shop, *arguments):
    ran = shop.run("flash", "wait", *arguments)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture
def twin(new_app):
    """The app of the shop's processes, in this one."""

    def make(shop):
        app = new_app("shop", broker_url=shop.broker.url, flash_dsn=shop.database.dsn)
        app.conf.flash_replication_slot = shop.database.slot
        app.conf.flash_routes = {"public.items.delete": {"queue": "cleanup"}}

        @on_change("items")
        @app.task(name="shop.each", shared=False)
        def each(change): ...

        return app

    return make


@pytest.mark.parametrize(
    "any_shop", ["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)], indirect=True
)
def test_wait_returns_when_handlers_are_done(any_shop):
    shop = any_shop
    shop.environment |= {"SHOP_BATCH": "1", "SHOP_SLEEP": "0.05"}
    shop.worker("threads")
    shop.replicate()
    insert_rows(shop.database, 1, 40)
    code, output = wait(shop)
    assert code == 0, output
    assert len(shop.notes()) == len(shop.notes("many")) == 40
    # Nothing is left, and the server is idle.
    code, output = wait(shop, "each")
    assert (code, output[:11]) == (0, "Done up to ")
    code, output = wait(shop, "--lsn", "FFFFFFFF/0", "--timeout", "0")
    assert (code, "Not done up to FFFFFFFF/0: the slot flash_" in output) == (1, True)


@pytest.mark.parametrize(
    "any_shop", ["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)], indirect=True
)
def test_wait_names_waiting_running_and_failed_changes(any_shop, twin, monkeypatch):
    shop, app = any_shop, twin(any_shop)
    with pytest.raises(CatalogError, match="does not exist, so nothing is read"):
        wait_for(app)
    shop.replicate()
    insert_rows(shop.database, 1, 3)
    with pytest.raises(NotDone, match=r"3 messages .*in the queue flash"):
        wait_for(app, timeout=1)
    if shop.broker.url.startswith("redis"):
        strange = {"a": "5", "b": "[]", "c": "{", "d": '[{"headers": 5}]'}
        with redis.Redis.from_url(shop.broker.url) as client:
            client.hset("unacked", mapping=strange)
            with pytest.raises(NotDone, match=r"3 messages for shop\.each in the queue flash"):
                wait_for(app, timeout=0)
            client.delete("unacked")
        with monkeypatch.context() as patch:
            patch.setattr(pending_changes, "_LONG_QUEUE", 2)
            with pytest.raises(NotDone, match=r"3 messages are in the queue flash, the first for"):
                wait_for(app, timeout=0)
    before = shop.database.one("SELECT pg_current_wal_insert_lsn()::text")
    shop.worker("threads")
    shop.until_noted(3)
    shop.database.execute("INSERT INTO items VALUES (4, 'wait')")
    wait_until(shop.notes_file.with_name("notes.wait").exists, "the handler to begin")
    with pytest.raises(NotDone, match=r"shop\.each (with a worker|is active on)"):
        wait_for(app, timeout=1)
    assert str(wait_for(app, before)) == before

    shop.notes_file.with_name("notes.go").touch()
    with pytest.raises(NotDone, match=r"changes for shop\.each have failed for good"):
        wait_for(app)
    wait_for(app, before)
    assert shop.run("flash", "dead", "drop", "--all", "--yes").returncode == 0
    wait_for(app, handlers=["each"])
    assert shop.run("flash", "pause", "each").returncode == 0
    with pytest.raises(NotDone, match=r"shop\.each has been paused since"):
        wait_for(app)


DELAYING = """
from kombu import Exchange, Queue
exchange, quorum = Exchange("held.back", type="topic"), {"x-queue-type": "quorum"}
queue = Queue("flash", exchange, routing_key="flash", queue_arguments=quorum)
app.conf.update(task_queues=[queue], task_default_queue_type="quorum")
"""


@pytest.mark.soak
def test_wait_includes_retries_delayed_by_rabbitmq(make_shop, rabbit):
    """With quorum queues it is neither in the handler's queue nor with a worker."""
    rabbit.empty()
    shop = make_shop(rabbit)
    shop.project = "desk"
    examples = shop.folder / "examples"
    examples.write_text(DELAYING)
    shop.environment["DESK_EXAMPLES"] = str(examples)
    shop.worker("threads", queues="flash")
    shop.replicate()
    shop.database.execute("INSERT INTO items VALUES (1, 'retry', '600')")
    shop.until_noted(1)
    code, output = wait(shop, "each", "--timeout", "5")
    assert (code, "messages are in the queue celery_delayed_" in output) == (1, True), output


def test_wait_refuses_impossible_requests(database, twin):
    app = twin(SimpleNamespace(database=database, broker=SimpleNamespace(url="memory://")))
    with pytest.raises(ConfigurationError, match="'yesterday' is no position in the WAL; write"):
        wait_for(app, "yesterday")
    with pytest.raises(ConfigurationError, match="There is no handler eech"):
        wait_for(app, handlers=["eech"])
