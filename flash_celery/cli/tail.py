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
@click.option(
    "--arguments", is_flag=True, help="Show the arguments of tasks that transactions carry."
)
@command
def tail(project: Project, tables: tuple[str, ...], limit: int | None, arguments: bool) -> None:
    """Print changes as they are committed.

    Without TABLE, follows the tables that have handlers, and the tasks that transactions carry. A
    pattern such as 'tenant_*.orders' stands for the tables that match now. Enqueues nothing, and
    leaves nothing behind: its slot is temporary.
    """
    from ..commands.tail import as_text, follow, task_as_text
    from ..errors import SubscriptionError
    from ..handlers.subscriptions import of_tables
    from ..transactional_tasks.signing import keys_of
    from ..worker.control import Control

    with_tasks = not tables and bool(keys_of(project.settings))
    if tables:
        names = dict.fromkeys(project.tables(name) for name in tables)
    else:
        names = dict.fromkeys(each.tables for each in of_tables(project.subscriptions))
    if not names and not with_tasks:
        raise SubscriptionError("No handler names a table; choose one: flash tail TABLE.")
    count = 0

    def show_line(line: str) -> bool:
        nonlocal count
        count += 1
        say(line)
        return limit is None or count < limit

    def show(change: Any) -> bool:
        return show_line(as_text(change))

    def show_task(task: Any, transaction: Any) -> bool:
        return show_line(task_as_text(task, transaction, arguments))

    def ready() -> None:
        followed = [*map(str, names), *["tasks of transactions"] * with_tasks]
        say(f"Following {', '.join(followed)}; press Ctrl-C to end.", err=True)

    control = Control()

    def stop(number: int, frame: Any) -> None:
        for stopping_signal in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stopping_signal, signal.default_int_handler)
        control.stop()

    for stopping_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping_signal, stop)
    tasks = show_task if with_tasks else None
    follow(project.settings, list(names), show, ready, control, tasks)
