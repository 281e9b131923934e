"""The commands of `celery -A proj flash …`: their options and output.

Every `celery` command imports this package, so its modules import only click at their top; a
command imports what it needs when it runs.
"""

from __future__ import annotations

import click

from . import backfill, dead, doctor, lanes, pause, replay, replicate, reset, status, tail, wait


@click.group(name="flash")
def flash() -> None:
    """PostgreSQL changes as Celery tasks."""


for _command in (
    replicate.replicate,
    status.status,
    pause.pause,
    pause.resume,
    wait.wait,
    replay.replay,
    doctor.doctor,
    reset.reset,
    tail.tail,
    dead.dead,
    lanes.lanes,
    backfill.backfill,
):
    flash.add_command(_command)
