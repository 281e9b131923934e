"""Measure how fast PostgreSQL can send: `pg_recvlogical` discards the changes."""

import subprocess
import time


def drain(backlog):
    """Return changes per second, from the start of streaming to the end of the backlog."""
    server = backlog.database.server
    slot = backlog.copy()
    names = ",".join(f"flash_publication_{n}" for n in ("insert", "update", "delete", "truncate"))
    end = f"{backlog.end >> 32:X}/{backlog.end & 0xFFFFFFFF:X}"
    command = [server.binaries / "pg_recvlogical", "-d", backlog.dsn, "--slot", slot, "--start"]
    command += ["-f", "/dev/null", "-F", "0", "--no-loop", "--verbose", "--endpos", end]
    command += ["-o", "proto_version=1", "-o", f"publication_names={names}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        output = []
        started = None
        for line in process.stderr:
            output.append(line)
            if "streaming initiated" in line:
                started = time.time()
        process.wait()
        seconds = time.time() - started if started else 0.0
    if process.returncode or not started:
        raise RuntimeError(f"pg_recvlogical: {''.join(output)}")
    backlog.database.drop_slot(slot)
    return backlog.rows / seconds
