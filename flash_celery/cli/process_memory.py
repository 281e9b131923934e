"""How the processes of the commands keep their memory.

The changes of `flash replicate` live for milliseconds and are in no cycles; Python and glibc expect
other objects.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os

#: Thresholds of Python's garbage collector. Messages and their deliveries live until the broker has
#: confirmed them and are in no cycle, so the default thresholds check them for nothing, many times.
_GC_THRESHOLDS = (20_000, 20, 50)
#: Options of glibc's `mallopt` (malloc.h), by their numbers, and the bytes or arenas that they set.
#: By default each thread has an arena of its own, and a text of more than 128 KB is returned to the
#: kernel at once, which clears and maps the same memory again for the next batch.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MALLOC = {_M_TRIM_THRESHOLD: 4 << 20, _M_MMAP_THRESHOLD: 1 << 20, _M_ARENA_MAX: 1}


def collect_garbage_rarely() -> None:
    """Exempt what is loaded from garbage collection.

    The app's own objects live as long as the process. Checking them for garbage repeatedly took a
    fifth of the time of small transactions.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def keep_freed_memory() -> None:
    """Have glibc use the memory of one batch for the next; a no-op with another C library.

    What the environment says about memory wins. To be called before other threads start.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _MALLOC.items():
            mallopt(option, value)


def leave_garbage_at_exit() -> None:
    """Have the process end without looking at all its objects for cycles: the kernel takes them.

    That took a fifth of the processor time of `flash status`.
    """
    atexit.register(gc.freeze)
