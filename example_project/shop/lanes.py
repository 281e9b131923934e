"""The lanes of `keep_total`, for the page: where the changes of orders wait."""

from functools import cache

from django.db import connection

from flash_celery import FlashError
from flash_celery.commands.lanes import lanes

from .celery import app

HANDLER = "shop.handlers.keep_total"


@cache
def source():
    """Return the server and the slot, by which lanes are named."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT system_identifier FROM pg_control_system()")
        return f"{cursor.fetchone()[0]}/flash_replication"


def waiting():
    """Return the lanes in which changes wait, as `flash lanes list` shows them."""
    try:
        return lanes(app, source(), [HANDLER]).get(HANDLER, [])
    except FlashError:  # the page can do without the broker
        return []
