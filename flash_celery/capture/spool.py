"""The messages of a transaction that is still open, kept until it commits: in memory, then on disk.

The file has no name, so nothing is left of it whatever happens to the process.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import SpoolError

_HEADER = struct.Struct("!II")
#: Bytes of one transaction that stay in memory; a thousand may be open at a time.
_IN_MEMORY = 1 << 16
#: Bytes of a file that are buffered, in each; Python 3.14 would take 128 KiB.
_BUFFER = 1 << 13
#: Xids that have a number in common.
_PAGE = 4096
#: Spaces and such in the path of a mount.
_OCTAL = re.compile(r"\\([0-7]{3})")


def default_directory() -> str:
    """Where files go by default: /tmp is often memory, /var/tmp is not."""
    return "/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir()  # noqa: S108


def file_system(directory: str, mounts: str = "/proc/self/mountinfo") -> str:
    """The type of the file system a folder is in (`ext4`, `tmpfs`); "" where Linux does not say.

    Source: proc_pid_mountinfo(5); of several on one point the last is seen.
    """
    try:
        lines = Path(mounts).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    folder = Path(directory).resolve()
    found, depth = "", 0
    for line in lines:
        place, _, kind = line.partition(" - ")
        point = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), place.split(" ")[4]))
        if len(point.parts) >= depth and folder.is_relative_to(point):
            found, depth = kind.split(" ")[0], len(point.parts)
    return found


class Spool:
    """One streamed transaction."""

    def __init__(self, directory: str) -> None:
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            _IN_MEMORY, buffering=_BUFFER, dir=directory
        )
        # A bit for each xid: a loop of savepoints may have millions.
        self._aborted: defaultdict[int, int] = defaultdict(int)
        #: Bytes that were appended.
        self.size = 0

    def append(self, xid: int, messages: Iterable[bytes]) -> None:
        """Keep messages of the transaction, or of a savepoint in it, whose xid they bear.

        Raises `SpoolError` if the disk takes no more.
        """
        parts = [part for one in messages for part in (_HEADER.pack(xid, len(one)), one)]
        try:
            self.size += self._file.write(b"".join(parts))
        except OSError as error:
            raise SpoolError(f"A large transaction cannot be spooled: {error}.") from error

    def abort(self, xid: int) -> None:
        """Leave out what a savepoint did that was rolled back."""
        self._aborted[xid // _PAGE] |= 1 << xid % _PAGE

    def messages(self) -> Iterator[bytes]:
        """What is to be applied, in order. Raises `SpoolError`."""
        try:
            self._file.seek(0)  # writes what is buffered
            while header := self._file.read(_HEADER.size):
                xid, length = _HEADER.unpack(header)
                payload = self._file.read(length)
                if not self._aborted.get(xid // _PAGE, 0) >> xid % _PAGE & 1:
                    yield payload
        except OSError as error:
            raise SpoolError(f"A large transaction cannot be spooled: {error}.") from error

    def close(self) -> None:
        """Let go of the memory or the file."""
        with suppress(OSError):  # what is buffered, the disk may not take either
            self._file.close()
