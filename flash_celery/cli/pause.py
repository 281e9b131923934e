"""`flash pause` and `flash resume`."""

from __future__ import annotations

from functools import partial

import click

from .project import Project, command, say


@click.command()
@click.argument("handlers", nargs=-1, metavar="[HANDLER]...")
@command
def pause(project: Project, handlers: tuple[str, ...]) -> None:
    """Hold back changes until `flash resume`.

    A running `flash replicate` reacts within about a second. The pause outlives every process.

    Without HANDLER nothing is read, and changes wait in the WAL, on PostgreSQL's disk. With HANDLER
    (its name, or the last part of it) only the changes for that handler are held, on the broker, in
    the queue flash.paused.HANDLER, or in its lanes if it is ordered.

    Workers still run the tasks that are in a handler's own queue already.
    """
    from ..provisioning import pauses

    names = pauses.named(handlers, pauses.handlers(project.subscriptions)) or [pauses.SOURCE]
    ordered = pauses.ordered_handlers(project.subscriptions)
    with project.connected() as source:
        since = pauses.pause(source, names)
        row = source.connection.execute("SHOW max_slot_wal_keep_size").fetchone()
    for name in names:
        if name == pauses.SOURCE:
            say(f"Paused since {since[name]}; changes wait in the WAL.")
            say(f"PostgreSQL keeps the WAL until `flash resume`, {_wal_limit(row)}.", err=True)
        else:
            place = pauses.place_of(name, ordered, project.settings.source)
            paused = f"{name} has been paused since {since[name]}"
            say(f"{paused}; its changes wait in {place}.")


def _wal_limit(row: tuple[str] | None) -> str:
    """Return what a long pause leads to; `row` holds max_slot_wal_keep_size."""
    (limit,) = row or ("unknown",)
    if limit == "-1":
        return "without a limit (max_slot_wal_keep_size = -1), so a long pause fills the disk"
    return f"and the slot is lost after max_slot_wal_keep_size = {limit} of it"


@click.command()
@click.argument("handlers", nargs=-1, metavar="[HANDLER]...")
@click.option("--all", "everything", is_flag=True, help="Resume reading and every paused handler.")
@command
def resume(project: Project, handlers: tuple[str, ...], everything: bool) -> None:
    """Continue after `flash pause`.

    Without HANDLER reading continues; handlers that were paused by name are resumed by name, or by
    --all. Their held messages return to their queues first, in order and before newer changes; the
    running `flash replicate` does that, or the next one.
    """
    from ..provisioning import pauses
    from ..publishing.brokers.base import queue_depths

    handler_names = pauses.handlers(project.subscriptions)
    with project.connected() as source:
        record = pauses.read(source)
        if everything:
            names = list(record.paused)
        else:
            resumable = {*handler_names, *record.paused, *record.resuming} - {pauses.SOURCE}
            names = pauses.named(handlers, resumable)
        depths = partial(queue_depths, project.app)
        removed = pauses.removed_handlers(names, handler_names, project.settings.source, depths)
        names = names or [pauses.SOURCE]
        resumed = pauses.resume(source, names, removed)
        still_paused = pauses.read(source).paused
    for name in names:
        if name in removed:
            say(f"{name} is no longer a handler; its pause is forgotten.")
        elif name in resumed:
            say(f"{name or 'Reading'} continues.")
        else:
            say(f"{name or 'Reading'} was not paused.")
    if still_paused:
        others = ", ".join(name or "reading" for name in still_paused)
        say(f"Still paused: {others}.", err=True)
