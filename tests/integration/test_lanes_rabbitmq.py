"""Lanes on RabbitMQ: the real publisher, drain and sweep, with drains that are killed."""

import json
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest

from example_project.servers import wait_until
from flash_celery.changes import payload
from flash_celery.errors import LanesNotReady, PublishError
from flash_celery.lanes import amqp_drain, amqp_sweep
from flash_celery.lanes.amqp_drain import AmqpDrain
from flash_celery.lanes.amqp_link import Link, LostLink
from flash_celery.lanes.drain import Later, Limits
from flash_celery.messages import lane_entries
from flash_celery.messages.deduplication import NOTHING
from flash_celery.messages.lane_messages import LaneForm, LaneMessage
from flash_celery.messages.lane_placing import Place
from flash_celery.messages.lane_transports import RABBITMQ
from flash_celery.messages.task_message import Form
from flash_celery.publishing.brokers.amqp import AmqpPublisher
from flash_celery.publishing.brokers.amqp_lanes import address, head_queue, look

from .lane_world import delivery

KEY, QUEUE = "_flash.ordered.1.slot.handler", "wakes"


#: For tests of what differs between the types of queues.
both_types = pytest.mark.parametrize("world", ["classic", "quorum"], indirect=True)


class Killed(BaseException):
    """The process of a drain has ended."""


def numbers(head):
    """The numbers of the changes, as `delivery` has made them."""
    return [int(change.commit_lsn) - 1 for change in head.changes]


class Calls:
    """A handler that notes its calls, and may do something else first."""

    def __init__(self, size=1, act=lambda head: None):
        self.size = size
        self.act = act
        self.heads = []

    def read_form(self, text):
        assert json.loads(text)["queue"] == QUEUE

    def handle(self, head):
        verdict = self.act(head)
        if verdict is None:
            self.heads.append(head)
        return verdict

    @property
    def handled(self):
        return [number for head in self.heads for number in numbers(head)]


class World:
    """The lanes of one handler, and what publishes to them."""

    def __init__(self, app, most_repeated):
        self.app = app
        #: How many changes of a key may come again after a kill.
        self.most_repeated = most_repeated
        self.form = self.form_of(2)
        self.publisher = AmqpPublisher(app)
        self.publisher.open([app.amqp.queues[QUEUE]])
        self.publisher.prepare([self.form])
        self.count = Counter()

    @staticmethod
    def form_of(lanes, declared="", paused=False):
        form = Form(QUEUE, "handler", {"task": "handler"}, {"delivery_mode": 2})
        return LaneForm(
            KEY, "1/slot", "handler", lanes, form, declared, paused=paused, transport=RABBITMQ
        )

    def push(self, count=1, lane=0):
        """Append changes with ascending numbers to a lane."""
        first = self.count[lane]
        self.count[lane] += count
        texts = [
            lane_entries.encode(payload.encode([delivery(number)]), [Place(lane, lane)])
            for number in range(first, first + count)
        ]
        pushes = [(lane, 1, text) for text in texts]
        self.publisher.publish([LaneMessage(self.form, pushes, NOTHING)])

    def drain(self, calls, lane=0, link=None, died=False, budget=10.0, changes=10_000):
        link = link or Link(self.app)
        limits = Limits(budget, changes)
        drained = AmqpDrain(link, address(self.form, lane), calls, limits, died=died)
        try:
            drained.run()
        finally:
            link.close()

    def wakes(self):
        """Take all wakes that wait, and return the lanes that they are of."""
        channel = self.publisher.channel.connection.channel()
        found = []
        while (message := channel.basic_get(QUEUE, no_ack=True)) is not None:
            found.append(json.loads(message.body)[0][2])
        channel.close()
        return found

    def ready(self, queue):
        return look(self.publisher.channel, queue).ready


@pytest.fixture
def world(request, new_app, rabbit):
    """Lanes in classic queues, or in those that the test asks for."""
    kind = getattr(request, "param", "classic")
    rabbit.empty()
    app = new_app(
        broker_url=rabbit.url,
        task_default_queue=QUEUE,
        task_default_queue_type=kind,
    )
    created = World(app, {"classic": 1, "quorum": 50}[kind])
    yield created
    created.publisher.close()


def kill(link):
    """End a connection as the kernel ends that of a killed process."""
    link._publisher.channel.connection.transport.sock.close()
    raise Killed


def test_rabbitmq_drain_looks_before_it_consumes_and_again_when_it_ends(world):
    world.push(3)
    assert world.wakes() == [f"{KEY}.0"]
    other = Calls()

    def act(head):
        world.drain(other)  # a second wake, while the first one is handled
        if numbers(head) == [2]:
            world.push(1)  # after the look of this drain

    calls = Calls(act=act)
    world.drain(calls, changes=3)
    assert calls.handled == [0, 1, 2]
    assert other.handled == []
    assert set(world.wakes()) == {f"{KEY}.0"}
    world.drain(other)
    assert other.handled == [3]
    assert world.wakes() == []


def test_rabbitmq_lane_that_is_not_empty_has_one_wake(world):
    for _ in range(3):
        world.push(2)
    assert world.wakes() == [f"{KEY}.0"]
    calls = Calls(act=lambda head: world.push(1) if numbers(head) == [1] else None)
    world.drain(calls)
    assert calls.handled == list(range(6)) or calls.handled == list(range(7))
    assert world.wakes() == [f"{KEY}.0"] * (7 - len(calls.handled))


@both_types
def test_rabbitmq_drain_gives_back_what_its_budget_leaves_in_order(world):
    world.push(120)
    handled = []
    for _ in range(12):
        calls = Calls()
        world.drain(calls, changes=10)
        handled += calls.handled
    assert handled == list(range(120))
    assert world.ready(f"{KEY}.0") == 0


@both_types
def test_rabbitmq_drains_that_are_closed_again_and_again_lose_nothing(world):
    """A quorum queue drops what was redelivered too often."""
    world.push(30)
    for _ in range(30):
        link = Link(world.app)
        with suppress(Killed):
            world.drain(Calls(act=lambda head, link=link: kill(link)), link=link, died=True)
    calls = Calls()
    wait_until(lambda: world.drain(calls, died=True) or calls.handled, "the lane to be free")
    assert calls.handled == list(range(30))


@both_types
def test_rabbitmq_drain_counts_the_deaths_of_the_first_change_only(world):
    world.push(2)
    link = Link(world.app)
    with pytest.raises(Killed):
        world.drain(Calls(act=lambda head: kill(link)), link=link)
    calls = Calls()
    world.drain(calls, died=True)
    assert [(*numbers(head), head.deaths) for head in calls.heads] == [(0, 1), (1, 0)]
    assert world.ready(head_queue(f"{KEY}.0")) == 0


def test_rabbitmq_drain_waits_for_short_countdowns_and_leaves_for_long_ones(world, monkeypatch):
    world.push(2)
    verdicts = [Later(0.2, 1), Later(1.5, 2)]
    seen = []

    def act(head):
        seen.append((*numbers(head), head.retries))
        return verdicts.pop(0) if verdicts else None

    world.wakes()
    monkeypatch.setattr(amqp_drain, "_WAIT_SECONDS", 1.0)
    calls = Calls(act=act)
    world.drain(calls)
    assert seen == [(0, 0), (0, 1)]
    world.drain(calls)  # another wake, before it is time
    assert len(seen) == 2
    wait_until(lambda: world.wakes() == [f"{KEY}.0"], "the delayed wake")
    world.drain(calls)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert calls.handled == [0, 1]


def test_rabbitmq_drain_of_batches_takes_the_changes_that_wait(world):
    world.push(70)
    calls = Calls(size=60)
    world.drain(calls)
    assert [len(head.changes) for head in calls.heads] == [60, 10]
    assert calls.handled == list(range(70))


def test_rabbitmq_drain_begins_no_change_once_its_connection_is_closed(world, rabbit):
    world.push(10)

    def act(head):
        if numbers(head) == [3]:
            rabbit.control("close_all_connections", "test")

    calls = Calls(act=act)
    with pytest.raises(LostLink):
        world.drain(calls)
    assert calls.handled == [0, 1, 2, 3]
    world.publisher.open([])
    again = Calls()
    world.drain(again)
    # The acknowledgement of the last one is lost with the connection.
    assert again.handled == list(range(3, 10))


@pytest.mark.soak
def test_rabbitmq_drain_does_not_wait_while_the_broker_is_full(world, rabbit):
    world.push(20)
    calls = Calls()
    rabbit.control("set_vm_memory_high_watermark", "0.0000001")
    try:
        with pytest.raises(LostLink, match="short of memory"):
            world.drain(calls, changes=5)
    finally:
        rabbit.control("set_vm_memory_high_watermark", "0.4")
    assert calls.handled == list(range(5))
    wait_until(lambda: world.drain(calls) or len(calls.handled) == 20, "the rest")
    assert calls.handled == list(range(20))


def test_rabbitmq_lanes_of_a_paused_handler_are_left_alone(world):
    world.publisher.prepare([world.form_of(2, paused=True)])
    world.form = world.form_of(2)
    world.push(3)
    assert world.wakes() == []
    calls = Calls()
    world.drain(calls)
    assert calls.handled == []
    world.publisher.prepare([world.form])
    assert world.wakes() == [f"{KEY}.0"]
    world.drain(calls)
    assert calls.handled == [0, 1, 2]


def test_rabbitmq_lanes_of_another_layout_wait_until_the_old_ones_are_empty(world):
    world.push(2)
    other = world.form_of(1, "another key")
    with pytest.raises(LanesNotReady):
        world.publisher.prepare([other])
    calls = Calls()
    world.drain(calls)
    world.publisher.prepare([other])
    assert look(world.publisher.channel, f"{KEY}.1") is None


def test_rabbitmq_sweep_wakes_a_lane_that_stands_still_less_and_less_often(world, monkeypatch):
    monkeypatch.setattr(amqp_sweep, "_PAUSE_SECONDS", 0.4)
    lanes = [address(world.form, number) for number in range(2)]
    amqp_sweep.watch(world.app, lanes)
    world.push(1)
    world.wakes()
    link = Link(world.app)
    woken = []
    began = time.monotonic()
    while time.monotonic() - began < 2:
        amqp_sweep.sweep(world.app, link)
        woken += world.wakes()
        time.sleep(0.1)
    link.close()
    assert woken == [f"{KEY}.0"] * 3  # at once, and 0.4 and 1.2 seconds later


class Worker(threading.Thread):
    """Takes wakes and drains lanes, and is killed now and then."""

    def __init__(self, run):
        super().__init__(daemon=True)
        self.run_ = run

    def run(self):
        while not self.run_.ended.is_set():
            with suppress(Killed, LostLink):
                self.work()

    def work(self):
        run = self.run_
        publisher = AmqpPublisher(run.world.app)
        publisher.open([])
        link = Link(run.world.app)
        try:
            channel = publisher.channel.connection.channel()
            while not run.ended.is_set():
                wake = channel.basic_get(QUEUE, no_ack=False)
                if wake is None:
                    time.sleep(0.005)
                    continue
                name = json.loads(wake.body)[0][2]
                calls = Calls(act=lambda head, name=name: run.handle(name, head, link))
                lane = address(run.world.form, int(name.rpartition(".")[2]))
                died = wake.delivery_info["redelivered"]
                AmqpDrain(link, lane, calls, Limits(0.2, 40), died=died).run()
                channel.basic_ack(wake.delivery_tag)
        finally:
            link.close()
            publisher.close()


class Run:
    """A schedule: changes are pushed while workers handle them, retry, and are killed."""

    LANES = 2

    def __init__(self, world, seed, changes):
        self.world = world
        self.random = random.Random(seed)
        self.changes = changes
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.handled = {f"{KEY}.{lane}": [] for lane in range(self.LANES)}
        self.in_call = Counter()
        self.faults = 0
        self.problems = []

    def handle(self, name, head, link):
        with self.lock:
            self.in_call[name] += 1
            if self.in_call[name] > 1:
                self.problems.append(f"two calls at once in {name}")
            chance = self.random.random()
        try:
            if chance < 0.02:
                return Later(self.random.choice([0.0, 0.05, 0.3]), head.retries + 1)
            killed_before = chance < 0.03
            if not killed_before:
                self.handled[name] += numbers(head)
        finally:
            with self.lock:
                self.in_call[name] -= 1
        if chance < 0.04:
            with self.lock:
                self.faults += 1
            kill(link)
        return None

    def sweep(self):
        amqp_sweep.watch(
            self.world.app, (address(self.world.form, lane) for lane in range(self.LANES))
        )
        link = Link(self.world.app)
        while not self.ended.wait(0.3):
            amqp_sweep.sweep(self.world.app, link)
        link.close()

    def run(self):
        threads = [Worker(self) for _ in range(3)]
        threads.append(threading.Thread(target=self.sweep, daemon=True))
        for thread in threads:
            thread.start()
        for _ in range(self.changes):
            for lane in range(self.LANES):
                self.world.push(1, lane)
        try:
            wait_until(self.is_done, "all changes to be handled", timeout=60)
        finally:
            self.ended.set()
            for thread in threads:
                thread.join(30)

    def is_done(self):
        return all(len(set(found)) == self.changes for found in self.handled.values())

    def check(self):
        assert self.problems == []
        for name, found in self.handled.items():
            assert list(dict.fromkeys(found)) == list(range(self.changes)), f"{name}: {found}"
            repeats = [after for before, after in pairwise(found) if after <= before]
            assert len(repeats) <= self.faults
            for before, after in pairwise(found):
                assert before - self.world.most_repeated < after <= before + 1, f"{name}: {found}"


def run_schedule(world, monkeypatch, seed, changes):
    monkeypatch.setattr(amqp_drain, "_WAIT_SECONDS", 0.1)
    run = Run(world, seed, changes)
    run.run()
    run.check()


@both_types
def test_rabbitmq_lanes_keep_the_order_in_a_schedule_of_kills(world, monkeypatch):
    run_schedule(world, monkeypatch, 1, 150)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
@both_types
def test_rabbitmq_lanes_keep_the_order_in_many_schedules_of_kills(world, monkeypatch, seed):
    run_schedule(world, monkeypatch, seed, 600)


def test_rabbitmq_lane_whose_queue_was_deleted_is_declared_again(world):
    world.push(1)
    world.publisher.channel.queue_delete(f"{KEY}.0")
    with pytest.raises(PublishError, match="no queue"):
        world.push(1)
    world.publisher.open([])
    world.push(1)
    calls = Calls()
    world.drain(calls)
    assert calls.handled == [2]


@pytest.mark.soak
def test_rabbitmq_lanes_need_only_the_permissions_that_are_documented(world, rabbit, new_app):
    rabbit.control("add_user", "lanes", "secret")
    lanes = r"^(_flash\.ordered\..*|wakes)$"
    write = r"^(_flash\.ordered\..*|wakes|amq\.default)$"
    rabbit.control("set_permissions", "-p", "/", "lanes", lanes, write, lanes)
    rabbit.empty()
    url = rabbit.url.replace("guest:guest", "lanes:secret")
    own = World(new_app(broker_url=url, task_default_queue=QUEUE), 1)
    own.push(2)
    verdicts = [Later(6.0, 1)]
    calls = Calls(act=lambda head: verdicts.pop() if verdicts else None)
    own.drain(calls)
    own.wakes()
    assert wait_until(own.wakes, "the delayed wake", 20) == [f"{KEY}.0"]
    own.drain(calls)
    assert calls.handled == [0, 1]
    own.publisher.close()
    rabbit.control("delete_user", "lanes")


@both_types
def test_rabbitmq_lane_with_marks_gets_nothing_behind_a_change_that_it_refuses(world, rabbit):
    """A mark would skip the refused change when it comes behind a newer one."""
    bounds = json.dumps({"max-length": 20, "overflow": "reject-publish"})
    rabbit.control("set_policy", "short", r"handler\.0$", bounds, "--apply-to", "queues")
    try:
        world.form = replace(world.form, marked=True)
        world.publisher.prepare([world.form])
        before = world.publisher._sent
        with pytest.raises(PublishError, match="no room"):
            world.push(100)
        sent = world.publisher._sent - before
        calls = Calls()
        world.drain(calls)
        # All but the last one, which was refused.
        assert calls.handled == list(range(sent - 1))
    finally:
        rabbit.control("clear_policy", "short")
