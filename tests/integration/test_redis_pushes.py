"""What Redis does of a push that fails, or whose reply does not come, is never taken for all of it.

The position and the messages are one step: a message is there once, or is published again.
"""

import json
from functools import partial

import pytest
import redis
from celery import Celery

from example_project.servers import Valkey, wait_until
from flash_celery.changes.alone import Alone
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.rows import Transaction
from flash_celery.errors import ConfirmedLost, LanesNotReady, PublishError, TakenOver
from flash_celery.messages.change_message import SIZE, ChangeMessage
from flash_celery.messages.deduplication import NOTHING, Lease
from flash_celery.messages.lane_messages import LaneForm, LaneMessage, handler_key
from flash_celery.messages.task_message import Form, Message
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing.brokers import lane_access
from flash_celery.publishing.brokers.lane_store import Done, LaneStore
from flash_celery.publishing.brokers.redis import RedisPublisher
from tests.proxy import Proxy, Way
from tests.unit.builders import TABLE

#: Seconds until a reply counts as lost.
PATIENCE = 2.0


def message(number, queue="flash"):
    covered = [(0, (number, 0, 0))], (number,), ()
    return Message(Form(queue, "handler", {}, {}, template="t"), str(number), "", "{}", covered)


def changes(first, count, queue="flash", size=1, label=""):
    """So many messages of single changes, which a script puts together."""
    rows = [encode_row("I", 0, None, None, [b"5" * size])] * count
    alone = Alone(Delivery(TABLE, Transaction(Lsn(first), 1, 0), 0, 0, 0, rows))
    form = Form(queue, "handler", {}, {}, template="t")
    length = len(alone.value(0)) + SIZE
    return [ChangeMessage(form, alone, n, f"{first + n:036}", label, length) for n in range(count)]


def found(client, queue="flash"):
    """The ids in a queue, the oldest first."""
    return [int(json.loads(raw)["headers"]["id"]) for raw in client.lrange(queue, 0, -1)][::-1]


@pytest.fixture
def client(valkey):
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
        yield client


@pytest.fixture
def proxy(valkey):
    with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def new_session():
    """Return a maker of publishers with the lease, each with the position that it found."""
    publishers = []

    def make(port, user=""):
        url = f"redis://{user}127.0.0.1:{port}/0"
        publisher = RedisPublisher(Celery("shop", broker=url, set_as_current=False), PATIENCE)
        publishers.append(publisher)
        publisher.open([])
        return publisher, publisher.claim(Lease("1.slot", "same"))

    yield make
    for publisher in publishers:
        publisher.close()


@pytest.fixture
def publisher(client, proxy, new_session):
    return new_session(proxy.port)[0]


def lose(publisher, proxy, way, messages):
    """Publish without receiving the reply, and reconnect."""
    publisher.check()  # it has a connection
    proxy.stall(way, new=False)
    with pytest.raises(PublishError):
        publisher.publish(messages)
    publisher.open([])


def steps(client):
    return client.info("commandstats").get("cmdstat_eval", {"calls": 0})["calls"]


def test_push_whose_reply_is_lost_is_not_repeated(publisher, proxy, client):
    lose(publisher, proxy, Way.TO_CLIENT, [message(1)])
    publisher.publish([message(1), message(2)])
    assert found(client) == [1, 2]


def test_changes_of_a_push_whose_reply_is_lost_are_not_repeated(publisher, proxy, client):
    """One command pushes many of them, and they are counted one by one."""
    some = changes(1, 700)
    lose(publisher, proxy, Way.TO_CLIENT, some)
    publisher.publish([*some, *changes(701, 3)])
    assert found(client) == [*range(1, 704)]


def test_push_that_does_not_arrive_is_repeated(publisher, proxy, client):
    publisher.publish([message(1)])
    lose(publisher, proxy, Way.TO_SERVER, [message(2)])
    publisher.publish([message(2)])
    assert found(client) == [1, 2]


def test_push_that_arrives_late_counts(publisher, proxy, client):
    lose(publisher, proxy, Way.TO_SERVER, [message(1)])
    proxy.heal()
    wait_until(lambda: client.llen("flash"), "the late push")
    publisher.publish([message(1), message(2)])
    assert found(client) == [1, 2]


def test_push_that_arrives_after_its_repetition_is_refused(publisher, proxy, client):
    before = steps(client)
    lose(publisher, proxy, Way.TO_SERVER, [message(1)])
    publisher.publish([message(1), message(2)])
    assert steps(client) == before + 1
    proxy.heal()
    wait_until(lambda: steps(client) == before + 2, "the late push")
    assert found(client) == [1, 2]


@pytest.mark.parametrize("then", ["is deleted", "is a queue again", "is as it was"])
def test_push_that_failed_with_a_lost_reply_published_nothing(publisher, proxy, client, then):
    """The queue is no list for a while: whatever it is afterwards, nothing was published."""
    client.set("flash", "not a queue")
    before = steps(client)
    lose(publisher, proxy, Way.TO_CLIENT, [message(1, "other"), message(2)])
    assert steps(client) == before + 1
    if then == "is as it was":
        with pytest.raises(PublishError, match="WRONGTYPE") as failed:
            publisher.publish([message(1, "other"), message(2)])
        assert failed.value.confirmed == 0
        publisher.open([])
    client.delete("flash")
    if then == "is a queue again":
        publisher.publish([])
        client.lpush("flash", json.dumps({"headers": {"id": "0"}}))
    publisher.publish([message(1, "other"), message(2)])
    assert (found(client)[-1], found(client, "other")) == (2, [1])


def test_push_that_failed_and_then_does_not_arrive_published_nothing(publisher, proxy, client):
    """The state of the first attempt proves nothing about the second."""
    client.set("flash", "not a queue")
    with pytest.raises(PublishError):
        publisher.publish([message(1)])
    publisher.open([])
    client.delete("flash")
    lose(publisher, proxy, Way.TO_SERVER, [message(1)])
    publisher.publish([message(1)])
    assert found(client) == [1]


def allow(client, rules):
    client.execute_command("ACL", "SETUSER", "shop", *rules.split())


FAILURES = {
    "another type": (
        "WRONGTYPE",
        lambda client: client.set("other", "not a queue"),
        lambda client: client.delete("other"),
    ),
    "a key that the ACL does not allow": (
        "No permission|NOPERM|no permissions",
        lambda client: allow(client, "resetkeys ~_flash* ~flash"),
        lambda client: allow(client, "allkeys"),
    ),
    "a command that the ACL does not allow": (
        "No permission|NOPERM|no permissions",
        lambda client: allow(client, "-lpush"),
        lambda client: allow(client, "+lpush"),
    ),
    "no memory": (
        "maxmemory",
        lambda client: client.config_set("maxmemory", 1),
        lambda client: client.config_set("maxmemory", 0),
    ),
    "a replica": (
        "read only|READONLY",
        lambda client: client.replicaof("127.0.0.1", "1"),
        lambda client: client.replicaof("NO", "ONE"),
    ),
    "too few replicas": (
        "NOREPLICAS|good replicas",
        lambda client: client.config_set("min-replicas-to-write", 1),
        lambda client: client.config_set("min-replicas-to-write", 0),
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_step_that_fails_is_repeated_and_never_acknowledged(new_session, what):
    error, harm, repair = FAILURES[what]
    with Valkey(**{"maxmemory-policy": "noeviction"}) as own, redis.Redis(port=own.port) as client:
        allow(client, "on >secret allkeys allchannels +@all")
        publisher, _ = new_session(own.port, "shop:secret@")
        messages = [message(1), *changes(2, 20, "other"), *changes(22, 20)]
        harm(client)
        with pytest.raises(PublishError, match=error) as failed:
            publisher.publish(messages)
        assert failed.value.confirmed == 0
        repair(client)
        # Neither a worker after a crash nor a retry relies on it.
        assert client.hget("_flash.1.slot", "writes") == b"0"
        publisher.open([])
        publisher.publish(messages)
        # Nothing is there from the first attempt.
        assert found(client) == [1, *range(22, 42)]
        assert found(client, "other") == [*range(2, 22)]
        _, enqueued = new_session(own.port)
        assert enqueued.watermark == 22


def test_no_word_is_longer_than_redis_may_allow(new_session):
    with Valkey(**{"proto-max-bulk-len": "1mb"}) as own, redis.Redis(port=own.port) as client:
        publisher, _ = new_session(own.port)
        long_label = "\U0001f600" * 200  # 12 characters each in JSON
        publisher.publish([*changes(1, 600, size=3000), *changes(601, 600, label=long_label)])
        assert found(client) == [*range(1, 1201)]


def test_one_step_fills_lanes_and_pushes_changes(publisher, client):
    key = handler_key("1/slot", "handler")
    form = LaneForm(key, "1/slot", "handler", 4, Form("flash", "handler", {}, {}))
    publisher.prepare([form])
    before = steps(client)
    lane = LaneMessage(form, [(2, 1, "entry")], NOTHING)
    publisher.publish([*changes(1, 20, "other"), lane, *changes(21, 20, "other")])
    assert steps(client) == before + 1
    assert found(client, "other") == [*range(1, 41)]
    assert client.llen(f"{key}.2") == 1


def test_step_of_many_long_words_arrives_whole(publisher, client):
    key = handler_key("1/slot", "handler")
    form = LaneForm(key, "1/slot", "handler", 4, Form("flash", "handler", {}, {}))
    publisher.prepare([form])
    pushes = [(number % 4, 1, f"{number} {'é' * 997 * number}") for number in range(200)]
    publisher.publish([LaneMessage(form, pushes, NOTHING)])
    for lane in range(4):
        texts = [text for place, _, text in pushes if place == lane]
        assert [each.decode() for each in client.lrange(f"{key}.{lane}", 0, -1)] == texts
    assert client.hmget(f"{key}.state", "waiting", "n0", "n3") == [b"200", b"50", b"50"]
    assert client.llen("flash") == 4


def test_lanes_are_woken_again_after_the_lease_but_after_30_seconds_at_most(new_session, client):
    key = handler_key("1/slot", "handler")
    form = LaneForm(key, "1/slot", "handler", 4, Form("flash", "handler", {}, {}))
    for lease, grace in ((5, 5), (None, 30), (600, 30)):
        publisher, _ = new_session(client.get_connection_kwargs()["port"])
        publisher._app.conf.flash_lane_lease = lease
        publisher.prepare([form])
        assert float(client.hget(f"{key}.state", "grace")) == grace


def test_lanes_that_an_acl_forbids_stop_no_project_without_ordered_handlers(new_session):
    with Valkey() as own, redis.Redis(port=own.port) as client:
        allow(client, "on >secret allkeys allchannels +@all -smembers")
        publisher, _ = new_session(own.port, "shop:secret@")
        publisher.prepare([])
        publisher.publish([message(1)])
        assert found(client) == [1]
        assert lane_access.summaries(publisher, "1/slot", []) == []
        with pytest.raises(PublishError, match="No permission|NOPERM|no permissions"):
            lane_access.summaries(publisher, "1/slot", ["ordered"])


def test_lanes_of_a_slot_of_the_same_name_on_another_server_are_not_shown(publisher, client):
    for system in ("1", "2"):
        key = handler_key(f"{system}/slot", "handler")
        client.sadd("_flash.ordered", key)
        client.hset(f"{key}.state", "waiting", system)

    def waiting(source):
        return [
            (each.waiting, each.ordered) for each in lane_access.summaries(publisher, source, [])
        ]

    assert waiting("1/slot") == [(1, False)]
    assert waiting("2/slot") == [(2, False)]
    assert waiting("/slot") == [(1, False), (2, False)]  # PostgreSQL cannot be reached
    assert waiting("1/slo") == waiting("1/slot.handler") == waiting("3/slot") == []


def test_crash_after_a_failed_push_loses_nothing(client, valkey, new_session):
    publisher, _ = new_session(valkey.port)
    publisher.publish([message(1)])
    client.set("other", "not a queue")
    with pytest.raises(PublishError):
        publisher.publish([message(2), message(3, "other")])
    client.delete("other")
    _, enqueued = new_session(valkey.port)
    assert enqueued.watermark == 1


@pytest.mark.parametrize("asks", ["at once", "after a lost reply"])
def test_lost_redis_keys_are_not_taken_for_enqueued(publisher, proxy, client, asks):
    """It goes back, as a replica that is promoted does, or one that is restored."""
    publisher.publish([message(1)])
    kept = {key: client.dump(key) for key in client.keys("*")}
    publisher.publish([message(2)])
    if asks == "after a lost reply":
        lose(publisher, proxy, Way.TO_SERVER, [message(3)])
    client.flushall()
    for key, value in kept.items():
        client.restore(key, 0, value)
    with pytest.raises(ConfirmedLost, match="committed from 0/1 on may be missing"):
        publisher.publish([message(3)])
    assert found(client) == [1]
    client.flushall()
    with pytest.raises(ConfirmedLost, match="committed before now may be missing"):
        publisher.publish([message(3)])
    assert found(client) == []


@pytest.mark.parametrize("lost", ["the last push", "everything"])
def test_next_session_notices_lost_redis_keys(publisher, client, lost):
    publisher.publish([message(1)])
    kept = {key: client.dump(key) for key in client.keys("*")}
    publisher.publish([message(2)])
    client.flushall()
    if lost == "the last push":
        for key, value in kept.items():
            client.restore(key, 0, value)
    with pytest.raises(ConfirmedLost):
        publisher.claim(Lease("1.slot", "same"))
    # Said once; and what is there is known.
    assert publisher.claim(Lease("1.slot", "same")).watermark == client.llen("flash")
    publisher.publish([message(3)])
    assert found(client)[-1] == 3


@pytest.mark.parametrize("asks", ["a push", "the next session"])
def test_redis_restored_to_an_earlier_session_has_lost_the_last_push(publisher, client, asks):
    publisher.publish([message(1)])
    kept = {key: client.dump(key) for key in client.keys("*")}
    publisher.claim(Lease("1.slot", "same"))
    publisher.publish([message(2)])
    client.flushall()
    for key, value in kept.items():
        client.restore(key, 0, value)
    ask = {
        "a push": partial(publisher.publish, [message(3)]),
        "the next session": partial(publisher.claim, Lease("1.slot", "same")),
    }
    with pytest.raises(ConfirmedLost, match="committed from 0/1 on may be missing"):
        ask[asks]()
    # Said once.
    assert publisher.claim(Lease("1.slot", "same")).watermark == 1
    publisher.publish([message(2), message(3)])
    assert found(client) == [1, 2, 3]


def test_next_session_can_follow_one_of_another_process(publisher, client, valkey, new_session):
    publisher.publish([message(1)])
    other, _ = new_session(valkey.port)
    other.publish([message(2)])
    assert publisher.claim(Lease("1.slot", "same")).watermark == 2
    assert publisher.claim(Lease("1.slot", "same")).watermark == 2


def test_stale_owner_moves_nothing_out_of_a_hold_queue(client, valkey, new_session):
    old, _ = new_session(valkey.port)
    old.publish([message(1, "parked")])
    new, _ = new_session(valkey.port)
    with pytest.raises(TakenOver):
        old.requeue("parked", lambda raw: message(1), len)
    assert (found(client, "parked"), found(client)) == ([1], [])
    assert new.requeue("parked", lambda raw: message(1), len)
    assert (found(client, "parked"), found(client)) == ([], [1])


@pytest.mark.parametrize("leased", [True, False])
def test_held_message_stays_until_it_has_been_moved(client, valkey, new_session, leased):
    publisher, _ = new_session(valkey.port)
    publisher.publish([message(1, "parked"), message(2, "parked")])
    if not leased:
        publisher = RedisPublisher(Celery("shop", broker=valkey.url, set_as_current=False))
        publisher.open([])
    client.set("flash", "not a queue")
    moved = iter([message(1), message(2)] * 2)
    with pytest.raises(PublishError, match="WRONGTYPE"):
        publisher.requeue("parked", lambda raw: next(moved), len)
    assert found(client, "parked") == [1, 2]
    client.delete("flash")
    publisher.open([])
    assert publisher.requeue("parked", lambda raw: next(moved), len)
    assert not publisher.requeue("parked", lambda raw: next(moved), len)
    assert (found(client, "parked"), found(client)) == ([], [1, 2])
    publisher.close()


def test_push_of_another_layout_waits_for_the_lanes_and_loses_nothing(new_session, client):
    """As when a table gets another primary key: one publish may have changes of both."""
    publisher, _ = new_session(client.connection_pool.connection_kwargs["port"])
    form = Form("flash", "handler", {}, {}, template="t")
    key = handler_key("1/slot", "handler")
    old, new = (
        LaneForm(key, "1/slot", "handler", 4, form, declared) for declared in ("old", "new")
    )

    def change(number, lanes):
        covered = [(0, (number, 0, 0))], (number,), ()
        return LaneMessage(lanes, [(0, 1, str(number))], covered)

    def empty(changes):
        store = LaneStore(client, key)
        store.claim("0", "token", 30)
        store.commit("0", "token", 30, 1, Done(changes, 0, changes), 0)

    messages = [change(1, old), change(2, old), change(3, new), change(4, old)]
    pushed = [[b"1", b"2"], [b"3"], [b"4"]]
    for waiting in pushed:
        if waiting is pushed[-1]:
            publisher.publish(messages)
        else:
            with pytest.raises(LanesNotReady) as refused:
                publisher.publish(messages)
            assert refused.value.confirmed == len(waiting)
        assert client.lrange(f"{key}.0", 0, -1) == waiting
        empty(len(waiting))
        messages = messages[len(waiting) :]
