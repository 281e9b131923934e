"""System checks: whether the handlers fit the models and migrations.

With `--database` they also check the database itself.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psycopg
from celery.loaders.base import BaseLoader
from django.apps import apps
from django.core.checks import CheckMessage, Error, Warning
from django.db import connections
from django.db.migrations.loader import MigrationLoader

from ..dsn import place_of
from ..errors import (
    ConfigurationError,
    CredentialsError,
    ReplicationError,
    SubscriptionError,
    did_you_mean,
)
from ..handlers.app_subscriptions import subscriptions_of_task
from ..handlers.subscriptions import Subscription, of_tables, table_name
from ..postgres.connection import connect
from ..provisioning import table_checks
from ..settings import Settings
from ..table_name import TableName
from . import instances, migration_history, project
from .dsn import dsn as dsn_of_database
from .migration_history import MigrationHistory

_CORRECT_HINT = "Correct the on_change of this handler."
_UNKNOWN_HINT = (
    "If the table is not Django's, add the id of this warning to SILENCED_SYSTEM_CHECKS; "
    "`manage.py check --database default` checks the database itself."
)
_REMOVED_HINT = "Correct the handler, or deploy a release without it before you run the migration."

Messages = Iterator[CheckMessage]


def handlers(**_: Any) -> list[CheckMessage]:
    """Check the handlers against the models and the migrations, without a connection."""
    if _celery_is_importing():
        return []
    messages: list[CheckMessage] = []
    try:
        app = project.celery_app()
    except ConfigurationError as error:
        return [Warning(str(error), id="flash_celery.W004")]
    try:
        Settings.from_app(app)
    except ConfigurationError as error:
        messages.append(Warning(str(error), hint=error.solution, id="flash_celery.W005"))
    subscriptions = list(_subscriptions(app, messages))
    try:
        history = _history(subscriptions)
    except Exception as error:  # such as conflicting migrations
        text = f"The migrations cannot be read: {type(error).__name__}: {error}"
        messages.append(Warning(text, id="flash_celery.W004"))
        history = MigrationHistory()
    model_columns = _model_columns()
    for subscription in subscriptions:
        messages += _check_models(subscription, history, model_columns)
    return messages


def database(databases: Collection[str] | None = None, **_: Any) -> list[CheckMessage]:
    """Check the handlers against the databases of `check --database`."""
    if not databases or _celery_is_importing():
        return []
    try:
        app = project.celery_app()
        settings = Settings.from_app(app)
    except ConfigurationError:
        return []  # `handlers` reports it
    messages: list[CheckMessage] = []
    subscriptions = list(_subscriptions(app, []))
    places = _places(settings, {subscription.source for subscription in subscriptions}, messages)
    for alias in databases:
        dsn = dsn_of_database(alias)
        matching = [
            subscription
            for subscription in subscriptions
            if dsn and places.get(subscription.source) == place_of(dsn)
        ]
        if matching:
            messages += _check_database(alias, dsn, matching)
    return messages


def _celery_is_importing() -> bool:
    """Return whether Celery runs the checks while it imports the tasks.

    Celery's fixup for Django does so in every worker and discards the result. The tasks to check
    are not complete at that time.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not BaseLoader.import_default_modules.__code__:
        frame = frame.f_back
    return frame is not None


def _subscriptions(app: Any, messages: list[CheckMessage]) -> Iterator[Subscription]:
    """Yield the subscriptions to tables; append a message for each wrong declaration."""
    for name in sorted(app.tasks):
        try:
            yield from of_tables(subscriptions_of_task(app.tasks[name]))
        except SubscriptionError as error:
            messages.append(_message(Error, name, error, _CORRECT_HINT, "flash_celery.E001"))


def _message(
    level: type[CheckMessage], handler: str, error: object, hint: str | None, id: str
) -> CheckMessage:
    """Make a message about a handler."""
    return level(str(error).removeprefix(f"{handler}: "), hint=hint, obj=handler, id=id)


def _history(subscriptions: Sequence[Subscription]) -> MigrationHistory:
    columns: dict[TableName, set[str]] = {}
    for subscription in subscriptions:
        table = _model_table(subscription.table)
        columns.setdefault(table, set()).update(subscription.columns)
    return migration_history.read(columns) if columns else MigrationHistory()


def _model_columns() -> dict[TableName, set[str]]:
    """Return the tables of all models, with the columns that the models have."""
    columns: dict[TableName, set[str]] = {}
    for model in apps.get_models(include_auto_created=True):
        meta = model._meta
        if not meta.proxy and not meta.swapped:
            columns.setdefault(table_name(model), set()).update(
                field.column for field in meta.local_concrete_fields
            )
    return columns


def _model_table(table: TableName) -> TableName:
    """Return the table as models and migrations name it, which is without a tenant's schema."""
    instance_models = instances.models_of(table)
    return table_name(instance_models[0]) if instance_models else table


def _check_models(
    subscription: Subscription,
    history: MigrationHistory,
    model_columns: Mapping[TableName, set[str]],
) -> Messages:
    if subscription.pattern is not None and subscription.pattern.table.has_wildcards:
        return  # it may stand for tables without a model
    handler, table = subscription.handler, _model_table(subscription.table)
    yield from _check_removed(subscription, history)
    if subscription.source or (table, None) in history.removed:
        return  # another database may have tables that Django does not know
    if table not in model_columns and (table, None) not in history.present:
        suggestion = did_you_mean(subscription.table, model_columns) or "."
        text = f"No model has the table {subscription.table}{suggestion}"
        yield _message(Warning, handler, text, _UNKNOWN_HINT, "flash_celery.W001")
        return
    columns = model_columns.get(table, set())
    for column in sorted(subscription.columns - columns):
        if (table, column) not in history.present and (table, column) not in history.removed:
            suggestion = did_you_mean(column, columns) or "."
            text = f"No model of {subscription.table} has the column {column}{suggestion}"
            yield _message(Warning, handler, text, _UNKNOWN_HINT, "flash_celery.W002")


def _check_removed(subscription: Subscription, history: MigrationHistory) -> Messages:
    """Report the migration that removes the table, or else those that remove columns of it."""
    table, shown = _model_table(subscription.table), subscription.table
    table_removed = (table, None) in history.removed
    for column in [None] if table_removed else sorted(subscription.columns):
        migration = history.removed.get((table, column))
        if migration is not None:
            removed = f"the table {shown}" if column is None else f"{shown}.{column}"
            text = f"The migration {migration} removes {removed}."
            yield _message(Error, subscription.handler, text, _REMOVED_HINT, "flash_celery.E002")


def _places(
    settings: Settings, sources: Collection[str], messages: list[CheckMessage]
) -> dict[str, Any]:
    """Return the database of each source; append a message for each that cannot be asked."""
    places = {}
    for source in sorted(sources):
        # `flash doctor` reports that there is no such source.
        with suppress(ConfigurationError):
            source_settings = settings.of_source(source) if source else settings
            try:
                places[source] = source_settings.place()
            except CredentialsError as error:
                messages.append(Warning(str(error), hint=error.solution, id="flash_celery.W003"))
    return places


def _check_database(
    alias: str, dsn: str, subscriptions: Sequence[Subscription]
) -> list[CheckMessage]:
    try:
        with connect(dsn) as connection:
            problems = [
                (subscription, _problem(connection, subscription)) for subscription in subscriptions
            ]
    except (ReplicationError, psycopg.Error) as error:
        text = f"The tables of the handlers cannot be checked: {error}"
        return [Warning(text, obj=alias, id="flash_celery.W003")]
    try:
        history = _history(subscriptions)
        applied = MigrationLoader(connections[alias], ignore_no_migrations=True).applied_migrations
    except Exception:  # `handlers` reports it
        return []
    unapplied = sum(migration not in applied for migration in history.plan)
    return [
        message
        for subscription, problem in problems
        if problem is not None
        for message in _considering_migrations(subscription, problem, history, unapplied)
    ]


def _considering_migrations(
    subscription: Subscription, problem: CheckMessage, history: MigrationHistory, unapplied: int
) -> Messages:
    """Report a problem as an error only if no migration that is still to run may solve it.

    `manage.py migrate` runs the checks first, and an error would stop it.
    """
    if any(True for _ in _check_removed(subscription, history)):
        return  # `handlers` reports the migration
    if not unapplied:
        yield problem
        return
    table = _model_table(subscription.table)
    if not all((table, column) in history.present for column in (None, *subscription.columns)):
        # A migration with RunSQL may create it.
        hint = f"Run the migrations first; {unapplied} are not applied."
        yield _message(Warning, subscription.handler, problem.msg, hint, "flash_celery.W006")


def _problem(
    connection: psycopg.Connection[Any], subscription: Subscription
) -> CheckMessage | None:
    handler = subscription.handler
    if subscription.pattern is not None:
        return None  # it may match no table yet, and leaves out what it cannot have
    try:
        table = table_checks.find(connection, subscription)
        table_checks.check(connection, subscription, table)
    except SubscriptionError as error:
        return _message(Error, handler, error, _CORRECT_HINT, "flash_celery.E003")
    try:
        table_checks.check_columns(connection, subscription, table)
    except SubscriptionError as error:
        return _message(Error, handler, error, _CORRECT_HINT, "flash_celery.E004")
    return None
