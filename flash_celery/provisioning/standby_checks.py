"""Checks of standbys: can one be read, and does the slot survive a failover to one?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import conninfo

from ..errors import ConfigurationError, ReplicationError
from ..postgres import slots
from ..postgres.connection import connect, is_standby
from ..postgres.source import Source
from .findings import OK, WARNING, Finding, stop

#: The first version in which a standby can be read.
READ_SINCE = 160000
#: The first version in which a standby can keep a copy of a slot.
FAILOVER_SINCE = 170000

_STANDBY_SLOTS = """
SELECT w.name, s.slot_type = 'physical', s.active, s.wal_status
FROM unnest(string_to_array(replace(current_setting('synchronized_standby_slots'), ' ', ''), ','))
     AS w(name)
LEFT JOIN pg_replication_slots s ON s.slot_name = trim(both '"' from w.name)
"""
#: The required value of a standby's settings, and the consequence of another one.
_STANDBY_SETTINGS = {
    "sync_replication_slots": ("on", "the slot is not copied from the primary"),
    "hot_standby_feedback": ("on", "the primary may remove rows that the copy of the slot needs"),
}


def reading(source: Source) -> Iterator[Finding]:
    """Check this server, a standby that is to be read itself."""
    connection, settings = source.connection, source.settings
    reason = ""
    if connection.info.server_version < READ_SINCE:
        reason = "before PostgreSQL 16 only a primary can be read"
    elif settings.flash_failover_slot:
        reason = "flash_failover_slot works on a primary only"
    if reason:
        error = ConfigurationError(
            f"This is a standby, and {reason}: {settings.called('flash_dsn')} must lead to the "
            "primary (host=one,other target_session_attrs=read-write)."
        )
        yield stop("standby", error)
    elif _setting(connection, "hot_standby_feedback") == "off":
        yield Finding(
            "standby",
            WARNING,
            "hot_standby_feedback is off: the primary removes catalog rows that the slot needs, "
            "and the slot is lost: ALTER SYSTEM SET hot_standby_feedback = on; and give the "
            "standby a primary_slot_name",
        )
    else:
        yield Finding("standby", OK, "read only")


def wal_level(own: str, effective: str) -> Finding:
    """Check the level of the WAL on a standby of PostgreSQL 19 or later.

    Args:
        own: The standby's `wal_level`, which counts once it is promoted.
        effective: Its `effective_wal_level`, which follows the primary.
    """
    remedy = "on the primary run ALTER SYSTEM SET wal_level = 'logical'; and restart it"
    if effective != "logical":
        error = ConfigurationError(
            f"effective_wal_level is {effective}, and reading changes from a standby needs "
            f"logical: {remedy} (a logical slot on the primary raises the level only as long as "
            "it exists)."
        )
        return stop("wal_level", error)
    if own != "logical":
        return Finding(
            "wal_level",
            WARNING,
            f"logical, but {own} is set here: if it is set on the primary too, the slot is lost "
            f"when the primary's last logical slot is dropped; {remedy}",
        )
    return Finding("wal_level", OK, "logical")


def findings(source: Source) -> Iterator[Finding]:
    """Check the primary, and every standby that the DSN names besides it."""
    connection, settings = source.connection, source.settings
    if not settings.flash_failover_slot or connection.info.server_version < FAILOVER_SINCE:
        return
    if is_standby(connection):
        return  # server_checks stops `replicate`
    yield from _primary(connection)
    dsn = settings.require_dsn()
    for address, host_dsn in _hosts(dsn):
        try:
            with connect(host_dsn, settings.longest_silence) as standby:
                if is_standby(standby):
                    yield from _standby(standby, address, source.slot)
        except ReplicationError as error:
            yield Finding(f"failover to {address}", WARNING, str(error))


def _primary(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    setting = "synchronized_standby_slots"
    rows = connection.execute(_STANDBY_SLOTS.encode()).fetchall()
    if not rows:
        yield Finding(
            setting,
            WARNING,
            "empty: handlers may receive changes that a promoted standby does not have: "
            f"ALTER SYSTEM SET {setting} = 'the primary_slot_name of each such standby';",
        )
    for name, physical, active, wal_status in rows:
        if not physical:
            message = (
                f"{name} is not a physical slot, so PostgreSQL holds all changes back; correct it"
            )
        elif not active or wal_status == "lost":
            message = (
                f"the standby of {name} is not connected, so changes are held back until it is"
            )
        else:
            yield Finding(setting, OK, f"{name} is connected")
            continue
        yield Finding(setting, WARNING, message)


def _standby(connection: psycopg.Connection[Any], address: str, slot: str) -> Iterator[Finding]:
    subject = f"failover to {address}"
    problems = []
    for name, (value, consequence) in _STANDBY_SETTINGS.items():
        if _setting(connection, name) != value:
            problems.append(
                f"{name} is not {value}, so {consequence}: ALTER SYSTEM SET {name} = {value};"
            )
    if _setting(connection, "primary_slot_name") == "":
        problems.append("primary_slot_name is empty: set it to a physical slot of the primary")
    primary = _setting(connection, "primary_conninfo")
    if primary is not None and "dbname" not in conninfo.conninfo_to_dict(primary):
        problems.append("primary_conninfo has no dbname, which copying slots needs: add one")
    if not problems:
        problems += _problem_of_copy(slots.find(connection, slot), slot)
    for problem in problems:
        yield Finding(subject, WARNING, problem)
    if not problems:
        yield Finding(subject, OK, f"{slot} has been copied and is ready for a promotion")


def _problem_of_copy(copy: slots.Slot | None, slot: str) -> Iterator[str]:
    if copy is None:
        yield f"{slot} has not been copied yet; it will be once the standby has caught up"
    elif not copy.synced:
        yield f"another slot named {slot} prevents the copy: drop it on the standby"
    elif copy.temporary:
        yield f"the copy of {slot} is not ready yet; it will be once the primary's slot advances"
    elif copy.reason is not None:
        yield f"the copy of {slot} was invalidated ({copy.reason}); PostgreSQL will create it again"


def _setting(connection: psycopg.Connection[Any], name: str) -> str | None:
    """Return a setting, or None if this role may not see it."""
    try:
        row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return None
    return str(row[0]) if row else None


def _hosts(dsn: str) -> Iterator[tuple[str, str]]:
    """Yield the address of each host of a DSN, and a DSN that leads to that host alone."""
    parameters = conninfo.conninfo_to_dict(dsn)
    hosts = str(parameters.get("host", "")).split(",")
    ports = str(parameters.get("port", 5432)).split(",")
    addresses = str(parameters.pop("hostaddr", "")).split(",")
    for index, host in enumerate(hosts):
        port = ports[index] if len(ports) > 1 else ports[0]
        single = {**parameters, "host": host, "port": port, "target_session_attrs": "any"}
        if any(addresses) and index < len(addresses):
            single["hostaddr"] = addresses[index]
        yield f"{host}:{port}", conninfo.make_conninfo("", **single)
