"""docs/howto/changing-passwords.md: the examples give passwords that PostgreSQL takes."""

import importlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from celery import Celery
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from example_project.servers import Postgres
from flash_celery.postgres.connection import connect
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.settings import Settings
from tests.conftest import missing

from .conftest import Page

PAGE = Page("howto/changing-passwords.md")
#: A token as long as those of Google and Microsoft are, and as awkward as none is.
TOKEN = "ya29.'\"\\ %40/:?&=" + "Ab3-_~" * 400


@pytest.fixture(scope="module")
def strict():
    """A PostgreSQL that asks for passwords, and a database `shop` with its owner."""
    with Postgres() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for statement in (
                "CREATE DATABASE shop",
                "CREATE ROLE shop_owner",
                "CREATE ROLE rds_iam",
                "CREATE ROLE rds_replication",
                'CREATE ROLE "flash@shop-123456.iam" LOGIN',
                'CREATE ROLE "flash-identity" LOGIN',
                *PAGE.statements("rds"),
                *PAGE.statements("cloudsql"),
                *PAGE.statements("azure"),
                "ALTER ROLE flash REPLICATION",  # which rds_replication is there
            ):
                connection.execute(statement)
        hba = server.data / "pg_hba.conf"
        hba.write_text("host all postgres all trust\nhost all all all scram-sha-256\n")
        server.stop()
        server.start()
        yield server


class TokenServer:
    """Stands in for the servers of Google and Microsoft that give tokens."""

    def __init__(self):
        self.requests = []
        self.tokens = [TOKEN, "second"]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length", 0))
                outer.requests.append((self.path, self.rfile.read(length).decode()))
                answer = {
                    "access_token": outer.tokens.pop(0),
                    "token_type": "Bearer",
                    "expires_in": 3600,
                    "expires_on": "4102444800",
                }
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_): ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/token"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def tokens():
    server = TokenServer()
    yield server
    server.close()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Imports the file of an example as the module that the page names."""

    def load(name):
        package = tmp_path / "credentials"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / name).write_text(PAGE.files[name])
        monkeypatch.syspath_prepend(tmp_path)
        return f"credentials.{name.removesuffix('.py')}.dsn"

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] == "credentials"]:
        del sys.modules[name]


def library(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return missing(name)


def log_in(server, path):
    """Open both connections with the DSN of an example, whose password is made the role's."""

    given = conninfo_to_dict(Settings(flash_dsn=path).require_dsn())
    here = {"host": "127.0.0.1", "port": server.port, "sslmode": "prefer"}
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        change = sql.SQL("ALTER ROLE {} PASSWORD {}").format(
            sql.Identifier(given["user"]), sql.Literal(given["password"])
        )
        connection.execute(change)
    dsn = make_conninfo("", **{**given, **here, "sslrootcert": ""})
    with connect(dsn) as connection:
        row = connection.execute("SELECT session_user, current_database()").fetchone()
        assert row == (given["user"], "shop")
    ReplicationConnection(dsn).close()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(make_conninfo(dsn, password="other"))
    return given


def test_changing_passwords_page_examples_are_run():
    assert set(PAGE.files) == {
        "rds.py",
        "cloudsql.py",
        "azure_entra.py",
        "vault.py",
        "kubernetes.py",
    }
    assert set(PAGE.blocks) == {"rds", "cloudsql", "azure"}


def test_changing_passwords_page_rds_token_logs_in(strict, example, monkeypatch):
    library("boto3")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a/secret+key")
    given = log_in(strict, example("rds.py"))
    assert given["host"].endswith(".eu-west-1.rds.amazonaws.com")
    assert given["sslmode"] == "verify-full"
    token = urlsplit(f"https://{given['password']}")
    asked = parse_qs(token.query)
    assert token.netloc == f"{given['host']}:5432"
    assert asked["Action"] == ["connect"]
    assert asked["DBUser"] == ["flash"]
    assert asked["X-Amz-Expires"] == ["900"], "the page says 15 minutes"
    assert asked["X-Amz-Signature"]


def test_changing_passwords_page_google_token_logs_in(
    strict, example, tokens, tmp_path, monkeypatch
):
    library("google.auth")
    account = {
        "type": "service_account",
        "project_id": "shop-123456",
        "private_key_id": "1",
        "private_key": private_key(),
        "client_email": "flash@shop-123456.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": tokens.url,
    }
    file = tmp_path / "account.json"
    file.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    path = example("cloudsql.py")
    given = log_in(strict, path)
    assert given["password"] == TOKEN
    ((_, body),) = tokens.requests
    assert parse_qs(body)["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
    assert conninfo_to_dict(Settings(flash_dsn=path).require_dsn())["password"] == "second"


def private_key():
    serialization = library("cryptography.hazmat.primitives.serialization")
    rsa = library("cryptography.hazmat.primitives.asymmetric.rsa")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def test_changing_passwords_page_azure_token_logs_in(strict, example, tokens, monkeypatch):
    library("azure.identity")
    # As App Service gives a managed identity to a program.
    monkeypatch.setenv("IDENTITY_ENDPOINT", tokens.url)
    monkeypatch.setenv("IDENTITY_HEADER", "header")
    path = example("azure_entra.py")
    given = log_in(strict, path)
    assert given["password"] == TOKEN
    assert given["host"].endswith(".postgres.database.azure.com")
    ((asked, _),) = tokens.requests
    resource = parse_qs(urlsplit(asked).query)["resource"]
    assert resource == ["https://ossrdbms-aad.database.windows.net"]
    Settings(flash_dsn=path).require_dsn()
    assert len(tokens.requests) == 1, "the page says that the credential keeps the token"


def settings_of(name):
    app = Celery("shop", set_as_current=False)
    exec(compile(PAGE.files[name], name, "exec"), {"app": app})
    settings = Settings.from_app(app)
    app.close()
    return settings


def test_changing_passwords_page_vault_command_gives_the_password(tmp_path, monkeypatch):
    vault = tmp_path / "vault"
    expected = "read -field=password database/static-creds/flash"
    vault.write_text(f'#!/bin/sh\n[ "$*" = "{expected}" ] || exit 9\nprintf %s "$VAULT_TOKEN"\n')
    vault.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("VAULT_TOKEN", "of the environment")
    password = conninfo_to_dict(settings_of("vault.py").require_dsn())["password"]
    assert password == "of the environment"


def test_changing_passwords_page_kubernetes_secret_is_read_again(tmp_path):
    """Kubernetes mounts each version in a folder of its own, and moves a link to the newest."""
    settings = settings_of("kubernetes.py")
    program, file = settings.flash_password_command
    assert (program, file) == ("cat", "/etc/flash/password")
    here = Settings(
        flash_dsn=settings.flash_dsn, flash_password_command=["cat", str(tmp_path / "password")]
    )
    (tmp_path / "password").symlink_to("..data/password")
    for version in ("first", "second"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "password").write_text(version)
        (tmp_path / "..new").symlink_to(version)
        (tmp_path / "..new").rename(tmp_path / "..data")
        assert conninfo_to_dict(here.require_dsn())["password"] == version


def test_changing_passwords_page_pgpass_needs_its_mode(strict, tmp_path):
    (line,) = [line for line in PAGE.text.splitlines() if "passfile=/etc" in line]
    file = tmp_path / "pgpass"
    file.write_text("*:*:*:flash:the password\n")
    with psycopg.connect(strict.dsn(), autocommit=True) as connection:
        connection.execute("ALTER ROLE flash PASSWORD 'the password'")
    dsn = make_conninfo(line.strip(), host="127.0.0.1", port=strict.port, passfile=str(file))
    file.chmod(0o600)
    connect(dsn).close()
    file.chmod(0o644)
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(dsn)
