"""`celery -A proj flash …`: the commands. This package is imported by every `celery` command, so it
imports click alone; a command imports what it does."""

from __future__ import annotations

import click

from . import dead, doctor, pause, replay, replicate, reset, status, tail, wait


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
):
    flash.add_command(_command)
