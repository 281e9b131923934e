"""What the page in the admin shows: `flash status` of every source, and the dead letters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import psycopg

from ..commands import status
from ..dead_letters.letters import DeadLetter
from ..dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from ..errors import FlashError
from ..escaping import escaped, one_line
from ..handlers.decorators import subscriptions_of
from ..postgres.connection import connect
from ..settings import Settings

#: Seconds that PostgreSQL may take for a statement.
_PATIENCE = 5.0
#: Dead letters on the page, and in the queue; of more the page says the number only, for reading
#: them all takes its time.
SHOWN, READ = 100, 2_000


def sources(app: Any) -> list[dict[str, Any]]:
    """Each source with its status, or with the `error` that keeps it from being known."""
    settings = Settings.from_app(app)
    subscriptions = subscriptions_of(app)
    default = [settings] if settings.flash_dsn or not settings.flash_sources else []
    found = []
    for one in [*default, *map(settings.of_source, settings.flash_sources)]:
        mine = [each for each in subscriptions if each.source == one.source]
        try:
            with connect(one.require_dsn(), _PATIENCE) as connection:
                report = status.examine(connection, app, one, mine)
        except (FlashError, psycopg.Error) as error:
            found.append({"source": one.source, "error": one_line(error)})
            continue
        source = report.as_json()
        if slot := report.database.slot:
            source["slot"]["lag"] = status.size(slot.lag_bytes)
            source["slot"]["retained"] = status.size(slot.retained_bytes)
        found.append(source)
    return [shown(each) for each in found]


def dead_letters(app: Any) -> dict[str, Any]:
    """The oldest dead letters and how many there are. Raises `FlashError`."""
    box = _box(app)
    count = box.count()
    found = box.find(DeadLetterFilter()) if count <= READ else []
    said = [shown({"name": _name(one), **vars(one), "summary": one.summary}) for one in found]
    return {"count": count, "letters": said[:SHOWN], "too_many": count > READ}


def retry(app: Any, names: Collection[str]) -> tuple[int, int]:
    """Send the letters of these names back; how many, and how many were there no more.

    Raises `FlashError`.
    """
    box = _box(app)
    found: Sequence[DeadLetter] = [
        one for one in box.find(DeadLetterFilter()) if _name(one) in names
    ]
    sent = box.retry(found, split=False) if found else 0
    return sent, len(names) - sent


def _box(app: Any) -> DeadLetterQueue:
    return DeadLetterQueue(app, Settings.from_app(app).flash_dead_queue)


def _name(letter: DeadLetter) -> str:
    """What tells a letter from a later one of the same task."""
    return escaped(f"{letter.id} {letter.failed_at}")


def shown(found: Any) -> Any:
    """The same with every text as it may be shown."""
    if isinstance(found, str):
        return "\n".join(map(escaped, found.split("\n")))
    if isinstance(found, dict):
        return {name: shown(value) for name, value in found.items()}
    return [shown(one) for one in found] if isinstance(found, (list, tuple)) else found
