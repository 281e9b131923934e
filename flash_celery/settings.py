"""Every setting, once: its name, default, unit and check."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from types import ModuleType
from typing import Any

from . import dsn
from .errors import ConfigurationError


@dataclass(frozen=True)
class Settings:
    """The `flash_*` settings of a Celery app (`CELERY_FLASH_*` in Django), checked.

    They are those of one source: the default one, or after `of_source` a named one.
    """

    #: Connection string of the database to replicate, as libpq reads it
    #: (`postgresql://…` or `host=… dbname=…`). In Django the default is `DATABASES["default"]`.
    flash_dsn: str = field(default="", repr=False)
    #: Name of the permanent replication slot.
    flash_replication_slot: str = "flash_replication"
    #: The four publications are called this plus `_insert`, `_update`, `_delete`, `_truncate`.
    flash_publication_slot_prefix: str = "flash_publication"
    #: Queue of handlers that name none.
    flash_queue: str = "flash"
    #: Queue of the dead letters: what is kept of a handler's task that failed for good.
    flash_dead_queue: str = "flash.dead"
    #: How many processes a change may end before it is a dead letter.
    flash_max_deaths: int = 3
    #: How many messages may wait in a queue before reading pauses; 0 for any number.
    flash_max_queue_length: int = 0
    #: Globs over `schema.table.operation` to task options, in the shape of `task_routes`.
    flash_routes: Mapping[str, Any] = field(default_factory=dict)
    #: Receive large transactions while they are open and spool them on disk until they commit.
    flash_use_streaming: bool = False
    #: Folder for what streaming spools; by default /var/tmp, or what TMPDIR says without one.
    flash_spool_directory: str = ""
    #: `auto` sets the replica identity that a subscription needs; `keep` alters nothing and
    #: refuses to start where it does not suffice.
    flash_replica_identity: str = "auto"
    #: `False` creates and alters nothing: publications, identities and the slot are their owner's,
    #: and `replicate` refuses to start where they are not what the handlers need.
    flash_manage: bool = True
    #: Let PostgreSQL 15 and later leave out rows and columns that no handler wants.
    flash_push_down: bool = False
    #: Bytes that a change may have; one that has more becomes a dead letter without its largest
    #: values.
    flash_max_change_size: int = 128 << 20
    #: Seconds between two status messages to PostgreSQL.
    flash_status_interval: float = 10.0
    #: Seconds between two heartbeats, which are written into the WAL while the server is not idle
    #: and must come back through the stream; 0 for none.
    flash_heartbeat_interval: float = 10.0
    #: What to do when the slot was lost or dropped: `halt`, or `recreate` it at the present and
    #: record what was missed.
    flash_on_lost_slot: str = "halt"
    #: Seconds for which what was read can be read again (`flash replay`), by a second slot; 0 for
    #: none.
    flash_replay_window: float = 0.0
    #: Have standbys keep a copy of the slot, so that it survives a failover (PostgreSQL 17).
    flash_failover_slot: bool = False
    #: Seconds that SIGTERM leaves for what is in flight.
    flash_shutdown_timeout: float = 10.0
    #: Where the replication worker serves its status page, metrics and probes (`127.0.0.1:9187`).
    flash_http: str = ""
    #: More databases, by name: for each its `dsn`, and its `slot` and `prefix` where these are not
    #: to be the default's with the name appended.
    flash_sources: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: Whose settings these are: a name in `flash_sources`, "" for the default. Not a setting.
    source: str = ""

    @classmethod
    def from_app(cls, app: Any) -> Settings:
        """Read them from `app.conf`. Raises `ConfigurationError` for what cannot be right."""
        # Celery reads them when it is asked for one, and is another object from then on.
        given = {name: app.conf.get(name) for name in _KINDS}
        _refuse_unread(app.conf)
        settings = cls(**{name: value for name, value in given.items() if value is not None})
        if not settings.flash_dsn:
            settings = cls(**{**vars(settings), "flash_dsn": dsn.of_django()})
        settings._check()
        settings._check_sources()
        return settings

    def of_source(self, name: str) -> Settings:
        """The same for a source of `flash_sources`, with its DSN, slot and prefix.

        Raises `ConfigurationError` if there is no such source.
        """
        if name not in self.flash_sources:
            hint = _hint(name, self.flash_sources)
            raise ConfigurationError(f"There is no source {name!r} in flash_sources; {hint}")
        given = self.flash_sources[name]
        prefix = self.flash_publication_slot_prefix
        return replace(
            self,
            source=name,
            flash_dsn=given["dsn"],
            flash_replication_slot=given.get("slot", f"{self.flash_replication_slot}_{name}"),
            flash_publication_slot_prefix=given.get("prefix", f"{prefix}_{name}"),
            flash_sources={},
        )

    @property
    def replay_slot(self) -> str:
        """The name of the second slot, from which `flash replay` reads."""
        return f"{self.flash_replication_slot}{_REPLAY_SLOT_SUFFIX}"

    def called(self, setting: str) -> str:
        """How the user of this source spells the DSN, slot or prefix."""
        return f"flash_sources[{self.source!r}][{_KEYS[setting]!r}]" if self.source else setting

    @property
    def longest_silence(self) -> float:
        """Seconds without a word after which the server and we take each other for dead."""
        return 3 * self.flash_status_interval

    def _check(self) -> None:
        self._check_kinds()
        self._check_numbers()
        for name, (one, other) in _CHOICES.items():
            value = getattr(self, name)
            if value not in (one, other):
                raise ConfigurationError(f"{name} is {one!r} or {other!r}, not {value!r}.")
        self._check_names()
        if self.flash_spool_directory and not os.access(self.flash_spool_directory, os.W_OK):
            raise ConfigurationError(
                f"flash_spool_directory is {self.flash_spool_directory!r}, where no file can be "
                "written; make the folder, or leave it out."
            )
        if not self.flash_queue:
            raise ConfigurationError("flash_queue is empty; name the queue of the handlers.")
        if self.flash_dead_queue in ("", self.flash_queue):
            raise ConfigurationError(
                "flash_dead_queue must be a queue of its own, which no worker consumes."
            )
        if self.flash_on_lost_slot == "recreate" and not self.flash_manage:
            raise ConfigurationError(
                "flash_on_lost_slot = 'recreate' makes a slot, which flash_manage = False leaves "
                "to its owner; leave one of them out."
            )
        if self.flash_replay_window and not self.flash_manage:
            raise ConfigurationError(
                "flash_replay_window makes a second slot, which flash_manage = False leaves to its "
                "owner; leave one of them out."
            )
        if self.flash_http:
            http_address(self.flash_http)

    def _check_kinds(self) -> None:
        for setting in fields(self):
            expected = _KINDS.get(setting.name)
            if expected is None:
                continue
            value = getattr(self, setting.name)
            if not isinstance(value, expected) or (expected is not bool and value is True):
                kind = " or ".join(
                    k.__name__ for k in (expected if isinstance(expected, tuple) else (expected,))
                )
                # A DSN may hold a password.
                shown = repr(value) if setting.repr else type(value).__name__
                raise ConfigurationError(f"{setting.name} must be {kind}, not {shown}.")

    def _check_numbers(self) -> None:
        for name in ("flash_status_interval", "flash_shutdown_timeout"):
            if not 0 < getattr(self, name) < 86_400:
                raise ConfigurationError(f"{name} is a number of seconds above 0.")
        if not 0 <= self.flash_heartbeat_interval < 86_400:
            raise ConfigurationError(
                "flash_heartbeat_interval is a number of seconds, or 0 for no heartbeats."
            )
        if not 0 <= self.flash_replay_window < 366 * 86_400:
            raise ConfigurationError(
                "flash_replay_window is a number of seconds, or 0 for no replay."
            )
        for name in ("flash_max_deaths", "flash_max_change_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is a number from 1 on.")
        if self.flash_max_queue_length < 0:
            raise ConfigurationError(
                "flash_max_queue_length is a number of messages, or 0 for no limit."
            )

    def _check_names(self) -> None:
        slot = self.flash_replication_slot
        if len(slot) > 63 or not _SLOT.fullmatch(slot):
            raise ConfigurationError(
                f"{self.called('flash_replication_slot')} may hold a-z, 0-9 and _ only, at most 63 "
                f"of them, not {slot!r}."
            )
        if self.flash_replay_window and len(slot) > 63 - len(_REPLAY_SLOT_SUFFIX):
            raise ConfigurationError(
                f"{self.called('flash_replication_slot')} may have 55 characters at most with "
                "flash_replay_window, whose slot is called that and _history."
            )
        prefix = self.flash_publication_slot_prefix
        if not prefix or len(f"{prefix}_truncate".encode()) > 63:
            raise ConfigurationError(
                f"{self.called('flash_publication_slot_prefix')} must have 1 to 54 bytes, not "
                f"{prefix!r}."
            )

    def _check_sources(self) -> None:
        sources = [self] if self.flash_dsn else []
        for name, given in self.flash_sources.items():
            _check_source(name, given)
            source = self.of_source(name)
            source._check_names()
            source.require_dsn()
            sources.append(source)
        for one, other in combinations(sources, 2):
            one._check_apart(other)

    def _check_apart(self, other: Settings) -> None:
        """Slots have names of their own in a server, publications in a database."""
        server, database = dsn.place_of(self.flash_dsn)
        servers, databases = dsn.place_of(other.flash_dsn)
        if server != servers:
            return
        shared = ["flash_replication_slot"]
        if database == databases:
            shared.append("flash_publication_slot_prefix")
        for setting in shared:
            name = getattr(self, setting)
            if name == getattr(other, setting):
                raise ConfigurationError(
                    f"{self.called(setting)} and {other.called(setting)} are both {name!r} on the "
                    f"same server; give {other.called(setting)} a name of its own."
                )

    def require_dsn(self) -> str:
        """The DSN. Raises `ConfigurationError` where there is none, or none libpq reads."""
        if not self.flash_dsn:
            others = ", ".join(self.flash_sources)
            raise ConfigurationError(
                "flash_dsn is not set: put app.conf.flash_dsn = "
                "'postgresql://…/database' beside the app's broker (in Django, "
                "DATABASES['default'] serves)"
                + (f", or give one of flash_sources by --source: {others}." if others else ".")
            )
        if not dsn.is_readable(self.flash_dsn):
            raise ConfigurationError(
                f"{self.called('flash_dsn')} is not a connection string; write "
                "postgresql://user:password@host:5432/database, with %40 for an @ in the password "
                "and %2F for a /."
            )
        return self.flash_dsn


_SLOT = re.compile("[a-z0-9_]+")
_REPLAY_SLOT_SUFFIX = "_history"
_CHOICES = {
    "flash_replica_identity": ("auto", "keep"),
    "flash_on_lost_slot": ("halt", "recreate"),
}
#: The keys of a source, by the setting that each stands for.
_KEYS = {
    "flash_dsn": "dsn",
    "flash_replication_slot": "slot",
    "flash_publication_slot_prefix": "prefix",
}
#: What a value must be, by the type that its field is declared with.
_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "Mapping[str, Any]": Mapping,
}
_KINDS: dict[str, Any] = {
    one.name: _TYPES[str(one.type)] for one in fields(Settings) if one.name != "source"
}


def _hint(name: object, known: Iterable[str]) -> str:
    known = [str(one) for one in known]
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are: {', '.join(known)}." if known else "it is empty."


def _check_source(name: Any, given: Any) -> None:
    """Whether it is a name, and strings under known keys. What it holds is not for showing."""
    if not isinstance(name, str) or not _SLOT.fullmatch(name):
        raise ConfigurationError(
            f"A source of flash_sources is named with a-z, 0-9 and _ only, not {name!r}."
        )
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"flash_sources[{name!r}] must be a dict such as {{'dsn': 'postgresql://…/{name}'}}, "
            f"not {type(given).__name__}."
        )
    for key, value in given.items():
        if key not in _KEYS.values():
            hint = _hint(key, _KEYS.values())
            raise ConfigurationError(f"flash_sources[{name!r}] has no key {key!r}; {hint}")
        if not isinstance(value, str):
            raise ConfigurationError(
                f"flash_sources[{name!r}][{key!r}] must be str, not {type(value).__name__}."
            )
    if not given.get("dsn"):
        raise ConfigurationError(
            f"The source {name} has no dsn: set flash_sources[{name!r}]['dsn'] = "
            f"'postgresql://…/{name}'."
        )


def _refuse_unread(conf: Any) -> None:
    """Raise `ConfigurationError` for a setting that is none, or is spelt so that nobody reads it.

    A Django project may have settings of its own that begin with FLASH_, and a module of settings
    may import us.
    """
    namespace = str(getattr(conf, "prefix", None) or "")
    for mapping in getattr(conf, "maps", [conf]):
        for key in mapping:
            bare = str(key).lower().removeprefix(namespace.lower()).removeprefix("celery_")
            ours = bare in _KINDS or bare != str(key).lower() or bare == key
            if not bare.startswith("flash_") or not ours or isinstance(mapping[key], ModuleType):
                continue
            if bare not in _KINDS:
                raise ConfigurationError(f"There is no setting {bare}; {_hint(bare, _KINDS)}")
            if conf.get(bare) is None and mapping[key] is not None:
                right = f"{namespace}{bare.upper()}" if namespace else bare
                raise ConfigurationError(f"Nobody reads the setting {key}; write {right}.")


def http_address(address: str) -> tuple[str, int]:
    """Host and port of `flash_http`. Raises `ConfigurationError`."""
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(
            f"flash_http must be host:port, such as '127.0.0.1:9187' ('0.0.0.0:9187' for every "
            f"address of this machine), not {address!r}."
        )
    return host, int(port)
