"""The handlers; HANDLERS has more of them, as code."""

import os

from celery import shared_task

from flash_celery import on_change
from sales.models import Order


@on_change(Order, "insert|update", fields=["customer", "status"])
@shared_task
def look(change): ...


exec(os.environ.get("HANDLERS", ""))
