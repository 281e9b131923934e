"""The subscriptions that `on_change` and `on_message` declare, and how their arguments are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ..changes.change import Operation
from ..conditions import parsing
from ..errors import SubscriptionError
from ..table_name import TableName
from . import django_models, sqlalchemy_models
from .databases import MARKS_TABLE, Database
from .existing_rows import Backfill
from .patterns import TablePattern
from .row_types import RowType

#: How the prefixes of flash-celery's own logical messages begin.
RESERVED_PREFIX = "flash."
_SOURCE_AND_TABLE = re.compile(r'((?:"[^"]*"|[^":])*):(.*)', re.DOTALL)


@dataclass(frozen=True)
class Batch:
    """The size of a batch handler's tasks.

    Attributes:
        size: The most changes in a task; at least 1.
        wait: The most seconds to wait until a batch is full, 0 to 3600. With 0 (the default) a
            batch has the changes that arrived together.
        transaction: Whether a batch has all changes of one transaction for the handler, of all
            tables that it is declared on. Above the size, or 4 MB of rows, it comes in parts
            (`changes.part`, `changes.last`). `batch="transaction"` is `Batch(10_000,
            transaction=True)`.
    """

    size: int
    wait: float = 0.0
    transaction: bool = False

    @classmethod
    def of(cls, batch: Any) -> Batch | None:
        """Read the `batch=` of an `on_change`: None, a number, `"transaction"` or a `Batch`.

        Raises:
            SubscriptionError: It is something else, or out of range.
        """
        if batch is None:
            return None
        if isinstance(batch, int) and not isinstance(batch, bool):
            batch = cls(batch)
        if batch == "transaction":
            batch = cls(_TRANSACTION_SIZE, transaction=True)
        if not isinstance(batch, Batch):
            raise SubscriptionError(
                f"batch is a number of changes, 'transaction' or a Batch, not {batch!r}."
            )
        if batch.size < 1 or not 0 <= batch.wait <= 3600:
            raise SubscriptionError(
                f"{batch} is out of range: size is at least 1, wait is 0 to 3600 seconds."
            )
        if batch.transaction and batch.wait:
            raise SubscriptionError(
                f"{batch} has changes of one transaction, which do not wait for others; leave out "
                "wait."
            )
        return batch


#: The most changes in one part of a transaction.
_TRANSACTION_SIZE = 10_000


@dataclass(frozen=True)
class Ordered:
    """How a handler's changes are kept in order.

    Attributes:
        by: The columns of the ordering key, as a name or a list of names (or of model fields).
            Changes with equal keys are handled one at a time and in commit order. Default: the
            row's key.
        lanes: How many keys can be handled at the same time at most, 1 to 4096; a key that is
            retried holds up those in its lane. Default: `flash_lanes`.
        on_failure: `"dead"` makes a dead letter of a change that has failed for good, and goes on;
            `"block"` stops its lane until `flash lanes skip` or `flash lanes retry`.
        coalesce: Seconds, 0 to 3600, that a change may wait so that neighbouring changes of a row
            become one: an update has `old` of the first and `new` of the last, and a row that was
            inserted and deleted leaves nothing. With 0 (the default) each change is delivered.
    """

    by: Any = None
    lanes: int | None = None
    on_failure: str = "dead"
    coalesce: float = 0.0

    @classmethod
    def of(cls, ordered: Any, model: Any) -> Ordered | None:
        """Read the `ordered=` of an `on_change`: None, a bool, columns or an `Ordered`.

        Raises:
            SubscriptionError: It is something else, or out of range.
        """
        if ordered is None or ordered is False:
            return None
        if ordered is True:
            ordered = cls()
        order: Ordered = ordered if isinstance(ordered, Ordered) else cls(by=ordered)
        by = order.by
        if sqlalchemy_models.is_attribute(by) or isinstance(by, str):
            by = [by]
        columns = column_names("ordered", by, model)
        lanes = order.lanes
        if lanes is not None and not (type(lanes) is int and 1 <= lanes <= MOST_LANES):
            raise SubscriptionError(
                f"ordered has lanes={lanes!r}; it is a number from 1 to {MOST_LANES}."
            )
        if order.on_failure not in ("dead", "block"):
            raise SubscriptionError(
                f"ordered has on_failure={order.on_failure!r}; it is 'dead' or 'block'."
            )
        seconds = order.coalesce
        if type(seconds) not in (int, float) or not 0 <= seconds <= 3600:
            raise SubscriptionError(
                f"ordered has coalesce={seconds!r}; it is a number of seconds from 0 to 3600."
            )
        return replace(order, by=columns)


#: The most lanes of a handler: a TRUNCATE puts a marker into each of them.
MOST_LANES = 4096


@dataclass(frozen=True)
class Subscription:
    """One `on_change` or `on_message` of one handler."""

    #: The name of the task.
    handler: str
    #: The table; for an `on_message`, an empty schema and the prefix.
    table: TableName
    #: The operations to deliver. The server must send those of `captured`.
    operations: Operation = Operation.ALL
    fields: tuple[str, ...] | None = None
    where: parsing.Condition | None = None
    key: tuple[str, ...] | None = None
    batch: Batch | None = None
    #: How its changes are kept in order; None if they are not.
    ordered: Ordered | None = None
    queue: str | None = None
    acks_late: bool = True
    #: Its position among the subscriptions of its task, from 0.
    number: int = 0
    #: The database: a name in `flash_sources`, or "" for the one of `flash_dsn`.
    source: str = ""
    #: The database in whose transaction the handler runs; None if it runs in none.
    once: Database | None = field(default=None, repr=False, hash=False)
    #: Whether it wants the rows that are there already; False also for tables of a pattern that
    #: join later. The task's message does not depend on it.
    backfill: Backfill | Literal[False] | None = field(default=None, repr=False)
    #: Of an `on_backfill_end`: the handler whose backfills it is about, "" for its own. Else None.
    ends_of: str | None = None
    #: Whether to leave out what the handler itself has written.
    ignore_own: bool = False
    #: The class of the rows; the task's message does not depend on it.
    into: RowType | None = field(default=None, repr=False)
    #: The pattern of its tables; `table` is then one of them, or shows the pattern.
    pattern: TablePattern | None = None

    @property
    def declared(self) -> TableName:
        """Its table or pattern, as the handler names it."""
        return self.table if self.pattern is None else self.pattern.name

    @property
    def tables(self) -> TableName | TablePattern:
        """Its one table, or the pattern of its tables."""
        return self.pattern or self.table

    def is_on(self, table: TableName) -> bool:
        """Return whether it is for the changes of a table."""
        return table == self.table if self.pattern is None else self.pattern.matches(table)

    def of(self, table: TableName) -> Subscription:
        """Return the same for one of the tables of its pattern."""
        return replace(self, table=table)

    @property
    def prefix(self) -> str | None:
        """The prefix of the logical messages; None if it is for the changes of a table."""
        return self.table.name if self.operations is Operation.MESSAGE else None

    @property
    def decorator(self) -> str:
        """The name of its decorator."""
        if self.ends_of is not None:
            return "on_backfill_end"
        return "on_change" if self.prefix is None else "on_message"

    @property
    def subject(self) -> str:
        """Its table or messages, in words."""
        source = f"{self.source}:" if self.source else ""
        if self.ends_of is not None:
            return f"the end of {source}backfills of {self.ends_of}"
        if self.prefix is None:
            return f"{source}{self.table}"
        return f"messages {source}{self.prefix!r}"

    @cached_property
    def captured(self) -> Operation:
        """The operations the server must send to make every delivery possible.

        These include UPDATE if a condition or a key is set: an UPDATE can make a row enter or leave
        the condition, and change its key. For a backfill it can move a row to where it was read.
        """
        captured = self.operations
        rows = Operation.INSERT | Operation.UPDATE | Operation.DELETE
        if self.where is not None and captured & rows:
            captured |= Operation.UPDATE
        if self.key and captured & (Operation.INSERT | Operation.DELETE):
            captured |= Operation.UPDATE
        return captured | Operation.UPDATE if self.backfill else captured

    @property
    def receives_each_update(self) -> bool:
        """Whether every UPDATE of a row that is of its `where` is delivered."""
        return Operation.UPDATE in self.operations and not (self.fields or self.ignore_own)

    def old_columns(self, operation: Operation) -> frozenset[str]:
        """Return the columns whose old values the handler or its condition needs.

        Args:
            operation: The operation that the server sends.
        """
        if operation not in self.captured & (Operation.UPDATE | Operation.DELETE):
            return frozenset()
        # An UPDATE may be delivered as an Update or as a Delete.
        delivered = Operation.DELETE | operation
        fields = self.fields if self.operations & delivered else None
        key = self.key if operation is Operation.UPDATE else None
        where = self.where.columns if self.where is not None else frozenset()
        return where | frozenset(fields or ()) | frozenset(key or ()) | self.ordering_columns

    @property
    def ordering_columns(self) -> frozenset[str]:
        """The columns of its ordering key, if it names them."""
        return frozenset(self.ordered.by or ()) if self.ordered is not None else frozenset()

    @property
    def columns(self) -> frozenset[str]:
        """Every column that its `where`, `fields`, `key` and `ordered` name."""
        where = self.where.columns if self.where is not None else frozenset()
        named = frozenset(self.fields or ()) | frozenset(self.key or ())
        return where | named | self.ordering_columns


def of_tables(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Return the subscriptions to tables."""
    return [subscription for subscription in subscriptions if subscription.prefix is None]


def of_messages(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Return the subscriptions to logical messages."""
    return [each for each in subscriptions if each.prefix is not None and each.ends_of is None]


def of_ends(subscriptions: Iterable[Subscription], handler: str) -> list[Subscription]:
    """Return the subscriptions to the ends of the backfills of a handler."""
    return [each for each in subscriptions if each.ends_of == handler]


def of_patterns(subscriptions: Iterable[Subscription]) -> list[Subscription]:
    """Return the subscriptions to tables that a pattern names."""
    return [subscription for subscription in subscriptions if subscription.pattern is not None]


def of_source(subscriptions: Iterable[Subscription], source: str) -> list[Subscription]:
    """Return the subscriptions to a source: a name in `flash_sources`, "" for the default one."""
    return [subscription for subscription in subscriptions if subscription.source == source]


def prefix_of(prefix: Any) -> TableName:
    """Read the `prefix` of an `on_message`."""
    if not isinstance(prefix, str) or not prefix:
        raise SubscriptionError(f"on_message takes the prefix of the messages, not {prefix!r}.")
    if prefix.startswith(RESERVED_PREFIX):
        raise SubscriptionError(
            f"on_message({prefix!r}): messages whose prefix begins with {RESERVED_PREFIX} are "
            "flash-celery's own; choose another prefix."
        )
    return TableName("", prefix)


def handler_of(handler: Any) -> str:
    """Read the `handler` of an `on_backfill_end`: the name of a task, or None for its own."""
    if handler is None:
        return ""
    if not isinstance(handler, str) or not handler:
        raise SubscriptionError(f"on_backfill_end takes the name of a task, not {handler!r}.")
    return handler


def split_source(table: str) -> tuple[str | None, str]:
    """Split `"billing:public.invoices"` at the first colon outside quotes.

    Return the source, or None if there is no colon, and the table.
    """
    sourced = _SOURCE_AND_TABLE.fullmatch(table)
    if sourced is None:
        return None, table
    if not sourced[1]:
        raise SubscriptionError(f"{table!r} has no source before its colon.")
    return sourced[1], sourced[2]


def table_of(table: Any, source: Any) -> tuple[str, TableName]:
    """Read the `table` and `source=` of an `on_change`; return the source and the table's name.

    Raises:
        SubscriptionError: One of them is wrong, or they name different sources.
    """
    prefix, table = split_source(table) if isinstance(table, str) else (None, table)
    argument = source_of(source)
    if None not in (prefix, source) and prefix != argument:
        raise SubscriptionError(
            f"{prefix}:{table} is in the source {prefix!r}, but source= is {argument!r}; name one "
            "source."
        )
    name = table_name(table)
    if name.name == MARKS_TABLE:
        raise SubscriptionError(
            f"{MARKS_TABLE} cannot have a handler: each call of a handler with once= writes there."
        )
    return prefix or argument, name


def table_name(table: Any) -> TableName:
    """Return the name of a table.

    Args:
        table: Its name in SQL's spelling, a `TableName`, a Django model, or a SQLAlchemy class or
            `Table`.

    Raises:
        SubscriptionError: It is something else, or has no table.
    """
    if isinstance(table, str):
        return TableName.parse(table)
    if isinstance(table, TableName):
        return table
    if django_models.is_model(table):
        return django_models.table_name(table)
    if sqlalchemy_models.is_mapped(table):
        return sqlalchemy_models.table_name(table)
    raise SubscriptionError(
        f"on_change takes a table's name, a Django model or a SQLAlchemy table, not {table!r}."
    )


def source_of(source: Any) -> str:
    """Read `source=`; None is the default source, ""."""
    if source is not None and not isinstance(source, str):
        raise SubscriptionError(f"source= is a name in flash_sources, not {source!r}.")
    return source or ""


def operations_of(operations: Any) -> Operation:
    """Read `operations`: flags, `"insert|update"`, or an iterable of either."""
    if isinstance(operations, Operation):
        flags = operations
    elif isinstance(operations, str):
        flags = _parse_operations(operations.split("|"))
    elif isinstance(operations, Iterable):
        flags = Operation(0)
        for operation in operations:
            flags |= operations_of(operation)
    else:
        raise SubscriptionError(f"operations are names or Operation flags, not {operations!r}.")
    if not flags:
        raise SubscriptionError("operations= names no operation; omit it to get all of them.")
    if Operation.MESSAGE in flags:
        raise SubscriptionError("a logical message has no table; use on_message(prefix).")
    return flags


def _parse_operations(names: Iterable[str]) -> Operation:
    flags = Operation(0)
    for name in names:
        try:
            flags |= Operation[name.strip().upper()]
        except KeyError:
            raise SubscriptionError(
                f"there is no operation {name.strip()!r}; there are: insert, update, delete, "
                "truncate, all."
            ) from None
    return flags


def column_names(argument: str, names: Any, model: Any) -> tuple[str, ...] | None:
    """Read `fields=` or `key=`, and convert names of a model's fields or attributes to columns.

    Args:
        argument: `"fields"`, `"key"` or `"ordered"`, for the error.
        names: The names, or None.
        model: The `table` of the `on_change`.

    Raises:
        SubscriptionError: They are not a list of names, or the model has no such field.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise SubscriptionError(f"{argument} is a list of column names, not {names!r}.")
    columns = tuple(dict.fromkeys(column_name(name, model) for name in names))
    if isinstance(names, Set):
        # A set's order differs between processes; a subscription must be the same in all of them.
        columns = tuple(sorted(columns))
    if not columns:
        raise SubscriptionError(f"{argument} is empty; omit it, or name a column.")
    return columns


def column_name(name: Any, model: Any) -> str:
    """Return the column of a model's field or attribute; any other name as it is.

    Raises:
        SubscriptionError: It is not a string or an attribute, or the model has no such field.
    """
    if sqlalchemy_models.is_attribute(name) or (
        isinstance(name, str) and sqlalchemy_models.is_mapped(model)
    ):
        return sqlalchemy_models.column_name(name, model)
    if not isinstance(name, str):
        raise SubscriptionError(f"a column's name is a string, not {name!r}.")
    return django_models.column_name(name, model) if django_models.is_model(model) else name


def stored_value(name: Any, value: Any, model: Any) -> Any:
    """Return what the column of a field or attribute holds for a value of a condition."""
    if sqlalchemy_models.is_attribute(name) or sqlalchemy_models.is_mapped(model):
        return sqlalchemy_models.stored_value(name, value, model)
    return value
