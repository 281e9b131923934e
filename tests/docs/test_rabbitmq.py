"""docs/howto/rabbitmq.md, with the rights it gives and no more."""

import re
import shlex

import pytest

from example_project.servers import wait_until

from .conftest import Page

PAGE = Page("howto/rabbitmq.md")
USERS = ("flash_replicate", "shop_worker", "flash_oncall")


@pytest.fixture
def control(rabbit):
    """Runs the page's `rabbitmqctl` lines."""

    def run(name):
        for line in PAGE.lines(name):
            program, *arguments = shlex.split(line)
            assert program == "rabbitmqctl"
            rabbit.control(*arguments)

    yield run
    rabbit.control("delete_vhost", "shop")
    for user in USERS:
        rabbit.control("delete_user", user)


def passwords():
    return dict(re.findall(r"add_user (\w+) '(.+)'", PAGE.blocks["users"]))


@pytest.mark.soak  # each rabbitmqctl takes seconds
def test_rabbitmq_page_permissions_suffice(control, rabbit, database, reader):
    for name in ("users", "policy", "worker", "oncall"):
        control(name)
    rabbit.control("set_permissions", "-p", "shop", "flash_replicate", "^$", "^$", "^$")
    reader.write(PAGE)
    reader.environment["DSN"] = database.dsn
    database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")

    def as_user(name):
        password = passwords()[name].replace(" ", "%20")
        url = f"amqp://{name}:{password}@127.0.0.1:{rabbit.port}/shop"
        reader.environment["BROKER"] = url

    start_worker, start_replicate = PAGE.lines("start")
    as_user("flash_replicate")
    replicate = reader.start(start_replicate)
    reader.until_said(replicate, "failed: Exchange.declare: (403) ACCESS_REFUSED")
    control("replicate")
    as_user("shop_worker")
    worker = reader.start(start_worker)
    reader.until_said(worker, "ready.")
    database.execute("INSERT INTO orders VALUES (1, 'open'), (2, 'busy')")
    reader.until_said(worker, "order 1 is open")
    reader.until_said(worker, "is a dead letter now")
    assert worker.log.read_text().count("order 2 is busy") == 2
    assert "Exchange flash is a direct exchange" not in worker.log.read_text()
    as_user("flash_replicate")
    refused = reader.run("celery -A shop flash dead list")
    assert "ACCESS_REFUSED" in refused.stderr
    as_user("flash_oncall")
    listed = reader.run("celery -A shop flash dead list")
    assert "order_changed" in listed.stdout, listed.stderr
    status = reader.run("celery -A shop flash status")
    assert "no Celery worker answers" not in status.stdout
    retried = reader.run("celery -A shop flash dead retry --all")
    assert retried.returncode == 0, retried.stderr
    dead = "is a dead letter now"
    wait_until(lambda: worker.log.read_text().count(dead) == 2, "it to fail once more")
    assert worker.log.read_text().count("order 2 is busy") == 4
    kinds = rabbit.control("list_queues", "-p", "shop", "--no-table-headers", "name", "type")
    kinds = dict(line.split() for line in kinds.splitlines())
    assert kinds["flash"] == kinds["flash.dead"] == "quorum"
    for child in (replicate, worker):
        child.terminate()
        child.wait(30)
    log = reader.run("celery -A shop flash reset --yes")
    assert log.returncode == 0, log.stderr
