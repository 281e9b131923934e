"""Run commands one after another in this process, each in an app of its own.

`test_security` passes the cases and reads the output. A process for each command would import
Celery a hundred times, which takes minutes.
"""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from types import SimpleNamespace

import click
import psycopg
from celery import Celery

from flash_celery import on_change
from flash_celery.cli import flash


class Ender(logging.Handler):
    """Ends a replication worker that retries, once it has logged that."""

    armed = False
    dsn = ""

    def emit(self, record):
        if self.armed and record.msg.startswith("Replicating"):
            # It logs a failure for the change that it cannot publish.
            with psycopg.connect(self.dsn) as connection:
                connection.execute("INSERT INTO items SELECT count(*) FROM items")
        if self.armed and record.levelno >= logging.WARNING:
            self.armed = False
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()


def run(case, ender):
    app = Celery("shop", set_as_current=True)
    app.conf.update(case["conf"])

    @app.task(name="each", shared=False)
    def each(change): ...

    on_change(case.get("table", "items"))(each)
    ender.armed, ender.dsn = "replicate" in case["arguments"], case["write"]
    try:
        flash.main(case["arguments"], prog_name="flash", obj=SimpleNamespace(app=app))
    except SystemExit as ended:
        click.echo(f"ended with {ended.code}")
    except BaseException:
        traceback.print_exc()
    finally:
        ender.armed = False
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        app.close()


if __name__ == "__main__":
    ender = Ender()
    logging.getLogger("flash_celery").addHandler(ender)
    for case in json.load(sys.stdin):
        click.echo(f"=== {case['name']}")
        run(case, ender)
        sys.stderr.flush()
        sys.stdout.flush()
