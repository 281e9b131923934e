"""`flash_dsn` from DATABASES."""

import functools
import os
from pathlib import Path

import psycopg
import pytest
from django.db import connections
from psycopg.conninfo import conninfo_to_dict

from flash_celery.django.dsn import dsn as dsn_of
from flash_celery.settings import Settings

from .conftest import use


@pytest.fixture
def default(configured, database):
    def make(**options):
        use(database, **options)
        return database

    yield make
    use(None)


def test_dsn_is_that_of_the_default_database(default, app):
    database = default()
    with psycopg.connect(Settings.from_app(app).require_dsn()) as connection:
        assert connection.info.dbname == database.name


def test_dsn_setting_wins_over_databases(default, app):
    default()
    app.conf.flash_dsn = "dbname=other"
    assert Settings.from_app(app).require_dsn() == "dbname=other"


def test_dsn_takes_options_of_libpq_only(default, app):
    default(
        PASSWORD="it's a \\ secret",
        OPTIONS={
            "sslmode": "prefer",
            "sslrootcert": Path("/etc/ca.pem"),
            "connect_timeout": 5,
            "options": "-c search_path=sales,public",
            "isolation_level": psycopg.IsolationLevel.SERIALIZABLE,
            "server_side_binding": True,
            "prepare_threshold": 3,
        },
    )
    parameters = conninfo_to_dict(Settings.from_app(app).require_dsn())
    assert parameters.pop("dbname").startswith("test_")
    assert parameters.pop("port")
    assert parameters.pop("client_encoding") == "UTF8"
    assert str(parameters.pop("connect_timeout")) == "5"
    assert parameters == {
        "user": "postgres",
        "host": "127.0.0.1",
        "password": "it's a \\ secret",
        "sslmode": "prefer",
        "sslrootcert": "/etc/ca.pem",
        "options": "-c search_path=sales,public",
    }


def test_dsn_can_be_a_service(default, app, tmp_path, monkeypatch):
    database = default(NAME="", USER="", HOST="", PORT="", OPTIONS={"service": "shop"})
    file = tmp_path / "services"
    file.write_text(
        f"[shop]\nhost=127.0.0.1\nport={database.server.port}\nuser=postgres\n"
        f"dbname={database.name}\n"
    )
    monkeypatch.setitem(os.environ, "PGSERVICEFILE", str(file))
    with psycopg.connect(Settings.from_app(app).require_dsn()) as connection:
        assert connection.info.dbname == database.name


def test_dsn_is_the_test_database_under_the_test_runner(default, app):
    database = default(TEST={"NAME": f"{os.getpid()}_of_the_runner"})
    connection = connections["default"]
    connection.creation.create_test_db(verbosity=0, autoclobber=True)
    try:
        dbname = conninfo_to_dict(Settings.from_app(app).require_dsn())["dbname"]
        assert dbname == f"{os.getpid()}_of_the_runner"
    finally:
        connection.creation.destroy_test_db(database.name, verbosity=0)
    assert conninfo_to_dict(Settings.from_app(app).require_dsn())["dbname"] == database.name


def test_dsn_of_databases_is_read_at_every_connect(default, app):
    default(ENGINE="bookshop.tokens", PASSWORD="old")
    settings = Settings.from_app(app)
    passwords = [conninfo_to_dict(settings.require_dsn())["password"] for _ in "12"]
    numbers = [int(password.removeprefix("token ")) for password in passwords]
    assert numbers[1] == numbers[0] + 1


def test_dsn_of_another_database_of_django_can_be_a_callable(default, app):
    name = default().name
    app.conf.flash_sources = {"billing": {"dsn": functools.partial(dsn_of, "default")}}
    settings = Settings.from_app(app).of_source("billing")
    assert conninfo_to_dict(settings.require_dsn())["dbname"] == name


def test_dsn_can_be_a_dotted_path_in_the_settings_of_django(default, app):
    name = default().name
    app.conf.flash_dsn = "flash_celery.django.dsn.dsn"
    assert conninfo_to_dict(Settings.from_app(app).require_dsn())["dbname"] == name


def test_dsn_of_a_named_source_is_unchanged(default, app):
    default()
    app.conf.flash_sources = {"billing": {"dsn": "dbname=billing"}}
    settings = Settings.from_app(app)
    assert settings.of_source("billing").require_dsn() == "dbname=billing"
    assert "dbname=test_" in settings.require_dsn()
