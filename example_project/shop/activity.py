"""Record the shop's activity as it happens: its commits, and the handlers that run for them.

The web page and the demo read it. The events are in a short Redis stream, so that a reader that
reconnects continues where it stopped.
"""

import json
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache

from celery.signals import task_postrun, task_prerun
from django.conf import settings
from django.db import connection, transaction

from flash_celery import UNCHANGED, Change, Changes, Operation

STREAM = "shop.activity"
#: The least number of events that the stream keeps.
MAX_KEPT = 1000
#: The number of events that a page shows when it is opened.
MAX_SHOWN = 200
#: Seconds without an event after which a stream sends a sign of life, and so finds a lost reader.
HEARTBEAT = 2
WRITES = ("INSERT", "UPDATE", "DELETE", "DO ")
#: The open `written_by` blocks of tasks that run in this process, by the task's id.
_running = {}


@cache
def redis():
    """Return a client of the Redis of `SHOP_CACHE_URL`, or None."""
    from redis import Redis

    url = settings.CACHES["default"].get("LOCATION")
    return Redis.from_url(url, decode_responses=True) if url else None


def record(kind, **fields):
    """Add an event to the stream."""
    if redis() is not None:
        event = json.dumps({"kind": kind, "at": time.time() * 1000, **fields})
        redis().xadd(STREAM, {"event": event}, maxlen=MAX_KEPT, approximate=True)


def newest():
    """Return the id of the last event."""
    entries = redis().xrevrange(STREAM, count=1)
    return entries[0][0] if entries else "0"


def events(after=None, heartbeat=HEARTBEAT):
    """Yield events with their ids, forever.

    Begin after the event with the id `after`, or else with the last events of the stream. Yield
    `(None, None)` after each `heartbeat` seconds without an event.
    """
    if after is None:
        entries = redis().xrevrange(STREAM, count=MAX_SHOWN)[::-1]
        after = entries[-1][0] if entries else "0"
        yield from ((id, fields["event"]) for id, fields in entries)
    while True:
        # Shorter than redis-py's own timeout for an answer.
        streams = redis().xread({STREAM: after}, block=int(heartbeat * 1000))
        for id, fields in streams[0][1] if streams else ():
            after = id
            yield id, fields["event"]
        if not streams:
            yield None, None


@contextmanager
def written_by(origin, **fields):
    """Record each transaction that commits in this block, with its origin and its statements."""
    transactions = {}

    def on_commit(xid):
        record("commit", xid=xid, origin=origin, statements=transactions.pop(xid), **fields)

    def on_statement(execute, sql, params, many, context):
        if not sql.lstrip().upper().startswith(WRITES):
            return execute(sql, params, many, context)
        # The statement and the query for the transaction's id must be in one transaction.
        with transaction.atomic(savepoint=False):
            result = execute(sql, params, many, context)
            query = "SELECT pg_current_xact_id()::xid::text"
            xid = int(connection.connection.execute(query).fetchone()[0])
            if xid not in transactions:
                transactions[xid] = []
                transaction.on_commit(lambda: on_commit(xid), robust=True)
            cursor = context["cursor"].cursor
            statement = sql if many else connection.ops.last_executed_query(cursor, sql, params)
            transactions[xid].append(statement)
        return result

    with connection.execute_wrapper(on_statement):
        yield


@task_prerun.connect
def record_start(task_id, task, args, **_):
    """Record that a handler starts, with its changes."""
    changes = args[0] if args and isinstance(args[0], Changes) else list(args or ())
    if not changes or not isinstance(changes[0], Change):
        return
    handler = task.name.rpartition(".")[2]
    now = datetime.now(timezone.utc)
    record(
        "start",
        task=task_id,
        handler=handler,
        changes=[_describe(change) for change in changes],
        milliseconds=(now - changes[0].committed_at).total_seconds() * 1000,
    )
    _running[task_id] = written_by("handler", handler=handler, task=task_id)
    _running[task_id].__enter__()


@task_postrun.connect
def record_end(task_id, state=None, **_):
    """Record that a handler has ended, with the state of its task."""
    if block := _running.pop(task_id, None):
        block.__exit__(None, None, None)
        record("end", task=task_id, state=state)


def _describe(change):
    operation = change.operation.names()[0]
    changed = f" ({', '.join(sorted(change.changed))})" if change.changed else ""
    key = ",".join(str(value) for value in change.key.values())
    return {
        "operation": operation,
        "table": change.table,
        "key": key,
        "changed": changed,
        "values": _values(change),
        "xid": change.xid,
        "committed": change.committed_at.timestamp() * 1000,
    }


def _values(change):
    """Return name, old and new value of the columns that an update has changed.

    If the old row is unknown, return the new values of all columns.
    """
    if change.operation is not Operation.UPDATE:
        return []
    if change.changed is None:
        return [[name, None, _text(change.new, name)] for name in change.new if name != "id"]
    return [
        [name, _text(change.old, name), _text(change.new, name)] for name in sorted(change.changed)
    ]


def _text(row, name):
    if name not in row or row[name] is UNCHANGED:
        return None
    return str(row[name])[:60]
