"""A Celery worker of a release without lanes: it knows the handler, and not the task of a wake."""

import os

from celery import Celery

app = Celery("former", broker=os.environ.get("SHOP_BROKER"))
app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)


@app.task(name="ordered.each")
def each(change):
    raise AssertionError("it has received a change past its lane")
