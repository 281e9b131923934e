"""What is paused. It is noted where the other state is kept, so that it outlives every process; the
replication worker looks there once a second.
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
from . import advisory_lock, ddl, publications
from .publications import Record

#: Stands for the whole source among the handlers.
SOURCE = ""
#: What AMQP takes for the name of a queue, without the rest of it but the source.
_LONGEST_NAME = 200
_PREFIX = "flash.paused."


def queue_of(handler: str, source: str = "") -> str:
    """The name of the queue where a handler's changes wait."""
    return f"{_PREFIX}{source}:{handler}" if source else f"{_PREFIX}{handler}"


def named(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The handlers that are meant by their names, or the last parts of them.

    Raises `ConfigurationError` for one that is not known, or may be several.
    """
    known = sorted(set(known))
    found = []
    for name in names:
        meant = [one for one in known if one == name] or [
            one for one in known if one.rpartition(".")[2] == name
        ]
        if not meant:
            there = f"there are {', '.join(known)}" if known else "there is none"
            raise ConfigurationError(f"There is no handler {name}; {there}.")
        if len(meant) > 1:
            raise ConfigurationError(f"{name} may be any of {', '.join(meant)}; give all of it.")
        found.append(meant[0])
    return list(dict.fromkeys(found))


def handlers(subscriptions: Iterable[Subscription]) -> list[str]:
    """The names of the handlers."""
    return sorted({one.handler for one in subscriptions})


def refuse_strangers(
    wanted: Iterable[str],
    known: Iterable[str],
    source: str,
    depths: Callable[[list[str]], Mapping[str, int | None]],
) -> list[str]:
    """Those that are handlers no more. Raises `ConfigurationError` where anything is parked for
    one: a worker would throw it away."""
    gone = sorted(set(wanted) - {*known, SOURCE})
    parked = depths([queue_of(one, source) for one in gone]) if gone else {}
    for one in gone:
        if parked[queue_of(one, source)]:
            raise ConfigurationError(
                f"{one} is no handler of this app any more, so a worker would throw away what is "
                f"parked for it; declare it again, or delete the queue {queue_of(one, source)} on "
                f"the broker and run `flash resume {one}`."
            )
    return gone


def read(source: Source) -> Record:
    """What is noted."""
    return publications.read(source).record or Record()


def lines(
    before: Mapping[str, str], now: Mapping[str, str], handlers: Sequence[str], source: str
) -> list[str]:
    """What a replication worker says when something else is paused than before."""
    said = []
    for one in now.keys() - before.keys():
        where = queue_of(one, source)
        if one == SOURCE:
            said.append(
                f"Paused since {now[one]}: nothing is read, and what is written meanwhile stays in "
                "the WAL, until `flash resume`"
            )
        elif one in handlers:
            said.append(f"{one} is paused since {now[one]}; its changes wait in the queue {where}")
        else:
            said.append(
                f"{one} is no handler any more; what was parked for it stays in the queue {where}"
            )
    said += [f"{one or 'Reading'} goes on" for one in before.keys() - now.keys()]
    return sorted(said)


def parked(record: Record, source: str) -> dict[str, str]:
    """The queues that may hold parked messages, by handler."""
    return {
        one: queue_of(one, source) for one in (*record.paused, *record.resuming) if one != SOURCE
    }


def pause(source: Source, wanted: Sequence[str]) -> dict[str, str]:
    """Note that these are paused; since when each of them is. Raises `CatalogError`."""
    most = _LONGEST_NAME - len(source.settings.source.encode())
    for handler in wanted:
        if len(handler.encode()) > most:
            raise ConfigurationError(
                f"The name {handler} is too long for a queue of its own; give the task a name= of "
                f"{most} bytes at most."
            )
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def change(record: Record) -> Record:
        return replace(
            record,
            paused=dict.fromkeys(wanted, now) | record.paused,
            resuming={one: since for one, since in record.resuming.items() if one not in wanted},
        )

    record = _note(source, change)
    return {one: record.paused[one] for one in wanted}


def resume(
    source: Source,
    wanted: Sequence[str],
    gone: Collection[str] = (),
) -> list[str]:
    """Note that these go on, and nothing more of those that are `gone`; those of them that were
    paused. Raises `CatalogError`."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    were: list[str] = []

    def change(record: Record) -> Record:
        were[:] = [one for one in wanted if one in record.paused]
        resuming = {**record.resuming, **{one: now for one in were if one != SOURCE}}
        return replace(
            record,
            paused={one: since for one, since in record.paused.items() if one not in were},
            resuming={one: since for one, since in resuming.items() if one not in gone},
        )

    _note(source, change)
    return were


def resumed(source: Source, handlers: Sequence[str], noted: str) -> str:
    """Note that what was parked for these has gone back, unless `noted` is no longer what is noted;
    what is noted then, as far as the caller knows. Raises `CatalogError`."""
    with advisory_lock.held(source):
        record = publications.read(source).record
        if record is None or publications.noted(source) != noted:
            return noted
        left = {one: since for one, since in record.resuming.items() if one not in handlers}
        _keep(source, ddl.note(source.prefix, replace(record, resuming=left)))
        return publications.noted(source)


def _note(source: Source, change: Callable[[Record], Record]) -> Record:
    with advisory_lock.held(source):
        record = publications.read(source).record
        if record is None:
            raise CatalogError(
                f"Nothing is noted of the publications {source.prefix}_… yet, so nothing can be "
                "paused; start `flash replicate` first."
            )
        changed = change(record)
        if changed != record:
            _keep(source, ddl.note(source.prefix, changed))
    return changed


def _keep(source: Source, step: ddl.Step) -> None:
    if is_standby(source.connection):
        raise CatalogError(f"A standby can note nothing; on the primary run {step};")
    try:
        ddl.apply(source.connection, [step])
    except CatalogError as error:
        if isinstance(error.__cause__, postgres.InsufficientPrivilege):
            raise CatalogError(
                f"The publications are another role's, who must run {step};"
            ) from error
        raise
