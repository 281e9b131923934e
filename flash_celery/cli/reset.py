"""`flash reset`."""

from __future__ import annotations

import click

from .project import Project, command, say


@click.command()
@click.option("--slot", default=None, help="The slot to drop.  [default: the source's]")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--force", is_flag=True, help="End the replication worker that reads the slot.")
@command
def reset(project: Project, slot: str | None, yes: bool, force: bool) -> None:
    """Drop the slot and publications; restore replica identities.

    Changes that have not been read yet are lost; the next `replicate` starts with new changes.
    Pauses end: messages held for paused handlers go back to the handlers' queues, and workers
    handle the changes in lanes.
    """
    from ..commands import lanes
    from ..commands.requeue import find_held, requeue_held
    from ..commands.reset import plan_reset, run_reset

    name = slot or project.settings.flash_replication_slot
    with project.connected() as source:
        plan = plan_reset(source, name)
        server_and_slot = f"{source.system}/{name}"
        in_lanes, unread = lanes.before_reset(project.app, server_and_slot, project.subscriptions)
        if plan.empty and not in_lanes:
            say(plan.note or f"Nothing to reset: there is no slot {name}.")
            return
        held = find_held(source, project.app, project.subscriptions) if plan.steps else []
        say("This will")
        for line in [*map(str, held), *unread, *plan.lines()]:
            say(f"  {line}")
        if not yes:
            click.confirm("Continue?", abort=True)

        def requeue() -> None:
            # Ask again: more messages may be held since the list was printed.
            held = find_held(source, project.app, project.subscriptions)
            requeue_held(project.app, project.settings.source, held)

        run_reset(plan, force, requeue)
        if in_lanes:
            lanes.end(project.app, server_and_slot, [each.handler for each in in_lanes])
    click.echo("Done.")
