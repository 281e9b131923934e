"""Django's `post_save` and `delay_on_commit`.

`… ROWS` prints rows per second: saved only, and saved and enqueued.
"""

import json
import os
import sys
import time

import django
from celery import Celery
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

database = conninfo_to_dict(os.environ["BENCH_DSN"])
settings.configure(
    USE_TZ=True,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": database["dbname"],
            "USER": database["user"],
            "HOST": database["host"],
            "PORT": database["port"],
        }
    },
)
django.setup()

from django.db import models, transaction  # noqa: E402
from django.db.models.signals import post_save  # noqa: E402

app = Celery(
    "shop",
    broker=os.environ["BENCH_BROKER"],
    task_cls="celery.contrib.django.task:DjangoTask",
)
app.conf.task_default_queue = "rows"


class Order(models.Model):
    """The existing table."""

    id = models.BigAutoField(primary_key=True)
    customer_id = models.BigIntegerField()
    status = models.TextField()
    total = models.DecimalField(max_digits=12, decimal_places=2)
    note = models.TextField(null=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        app_label = "benchmarks"
        db_table = "orders"
        managed = False


@app.task(name="row")
def row(key):
    """Do the application's work."""


def save(rows):
    """Save rows, each in its own transaction; return rows per second."""
    started = time.time()
    for number in range(rows):
        with transaction.atomic():
            Order(customer_id=number, status="paid", total=12, note="at the door").save()
    return rows / (time.time() - started)


if __name__ == "__main__":
    count = int(sys.argv[1])
    alone = save(count)
    post_save.connect(
        lambda instance, **_: row.delay_on_commit(instance.pk), sender=Order, weak=False
    )
    print(json.dumps({"alone": alone, "rate": save(count)}))
