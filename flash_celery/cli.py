"""`celery -A proj flash …`: the commands. This module is imported by every `celery` command, so it
imports click alone; a command imports what it does."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from typing import Any

import click

#: Exit codes: a mistake that the message names; `doctor` found what stops `replicate`.
BAD_INPUT, STOPPED = 2, 1


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
            click.echo(f"Error: {error}", err=True)
        except Error as error:
            click.echo(f"Error: PostgreSQL: {str(error).strip()}", err=True)
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
    from .replicator import Replicator

    sources.check(*project.sources)
    project.app.log.setup(loglevel=loglevel, logfile=logfile, redirect_stdouts=False)
    publisher = publishers.for_app(project.app)
    replicator = Replicator(project.app, project.settings, project.subscriptions, publisher)

    def stop(number: int, frame: Any) -> None:
        for known in (signal.SIGTERM, signal.SIGINT):
            signal.signal(known, signal.SIG_DFL)
        replicator.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.set_wakeup_fd(replicator.control.waker.fileno(), warn_on_full_buffer=False)
    try:
        if wait_for_workers:
            replicator.wait_until(lambda: _workers_know(project), "Celery workers with this code")
        replicator.run()
    finally:
        signal.set_wakeup_fd(-1)


def _workers_know(project: _Project) -> bool:
    from . import doctor
    from .preflight import OK

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
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(report.lines(found)))


@flash.command()
@click.option(
    "--explain",
    is_flag=True,
    help="Say for each table what PostgreSQL filters, what the replication worker does, and why.",
)
@_command
def doctor(project: _Project, explain: bool) -> None:
    """Check every prerequisite, and say how to mend what is missing."""
    from . import doctor as checks
    from . import explain as explaining
    from . import preflight, sources

    subject = project.settings, project.subscriptions
    explained: list[str] = []
    with project.connect() as connection:
        report = preflight.examine(connection, *subject)
        if explain:
            explained += explaining.explain(connection, *subject, report)
    findings = report.findings + preflight.can_stream(project.settings)
    findings += checks.spool(project.settings)
    findings += sources.findings(*project.sources)
    findings += [*checks.broker(project.app), *checks.workers(project.app, project.subscriptions)]
    for finding in findings:
        click.echo(checks.line(finding))
    for line in explained:
        click.echo(line)
    if any(finding.level == preflight.STOP for finding in findings):
        click.get_current_context().exit(STOPPED)


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
            click.echo(undo.note or f"Nothing to reset: there is no slot {name}.")
            return
        click.echo("This will")
        for line in undo.lines():
            click.echo(f"  {line}")
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
        click.echo(tailing.line(change))
        return limit is None or shown < limit

    def ready() -> None:
        names = ", ".join(map(str, wanted))
        click.echo(f"Following {names}; Ctrl-C ends it.", err=True)

    try:
        tailing.tail(project.settings.require_dsn(), wanted, show, ready, project.settings.source)
    except KeyboardInterrupt:
        click.echo()
