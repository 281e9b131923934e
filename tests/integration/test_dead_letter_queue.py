"""The dead-letter queue on real brokers: reading neither loses nor reorders dead letters."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import redis
from celery import Celery

from example_project.servers import wait_until
from flash_celery.dead_letters import letters
from flash_celery.dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from flash_celery.monitoring.broker import Broker
from flash_celery.publishing import declared_queues
from flash_celery.publishing.brokers import for_app

#: More than are read from Redis at a time.
COUNT = 45
IDS = [f"letter-{number:02}" for number in range(COUNT)]

READ_AND_BE_KILLED = """
import os, signal, sys
from celery import Celery
from flash_celery.dead_letters.queue import DeadLetterQueue
app = Celery(broker=sys.argv[1])
app.conf.update(eval(sys.argv[2]))
with DeadLetterQueue(app, "flash.dead")._open() as read:
    for _, (letter, remove) in zip(range(30), read):
        if letter.id == "letter-07":
            remove()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["redis", "prefixed", "classic", "quorum"])
def app(request):
    conf = {"result_backend": None}
    if request.param in ("redis", "prefixed"):
        server = request.getfixturevalue("valkey")
        with redis.Redis(port=server.port) as client:
            client.flushall()
        if request.param == "prefixed":
            conf["broker_transport_options"] = {"global_keyprefix": "shop:"}
    else:
        server = request.getfixturevalue("rabbit")
        server.empty()
        if request.param == "quorum":
            conf["task_default_queue_type"] = "quorum"
    app = Celery(broker=server.url)
    app.conf.update(conf)
    app.test_conf = conf
    yield app
    app.close()


@pytest.fixture
def box(app):
    publisher = for_app(app)
    publisher.open([declared_queues.queue(app, "flash.dead")])
    for id in IDS:
        message = SimpleNamespace(
            headers={"id": id, "task": "shop.handle"},
            properties={},
            body="[[], {}, {}]",
            content_type="application/json",
            content_encoding="utf-8",
        )
        letter = letters.from_message(message, "flash", error="ValueError", text="no", traceback="")
        publisher.publish([letters.encode(app, letter, "flash.dead")])
    publisher.close()
    return DeadLetterQueue(app, "flash.dead")


def ids(box):
    """In the order of the queue; a quorum queue may shuffle what was given back."""
    with box._open() as read:
        ids_read = [letter.id for letter, _ in read]
    return sorted(ids_read) if box._app.conf.task_default_queue_type == "quorum" else ids_read


def test_dead_letters_keep_their_order_if_a_reader_is_killed(app, box):
    assert ids(box) == IDS
    command = [sys.executable, "-c", READ_AND_BE_KILLED, app.conf.broker_url, repr(app.test_conf)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    # RabbitMQ puts them back when it sees that the reader is gone.
    wait_until(lambda: box.count() >= COUNT - 1, "the letters to be back")
    left = ids(box)
    assert [id for id in left if id != "letter-07"] == [id for id in IDS if id != "letter-07"]
    # A quorum queue counts deliveries; RabbitMQ 4 gives up after 20 by default.
    for _ in range(25):
        box.find(DeadLetterFilter())
    assert ids(box) == left


def test_dead_letters_can_be_removed_from_the_middle(app, box):
    some = [letter for letter in box.find(DeadLetterFilter()) if letter.id[-1] in "05"]
    assert box.drop(some) == 9
    assert ids(box) == [id for id in IDS if id[-1] not in "05"]
    assert box.drop(some) == 0
    assert box.drop(box.find(DeadLetterFilter())) == COUNT - 9
    assert ids(box) == []


def test_dead_letters_are_counted_without_being_taken(app, box):
    watched = Broker(app, ["flash", "not there"], "flash.dead")
    for _ in range(2):  # the second time on the same connection, or a new one
        depths = watched.depths()
        assert depths["flash.dead"] == COUNT
        on_redis = app.conf.broker_url.startswith("redis")
        assert depths["not there"] == (0 if on_redis else None)
        newest = watched.newest_dead(COUNT)
        assert [letter["id"] for letter in newest] == (IDS[:-6:-1] if on_redis else [])
    assert all(letter["error"] == "ValueError: no" for letter in newest)
    watched.close()
    assert ids(box) == IDS


@pytest.mark.parametrize("app", ["redis", "prefixed"], indirect=True)
def test_dead_letter_monitoring_survives_foreign_messages(app, box, valkey):
    prefix = app.conf.broker_transport_options.get("global_keyprefix", "")
    with redis.Redis(port=valkey.port) as client:
        client.lpush(f"{prefix}flash.dead", "{", "[1]", '{"body": 5}')
    watched = Broker(app, [], "flash.dead")
    count = watched.depths()["flash.dead"]
    assert [letter["id"] for letter in watched.newest_dead(count)] == IDS[:-3:-1]
    watched.close()
