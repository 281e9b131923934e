"""What `flash status` reports: the slot and its lag, the handlers, their queues and dead letters.

The field names of the dataclasses are the keys of `flash status --json` and of `/status.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psycopg
from psycopg.rows import dict_row

from ..backfill import requests
from ..errors import PublishError
from ..handlers.subscriptions import Subscription
from ..messages.task_options import TaskOptions
from ..postgres.gaps import Gap
from ..postgres.slots import POSITION
from ..postgres.source import Source
from ..provisioning import joined, pauses, publications, refusals, replay_slot
from ..provisioning.record import Record
from ..provisioning.refusals import Refusals
from ..publishing.backpressure import is_full
from ..publishing.brokers.base import queue_depths
from ..publishing.brokers.lane_overview import HandlerLanes
from ..settings import Settings
from ..transactional_tasks.signing import keys_of
from . import backfill
from .lanes import summaries, summary_lines
from .worker_checks import Registered

#: How many backfills are shown.
_SHOWN_BACKFILLS = 50
_SLOT = f"""
SELECT s.plugin, s.active, s.wal_status,
       s.confirmed_flush_lsn::text AS confirmed_lsn, s.restart_lsn::text AS restart_lsn,
       pg_wal_lsn_diff(now.lsn, s.confirmed_flush_lsn)::int8 AS lag_bytes,
       CASE WHEN s.active THEN coalesce(extract(epoch FROM r.flush_lag)::float8, 0)
            ELSE extract(epoch FROM clock_timestamp() - {{inactive_since}})::float8
       END AS lag_seconds,
       pg_wal_lsn_diff(now.lsn, s.restart_lsn)::int8 AS retained_bytes,
       s.safe_wal_size,
       s.active_pid AS pid, r.application_name, coalesce(host(r.client_addr), 'local') AS client
FROM pg_replication_slots s
CROSS JOIN LATERAL (SELECT {POSITION} AS lsn) AS now
LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid
WHERE s.slot_name = %s
"""  # noqa: S608


@dataclass(frozen=True)
class Reader:
    """The connection that reads a slot."""

    pid: int
    application_name: str | None
    client: str


@dataclass(frozen=True)
class SlotStatus:
    """A replication slot as the server sees it. Sizes are bytes of WAL."""

    name: str
    plugin: str
    active: bool
    wal_status: str | None
    confirmed_lsn: str | None
    restart_lsn: str | None
    lag_bytes: int | None
    #: Seconds; None for a slot without a reader before PostgreSQL 17.
    lag_seconds: float | None
    retained_bytes: int | None
    #: WAL that may be written before the slot is lost; None without a limit.
    safe_wal_size: int | None
    reader: Reader | None


@dataclass(frozen=True)
class ReplaySlotStatus:
    """The slot that `flash replay` reads from."""

    name: str
    wal_status: str | None
    retained_bytes: int | None
    #: The oldest commit that can be replayed; None if unknown.
    oldest_lsn: str | None
    oldest_time: str | None


@dataclass(frozen=True)
class PausedHandler:
    """A handler that is paused, or whose held messages are still being requeued."""

    handler: str
    since: str
    resuming: bool
    queue: str
    #: Messages in the hold queue; None if the broker did not answer.
    parked: int | None = None


@dataclass(frozen=True)
class HandlerStatus:
    """One subscription of a handler."""

    handler: str
    table: str
    operations: list[str]
    fields: list[str] | None
    queues: list[str]


@dataclass(frozen=True)
class DeadLetterStatus:
    """The dead-letter queue; `count` is None if the broker did not answer."""

    queue: str
    count: int | None


@dataclass(frozen=True)
class ProjectStatus:
    """What the project declares."""

    source: str
    other_sources: list[str]
    slot_name: str
    subscriptions: list[HandlerStatus]
    #: Whether there is a key for tasks in transactions.
    carries_tasks: bool = False


@dataclass(frozen=True)
class LeftOutTable:
    """A table that matches a handler's pattern and cannot be delivered to it."""

    handler: str
    table: str
    reason: str


@dataclass(frozen=True)
class DatabaseStatus:
    """What PostgreSQL reports."""

    slot: SlotStatus | None = None
    #: None if nothing can be replayed.
    history: ReplaySlotStatus | None = None
    #: Changes that were never read because their slot was lost; the fields of `Gap`.
    gaps: list[dict[str, Any]] = field(default_factory=list)
    #: When the whole source was paused; None if it is not.
    paused: str | None = None
    paused_handlers: list[PausedHandler] = field(default_factory=list)
    #: Backfills that have not ended, or on the last day, as `flash backfill list --json` has them.
    backfills: list[dict[str, Any]] = field(default_factory=list)
    #: How many more there are of these, by state: a pattern may have thousands.
    more_backfills: dict[str, int] = field(default_factory=dict)
    #: The tables of patterns that are not delivered.
    left_out: list[LeftOutTable] = field(default_factory=list)
    #: The messages with tasks of transactions that were refused; None if there were none.
    refused: Refusals | None = None

    def with_held(self, depths: Mapping[str, int | None]) -> DatabaseStatus:
        """Return this status with the number of held messages, by hold queue."""
        handlers = [
            replace(handler, parked=depths.get(handler.queue)) for handler in self.paused_handlers
        ]
        return replace(self, paused_handlers=handlers)


@dataclass(frozen=True)
class BrokerStatus:
    """What the broker reports: the length of each queue, None if unknown."""

    queues: dict[str, int | None]
    max_queue_length: int
    dead_letters: DeadLetterStatus
    broker_error: str | None
    #: The lanes of ordered handlers.
    lanes: list[HandlerLanes] = field(default_factory=list)


@dataclass(frozen=True)
class StatusReport:
    """Everything that `flash status` shows."""

    project: ProjectStatus
    database: DatabaseStatus
    broker: BrokerStatus
    #: Handlers that no running Celery worker has registered; None if no worker answered.
    unhandled: list[str] | None

    def as_json(self) -> dict[str, Any]:
        """Return the report as `flash status --json` prints it."""
        return {
            **asdict(self.project),
            **asdict(self.database),
            **asdict(self.broker),
            "unhandled": self.unhandled,
        }


def examine(
    source: Source, app: Any, subscriptions: Sequence[Subscription], registered: Registered
) -> StatusReport:
    """Ask PostgreSQL and the broker, wait for the Celery workers, and return all answers.

    A broker that does not answer is part of the report.

    Raises:
        psycopg.Error: PostgreSQL does not answer.
    """
    settings = source.settings
    task_options = TaskOptions(app, settings, subscriptions)
    project = project_status(settings, task_options)
    task_options.add_backfill_queues(requests.queues(source))
    database = database_status(source)
    hold_queues = [handler.queue for handler in database.paused_handlers]
    error, depths = None, {}
    lanes: list[HandlerLanes] = []
    try:
        depths = queue_depths(app, [*task_options.queues, settings.flash_dead_queue, *hold_queues])
        lanes = summaries(app, source.lanes, subscriptions)
    except PublishError as failure:
        error = str(failure)
    else:
        # A hold queue is created by its first message.
        database = database.with_held({queue: depths[queue] or 0 for queue in hold_queues})
        consumed = backfill.with_consumed(app, database.backfills)
        database = replace(database, backfills=consumed)
    return StatusReport(
        project,
        database,
        broker_status(settings, task_options, depths, error, lanes),
        None if error else registered.unhandled(),
    )


def project_status(settings: Settings, task_options: TaskOptions) -> ProjectStatus:
    """Return what the project declares."""
    return ProjectStatus(
        source=settings.source,
        other_sources=list(settings.flash_sources),
        slot_name=settings.flash_replication_slot,
        subscriptions=[
            HandlerStatus(
                handler=subscription.handler,
                table=subscription.subject,
                operations=list(subscription.operations.names()),
                fields=None if subscription.fields is None else list(subscription.fields),
                queues=task_options.queues_of(subscription),
            )
            for subscription in task_options.subscriptions
        ],
        carries_tasks=bool(keys_of(settings)),
    )


def database_status(source: Source) -> DatabaseStatus:
    """Return what PostgreSQL reports. The numbers of held messages stay unknown."""
    record = publications.read(source).record or Record()
    backfills, more = requests.recent(source, _SHOWN_BACKFILLS)
    return DatabaseStatus(
        slot=slot_status(source.connection, source.slot),
        history=_replay_slot_status(source),
        gaps=record.gaps,
        paused=record.paused.get(pauses.SOURCE),
        paused_handlers=[
            PausedHandler(
                handler=handler,
                since=record.paused.get(handler) or record.resuming[handler],
                resuming=handler in record.resuming,
                queue=queue,
            )
            for handler, queue in pauses.hold_queues(record, source.settings.source).items()
        ],
        backfills=list(map(backfill.as_json, backfills)),
        more_backfills=more,
        left_out=[LeftOutTable(*each) for each in joined.read(source).left_out],
        refused=refusals.read(source),
    )


def slot_status(connection: psycopg.Connection[Any], slot: str) -> SlotStatus | None:
    """Return the status of a slot, or None if it does not exist."""
    # Before 17 the server does not record how long a slot has had no reader.
    since_17 = connection.info.server_version >= 170000
    query = _SLOT.replace("{inactive_since}", "s.inactive_since" if since_17 else "NULL::timestamp")
    row = connection.cursor(row_factory=dict_row).execute(query.encode(), [slot]).fetchone()
    if row is None:
        return None
    reader = Reader(row.pop("pid"), row.pop("application_name"), row.pop("client"))
    return SlotStatus(name=slot, reader=reader if row["active"] else None, **row)


def _replay_slot_status(source: Source) -> ReplaySlotStatus | None:
    slot = slot_status(source.connection, source.replay_slot)
    if slot is None:
        return None
    oldest = replay_slot.oldest(source)
    return ReplaySlotStatus(
        name=slot.name,
        wal_status=slot.wal_status,
        retained_bytes=slot.retained_bytes,
        oldest_lsn=str(oldest.lsn) if oldest else None,
        oldest_time=oldest.time.isoformat() if oldest else None,
    )


def broker_status(
    settings: Settings,
    task_options: TaskOptions,
    depths: Mapping[str, int | None],
    error: str | None,
    lanes: Sequence[HandlerLanes] = (),
) -> BrokerStatus:
    """Return the queues' lengths from `depths`, which is empty where the broker gave `error`."""
    dead_queue = settings.flash_dead_queue
    # The dead-letter queue is created by its first message.
    dead_count = (depths[dead_queue] or 0) if dead_queue in depths else None
    return BrokerStatus(
        queues={name: depths.get(name) for name in task_options.queues},
        max_queue_length=settings.flash_max_queue_length,
        dead_letters=DeadLetterStatus(dead_queue, dead_count),
        broker_error=error,
        lanes=list(lanes),
    )


def gap_lines(project: ProjectStatus, database: DatabaseStatus) -> list[str]:
    """Return the lines about changes, and tasks of transactions, that were never read."""
    lines = []
    for gap in (Gap(**each) for each in database.gaps):
        lines.append(f"gap        {gap}")
        if project.carries_tasks:
            since = gap.since_time or "an unknown time"
            lines.append(f"gap        tasks of transactions since {since} may be missing, too")
    return lines


def more_backfills(database: DatabaseStatus) -> str:
    """Return how many backfills are not shown, and their states; "" if all are."""
    states = ", ".join(f"{count:,} {state}" for state, count in database.more_backfills.items())
    return f"{sum(database.more_backfills.values()):,} more: {states}" if states else ""


def as_text(report: StatusReport) -> list[str]:
    """Return the lines that `flash status` prints."""
    project, database, broker = report.project, report.database, report.broker
    lines = [f"source     {project.source}"] if project.source else []
    lines += slot_lines(project.slot_name, database.slot)
    if database.history:
        lines.append(_replay_slot_line(database.history))
    lines += gap_lines(project, database)
    lines += [f"paused     {line}" for line in pause_lines(report)]
    lines += [f"backfill   {backfill.summary(each)}" for each in database.backfills]
    if more := more_backfills(database):
        lines.append(f"backfill   {more}: flash backfill list")
    for left in database.left_out:
        lines.append(f"left out   {left.table} for {left.handler}: {left.reason}")
    if database.refused:
        lines.append(f"refused    {database.refused}")
    if project.subscriptions:  # else it carries the tasks of transactions alone
        lines += ["", "handlers"]
    width = max((len(row.handler) for row in project.subscriptions), default=0)
    for row in project.subscriptions:
        operations, queues = "|".join(row.operations), ", ".join(row.queues)
        lines.append(f"  {row.handler:<{width}}  {row.table}  {operations}  → {queues}")
    lines += ["", "queues"]
    for name, depth in broker.queues.items():
        lines.append(f"  {name}  {waiting(depth, broker.max_queue_length)}")
    lines.append(f"  {broker.dead_letters.queue}  {dead_letters(broker.dead_letters)}")
    if broker.lanes:
        lines += ["", "lanes", *(f"  {line}" for line in summary_lines(broker.lanes))]
    if broker.broker_error:
        lines.append(f"  {broker.broker_error}")
    else:
        lines += [line for problem in worker_problems(report) for line in ("", problem)]
    if project.other_sources:
        others = ", ".join(project.other_sources)
        lines += ["", f"other sources: {others} (flash status --source NAME)"]
    return lines


def slot_lines(name: str, slot: SlotStatus | None) -> list[str]:
    """Return the lines about the slot; each begins with its label and two spaces."""
    if slot is None:
        return [f"slot       {name} does not exist yet; `flash replicate` creates it"]
    reader = slot.reader
    worker = (
        f"PID {reader.pid} ({reader.application_name}, {reader.client})" if reader else "no worker"
    )
    seconds = "unknown" if slot.lag_seconds is None else f"{slot.lag_seconds:.1f} s"
    lines = [
        f"slot       {slot.name} ({slot.plugin}, wal_status {slot.wal_status})",
        f"read by    {worker}",
        f"confirmed  {slot.confirmed_lsn}",
        f"lag        {size(slot.lag_bytes)}, {seconds}",
        f"retained   {size(slot.retained_bytes)} of WAL",
    ]
    if slot.safe_wal_size is not None:
        lines.append(f"safe for   {size(slot.safe_wal_size)} more before the slot is lost")
    return lines


def _replay_slot_line(slot: ReplaySlotStatus) -> str:
    oldest = f"{slot.oldest_lsn} ({slot.oldest_time})" if slot.oldest_lsn else "unknown"
    return (
        f"history    {slot.name} (wal_status {slot.wal_status}) since {oldest}, "
        f"{size(slot.retained_bytes)} of WAL"
    )


def pause_lines(report: StatusReport) -> list[str]:
    """Return one line for the source if it is paused, and one for each paused handler."""
    lines = []
    if report.database.paused:
        lines.append(f"since {report.database.paused}: nothing is read until `flash resume`")
    handlers = {row.handler for row in report.project.subscriptions}
    in_lanes = {lanes.handler: lanes.waiting for lanes in report.broker.lanes}
    for paused in report.database.paused_handlers:
        state = "resuming" if paused.resuming else "paused"
        if paused.handler not in handlers:
            state = f"no longer a handler, {state}"
        count, place = paused.parked, paused.queue
        if not count and paused.handler in in_lanes:
            count, place = in_lanes[paused.handler], "its lanes"
        shown = "unknown" if count is None else count
        lines.append(f"{paused.handler} ({state} since {paused.since}): {shown} held in {place}")
    return lines


def worker_problems(report: StatusReport) -> list[str]:
    """Return what is wrong with the Celery workers; nothing while the broker cannot be asked."""
    if report.broker.broker_error:
        return []
    if report.unhandled is None:
        return ["no Celery worker answers"]
    if report.unhandled:
        return [f"no running worker knows {', '.join(report.unhandled)}"]
    return []


def waiting(depth: int | None, limit: int) -> str:
    """Return the length of a queue as text, with its limit if it has one (0 means none)."""
    if depth is None:
        return "unknown"
    if not limit:
        return f"{depth} waiting"
    full = ": full, reading is paused" if is_full(depth, limit) else ""
    return f"{depth} waiting, at most {limit}{full}"


def dead_letters(status: DeadLetterStatus) -> str:
    """Return the number of dead letters as text."""
    return "unknown" if status.count is None else f"{status.count} dead letters"


def size(count: int | None) -> str:
    """Return a number of bytes as text, such as `1.5 MB`."""
    if count is None:
        return "unknown"
    number = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TB"
