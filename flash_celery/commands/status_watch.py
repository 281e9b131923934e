"""`flash status --watch`: the report of `flash status`, redrawn every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import psycopg
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import FlashError
from ..escaping import escaped, one_line
from ..handlers.subscriptions import Subscription
from ..postgres.gaps import Gap
from ..postgres.source import Source
from ..protocol.lsn import Lsn
from . import status
from .lanes import summary_text
from .status import SlotStatus, StatusReport
from .worker_checks import Registered


def watch(
    connect: Callable[[], AbstractContextManager[Source]],
    app: Any,
    subscriptions: Sequence[Subscription],
    interval: float,
) -> None:
    """Show the report every `interval` seconds, until Ctrl-C.

    An error of the first report is raised. A later one is shown under the last report that
    succeeded, and the next report uses a new connection.
    """
    reports = _reports(connect, app, subscriptions)
    report, previous, previous_time = next(reports), None, 0.0
    console = Console(highlight=False)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as screen:
        while True:
            now = time.monotonic()
            problem = ""
            try:
                report = next(reports)
            except (FlashError, psycopg.Error) as error:
                reports = _reports(connect, app, subscriptions)
                problem = one_line(error)
            speed = _speed(previous, report, now - previous_time)
            screen.update(render(report, speed, problem), refresh=True)
            if not problem:
                previous, previous_time = report, now
            time.sleep(max(0.1, interval - (time.monotonic() - now)))


def _reports(
    connect: Callable[[], AbstractContextManager[Source]],
    app: Any,
    subscriptions: Sequence[Subscription],
) -> Iterator[StatusReport]:
    """Yield reports that share one connection."""
    with connect() as source:
        while True:
            registered = Registered(app, subscriptions)
            yield status.examine(source, app, subscriptions, registered)


def _speed(previous: StatusReport | None, now: StatusReport, seconds: float) -> float | None:
    """Return the bytes of WAL confirmed per second, or None if unknown."""
    before = previous.database.slot if previous else None
    after = now.database.slot
    if before is None or after is None or seconds <= 0:
        return None
    if before.confirmed_lsn is None or after.confirmed_lsn is None:
        return None
    confirmed = Lsn.parse(after.confirmed_lsn) - Lsn.parse(before.confirmed_lsn)
    return max(0.0, confirmed / seconds)


def render(report: StatusReport, speed: float | None, problem: str) -> RenderableType:
    """Return the screen: slot, queues, handlers, and warnings.

    Args:
        report: The last report.
        speed: Bytes of WAL confirmed per second; None if unknown.
        problem: Why there is no newer report; "" if this is the newest.
    """
    parts: list[RenderableType] = [_slot(report, speed), Text(), _queues(report)]
    if report.project.subscriptions:  # else it carries the tasks of transactions alone
        parts += [Text(), _handlers(report)]
    warnings = [problem, report.broker.broker_error or ""]
    warnings += [str(Gap(**gap)) for gap in report.database.gaps]
    warnings += [f"paused: {line}" for line in status.pause_lines(report)]
    if report.database.refused:
        warnings.append(f"refused: {report.database.refused}")
    warnings += status.worker_problems(report)
    for warning in filter(None, warnings):
        parts += [Text(), Text(escaped(warning), style="yellow")]
    parts += [Text(), Text(f"{time.strftime('%H:%M:%S')}  Press Ctrl-C to end", style="dim")]
    return Group(*parts)


def _slot(report: StatusReport, speed: float | None) -> RenderableType:
    slot = report.database.slot
    table = Table.grid(padding=(0, 2))
    for line in status.slot_lines(report.project.slot_name, slot):
        label, value = line.split("  ", 1)
        table.add_row(Text(label, style="dim"), _text(value.strip(), _style(label, slot)))
    if speed is not None:
        table.add_row(Text("confirms", style="dim"), f"{status.size(round(speed))}/s")
    return table


def _style(label: str, slot: SlotStatus | None) -> str:
    if slot is None:
        return "yellow"
    if label == "slot":
        return {"reserved": "green", "extended": "yellow"}.get(slot.wal_status or "", "bold red")
    return "yellow" if label == "read by" and not slot.reader else ""


def _queues(report: StatusReport) -> Table:
    table = _table("queue", "waiting")
    for name, depth in report.broker.queues.items():
        table.add_row(_text(name), status.waiting(depth, report.broker.max_queue_length))
    letters = report.broker.dead_letters
    style = "red" if letters.count else ""
    table.add_row(_text(letters.queue), Text(status.dead_letters(letters), style=style))
    for lanes in report.broker.lanes:
        style = "red" if lanes.blocked else ""
        table.add_row(_text(lanes.handler), Text(summary_text(lanes), style=style))
    return table


def _handlers(report: StatusReport) -> Table:
    table = _table("handler", "table", "operations", "queues")
    for row in report.project.subscriptions:
        cells = row.handler, row.table, "|".join(row.operations), ", ".join(row.queues)
        table.add_row(*map(_text, cells))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(heading)
    return table


def _text(value: str, style: str = "") -> Text:
    """Return a cell; names come from the database, so escape sequences are made visible."""
    return Text(escaped(value), style=style)
