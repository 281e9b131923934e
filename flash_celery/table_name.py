"""Names of tables, in the spellings of SQL and Django."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import SubscriptionError


@dataclass(frozen=True)
class TableName:
    """The schema and the name of a table, as the catalog spells them."""

    schema: str
    name: str

    @classmethod
    def parse(cls, text: str) -> TableName:
        """Parse a name as SQL spells it: `orders`, `sales.orders`, `"Sales"."Order lines"`.

        A name without a schema is in `public`. Names with dots, colons, spaces or quotes must be
        quoted. Case is kept even without quotes.

        Raises:
            SubscriptionError: The text is not the name of a table.
        """
        unquoted = [unquote(part) for part in split(text)]
        return cls("public", unquoted[0]) if len(unquoted) == 1 else cls(*unquoted)

    @classmethod
    def of_db_table(cls, db_table: str) -> TableName:
        """Parse a `Meta.db_table` as Django does: `orders`, or with a schema `"sales"."orders"`."""
        # Django quotes it unless it begins and ends with quotes, so sales"."orders has a schema.
        quoted = db_table.startswith('"') and db_table.endswith('"')
        text = db_table if quoted else f'"{db_table}"'
        return cls.parse(text) if _NAME.fullmatch(text) else cls("public", db_table)

    def __str__(self) -> str:
        return ".".join(_quote(part) for part in (self.schema, self.name))


def split(text: str) -> list[str]:
    """Return the one or two parts of a table's name, each with its quotes.

    Raises:
        SubscriptionError: The text is not the name of a table.
    """
    if not _NAME.fullmatch(text):
        raise SubscriptionError(
            f'{text!r} is not a table name; write orders, sales.orders or "Sales"."Order lines".'
        )
    return [part for part in _PART.findall(text) if part]


def unquote(part: str) -> str:
    """Return a part of a name without its quotes."""
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


_UNIT = r'(?:"(?:[^"]|"")+"|[^\s".:]+)'
_NAME = re.compile(rf"{_UNIT}(?:\.{_UNIT})?")
_PART = re.compile(_UNIT)


def _quote(identifier: str) -> str:
    if re.fullmatch(r"[^\s\".:]+", identifier):
        return identifier
    return '"' + identifier.replace('"', '""') + '"'
