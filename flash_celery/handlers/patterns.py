"""Patterns of table names: `tenant_*.orders`, `public.*`, `*.audit_*`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import SubscriptionError
from ..table_name import TableName, split, unquote

#: `*` stands for any characters, `?` for one. In quotes they stand for themselves.
_WILDCARDS = re.compile(r"[*?]")


@dataclass(frozen=True)
class Glob:
    """A schema or a table, or several with wildcards."""

    text: str
    #: Whether it was quoted, so that it has no wildcards.
    quoted: bool = False

    @classmethod
    def of(cls, part: str) -> Glob:
        """Read a part of a name, with its quotes."""
        return cls(unquote(part), part.startswith('"'))

    @property
    def has_wildcards(self) -> bool:
        """Whether it may stand for several names."""
        return not self.quoted and _WILDCARDS.search(self.text) is not None

    def matches(self, name: str) -> bool:
        """Return whether it stands for a name."""
        return _compiled(self).fullmatch(name) is not None

    @property
    def like(self) -> str:
        """The same as an argument of SQL's LIKE."""
        escaped = re.sub(r"([%_\\])", r"\\\1", self.text)
        return escaped if self.quoted else escaped.replace("*", "%").replace("?", "_")


#: Schemas that are PostgreSQL's own.
SYSTEM_SCHEMAS = (Glob("pg_*"), Glob("information_schema"))
#: Our own tables. Handling a change writes to them.
OURS = (Glob("flash_celery_*"),)
#: What frameworks keep for themselves. With a result backend in the same database, each handled
#: change would be followed by one of its result. A pattern has them if it spells their name out.
BOOKKEEPING = tuple(
    map(
        Glob,
        (
            "django_migrations",
            "celery_taskmeta",
            "celery_tasksetmeta",
            "django_celery_results_*",
            "kombu_*",
        ),
    )
)


@lru_cache(maxsize=256)
def _compiled(glob: Glob) -> re.Pattern[str]:
    escaped = re.escape(glob.text)
    if not glob.quoted:
        escaped = escaped.replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(escaped, re.DOTALL)


@dataclass(frozen=True)
class TablePattern:
    """The tables that one `on_change` is for, by their names."""

    schema: Glob
    table: Glob
    #: Those that it leaves out; a schema of None is any.
    exclude: tuple[tuple[Glob | None, Glob], ...] = ()

    @property
    def name(self) -> TableName:
        """The pattern as if it were a table's name."""
        return TableName(self.schema.text, self.table.text)

    def __str__(self) -> str:
        return str(self.name)

    @property
    def never(self) -> tuple[Glob, ...]:
        """The tables that it has in no schema."""
        return (*OURS, *BOOKKEEPING) if self.table.has_wildcards else OURS

    def matches(self, name: TableName) -> bool:
        """Return whether a table of this name is one of them, if it can have handlers at all."""
        if not (self.schema.matches(name.schema) and self.table.matches(name.name)):
            return False
        if any(glob.matches(name.schema) for glob in SYSTEM_SCHEMAS):
            return False
        if any(glob.matches(name.name) for glob in self.never):
            return False
        return not any(
            (schema is None or schema.matches(name.schema)) and table.matches(name.name)
            for schema, table in self.exclude
        )


def pattern_of(
    table: Any, name: TableName, schema: Any = None, exclude: Any = None
) -> TablePattern | None:
    """Read the pattern of an `on_change`; None if it names one table.

    Args:
        table: Its `table`, without the source.
        name: The name of that table.
        schema: Its `schema=`, which replaces the schema of the name.
        exclude: Its `exclude=`.

    Raises:
        SubscriptionError: An argument is wrong.
    """
    parts = [Glob.of(part) for part in split(table)] if isinstance(table, str) else []
    schema_part = parts[0] if len(parts) == 2 else Glob(name.schema, quoted=True)
    table_part = parts[-1] if parts else Glob(name.name, quoted=True)
    if schema is not None:
        schema_part = _schema_of(schema, parts)
    pattern = TablePattern(schema_part, table_part, _excluded(exclude))
    if schema_part.has_wildcards or table_part.has_wildcards:
        return pattern
    if exclude is not None:
        raise SubscriptionError(
            f"exclude= is for patterns such as tenant_*.orders, and {pattern.name} is one table."
        )
    return None


def _schema_of(schema: Any, parts: list[Glob]) -> Glob:
    if not isinstance(schema, str) or not schema or len(split(schema)) != 1:
        raise SubscriptionError(
            f"schema is a name or a pattern such as 'tenant_*', not {schema!r}."
        )
    if len(parts) == 2:
        raise SubscriptionError(f"the table names the schema {parts[0].text}; leave out schema=.")
    return Glob.of(schema)


def _excluded(exclude: Any) -> tuple[tuple[Glob | None, Glob], ...]:
    if exclude is None:
        return ()
    names = [exclude] if isinstance(exclude, str) else exclude
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise SubscriptionError(f"exclude is a list of names or patterns, not {exclude!r}.")
    globs = [[Glob.of(part) for part in split(name)] for name in names]
    return tuple((parts[0] if len(parts) == 2 else None, parts[-1]) for parts in globs)
