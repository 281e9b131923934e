"""What a project's migrations make of tables and columns: which are there in the end, and which
migration took one away. It is read from the files; `RunSQL` and `RunPython` say nothing of it.
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

#: The bytes of a name in PostgreSQL.
_NAME_LENGTH = 63
#: A table, or with a name a column of it.
Place = tuple[TableName, str | None]


@dataclass
class History:
    """What became of some tables and columns in the course of all migrations."""

    #: Those that are there in the end.
    present: set[Place] = field(default_factory=set)
    #: Those that are not, and what took them away: `shop.0002_tidy (Remove field …)`.
    lost: dict[Place, str] = field(default_factory=dict)
    #: All migrations, by app and name, each after those it depends on.
    plan: list[tuple[str, str]] = field(default_factory=list)


def read(wanted: Mapping[TableName, Collection[str]]) -> History:
    """The history of the tables and columns that are wanted."""
    loader = MigrationLoader(None, ignore_no_migrations=True)
    leaves = (loader.graph.forwards_plan(leaf) for leaf in sorted(loader.graph.leaf_nodes()))
    state, found = ProjectState(), History(plan=list(dict.fromkeys(chain(*leaves))))
    for label, name in found.plan:
        migration = loader.graph.nodes[label, name]
        for operation in migration.operations:
            before = set(_places(state, wanted, label, managed=True))
            operation.state_forwards(label, state)
            after = set(_places(state, wanted, label))
            if not (isinstance(operation, SeparateDatabaseAndState) and _only_state(operation)):
                what = f"{label}.{name} ({operation.describe()})"
                found.lost |= dict.fromkeys(before - after, what)
            for place in after:
                found.lost.pop(place, None)
    found.present = set(_places(state, wanted))
    return found


def _only_state(operation: Any) -> bool:
    """Whether it does nothing to the database."""
    return not operation.database_operations


def _places(
    state: ProjectState,
    wanted: Mapping[TableName, Collection[str]],
    label: str | None = None,
    managed: bool = False,
) -> Iterator[Place]:
    """The wanted tables and columns of the models, of one app or of all."""
    for model in list(state.models.values()):
        options = model.options
        if label not in (None, model.app_label) or options.get("proxy"):
            continue
        if managed and not options.get("managed", True):
            continue
        for table, columns in _tables(model):
            if table in wanted:
                yield table, None
                there = wanted[table] if columns is None else columns & set(wanted[table])
                yield from ((table, column) for column in there)


def _tables(model: ModelState) -> Iterator[tuple[TableName, set[str] | None]]:
    """The tables of a model, with their columns; None where they are what Django makes them."""
    default = truncate_name(f"{model.app_label}_{model.name.lower()}", _NAME_LENGTH)
    db_table = model.options.get("db_table") or default
    columns = {"id"} if not any(one.primary_key for one in model.fields.values()) else set()
    for name, declared in model.fields.items():
        if declared.many_to_many:
            if declared.remote_field.through is None:
                made = truncate_name(f"{strip_quotes(db_table)}_{name}", _NAME_LENGTH)
                yield TableName.of_db_table(declared.db_table or made), None
            continue
        bound = declared.clone()
        bound.set_attributes_from_name(name)
        if bound.column is not None:
            columns.add(bound.column)
    yield TableName.of_db_table(db_table), columns
