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
    """Dead letters: changes whose handler has failed for good."""


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which letters; the command gets a `DeadLetterFilter`."""

    @functools.wraps(function)
    def run(project: Project, *args: Any, **options: Any) -> Any:
        from ..dead_letters.queue import DeadLetterFilter

        names = ("ids", "handler", "table", "older", "newer")
        given = {name: options.pop(name) for name in names if name in options}
        return function(project, DeadLetterFilter.parse(**given), *args, **options)

    age = "AGE is seconds, or a number with s, m, h or d."
    for option in (
        click.option("--newer", metavar="AGE", help="That failed in this time."),
        click.option("--older", metavar="AGE", help=f"That failed before this time. {age}"),
        click.option("--table", help="Of this table (or with this prefix of messages)."),
        click.option("--handler", help="Of this handler: its name, or the last part of it."),
    ):
        run = option(run)
    return run


@dead.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (times in UTC, age in s).")
@command
@_filters
def dead_list(project: Project, wanted: Any, as_json: bool) -> None:
    """Show the dead letters, the oldest first."""
    from . import letters

    box = project.letters()
    found = box.find(wanted)
    if as_json:
        click.echo(json.dumps([letters.as_json(letter) for letter in found], indent=2))
        return
    for line in letters.table(found) if found else ["no dead letters"]:
        say(line)
    if box.other_messages:
        click.echo(
            f"{box.other_messages} other messages are in the queue; they stay there.", err=True
        )


@dead.command("show")
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command
def dead_show(project: Project, id: str, as_json: bool) -> None:
    """Show a letter with its traceback and its changes; the first 8 characters of its id do."""
    from ..commands import tail
    from ..dead_letters.queue import DeadLetterFilter
    from . import letters

    box = project.letters()
    for letter in box.read(box.find(DeadLetterFilter((id,)))):
        if as_json:
            decoded = {"decoded": letters.changes(letter, tail.line)}
            click.echo(json.dumps(letters.as_json(letter) | decoded, indent=2))
        else:
            for line in letters.whole(letter, tail.line):
                say(line)


def _of_some(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command about letters that have to be chosen; it gets their box and them."""

    @click.argument("ids", nargs=-1, metavar="[ID]...")
    @click.option("--all", "everything", is_flag=True, help="All of them.")
    @command
    @_filters
    @functools.wraps(function)
    def run(project: Project, wanted: Any, everything: bool, **options: Any) -> Any:
        from ..errors import ConfigurationError

        if wanted.matches_all and not everything:
            raise ConfigurationError(
                "Say which: ids, --handler, --table, --older, --newer or --all."
            )
        box = project.letters()
        return function(box, box.find(wanted), **options)

    return run


@dead.command("retry")
@_of_some
@click.option("--split", is_flag=True, help="Send the changes of a batch one by one.")
def dead_retry(box: Any, found: Any, split: bool) -> None:
    """Send letters back to their handler's queue, with the same task id and the same changes.

    A letter is taken out when the broker has its message.
    """
    click.echo(f"{box.retry(found, split)} sent back to their handlers.")


@dead.command("drop")
@_of_some
@click.option("--yes", is_flag=True, help="Do not ask.")
def dead_drop(box: Any, found: Any, yes: bool) -> None:
    """Throw letters away: their changes are never handled."""
    from . import letters

    if found and not yes:
        for line in letters.table(found):
            say(line)
        click.confirm(f"Throw {len(found)} away?", abort=True)
    click.echo(f"{box.drop(found)} thrown away.")
