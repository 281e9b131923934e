"""`flash wait`."""

from __future__ import annotations

import click

from .project import STOPPED, Project, command, say


@click.command()
@click.argument("handlers", nargs=-1, metavar="[HANDLER]...")
@click.option(
    "--lsn",
    metavar="LSN",
    help="The position to wait for.  [default: the present one]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds to wait at most.",
)
@command
def wait(project: Project, handlers: tuple[str, ...], lsn: str | None, timeout: float) -> None:
    """Wait until committed changes have been handled.

    Waits for everything committed up to now (or up to --lsn), for these handlers or for all, and
    exits with 0. After the timeout it exits with 1 and names what is not done; it does so at once
    if a handler is paused or a change has failed for good (a dead letter).
    """
    from ..commands.wait import wait_for
    from ..errors import NotDone

    try:
        position = wait_for(project.app, lsn, timeout, handlers, project.settings.source)
    except NotDone as error:
        say(str(error), err=True)
        click.get_current_context().exit(STOPPED)
    say(f"Done up to {position}.")
