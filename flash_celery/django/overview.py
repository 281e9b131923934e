"""The content of the page in the admin: the status of every source, and the dead letters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import psycopg

from ..commands import status
from ..commands.worker_checks import Registered
from ..dead_letters.letters import DeadLetter
from ..dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from ..errors import FlashError
from ..escaping import escaped, one_line
from ..handlers.app_subscriptions import subscriptions_of
from ..handlers.subscriptions import of_source
from ..postgres.source import connected
from ..settings import Settings

#: The most dead letters on the page.
MAX_SHOWN = 100
#: The most dead letters in a queue that the page reads; reading more takes too long for a page.
MAX_READ = 2_000

#: Seconds that PostgreSQL may take for a statement.
_STATEMENT_TIMEOUT = 5.0


def sources(app: Any) -> list[dict[str, Any]]:
    """Return the status of each source; for a database that is down, its name and the `error`.

    All text in it is escaped for a page.
    """
    settings = Settings.from_app(app)
    subscriptions = subscriptions_of(app)
    default = [settings] if settings.flash_dsn or not settings.flash_sources else []
    reports: list[dict[str, Any]] = []
    for source_settings in [*default, *map(settings.of_source, settings.flash_sources)]:
        source = source_settings.source
        matching = of_source(subscriptions, source)
        try:
            registered = Registered(app, matching)
            with connected(source_settings, _STATEMENT_TIMEOUT) as database:
                report = status.examine(database, app, matching, registered)
        except (FlashError, psycopg.Error) as error:
            reports.append({"source": source, "error": one_line(error)})
            continue
        fields = report.as_json()
        if slot := report.database.slot:
            fields["slot"]["lag"] = status.size(slot.lag_bytes)
            fields["slot"]["retained"] = status.size(slot.retained_bytes)
        reports.append(fields)
    return [_escape_all(report) for report in reports]


def dead_letters(app: Any) -> dict[str, Any]:
    """Return the number of dead letters and the oldest of them.

    Raises:
        FlashError: A setting is wrong, or the broker does not answer.
    """
    queue = _dead_letter_queue(app)
    count = queue.count()
    too_many = count > MAX_READ
    letters = [] if too_many else queue.find(DeadLetterFilter())[:MAX_SHOWN]
    return {
        "count": count,
        "letters": [
            _escape_all({"name": _name(letter), **vars(letter), "summary": letter.summary})
            for letter in letters
        ],
        "too_many": too_many,
    }


def retry(app: Any, names: Collection[str]) -> tuple[int, int]:
    """Send dead letters back to their handlers, by the names that the page gives them.

    Return how many were sent, and how many were not in the queue any more.

    Raises:
        FlashError: A setting is wrong, or the broker does not answer.
    """
    queue = _dead_letter_queue(app)
    chosen = [letter for letter in queue.find(DeadLetterFilter()) if _name(letter) in names]
    sent = queue.retry(chosen, split=False) if chosen else 0
    return sent, len(names) - sent


def _dead_letter_queue(app: Any) -> DeadLetterQueue:
    return DeadLetterQueue(app, Settings.from_app(app).flash_dead_queue)


def _name(letter: DeadLetter) -> str:
    """Name a dead letter, so that another one of the same task has another name."""
    return escaped(f"{letter.id} {letter.failed_at}")


def _escape_all(value: Any) -> Any:
    """Escape all text in a value, line by line; Django escapes HTML, but not control characters."""
    if isinstance(value, str):
        return "\n".join(map(escaped, value.split("\n")))
    if isinstance(value, dict):
        return {name: _escape_all(item) for name, item in value.items()}
    return [_escape_all(item) for item in value] if isinstance(value, (list, tuple)) else value
