"""What the shop does, as it happens: the commits it makes and the handlers that are told of them.

The web page and the demo watch it. It is kept in a short Redis stream, so that whoever comes
late, or comes back, can read on from where they were.
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
#: So many events are kept, at least, and so many of them a page that is opened shows.
KEPT, SHOWN = 1000, 200
#: Seconds after which a stream says that it is still there, and sees whether its reader is.
HEARTBEAT = 2
WRITES = ("INSERT", "UPDATE", "DELETE")
# What the tasks that run in this process hold open, by the task's id.
_running = {}


@cache
def redis():
    """The Redis of `SHOP_CACHE_URL`, or `None`."""
    from redis import Redis

    url = settings.CACHES["default"].get("LOCATION")
    return Redis.from_url(url, decode_responses=True) if url else None


def tell(kind, **event):
    """Add an event for whoever watches."""
    if redis() is not None:
        said = json.dumps({"kind": kind, "at": time.time() * 1000, **event})
        redis().xadd(STREAM, {"event": said}, maxlen=KEPT, approximate=True)


def newest():
    """The id of the last event, to read on from."""
    found = redis().xrevrange(STREAM, count=1)
    return found[0][0] if found else "0"


def events(after=None, patience=HEARTBEAT):
    """Events with their ids, for ever: those after an id, or the last ones and what follows.

    `(None, None)` comes whenever there was nothing for so many seconds.
    """
    if after is None:
        shown = redis().xrevrange(STREAM, count=SHOWN)[::-1]
        after = shown[-1][0] if shown else "0"
        yield from ((number, fields["event"]) for number, fields in shown)
    while True:
        # Below redis-py's own time limit for an answer.
        found = redis().xread({STREAM: after}, block=int(patience * 1000))
        for number, fields in found[0][1] if found else ():
            after = number
            yield number, fields["event"]
        if not found:
            yield None, None


@contextmanager
def written_by(origin, **more):
    """Tell of every transaction that commits in this block: what made it, and its statements."""
    transactions = {}

    def committed(xid):
        tell("commit", xid=xid, origin=origin, statements=transactions.pop(xid), **more)

    def written(execute, sql, params, many, context):
        if not sql.lstrip().upper().startswith(WRITES):
            return execute(sql, params, many, context)
        # It joins the transaction there is, if there is one; its number is asked for in it.
        with transaction.atomic(savepoint=False):
            result = execute(sql, params, many, context)
            number = "SELECT pg_current_xact_id()::xid::text"
            xid = int(connection.connection.execute(number).fetchone()[0])
            if xid not in transactions:
                transactions[xid] = []
                transaction.on_commit(lambda: committed(xid), robust=True)
            cursor = context["cursor"].cursor
            said = sql if many else connection.ops.last_executed_query(cursor, sql, params)
            transactions[xid].append(said)
        return result

    with connection.execute_wrapper(written):
        yield


@task_prerun.connect
def starts(task_id, task, args, **_):
    """Say that a handler starts, and of which changes."""
    changes = args[0] if args and isinstance(args[0], Changes) else list(args or ())
    if not changes or not isinstance(changes[0], Change):
        return
    handler = task.name.rpartition(".")[2]
    now = datetime.now(timezone.utc)
    tell(
        "start",
        task=task_id,
        handler=handler,
        changes=[_describe(change) for change in changes],
        milliseconds=(now - changes[0].committed_at).total_seconds() * 1000,
    )
    _running[task_id] = written_by("handler", handler=handler, task=task_id)
    _running[task_id].__enter__()


@task_postrun.connect
def ends(task_id, state=None, **_):
    """Say that a handler has ended, and how."""
    if block := _running.pop(task_id, None):
        block.__exit__(None, None, None)
        tell("end", task=task_id, state=state)


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
    """Column, old and new value, as text, of an update: what changed, else all that is known."""
    if change.operation is not Operation.UPDATE:
        return []
    known = change.changed is not None
    names = sorted(change.changed) if known else [name for name in change.new if name != "id"]
    return [
        [name, _text(change.old, name) if known else None, _text(change.new, name)]
        for name in names
    ]


def _text(row, name):
    if name not in row or row[name] is UNCHANGED:
        return None
    return str(row[name])[:60]
