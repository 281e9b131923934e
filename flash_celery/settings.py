"""Every setting, once: its name, default, unit and check."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from .errors import ConfigurationError


@dataclass(frozen=True)
class Settings:
    """The `flash_*` settings of a Celery app (`CELERY_FLASH_*` in Django), checked."""

    #: Connection string of the database to replicate, as libpq reads it
    #: (`postgresql://…` or `host=… dbname=…`). In Django the default is `DATABASES["default"]`.
    flash_dsn: str = field(default="", repr=False)
    #: Name of the permanent replication slot.
    flash_replication_slot: str = "flash_replication"
    #: The four publications are called this plus `_insert`, `_update`, `_delete`, `_truncate`.
    flash_publication_slot_prefix: str = "flash_publication"
    #: Queue of handlers that name none.
    flash_queue: str = "flash"
    #: Globs over `schema.table.operation` to task options, in the shape of `task_routes`.
    flash_routes: Mapping[str, Any] = field(default_factory=dict)
    #: Receive large transactions while they are open and spool them on disk until they commit.
    flash_use_streaming: bool = False
    #: Folder for what streaming spools; by default /var/tmp, or what TMPDIR says without one.
    flash_spool_directory: str = ""
    #: `auto` sets the replica identity that a subscription needs; `keep` alters nothing and
    #: refuses to start where it does not suffice.
    flash_replica_identity: str = "auto"
    #: Let PostgreSQL 15 and later leave out rows and columns that no handler wants.
    flash_push_down: bool = False
    #: Seconds between two status messages to PostgreSQL.
    flash_status_interval: float = 10.0
    #: Seconds that SIGTERM leaves for what is in flight.
    flash_shutdown_timeout: float = 10.0

    @classmethod
    def from_app(cls, app: Any) -> Settings:
        """Read them from `app.conf`. Raises `ConfigurationError` for what cannot be right."""
        known = [setting.name for setting in fields(cls)]
        for name in _flash_keys(app.conf):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}."
                raise ConfigurationError(f"There is no setting {name}; {hint}")
        given = {name: app.conf.get(name) for name in known}
        settings = cls(**{name: value for name, value in given.items() if value is not None})
        if not settings.flash_dsn:
            settings = cls(**{**vars(settings), "flash_dsn": _django_dsn()})
        settings._check()
        return settings

    def _check(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            expected = _KINDS[setting.name]
            if not isinstance(value, expected) or (expected is not bool and value is True):
                kind = " or ".join(
                    k.__name__ for k in (expected if isinstance(expected, tuple) else (expected,))
                )
                raise ConfigurationError(f"{setting.name} must be {kind}, not {value!r}.")
        if self.flash_replica_identity not in ("auto", "keep"):
            raise ConfigurationError(
                f"flash_replica_identity is 'auto' or 'keep', not {self.flash_replica_identity!r}."
            )
        for name in ("flash_status_interval", "flash_shutdown_timeout"):
            if not 0 < getattr(self, name) < 86_400:
                raise ConfigurationError(f"{name} is a number of seconds above 0.")
        slot = self.flash_replication_slot
        if not (0 < len(slot) < 64) or set(slot) - set("abcdefghijklmnopqrstuvwxyz0123456789_"):
            raise ConfigurationError(
                "flash_replication_slot may hold a-z, 0-9 and _ only, at most 63 of them, "
                f"not {slot!r}."
            )
        prefix = self.flash_publication_slot_prefix
        if not prefix or len(f"{prefix}_truncate".encode()) > 63:
            raise ConfigurationError(
                f"flash_publication_slot_prefix must have 1 to 54 bytes, not {prefix!r}."
            )
        if self.flash_spool_directory and not os.access(self.flash_spool_directory, os.W_OK):
            raise ConfigurationError(
                f"flash_spool_directory is {self.flash_spool_directory!r}, where no file can be "
                "written; make the folder, or leave it out."
            )
        if not self.flash_queue:
            raise ConfigurationError("flash_queue is empty; name the queue of the handlers.")

    def require_dsn(self) -> str:
        """The DSN. Raises `ConfigurationError` where there is none, or none libpq reads."""
        if not self.flash_dsn:
            raise ConfigurationError(
                "flash_dsn is not set: put app.conf.flash_dsn = 'postgresql://…/database' "
                "beside the app's broker (in Django, DATABASES['default'] serves)."
            )
        try:
            conninfo_to_dict(self.flash_dsn)
        except ProgrammingError:
            # What libpq says of it may hold the password.
            raise ConfigurationError(
                "flash_dsn is not a connection string; write "
                "postgresql://user:password@host:5432/database."
            ) from None
        return self.flash_dsn


_KINDS: dict[str, Any] = {
    "flash_dsn": str,
    "flash_replication_slot": str,
    "flash_publication_slot_prefix": str,
    "flash_queue": str,
    "flash_routes": Mapping,
    "flash_use_streaming": bool,
    "flash_spool_directory": str,
    "flash_replica_identity": str,
    "flash_push_down": bool,
    "flash_status_interval": (int, float),
    "flash_shutdown_timeout": (int, float),
}


def _flash_keys(conf: Any) -> set[str]:
    """The `flash_…` keys somebody wrote, whatever case and namespace they were written in."""
    found = set()
    for mapping in getattr(conf, "maps", [conf]):
        for key in mapping:
            name = str(key).lower().removeprefix("celery_")
            if name.startswith("flash_"):
                found.add(name)
    return found


def _django_dsn() -> str:
    """`DATABASES["default"]` as a connection string, where Django is in use and has one."""
    if "django.conf" not in sys.modules:
        return ""
    from django.conf import settings
    from django.db import connection
    from psycopg.conninfo import make_conninfo

    if not settings.configured or connection.vendor != "postgresql":
        return ""
    extra = {"cursor_factory", "context", "prepare_threshold", "server_side_binding"}
    parameters = connection.get_connection_params()
    given: dict[str, Any] = {
        name: value
        for name, value in parameters.items()
        if name not in extra and isinstance(value, (str, int))
    }
    return make_conninfo("", **given)
