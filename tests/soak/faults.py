"""Random faults. Each does harm and repairs it; it may return a function that repairs the rest."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil

from example_project.servers import wait_until
from tests.proxy import Way
from tests.soak.calls import LEASE
from tests.soak.carried import APPLICATION


@dataclass(frozen=True)
class Fault:
    """`strike(stage, choose)`, with a `Random`."""

    name: str
    strike: Callable
    #: All is well when a change has been handled by this handler; else, when it is in the queue.
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
    #: Whether drains of lanes may be unable to commit what they did.
    uncommitted: bool = False


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


def _kill_drain(stage, choose):
    """Kill a process while it calls an ordered handler."""
    call, _ = stage.some_call(choose)
    began = time.time()
    with contextlib.suppress(ProcessLookupError):
        os.kill(call.pid, signal.SIGKILL)
    stage.harms.ended[call.pid] = began, time.time()


def _kill_lane_worker(stage, choose):
    """The processes of a worker die together, as with their machine."""
    _, worker = stage.some_call(choose)
    stage.kill_lane_worker(worker)


def _end_lane_worker(number, stage, choose):
    _, worker = stage.some_call(choose)
    pid, began = worker.pid, time.time()
    worker.send(number)
    wait_until(lambda: not psutil.pid_exists(pid), "the worker to end", 120)
    if number == signal.SIGQUIT:  # the calls under way end with it
        stage.harms.ended[pid] = began, time.time()


def _freeze_lane_worker(stage, choose):
    """A process stands still for longer than its lease while it calls a handler, or its worker."""
    call, worker = stage.some_call(choose)
    children = [child.pid for child in worker.children()]
    pids = choose.choice([[call.pid], [worker.pid, *children]])
    began = time.time()
    with contextlib.suppress(ProcessLookupError):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    time.sleep(LEASE + choose.uniform(1, 4))
    with contextlib.suppress(ProcessLookupError):
        for pid in pids:
            stage.harms.frozen.append((pid, began, time.time()))
            os.kill(pid, signal.SIGCONT)


def _restart_broker_in_a_drain(stage, choose):
    stage.some_call(choose)
    stage.broker.stop(choose.choice([signal.SIGTERM, signal.SIGKILL]))
    time.sleep(choose.uniform(0, 2))
    stage.broker.start()


def _empty_broker(stage, choose):
    """Redis forgets everything, and the replication worker fills its queues and lanes again."""
    import redis

    stage.harms.emptied.append(time.time())
    with redis.Redis(port=stage.broker.port) as client:
        client.flushall()
    # Rows of a backfill that has ended may have been in the queue.
    return stage.copy.begin


def _rotate_password(stage, choose):
    """Between the change and the file a replication worker may still ask for the old one."""
    stage.password(choose.randbytes(12).hex(), choose.uniform(0, 2))
    stage.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE " + _READERS)


def _terminate(which, stage, choose):
    stage.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {which}")


def _restart_postgres(number, stage, choose):
    stage.postgres.stop(number)
    time.sleep(choose.uniform(0, 2))
    stage.postgres.start()


def _kill_postgres(stage, choose):
    """SIGKILL to the server and to all its processes."""
    family = psutil.Process(stage.postgres.process.pid).children(recursive=True)
    stage.postgres.stop(signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, 30)
    stage.postgres.start()


def _kill_application(stage, choose):
    choose.choice(stage.applications).send(signal.SIGKILL)


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
    for worker in stage.lane_workers:
        stage.kill_lane_worker(worker)
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
_READERS = "usename LIKE 'reader_%'"
_STREAM = "backend_type = 'walsender'"
_SECOND = f"{_READERS} AND backend_type = 'client backend'"

_APPLICATIONS = f"application_name = '{APPLICATION}'"

_DIRECT = "redis", "rabbitmq"
FAILOVER = Fault(
    "Sentinel: failover",
    _fail_over,
    loses_on_redis=2,  # its Redis, and then itself
    brokers=("sentinel",),
    promotes=True,
    uncommitted=True,
)

FAULTS = [
    Fault("replicate: SIGKILL", _kill_reader, crowded=True),
    Fault("replicate: SIGTERM", _restart_reader, crowded=True),
    Fault("replicate: SIGSTOP, then SIGCONT", _stop_reader, crowded=True),
    Fault("Celery worker: SIGKILL", _kill_worker, "each", loses_on_redis=1, brokers=_DIRECT),
    Fault("Celery worker: SIGKILL of a child", _kill_child, "each", brokers=_DIRECT),
    Fault("walsender terminated", partial(_terminate, _STREAM), crowded=True),
    Fault("second connection terminated", partial(_terminate, _SECOND), crowded=True),
    Fault("PostgreSQL: stop -m fast", partial(_restart_postgres, signal.SIGINT), crowded=True),
    Fault(
        "PostgreSQL: stop -m immediate", partial(_restart_postgres, signal.SIGQUIT), crowded=True
    ),
    Fault("PostgreSQL: SIGKILL", _kill_postgres, crowded=True),
    Fault("application: SIGKILL", _kill_application, "carried"),
    Fault("application: connection terminated", partial(_terminate, _APPLICATIONS), "carried"),
    Fault("password changed", _rotate_password),
    Fault("broker: SIGKILL", _kill_broker, loses_on_redis=1, brokers=_DIRECT, uncommitted=True),
    Fault("broker full", _fill_broker, loses_on_redis=1, brokers=_DIRECT, uncommitted=True),
    Fault("broker emptied: FLUSHALL", _empty_broker, brokers=("redis",), uncommitted=True),
    FAILOVER,
    *(
        Fault(f"lanes: {what}", strike, "keyed")
        for what, strike in {
            "SIGKILL of a draining process": _kill_drain,
            "SIGKILL of a whole worker": _kill_lane_worker,
            "SIGTERM": partial(_end_lane_worker, signal.SIGTERM),
            "SIGQUIT": partial(_end_lane_worker, signal.SIGQUIT),
            "frozen for more than a lease": _freeze_lane_worker,
        }.items()
    ),
    Fault(
        "lanes: restart of the broker in a drain",
        _restart_broker_in_a_drain,
        "keyed",
        loses_on_redis=1,
        brokers=_DIRECT,
        uncommitted=True,
    ),
    *(
        Fault(
            f"lanes: network to broker {how}",
            partial(_through, "to_lanes", harm),
            "keyed",
            brokers=_DIRECT,
            uncommitted=True,
        )
        for how, harm in _HARMS.items()
    ),
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
