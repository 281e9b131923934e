"""The base of every command: the project of `-A`, and errors printed as one sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from . import process_memory

#: The exit code for a mistake that the message names.
BAD_INPUT = 2
#: The exit code of `doctor` if `replicate` would not start, and of `wait` if work is not done.
STOPPED = 1


def say(line: str, err: bool = False) -> None:
    """Print one line, with escape sequences made visible: names in it come from the database."""
    from ..escaping import escaped

    click.echo(escaped(line), err=err)


class Project:
    """The app of `-A`, with the settings and the handlers of one source."""

    def __init__(self, app: Any, source: str | None) -> None:
        from ..errors import ConfigurationError
        from ..handlers.app_subscriptions import subscriptions_of
        from ..handlers.subscriptions import of_source
        from ..settings import Settings

        if app.main == "default" or (app.main is None and not app.conf.broker_url):
            raise ConfigurationError(
                "Celery has no app; write `celery -A your_project flash …`, where your_project is "
                "the module of the Celery app."
            )
        app.loader.import_default_modules()
        app.finalize()
        self.app = app
        self.default_settings = Settings.from_app(app)
        self.settings = (
            self.default_settings if source is None else self.default_settings.of_source(source)
        )
        self.all_subscriptions = subscriptions_of(app)
        self.subscriptions = of_source(self.all_subscriptions, self.settings.source)

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Connect to PostgreSQL and yield a `postgres.source.Source`.

        Raises:
            ReplicationError: The server cannot be reached; the error has the fix where it is known.
        """
        from ..errors import ReplicationError
        from ..postgres.connection import connect, raise_if_fatal
        from ..postgres.source import Source

        try:
            connection = connect(self.settings.require_dsn())
        except ReplicationError as error:
            raise_if_fatal(error, self.settings)
            raise
        with connection:
            yield Source(connection, self.settings)

    def table(self, name: str) -> Any:
        """Parse the name of a table of this source; the source's name may precede it.

        Raises:
            SubscriptionError: The table is in another source.
        """
        from ..errors import SubscriptionError
        from ..handlers.subscriptions import split_source
        from ..table_name import TableName

        source, table = split_source(name)
        if source not in (None, self.settings.source):
            raise SubscriptionError(f"{name} belongs to another source; use --source {source}.")
        return TableName.parse(table)

    def tables(self, name: str) -> Any:
        """Parse the name of a table of this source, or a pattern of names.

        Raises:
            SubscriptionError: The table is in another source.
        """
        from ..handlers.patterns import pattern_of
        from ..handlers.subscriptions import split_source

        table = self.table(name)
        return pattern_of(split_source(name)[1], table) or table

    def dead_letters(self) -> Any:
        """Return the dead-letter queue."""
        from ..dead_letters.queue import DeadLetterQueue

        return DeadLetterQueue(self.app, self.settings.flash_dead_queue)


def _print_error(message: str, as_json: bool) -> None:
    if not as_json:
        say(f"Error: {message}", err=True)
        return
    import time

    from . import logs

    click.echo(logs.line(logs.fields(time.time(), "ERROR", __name__, message)), err=True)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a command its project, print errors as one sentence, and add --source."""

    @click.option(
        "--source",
        metavar="NAME",
        default=None,
        help="A name in flash_sources.  [default: the database of flash_dsn]",
    )
    @click.pass_context
    @functools.wraps(function)
    def run(context: click.Context, source: str | None, *args: Any, **kwargs: Any) -> Any:
        from psycopg import Error

        from ..errors import FlashError
        from ..escaping import one_line

        process_memory.leave_garbage_at_exit()
        as_json = bool(kwargs.get("log_json"))
        try:
            return function(Project(context.obj.app, source), *args, **kwargs)
        except FlashError as error:
            _print_error(str(error), as_json)
        except Error as error:
            _print_error(f"PostgreSQL: {one_line(error)}", as_json)
        return context.exit(BAD_INPUT)

    return run
