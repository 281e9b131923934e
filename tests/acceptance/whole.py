"""A project whose handler gets all changes of a transaction in one task, or in parts."""

import json
import os

from celery import Celery

from flash_celery import on_change

app = Celery("whole", broker=os.environ.get("SHOP_BROKER"))
app.conf.flash_dsn = os.environ.get("SHOP_DSN")
app.conf.flash_replication_slot = os.environ.get("SHOP_SLOT", "flash_replication")
app.conf.flash_status_interval = 2
app.conf.worker_hijack_root_logger = False
app.conf.update(json.loads(os.environ.get("SHOP_CONF", "{}")))


@on_change("items", batch="transaction")
@app.task(name="whole", shared=False)
def whole(changes): ...
