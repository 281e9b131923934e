"""Receivers of signals, in the replication worker: nothing of theirs stops a message."""

import pytest
from celery import signals
from kombu import Queue

from flash_celery.messages.task_message import Form, Message
from flash_celery.publishing.brokers import for_app
from flash_celery.publishing.signals import announce


class Leaving:
    """A value whose own code exits."""

    def __json__(self):
        raise SystemExit(1)

    def __repr__(self):
        raise SystemExit(1)


HEADERS = {"task": "shop.handle", "lang": "py", "timelimit": [None, None]}


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_properties_of_a_receiver_that_cannot_be_sent_are_left_out(request, app, caplog, broker):
    """However the value fails; what is right of the receiver stays, in this message only."""
    server = request.getfixturevalue("valkey" if broker == "redis" else "rabbit")
    app.conf.broker_url = server.url
    publisher = for_app(app)

    def receiver(headers, properties, **more):
        headers["tenant"] = "x"
        headers["leaving"] = Leaving()
        headers[Leaving()] = 1
        headers["timelimit"].append(object())
        properties["priority"] = object()
        properties["correlation_id"] = Leaving()
        properties["reply_to"] = "answers"

    signals.before_task_publish.connect(receiver)
    form = Form("attacked", "shop.handle", HEADERS, {"delivery_mode": 2})
    try:
        publisher.open([Queue("attacked", routing_key="attacked")])
        before = publisher.depth("attacked")
        for number in (1, 2):
            message = Message(form, f"id-{number}", "", "[[], {}, {}]")
            (announced,) = announce([message], publisher.encodes)
            publisher.publish([message])
            announced.end(published=True)
            assert message.headers["tenant"] == "x"
            assert message.headers["timelimit"] == [None, None]
            assert message.properties["reply_to"] == "answers"
            assert message.properties["correlation_id"] == message.id
            assert "priority" not in message.properties
        assert publisher.depth("attacked") == before + 2
    finally:
        signals.before_task_publish.disconnect(receiver)
        publisher.close()
    assert form.headers == HEADERS
    assert "has set leaving, which cannot be sent" in caplog.text
