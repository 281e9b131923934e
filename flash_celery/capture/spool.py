"""Keeps the messages of an open transaction until its commit, in memory and then in a file.

The file has no name, so none is left behind if the process is killed.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import SpoolError
from .streamed_messages import Xids

_HEADER = struct.Struct("!II")
#: Bytes of one transaction that stay in memory. A thousand may be open at the same time.
_IN_MEMORY = 1 << 16
#: Bytes of a file's buffer. The default of Python 3.14 is 128 KiB.
_BUFFER = 1 << 13
#: A space or another special character in the path of a mount.
_OCTAL = re.compile(r"\\([0-7]{3})")


def default_directory() -> str:
    """Return the default folder for files: /var/tmp, because /tmp is often in memory."""
    return "/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir()  # noqa: S108


def file_system(directory: str, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system that holds a folder (`ext4`, `tmpfs`); "" if unknown.

    Source: proc_pid_mountinfo(5); of several mounts on one point the last is visible.
    """
    try:
        lines = Path(mounts).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    folder = Path(directory).resolve()
    file_system_type, depth = "", 0
    for line in lines:
        mount, _, source = line.partition(" - ")
        point = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), mount.split(" ")[4]))
        if len(point.parts) >= depth and folder.is_relative_to(point):
            file_system_type, depth = source.split(" ")[0], len(point.parts)
    return file_system_type


class Spool:
    """The messages of one streamed transaction."""

    def __init__(self, directory: str) -> None:
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            _IN_MEMORY, buffering=_BUFFER, dir=directory
        )
        self._aborted = Xids()
        #: Bytes appended so far.
        self.size = 0

    def append(self, xid: int, messages: Iterable[bytes]) -> None:
        """Keep messages of the transaction, or of the savepoint in it that has this xid.

        Raises:
            SpoolError: The disk is full.
        """
        parts = []
        for message in messages:
            parts += [_HEADER.pack(xid, len(message)), message]
        try:
            self.size += self._file.write(b"".join(parts))
        except OSError as error:
            raise SpoolError(f"A large transaction cannot be spooled: {error}.") from error

    def abort(self, xid: int) -> None:
        """Leave out the messages of a savepoint that was rolled back."""
        self._aborted.add(xid)

    def messages(self) -> Iterator[bytes]:
        """Yield the messages in order, without those of aborted savepoints.

        Raises:
            SpoolError: The file cannot be read.
        """
        try:
            self._file.seek(0)  # flushes the buffer
            while header := self._file.read(_HEADER.size):
                xid, length = _HEADER.unpack(header)
                payload = self._file.read(length)
                if xid not in self._aborted:
                    yield payload
        except OSError as error:
            raise SpoolError(f"A large transaction cannot be spooled: {error}.") from error

    def close(self) -> None:
        """Free the memory or the file."""
        with suppress(OSError):  # the buffer may not fit on a full disk
            self._file.close()
