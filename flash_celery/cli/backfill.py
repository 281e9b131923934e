"""`flash backfill`: start, list, pause, resume, stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from .project import STOPPED, Project, command, say

_NOT_READ = "No `flash replicate` reads the changes now; the backfill begins when one does."
_GOES_ON = (
    "the backfill goes on: `flash backfill list` shows how far it is, and `flash backfill stop ID` "
    "ends it."
)


class _StartByDefault(click.Group):
    """A group in which `backfill HANDLER` is `backfill start HANDLER`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the command if the first argument names none."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args.insert(0, "start")
        return super().parse_args(ctx, args)


def _rate(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Return rows a second, from `5000/s` or `5000`."""
    if value is None:
        return None
    try:
        rate = float(value.removesuffix("/s"))
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise click.BadParameter(f"{value!r} is not a rate, such as 5000/s.")
    return rate


@click.group(cls=_StartByDefault)
def backfill() -> None:
    """Deliver the rows that are in a table already.

    Each row is delivered to the handler as an Insert with change.backfill, among the changes that
    happen at the same time. A running `flash replicate` does it.
    """


@backfill.command("start")
@click.argument("handlers", nargs=-1, required=True, metavar="HANDLER...")
@click.option("--table", metavar="TABLE", help="Only this table.  [default: all of the handler's]")
@click.option(
    "--where",
    multiple=True,
    metavar="LOOKUP=VALUE",
    help="Only rows that match, such as status=paid or id__gte=100. Repeatable.",
)
@click.option(
    "--rate", metavar="N/s", callback=_rate, help="The most rows a second, such as 5000/s."
)
@click.option(
    "--chunk",
    type=click.IntRange(1, 100_000),
    help="The most rows that are read at once.  [default: 5000]",
)
@click.option(
    "--truncate", is_flag=True, help="Deliver a Truncate first, so that a copy begins empty."
)
@click.option(
    "--queue",
    metavar="NAME",
    help="The Celery queue of the rows.  [default: that of the handler's changes]",
)
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@click.option("--wait", "waits", is_flag=True, help="Wait until the rows are enqueued.")
@click.option("--wait-handled", is_flag=True, help="Wait until the rows are handled.")
@command
def start(
    project: Project,
    handlers: tuple[str, ...],
    table: str | None,
    where: tuple[str, ...],
    rate: float | None,
    chunk: int | None,
    truncate: bool,
    queue: str | None,
    dry_run: bool,
    waits: bool,
    wait_handled: bool,
) -> None:
    """Request the rows of a handler's tables.

    HANDLER is the name of the task, or the last part of it. Its backfill= is the default for
    options that are not given.
    """
    from ..backfill import plans as planning
    from ..commands import backfill as backfills
    from ..postgres import slots
    from ..provisioning import pauses
    from ..provisioning.pattern_tables import one_for_each_table

    names = pauses.named(handlers, pauses.handlers(project.subscriptions))
    if queue is not None:
        _require_queue(project, names, queue, declare=not dry_run)
    only = None if table is None else project.table(table)
    with project.connected() as source:
        subscriptions = one_for_each_table(source.connection, project.subscriptions)
        asked = {"rate": rate, "chunk": chunk, "truncate": truncate or None, "queue": queue}
        plans = [
            each
            for name in names
            for each in planning.plan(source, subscriptions, name, only, asked, where)
        ]
        if dry_run:
            for each in plans:
                duration = (
                    ""
                    if each.seconds is None
                    else f", {backfills.duration(each.seconds)} at this rate"
                )
                chunks = "chunk" if each.chunks == 1 else "chunks"
                say(
                    f"{each.table} for {each.handler}: about {each.rows:,} rows, "
                    f"{each.size / 1e6:,.1f} MB, {each.chunks:,} {chunks}{duration}"
                )
            return
        started = planning.start(source, plans)
        for backfill in started:
            say(f"{backfill.id}  {backfill.table_name} for {backfill.handler} is requested.")
        slot = slots.find(source.connection, source.slot)
        if slot is None or slot.active_pid is None:
            say(_NOT_READ, err=True)
        if waits or wait_handled:
            progress = Progress()
            with _left_by_ctrl_c(_GOES_ON):
                try:
                    backfills.wait(source, [each.id for each in started], progress)
                finally:
                    progress.end_line()
            say("All rows are enqueued.")
    if wait_handled:
        with _left_by_ctrl_c("the workers handle the rows all the same."):
            _wait_until_handled(project, names)


def _require_queue(project: Project, handlers: Sequence[str], queue: str, declare: bool) -> None:
    """Refuse a queue that cannot take the rows of the handlers.

    It is declared now, because one that exists with other arguments would hold up all changes.
    """
    from contextlib import closing

    from ..messages.task_options import TaskOptions
    from ..publishing import brokers

    task_options = TaskOptions(project.app, project.settings, project.subscriptions)
    names = {task_options.add_backfill_queue(handler, queue) for handler in handlers}
    if declare:
        with closing(brokers.for_app(project.app)) as publisher:
            publisher.open([project.app.amqp.queues[name] for name in names])


def _wait_until_handled(project: Project, handlers: Sequence[str]) -> None:
    from ..commands.wait import wait_for
    from ..errors import NotDone

    try:
        wait_for(project.app, None, float("inf"), handlers, project.settings.source)
    except NotDone as error:
        say(str(error), err=True)
        click.get_current_context().exit(STOPPED)
    say("All rows are handled.")


@contextmanager
def _left_by_ctrl_c(outcome: str) -> Iterator[None]:
    """End the command on Ctrl-C with a sentence that says what goes on without it."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"No longer waiting; {outcome}", err=True)
        click.get_current_context().exit(STOPPED)


class Progress:
    """Shows how far a backfill is: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self) -> None:
        self._drawing = False
        self._printed_at: float | None = None

    def __call__(self, backfill: Any) -> None:
        import os
        import sys
        import time

        from ..commands.backfill import as_json, bar, line

        described = as_json(backfill)
        if sys.stderr.isatty():
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            click.echo(f"\r{bar(described, columns - 1)}\x1b[K", nl=False, err=True)
            self._drawing = True
            if backfill.state == "done":
                self.end_line()
        elif self._printed_at is None or time.monotonic() - self._printed_at >= 60:
            self._printed_at = time.monotonic()
            say(line(described), err=True)

    def end_line(self) -> None:
        """Let what is printed next begin below the bar."""
        if self._drawing:
            click.echo(err=True)
        self._drawing = False


@backfill.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command
def list_(project: Project, as_json: bool) -> None:
    """List the backfills of the source."""
    from ..backfill import requests
    from ..commands import backfill as backfills

    with project.connected() as source:
        described = [backfills.as_json(each) for each in requests.all_of(source)]
    found = backfills.with_consumed(project.app, described)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for each in found:
        say(backfills.line(each))
    if not found:
        say("No backfill was requested.")


@backfill.command()
@click.argument("id")
@command
def pause(project: Project, id: str) -> None:
    """Pause a backfill, which goes on where it was after `resume`."""
    _move(project, id, "paused", "is paused")


@backfill.command()
@click.argument("id")
@command
def resume(project: Project, id: str) -> None:
    """Let a paused backfill go on."""
    _move(project, id, "requested", "goes on")


@backfill.command()
@click.argument("id")
@command
def stop(project: Project, id: str) -> None:
    """Stop a backfill for good. Rows that are enqueued by then are handled."""
    _move(project, id, "stopped", "is stopped")


def _move(project: Project, id: str, state: str, outcome: str) -> None:
    from ..commands import backfill as backfills

    with project.connected() as source:
        backfills.move(source, id, state)
    say(f"The backfill {id} {outcome}.")
