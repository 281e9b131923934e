"""Where streaming keeps what is not committed yet."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from flash_celery.capture.spool import Spool, default_directory, file_system
from flash_celery.capture.streamed_messages import StreamedMessages
from flash_celery.commands import doctor
from flash_celery.settings import Settings

MOUNTS = r"""21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:20 / /dev/shm rw,nosuid - tmpfs tmpfs rw
23 21 0:21 / /mnt/with\040space rw - xfs /dev/sdb1 rw
24 21 0:22 / /var/tmp rw shared:2 master:1 - tmpfs tmpfs rw
25 24 8:2 / /var/tmp rw - btrfs /dev/sdc1 rw
26 23 0:23 / /mnt rw - nfs4 server:/ rw
"""


@pytest.fixture
def mounts(tmp_path):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    return str(tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/", "ext4"),
        ("/dev/shm/spool", "tmpfs"),
        ("/dev/shmall", "ext4"),
        ("/mnt/with space/a", "xfs"),
        ("/mnt/with", "nfs4"),
        ("/var/tmp", "btrfs"),
    ],
)
def test_spool_file_system_is_that_of_the_last_innermost_mount(mounts, directory, kind):
    assert file_system(directory, mounts) == kind


def test_spool_file_system_follows_links(mounts, tmp_path):
    (tmp_path / "link").symlink_to("/dev/shm")
    assert file_system(str(tmp_path / "link"), mounts) == "tmpfs"


def test_spool_file_system_is_unknown_without_proc(tmp_path):
    assert file_system("/", str(tmp_path / "none")) == ""


def test_spool_default_directory_is_not_in_memory():
    if Path("/var/tmp").is_dir():
        assert default_directory() == "/var/tmp"
    assert file_system(default_directory()) not in ("tmpfs", "ramfs")


def found(**settings):
    return [
        (finding.level, finding.message) for finding in doctor.spool_findings(Settings(**settings))
    ]


def test_doctor_warns_of_a_spool_in_memory():
    if file_system("/dev/shm") != "tmpfs":
        pytest.skip("there is no tmpfs at /dev/shm")
    ((level, message),) = found(flash_use_streaming=True, flash_spool_directory="/dev/shm")
    assert level == "warning"
    assert "/dev/shm is in memory (tmpfs)" in message
    assert "flash_spool_directory" in message
    assert found(flash_spool_directory="/dev/shm") == []


def test_doctor_names_the_directory_of_the_spool(tmp_path):
    ((level, message),) = found(flash_use_streaming=True)
    assert level == "ok"
    assert message.startswith(default_directory())


def test_spool_of_many_open_transactions_takes_little_memory(tmp_path):
    tracemalloc.start()
    try:
        spools = [Spool(str(tmp_path)) for _ in range(200)]
        for _ in range(9):
            for spool in spools:
                spool.append(1, [b"x" * 100_000])
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 200 * 100_000
    for spool in spools:
        assert sum(map(len, spool.messages())) == 900_000
        spool.close()


def test_spool_of_a_million_aborted_savepoints_takes_little_memory():
    spool = Spool("")
    for xid in (7, 5000, 900_000):
        spool.append(xid, [str(xid).encode()])
    tracemalloc.start()
    for xid in range(4000, 1_004_000, 2):
        spool.abort(xid)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1_000_000
    assert list(spool.messages()) == [b"7"]
    spool.close()


FULL = """
import resource, signal, sys
from flash_celery.errors import SpoolError
from flash_celery.capture.spool import Spool

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
spool = Spool(sys.argv[1])
try:
    while True:
        spool.append(1, [b"x" * 1000])
except SpoolError as error:
    print(error)
spool.close()
print("closed")
"""


def test_spool_closes_on_a_full_disk(tmp_path):
    """Closing the file writes its buffer, which fails again."""
    code = [sys.executable, "-c", FULL, str(tmp_path)]
    ran = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert "cannot be spooled" in ran.stdout
    assert ran.stdout.endswith("closed\n"), ran.stderr


#: Rows of an xid, messages (m), and aborted xids (a), of the transaction 10; whether it is certain.
STREAMED = [
    ("10 a11", True),
    ("m a11", False),
    ("m 11 a11", False),
    ("m 10 a11", False),
    ("m 10 11 a11", True),
    ("m 10 11 12 a12 a11", True),
    ("m 11 12 a12", True),
    ("m 12 11 a11", False),
    ("11 m 10 a11", False),
    ("11 m 12 13 a13", True),
    ("11 m 12 13 a13 a12 a11", False),
    ("10 11 a11 m 10", True),
    ("m 10 11 m a11", False),
    ("m 10 11 m 10 12 a12", True),
]


@pytest.mark.parametrize("top", [10, (1 << 32) - 1])
@pytest.mark.parametrize(("steps", "certain"), STREAMED)
def test_streamed_message_is_certain_if_no_aborted_savepoint_can_be_its_own(steps, certain, top):
    messages = StreamedMessages(top)
    for step in steps.split():
        xid = (int(step.strip("a")) - 10 + top) % (1 << 32) if step != "m" else 0
        if step == "m":
            messages.message()
        elif step[0] == "a":
            messages.abort(xid)
        else:
            messages.row(xid)
    assert messages.doubtful != certain
