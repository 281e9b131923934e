"""`flash lanes`: list, skip, retry."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from .project import Project, command, say


@click.group()
def lanes() -> None:
    """List the lanes of ordered handlers, and let blocked ones go on.

    A lane holds the changes of some keys. It is blocked if a change in it has failed for good and
    the handler has Ordered(on_failure="block").
    """


@lanes.command("list")
@click.argument("handlers", nargs=-1, metavar="[HANDLER]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (times in seconds since 1970).")
@command
def lanes_list(project: Project, handlers: tuple[str, ...], as_json: bool) -> None:
    """List the lanes in which changes wait, those with the oldest change first."""
    from ..commands.lanes import as_table, lanes

    source = _source(project)
    names = _named(project, source, handlers)
    found = lanes(project.app, source, names)
    if as_json:
        listed = {name: [asdict(lane) for lane in each] for name, each in found.items()}
        click.echo(json.dumps(listed, indent=2))
        return
    for name in names:
        for line in as_table(name, found.get(name, [])):
            say(line)


@lanes.command("skip")
@click.argument("handler")
@click.argument("lane", type=int)
@click.argument("id")
@command
def lanes_skip(project: Project, handler: str, lane: int, id: str) -> None:
    """Drop the change that blocks a lane: it is never handled.

    ID is its change.id, as `flash lanes list` shows it. An entry that no worker can read has an ID
    too; it becomes a dead letter.
    """
    from ..commands.lanes import skip

    source = _source(project)
    (name,) = _named(project, source, (handler,))
    letter = skip(project.app, source, name, lane, id)
    kept = f": its changes are not handled, and are the dead letter {letter}" if letter else ""
    click.echo(f"Skipped {id}{kept}; lane {lane} goes on.")


@lanes.command("retry")
@click.argument("handler")
@click.argument("lane", type=int)
@click.argument("id")
@command
def lanes_retry(project: Project, handler: str, lane: int, id: str) -> None:
    """Handle the change that blocks a lane again.

    ID is its change.id, as `flash lanes list` shows it.
    """
    from ..commands.lanes import unblock

    source = _source(project)
    (name,) = _named(project, source, (handler,))
    unblock(project.app, source, name, lane, id, skip=False)
    click.echo(f"Lane {lane} goes on with {id}.")


def _source(project: Project) -> str:
    """Return the server and the slot; without the server if it cannot be reached.

    Raises:
        ReplicationError: It cannot be reached, and the broker needs it to find the lanes.
    """
    from psycopg import Error

    from ..errors import ReplicationError
    from ..messages import lane_transports

    try:
        with project.connected() as source:
            return str(source.lanes)
    except (ReplicationError, Error):
        if lane_transports.of(project.app) is lane_transports.RABBITMQ:
            raise
        return f"/{project.settings.flash_replication_slot}"


def _named(project: Project, source: str, handlers: tuple[str, ...]) -> list[str]:
    """Return the full names of handlers that are ordered or still have changes in lanes.

    All of them are returned if none is named.
    """
    from ..commands.lanes import summaries
    from ..provisioning import pauses

    waiting = summaries(project.app, source, project.subscriptions)
    names = {*pauses.ordered_handlers(project.subscriptions), *(each.handler for each in waiting)}
    return pauses.named(handlers, names) if handlers else sorted(names)
