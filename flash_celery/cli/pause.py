"""`flash pause` and `flash resume`."""

from __future__ import annotations

from functools import partial

import click

from .project import Project, command, say


@click.command()
@click.argument("handlers", nargs=-1, metavar="[HANDLER]...")
@command
def pause(project: Project, handlers: tuple[str, ...]) -> None:
    """Hold changes back, of these handlers or of all, until `flash resume`.

    A running `flash replicate` notices within about a second; one that starts later, too.

    Without HANDLER nothing is read any more, and what is written waits in the WAL, on PostgreSQL's
    disk. With HANDLER (a name, or the last part of it) the others go on, and the changes for these
    wait on the broker, in the queue flash.paused.HANDLER.

    What is in a handler's own queue already is still run: pausing stops what comes after it.
    """
    from ..postgres.source import Source
    from ..provisioning import pauses
    from ..provisioning.pauses import queue_of

    known = pauses.handlers(project.subscriptions)
    wanted = pauses.named(handlers, known) or [pauses.SOURCE]
    with project.connect() as connection:
        since = pauses.pause(Source(connection, project.settings), wanted)
        limit = connection.execute("SHOW max_slot_wal_keep_size").fetchone()
    for one in wanted:
        if one != pauses.SOURCE:
            where = queue_of(one, project.settings.source)
            say(f"{one} is paused since {since[one]}; its changes wait in the queue {where}.")
            continue
        say(f"Paused since {since[one]}; changes wait in the WAL.")
        bound = (
            "nothing bounds it (max_slot_wal_keep_size = -1), so a long pause fills the disk"
            if limit == ("-1",)
            else f"after max_slot_wal_keep_size = {limit and limit[0]} of it the slot is lost"
        )
        say(f"PostgreSQL keeps the WAL until `flash resume`, and {bound}.", err=True)


@click.command()
@click.argument("handlers", nargs=-1, metavar="[HANDLER]...")
@click.option("--all", "everything", is_flag=True, help="Whatever is paused.")
@command
def resume(project: Project, handlers: tuple[str, ...], everything: bool) -> None:
    """Go on after `flash pause`.

    Without HANDLER reading goes on; handlers that were paused by name go on by name, or by --all.
    Their parked changes go back to their queues first, in order, before anything newer; a running
    `flash replicate` does it, or the next one.
    """
    from ..postgres.source import Source
    from ..provisioning import pauses
    from ..publishing.brokers.base import queue_depths

    known, source = pauses.handlers(project.subscriptions), project.settings.source
    with project.connect() as connection:
        at = Source(connection, project.settings)
        record = pauses.read(at)
        if everything:
            wanted = list(record.paused)
        else:
            noted = {*known, *record.paused, *record.resuming} - {pauses.SOURCE}
            wanted = pauses.named(handlers, noted)
        depths = partial(queue_depths, project.app)
        gone = pauses.refuse_strangers(wanted, known, source, depths)
        wanted = wanted or [pauses.SOURCE]
        were = pauses.resume(at, wanted, gone)
        left = pauses.read(at).paused
    for one in wanted:
        name = one or "Reading"
        said = "goes on" if one in were else "was not paused"
        say(f"{name} {'is forgotten, for it is no handler any more' if one in gone else said}.")
    if left:
        others = ", ".join(one or "reading" for one in left)
        say(f"Still paused: {others}.", err=True)
