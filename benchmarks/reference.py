"""What PostgreSQL can send at all: `pg_recvlogical`, which throws it away."""

import subprocess
import time


def drain(backlog):
    """Changes per second from the start of streaming to the end of the backlog."""
    server = backlog.database.server
    slot = backlog.copy()
    names = ",".join(f"flash_publication_{n}" for n in ("insert", "update", "delete", "truncate"))
    command = [
        *(server.binaries / "pg_recvlogical", "-d", backlog.dsn, "--slot", slot, "--start"),
        *("-f", "/dev/null", "-F", "0", "--no-loop", "--verbose"),
        *("--endpos", f"{backlog.end >> 32:X}/{backlog.end & 0xFFFFFFFF:X}"),
        *("-o", "proto_version=1", "-o", f"publication_names={names}"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = []
        started = None
        for line in process.stderr:
            said.append(line)
            if "streaming initiated" in line:
                started = time.time()
        process.wait()
        seconds = time.time() - started if started else 0.0
    if process.returncode or not started:
        raise RuntimeError(f"pg_recvlogical: {''.join(said)}")
    backlog.database.drop_slot(slot)
    return backlog.rows / seconds
