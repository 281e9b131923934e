"""What `on_change` and `on_message` declare: what a handler is told of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any

from ..changes.change import Operation
from ..conditions import lookups
from ..errors import SubscriptionError
from ..table_name import TableName
from . import django_models, sqlalchemy_models
from .row_types import RowType

_SOURCED = re.compile(r'((?:"[^"]*"|[^":])*):(.*)', re.DOTALL)


@dataclass(frozen=True)
class Batch:
    """How many changes one task of a batch handler gets, and how long it may wait for them.

    `size` is the most changes in a task; `wait` is how many seconds a batch that is not full may be
    held. With 0 it holds whatever had arrived together.
    """

    size: int
    wait: float = 0.0

    @classmethod
    def of(cls, batch: Any) -> Batch | None:
        """Read the `batch=` of an `on_change`."""
        if batch is None or isinstance(batch, Batch):
            found = batch
        elif isinstance(batch, int) and not isinstance(batch, bool):
            found = cls(batch)
        else:
            raise SubscriptionError(f"batch is a number of changes or a Batch, not {batch!r}.")
        if found is not None and (found.size < 1 or not 0 <= found.wait <= 3600):
            raise SubscriptionError(
                f"{found} cannot be: size is at least 1, wait is 0 to 3600 seconds."
            )
        return found


@dataclass(frozen=True)
class Subscription:
    """One `on_change` or `on_message` of one handler."""

    #: Name of the task that runs.
    handler: str
    #: Of an `on_message`, no schema and the prefix.
    table: TableName
    #: What may be delivered; what the server must send is `captured`.
    operations: Operation = Operation.ALL
    fields: tuple[str, ...] | None = None
    where: lookups.Condition | None = None
    key: tuple[str, ...] | None = None
    batch: Batch | None = None
    queue: str | None = None
    acks_late: bool = True
    #: Which of its task's subscriptions this is, from 0.
    number: int = 0
    #: The database it is about: a name in `flash_sources`, "" for the default one.
    source: str = ""
    #: What its rows are told as; not part of what was enqueued.
    into: RowType | None = field(default=None, repr=False)

    @property
    def prefix(self) -> str | None:
        """The prefix of the logical messages it is for; None for the changes of a table."""
        return self.table.name if self.operations is Operation.MESSAGE else None

    @property
    def subject(self) -> str:
        """What it is for, in words."""
        of = f"{self.source}:" if self.source else ""
        return f"{of}{self.table}" if self.prefix is None else f"messages {of}{self.prefix!r}"

    @property
    def captured(self) -> Operation:
        """The operations the server must send so that every delivery can be made.

        A row enters or leaves a condition, and changes its key, by an UPDATE.
        """
        captured = self.operations
        rows = Operation.INSERT | Operation.UPDATE | Operation.DELETE
        if self.where is not None and captured & rows:
            captured |= Operation.UPDATE
        if self.key and captured & (Operation.INSERT | Operation.DELETE):
            captured |= Operation.UPDATE
        return captured

    def old_columns(self, operation: Operation) -> frozenset[str]:
        """The columns whose old value is needed to judge an operation of the server's, or to tell
        of it."""
        if operation not in self.captured & (Operation.UPDATE | Operation.DELETE):
            return frozenset()
        # An UPDATE may be told as an Update or as a Delete.
        told = Operation.DELETE | operation
        fields = self.fields if self.operations & told else None
        key = self.key if operation is Operation.UPDATE else None
        where = self.where.columns if self.where is not None else frozenset()
        return where | frozenset(fields or ()) | frozenset(key or ())

    @property
    def columns(self) -> frozenset[str]:
        """Every column it names."""
        where = self.where.columns if self.where is not None else frozenset()
        return where | frozenset(self.fields or ()) | frozenset(self.key or ())


def of_tables(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Those that are for the changes of a table."""
    return [one for one in subscriptions if one.prefix is None]


def prefix_of(prefix: Any) -> TableName:
    """Read the prefix of an `on_message`."""
    if not isinstance(prefix, str) or not prefix:
        raise SubscriptionError(f"on_message takes the prefix of the messages, not {prefix!r}.")
    return TableName("", prefix)


def split_source(table: str) -> tuple[str | None, str]:
    """The source and the table of `"billing:public.invoices"`; None where no source is named.

    It ends at the first colon outside quotes.
    """
    sourced = _SOURCED.fullmatch(table)
    if sourced is None:
        return None, table
    if not sourced[1]:
        raise SubscriptionError(f"{table!r} names no source before its colon.")
    return sourced[1], sourced[2]


def table_of(table: Any, source: Any) -> tuple[str, TableName]:
    """Read the `table` and `source=` of an `on_change`: which database, and which table there."""
    spelled, table = split_source(table) if isinstance(table, str) else (None, table)
    given = source_of(source)
    if None not in (spelled, source) and spelled != given:
        raise SubscriptionError(
            f"{spelled}:{table} is of the source {spelled!r}, and source= says {given!r}; name one."
        )
    return spelled or given, table_name(table)


def table_name(table: Any) -> TableName:
    """The name of a table, given in SQL's spelling, as a Django model, or as a SQLAlchemy class or
    `Table`. Raises `SubscriptionError` for anything else.
    """
    if isinstance(table, str):
        return TableName.parse(table)
    if isinstance(table, TableName):
        return table
    if django_models.is_model(table):
        return TableName.of_db_table(django_models.db_table(table))
    if sqlalchemy_models.is_mapped(table):
        return TableName(*sqlalchemy_models.table_name(table))
    raise SubscriptionError(
        f"on_change takes a table's name, a Django model or a SQLAlchemy table, not {table!r}."
    )


def source_of(source: Any) -> str:
    """Read `source=`; without it the default one."""
    if source is not None and not isinstance(source, str):
        raise SubscriptionError(f"source= is a name in flash_sources, not {source!r}.")
    return source or ""


def operations_of(operations: Any) -> Operation:
    """Read `operations`: flags, `"insert|update"`, or an iterable of either."""
    if isinstance(operations, Operation):
        found = operations
    elif isinstance(operations, str):
        found = _operations_named(operations.split("|"))
    elif isinstance(operations, Iterable):
        found = Operation(0)
        for operation in operations:
            found |= operations_of(operation)
    else:
        raise SubscriptionError(f"operations are names or Operation flags, not {operations!r}.")
    if not found:
        raise SubscriptionError("on_change has no operation; leave it out to get all of them.")
    if Operation.MESSAGE in found:
        raise SubscriptionError("a logical message has no table; declare it by on_message(prefix).")
    return found


def _operations_named(names: Iterable[str]) -> Operation:
    found = Operation(0)
    for name in names:
        try:
            found |= Operation[name.strip().upper()]
        except KeyError:
            raise SubscriptionError(
                f"there is no operation {name.strip()!r}; there are: insert, update, delete, "
                "truncate, all."
            ) from None
    return found


def column_names(argument: str, names: Any, model: Any) -> tuple[str, ...] | None:
    """Read `fields=` or `key=`; names of a model's fields or attributes become its columns."""
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise SubscriptionError(f"{argument} is a list of column names, not {names!r}.")
    found = tuple(dict.fromkeys(column_name(name, model) for name in names))
    if isinstance(names, Set):
        # Its order differs from process to process, and what is declared must not.
        found = tuple(sorted(found))
    if not found:
        raise SubscriptionError(f"{argument} is empty; leave it out, or name a column.")
    return found


def column_name(name: Any, model: Any) -> str:
    """The column of a model's field or attribute; any other name as it is."""
    if sqlalchemy_models.is_attribute(name) or (
        isinstance(name, str) and sqlalchemy_models.is_mapped(model)
    ):
        return sqlalchemy_models.column_name(name, model)
    if not isinstance(name, str):
        raise SubscriptionError(f"a column is named by a string, not {name!r}.")
    return django_models.column_name(name, model) if django_models.is_model(model) else name
