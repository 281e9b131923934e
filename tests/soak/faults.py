"""Random faults. Each does harm and repairs it; it may return a function that repairs the rest."""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from example_project.servers import wait_until
from tests.proxy import Way


@dataclass(frozen=True)
class Fault:
    """`strike(stage, choose)`, with a `Random`."""

    name: str
    strike: Callable
    #: All is well when a change has been handled; of the others, when it is in the queue.
    recovered: str = "enqueued"
    #: How often Celery's consumer on Redis may lose the message it takes just then.
    loses_on_redis: int = 0
    #: Strikes half of the time while the broker answers late, so that much is under way.
    crowded: bool = False
    #: The brokers that it may strike: between us and those behind a Sentinel is no proxy, and the
    #: Celery worker dies with each failover.
    brokers: tuple = ("redis", "rabbitmq", "sentinel")
    #: Whether recovery counts from the beginning of the harm.
    promotes: bool = False


def _kill_reader(stage, choose):
    stage.some_reader().send(signal.SIGKILL)


def _restart_reader(stage, choose):
    stage.some_reader().send(signal.SIGTERM)


def _stop_reader(stage, choose):
    """The other one takes over; the first wakes up and finds that it has been replaced."""
    reader = stage.some_reader()
    reader.send(signal.SIGSTOP)

    def wake():
        time.sleep(choose.uniform(0, 5))
        reader.send(signal.SIGCONT)

    return wake


def _kill_worker(stage, choose):
    stage.worker.send(signal.SIGKILL)


def _kill_child(stage, choose):
    if children := stage.worker.children():
        # It may just have ended.
        with contextlib.suppress(ProcessLookupError):
            choose.choice(children).send_signal(signal.SIGKILL)


def _terminate(which, stage, choose):
    stage.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {which}")


def _restart_postgres(number, stage, choose):
    stage.postgres.stop(number)
    time.sleep(choose.uniform(0, 2))
    stage.postgres.start()


def _kill_broker(stage, choose):
    stage.broker.stop(signal.SIGKILL)
    time.sleep(choose.uniform(0, 2))
    stage.broker.start()


def _fail_over(stage, choose):
    """Sentinel promotes the replica, which has everything that was confirmed.

    Celery's worker does not always live through it: it ends, or stays and consumes nothing.
    """
    former = stage.broker.port
    mend = choose.choice([stage.broker.hand_over, stage.broker.kill])()
    wait_until(lambda: stage.broker.port != former, "the promotion")
    stage.worker.send(signal.SIGKILL)
    return mend


def _fill_broker(stage, choose):
    """Nothing more may be stored; what is there may be read."""
    if stage.kind == "redis":
        import redis

        with redis.Redis(port=stage.broker.port) as client:
            client.config_set("maxmemory", 1)
            time.sleep(choose.uniform(1, 5))
            client.config_set("maxmemory", 0)
    else:
        limit, full, free = choose.choice(
            [
                ("set_vm_memory_high_watermark", "0.00001", "0.6"),
                ("set_disk_free_limit", "1000000000000000", "50000000"),
            ]
        )
        stage.broker.control(limit, full)
        time.sleep(choose.uniform(1, 5))
        stage.broker.control(limit, free)


def _delete_queue(stage, choose):
    """Delete the queue of a handler that never runs: the messages in a deleted queue are lost."""
    if stage.kind != "rabbitmq":
        import redis

        with redis.Redis(port=stage.broker.port) as client:
            client.delete("spare")
    else:
        stage.broker.control("delete_queue", "spare")


def _through(proxy, harm, stage, choose):
    through = getattr(stage, proxy)
    time.sleep(harm(through, choose) or 0.0)
    through.heal()


def _cut(proxy, choose):
    proxy.cut()


def _half_close(proxy, choose):
    proxy.half_close(choose.choice([Way.TO_CLIENT, Way.TO_SERVER]))


def _stall(proxy, choose):
    proxy.stall(choose.choice([Way.TO_CLIENT, Way.TO_SERVER, Way.BOTH]))
    return choose.uniform(1, 15)


def _delay(proxy, choose):
    proxy.delay(choose.uniform(0.02, 0.3))
    return choose.uniform(2, 6)


def _throttle(proxy, choose):
    proxy.throttle(choose.uniform(5_000, 50_000))
    return choose.uniform(2, 6)


_HARMS = {
    "cut": _cut,
    "half-closed": _half_close,
    "stalled": _stall,
    "slow": _delay,
    "throttled": _throttle,
}
_STREAM = "backend_type = 'walsender'"
_SECOND = "usename LIKE 'reader_%' AND backend_type = 'client backend'"

_DIRECT = "redis", "rabbitmq"
FAILOVER = Fault(
    "Sentinel: failover",
    _fail_over,
    loses_on_redis=2,  # its Redis, and then itself
    brokers=("sentinel",),
    promotes=True,
)

FAULTS = [
    Fault("replicate: SIGKILL", _kill_reader, crowded=True),
    Fault("replicate: SIGTERM", _restart_reader, crowded=True),
    Fault("replicate: SIGSTOP, then SIGCONT", _stop_reader, crowded=True),
    Fault("Celery worker: SIGKILL", _kill_worker, "handled", loses_on_redis=1, brokers=_DIRECT),
    Fault("Celery worker: SIGKILL of a child", _kill_child, "handled", brokers=_DIRECT),
    Fault("walsender terminated", partial(_terminate, _STREAM), crowded=True),
    Fault("second connection terminated", partial(_terminate, _SECOND), crowded=True),
    Fault("PostgreSQL: stop -m fast", partial(_restart_postgres, signal.SIGINT), crowded=True),
    Fault(
        "PostgreSQL: stop -m immediate", partial(_restart_postgres, signal.SIGQUIT), crowded=True
    ),
    Fault("broker: SIGKILL", _kill_broker, loses_on_redis=1, brokers=_DIRECT),
    Fault("broker full", _fill_broker, loses_on_redis=1, brokers=_DIRECT),
    FAILOVER,
    Fault("a queue deleted", _delete_queue),
    *(
        Fault(
            f"network to {name} {how}",
            partial(_through, proxy, harm),
            crowded=proxy == "to_postgres",
            brokers=_DIRECT if proxy == "to_broker" else Fault.brokers,
        )
        for name, proxy in (("PostgreSQL", "to_postgres"), ("broker", "to_broker"))
        for how, harm in _HARMS.items()
    ),
]
