"""Nothing is lost and nothing stalls in silence when the network misbehaves."""

import json
import re
import time
from functools import partial

import pytest

from example_project.servers import wait_until
from tests.acceptance.network import (
    GIVEN_UP,
    INTERVAL,
    Network,
    is_catalog_query,
    is_stream,
    wait_until_given_up,
)
from tests.acceptance.steps import insert_rows, wait_until_confirmed
from tests.acceptance.writer import Writer, assert_writes_handled
from tests.proxy import Proxy, Way


@pytest.fixture
def redis_network(shop):
    with Proxy(shop.database.server.port) as postgresql, Proxy(shop.broker.port) as broker:
        yield Network(shop, postgresql, broker)


@pytest.fixture
def rabbit_network(make_shop, rabbit):
    rabbit.empty()
    shop = make_shop(rabbit)
    with Proxy(shop.database.server.port) as postgresql, Proxy(shop.broker.port) as broker:
        yield Network(shop, postgresql, broker)


@pytest.fixture(params=["redis", pytest.param("rabbit", marks=pytest.mark.soak)])
def network(request):
    return request.getfixturevalue(f"{request.param}_network")


def goes_on(network, writer):
    """Wait until a change that is written from now on is with the broker."""
    written = len(writer.changes)
    wait_until(lambda: len(writer.changes) > written, "the application to write")
    wait_until_confirmed(network.shop)


#: Directions that are stalled while both connections stay open.
WAYS = pytest.mark.parametrize(
    "ways",
    [
        [Way.BOTH],
        pytest.param([Way.TO_CLIENT, Way.TO_SERVER, Way.BOTH] * 3, marks=pytest.mark.soak),
    ],
    ids=["once", "again"],
)


@WAYS
def test_bad_network_to_postgresql_loses_nothing(redis_network, ways):
    cuts_stalls_delays_and_throttles(redis_network, "postgresql", ways)


@WAYS
def test_bad_network_to_the_broker_loses_nothing(network, ways):
    cuts_stalls_delays_and_throttles(network, "broker", ways)


def cuts_stalls_delays_and_throttles(network, side, ways):
    shop, proxy = network.shop, getattr(network, side)
    replicate = shop.replicate()
    with Writer(shop.database, pause=0.1) as writer:
        goes_on(network, writer)
        half_closes = (partial(proxy.half_close, way) for way in (Way.TO_CLIENT, Way.TO_SERVER))
        for fault in (proxy.cut, *half_closes):
            fault()
            goes_on(network, writer)
        for way in ways:
            log_length = len(replicate.log.read_text())
            proxy.stall(way)
            wait_until_given_up(shop, replicate, side, log_length)
            proxy.heal()
            goes_on(network, writer)
        log_length = len(replicate.log.read_text())
        proxy.delay(0.2)
        goes_on(network, writer)
        proxy.heal()
        proxy.throttle(20_000)
        goes_on(network, writer)
        # Slow is not dead.
        assert not re.search(GIVEN_UP[side], replicate.log.read_text()[log_length:])
        proxy.heal()
        proxy.refuse()
        proxy.cut()
        time.sleep(1)
        proxy.heal()
        goes_on(network, writer)
    wait_until_confirmed(shop)
    shop.worker()
    assert_writes_handled(shop, writer)
    assert shop.end(replicate) == 0


@pytest.mark.soak
@pytest.mark.parametrize("picked", [is_stream, is_catalog_query], ids=["stream", "catalog"])
def test_silent_connection_to_postgresql_is_replaced(redis_network, picked):
    """Also while the server believes in it and keeps the slot for it."""
    shop, proxy = redis_network.shop, redis_network.postgresql
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 10)
    wait_until_confirmed(shop)
    log_length = len(replicate.log.read_text())
    started = time.monotonic()
    proxy.stall(only=picked, new=False)
    insert_rows(shop.database, 11, 20)
    wait_until_given_up(shop, replicate, "postgresql", log_length)
    noticed = time.monotonic() - started
    wait_until(
        lambda: "Replicating the slot" in replicate.log.read_text()[log_length:],
        "another connection",
    )
    replaced = time.monotonic() - started
    # Three intervals, and as much again for a machine that is busy.
    assert noticed < 6 * INTERVAL
    assert replaced < 12 * INTERVAL
    wait_until_confirmed(shop)
    shop.worker()
    shop.until_noted(20)
    assert shop.end(replicate) == 0


@pytest.mark.soak
def test_silent_connection_to_an_idle_broker_is_replaced(network):
    """Nothing is published, and yet it is noticed: the next change does not wait for it."""
    shop, proxy = network.shop, network.broker
    replicate = shop.replicate()
    insert_rows(shop.database, 1, 10)
    wait_until_confirmed(shop)
    log_length = len(replicate.log.read_text())
    started = time.monotonic()
    proxy.stall(new=False)
    wait_until_given_up(shop, replicate, "broker", log_length)
    assert time.monotonic() - started < 6 * INTERVAL
    shop.until_said(replicate, "The broker confirms messages again")
    insert_rows(shop.database, 11, 20)
    wait_until_confirmed(shop)
    shop.worker()
    shop.until_noted(20)
    assert shop.end(replicate) == 0


@pytest.mark.soak
def test_slow_network_to_redis_carries_a_large_transaction(redis_network):
    """It takes longer than a broker may be silent, and is no silence; nothing is sent twice."""
    shop, proxy = redis_network.shop, redis_network.broker
    shop.environment["SHOP_BATCH"] = "only"
    shop.environment["SHOP_CONF"] = json.dumps({"flash_status_interval": 1})
    replicate = shop.replicate()
    proxy.throttle(400_000)
    rows = "INSERT INTO items SELECT n, repeat('x', 300) FROM generate_series(1, 5000) AS n"
    shop.database.execute(rows)
    wait_until_confirmed(shop)
    assert not re.search(GIVEN_UP["broker"], replicate.log.read_text())
    proxy.heal()
    shop.worker(queues="batches")
    assert len(shop.until_noted(5000, "many")) == 5000
    assert shop.end(replicate) == 0


@pytest.mark.soak
def test_server_busy_with_other_tables_is_not_taken_for_dead(shop):
    """It answers nothing for seconds then, each time it would be read again from the beginning."""
    shop.environment["SHOP_CONF"] = json.dumps({"flash_status_interval": 0.5})
    shop.database.execute("CREATE TABLE other (id int, note text)")
    replicate = shop.replicate()
    shop.database.execute(
        "INSERT INTO other SELECT n, repeat('x', 50) FROM generate_series(1, 5000000) AS n"
    )
    insert_rows(shop.database, 1, 10)
    wait_until_confirmed(shop)
    assert "reconnecting" not in replicate.log.read_text()
    assert shop.end(replicate) == 0
