"""Standbys: whether one can be read, and whether the slot would live on after a failover to one."""

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

#: Since then a standby can be read, and standbys can keep a copy of a slot.
READ_SINCE, FAILOVER_SINCE = 160000, 170000

_FOLLOWERS = """
SELECT w.name, s.slot_type = 'physical', s.active, s.wal_status
FROM unnest(string_to_array(replace(current_setting('synchronized_standby_slots'), ' ', ''), ','))
     AS w(name)
LEFT JOIN pg_replication_slots s ON s.slot_name = trim(both '"' from w.name)
"""
_MUST_BE = {
    "sync_replication_slots": ("on", "the slot is not copied from the primary"),
    "hot_standby_feedback": ("on", "the primary may remove rows that the copy of the slot needs"),
}


def reading(source: Source) -> Iterator[Finding]:
    """What reading this standby itself needs."""
    connection, settings = source.connection, source.settings
    wrong = ""
    if connection.info.server_version < READ_SINCE:
        wrong = "before PostgreSQL 16 only a primary can be read"
    elif settings.flash_failover_slot:
        wrong = "flash_failover_slot is for what a primary has"
    if wrong:
        error = ConfigurationError(
            f"This is a standby, and {wrong}: {settings.called('flash_dsn')} must lead to the "
            "primary (host=one,other target_session_attrs=read-write)."
        )
        yield stop("standby", error)
    elif _setting(connection, "hot_standby_feedback") == "off":
        yield Finding(
            "standby",
            WARNING,
            "hot_standby_feedback is off: the primary removes rows of its catalog that the slot "
            "needs, which loses the slot: ALTER SYSTEM SET hot_standby_feedback = on; and give the "
            "standby a primary_slot_name",
        )
    else:
        yield Finding("standby", OK, "read, and never written")


def findings(source: Source) -> Iterator[Finding]:
    """Look at the primary, and at every standby that the DSN names beside it."""
    connection, settings = source.connection, source.settings
    if not settings.flash_failover_slot or connection.info.server_version < FAILOVER_SINCE:
        return
    if is_standby(connection):
        return  # which stops `replicate`
    yield from _primary(connection)
    dsn = settings.require_dsn()
    for place, each in _hosts(dsn):
        try:
            with connect(each, settings.longest_silence) as standby:
                if is_standby(standby):
                    yield from _standby(standby, place, settings.flash_replication_slot)
        except ReplicationError as error:
            yield Finding(f"failover to {place}", WARNING, str(error))


def _primary(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    named = "synchronized_standby_slots"
    rows = connection.execute(_FOLLOWERS.encode()).fetchall()
    if not rows:
        yield Finding(
            named,
            WARNING,
            "empty: handlers may be told of changes that a promoted standby does not have: "
            f"ALTER SYSTEM SET {named} = 'the primary_slot_name of each such standby';",
        )
    for name, physical, active, wal_status in rows:
        if not physical:
            said = f"{name} is no physical slot, so PostgreSQL holds all changes back; correct it"
        elif not active or wal_status == "lost":
            said = f"the standby of {name} is not connected, so changes are held back until it is"
        else:
            yield Finding(named, OK, f"{name} is connected")
            continue
        yield Finding(named, WARNING, said)


def _standby(connection: psycopg.Connection[Any], place: str, slot: str) -> Iterator[Finding]:
    subject = f"failover to {place}"
    wrong = []
    for name, (value, otherwise) in _MUST_BE.items():
        if _setting(connection, name) != value:
            wrong.append(f"{name} is not {value}, so {otherwise}: ALTER SYSTEM SET {name} = on;")
    if _setting(connection, "primary_slot_name") == "":
        wrong.append("primary_slot_name is empty: give it a physical slot of the primary's")
    primary = _setting(connection, "primary_conninfo")
    if primary is not None and "dbname" not in conninfo.conninfo_to_dict(primary):
        wrong.append("primary_conninfo has no dbname, which copying slots needs: add one")
    if not wrong:
        wrong += _copy(slots.find(connection, slot), slot)
    for said in wrong:
        yield Finding(subject, WARNING, said)
    if not wrong:
        yield Finding(subject, OK, f"{slot} is there, ready for a promotion")


def _copy(found: slots.Slot | None, slot: str) -> Iterator[str]:
    if found is None:
        yield f"{slot} has not been copied yet; it is once the standby has caught up"
    elif not found.synced:
        yield f"{slot} is a slot of its own there, in the way of the copy: drop it on the standby"
    elif found.temporary:
        yield f"the copy of {slot} is not ready yet; it is once the primary's slot has moved on"
    elif found.reason is not None:
        yield f"the copy of {slot} was invalidated ({found.reason}); PostgreSQL makes it anew"


def _setting(connection: psycopg.Connection[Any], name: str) -> str | None:
    """None where it is not for this role to see."""
    try:
        row = connection.execute("SELECT current_setting(%s)", [name]).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return None
    return str(row[0]) if row else None


def _hosts(dsn: str) -> Iterator[tuple[str, str]]:
    """Each host of a DSN as a DSN of its own."""
    given = conninfo.conninfo_to_dict(dsn)
    hosts = str(given.get("host", "")).split(",")
    ports = str(given.get("port", 5432)).split(",")
    addresses = str(given.pop("hostaddr", "")).split(",")
    for number, host in enumerate(hosts):
        port = ports[number] if len(ports) > 1 else ports[0]
        one = {**given, "host": host, "port": port, "target_session_attrs": "any"}
        if any(addresses) and number < len(addresses):
            one["hostaddr"] = addresses[number]
        yield f"{host}:{port}", conninfo.make_conninfo("", **one)
