"""A project with a handler of a pattern; the tests read its queue instead."""

import json
import os

from celery import Celery

from flash_celery import on_change

app = Celery("tenants", broker=os.environ.get("SHOP_BROKER"))
app.conf.update(
    flash_dsn=os.environ.get("SHOP_DSN"),
    flash_replication_slot=os.environ.get("SHOP_SLOT", "flash_replication"),
    flash_backfill_ahead=1000,
)
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))


@on_change("tenant_*.orders", batch=50, where={"id__gt": 0, "total__gt": -1_000_000})
@app.task(queue="tenants")
def mirror(changes):
    """Would apply the changes."""
