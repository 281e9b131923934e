"""`celery -A proj flash …`: the commands. This module is imported by every `celery` command, so it
imports click alone; a command imports what it does."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click

#: Exit codes: a mistake that the message names; `doctor` found what stops `replicate`.
BAD_INPUT, STOPPED = 2, 1
#: Seconds beyond flash_shutdown_timeout after which whatever is being waited for is given up.
_LATE_SECONDS = 1.0


def _say(line: str, err: bool = False) -> None:
    """Print one line. What it names, anybody may have chosen who can write to the database."""
    from .escaping import escaped

    click.echo(escaped(line), err=err)


@click.group(name="flash")
def flash() -> None:
    """PostgreSQL changes as Celery tasks."""


class _Project:
    """The app of `-A`, with the settings and the handlers of one source."""

    def __init__(self, app: Any, source: str | None) -> None:
        from .errors import ConfigurationError
        from .handlers import subscriptions_of
        from .settings import Settings

        if app.main == "default" or (app.main is None and not app.conf.broker_url):
            raise ConfigurationError(
                "No app is given; write `celery -A your_project flash …`, where your_project is "
                "the module of the Celery app."
            )
        app.loader.import_default_modules()
        app.finalize()
        self.app = app
        default = Settings.from_app(app)
        self.settings = default if source is None else default.of_source(source)
        everything = subscriptions_of(app)
        #: What `sources` looks at.
        self.sources = default, everything, self.settings.source
        self.subscriptions = [one for one in everything if one.source == self.settings.source]

    def connect(self) -> Any:
        from . import catalog
        from .errors import ReplicationError
        from .replicator import refuse_hopeless

        try:
            return catalog.connect(self.settings.require_dsn())
        except ReplicationError as error:
            refuse_hopeless(error, self.settings)
            raise

    def table(self, name: str) -> Any:
        """A table of this source, with or without its name."""
        from .errors import SubscriptionError
        from .subscriptions import TableName, split_source

        source, table = split_source(name)
        if source not in (None, self.settings.source):
            raise SubscriptionError(f"{name} is of another source; say --source {source}.")
        return TableName.of(table)

    def letters(self) -> Any:
        from .letterbox import LetterBox

        return LetterBox(self.app, self.settings.flash_dead_queue)


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its project, and turn errors into one sentence."""

    @click.option(
        "--source",
        metavar="NAME",
        default=None,
        help="One of flash_sources.  [default: the database of flash_dsn]",
    )
    @click.pass_context
    @functools.wraps(function)
    def run(context: click.Context, source: str | None, *args: Any, **kwargs: Any) -> Any:
        from psycopg import Error

        from .errors import FlashError

        try:
            return function(_Project(context.obj.app, source), *args, **kwargs)
        except FlashError as error:
            _say(f"Error: {error}", err=True)
        except Error as error:
            _say(f"Error: PostgreSQL: {' '.join(str(error).split())}", err=True)
        return context.exit(BAD_INPUT)

    return run


@flash.command()
@click.option("-l", "--loglevel", default="INFO", show_default=True, help="Logging level.")
@click.option("-f", "--logfile", default=None, help="Log to this file instead of stderr.")
@click.option(
    "--wait-for-workers",
    is_flag=True,
    help="Start once running Celery workers know every handler (a worker throws away a task it "
    "does not know).",
)
@_command
def replicate(
    project: _Project, loglevel: str, logfile: str | None, wait_for_workers: bool
) -> None:
    """Read the slot and enqueue changes, until SIGTERM or Ctrl-C.

    Creates the slot and its publications where they are missing. A second signal ends it at once.
    Of several databases each has a process of its own: --source.
    """
    from . import publishers, sources
    from .control import Stopped
    from .replicator import Replicator

    sources.check(*project.sources)
    project.app.log.setup(loglevel=loglevel, logfile=logfile, redirect_stdouts=False)
    publisher = publishers.for_app(project.app, 2 * project.settings.flash_status_interval)
    replicator = Replicator(project.app, project.settings, project.subscriptions, publisher)

    def stop(number: int, frame: Any) -> None:
        for known in (signal.SIGTERM, signal.SIGINT):
            signal.signal(known, signal.SIG_DFL)
        # Whatever it waits for then, a server that says nothing for example.
        signal.signal(signal.SIGALRM, lambda *_: replicator.give_up())
        limit = project.settings.flash_shutdown_timeout + _LATE_SECONDS
        signal.setitimer(signal.ITIMER_REAL, limit, _LATE_SECONDS)
        replicator.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.set_wakeup_fd(replicator.control.waker.fileno(), warn_on_full_buffer=False)
    try:
        if wait_for_workers:
            replicator.wait_until(lambda: _workers_know(project), "Celery workers with this code")
        with suppress(Stopped):
            replicator.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(-1)


def _workers_know(project: _Project) -> bool:
    from . import doctor
    from .findings import OK

    findings = list(doctor.workers(project.app, project.subscriptions))
    return all(finding.level == OK for finding in findings)


@flash.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON (sizes in bytes, times in s).")
@_command
def status(project: _Project, as_json: bool) -> None:
    """Show the slot, its lag, the handlers and their queues."""
    from . import status as report

    with project.connect() as connection:
        found = report.status(connection, project.app, project.settings, project.subscriptions)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in report.lines(found):
            _say(line)


@flash.command()
@click.option(
    "--explain",
    is_flag=True,
    help="Say for each table what PostgreSQL filters, what the replication worker does, and why.",
)
@click.option(
    "--sql",
    "as_sql",
    is_flag=True,
    help="Print what the owner of the tables runs in psql, so that `replicate` has nothing to set "
    "up (flash_manage = False).",
)
@_command
def doctor(project: _Project, explain: bool, as_sql: bool) -> None:
    """Check every prerequisite, and say how to mend what is missing."""
    from . import doctor as checks
    from . import explain as explaining
    from . import preflight, sources, standbys
    from .findings import OK, STOP

    if as_sql:
        _script(project)
        return
    subject = project.settings, project.subscriptions
    explained: list[str] = []
    with project.connect() as connection:
        report = preflight.examine(connection, *subject)
        standing_by = list(standbys.findings(connection, project.settings))
        if explain:
            explained += explaining.explain(connection, *subject, report)
    findings = report.findings + standing_by + preflight.can_stream(project.settings)
    findings += checks.spool(project.settings)
    findings += sources.findings(*project.sources)
    broker = list(checks.broker(project.app, project.settings))
    findings += broker
    if broker[0].level == OK:  # or asking for workers takes its time
        findings += checks.workers(project.app, project.subscriptions)
    for finding in findings:
        _say(checks.line(finding))
    for line in explained:
        _say(line)
    if any(finding.level == STOP for finding in findings):
        click.get_current_context().exit(STOPPED)


def _script(project: _Project) -> None:
    import sys
    from dataclasses import replace

    from . import preflight, script
    from .escaping import escaped

    settings = replace(project.settings, flash_manage=False)
    with project.connect() as connection:
        report = preflight.examine(connection, settings, project.subscriptions)
    if not report.script:
        report.raise_first()
    terminal = sys.stdout.isatty()
    for line in script.lines(report.script):
        # For psql names are as they are; click would take escape sequences out.
        click.echo(escaped(line) if terminal else line, color=True)


@flash.command()
@click.option("--slot", default=None, help="The slot to drop.  [default: the source's]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="End the replication worker that reads the slot.")
@_command
def reset(project: _Project, slot: str | None, yes: bool, force: bool) -> None:
    """Drop the slot and its publications, and restore replica identities.

    Changes that were not read yet are lost; the next `replicate` starts at the present.
    """
    from . import reset as resetting

    name = slot or project.settings.flash_replication_slot
    with project.connect() as connection:
        undo = resetting.plan(connection, project.settings, name)
        if undo.empty:
            _say(undo.note or f"Nothing to reset: there is no slot {name}.")
            return
        _say("This will")
        for line in undo.lines():
            _say(f"  {line}")
        if not yes:
            click.confirm("Go on?", abort=True)
        resetting.run(connection, undo, force)
    click.echo("Done.")


@flash.command()
@click.argument("tables", nargs=-1, metavar="[TABLE]...")
@click.option("--limit", type=int, default=None, help="End after so many changes.")
@_command
def tail(project: _Project, tables: tuple[str, ...], limit: int | None) -> None:
    """Print changes as they are committed (default: of the tables that handlers name).

    Enqueues nothing and leaves nothing: its slot is temporary.
    """
    from . import tail as tailing
    from .errors import SubscriptionError
    from .subscriptions import of_tables

    wanted = list(dict.fromkeys(project.table(name) for name in tables))
    wanted = wanted or list(dict.fromkeys(one.table for one in of_tables(project.subscriptions)))
    if not wanted:
        raise SubscriptionError("No handler names a table; say which to follow: flash tail TABLE.")
    shown = 0

    def show(change: Any) -> bool:
        nonlocal shown
        shown += 1
        _say(tailing.line(change))
        return limit is None or shown < limit

    def ready() -> None:
        names = ", ".join(map(str, wanted))
        _say(f"Following {names}; Ctrl-C ends it.", err=True)

    try:
        tailing.tail(project.settings.require_dsn(), wanted, show, ready, project.settings.source)
    except KeyboardInterrupt:
        click.echo()


@flash.group()
def dead() -> None:
    """Dead letters: changes whose handler has failed for good."""


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which letters; the command gets a `Wanted`."""

    @functools.wraps(command)
    def run(project: _Project, *args: Any, **options: Any) -> Any:
        from .letterbox import Wanted

        names = ("ids", "handler", "table", "older", "newer")
        given = {name: options.pop(name) for name in names if name in options}
        return command(project, Wanted.of(**given), *args, **options)

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
@_command
@_filters
def dead_list(project: _Project, wanted: Any, as_json: bool) -> None:
    """Show the dead letters, the oldest first."""
    from . import letterbox

    box = project.letters()
    found = box.find(wanted)
    if as_json:
        click.echo(json.dumps([letterbox.as_json(letter) for letter in found], indent=2))
        return
    for line in letterbox.table(found) if found else ["no dead letters"]:
        _say(line)
    if box.strangers:
        click.echo(f"{box.strangers} other messages are in the queue; they stay there.", err=True)


@dead.command("show")
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_command
def dead_show(project: _Project, id: str, as_json: bool) -> None:
    """Show a letter with its traceback and its changes; the first 8 characters of its id do."""
    from . import letterbox, tail
    from .letterbox import Wanted

    box = project.letters()
    for letter in box.read(box.find(Wanted((id,)))):
        if as_json:
            decoded = {"decoded": letterbox.changes(letter, tail.line)}
            click.echo(json.dumps(letterbox.as_json(letter) | decoded, indent=2))
        else:
            for line in letterbox.whole(letter, tail.line):
                _say(line)


@dead.command("retry")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--split", is_flag=True, help="Send the changes of a batch one by one.")
@_command
@_filters
def dead_retry(project: _Project, wanted: Any, everything: bool, split: bool) -> None:
    """Send letters back to their handler's queue, with the same task id and the same changes.

    A letter is taken out when the broker has its message.
    """
    box, found = _chosen(project, wanted, everything)
    click.echo(f"{box.retry(found, split)} sent back to their handlers.")


@dead.command("drop")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_command
@_filters
def dead_drop(project: _Project, wanted: Any, everything: bool, yes: bool) -> None:
    """Throw letters away: their changes are never handled."""
    from . import letterbox

    box, found = _chosen(project, wanted, everything)
    if found and not yes:
        for line in letterbox.table(found):
            _say(line)
        click.confirm(f"Throw {len(found)} away?", abort=True)
    click.echo(f"{box.drop(found)} thrown away.")


def _chosen(project: _Project, wanted: Any, everything: bool) -> tuple[Any, Any]:
    from .errors import ConfigurationError

    if wanted.everything and not everything:
        raise ConfigurationError("Say which: ids, --handler, --table, --older, --newer or --all.")
    box = project.letters()
    return box, box.find(wanted)
