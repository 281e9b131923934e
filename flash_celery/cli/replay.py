"""`flash replay`."""

from __future__ import annotations

import click

from .project import Project, command, say


@click.command()
@click.option("--handler", required=True, help="The handler: its name, or the last part of it.")
@click.option(
    "--since", required=True, metavar="LSN|TIME", help="The first commit to replay. TIME is in UTC."
)
@click.option(
    "--until", metavar="LSN|TIME", help="The last commit to replay.  [default: the last one read]"
)
@click.option(
    "--again",
    is_flag=True,
    help="Have a handler with once= handle them even if it has handled them already.",
)
@click.option("--dry-run", is_flag=True, help="Only count the changes.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@command
def replay(
    project: Project,
    handler: str,
    since: str,
    until: str | None,
    again: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Enqueue past changes again, for one handler.

    They keep their change.id, so a handler that remembers ids skips those it has handled; one with
    once= does so by itself, unless you add --again. Only
    changes within flash_replay_window can be replayed. Other handlers receive nothing, and the
    slot does not move.
    """
    from ..commands.replay import Count, enqueue_changes, parse_span, read_changes
    from ..errors import ConfigurationError
    from ..provisioning import pauses

    subscriptions = project.subscriptions
    (name,) = pauses.named([handler], pauses.handlers(subscriptions))
    with project.connected() as source:
        if name in pauses.read(source).paused:
            raise ConfigurationError(f"{name} is paused; run `flash resume {name}` first.")
        span = parse_span(source, since, until)
        count = Count()
        read_changes(source, subscriptions, name, span, count)
        say(f"{name}: {count}.")
        if dry_run or not count.changes:
            return
        if not yes:
            click.confirm("Enqueue them again?", abort=True)
        sent = enqueue_changes(project.app, source, subscriptions, name, span, again)
    click.echo(f"{sent} messages enqueued.")
