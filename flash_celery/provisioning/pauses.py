"""Record which handlers are paused, so that a pause outlives every process.

A running replication worker reads the record about once a second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

from psycopg import errors as postgres

from ..errors import CatalogError, ConfigurationError
from ..handlers.subscriptions import Subscription
from ..postgres.connection import is_standby
from ..postgres.source import Source
from . import advisory_lock, ddl
from .record import Record, read_record, record_hash, record_step

#: The name that stands for the whole source, among the names of handlers.
SOURCE = ""
#: The most bytes of a handler's and a source's name together: AMQP limits a queue's name to 255.
_LONGEST_NAME = 200
_QUEUE_PREFIX = "flash.paused."


def queue_of(handler: str, source_name: str = "") -> str:
    """Return the name of the hold queue of a handler."""
    return f"{_QUEUE_PREFIX}{source_name}:{handler}" if source_name else _QUEUE_PREFIX + handler


def place_of(handler: str, ordered: Collection[str], source_name: str = "") -> str:
    """Return where the changes of a paused handler wait, for people.

    Args:
        handler: The name of the handler.
        ordered: The names of the ordered handlers.
        source_name: The name of the source; "" is the default source.
    """
    if handler in ordered:
        return "its lanes (`flash lanes list`)"
    return f"the queue {queue_of(handler, source_name)}"


def named(names: Iterable[str], handlers: Iterable[str]) -> list[str]:
    """Return the handlers with these names: full names, or their parts after the last dot.

    Raises:
        ConfigurationError: A name matches no handler, or more than one.
    """
    handlers = sorted(set(handlers))
    full_names = []
    for name in names:
        matching = [handler for handler in handlers if handler == name] or [
            handler for handler in handlers if handler.rpartition(".")[2] == name
        ]
        if not matching:
            existing = f"there are {', '.join(handlers)}" if handlers else "there is none"
            raise ConfigurationError(f"There is no handler {name}; {existing}.")
        if len(matching) > 1:
            raise ConfigurationError(
                f"{name} may be any of {', '.join(matching)}; give its full name."
            )
        full_names.append(matching[0])
    return list(dict.fromkeys(full_names))


def handlers(subscriptions: Iterable[Subscription]) -> list[str]:
    """Return the names of the handlers."""
    return sorted({subscription.handler for subscription in subscriptions})


def ordered_handlers(subscriptions: Iterable[Subscription]) -> list[str]:
    """Return the names of the handlers that have lanes."""
    return sorted({each.handler for each in subscriptions if each.ordered is not None})


def removed_handlers(
    names: Iterable[str],
    handlers: Iterable[str],
    source_name: str,
    depths: Callable[[list[str]], Mapping[str, int | None]],
) -> list[str]:
    """Return the names that no longer belong to a handler.

    Args:
        names: Names of handlers, and `SOURCE`.
        handlers: The names of the app's handlers.
        source_name: The name of the source; "" is the default source.
        depths: Returns the length of each queue.

    Raises:
        ConfigurationError: Such a name has held messages, which a Celery worker would discard.
    """
    removed = sorted(set(names) - {*handlers, SOURCE})
    held = depths([queue_of(name, source_name) for name in removed]) if removed else {}
    for name in removed:
        queue = queue_of(name, source_name)
        if held[queue]:
            raise ConfigurationError(
                f"{name} is no longer a handler of this app, so a worker would discard the "
                f"messages held for it; declare it again, or delete the queue {queue} on the "
                f"broker and run `flash resume {name}`."
            )
    return removed


def read(source: Source) -> Record:
    """Return the record, which is empty if nothing is recorded yet."""
    return read_record(source) or Record()


def changes(
    before: Mapping[str, str],
    now: Mapping[str, str],
    handlers: Sequence[str],
    ordered: Collection[str],
    source_name: str,
) -> list[str]:
    """Return the log messages for the pauses that have begun and ended between two records."""
    lines = []
    for name in now.keys() - before.keys():
        if name == SOURCE:
            lines.append(
                f"Paused since {now[name]}: nothing is read, and changes stay in the WAL, until "
                "`flash resume`"
            )
        elif name in handlers:
            place = place_of(name, ordered, source_name)
            lines.append(f"{name} has been paused since {now[name]}; its changes wait in {place}")
        else:
            queue = queue_of(name, source_name)
            lines.append(
                f"{name} is no longer a handler; its held messages stay in the queue {queue}"
            )
    lines += [f"{name or 'Reading'} continues" for name in before.keys() - now.keys()]
    return sorted(lines)


def hold_queues(record: Record, source_name: str) -> dict[str, str]:
    """Return the names of the queues that may hold messages, by handler."""
    return {
        name: queue_of(name, source_name)
        for name in (*record.paused, *record.resuming)
        if name != SOURCE
    }


def pause(source: Source, names: Sequence[str]) -> dict[str, str]:
    """Record that these are paused; return the time at which each pause began.

    Raises:
        ConfigurationError: A name is too long.
        CatalogError: The record cannot be written.
    """
    longest = _LONGEST_NAME - len(source.settings.source.encode())
    for handler in names:
        if len(handler.encode()) > longest:
            raise ConfigurationError(
                f"The name {handler} is too long for its hold queue; give the task a name= of "
                f"{longest} bytes at most."
            )
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def change(record: Record) -> Record:
        return replace(
            record,
            paused=dict.fromkeys(names, now) | record.paused,
            resuming={name: since for name, since in record.resuming.items() if name not in names},
        )

    record = _update(source, change)
    return {name: record.paused[name] for name in names}


def resume(source: Source, names: Sequence[str], removed: Collection[str] = ()) -> list[str]:
    """Record that these are no longer paused; return those that were.

    Args:
        source: The source.
        names: Names of handlers, and `SOURCE`.
        removed: Names of handlers that the app no longer has, to be forgotten.

    Raises:
        CatalogError: The record cannot be written.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    were_paused: list[str] = []

    def change(record: Record) -> Record:
        were_paused[:] = [name for name in names if name in record.paused]
        handlers = {name: now for name in were_paused if name != SOURCE}
        return replace(
            record,
            paused={
                name: since for name, since in record.paused.items() if name not in were_paused
            },
            resuming={
                name: since
                for name, since in {**record.resuming, **handlers}.items()
                if name not in removed
            },
        )

    _update(source, change)
    return were_paused


def requeued(source: Source, handlers: Sequence[str], expected_hash: str) -> str:
    """Record that the held messages of these handlers are back in their queues.

    Does nothing if another process has changed the record in the meantime.

    Args:
        source: The source.
        handlers: The names of the handlers.
        expected_hash: The hash of the record that the caller knows.

    Returns:
        The hash of the record that the caller knows then.

    Raises:
        CatalogError: The record cannot be written.
    """
    with advisory_lock.held(source):
        record = read_record(source)
        if record is None or record_hash(source) != expected_hash:
            return expected_hash
        resuming = {name: since for name, since in record.resuming.items() if name not in handlers}
        _write(source, replace(record, resuming=resuming))
        return record_hash(source)


def _update(source: Source, change: Callable[[Record], Record]) -> Record:
    with advisory_lock.held(source):
        record = read_record(source)
        if record is None:
            raise CatalogError(
                f"The publications {source.prefix}_… have no record yet, so nothing can be "
                "paused; start `flash replicate` first."
            )
        changed = change(record)
        if changed != record:
            _write(source, changed)
    return changed


def _write(source: Source, record: Record) -> None:
    step = record_step(source.prefix, record)
    if is_standby(source.connection):
        raise CatalogError(f"This server is a read-only standby; on the primary run {step};")
    try:
        ddl.apply(source.connection, [step])
    except CatalogError as error:
        if isinstance(error.__cause__, postgres.InsufficientPrivilege):
            raise CatalogError(
                f"The publications belong to another role; as that role run {step};"
            ) from error
        raise
