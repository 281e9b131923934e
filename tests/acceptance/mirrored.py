"""A project whose handlers would keep a copy of a table; the tests read their queues instead."""

import json
import os

from celery import Celery

from flash_celery import Backfill, on_backfill_end, on_change

app = Celery("mirrored", broker=os.environ.get("SHOP_BROKER"))
app.conf.update(
    flash_dsn=os.environ.get("SHOP_DSN"),
    flash_replication_slot=os.environ.get("SHOP_SLOT", "flash_replication"),
    flash_status_interval=2,
    flash_backfill_ahead=1000,
)
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))


#: What `backfill=` is, as JSON; null by default.
WISH = json.loads(os.environ.get("SHOP_BACKFILL", "null"))
#: A deploy alters the handler.
BATCH = 40 if "SHOP_DEPLOYED" in os.environ else 50


@app.task(queue="mirror")
def mirror(changes):
    """Would apply the changes."""


if "SHOP_GONE" not in os.environ:
    wish = Backfill(**WISH) if isinstance(WISH, dict) else WISH
    on_change("items", batch=BATCH, backfill=wish)(mirror)

if "SHOP_LATE" in os.environ:
    on_change("late", batch=50)(mirror)


if os.environ.get("SHOP_ENDS"):
    on_backfill_end()(mirror)


@on_change("items", "insert")
@app.task(queue="added")
def added(change):
    """Would receive new rows only."""


@on_change("keyless")
@app.task(queue="keyless")
def keyless(change):
    """Is on a table without a primary key."""


@on_change("parted")
@app.task(queue="parted")
def parted(change):
    """Is on a partitioned table."""
