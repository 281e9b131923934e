"""Signatures of the messages that carry tasks.

Every role of a database may call pg_logical_emit_message, so without a signature each of them could
enqueue any task. The signature covers the exact bytes of the message, the server and
the database, so that a message is valid in one database only.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from ..errors import ConfigurationError, TaskRefused
from ..settings import Settings

#: The prefix of the logical messages.
PREFIX = "flash.task"
#: The fewest characters of a secret that is not easily guessed.
SHORTEST_SECRET = 16
_VERSION = 1
#: Version, id of the key, microseconds since 1970 at signing, signature.
_HEAD = struct.Struct(">B4sQ32s")
_PURPOSE = b"flash_celery.transactional"


class Database(NamedTuple):
    """A database: the server's system identifier, and what current_database() returns."""

    system: str
    name: str


class SigningKey(NamedTuple):
    """A key that is derived from a secret."""

    id: bytes
    key: bytes


@cache
def _derived(secret: str) -> SigningKey:
    """Return the key of a secret, by HKDF-SHA256 (RFC 5869) with an empty salt."""
    pseudorandom = hmac.digest(bytes(32), secret.encode(), "sha256")
    key = hmac.digest(pseudorandom, _PURPOSE + b"\x01", "sha256")
    return SigningKey(hashlib.sha256(key).digest()[:4], key)


def keys_of(settings: Settings) -> list[SigningKey]:
    """Return the keys, the one that signs first; none if there is no secret.

    Without `flash_signing_key` they are Django's SECRET_KEY and SECRET_KEY_FALLBACKS.
    """
    given = settings.flash_signing_key
    secrets = [given] if isinstance(given, str) else [*given]
    if not any(secrets):
        secrets = _secrets_of_django()
    return [_derived(secret) for secret in secrets if secret]


def require_keys(settings: Settings) -> list[SigningKey]:
    """Return the keys.

    Raises:
        ConfigurationError: There are none.
    """
    keys = keys_of(settings)
    if not keys:
        raise ConfigurationError(
            "Tasks in transactions are signed, and there is no key; set flash_signing_key to a "
            "random text, the same in the application and in `flash replicate`."
        )
    return keys


def _secrets_of_django() -> list[str]:
    conf = sys.modules.get("django.conf")
    settings: Any = getattr(conf, "settings", None)
    if settings is None or not settings.configured:
        return []
    fallbacks = getattr(settings, "SECRET_KEY_FALLBACKS", None) or []
    try:
        secret = settings.SECRET_KEY
    except Exception:  # Django refuses an empty one when it is read
        secret = ""
    secrets = [secret, *fallbacks]
    return [each.decode() if isinstance(each, bytes) else str(each) for each in secrets]


def sign(key: SigningKey, database: Database, body: bytes) -> bytes:
    """Return a message with a body, and the signature of both."""
    signed_at = time.time_ns() // 1000
    signature = _signature(key, database, signed_at, body)
    return _HEAD.pack(_VERSION, key.id, signed_at, signature) + body


def _signature(key: SigningKey, database: Database, signed_at: int, body: bytes) -> bytes:
    place = b"".join(
        struct.pack(">I", len(part)) + part for part in (each.encode() for each in database)
    )
    head = struct.pack(">B4sQ", _VERSION, key.id, signed_at)
    return hmac.digest(key.key, b"\0".join((PREFIX.encode(), head + place + body)), "sha256")


class Verifier:
    """Verifies the messages of one database.

    Args:
        keys: The keys that may have signed.
        database: The database.
        max_age: Seconds that may pass between signing and the commit.
        max_size: The most bytes of a message's body.
    """

    def __init__(
        self, keys: Sequence[SigningKey], database: Database, max_age: float, max_size: int
    ) -> None:
        self._keys = {key.id: key for key in keys}
        self._database = database
        self._max_age = max_age
        self._max_size = max_size

    def verify(self, content: bytes | memoryview, committed_at: float) -> bytes:
        """Return the body of a message. Nothing of it is parsed before.

        Args:
            content: The message.
            committed_at: When its transaction was committed, in seconds since 1970.

        Raises:
            TaskRefused: It was not signed by one of the keys for this database, or too early, or is
                too large.
        """
        if len(content) > _HEAD.size + self._max_size:
            raise TaskRefused("it is larger than flash_max_change_size allows")
        if len(content) < _HEAD.size:
            raise TaskRefused("it is not signed")
        version, key_id, signed_at, signature = _HEAD.unpack_from(content)
        if version != _VERSION:
            raise TaskRefused("it is not signed, or by another version of flash-celery")
        key = self._keys.get(key_id)
        if key is None:
            raise TaskRefused("it is signed with a key that flash_signing_key does not have")
        body = bytes(content[_HEAD.size :])
        expected = _signature(key, self._database, signed_at, body)
        if not hmac.compare_digest(expected, signature):
            raise TaskRefused("its signature is wrong: altered, or signed for another database")
        if committed_at - signed_at / 1e6 > self._max_age:
            raise TaskRefused(
                f"it was signed more than {self._max_age:g} s before its commit "
                "(flash_transactional_max_age)"
            )
        return body
