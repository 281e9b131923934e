"""What the commands do about the memory of their processes, in processes of their own."""

import ctypes
import os
import subprocess
import sys

import pytest

#: Prints how many arenas there are when four threads have allocated at the same time.
ARENAS = """
import ctypes, os, sys, tempfile, threading
from flash_celery.cli.process_memory import keep_freed_memory

keep_freed_memory()
together = threading.Barrier(4)

def allocate():
    texts = [bytes(2000) for _ in range(100)]
    together.wait(60)

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
with tempfile.TemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    file.seek(0)
    sys.stdout.write(str(file.read().count(b"<heap nr=")))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="another C library")
@pytest.mark.parametrize(
    ("settings", "one"),
    [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False), ({"GLIBC_TUNABLES": ""}, False)],
)
def test_threads_share_an_arena_unless_the_environment_has_settings(settings, one):
    without = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    without.pop("GLIBC_TUNABLES", None)
    arenas = subprocess.run(
        [sys.executable, "-c", ARENAS],
        env=without | settings,
        check=True,
        capture_output=True,
        timeout=90,
    )
    assert (int(arenas.stdout) == 1) is one


#: Prints if Python looks for cycles at its end.
CYCLE = """
from flash_celery.cli.process_memory import leave_garbage_at_exit

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self, write=print):
        write("collected")

leave_garbage_at_exit()
Cycle()
"""


@pytest.mark.parametrize("leaves", [True, False])
def test_process_of_a_command_ends_without_looking_for_garbage(leaves):
    code = CYCLE if leaves else CYCLE.replace("\nleave_garbage_at_exit()", "")
    ended = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=90
    )
    assert (ended.stdout == b"") is leaves
