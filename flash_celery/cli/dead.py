"""`flash dead`: list, show, retry, drop."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import click

from .project import Project, command, say


@click.group()
def dead() -> None:
    """List, show, retry or drop dead letters.

    A dead letter is a change, or a batch of them, whose handler has failed for good.
    """


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that select dead letters; the command receives a `DeadLetterFilter`."""

    @functools.wraps(function)
    def run(project: Project, *args: Any, **options: Any) -> Any:
        from ..dead_letters.queue import DeadLetterFilter

        names = ("ids", "handler", "table", "older", "newer")
        criteria = {name: options.pop(name) for name in names if name in options}
        return function(project, DeadLetterFilter.parse(**criteria), *args, **options)

    age = "AGE is a number of seconds, or a number followed by s, m, h or d."
    for option in (
        click.option("--newer", metavar="AGE", help="Only those that failed less than AGE ago."),
        click.option(
            "--older", metavar="AGE", help=f"Only those that failed more than AGE ago. {age}"
        ),
        click.option("--table", help="Only those of this table (or prefix of messages)."),
        click.option("--handler", help="Only those of this handler: its name, or the last part."),
    ):
        run = option(run)
    return run


@dead.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (times in UTC, age in seconds).")
@command
@_filters
def dead_list(project: Project, criteria: Any, as_json: bool) -> None:
    """List the dead letters, oldest first."""
    from . import dead_letters

    queue = project.dead_letters()
    letters = queue.find(criteria)
    if as_json:
        click.echo(json.dumps([dead_letters.as_json(letter) for letter in letters], indent=2))
        return
    for line in dead_letters.as_table(letters) if letters else ["no dead letters"]:
        say(line)
    if queue.other_messages:
        click.echo(
            f"The queue also holds {queue.other_messages} messages that are not dead letters; they "
            "are left there.",
            err=True,
        )


@dead.command("show")
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command
def dead_show(project: Project, id: str, as_json: bool) -> None:
    """Show a dead letter with its traceback and its changes.

    The first 8 characters of its id are enough.
    """
    from ..dead_letters.queue import DeadLetterFilter
    from . import dead_letters

    queue = project.dead_letters()
    for letter in queue.read(queue.find(DeadLetterFilter((id,)))):
        if as_json:
            decoded = {"decoded": dead_letters.change_lines(letter)}
            click.echo(json.dumps(dead_letters.as_json(letter) | decoded, indent=2))
        else:
            for line in dead_letters.as_text(letter):
                say(line)


def _on_selection(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command about selected dead letters; it receives their queue and the letters."""

    @click.argument("ids", nargs=-1, metavar="[ID]...")
    @click.option("--all", "everything", is_flag=True, help="Select all of them.")
    @command
    @_filters
    @functools.wraps(function)
    def run(project: Project, criteria: Any, everything: bool, **options: Any) -> Any:
        from ..errors import ConfigurationError

        if criteria.matches_all and not everything:
            raise ConfigurationError(
                "Select dead letters by ids, --handler, --table, --older, --newer or --all."
            )
        queue = project.dead_letters()
        return function(queue, queue.find(criteria), **options)

    return run


@dead.command("retry")
@_on_selection
@click.option("--split", is_flag=True, help="Send the changes of a batch one by one.")
def dead_retry(queue: Any, selected: Any, split: bool) -> None:
    """Send dead letters back to their handler's queue, with the same task id and changes.

    A dead letter is removed once the broker has its message.
    """
    click.echo(f"{queue.retry(selected, split)} sent back to their handlers.")


@dead.command("drop")
@_on_selection
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def dead_drop(queue: Any, selected: Any, yes: bool) -> None:
    """Delete dead letters: their changes are never handled."""
    from .dead_letters import as_table

    if selected and not yes:
        for line in as_table(selected):
            say(line)
        click.confirm(f"Delete {len(selected)}?", abort=True)
    click.echo(f"{queue.drop(selected)} deleted.")
