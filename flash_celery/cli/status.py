"""`flash status`."""

from __future__ import annotations

import json

import click

from .project import Project, command, say


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON (sizes in bytes, times in s).")
@command
def status(project: Project, as_json: bool) -> None:
    """Show the slot, its lag, the handlers and their queues."""
    from .. import status as report

    with project.connect() as connection:
        found = report.status(connection, project.app, project.settings, project.subscriptions)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in report.lines(found):
            say(line)
