"""Which handler was told what, and how long after the commit: for the demo and the web page."""

import json
from datetime import datetime, timezone

from celery.signals import task_prerun
from django.conf import settings

from flash_celery import Change, Changes

CHANNEL = "shop.activity"


@task_prerun.connect
def tell(task, args, **_):
    """Say that a handler starts, to whoever listens."""
    changes = args[0] if args and isinstance(args[0], Changes) else list(args or ())
    if not changes or not isinstance(changes[0], Change):
        return
    now = datetime.now(timezone.utc)
    event = {
        "handler": task.name.rpartition(".")[2],
        "changes": [_describe(change) for change in changes],
        "milliseconds": (now - changes[0].committed_at).total_seconds() * 1000,
    }
    from redis import Redis

    with Redis.from_url(settings.CACHES["default"]["LOCATION"]) as redis:
        redis.publish(CHANNEL, json.dumps(event))


def _describe(change):
    operation = change.operation.names()[0]
    changed = f" ({', '.join(sorted(change.changed))})" if change.changed else ""
    key = ",".join(str(value) for value in change.key.values())
    return {"operation": operation, "table": change.table, "key": key, "changed": changed}
