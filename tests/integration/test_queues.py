"""The queues of handlers on RabbitMQ: what `doctor` says of them, and of which type they are."""

import amqp
import pytest
from kombu import Queue
from kombu.common import Broadcast

from flash_celery import on_change
from flash_celery.commands import broker_checks, doctor
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.publishing import declared_queues
from flash_celery.publishing.brokers import for_app
from flash_celery.publishing.hold_queues import hold_queues
from flash_celery.settings import Settings

OWN = ["flash.dead", "flash.paused.shop.handle"]
QUORUM = {"task_default_queue_type": "quorum"}
MISSING_TOO = {**QUORUM, "task_create_missing_queue_type": "quorum"}
DECLARED = {
    **QUORUM,
    "task_queues": [Queue("flash", queue_arguments={"x-queue-type": "quorum"})],
}


@pytest.fixture
def project(new_app, rabbit):
    """Makes the app of a project with one handler."""
    rabbit.empty()

    def make(**conf):
        app = new_app(broker_url=rabbit.url, **conf)

        @on_change("items")
        @app.task(name="shop.handle", shared=False)
        def handle(change):
            """Nothing."""

        return app

    return make


def examine(app):
    """What `doctor` finds of the queues."""
    settings = Settings.from_app(app)
    names, routed = broker_checks.route_finding(app, settings, subscriptions_of(app))
    all_findings = [routed, *broker_checks.findings(app, settings, names, OWN)]
    return [
        doctor.as_text(finding) for finding in all_findings if finding.subject.startswith("queue")
    ]


def declare(app, name="shop.handle"):
    """Declare what `replicate` does, with one handler paused."""
    publisher = for_app(app)
    held = hold_queues(app, "", [name], {}).queues
    publisher.open([app.amqp.queues["flash"], declared_queues.queue(app, "flash.dead"), *held])
    publisher.close()


def kinds(rabbit):
    listed = rabbit.control("list_queues", "--no-table-headers", "name", "type")
    return dict(line.split() for line in listed.splitlines())


def test_queue_type_of_handlers_is_not_the_default_type(project, rabbit):
    app = project(**QUORUM)
    queues, warned = examine(app)
    assert queues == "ok       queues: flash"
    assert warned.startswith(
        "warning  queue type: classic: flash; task_default_queue_type applies to"
    )
    declare(app)
    others = {"flash.dead": "quorum", "flash.paused.shop.handle": "quorum"}
    assert kinds(rabbit) == {"flash": "classic", **others}


@pytest.mark.parametrize("conf", [MISSING_TOO, DECLARED], ids=["missing", "declared"])
def test_queue_type_advice_of_the_warning_makes_quorum_queues(project, rabbit, conf):
    app = project(**conf)
    assert examine(app) == ["ok       queues: flash"]
    declare(app)
    assert set(kinds(rabbit).values()) == {"quorum"}
    assert examine(app) == ["ok       queues: flash"]


def test_queue_type_of_missing_queues_applies_to_dead_letters(project, rabbit):
    app = project(task_create_missing_queue_type="quorum")
    declare(app)
    assert set(kinds(rabbit).values()) == {"quorum"}


def test_queue_with_other_arguments_is_named(project):
    declare(project())
    _, other = examine(project(**MISSING_TOO))
    assert other.startswith("warning  queue: flash exists with other arguments")
    assert "inequivalent arg 'x-queue-type' for queue 'flash'" in other
    assert examine(project()) == ["ok       queues: flash"]


@pytest.mark.parametrize("limit", [5, 0, 100])
def test_queue_with_a_low_delivery_limit_is_named(project, limit):
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": limit}
    app = project(**QUORUM, task_queues=[Queue("flash", queue_arguments=arguments)])
    _, *warned = examine(app)
    if limit == 100:
        assert warned == []
    else:
        dropped = "workers have received 5 times" if limit else "comes back from a worker that was"
        (line,) = warned
        assert line.startswith(
            f"warning  queue: flash has x-delivery-limit={limit}: RabbitMQ drops"
        )
        assert dropped in line


def test_queue_that_does_not_keep_changes_stops_the_start(project):
    (stopped,) = examine(project(task_queues=[Broadcast("flash")]))
    assert stopped.startswith("STOP     queues: shop.handle goes to the queue 'flash', which does")


LOSSY = {
    "message_ttl": {"arguments": {"x-message-ttl": 60_000}},
    "expires": {"arguments": {"x-expires": 60_000, "x-queue-type": "quorum"}},
    "max_length": {"arguments": {"x-max-length": 5, "x-max-priority": 3}},
    "stream": {"arguments": {"x-queue-type": "stream"}},
    "auto_delete": {"auto_delete": True, "arguments": {"x-single-active-consumer": True}},
    "exclusive": {"exclusive": True, "durable": False},
    "durable=False": {"durable": False},
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("option", LOSSY)
def test_queue_of_dead_letters_or_held_messages_that_loses_them_is_named(
    project, rabbit, option, name
):
    with amqp.Connection(host=f"127.0.0.1:{rabbit.port}") as other:
        options = {"durable": True, "auto_delete": False, **LOSSY[option]}
        other.channel().queue_declare(name, **options)
        _, warned = examine(project())
        assert warned.startswith(f"warning  queue: {name} exists and does not keep what is in it")
        assert f"{option})" in warned


def test_queue_of_dead_letters_with_other_arguments_that_keeps_them_is_right(project, rabbit):
    arguments = {
        "x-queue-type": "quorum",
        "x-max-length": 1000,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "elsewhere",
        "x-delivery-limit": 1_000_000,
    }
    with amqp.Connection(host=f"127.0.0.1:{rabbit.port}") as other:
        other.channel().queue_declare("flash.dead", durable=True, auto_delete=False,
                                      arguments=arguments)  # fmt: skip
    assert examine(project()) == ["ok       queues: flash"]


@pytest.mark.parametrize("name", OWN)
def test_queue_of_dead_letters_or_held_messages_in_task_queues_must_keep_them(project, name):
    (stopped,) = examine(project(task_queues=[Queue("flash"), Queue(name, message_ttl=60)]))
    assert stopped.startswith(
        f"STOP     queues: task_queues has '{name}', which is for dead letters"
    )
    kept = project(task_queues=[Queue("flash"), Queue(name, routing_key=name)])
    assert examine(kept) == ["ok       queues: flash"]


def test_queue_that_belongs_to_another_connection_is_named(project, rabbit):
    with amqp.Connection(host=f"127.0.0.1:{rabbit.port}") as other:
        other.channel().queue_declare("flash", exclusive=True, durable=False)
        _, warned = examine(project())
        assert "RESOURCE_LOCKED" in warned


def test_queue_that_a_restart_loses_is_named(project):
    _, warned = examine(project(task_queues=[Queue("flash", durable=False)]))
    assert warned.startswith("warning  queue: flash does not survive a restart of RabbitMQ")


def test_queue_that_refuses_messages_drops_none(project):
    arguments = {"x-overflow": "reject-publish", "x-max-length": 9}
    app = project(task_queues=[Queue("flash", queue_arguments=arguments)])
    assert examine(app) == ["ok       queues: flash"]


def test_queue_that_no_worker_can_declare_stops_the_start(project):
    app = project(task_create_missing_queues=False)
    (stopped,) = examine(app)
    assert stopped.startswith(
        "STOP     queues: shop.handle goes to the queue 'flash', which is not"
    )
