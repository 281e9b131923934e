"""`flash status --watch`: the same report, drawn anew every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import psycopg
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import FlashError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription
from ..postgres.slots import Gap
from ..protocol.lsn import Lsn
from ..settings import Settings
from . import status


def watch(
    connect: Callable[[], psycopg.Connection[Any]],
    app: Any,
    settings: Settings,
    subscriptions: Sequence[Subscription],
    interval: float,
) -> None:
    """Show the report every `interval` seconds, until Ctrl-C.

    What fails at the first look is raised; later it is shown, and tried again.
    """
    look = _looks(connect, app, settings, subscriptions)
    found, before, since = next(look), None, 0.0
    console = Console(highlight=False)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as drawn:
        while True:
            now = time.monotonic()
            try:
                found, trouble = next(look), ""
            except (FlashError, psycopg.Error) as error:
                look = _looks(connect, app, settings, subscriptions)
                trouble = one_line(error)
            speed = _speed(before, found, now - since)
            drawn.update(_drawn(found, speed, trouble), refresh=True)
            if not trouble:
                before, since = found, now
            time.sleep(max(0.1, interval - (time.monotonic() - now)))


def _looks(
    connect: Callable[[], psycopg.Connection[Any]],
    app: Any,
    settings: Settings,
    subscriptions: Sequence[Subscription],
) -> Iterator[dict[str, Any]]:
    """Reports, all by one connection."""
    with connect() as connection:
        while True:
            yield status.status(connection, app, settings, subscriptions)


def _speed(before: dict[str, Any] | None, now: dict[str, Any], seconds: float) -> float | None:
    """Bytes of WAL that are confirmed in a second."""
    if not (before and before["slot"] and now["slot"] and seconds > 0):
        return None
    since, until = (Lsn.parse(one["slot"]["confirmed_lsn"]) for one in (before, now))
    return max(0.0, (until - since) / seconds)


def _drawn(found: dict[str, Any], speed: float | None, trouble: str) -> RenderableType:
    parts: list[RenderableType] = [_slot(found, speed), Text(), _queues(found), Text()]
    parts.append(_handlers(found))
    warnings = [trouble, found["broker_error"], *(str(Gap(**gap)) for gap in found["gaps"])]
    warnings += [f"paused: {line}" for line in status.paused_lines(found)]
    if found["unhandled"]:
        warnings.append(f"no running worker knows {', '.join(found['unhandled'])}")
    elif found["unhandled"] is None and not found["broker_error"]:
        warnings.append("no Celery worker answers")
    for warning in filter(None, warnings):
        parts += [Text(), Text(escaped(warning), style="yellow")]
    parts += [Text(), Text(f"{time.strftime('%H:%M:%S')}  Ctrl-C ends it", style="dim")]
    return Group(*parts)


def _slot(found: dict[str, Any], speed: float | None) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for line in status.slot_lines(found):
        name, value = line.split("  ", 1)
        table.add_row(Text(name, style="dim"), _text(value.strip(), _style(name, found["slot"])))
    if speed is not None:
        table.add_row(Text("confirms", style="dim"), f"{status.size(round(speed))}/s")
    return table


def _style(name: str, slot: dict[str, Any] | None) -> str:
    if slot is None:
        return "yellow"
    if name == "slot":
        return {"reserved": "green", "extended": "yellow"}.get(slot["wal_status"], "bold red")
    return "yellow" if name == "read by" and not slot["reader"] else ""


def _queues(found: dict[str, Any]) -> Table:
    table = _table("queue", "waiting")
    for name, depth in found["queues"].items():
        table.add_row(_text(name), status.waiting(depth, found["max_queue_length"]))
    letters = found["dead_letters"]
    count = "unknown" if letters["count"] is None else f"{letters['count']} dead letters"
    table.add_row(_text(letters["queue"]), Text(count, style="red" if letters["count"] else ""))
    return table


def _handlers(found: dict[str, Any]) -> Table:
    table = _table("handler", "table", "operations", "queues")
    for one in found["subscriptions"]:
        row = one["handler"], one["table"], "|".join(one["operations"]), ", ".join(one["queues"])
        table.add_row(*map(_text, row))
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        table.add_column(head)
    return table


def _text(value: str, style: str = "") -> Text:
    """What it names, anybody may have chosen who can write to the database."""
    return Text(escaped(value), style=style)
