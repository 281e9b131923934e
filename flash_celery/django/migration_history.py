"""Read from a project's migrations which tables and columns exist in the end.

For each that does not, it finds the migration that removed it. The migrations' files are read, not
a database; what `RunSQL` and `RunPython` do is unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from django.db.backends.utils import strip_quotes, truncate_name
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations import SeparateDatabaseAndState
from django.db.migrations.state import ModelState, ProjectState

from ..table_name import TableName

#: The most bytes of a name in PostgreSQL.
_NAME_LENGTH = 63
#: A table and the name of a column of it; None for the table itself.
TableOrColumn = tuple[TableName, str | None]


@dataclass
class MigrationHistory:
    """What all migrations together do to some tables and columns."""

    #: The tables and columns that exist after the last migration.
    present: set[TableOrColumn] = field(default_factory=set)
    #: Those that were removed, each with the migration: `shop.0002_tidy (Remove field …)`.
    removed: dict[TableOrColumn, str] = field(default_factory=dict)
    #: All migrations, by app and name, each after those it depends on.
    plan: list[tuple[str, str]] = field(default_factory=list)


def read(columns: Mapping[TableName, Collection[str]]) -> MigrationHistory:
    """Return the history of these tables, and of these columns of them."""
    loader = MigrationLoader(None, ignore_no_migrations=True)
    leaves = (loader.graph.forwards_plan(leaf) for leaf in sorted(loader.graph.leaf_nodes()))
    state = ProjectState()
    history = MigrationHistory(plan=list(dict.fromkeys(chain(*leaves))))
    for label, name in history.plan:
        for operation in loader.graph.nodes[label, name].operations:
            before = set(_existing(state, columns, label, managed=True))
            operation.state_forwards(label, state)
            after = set(_existing(state, columns, label))
            if not _changes_only_state(operation):
                description = f"{label}.{name} ({operation.describe()})"
                history.removed |= dict.fromkeys(before - after, description)
            for table_or_column in after:
                history.removed.pop(table_or_column, None)
    history.present = set(_existing(state, columns))
    return history


def _changes_only_state(operation: Any) -> bool:
    """Return whether an operation leaves the database as it is."""
    if not isinstance(operation, SeparateDatabaseAndState):
        return False
    return not operation.database_operations


def _existing(
    state: ProjectState,
    columns: Mapping[TableName, Collection[str]],
    label: str | None = None,
    managed: bool = False,
) -> Iterator[TableOrColumn]:
    """Yield those of the tables and columns that models of the state have.

    Args:
        state: The models at some point of the migrations.
        columns: The tables and columns in question.
        label: The app; None for all apps.
        managed: Whether to leave out models whose tables Django does not manage.
    """
    for model in list(state.models.values()):
        options = model.options
        if label not in (None, model.app_label) or options.get("proxy"):
            continue
        if managed and not options.get("managed", True):
            continue
        for table, table_columns in _tables(model):
            if table in columns:
                yield table, None
                if table_columns is None:
                    existing = set(columns[table])
                else:
                    existing = table_columns & set(columns[table])
                yield from ((table, column) for column in existing)


def _tables(model: ModelState) -> Iterator[tuple[TableName, set[str] | None]]:
    """Yield the tables of a model with their columns, which are None for a many-to-many table."""
    default = truncate_name(f"{model.app_label}_{model.name.lower()}", _NAME_LENGTH)
    db_table = model.options.get("db_table") or default
    has_key = any(declared.primary_key for declared in model.fields.values())
    columns = set() if has_key else {"id"}
    for name, declared in model.fields.items():
        if declared.many_to_many:
            if declared.remote_field.through is None:
                link_table = truncate_name(f"{strip_quotes(db_table)}_{name}", _NAME_LENGTH)
                yield TableName.of_db_table(declared.db_table or link_table), None
            continue
        bound = declared.clone()
        bound.set_attributes_from_name(name)
        if bound.column is not None:
            columns.add(bound.column)
    yield TableName.of_db_table(db_table), columns
