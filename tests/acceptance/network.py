"""Proxies between a shop and its servers."""

import json
import re

import psycopg

from example_project.servers import wait_until

#: Seconds; a silent connection is to be noticed within three of them.
INTERVAL = 2

#: Log lines of the replication worker about a connection that it closes.
GIVEN_UP = {
    # Or the server closed our connection first, and the other one reports it.
    "postgresql": r"PostgreSQL (has been silent|has not answered)|connection to PostgreSQL failed|"
    r"is not read by this worker",
    "broker": r"The broker (.* failed|has taken nothing|confirmed none)",
}


class Network:
    """Proxies before the database and the broker of a shop; the test itself goes past them."""

    def __init__(self, shop, postgresql, broker):
        self.shop = shop
        self.postgresql = postgresql
        self.broker = broker
        shop.environment["SHOP_DSN"] = psycopg.conninfo.make_conninfo(
            shop.database.dsn, port=postgresql.port, sslmode="disable", gssencmode="disable"
        )
        shop.environment["SHOP_BROKER"] = shop.broker.url.replace(
            str(shop.broker.port), str(broker.port)
        )
        shop.environment["SHOP_CONF"] = json.dumps({"flash_status_interval": INTERVAL})


def wait_until_given_up(shop, process, side, since, timeout=60):
    """Wait until a connection is called dead in what was logged since then."""
    try:
        wait_until(
            lambda: re.search(GIVEN_UP[side], process.log.read_text()[since:]),
            f"the connection to {side} to be given up",
            timeout,
        )
    except TimeoutError as error:
        raise AssertionError(f"{error}: {process.log.read_text()}") from None


def is_stream(opening):
    """Picks the replication connection."""
    return b"replication\0" in opening


def is_catalog_query(opening):
    """Picks the connection for the catalog."""
    return not is_stream(opening)
