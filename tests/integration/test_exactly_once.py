"""On Redis a crash between publishing and acknowledging enqueues nothing twice, and nothing that
was restored, recreated or altered makes it omit a change."""

import json
import logging
import shutil
import signal
import threading
from contextlib import contextmanager, suppress

import pytest
import redis
from celery import Celery

from example_project.servers import Postgres, Valkey, wait_until
from flash_celery import Batch
from flash_celery.changes import payload
from flash_celery.errors import TakenOver
from flash_celery.messages.deduplication import Lease
from flash_celery.messages.task_message import Form, Message
from flash_celery.postgres.source import Source
from flash_celery.provisioning import advisory_lock
from flash_celery.publishing.brokers import redis_position
from flash_celery.publishing.brokers.redis import RedisPublisher
from flash_celery.publishing.brokers.redis_position import RedisPosition
from flash_celery.settings import Settings

from .conftest import Flash

COMMENT = (
    "SELECT obj_description(oid, 'pg_publication') FROM pg_publication "
    "WHERE pubname = 'flash_publication_insert'"
)

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"


class Crash(Exception):
    """The process ends here; nothing is acknowledged."""


class Dying(RedisPublisher):
    """Ends its process when it has pushed so many messages."""

    def __init__(self, app, after):
        super().__init__(app)
        self.after = after

    def publish(self, messages):
        super().publish(messages)
        self.after -= len(messages)
        if self.after <= 0:
            raise Crash


def delivered(valkey, queue="flash", handler="handler"):
    """The changes in a queue, the first one first, taken out."""
    with redis.Redis(port=valkey.port) as client:
        changes = []
        for raw in client.rpop(queue, 100_000) or []:
            message = json.loads(raw)
            if message["headers"]["task"] == handler:
                changes += payload.decode(json.loads(message["body"])[0][0]["__value__"])
        return changes


def ids(changes):
    return [(change.new if hasattr(change, "new") else change.old)["id"] for change in changes]


class FlashOnRedis(Flash):
    """A replication worker in this process that publishes to Redis."""

    def __init__(self, database, app, valkey):
        super().__init__(database, app)
        self.valkey = valkey
        app.conf.broker_url = valkey.url


@pytest.fixture
def on_redis(database, new_app, valkey):
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
    database.execute(ITEMS)
    flash = FlashOnRedis(database, new_app(), valkey)
    yield flash
    flash.stop()


def crash(flash, *statements, after=1):
    """Enqueue what the statements do, and die before it is acknowledged."""
    flash.publisher = Dying(flash.app, after)
    with suppress(Crash):  # of what an earlier one left
        flash.start()
    flash.database.execute(*statements)
    flash.thread.join(20)
    assert isinstance(flash.error, Crash), flash.error
    flash.error = None


def again(flash, *statements):
    """Another process goes on."""
    flash.publisher = RedisPublisher(flash.app)
    flash.start()
    flash.do(*statements or ["SELECT 1"])
    flash.stop()
    return delivered(flash.valkey)


def test_crash_before_the_acknowledgement_enqueues_nothing_twice(on_redis):
    on_redis.handler("items")
    crash(
        on_redis,
        "INSERT INTO items SELECT n, 'a' FROM generate_series(1, 3) AS n",
        after=3,
    )
    changes = again(on_redis, "UPDATE items SET name = 'b' WHERE id = 1")
    assert ids(changes) == [1, 2, 3, 1]
    assert len({change.id for change in changes}) == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"batch": 400}, {"batch": Batch(400, transaction=True)}],
    ids=["each", "batched", "in parts"],
)
def test_crash_within_a_transaction_enqueues_nothing_twice(on_redis, options):
    on_redis.handler("items", **options)
    rows = 20_000
    crash(on_redis, f"INSERT INTO items SELECT n, 'a' FROM generate_series(1, {rows}) AS n")
    with redis.Redis(port=on_redis.valkey.port) as client:
        before = client.llen("flash")
    assert 0 < before < rows
    assert ids(again(on_redis)) == list(range(1, rows + 1))


def test_repeated_crashes_enqueue_nothing_twice(on_redis):
    on_redis.handler("items").handler("items", "insert", name="other", queue="other", batch=7)
    statement = "INSERT INTO items SELECT n, 'a' FROM generate_series({}, {}) AS n"
    for number in range(4):
        crash(on_redis, statement.format(number * 10 + 1, number * 10 + 10))
    assert ids(again(on_redis)) == list(range(1, 41))
    assert ids(delivered(on_redis.valkey, "other", "other")) == list(range(1, 41))


def test_crash_between_the_parts_of_a_key_change_enqueues_nothing_twice(on_redis):
    on_redis.handler("items", "insert|delete", key=["name"])
    on_redis.database.execute("INSERT INTO items VALUES (1, 'a')")
    crash(on_redis, "UPDATE items SET name = 'b'", after=1)
    changes = again(on_redis)
    assert [change.operation.names()[0] for change in changes] == ["delete", "insert"]


def test_lost_reply_enqueues_nothing_twice(on_redis, monkeypatch):
    """Redis has done it, and the connection is gone: it is asked before anything is sent again."""
    step, lost = RedisPosition.compare_and_set, []

    def cut(self, client, commands):
        result = step(self, client, commands)
        if len(commands) > 1 and len(lost) < 3:  # not the one that forgets an older session's
            lost.append(result)
            raise redis.ConnectionError("the reply is lost")
        return result

    on_redis.handler("items")
    monkeypatch.setattr(RedisPosition, "compare_and_set", cut)
    on_redis.publisher = RedisPublisher(on_redis.app)
    on_redis.start()
    for number in range(1, 6):  # each is pushed by itself
        on_redis.do(f"INSERT INTO items VALUES ({number}, 'a')")
    on_redis.stop()
    assert ids(delivered(on_redis.valkey)) == [1, 2, 3, 4, 5]
    assert len(lost) == 3


def test_failed_command_in_a_transaction_enqueues_nothing(on_redis):
    """The position does not move, and the other handler's message is not there either."""
    on_redis.handler("items").handler("items", name="other", queue="other")
    on_redis.publisher = RedisPublisher(on_redis.app)
    on_redis.start(flash_shutdown_timeout=0.5).do("SELECT 1")
    with redis.Redis(port=on_redis.valkey.port) as client:
        client.set("other", "not a list")
        client.config_resetstat()
        on_redis.database.execute("INSERT INTO items VALUES (1, 'a')")
        wait_until(lambda: client.info("errorstats").get("errorstat_WRONGTYPE"), "an attempt")
        on_redis.stop()
        assert not client.llen("flash")
        client.delete("other")
    assert ids(again(on_redis)) == [1]
    assert ids(delivered(on_redis.valkey, "other", "other")) == [1]


def test_changed_handler_receives_the_whole_transaction_again(on_redis):
    on_redis.handler("items")
    crash(on_redis, "INSERT INTO items VALUES (1, 'a'), (2, 'b')", after=2)
    on_redis.handler("items", name="other")
    assert ids(again(on_redis)) == [1, 2, 1, 2]


def test_changed_publication_delivers_the_whole_transaction_again(on_redis):
    if int(on_redis.database.one("SHOW server_version_num")) < 150000:
        pytest.skip("PostgreSQL filters from 15 on")
    on_redis.handler("items", "insert", where={"id__gt": 1})
    crash(on_redis, "INSERT INTO items VALUES (1, 'a'), (2, 'b'), (3, 'c')", after=2)
    # PostgreSQL leaves out the first row from here on, so that rows count otherwise.
    on_redis.app.conf.flash_push_down = True
    assert ids(again(on_redis)) == [2, 3, 2, 3]


def test_recreated_slot_omits_nothing(on_redis):
    on_redis.handler("items")
    crash(on_redis, "INSERT INTO items VALUES (1, 'a')")
    slot = on_redis.database.slot
    drop = f"SELECT pg_drop_replication_slot('{slot}')"
    on_redis.database.execute(
        *(f"DROP PUBLICATION flash_publication_{name}" for name in OPERATIONS), drop
    )
    delivered(on_redis.valkey)
    assert ids(again(on_redis, "INSERT INTO items VALUES (2, 'b')")) == [2]


OPERATIONS = ("insert", "update", "delete", "truncate")


def test_restored_redis_omits_nothing(on_redis):
    """It forgets the messages together with the position."""
    with Valkey() as own:
        on_redis.valkey, on_redis.app.conf.broker_url = own, own.url
        on_redis.handler("items")
        crash(on_redis, "INSERT INTO items VALUES (1, 'a')")
        with redis.Redis(port=own.port) as client:
            kept = {key: client.dump(key) for key in client.keys("*")}
            crash(on_redis, "INSERT INTO items VALUES (2, 'b')")
            client.flushall()
            for key, value in kept.items():
                client.restore(key, 0, value)
        assert ids(again(on_redis, "INSERT INTO items VALUES (3, 'c')")) == [1, 2, 3]


def test_redis_restored_while_running_is_noticed(on_redis, caplog):
    """Confirmed messages that Redis lost are gone; that is logged, and the work goes on."""
    with Valkey() as own, redis.Redis(port=own.port) as client:
        on_redis.valkey, on_redis.app.conf.broker_url = own, own.url
        on_redis.handler("items")
        on_redis.publisher = RedisPublisher(on_redis.app)
        on_redis.start().do("INSERT INTO items VALUES (1, 'a')")
        kept = {key: client.dump(key) for key in client.keys("*")}
        on_redis.do("INSERT INTO items VALUES (2, 'b')")
        client.flushall()
        for key, value in kept.items():
            client.restore(key, 0, value)
        on_redis.do("INSERT INTO items VALUES (3, 'c')").stop()
        changes = delivered(own)
        assert ids(changes) == [1, 3]
        assert f"changes committed from {changes[0].commit_lsn} on may be missing" in caplog.text


@pytest.fixture
def own_redis(on_redis):
    """A Valkey of the test's own, a replication worker that has delivered a row, and a client."""
    with Valkey() as own, redis.Redis(port=own.port) as client:
        on_redis.valkey, on_redis.app.conf.broker_url = own, own.url
        on_redis.handler("items")
        on_redis.publisher = RedisPublisher(on_redis.app)
        on_redis.start().do("INSERT INTO items VALUES (1, 'a')")
        yield client
        on_redis.stop()


def position(client):
    (key,) = client.keys("_flash.*[^s]")  # not `.transactions`
    return key


def test_deleted_position_is_noticed_while_running(on_redis, own_redis, caplog):
    own_redis.delete(position(own_redis))
    on_redis.do("INSERT INTO items VALUES (2, 'b')")
    assert "may be missing" in caplog.text
    # Nothing was lost here, and nothing is: at worst it is enqueued again.
    assert set(ids(delivered(on_redis.valkey))) == {1, 2}


def test_evicted_position_is_noticed_while_running(on_redis, own_redis, caplog):
    key = position(own_redis)
    own_redis.config_set("maxmemory-policy", "allkeys-random")
    own_redis.config_set("maxmemory", own_redis.info("memory")["used_memory"] + 200_000)
    numbers = iter(range(100_000))
    while own_redis.exists(key):
        own_redis.set(f"cache:{next(numbers)}", b"x" * 1000)
    own_redis.config_set("maxmemory", 0)
    on_redis.do("INSERT INTO items VALUES (2, 'b')")
    assert "may be missing" in caplog.text
    assert 2 in ids(delivered(on_redis.valkey))


@pytest.mark.parametrize("suffix", ["", ".transactions"])
def test_key_of_another_type_is_named_and_nothing_is_enqueued_twice(
    on_redis, own_redis, caplog, suffix
):
    key = position(own_redis).decode() + suffix
    own_redis.delete(key)
    own_redis.set(key, "of another tool")
    on_redis.database.execute("INSERT INTO items VALUES (2, 'b')")
    expected = "list" if suffix else "hash"
    text = f"the key {key} is a string, and flash-celery keeps a {expected} there"
    on_redis.wait(lambda: text in caplog.text)
    assert own_redis.llen("flash") == 1
    own_redis.delete(key)
    on_redis.do("INSERT INTO items VALUES (3, 'c')")
    found = ids(delivered(on_redis.valkey))
    assert set(found) == {1, 2, 3}
    if suffix:
        assert found == [1, 2, 3]


@pytest.mark.parametrize("lost", ["hash", "everything"])
def test_position_lost_while_no_worker_runs_is_logged(on_redis, own_redis, caplog, lost):
    assert "Redis has no position" not in caplog.text
    on_redis.stop()
    on_redis.publisher = RedisPublisher(on_redis.app)
    on_redis.start().do("SELECT 1").stop()
    assert "Redis has no position" not in caplog.text
    if lost == "hash":
        own_redis.delete(position(own_redis))
    else:
        own_redis.flushall()
    assert set(ids(again(on_redis, "INSERT INTO items VALUES (2, 'b')"))) >= {2}
    said = [one for one in caplog.records if "Redis has no position _flash." in one.message]
    assert [one.levelname for one in said] == ["ERROR"]


@pytest.mark.parametrize("emptied", [False, True])
def test_position_of_a_server_before_pg_upgrade_is_known(on_redis, own_redis, caplog, emptied):
    """It gives the server another system identifier, which the record in PostgreSQL tells."""
    caplog.set_level(logging.INFO)
    on_redis.stop()
    key = position(own_redis)
    system = key.decode().split(".")[1]
    comment = on_redis.database.one(COMMENT)
    assert f'"system": "{system}"' in comment
    former = comment.replace(system, "1").replace("'", "''")
    on_redis.database.execute(f"COMMENT ON PUBLICATION flash_publication_insert IS '{former}'")
    if emptied:
        own_redis.flushall()
    else:
        own_redis.rename(key, key.replace(system.encode(), b"1"))
    on_redis.publisher = RedisPublisher(on_redis.app)
    on_redis.start().do("SELECT 1")
    assert ("Redis has no position" in caplog.text) is emptied
    assert ("another system identifier" in caplog.text) is not emptied
    assert f'"system": "{system}"' in on_redis.database.one(COMMENT)


def test_loss_noticed_while_stopping_is_logged(on_redis, caplog):
    """Only the process that had the confirmation can know."""

    class Late(RedisPublisher):
        """Loses everything once the worker is asked to stop."""

        def publish(self, messages):
            if lost.is_set():
                wait_until(lambda: on_redis.replicator.control.stopping, "the end")
                with redis.Redis(port=on_redis.valkey.port) as client:
                    client.flushall()
            super().publish(messages)

    lost = threading.Event()
    on_redis.handler("items")
    on_redis.publisher = Late(on_redis.app)
    on_redis.start().do("INSERT INTO items VALUES (1, 'a')")
    lost.set()
    on_redis.database.execute("INSERT INTO items VALUES (2, 'b')")
    on_redis.wait(lambda: on_redis.replicator.telemetry.unconfirmed())
    on_redis.stop()
    assert "may be missing" in caplog.text
    assert on_redis.error is None


@contextmanager
def restored_later(flash):
    """A server of its own with one delivered row, and a function that restores its present files
    without a recovery."""
    database = flash.database
    shared = database.server, database.dsn, database.slot
    with Postgres() as own:
        database.server, database.dsn = own, own.dsn()
        backup = own.folder / "backup"

        def restore():
            own.stop(signal.SIGQUIT)
            shutil.rmtree(own.data)
            shutil.copytree(backup, own.data, symlinks=True)
            if own.as_user:
                for path in (own.data, *own.data.rglob("*")):
                    shutil.chown(path, own.as_user["user"], own.as_user["group"])

        try:
            database.execute(ITEMS)
            flash.app.conf.flash_dsn = database.dsn
            flash.handler("items").start().do("INSERT INTO items VALUES (0, 'z')").stop()
            own.stop()
            shutil.copytree(own.data, backup, symlinks=True)
            own.start()
            yield own, restore
        finally:
            flash.stop()
            database.server, database.dsn, database.slot = shared


def test_database_restored_while_its_worker_waits_omits_nothing(flash, caplog):
    """It is on the same timeline, so only its position tells."""
    database = flash.database
    with restored_later(flash) as (own, restore):
        flash.start().do(*(f"INSERT INTO items VALUES ({n}, 'a')" for n in range(1, 200)))
        # Before PostgreSQL 17 a server that is stopped forgets what was acknowledged last.
        assert ids(flash.delivered())[-199:] == list(range(1, 200))
        restore()
        own.start()
        flash.wait(lambda: database.one(flash.slot("active")))
        assert "its data was restored" in caplog.text
        flash.do(*(f"INSERT INTO items VALUES ({n}, 'b')" for n in range(1, 300)))
        assert ids(flash.delivered())[-299:] == list(range(1, 300))


def test_slot_recreated_by_hand_during_a_reconnect_is_logged(flash, caplog):
    database = flash.database
    database.execute(ITEMS)
    flash.handler("items").start().do("INSERT INTO items VALUES (1, 'a')")
    settings = Settings.from_app(flash.app)
    # A worker that connects now waits for the lock.
    with database.connect() as connection, advisory_lock.held(Source(connection, settings)):
        database.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots "
            f"WHERE slot_name = '{database.slot}'"
        )
        flash.wait(lambda: not database.one(flash.slot("active")))
        database.execute(
            f"SELECT pg_drop_replication_slot('{database.slot}')",
            "INSERT INTO items VALUES (2, 'a')",
            f"SELECT pg_create_logical_replication_slot('{database.slot}', 'pgoutput')",
        )
    flash.wait(lambda: database.one(flash.slot("active")))
    flash.do("INSERT INTO items VALUES (3, 'a')")
    assert ids(flash.delivered()) == [1, 3]
    assert "was moved or recreated by hand, and the changes between are missing" in caplog.text


@pytest.mark.parametrize("timeline", ["the same", "new"])
def test_restored_database_omits_nothing(on_redis, timeline):
    """Other transactions get the LSNs of those that were enqueued; slot and system are the same."""
    on_redis.publisher = RedisPublisher(on_redis.app)
    with restored_later(on_redis) as (own, restore):
        restored(on_redis, own, restore, timeline)


def restored(flash, own, restore, timeline):
    database = flash.database
    crash(flash, *(f"INSERT INTO items VALUES ({n}, 'a')" for n in (1, 2, 3)), after=3)
    lost = delivered(flash.valkey)
    assert ids(lost) == [0, 1, 2, 3]
    restore()
    if timeline == "new":
        (own.data / "recovery.signal").touch()
        (own.data / "postgresql.auto.conf").write_text("restore_command = 'false'\n")
    own.start()
    if timeline == "new":
        wait_until(lambda: not database.one("SELECT pg_is_in_recovery()"), "the end of recovery")
    database.execute(*(f"INSERT INTO items VALUES ({n}, 'b')" for n in (1, 2, 3, 4)))
    changes = again(flash)
    if int(database.one("SHOW server_version_num")) < 170000:
        # A server that is stopped forgets what was acknowledged since its last checkpoint.
        changes = [change for change in changes if change.new["name"] == "b"]
    assert ids(changes) == [1, 2, 3, 4]
    if timeline == "the same":
        # Or this would show nothing.
        assert {c.commit_lsn for c in changes} & {c.commit_lsn for c in lost}


def test_crash_of_the_server_and_another_worker_enqueue_nothing_twice(on_redis):
    """The slot is where it was at the last checkpoint, before what was acknowledged since."""
    on_redis.publisher = RedisPublisher(on_redis.app)
    with restored_later(on_redis) as (own, _):
        on_redis.start()
        for number in range(1, 11):  # each is acknowledged before the next one is pushed
            on_redis.do(f"INSERT INTO items VALUES ({number}, 'a')")
        acknowledged = on_redis.database.one(on_redis.slot("confirmed_flush_lsn"))
        own.stop(signal.SIGQUIT)
        on_redis.stop()
        own.start()
        on_redis.database.execute("UPDATE items SET name = 'b' WHERE id = 1")
        assert on_redis.database.one(on_redis.slot("confirmed_flush_lsn")) != acknowledged
        assert ids(again(on_redis)) == [*range(11), 1]


def test_list_of_transactions_stays_short_while_one_is_open(on_redis, monkeypatch):
    """The slot cannot advance on PostgreSQL's disk, so a crash could send all of them again."""
    monkeypatch.setattr(redis_position, "_MOST_KEPT", 5)
    on_redis.publisher = RedisPublisher(on_redis.app)
    on_redis.handler("items").start()
    with on_redis.database.connect() as connection, connection.transaction():
        connection.execute("SELECT pg_current_xact_id()")
        for number in range(20):
            on_redis.do(f"INSERT INTO items VALUES ({number}, 'a')")
        with redis.Redis(port=on_redis.valkey.port) as client:
            # The last one is dropped by the next push.
            assert client.llen(position(client) + b".transactions") == 6
    assert ids(delivered(on_redis.valkey)) == list(range(20))


def test_stale_owner_publishes_nothing(valkey):
    """A process that was stopped while another one took the slot over wakes up."""
    app = Celery("shop", broker=valkey.url, set_as_current=False)
    old, new = RedisPublisher(app), RedisPublisher(app)
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
        for publisher in (old, new):
            publisher.open([app.amqp.queues["flash"]])
            publisher.claim(Lease("1.slot", "same"))
        message = Message(Form("flash", "handler", {}, {}), "1", "", "{}")
        with pytest.raises(TakenOver):
            old.publish([message])
        assert client.llen("flash") == 0
        new.publish([message])
        assert client.llen("flash") == 1
    for publisher in (old, new):
        publisher.close()


def test_redis_key_prefix_is_kept(valkey):
    app = Celery("shop", broker=valkey.url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "shop:"}
    publisher = RedisPublisher(app)
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
        publisher.open([app.amqp.queues["flash"]])
        publisher.claim(Lease("1.slot", "same"))
        publisher.publish([Message(Form("flash", "handler", {}, {}), "1", "", "{}")])
        assert {key.partition(b":")[0] for key in client.keys("*")} == {b"shop"}
    publisher.close()


def test_broker_down_at_the_start_of_a_session_enqueues_nothing_twice(on_redis):
    with Valkey() as own:
        on_redis.valkey, on_redis.app.conf.broker_url = own, own.url
        own.stop()
        on_redis.handler("items")
        on_redis.publisher = RedisPublisher(on_redis.app)
        on_redis.start()
        on_redis.database.execute("INSERT INTO items VALUES (1, 'a')")
        own.start()
        on_redis.do("INSERT INTO items VALUES (2, 'b')")
        on_redis.stop()
        assert ids(delivered(own)) == [1, 2]
