"""A folder in memory for the data of the tests' servers.

There a database is created with a tenth of the CPU time, and nothing waits for a disk. Killing a
server loses as little as on a disk.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY = Path("/dev/shm")
#: Bytes that have to be free.
ENOUGH = 6 << 30


def is_enough():
    if not os.access(MEMORY, os.W_OK):
        return False
    # Where the tests run as root, PostgreSQL's programs may be copied beside its data.
    executable = not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    return executable and shutil.disk_usage(MEMORY).free >= ENOUGH


def new_folder():
    """Return a new folder in memory, after the removal of those whose tests were killed."""
    with _locked(MEMORY):
        for left in MEMORY.glob("flash-tests-*"):
            with suppress(OSError), _locked(left, fcntl.LOCK_NB):
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="flash-tests-", dir=MEMORY))
        folder.chmod(0o755)  # PostgreSQL is another user where the tests run as root
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)  # until this process ends
    return folder


@contextmanager
def _locked(folder, how=0):
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(handle)
