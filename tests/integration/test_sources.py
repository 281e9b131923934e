"""One handler on tables of two databases, each with a replication worker of its own."""

from copy import copy

import pytest

from flash_celery import Insert, LogicalMessage, Update, on_change, on_message
from flash_celery.errors import PublishError
from flash_celery.publishing.brokers.memory import MemoryPublisher

from .conftest import Flash, shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"


@pytest.fixture
def billing(flash, new_database):
    """A replication worker of the source `billing`, with the same app."""
    billing = Flash(new_database(), flash.app, "billing")
    yield billing
    billing.stop()


@pytest.fixture
def both(flash, billing):
    """`handler` is on `items` of either database."""
    for member in (flash, billing):
        member.database.execute(ITEMS)
    flash.handler("items", where={"id__lt": 100})
    on_change("billing:items", "insert|update", fields=["name"])(flash.app.tasks["handler"])
    return flash, billing


def test_handler_receives_both_sources_and_can_distinguish_them(both):
    here, there = (worker.start() for worker in both)
    here.do("INSERT INTO items VALUES (1, 'a'), (100, 'b')", "DELETE FROM items")
    there.do("INSERT INTO items VALUES (1, 'a')", "UPDATE items SET name = 'b'")
    there.do("DELETE FROM items")
    delivered = here.delivered()
    assert {change.source for change in delivered} == {""}
    assert shown(delivered) == ["insert 1,a", "delete 1"]
    insert, update = there.delivered()
    assert {insert.source, update.source} == {"billing"}
    assert (type(insert), type(update)) == (Insert, Update)
    assert (dict(insert.new), dict(update.old)) == ({"name": "a"}, {"name": "a"})
    assert repr(insert) == f"insert billing:public.items id=1 @{insert.commit_lsn}"


class Speechless(MemoryPublisher):
    """A broker that takes messages and is cut off before it says so."""

    def publish(self, messages):
        super().publish(messages)
        raise PublishError("No answer.")


def test_changes_of_sources_repeat_with_equal_ids_after_a_restart(both):
    for change_id in both:
        change_id.publisher = Speechless()
        change_id.start(flash_shutdown_timeout=0.5)
        change_id.database.execute("INSERT INTO items VALUES (7, 'x')")
        change_id.wait(lambda change_id=change_id: change_id.publisher.queues.get("flash"))
        change_id.stop()
    before = [change_id.publisher.queues["flash"][0].headers["id"] for change_id in both]
    ids = [{change.id for change in change_id.delivered()} for change_id in both]
    for change_id in reversed(both):
        change_id.publisher = MemoryPublisher()
        change_id.start().do("SELECT 1")
    assert [change_id.publisher.queues["flash"][0].headers["id"] for change_id in both] == before
    assert [{change.id for change in change_id.delivered()} for change_id in both] == ids
    assert len(set(before)) == 2
    assert [change_id.pop().partition(":")[2] for change_id in ids] == ["0", "0#1"]


def test_sources_have_their_own_publications_slot_and_identities(both):
    here, there = (worker.start() for worker in both)
    names = "SELECT string_agg(pubname, ' ' ORDER BY pubname) FROM pg_publication"
    assert here.database.one(names) == (
        "flash_publication_delete flash_publication_insert "
        "flash_publication_truncate flash_publication_update"
    )
    assert there.database.one(names).split()[1] == "flash_publication_billing_insert"
    published = "SELECT string_agg(pubname, ' ') FROM pg_publication_tables"
    # Deletes have no handler there.
    assert "delete" not in there.database.one(published)


def test_sources_of_one_database_are_independent(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert").handler("second:items", "delete", name="other")
    database = copy(flash.database)
    database.slot += "_2"
    second = Flash(database, flash.app, "second")
    try:
        for worker in (flash, second):
            worker.start()
        for worker in (flash, second):
            worker.do("INSERT INTO items VALUES (1, 'a')", "DELETE FROM items")
        assert shown(flash.delivered()) == ["insert 1,a"] * 2
        assert shown(second.delivered("other")) == ["delete 1"] * 2
        assert flash.delivered("other") == second.delivered() == []
    finally:
        second.stop()


def test_logical_messages_of_a_source_are_delivered(flash, billing):
    @flash.app.task(name="messages", shared=False)
    def handler(message): ...

    on_message("order.paid", source="billing")(on_message("order.paid")(handler))
    for worker in (flash, billing):
        worker.start().do("SELECT pg_logical_emit_message(true, 'order.paid', 'x')")
    (here,), (there,) = flash.delivered("messages"), billing.delivered("messages")
    assert (here.source, there.source) == ("", "billing")
    assert type(there) is LogicalMessage
    assert repr(there) == f"message billing:order.paid @{there.commit_lsn}"
    assert there.id.endswith("m#1")


def test_batch_handler_receives_both_sources(flash, billing):
    for worker in (flash, billing):
        worker.database.execute(ITEMS)
    flash.handler("items", batch=10)
    on_change("billing:items", batch=10)(flash.app.tasks["handler"])
    for worker in (flash, billing):
        worker.start().do("INSERT INTO items SELECT n FROM generate_series(1, 25) n")
    here, there = flash.delivered(), billing.delivered()
    assert [change.source for change in (*here, *there)] == [""] * 25 + ["billing"] * 25
    assert len({change.id for change in (*here, *there)}) == 50
