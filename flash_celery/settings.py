"""Every setting: its name, default, unit and checks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations
from types import ModuleType
from typing import Any

from . import dsn
from .credentials import Credentials, arguments, is_asked
from .errors import ConfigurationError, did_you_mean


@dataclass(frozen=True)
class Settings:
    """The checked `flash_*` settings of a Celery app (`CELERY_FLASH_*` in Django).

    They are the settings of one source: of the default one, or after `of_source` of a named one.
    """

    #: Connection string of the database to replicate, as libpq reads it (`postgresql://…` or
    #: `host=… dbname=…`), or a callable that returns it, or the dotted path of one
    #: (`shop.credentials.dsn`), which is called at each connect. In Django the default is
    #: `DATABASES["default"]`.
    flash_dsn: str | Callable[[], str] = field(default="", repr=False)
    #: Command that is run at each connect, and prints the password of `flash_dsn` as its first
    #: line: a list, or a string that is split as a shell does; no shell runs it.
    flash_password_command: str | Sequence[str] = field(default="", repr=False)
    #: Name of the permanent replication slot.
    flash_replication_slot: str = "flash_replication"
    #: Prefix of the four publications; `_insert`, `_update`, `_delete` and `_truncate` follow it.
    flash_publication_slot_prefix: str = "flash_publication"
    #: Queue of handlers without a queue of their own.
    flash_queue: str = "flash"
    #: Dead-letter queue: it keeps the changes of handlers' tasks that failed permanently.
    flash_dead_queue: str = "flash.dead"
    #: How many processes may die on a change before it becomes a dead letter.
    flash_max_deaths: int = 3
    #: How deep handlers may handle each other's writes before a change becomes a dead letter; 0 for
    #: no limit.
    flash_max_depth: int = 16
    #: How many lanes the changes of an `ordered` handler are spread over; 0 for 256, or 16 on
    #: RabbitMQ.
    flash_lanes: int = 0
    #: Seconds that a worker handles changes of one lane before others have their turn.
    flash_lane_budget: float = 1.0
    #: Seconds after which another worker takes over the lane of one that has died.
    flash_lane_lease: float = 30.0
    #: How many messages may wait in a queue before reading pauses; 0 for no limit.
    flash_max_queue_length: int = 0
    #: How many messages of a backfill may wait in a handler's queue; 0 for twice as many as a
    #: worker prefetches.
    flash_backfill_ahead: int = 0
    #: Globs over `schema.table.operation` to task options, in the shape of `task_routes`.
    flash_routes: Mapping[str, Any] = field(default_factory=dict)
    #: Receive large transactions while they are open, and spool them on disk until they commit.
    flash_use_streaming: bool = False
    #: Folder of the spool files; the default is /var/tmp, or if there is none, that of TMPDIR.
    flash_spool_directory: str = ""
    #: `auto` sets the replica identity that a subscription needs; `keep` never alters one, and
    #: `replicate` refuses to start if it does not suffice.
    flash_replica_identity: str = "auto"
    #: With `False`, `replicate` creates and alters nothing: the owner sets up publications, replica
    #: identities and the slot, and `replicate` refuses to start if the handlers need others.
    flash_manage: bool = True
    #: Let PostgreSQL 15 and later leave out rows and columns that no handler needs.
    flash_push_down: bool = False
    #: The most bytes of a change; a larger one becomes a dead letter without its largest values.
    flash_max_change_size: int = 128 << 20
    #: Seconds between two status messages to PostgreSQL.
    flash_status_interval: float = 10.0
    #: Seconds between two heartbeats, which are written to the WAL unless the server is idle, and
    #: must arrive through the stream; 0 for none.
    flash_heartbeat_interval: float = 10.0
    #: What to do when the slot was lost or dropped: `halt`, `recreate` it at the present and record
    #: the gap, or `backfill` the handlers' tables as well.
    flash_on_lost_slot: str = "halt"
    #: What to do when Redis has lost what it had confirmed: `continue` with a warning, `halt`, or
    #: `refill` the queues from `flash_replay_window` first. `auto` is `refill` with a window and an
    #: ordered handler, and otherwise `continue`.
    flash_on_lost_broker: str = "auto"
    #: For how many seconds `flash replay` can read changes again, from a second slot; 0 for none.
    flash_replay_window: float = 0.0
    #: Have standbys keep a copy of the slot, so that it survives a failover (since PostgreSQL 17).
    flash_failover_slot: bool = False
    #: Seconds after SIGTERM in which messages in flight may still be confirmed.
    flash_shutdown_timeout: float = 10.0
    #: Address at which the replication worker serves its status page, metrics and probes
    #: (`127.0.0.1:9187`).
    flash_http: str = ""
    #: The secret that signs the tasks in transactions (`transactional`), or a list: the first
    #: signs, and all are accepted. In Django the default is SECRET_KEY and SECRET_KEY_FALLBACKS.
    flash_signing_key: str | Sequence[str] = field(default="", repr=False)
    #: Seconds that may pass between the signing of a task and the commit of its transaction.
    flash_transactional_max_age: float = 86_400.0
    #: The alias of a database of Django: every task that is sent inside its `atomic()` is carried
    #: by the transaction, without a `transactional()` block.
    flash_transactional_database: str = ""
    #: Refuse tasks in a transaction of a database whose slot does not exist, instead of a warning.
    flash_transactional_strict: bool = False
    #: More databases, by name: a `dsn` for each, and a `slot` and `prefix` unless these are the
    #: default's with the name appended, and a `password_command` if it has one.
    flash_sources: Mapping[str, Any] = field(default_factory=dict, repr=False)
    #: The source of these settings: a name in `flash_sources`, "" for the default. Not a setting.
    source: str = ""

    @classmethod
    def from_app(cls, app: Any) -> Settings:
        """Read the settings from `app.conf`.

        Raises:
            ConfigurationError: A setting is wrong.
        """
        # Celery loads its configuration at the first of these, and replaces `app.conf` by it.
        given = {name: app.conf.get(name) for name in _TYPES}
        _refuse_ignored(app.conf)
        settings = cls(**{name: value for name, value in given.items() if value is not None})
        if not settings.flash_dsn:
            settings = replace(settings, flash_dsn=dsn.of_django())
        settings._check()
        settings._check_sources()
        return settings

    def of_source(self, name: str) -> Settings:
        """Return the settings of a source in `flash_sources`, with its DSN, slot and prefix.

        Raises:
            ConfigurationError: There is no such source.
        """
        if name not in self.flash_sources:
            hint = _suggestion(name, self.flash_sources)
            raise ConfigurationError(f"There is no source {name!r} in flash_sources{hint}")
        values = self.flash_sources[name]
        prefix = self.flash_publication_slot_prefix
        return replace(
            self,
            source=name,
            flash_dsn=values["dsn"],
            # Not the default's: a password is for one server.
            flash_password_command=values.get("password_command", ""),
            flash_replication_slot=values.get("slot", f"{self.flash_replication_slot}_{name}"),
            flash_publication_slot_prefix=values.get("prefix", f"{prefix}_{name}"),
            flash_sources={},
        )

    @property
    def replay_slot(self) -> str:
        """The name of the second slot, from which `flash replay` reads."""
        return f"{self.flash_replication_slot}{_REPLAY_SLOT_SUFFIX}"

    @property
    def recreates_slot(self) -> bool:
        """Whether a lost slot is created again."""
        return self.flash_on_lost_slot != "halt"

    def called(self, setting: str) -> str:
        """Return how the user writes a setting that each source has, such as the DSN."""
        return f"flash_sources[{self.source!r}][{_KEYS[setting]!r}]" if self.source else setting

    @property
    def longest_silence(self) -> float:
        """Seconds of silence after which the server and the worker consider each other dead."""
        return 3 * self.flash_status_interval

    def _check(self) -> None:
        self._check_types()
        self._check_numbers()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                allowed = " or ".join(map(repr, choices))
                raise ConfigurationError(f"{name} must be {allowed}, not {value!r}.")
        self._check_names()
        self._check_password_command()
        self._check_signing_key()
        if self.flash_spool_directory and not os.access(self.flash_spool_directory, os.W_OK):
            raise ConfigurationError(
                f"flash_spool_directory is {self.flash_spool_directory!r}, where no file can be "
                "written; create the folder, or remove the setting."
            )
        if not self.flash_queue:
            raise ConfigurationError("flash_queue is empty; name the queue of the handlers.")
        if self.flash_dead_queue in ("", self.flash_queue):
            raise ConfigurationError(
                "flash_dead_queue must be a queue of its own, which no worker consumes."
            )
        if self.recreates_slot and not self.flash_manage:
            raise ConfigurationError(
                f"flash_on_lost_slot = {self.flash_on_lost_slot!r} creates a slot, which "
                "flash_manage = False leaves to the owner; remove one of the two settings."
            )
        if self.flash_replay_window and not self.flash_manage:
            raise ConfigurationError(
                "flash_replay_window creates a second slot, which flash_manage = False leaves to "
                "the owner; remove one of the two settings."
            )
        if self.flash_on_lost_broker == "refill" and not self.flash_replay_window:
            raise ConfigurationError(
                "flash_on_lost_broker = 'refill' reads the changes again that flash_replay_window "
                "retains, which is 0; set it to a number of seconds, or remove the other setting."
            )
        if self.flash_http:
            http_address(self.flash_http)

    def _check_types(self) -> None:
        for setting in fields(self):
            expected = _TYPES.get(setting.name)
            if expected is None:
                continue
            value = getattr(self, setting.name)
            if not isinstance(value, expected) or (expected is not bool and value is True):
                # A DSN may contain a password, so it is not shown.
                shown = repr(value) if setting.repr else type(value).__name__
                raise ConfigurationError(
                    f"{setting.name} must be {_allowed(expected)}, not {shown}."
                )

    def _check_numbers(self) -> None:
        for name in ("flash_status_interval", "flash_shutdown_timeout"):
            if not 0 < getattr(self, name) < 86_400:
                raise ConfigurationError(f"{name} must be a number of seconds above 0.")
        if not 0 <= self.flash_heartbeat_interval < 86_400:
            raise ConfigurationError(
                "flash_heartbeat_interval must be a number of seconds below a day, or 0 for no "
                "heartbeats."
            )
        if not 0 <= self.flash_replay_window < 366 * 86_400:
            raise ConfigurationError(
                "flash_replay_window must be a number of seconds below a year, or 0 for no replay."
            )
        if not 0 <= self.flash_lanes <= _MOST_LANES:
            raise ConfigurationError(
                f"flash_lanes must be a number from 1 to {_MOST_LANES}, or 0 for the default."
            )
        if not 0 < self.flash_lane_budget <= 60:
            raise ConfigurationError("flash_lane_budget must be above 0, at most 60 seconds.")
        if not 3 <= self.flash_lane_lease <= 3600:
            raise ConfigurationError("flash_lane_lease must be a number of seconds from 3 to 3600.")
        if not self.flash_transactional_max_age >= _SHORTEST_AGE:
            raise ConfigurationError(
                "flash_transactional_max_age must be a number of seconds, at least "
                f"{_SHORTEST_AGE}: the clocks of applications and of PostgreSQL differ, and a task "
                "that is too old is refused."
            )
        for name in ("flash_max_deaths", "flash_max_change_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be a number above 0.")
        if self.flash_max_depth < 0:
            raise ConfigurationError("flash_max_depth must be a number, or 0 for no limit.")
        if self.flash_max_queue_length < 0:
            raise ConfigurationError(
                "flash_max_queue_length must be a number of messages, or 0 for no limit."
            )

    def _check_names(self) -> None:
        slot = self.flash_replication_slot
        if len(slot) > 63 or not _SLOT.fullmatch(slot):
            raise ConfigurationError(
                f"{self.called('flash_replication_slot')} must have 1 to 63 of the characters a-z, "
                f"0-9 and _, not {slot!r}."
            )
        if self.flash_replay_window and len(slot) > 63 - len(_REPLAY_SLOT_SUFFIX):
            raise ConfigurationError(
                f"{self.called('flash_replication_slot')} must have at most 55 characters with "
                "flash_replay_window, because the second slot's name is longer by _history."
            )
        prefix = self.flash_publication_slot_prefix
        if not prefix or len(f"{prefix}_truncate".encode()) > 63:
            raise ConfigurationError(
                f"{self.called('flash_publication_slot_prefix')} must have 1 to 54 bytes, not "
                f"{prefix!r}."
            )

    def _check_sources(self) -> None:
        sources = [self] if self.flash_dsn else []
        for name, values in self.flash_sources.items():
            _check_source(name, values)
            source = self.of_source(name)
            source._check_names()
            source._check_password_command()
            source.check_dsn()
            sources.append(source)
        for source, other in combinations(sources, 2):
            source._check_distinct(other)

    def _check_distinct(self, other: Settings) -> None:
        """Raise `ConfigurationError` if two sources have a slot or a publication in common.

        Slots need different names on one server, publications in one database. Where a callable
        leads is not known yet, so the names must differ.
        """
        (server, database), (servers, databases) = map(_place, (self.flash_dsn, other.flash_dsn))
        known = None not in (server, servers)
        if known and server != servers:
            return
        shared = ["flash_replication_slot"]
        if not known or database == databases:
            shared.append("flash_publication_slot_prefix")
        for setting in shared:
            name = getattr(self, setting)
            if name == getattr(other, setting):
                where = "on the same server" if known else "perhaps on the same server"
                raise ConfigurationError(
                    f"{self.called(setting)} and {other.called(setting)} are both {name!r} "
                    f"{where}; give {other.called(setting)} another name."
                )

    def _check_signing_key(self) -> None:
        keys = self.flash_signing_key
        if not isinstance(keys, str) and not all(isinstance(key, str) for key in keys):
            raise ConfigurationError(
                "flash_signing_key has a key that is no text; write a text, or a list of texts."
            )

    def _check_password_command(self) -> None:
        try:
            command = arguments(self.flash_password_command)
        except ValueError:
            command = [""]  # a quote is not closed
        # The text is not shown: a password may have been written in place of the command.
        if not all(isinstance(word, str) and "\0" not in word for word in command) or (
            command and not command[0]
        ):
            raise ConfigurationError(
                f"{self.called('flash_password_command')} is not a command; write a list such as "
                "['vault', 'read', '-field=password', 'database/static-creds/flash'], or a string "
                "that is quoted as in a shell."
            )

    def check_dsn(self) -> None:
        """Check the DSN, without asking a callable.

        Raises:
            ConfigurationError: It is missing, or libpq cannot read it.
        """
        if not self.flash_dsn:
            others = ", ".join(self.flash_sources)
            raise ConfigurationError(
                "flash_dsn is not set: set app.conf.flash_dsn = "
                "'postgresql://…/database' beside the app's broker (Django's default is "
                "DATABASES['default'])"
                + (f", or choose one of flash_sources with --source: {others}." if others else ".")
            )
        if isinstance(self.flash_dsn, str) and not is_asked(self.flash_dsn):
            if dsn.is_readable(self.flash_dsn):
                return
            raise ConfigurationError(
                f"{self.called('flash_dsn')} is not a connection string; write "
                "postgresql://user:password@host:5432/database, with %40 for an @ in the password "
                "and %2F for a /."
            )

    def require_dsn(self) -> str:
        """Return the DSN to connect with now, with its password; ask for another at each connect.

        Raises:
            ConfigurationError: It is missing, or libpq cannot read it.
            CredentialsError: A callable or the command of the password fails.
        """
        self.check_dsn()
        return self._credentials.dsn()

    def place(self) -> tuple[list[Any], Any]:
        """Return the server and the database, for comparison.

        Raises:
            ConfigurationError: The DSN is missing, or libpq cannot read it.
            CredentialsError: A callable fails.
        """
        self.check_dsn()
        return dsn.place_of(self._credentials.address())

    @cached_property
    def _credentials(self) -> Credentials:
        return Credentials(
            self.called("flash_dsn"),
            self.called("flash_password_command"),
            self.flash_dsn,
            arguments(self.flash_password_command),
            max(self.longest_silence, _CREDENTIALS_SECONDS),
        )


#: The least seconds that a callable or command may take to give a DSN or password: the commands
#: of clouds take some, and flash_status_interval may be short.
_CREDENTIALS_SECONDS = 10.0
_SLOT = re.compile("[a-z0-9_]+")
#: The most lanes of a handler: a TRUNCATE puts a marker into each of them.
_MOST_LANES = 4096
#: Seconds, more than the clocks of servers differ.
_SHORTEST_AGE = 60
_REPLAY_SLOT_SUFFIX = "_history"
_CHOICES = {
    "flash_replica_identity": ("auto", "keep"),
    "flash_on_lost_slot": ("halt", "recreate", "backfill"),
    "flash_on_lost_broker": ("auto", "continue", "halt", "refill"),
}
#: The keys of a source, by the setting that each replaces.
_KEYS = {
    "flash_dsn": "dsn",
    "flash_replication_slot": "slot",
    "flash_publication_slot_prefix": "prefix",
    "flash_password_command": "password_command",
}
#: The accepted types of a value, by the annotation of its field.
_ACCEPTED: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "Mapping[str, Any]": Mapping,
    "str | Callable[[], str]": (str, Callable),
    "str | Sequence[str]": (str, list, tuple),
}
#: The accepted types of every setting.
_TYPES: dict[str, Any] = {
    setting.name: _ACCEPTED[str(setting.type)]
    for setting in fields(Settings)
    if setting.name != "source"
}


def _allowed(types: Any) -> str:
    """Return the names of accepted types, for an error."""
    names = (each.__name__ for each in (types if isinstance(types, tuple) else (types,)))
    return " or ".join("a callable" if name == "Callable" else name for name in names)


def _place(given: str | Callable[[], str]) -> tuple[list[Any] | None, Any]:
    """Return the server and the database of a DSN; None for those of a callable."""
    if isinstance(given, str) and not is_asked(given):
        return dsn.place_of(given)
    return None, None


def _suggestion(name: object, known: Collection[str]) -> str:
    names = f"; known are: {', '.join(known)}." if known else "; it is empty."
    return did_you_mean(name, known) or names


def _check_source(name: Any, values: Any) -> None:
    """Check the name and the types of a source's values, which errors must not show."""
    if not isinstance(name, str) or not _SLOT.fullmatch(name):
        raise ConfigurationError(
            f"The name of a source in flash_sources must have only a-z, 0-9 and _, not {name!r}."
        )
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"flash_sources[{name!r}] must be a dict such as {{'dsn': 'postgresql://…/{name}'}}, "
            f"not {type(values).__name__}."
        )
    for key, value in values.items():
        if key not in _KEYS.values():
            hint = _suggestion(key, _KEYS.values())
            raise ConfigurationError(f"flash_sources[{name!r}] has no key {key!r}{hint}")
        setting = next(setting for setting in _KEYS if _KEYS[setting] == key)
        if not isinstance(value, _TYPES[setting]):
            raise ConfigurationError(
                f"flash_sources[{name!r}][{key!r}] must be {_allowed(_TYPES[setting])}, not "
                f"{type(value).__name__}."
            )
    if not values.get("dsn"):
        raise ConfigurationError(
            f"The source {name} has no dsn: set flash_sources[{name!r}]['dsn'] = "
            f"'postgresql://…/{name}'."
        )


def _refuse_ignored(conf: Any) -> None:
    """Raise `ConfigurationError` for an unknown setting, or a spelling that Celery ignores.

    Ignore names that may be a Django project's own (FLASH_… in capitals), and modules, which a
    settings module may import.
    """
    namespace = str(getattr(conf, "prefix", None) or "")
    for mapping in getattr(conf, "maps", [conf]):
        for key in mapping:
            bare = str(key).lower().removeprefix(namespace.lower()).removeprefix("celery_")
            ours = bare in _TYPES or bare != str(key).lower() or bare == key
            if not bare.startswith("flash_") or not ours or isinstance(mapping[key], ModuleType):
                continue
            if bare not in _TYPES:
                raise ConfigurationError(f"There is no setting {bare}{_suggestion(bare, _TYPES)}")
            right = f"{namespace}{bare.upper()}" if namespace else bare
            # Of two values of one name, the later one may be None.
            if conf.get(bare) is None and mapping[key] is not None and key != right:
                raise ConfigurationError(f"Celery ignores the setting {key}; rename it to {right}.")


def http_address(address: str) -> tuple[str, int]:
    """Return the host and port in `flash_http`.

    Raises:
        ConfigurationError: It is no address.
    """
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(
            f"flash_http must be host:port, such as '127.0.0.1:9187' ('0.0.0.0:9187' for every "
            f"address of this machine), not {address!r}."
        )
    return host, int(port)
