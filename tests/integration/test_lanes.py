"""The lanes of ordered handlers on a real server: no schedule of steps and faults breaks the order.

`lane_world` runs the scripts and the drain under a clock of its own.
"""

import json
import os
import re
import threading
from pathlib import Path

import pytest
import redis

from example_project.servers import wait_until
from flash_celery import on_change
from flash_celery.changes import payload
from flash_celery.commands import lanes
from flash_celery.dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from flash_celery.errors import ConfigurationError
from flash_celery.lanes import connection, wake
from flash_celery.lanes.drain import Drain, HeldLease, Limits
from flash_celery.messages import lane_entries
from flash_celery.messages.deduplication import now
from flash_celery.messages.lane_placing import Place
from flash_celery.protocol.lsn import Lsn
from flash_celery.publishing.brokers import lane_scripts
from flash_celery.publishing.brokers.lane_letters import LaneLetters, Noted
from flash_celery.publishing.brokers.lane_overview import Overview
from flash_celery.publishing.brokers.lane_store import Done, LaneStore, LostLease
from flash_celery.publishing.brokers.redis_position import in_one_step
from tests.integration.lane_world import KEY, LEASE, PUSH, QUEUE, Faults, World, delivery
from tests.proxy import Proxy, Way

ROOT = Path(__file__).parents[2]
#: Schedules of each kind; `make long` runs many more.
SCHEDULES = int(os.environ.get("FLASH_SCHEDULES", 200))

#: Tests of each kind, so that none takes long on a busy machine.
PARTS = 5
#: Changes of one schedule.
CHANGES = 8 if SCHEDULES == 200 else 20
#: The faults of one schedule, and what else differs.
KINDS = {
    "no faults": ({"crash": 0, "lost_wake": 0}, {}),
    "crashes": ({"crash": 4}, {}),
    "commits lost": (
        {"crash": 10, "crash_rate": 0.2, "retry": 0},
        {"lanes": 1, "keys": 2, "processes": 1, "changes": 20},
    ),
    "frozen": ({"crash": 1, "freeze": 2}, {}),
    "batches": ({"crash": 3}, {"size": 4}),
}


@pytest.fixture
def client(valkey):
    with redis.Redis(port=valkey.port, db=9, protocol=2, single_connection_client=True) as client:
        yield client


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
def test_lanes_keep_the_order_in_every_schedule(client, kind, part):
    faults, options = KINDS[kind]
    for seed in range(part, SCHEDULES, PARTS):
        world = World(client, seed, Faults(**faults), **{"changes": CHANGES, **options})
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"{kind}, seed {seed}: {error}") from error


class Lane:
    """One lane with a clock of its own, and the steps of drains on it."""

    def __init__(self, client):
        client.flushdb()
        self.client, self.now = client, 1000.0
        self.store = LaneStore(client, KEY, lambda: self.now)
        wake = json.dumps([lane_scripts.LANE_MARK, lane_scripts.ID_MARK])
        self.names = "_flash.ordered", KEY, "layout", 4, QUEUE, wake, "{}", False
        assert self.store.configure(*self.names)

    def push(self, *keys, lane="0", first=0):
        """Push one entry of changes with these keys."""
        numbers = range(first, first + len(keys))
        places = [Place(key, key) for key in keys]
        text = lane_entries.encode(payload.encode(map(delivery, numbers)), places)
        script = self.client.register_script(PUSH)
        script(keys=[KEY], args=[self.now, lane, len(keys), text])

    def claim(self, token="a", lane="0"):
        return self.store.claim(lane, token, LEASE)

    def commit(self, number, token="a", changes=1, cursor=1, entries=0, kept=1, **options):
        done = Done(entries, cursor, changes)
        return self.store.commit("0", token, LEASE, number, done, kept, **options)

    @property
    def wakes(self):
        return self.client.llen(QUEUE)

    def cursor(self):
        return int(self.client.hget(f"{KEY}.state", "c0") or 0)


@pytest.fixture
def lane(client):
    return Lane(client)


class Handler:
    """Notes the changes that it is called for, among the other steps of a drain."""

    size = 1

    def __init__(self):
        self.steps = []

    def read_form(self, text): ...

    def handle(self, head):
        self.steps += [change.transaction.xid for change in head.changes]

    def remaining(self, head): ...


def drain(lane, handler, before=lambda name: None, token="a"):
    """Run a drain to its end; `before` is called with the name of each step."""
    lease = HeldLease(lane.store, "0", token, LEASE, lambda: lane.now)
    steps, reply = Drain(lease, handler, Limits(budget=100)).steps(), None
    while True:
        try:
            step = steps.send(reply)
        except StopIteration:
            return
        name = getattr(getattr(step, "func", step), "__name__", "result")
        if name != "handle":
            handler.steps.append(name)
        before(name)
        reply = step()


def test_commit_that_is_sent_twice_removes_no_second_change(lane):
    lane.push(1, 2, 3)
    lane.claim()
    for _ in range(2):  # a client that got no reply sends it again
        assert lane.commit(1, cursor=1) == []
    assert lane.cursor() == 1
    assert int(lane.client.hget(f"{KEY}.state", "waiting")) == 2


def test_claim_that_is_sent_twice_is_the_same_lease(lane):
    lane.push(1)
    first = lane.claim()
    assert lane.claim() == first


def test_fence_grows_with_each_claim_also_if_redis_has_lost_the_last_one(lane):
    lane.push(1)
    fences = [lane.claim().fence]
    assert lane.claim().fence == fences[0]  # sent twice by the client
    for token in "bc":
        lane.now += LEASE + 1
        fences.append(lane.claim(token).fence)
    later = lane.now + 1
    lane.__init__(lane.client)  # which flushes the database
    lane.now = later
    lane.push(1)
    fences.append(lane.claim().fence)
    assert fences == sorted(set(fences))
    assert fences[-1] < 1 << 53


def test_drain_commits_before_another_change_of_the_same_key(lane):
    lane.push(1, 2, 1, 3)
    handler = Handler()
    drain(lane, handler)
    # Sent before the change in between, and confirmed before the next change of the key.
    assert handler.steps == ["claim", 0, "send_commit", 1, "result", 2, 3, "commit"]


def test_drain_waits_for_the_commit_of_a_key_whose_changes_follow_each_other(lane):
    lane.push(1, 1, 2)
    handler = Handler()
    drain(lane, handler)
    assert handler.steps == ["claim", 0, "commit", 1, 2, "commit"]


def test_commit_that_arrives_after_later_ones_removes_nothing(lane):
    lane.push(1, 2, 3)
    lane.claim()
    assert lane.commit(1, cursor=1) == []
    assert lane.commit(2, cursor=2) == []
    assert lane.commit(1, cursor=1) == []  # from a connection that was cut
    assert lane.cursor() == 2
    assert int(lane.client.hget(f"{KEY}.state", "waiting")) == 1


def test_commit_of_a_dead_process_that_arrives_late_does_not_hold_its_lane(lane):
    lane.push(1, 2)
    lane.claim("dead")
    assert lane.store.release("0", "dead", died=True)
    with pytest.raises(LostLease):
        lane.commit(1, "dead")
    assert lane.claim("a").deaths == 1


def test_drain_after_a_death_commits_its_first_change_alone(lane):
    lane.push(1, 2, 3)
    lane.claim("dead")
    lane.store.release("0", "dead", died=True)
    handler = Handler()
    drain(lane, handler)
    assert handler.steps == ["claim", 0, "commit", 1, 2, "commit"]


def test_claim_refuses_a_lane_that_sleeps_or_is_held(lane):
    lane.push(1)
    lane.claim()
    # Another wake, as after visibility_timeout, has a token of its own.
    assert lane.claim("b") == "held"
    assert lane.store.sleep("0", "a", 60, 1)
    assert lane.claim("b") == "asleep"
    lane.now += 60
    assert lane.store.sweep() == 1
    assert lane.claim("b").retries == 1


def test_drain_that_was_frozen_handles_nothing_more(lane):
    lane.push(1, 2, 3)
    handler, other = Handler(), Handler()

    def freeze(name):
        if name == "handle" and not other.steps:
            lane.now += LEASE + 1
            drain(lane, other, token="b")

    drain(lane, handler, freeze)
    # The call that was under way, and no other, although its buffer has them.
    assert handler.steps == ["claim", 0, "renew"]
    assert other.steps == ["claim", 0, "commit", 1, 2, "commit"]


def test_sweep_wakes_less_and_less_often_while_no_worker_comes(lane):
    lane.push(1)
    swept = 0
    for _ in range(3600):
        lane.now += 1
        swept += lane.store.sweep()
    assert 5 <= swept <= 12
    assert lane.wakes == swept + 1


def test_lane_that_no_worker_begins_is_woken_again_after_a_short_lease(lane):
    assert lane.store.configure(*lane.names, 5.0)
    assert lane.store.configure(*lane.names)  # as `flash resume` does
    lane.push(1)
    swept = []
    for _ in range(40):
        lane.now += 1
        if lane.store.sweep():
            swept.append(lane.now - 1000)
    assert swept == [5, 10, 20, 40]


def test_sweep_that_fails_for_one_handler_wakes_the_lanes_of_the_others(
    lane, valkey, new_app, caplog
):
    lane.push(1)
    lane.client.sadd("_flash.ordered", "_flash.ordered.0")  # the first
    lane.client.set("_flash.ordered.0.due", "of another type")
    app = new_app(broker_url=f"{valkey.url.rpartition('/')[0]}/9")
    for _ in range(2):
        wake.sweep(app)
    assert lane.wakes == 2
    assert caplog.text.count("Cannot wake the lanes of _flash.ordered.0,") == 1


def test_worker_without_ordered_handlers_keeps_a_connection_only_for_lanes_that_exist(
    lane, valkey, new_app
):
    app = new_app(broker_url=f"{valkey.url.rpartition('/')[0]}/9")
    before = len(lane.client.client_list())
    assert wake._has_lanes(app)
    connection.close(app)
    lane.client.flushdb()
    assert not wake._has_lanes(app)
    # Those of tests before it may end as well.
    wait_until(lambda: len(lane.client.client_list()) <= before, "the connection to be closed")


def test_lanes_that_wait_for_another_layout_are_resumed(lane):
    wake = json.dumps([lane_scripts.LANE_MARK, lane_scripts.ID_MARK])

    def configure(layout, paused):
        return lane.store.configure("_flash.ordered", KEY, layout, 4, QUEUE, wake, "{}", paused)

    lane.push(1)
    assert configure("layout", True)
    assert lane.claim() == "paused"
    assert not configure("other", False)
    lane.now += 1
    assert lane.store.sweep() == 1
    assert lane.claim().deaths == 0
    assert lane.commit(1, entries=1, cursor=0) is None
    assert configure("other", False)


def test_lane_whose_list_was_deleted_holds_up_no_other_layout(lane):
    lane.push(1, 2)
    lane.push(3, lane="1")
    lane.client.delete(f"{KEY}.0")
    assert lane.claim() == "nothing"
    assert lane.client.hgetall(f"{KEY}.state")[b"waiting"] == b"1"


def test_push_does_nothing_if_a_list_of_the_same_step_is_none(lane):
    lane.client.set("held", "no list")
    text = lane_entries.encode(payload.encode([delivery(0)]), [Place(0, 0)])
    push = "FLASH.PUSH", KEY, "layout", 0, 1, text
    with pytest.raises(redis.ResponseError, match="held is a string"):
        in_one_step(lane.client, [push, ("LTRIM", "held", 0, -2)])
    assert not lane.client.exists(f"{KEY}.0")


def test_push_wakes_a_lane_once(lane):
    for number in range(5):
        lane.push(1, first=number)
    assert lane.wakes == 1


def test_release_by_the_parent_process_counts_a_death(lane):
    lane.push(1)
    for deaths in range(3):
        assert lane.claim(f"wake|host|{deaths}").deaths == deaths
        assert lane.store.release("0", "wake|host|", died=True)
        assert not lane.store.release("0", "wake|host|", died=True)  # sent twice
    assert lane.claim("x").deaths == 3
    assert lane.store.release("0", "x")
    assert lane.claim("y").deaths == 3  # given back on purpose: none more
    lane.commit(1, "y", entries=1, cursor=0)
    lane.push(2)
    assert lane.claim("z").deaths == 0


def test_lost_lease_ends_a_drain_and_changes_nothing(lane):
    lane.push(1, 2)
    lane.claim("a")
    lane.now += LEASE + 1
    assert lane.claim("b").deaths == 1
    with pytest.raises(LostLease):
        lane.commit(1, "a")
    assert not lane.store.renew("0", "a", LEASE)
    assert not lane.store.sleep("0", "a", 60, 1)
    assert not lane.store.release("0", "a")
    assert not lane.store.block("0", "a", "{}")
    assert lane.cursor() == 0
    assert lane.store.renew("0", "b", LEASE)


def test_entry_of_another_version_keeps_its_lane_waiting(lane, caplog):
    lane.push(1)
    newer = lane.client.lpop(f"{KEY}.0").replace(b'"v":', b'"v":9')
    lane.client.rpush(f"{KEY}.0", newer)
    handler = Handler()
    drain(lane, handler)
    assert handler.steps == ["claim", "sleep"]
    assert "Upgrade the Celery workers" in caplog.text
    assert lane.client.llen(f"{KEY}.0") == 1


@pytest.mark.parametrize("barrier", [False, True], ids=["entry", "barrier"])
@pytest.mark.parametrize("damage", ["another version", "no JSON"])
def test_entry_that_cannot_be_read_is_skipped_and_kept_as_a_dead_letter(
    lane, valkey, new_app, barrier, damage
):
    app = new_app(broker_url=f"{valkey.url.rpartition('/')[0]}/9")

    @on_change("items", ordered=True)
    @app.task(name="handler", shared=False)
    def handler(change): ...

    app.finalize()
    for number in range(3):
        lane.push(number, first=number)
    key = f"{KEY}.0"
    first = lane.client.lpop(key)
    bad = first.replace(b'"v":', b'"v":9') if damage == "another version" else b"\xff" + first[1:]
    if barrier:
        lane.client.lpush(key, "!7:1")
        lane.client.hset(f"{KEY}.barriers", 7, bad)
        lane.client.sadd(f"{KEY}.barrier.7", 0)
        lane.client.hincrby(f"{KEY}.state", "n0", -1)  # it counts for no lane
    else:
        lane.client.lpush(key, bad)
    drain(lane, Handler())
    source, _, name = KEY.removeprefix("_flash.ordered.").rpartition(".")
    arguments = app, source.replace(".", "/", 1), name, 0
    (status,) = lanes.lanes(*arguments[:2], [name])[name]
    assert status.first.startswith("an entry that cannot be read (This ")
    with pytest.raises(ConfigurationError, match=f"skip {name} 0 {status.first_id}` makes a dead"):
        lanes.unblock(*arguments, status.first_id, skip=False)
    assert Overview(lane.client, KEY).first_up_to(Lsn(0), "") == 1  # `flash wait` waits for it
    letter_id = lanes.skip(*arguments, status.first_id)
    queue = DeadLetterQueue(app, "flash.dead")
    (letter,) = queue.read(queue.find(DeadLetterFilter()))
    assert (letter.id, letter.handler, letter.error) == (letter_id, name, "PayloadError")
    rows = json.loads(first)["changes"]["rows"]
    assert rows in letter.body
    assert int(lane.client.hget(f"{KEY}.state", "waiting")) == 2
    calls = Handler()
    lane.now += 100
    drain(lane, calls, token="b")
    assert [step for step in calls.steps if isinstance(step, int)] == [1, 2]
    assert lane.client.hget(f"{KEY}.state", "waiting") == b"0"
    with pytest.raises(ConfigurationError, match="is not blocked"):
        lanes.skip(*arguments, status.first_id)


@pytest.mark.parametrize(("size", "most"), [(1, 1 << 16), (500, 1 << 18)])
def test_drain_reads_about_as_much_as_it_handles(lane, size, most):
    for first in range(0, 12_000, 500):
        lane.push(*range(first, first + 500), first=first)
    handler = Handler()
    handler.size = size
    steps = Drain(lease_of(lane, "a"), handler).steps()
    claimed = next(steps)()
    assert 0.5 * most < sum(map(len, claimed.entries)) <= most
    steps.close()


def lease_of(lane, token, seconds=LEASE):
    """A lease by the clocks of the server and of the process."""
    store = LaneStore(lane.client, KEY)
    return HeldLease(store, "0", token, seconds, now)


@pytest.fixture
def configured(client):
    """Sets an option of the server for the test."""
    earlier = {}

    def configure(name, value):
        earlier.setdefault(name, client.config_get(name)[name])
        client.config_set(name, value)

    yield configure
    for name, value in earlier.items():
        client.config_set(name, value)


def test_commit_that_redis_refuses_for_now_is_sent_again(lane, configured):
    """A replica is away for a moment while the handler runs."""
    lane.push(1)

    class Handled(Handler):
        def handle(self, head):
            super().handle(head)
            configured("min-replicas-to-write", 1)
            threading.Timer(0.5, configured, ["min-replicas-to-write", 0]).start()

    handler = Handled()
    lease = lease_of(lane, "a")
    wake._run(Drain(lease, handler), lease)
    assert handler.steps == [0]
    assert not lane.client.exists(f"{KEY}.0")


@pytest.mark.parametrize(
    ("error", "deaths"), [(redis.ResponseError("ERR refused"), 0), (SystemExit(), 1)]
)
def test_drain_counts_a_death_only_if_its_process_ends(
    lane, configured, monkeypatch, error, deaths
):
    lane.push(1)
    monkeypatch.setattr(wake, "_PAUSE_SECONDS", 0.0)

    class Failing(Handler):
        def handle(self, head):
            if not deaths:  # the release is refused, too, for a moment
                configured("min-replicas-to-write", 1)
                threading.Timer(0.5, configured, ["min-replicas-to-write", 0]).start()
            raise error

    lease = lease_of(lane, "a")
    with pytest.raises(type(error)):
        wake._run(Drain(lease, Failing()), lease)
    assert lease.store.claim("0", "b", LEASE).deaths == deaths


def sent(store, number=1, token="a"):
    return store.send_commit("0", token, LEASE, number, Done(0, number, 1))


def test_commit_whose_connection_is_cut_is_sent_again(lane, valkey):
    lane.push(1, 2, 3)
    lane.claim()
    with Proxy(valkey.port) as proxy, redis.Redis(port=proxy.port, db=9) as client:
        store = LaneStore(client, KEY, lambda: lane.now)
        sent(store)()
        proxy.stall(Way.TO_CLIENT)
        result = sent(store, 2)
        wait_until(lambda: lane.cursor() == 2, "the commit to arrive")
        proxy.cut()
        proxy.heal()
        result()
        result()
        assert lane.cursor() == 2
        proxy.refuse()
        proxy.cut()
        result = sent(store, 3)  # cannot even be sent
        with pytest.raises(redis.ConnectionError):
            result()
        proxy.heal()
        result()
        assert lane.cursor() == 3


def test_commit_is_sent_to_a_server_that_does_not_know_its_script_yet(lane):
    lane.push(1)
    lane.claim()
    lane.client.script_flush()
    sent(lane.store)()
    assert lane.cursor() == 1


def test_claims_and_commits_use_one_connection_again(lane):
    lane.push(1, 2, 3)
    before = lane.client.info("stats")["total_connections_received"]
    lane.claim()
    for number in (1, 2, 3):
        sent(lane.store, number)()
    assert lane.client.info("stats")["total_connections_received"] == before + 1


def test_commit_that_was_sent_tells_that_the_lease_is_lost(lane):
    lane.push(1)
    lane.claim()
    result = sent(lane.store, token="other")
    with pytest.raises(LostLease):
        result()


def test_lanes_are_drained_while_redis_is_full(lane, configured):
    lane.push(1, 2, 3)
    used = lane.client.info("memory")["used_memory"]
    configured("maxmemory", max(used // 2, 1))
    with pytest.raises(redis.ResponseError, match="memory"):
        lane.client.set("more", "x")
    handler = Handler()
    lease = lease_of(lane, "a")
    wake._run(Drain(lease, handler), lease)
    assert handler.steps == [0, 1, 2]
    assert not lane.client.exists(f"{KEY}.0")


def documented_commands():
    """The commands that docs/redis.md names for lanes, besides those of every push."""
    text = (ROOT / "docs/redis.md").read_text()
    rows = re.findall(r"^\| (?:the commands of the step|ordered handlers).*$", text, re.MULTILINE)
    return re.findall(r"`([A-Z ]+)`", "".join(rows))


def test_lanes_need_only_the_commands_that_are_documented(client, valkey):
    commands = [name.lower().replace(" ", "|") for name in documented_commands()]
    assert len(commands) > 20
    client.acl_setuser(
        "lanes",
        enabled=True,
        passwords=["+secret"],
        keys=["_flash.*", QUEUE],
        commands=[f"+{name}" for name in (*commands, "eval", "select", "hello", "client|setinfo")],
    )
    options = {"port": valkey.port, "db": 9, "username": "lanes", "password": "secret"}
    try:
        with redis.Redis(**options) as limited:
            for seed in range(20):
                world = World(client, seed, Faults(crash=2), changes=8, limited=limited)
                world.run()
            letters = LaneLetters(limited, KEY)
            letters.note([0], {"1:0": Noted((1, 0, 0, 0), "public.t", frozenset({7}))})
            letters.supersede(0, ["1:0"])
            assert letters.superseded([0], "1:0")
            letters.forget([0], ["another"])
            assert world.store.remove("_flash.ordered", KEY) == 0
            assert client.keys("_flash.*") == []
    finally:
        client.acl_deluser("lanes")
