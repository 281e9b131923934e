"""Both connections to a server that says nothing any more."""

import time
from contextlib import closing

import psycopg
import pytest

from flash_celery.errors import ReplicationError
from flash_celery.postgres.connection import connect
from flash_celery.postgres.stream import ReplicationConnection
from flash_celery.worker.session import Session
from tests.proxy import Proxy


def test_connection_command_without_an_answer_times_out(database):
    with Proxy(database.server.port) as proxy:
        dsn = database.dsn.replace(str(database.server.port), str(proxy.port)) + "?sslmode=disable"
        with closing(ReplicationConnection(dsn, patience=0.5)) as stream:
            proxy.stall()
            with pytest.raises(ReplicationError, match="has not answered a command"):
                stream.identify()
        proxy.heal()
        with connect(dsn, 0.5) as connection:
            proxy.stall()
            with pytest.raises(psycopg.OperationalError, match="has not been answered"):
                connection.execute("SELECT 1")
            assert connection.closed


def test_connection_uses_the_shorter_timeout_for_the_slot(database):
    for dsn, patience, agreed in (
        (database.dsn, 10.0, 10.0),
        (database.dsn + "?options=-c%20wal_sender_timeout%3D3s", 10.0, 3.0),
        (database.dsn + "?options=-c%20wal_sender_timeout%3D0", 10.0, 10.0),
    ):
        with closing(ReplicationConnection(dsn, patience=patience)) as stream:
            stream.start_session()
            assert stream.timeout == agreed


def test_time_for_which_the_worker_stands_still_is_no_silence_of_the_server(
    flash, monkeypatch, caplog
):
    work, standstills = Session._work, [1.5]

    def work_after_a_standstill(session):
        if standstills:
            time.sleep(standstills.pop())
        return work(session)

    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items").start(flash_status_interval=0.3)
    monkeypatch.setattr(Session, "_work", work_after_a_standstill)
    flash.wait(lambda: not standstills)
    flash.do("INSERT INTO items VALUES (1)")
    assert "silent" not in caplog.text
