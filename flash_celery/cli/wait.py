"""`flash wait`."""

from __future__ import annotations

import click

from .project import STOPPED, Project, command, say


@click.command()
@click.argument("handlers", nargs=-1, metavar="[HANDLER]...")
@click.option("--lsn", metavar="LSN", help="Up to here.  [default: where the server is now]")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds after which it is given up.",
)
@command
def wait(project: Project, handlers: tuple[str, ...], lsn: str | None, timeout: float) -> None:
    """Wait until these handlers, or all, have done what was committed up to now (or LSN).

    Exits with 0 then, and otherwise with 1 and what is not done. It does not wait in vain for a
    handler that is paused, or for a change that has failed for good (a dead letter).
    """
    from ..commands import wait as waiting
    from ..errors import NotDone

    try:
        position = waiting.wait_for(project.app, lsn, timeout, handlers, project.settings.source)
    except NotDone as error:
        say(str(error), err=True)
        click.get_current_context().exit(STOPPED)
    say(f"Done up to {position}.")
