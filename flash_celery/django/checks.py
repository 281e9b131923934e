"""`manage.py check`: whether the handlers fit the models, the migrations, and with `--database` the
database itself.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import psycopg
from celery.loaders.base import BaseLoader
from django.apps import apps
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections
from django.db.migrations.loader import MigrationLoader

from ..dsn import place_of
from ..errors import ConfigurationError, ReplicationError, SubscriptionError
from ..handlers.decorators import subscriptions_of_task
from ..handlers.subscriptions import Subscription, of_tables, table_name
from ..postgres.connection import connect
from ..provisioning import table_checks
from ..settings import Settings
from ..table_name import TableName
from . import migration_history, project
from .dsn import dsn as databases_dsn
from .migration_history import History

_CORRECT = "Correct the on_change of this handler."
_SILENCE = (
    "If Django does not know all of the table, `manage.py check --database default` looks into the "
    "database, and SILENCED_SYSTEM_CHECKS ends this warning."
)
_GOES = "Name what the migration leaves, or let a release without this handler run before it."
Found = Iterator[CheckMessage]


def handlers(**_: Any) -> list[CheckMessage]:
    """What can be known without a connection."""
    if _celery_imports():
        return []
    found: list[CheckMessage] = []
    try:
        app = project.celery_app()
    except ConfigurationError as error:
        return [Warning(str(error), id="flash_celery.W004")]
    try:
        Settings.from_app(app)
    except ConfigurationError as error:
        found.append(Warning(str(error), hint=error.solution, id="flash_celery.W005"))
    subscriptions = list(_subscriptions(app, found))
    try:
        lived = _history(subscriptions)
    except Exception as error:  # conflicting migrations, which makemigrations is to merge
        text = f"The migrations cannot be looked at: {type(error).__name__}: {error}"
        found.append(Warning(text, id="flash_celery.W004"))
        lived = History()
    known = _models()
    for one in subscriptions:
        found += _without_connection(one, lived, known)
    return found


def database(databases: Collection[str] | None = None, **_: Any) -> list[CheckMessage]:
    """What the databases of `check --database` say."""
    if not databases or _celery_imports():
        return []
    try:
        app = project.celery_app()
        settings = Settings.from_app(app)
    except ConfigurationError:
        return []  # `handlers` says so
    found: list[CheckMessage] = []
    subscriptions = list(_subscriptions(app, []))
    for alias in databases:
        dsn = databases_dsn(alias)
        mine = [one for one in subscriptions if dsn and _leads_to(dsn, settings, one.source)]
        if mine:
            found += _within(alias, dsn, mine)
    return found


def _celery_imports() -> bool:
    """Whether Celery itself asks, in the middle of importing the tasks that are to be looked at.

    Its fixup for Django runs all checks then, in every worker, and throws away what they say.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not BaseLoader.import_default_modules.__code__:
        frame = frame.f_back
    return frame is not None


def _subscriptions(app: Any, found: list[CheckMessage]) -> Iterator[Subscription]:
    """Those of tables; what is wrong with a declaration is found."""
    for name in sorted(app.tasks):
        try:
            yield from of_tables(subscriptions_of_task(app.tasks[name]))
        except SubscriptionError as error:
            found.append(_message(Error, name, error, _CORRECT, "flash_celery.E001"))


def _message(kind: Any, handler: str, error: object, hint: str | None, id: str) -> CheckMessage:
    """A message about a handler."""
    return kind(str(error).removeprefix(f"{handler}: "), hint=hint, obj=handler, id=id)


def _history(subscriptions: Sequence[Subscription]) -> History:
    wanted: dict[TableName, set[str]] = {}
    for one in subscriptions:
        wanted.setdefault(one.table, set()).update(one.columns)
    return migration_history.read(wanted) if wanted else History()


def _models() -> dict[TableName, set[str]]:
    """The tables that models have, with the columns they know."""
    found: dict[TableName, set[str]] = {}
    for model in apps.get_models(include_auto_created=True):
        meta = model._meta
        if not meta.proxy and not meta.swapped:
            columns = {field.column for field in meta.local_concrete_fields}
            found.setdefault(table_name(model), set()).update(columns)
    return found


def _without_connection(
    one: Subscription, lived: History, known: Mapping[TableName, set[str]]
) -> Found:
    yield from _taken_away(one, lived)
    if one.source or (one.table, None) in lived.lost:
        return  # what Django does not know may be in another database
    if one.table not in known and (one.table, None) not in lived.present:
        close = _close(str(one.table), map(str, known))
        text = f"No model has the table {one.table}{close}"
        yield _message(Warning, one.handler, text, _SILENCE, "flash_celery.W001")
        return
    columns = known.get(one.table, set())
    for column in sorted(one.columns - columns):
        place = one.table, column
        if place not in lived.present and place not in lived.lost:
            text = f"No model of {one.table} has the column {column}{_close(column, columns)}"
            yield _message(Warning, one.handler, text, _SILENCE, "flash_celery.W002")


def _taken_away(one: Subscription, lived: History) -> Found:
    """What a migration takes away, the table or else columns of it."""
    table_lost = (one.table, None) in lived.lost
    for column in [None] if table_lost else sorted(one.columns):
        if (one.table, column) in lived.lost:
            what = f"the table {one.table}" if column is None else f"{one.table}.{column}"
            text = f"The migration {lived.lost[one.table, column]} takes away {what}"
            yield _message(Error, one.handler, f"{text}.", _GOES, "flash_celery.E002")


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else "."


def _leads_to(dsn: str, settings: Settings, source: str) -> bool:
    """Whether a source is the database of this DSN."""
    try:
        given = settings.of_source(source) if source else settings
    except ConfigurationError:
        return False  # `flash doctor` says that there is no such source
    return place_of(given.flash_dsn) == place_of(dsn)


def _within(alias: str, dsn: str, subscriptions: Sequence[Subscription]) -> list[CheckMessage]:
    """What the database says of the tables and columns that handlers name."""
    try:
        with connect(dsn) as connection:
            wrong = [(one, _wrong_in(connection, one)) for one in subscriptions]
    except (ReplicationError, psycopg.Error) as error:
        text = f"The tables of the handlers cannot be looked at: {error}"
        return [Warning(text, obj=alias, id="flash_celery.W003")]
    try:
        lived = _history(subscriptions)
        applied = MigrationLoader(connections[alias], ignore_no_migrations=True).applied_migrations
    except Exception:  # `handlers` says so
        return []
    unapplied = sum(node not in applied for node in lived.plan)
    return [
        message
        for one, problem in wrong
        if problem is not None
        for message in _now(one, problem, lived, unapplied)
    ]


def _now(one: Subscription, problem: CheckMessage, lived: History, unapplied: int) -> Found:
    """What is to be said of a problem while so many migrations are not applied."""
    if any(True for _ in _taken_away(one, lived)):
        return  # `handlers` names the migration
    if not unapplied:
        yield problem
    elif not all((one.table, column) in lived.present for column in (None, *one.columns)):
        # A migration may make it in SQL, and must not be stopped before it does.
        hint = f"Run the migrations first; {unapplied} are not applied."
        yield _message(Warning, one.handler, problem.msg, hint, "flash_celery.W006")


def _wrong_in(connection: psycopg.Connection[Any], one: Subscription) -> CheckMessage | None:
    try:
        table = table_checks.find(connection, one)
        table_checks.check(connection, one, table)
    except SubscriptionError as error:
        return _message(Error, one.handler, error, _CORRECT, "flash_celery.E003")
    try:
        table_checks.check_columns(connection, one, table)
    except SubscriptionError as error:
        return _message(Error, one.handler, error, _CORRECT, "flash_celery.E004")
    return None
