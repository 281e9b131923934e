"""Fixtures that several unit tests share."""

import threading

import pytest
from kombu import Queue

from flash_celery.errors import PublishError
from flash_celery.messages.deduplication import Lease
from flash_celery.publishing import thread as publishing
from flash_celery.publishing.brokers.memory import MemoryPublisher
from flash_celery.publishing.thread import Claim, PublishingThread


class Flaky(MemoryPublisher):
    """Takes as many messages as `failures` has next, then fails; with none left, takes all."""

    def __init__(self):
        super().__init__()
        self.failures = []
        self.longest_pause = 15.0
        self.opened = 0
        self.tried = threading.Event()

    def open(self, queues):
        super().open(queues)
        self.opened += 1

    def publish(self, messages):
        self.tried.set()
        if self.failures:
            taken = self.failures.pop(0)
            super().publish(messages[:taken])
            error = PublishError("It failed.")
            error.confirmed, error.longest_pause = taken, self.longest_pause
            raise error
        super().publish(messages)


class Reader:
    """The reading thread, and the progress of its session."""

    def __init__(self, confirm=None):
        self.confirmed = []
        self.failed = []
        self.confirm = confirm or self.confirmed.append
        self.fail = self.failed.append

    def wake(self):
        """Nothing waits."""


class ObservedThread(PublishingThread):
    """The publishing thread with a publisher that can fail, and the reports that it made."""

    def __init__(self):
        self.publisher = Flaky()
        reader = Reader()
        self.confirmed, self.failed = reader.confirmed, reader.failed
        #: The numbers of the messages that `consume` took.
        self.read = []
        super().__init__(self.publisher, [Queue("flash")], reader, 0.02)
        self._session = Claim(Lease("", ""), reader)

    def consume(self):
        """Take every message out of the queue, which has room for ten."""
        queue = self.publisher.queues.get("flash", [])
        assert len(queue) <= 10
        self.read += [int(message.body) for message in queue]
        queue.clear()


@pytest.fixture
def thread(monkeypatch):
    monkeypatch.setattr(publishing, "delays", lambda: iter(lambda: 0.01, None))
    thread = ObservedThread()
    yield thread
    thread.end()
    if thread.is_alive():
        thread.join(5)
    assert not thread.is_alive()
