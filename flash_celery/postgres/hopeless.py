"""Connection failures that waiting does not mend."""

from __future__ import annotations

import re

from ..errors import ConfigurationError, FlashError, ReplicationError
from ..settings import Settings

#: libpq gives no SQLSTATE for these.
_HOPELESS = re.compile(
    r"authentication failed|no password supplied|does not exist|pg_hba\.conf|permission denied|"
    r"unsupported startup parameter|not permitted to log in|invalid connection option|"
    r"must be superuser or replication role|certificate|private key file|SSL was required"
)


def refuse_hopeless(error: FlashError, settings: Settings) -> None:
    """Raise `ConfigurationError` for a connection failure that waiting does not mend."""
    if isinstance(error, ReplicationError) and _HOPELESS.search(str(error)):
        raise ConfigurationError(_with_hint(str(error), settings.called("flash_dsn"))) from error


def _with_hint(message: str, dsn: str) -> str:
    if "unsupported startup parameter" in message:
        return f"{message[:-1]}; this is a pooler: {dsn} must lead to PostgreSQL itself."
    if "certificate" in message or "SSL" in message:
        return (
            f"{message[:-1]}; correct the host, sslmode and sslrootcert of {dsn}, or the server's "
            "certificate."
        )
    return f"{message[:-1]}; correct {dsn}, or the server's roles and pg_hba.conf."
