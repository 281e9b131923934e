"""What every command starts from: the project of `-A`, and errors as one sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

#: Exit codes: a mistake that the message names; `doctor` found what stops `replicate`.
BAD_INPUT, STOPPED = 2, 1


def say(line: str, err: bool = False) -> None:
    """Print one line. What it names, anybody may have chosen who can write to the database."""
    from ..escaping import escaped

    click.echo(escaped(line), err=err)


class Project:
    """The app of `-A`, with the settings and the handlers of one source."""

    def __init__(self, app: Any, source: str | None) -> None:
        from ..errors import ConfigurationError
        from ..handlers.decorators import subscriptions_of
        from ..settings import Settings

        if app.main == "default" or (app.main is None and not app.conf.broker_url):
            raise ConfigurationError(
                "No app is given; write `celery -A your_project flash …`, where your_project is "
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
        self.subscriptions = [
            subscription
            for subscription in self.all_subscriptions
            if subscription.source == self.settings.source
        ]

    def connect(self) -> Any:
        from ..errors import ReplicationError
        from ..postgres.connection import connect, raise_if_fatal

        try:
            return connect(self.settings.require_dsn())
        except ReplicationError as error:
            raise_if_fatal(error, self.settings)
            raise

    def table(self, name: str) -> Any:
        """A table of this source, with or without its name."""
        from ..errors import SubscriptionError
        from ..handlers.subscriptions import split_source
        from ..table_name import TableName

        source, table = split_source(name)
        if source not in (None, self.settings.source):
            raise SubscriptionError(f"{name} is of another source; say --source {source}.")
        return TableName.parse(table)

    def letters(self) -> Any:
        from ..dead_letters.queue import DeadLetterQueue

        return DeadLetterQueue(self.app, self.settings.flash_dead_queue)


def _complain(message: str, as_json: bool) -> None:
    if not as_json:
        say(f"Error: {message}", err=True)
        return
    import time

    from .. import logs

    click.echo(logs.line(logs.fields(time.time(), "ERROR", __name__, message)), err=True)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
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

        from ..errors import FlashError
        from ..escaping import one_line

        as_json = bool(kwargs.get("log_json"))
        try:
            return function(Project(context.obj.app, source), *args, **kwargs)
        except FlashError as error:
            _complain(str(error), as_json)
        except Error as error:
            _complain(f"PostgreSQL: {one_line(error)}", as_json)
        return context.exit(BAD_INPUT)

    return run
