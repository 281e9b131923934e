"""docs/howto/fastapi.md, followed: requests become receipts."""

import httpx
import psycopg
import pytest

from example_project.servers import free_port, wait_until

from .conftest import Page

PAGE = Page("howto/fastapi.md")


@pytest.mark.soak  # three processes
def test_fastapi_page_requests_become_receipts(database, valkey, reader):
    port = free_port()
    reader.environment |= {"DSN": database.dsn, "BROKER": valkey.url}
    reader.write(PAGE)
    worker, replicate, api = PAGE.lines("start")
    api = reader.start(f"{api} --port {port}")
    reader.until_said(api, "Application startup complete")
    worker = reader.start(worker)
    replicate = reader.start(replicate)
    reader.until_said(worker, "ready.")
    reader.until_said(replicate, "Replicating the slot")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        first, second = (client.post("/orders", params={"total": 99.9}).json()["id"] for _ in "12")
        assert client.post(f"/orders/{first}/pay").status_code == 200
        assert client.post("/orders/99/pay").status_code == 404
    reader.until_said(worker, f"receipt for order {first}: 99.90")
    with psycopg.connect(database.dsn) as connection:
        connection.execute("UPDATE orders SET status = 'paid'")
    reader.until_said(worker, f"receipt for order {second}: 99.90")
    assert worker.log.read_text().count("receipt for order") == 2
    replicate.terminate()
    wait_until(lambda: replicate.poll() is not None, "the replication worker to end")
