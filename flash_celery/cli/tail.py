"""`flash tail`."""

from __future__ import annotations

import signal
from typing import Any

import click

from .project import Project, command, say


@click.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option(
    "--limit", type=click.IntRange(min=1), default=None, help="End after so many changes."
)
@command
def tail(project: Project, tables: tuple[str, ...], limit: int | None) -> None:
    """Print changes as they are committed (default: of the tables that handlers name).

    Enqueues nothing and leaves nothing: its slot is temporary.
    """
    from ..commands import tail as tailing
    from ..errors import SubscriptionError
    from ..handlers.subscriptions import of_tables
    from ..worker.control import Control

    wanted = list(dict.fromkeys(project.table(name) for name in tables))
    wanted = wanted or list(dict.fromkeys(one.table for one in of_tables(project.subscriptions)))
    if not wanted:
        raise SubscriptionError("No handler names a table; say which to follow: flash tail TABLE.")
    shown = 0

    def show(change: Any) -> bool:
        nonlocal shown
        shown += 1
        say(tailing.line(change))
        return limit is None or shown < limit

    def ready() -> None:
        names = ", ".join(map(str, wanted))
        say(f"Following {names}; Ctrl-C ends it.", err=True)

    control = Control()

    def stop(number: int, frame: Any) -> None:
        for known in (signal.SIGTERM, signal.SIGINT):
            signal.signal(known, signal.default_int_handler)
        control.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    dsn = project.settings.require_dsn()
    tailing.tail(dsn, wanted, show, ready, control, project.settings.source)
