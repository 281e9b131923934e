"""The queues of handlers on RabbitMQ: what `doctor` says of them, and of which type they are."""

import pytest
from kombu import Queue
from kombu.common import Broadcast

from flash_celery import on_change
from flash_celery.commands import broker_checks, doctor
from flash_celery.handlers import decorators
from flash_celery.publishing import declared_queues
from flash_celery.publishing.brokers import for_app
from flash_celery.publishing.hold_queues import hold_queues
from flash_celery.settings import Settings

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
    names, routed = broker_checks.route_finding(app, settings, decorators.subscriptions_of(app))
    all_findings = [routed, *broker_checks.findings(app, settings, names)]
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


def test_queue_that_does_not_keep_changes_stops_the_start(project):
    (stopped,) = examine(project(task_queues=[Broadcast("flash")]))
    assert stopped.startswith("STOP     queues: shop.handle goes to the queue 'flash', which does")


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
