"""`flash reset`."""

from __future__ import annotations

import click

from .project import Project, command, say


@click.command()
@click.option("--slot", default=None, help="The slot to drop.  [default: the source's]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="End the replication worker that reads the slot.")
@command
def reset(project: Project, slot: str | None, yes: bool, force: bool) -> None:
    """Drop the slot and its publications, and restore replica identities.

    Changes that were not read yet are lost; the next `replicate` starts at the present. No handler
    is paused then: held messages of paused handlers go back to their queues.
    """
    from ..commands import requeue as requeuing
    from ..commands import reset as resetting

    name = slot or project.settings.flash_replication_slot
    with project.connect() as connection:
        undo = resetting.plan(connection, project.settings, name)
        if undo.empty:
            say(undo.note or f"Nothing to reset: there is no slot {name}.")
            return
        subject = project.app, project.settings, project.subscriptions
        held = requeuing.find(connection, *subject) if undo.steps else []
        say("This will")
        for line in [*map(str, held), *undo.lines()]:
            say(f"  {line}")
        if not yes:
            click.confirm("Go on?", abort=True)

        def requeue() -> None:
            # Ask again: more messages may be held since the list was printed.
            requeuing.requeue(
                project.app, project.settings.source, requeuing.find(connection, *subject)
            )

        resetting.run(connection, undo, force, requeue)
    click.echo("Done.")
