"""`flash tail`."""

from __future__ import annotations

import signal
from typing import Any

import click

from .project import Project, command, say


@click.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option(
    "--limit", type=click.IntRange(min=1), default=None, help="End after this many changes."
)
@command
def tail(project: Project, tables: tuple[str, ...], limit: int | None) -> None:
    """Print changes as they are committed.

    Without TABLE, follows the tables that have handlers. A pattern such as 'tenant_*.orders'
    stands for the tables that match now. Enqueues nothing, and leaves nothing behind: its slot is
    temporary.
    """
    from ..commands.tail import as_text, follow
    from ..errors import SubscriptionError
    from ..handlers.subscriptions import of_tables
    from ..worker.control import Control

    if tables:
        names = dict.fromkeys(project.tables(name) for name in tables)
    else:
        names = dict.fromkeys(each.tables for each in of_tables(project.subscriptions))
    if not names:
        raise SubscriptionError("No handler names a table; choose one: flash tail TABLE.")
    count = 0

    def show(change: Any) -> bool:
        nonlocal count
        count += 1
        say(as_text(change))
        return limit is None or count < limit

    def ready() -> None:
        say(f"Following {', '.join(map(str, names))}; press Ctrl-C to end.", err=True)

    control = Control()

    def stop(number: int, frame: Any) -> None:
        for stopping_signal in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stopping_signal, signal.default_int_handler)
        control.stop()

    for stopping_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping_signal, stop)
    follow(project.settings, list(names), show, ready, control)
