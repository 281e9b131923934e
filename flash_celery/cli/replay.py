"""`flash replay`."""

from __future__ import annotations

import click

from .project import Project, command, say


@click.command()
@click.option("--handler", required=True, help="Its name, or the last part of it.")
@click.option("--since", required=True, metavar="LSN|TIME", help="From here on. TIME is in UTC.")
@click.option("--until", metavar="LSN|TIME", help="Up to here.  [default: what is read by now]")
@click.option("--dry-run", is_flag=True, help="Only say how many changes there are.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@command
def replay(
    project: Project, handler: str, since: str, until: str | None, dry_run: bool, yes: bool
) -> None:
    """Enqueue changes again that a handler was told of.

    They have the same change.id as at first, so a handler that remembers ids will skip them. Only
    what flash_replay_window holds can be replayed. Nothing else is told, and the slot stays where
    it is.
    """
    from ..commands import replay as replaying
    from ..errors import ConfigurationError
    from ..postgres.source import Source
    from ..provisioning import pauses

    settings, subscriptions = project.settings, project.subscriptions
    (name,) = pauses.named([handler], pauses.handlers(subscriptions))
    with project.connect() as connection:
        if name in pauses.read(Source(connection, settings)).paused:
            raise ConfigurationError(f"{name} is paused; `flash resume {name}` first.")
        wanted = replaying.span(connection, settings, since, until)
        count = replaying.Count()
        replaying.read(connection, settings, subscriptions, name, wanted, count)
        say(f"{name}: {count}.")
        if dry_run or not count.changes:
            return
        if not yes:
            click.confirm("Enqueue them again?", abort=True)
        sent = replaying.enqueue(project.app, connection, settings, subscriptions, name, wanted)
    click.echo(f"{sent} messages enqueued.")
