"""Celery's command line in processes that kill themselves at a step of their work:

    python -m tests.acceptance.failpoints read:1 publish:3 -- -A shop flash replicate

There is a process for each failpoint, one after the other, each killed (SIGKILL) when it comes to
its step for so many times; the last one has none. `name:n+` means again and again, until a process
gets as far as creating the slot. They are forked from one, so that Celery is imported once. With
`--stop` before them there is one process, which stops itself (SIGSTOP) at each of these steps.
"""

import functools
import itertools
import os
import pkgutil
import signal
import sys
from dataclasses import dataclass
from enum import Enum, auto

import celery.__main__

import flash_celery.publishing.brokers.amqp
import flash_celery.publishing.brokers.redis
import flash_celery.worker.replicator  # noqa: F401 - imported for all of them
from example_project.servers import end_with_parent

#: The method of AMQP that publishes: class 60, method 40.
_BASIC_PUBLISH = b"\x00\x3c\x00\x28"
#: Tags of pgoutput that begin, end or fill a transaction.
_TRANSACTIONS = frozenset(b"BCIUDTSEc")


class When(Enum):
    BEFORE, HALFWAY, AFTER = auto(), auto(), auto()


@dataclass(frozen=True)
class Step:
    """Where functions are looked up by their callers, and which of their calls count."""

    when: When
    targets: tuple
    counts: object = lambda arguments, result: True


def _said(arguments):
    sent = arguments[1]
    return sent if isinstance(sent, bytes) else b"".join(map(bytes, sent))


def _push(arguments, result):
    return b"LPUSH" in _said(arguments)


def _frames(arguments, result):
    return _BASIC_PUBLISH in _said(arguments)


def _changes(arguments, result):
    return any(message[0] in _TRANSACTIONS for message in result)


def _further():
    """Status messages that acknowledge something."""
    acknowledged = 0

    def counts(arguments, result):
        nonlocal acknowledged
        further = arguments[2] > acknowledged
        acknowledged = max(arguments[2], acknowledged)
        return further

    return counts


_STREAM = "flash_celery.postgres.stream:ReplicationConnection"
_PUBLISH = (
    "flash_celery.publishing.brokers.redis:RedisPublisher.publish",
    "flash_celery.publishing.brokers.amqp:AmqpPublisher.publish",
)
_REQUEUE = (
    "flash_celery.publishing.brokers.redis:RedisPublisher.requeue",
    "flash_celery.publishing.brokers.amqp:AmqpPublisher.requeue",
)
_REDIS = ("redis.connection:AbstractConnection.send_packed_command",)
_AMQP = ("amqp.transport:_AbstractTransport.write",)
_CHUNKS = "flash_celery.backfill.reading_thread:ReadingChunks"
_SPOOL = ("flash_celery.capture.spool:Spool.append",)

STEPS = {
    # From reading a change to acknowledging it.
    "read": Step(When.AFTER, (f"{_STREAM}.receive",), _changes),
    "publish": Step(When.BEFORE, _PUBLISH),
    "half a push": Step(When.HALFWAY, _REDIS, _push),
    "half a frame": Step(When.HALFWAY, _AMQP, _frames),
    "pushed": Step(When.AFTER, _REDIS, _push),
    "sent": Step(When.AFTER, _AMQP, _frames),
    "confirmed": Step(When.AFTER, _PUBLISH),
    "moved": Step(When.AFTER, _REQUEUE),
    "acknowledge": Step(When.BEFORE, (f"{_STREAM}.send_status",), _further()),
    "acknowledged": Step(When.AFTER, (f"{_STREAM}.send_status",), _further()),
    # A transaction that is streamed while it is open.
    "spool": Step(When.BEFORE, _SPOOL),
    "spooled": Step(When.AFTER, _SPOOL),
    "replayed": Step(When.AFTER, ("flash_celery.capture.transactions:Transactions.replay",)),
    # Requests of backfills that are not committed yet, and a chunk of one.
    "requested": Step(When.AFTER, ("flash_celery.backfill.requests:request",)),
    "chunk begun": Step(When.AFTER, ("flash_celery.backfill.chunks:ChunkReader._snapshot",)),
    "chunk rows": Step(When.AFTER, ("flash_celery.backfill.copied_rows:split",)),
    "chunk confirmed": Step(When.BEFORE, (f"{_CHUNKS}._record",)),
    "chunk recorded": Step(When.AFTER, (f"{_CHUNKS}._record",)),
    # Start-up.
    "statement": Step(When.BEFORE, ("flash_celery.provisioning.ddl:_run",)),
    "statement done": Step(When.AFTER, ("flash_celery.provisioning.ddl:_run",)),
    "slot": Step(When.BEFORE, ("flash_celery.postgres.slots:create",)),
    "slot created": Step(When.AFTER, ("flash_celery.postgres.slots:create",)),
    "slot noted": Step(When.AFTER, ("flash_celery.provisioning.record:remember_slot",)),
    "started": Step(When.AFTER, (f"{_STREAM}.start",)),
}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def install(name, number=1, end=kill):
    """Have this process killed at the step, when it comes to it for the `number`th time."""
    step = STEPS[name]
    calls = itertools.count(1)
    for target in step.targets:
        place, _, attribute = target.replace(":", ".").rpartition(".")
        owner = pkgutil.resolve_name(place)
        real = getattr(owner, attribute)
        setattr(owner, attribute, _wrapped(real, step, lambda: next(calls) == number, end))


def _wrapped(real, step, due, end):
    @functools.wraps(real)
    def wrapper(*arguments, **more):
        if step.when is not When.AFTER and step.counts(arguments, None) and due():
            if step.when is When.HALFWAY:
                statement = _said(arguments)
                half, rest = statement[: len(statement) // 2], statement[len(statement) // 2 :]
                real(arguments[0], half if isinstance(arguments[1], bytes) else [half])
                arguments = arguments[0], rest if isinstance(arguments[1], bytes) else [rest]
            end()
        result = real(*arguments, **more)
        if step.when is When.AFTER and step.counts(arguments, result) and due():
            end()
        return result

    return wrapper


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def main(failpoints, arguments):
    sys.argv = ["celery", *arguments]
    if failpoints[:1] == ["--stop"]:
        for failpoint in failpoints[1:]:
            name, _, number = failpoint.partition(":")
            install(name, int(number), stop)
        return celery.__main__.main()
    for failpoint in failpoints:
        name, _, number = failpoint.partition(":")
        again = True
        while again:
            further, notify = os.pipe()
            child = os.fork()
            if child == 0:
                (end_with_parent(signal.SIGKILL) or (lambda: None))()
                install(name, int(number.rstrip("+")))
                if number.endswith("+"):
                    install("slot", end=lambda: (os.write(notify, b"x"), kill()))  # noqa: B023
                return celery.__main__.main()
            os.close(notify)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                return f"It was not killed at {failpoint}: {status}"
            got_through = os.read(further, 1)
            os.close(further)
            again = number.endswith("+") and not got_through
            print("Got past" if got_through else "Killed at", failpoint, flush=True)
    print("The last one", flush=True)
    return celery.__main__.main()


if __name__ == "__main__":
    divider = sys.argv.index("--")
    sys.exit(main(sys.argv[1:divider], sys.argv[divider + 1 :]))
