"""TLS to PostgreSQL and to both brokers, with a certificate made here; a wrong one stops it."""

import json
import os
import shutil
import ssl
import subprocess
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import psycopg
import pytest

from example_project.servers import Postgres, Valkey, free_port
from tests.acceptance.steps import assert_refused
from tests.conftest import Certificates, Database, missing

PASSWORD = "s3cret/@: %"


def newest_with_tls():
    """The binaries of a PostgreSQL that was built with OpenSSL: the wheel was not."""
    for binaries in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        made = subprocess.run(
            [binaries / "pg_config", "--configure"], capture_output=True, timeout=120
        )
        if b"openssl" in made.stdout and (binaries / "postgres").exists():
            return binaries
    return missing("PostgreSQL with TLS (postgresql)")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Of another authority."""
    return Certificates(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def postgres(certificates):
    with Postgres(newest_with_tls()) as server:
        for name, file in (
            ("server.crt", certificates.certificate),
            ("server.key", certificates.key),
        ):
            copy = Path(shutil.copy(file, server.folder / name))
            if server.as_user:
                os.chown(copy, server.as_user["user"], server.as_user["group"])
            copy.chmod(0o600)
            server.options[f"ssl_{'cert' if name.endswith('crt') else 'key'}_file"] = copy
        server.options["ssl"] = "on"
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            password = psycopg.sql.Literal(PASSWORD).as_string(connection)
            connection.execute(f"CREATE ROLE flash LOGIN SUPERUSER PASSWORD {password}")
        server.stop()
        # No record has the keyword `replication`, so no role can take a base backup.
        (server.data / "pg_hba.conf").write_text(
            "hostssl all postgres all trust\nhostssl all flash all scram-sha-256\n"
        )
        server.start()
        yield server


def dsn(server, database="postgres", **parameters):
    given = {"host": "localhost", "hostaddr": "127.0.0.1", "user": "flash", "password": PASSWORD}
    given |= {"port": server.port, "dbname": database, "sslmode": "verify-full"}
    return psycopg.conninfo.make_conninfo("", **(given | parameters))


@pytest.fixture
def database(new_database, certificates):
    database = new_database()
    verified = dsn(database.server, database.name, sslrootcert=certificates.authority)
    return Over(database, verified)


class Over(Database):
    """A database that is reached over TLS."""

    def __init__(self, database, verified):
        super().__init__(database.server, database.name)
        self.dsn = verified


@pytest.fixture(scope="module")
def redis(certificates):
    binary = shutil.which("redis-server")
    if binary is None:
        missing("Redis with TLS (redis-server)")
    port = free_port()
    options = {
        "tls-port": port,
        "tls-cert-file": certificates.certificate,
        "tls-key-file": certificates.key,
        "tls-ca-cert-file": certificates.authority,
        "tls-auth-clients": "no",
    }
    with Valkey(Path(binary), **options) as server:
        yield SimpleNamespace(server=server, port=port)


def broker(request, name, authority):
    """URL and `broker_use_ssl`."""
    if name == "redis":
        port = request.getfixturevalue("redis").port
        settings = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(authority)}
        return f"rediss://localhost:{port}/0", settings | {"ssl_check_hostname": True}
    rabbit = request.getfixturevalue("rabbit")
    rabbit.empty()
    port = rabbit.tls_port
    settings = {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": str(authority)}
    return f"amqps://guest:guest@localhost:{port}//", settings | {"server_hostname": "localhost"}


BROKERS = ["redis", "rabbitmq"]


@pytest.mark.parametrize("name", BROKERS)
def test_tls_protects_every_connection(request, make_shop, certificates, name):
    url, settings = broker(request, name, certificates.authority)
    conf = json.dumps({"broker_use_ssl": settings, "flash_queue": f"tls_{name}"})
    shop = make_shop(SimpleNamespace(url=url), SHOP_CONF=conf)
    shop.replicate()
    seen = shop.database.execute(
        "SELECT ssl, version FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
        "WHERE application_name = 'flash_celery'"
    )
    assert len(seen) == 2
    assert all(encrypted and version.startswith("TLS") for encrypted, version in seen)
    doctor = shop.run("flash", "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert f"ok       broker: {url.partition('//')[0]}//" in doctor.stdout
    assert "broker TLS" not in doctor.stdout
    unverified = {"cert_reqs" if name == "rabbitmq" else "ssl_cert_reqs": ssl.CERT_NONE}
    for careless in (unverified, None):
        doctor = shop.run("flash", "doctor", SHOP_CONF=json.dumps({"broker_use_ssl": careless}))
        warned = "warning  broker TLS: the broker's certificate is not verified" in doctor.stdout
        # By default kombu checks no certificate, and py-amqp asks the system's authorities.
        assert warned or "certificate verify failed" in doctor.stdout
        assert warned or (name, careless) == ("rabbitmq", None)
    shop.worker(queues=f"tls_{name}")
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    (note,) = shop.until_noted(1)
    assert note["new"] == {"id": 1, "name": "a", "note": None}


@pytest.mark.parametrize("name", BROKERS)
@pytest.mark.parametrize("mistake", ["authority", pytest.param("host", marks=pytest.mark.soak)])
def test_tls_broker_with_a_wrong_certificate_gets_nothing(
    request, make_shop, certificates, other, name, mistake
):
    authority = (other if mistake == "authority" else certificates).authority
    url, settings = broker(request, name, authority)
    if mistake == "host":
        url = url.replace("localhost", "127.0.0.1")
        settings |= {"server_hostname": "127.0.0.1"} if name == "rabbitmq" else {}
    conf = json.dumps({"broker_use_ssl": settings, "flash_shutdown_timeout": 0.5})
    shop = make_shop(SimpleNamespace(url=url), SHOP_CONF=conf)
    doctor = shop.run("flash", "doctor")
    (finding,) = [line for line in doctor.stdout.splitlines() if "broker" in line]
    assert "certificate verify failed" in finding
    if mistake == "host":
        return  # and replicate does as with the other one
    replicate = shop.replicate()
    shop.database.execute("INSERT INTO items VALUES (1, 'a')")
    shop.until_said(replicate, "Nothing is acknowledged until it works again")
    assert replicate.log.read_text().count("certificate verify failed") == 1
    assert shop.end(replicate) == 0


WRONG = {
    "authority": ({"sslrootcert": "other"}, "certificate verify failed.*sslrootcert of flash_dsn"),
    "host": ({"host": "127.0.0.1"}, "does not match host name .*correct the host, sslmode"),
    "no authority": ({"sslrootcert": "/nowhere.pem"}, "nowhere.pem"),
    "plain text": ({"sslmode": "disable"}, "pg_hba.conf.*no encryption"),
    "password": ({"password": "wrong"}, "password authentication failed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tls_postgresql_with_a_wrong_certificate_stops_the_start(shop, certificates, other, case):
    change, sentence = WRONG[case]
    given = {"sslrootcert": certificates.authority, **change}
    if given["sslrootcert"] == "other":
        given["sslrootcert"] = other.authority
    server = shop.database.server
    url = f"postgresql://flash:{quote(PASSWORD, safe='')}@localhost/{shop.database.name}"
    wrong = psycopg.conninfo.make_conninfo(
        url, **psycopg.conninfo.conninfo_to_dict(dsn(server, shop.database.name, **given))
    )
    for command in ("replicate", "doctor"):
        ended = shop.run("flash", command, SHOP_DSN=wrong)
        assert ended.returncode == 2, ended.stdout
        assert_refused(ended, sentence)
        assert "s3cret" not in ended.stderr


def test_tls_server_without_tls_gets_no_plain_text(make_shop, database, valkey):
    shop = make_shop(valkey)
    with Postgres() as plain:
        ended = shop.run("flash", "replicate", SHOP_DSN=dsn(plain, sslrootcert="system"))
        assert ended.returncode == 2
        assert_refused(ended, "server does not support SSL, but SSL was required")


def test_pg_hba_record_for_the_database_allows_no_base_backup(database):
    """docs/security.md: REPLICATION alone would let a role copy the cluster."""
    with psycopg.connect(database.dsn, replication="database", autocommit=True) as logical:
        assert logical.execute("IDENTIFY_SYSTEM").fetchone()
    with pytest.raises(psycopg.OperationalError, match="no pg_hba.conf entry for replication"):
        psycopg.connect(database.dsn, replication="true")
