"""`flash dead` on kombu's broker in memory."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from kombu.transport.memory import Channel

from flash_celery import on_change
from flash_celery.changes.change import Changes
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.payload import change_of, encode
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.cli import flash
from flash_celery.dead_letters import letters
from flash_celery.dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row
from flash_celery.publishing import declared_queues
from flash_celery.publishing.brokers.kombu import KombuPublisher

COLUMNS = Column("id", 20, "int8", identity=True), Column("name", 25, "text", identity=False)
TABLE = Table("public", "items", None, "d", ("id",), COLUMNS)


def delivery(number, name=b"x"):
    row = encode_row("I", 0, None, None, [b"%d" % number, name])
    return Delivery(TABLE, Transaction(Lsn(16), 1, 0), number, 0, 0, [row])


ONE = (delivery(1),)


@pytest.fixture
def app(new_app):
    Channel.queues.clear()
    app = new_app(broker_url="memory://")

    @on_change("items")
    @app.task(name="shop.handle")
    def handle(change): ...

    yield app
    Channel.queues.clear()


@pytest.fixture
def box(app):
    return DeadLetterQueue(app, "flash.dead")


@pytest.fixture
def bury(app):
    """Puts letters into the queue."""

    def bury(id, deliveries=ONE, task="shop.handle", **changed):
        kind = "change" if len(deliveries) == 1 else "changes"
        value = f'{{"__type__":"flash_celery.{kind}","__value__":{encode(deliveries)}}}'
        message = SimpleNamespace(
            headers={"id": id, "task": task, "root_id": id},
            properties={},
            body=f'[[{value}],{{}},{{"callbacks":null}}]',
            content_type="application/json",
            content_encoding="utf-8",
        )
        changes = [change_of(one) for one in deliveries]
        arguments = changes if kind == "change" else [Changes(changes)]
        written = letters.from_message(
            message,
            "flash",
            error="ValueError",
            text="no",
            traceback="Traceback …",
            arguments=arguments,
        )
        letter = replace(written, **changed)
        publisher = KombuPublisher(app)
        publisher.open([declared_queues.queue(app, "flash.dead")])
        publisher.publish([letters.encode(app, letter, "flash.dead")])
        publisher.close()
        return letter

    return bury


@pytest.fixture
def run(app):
    def run(*arguments, answer=None):
        context = SimpleNamespace(app=app)
        return CliRunner().invoke(flash, ["dead", *arguments], obj=context, input=answer)

    return run


def ids(box, **filters):
    return [letter.id for letter in box.find(DeadLetterFilter.parse(**filters))]


def sent(app):
    with app.connection() as connection:
        queue = app.amqp.queues["flash"](connection.default_channel)
        queue.declare()
        while message := queue.get(no_ack=True):
            yield message


def test_dead_list_filters_and_keeps_the_order(box, bury):
    bury("a1", handler="shop.other.handle")
    bury("b2", tables=["sales.orders"])
    bury("c3", failed_at="2020-01-01T00:00:00.000+00:00")
    assert ids(box) == ["c3", "a1", "b2"]
    assert ids(box, handler="handle") == ["c3", "a1", "b2"]
    assert ids(box, handler="shop.handle") == ["c3", "b2"]
    assert ids(box, table="items") == ["c3", "a1"]
    assert ids(box, table="sales.orders") == ["b2"]
    assert ids(box, older="1d") == ["c3"]
    assert ids(box, newer="15m") == ["a1", "b2"]
    assert ids(box, newer="90") == ["a1", "b2"]
    assert box.count() == 3


def test_dead_commands_list_show_retry_and_drop(app, box, bury, run):
    assert run("list").output == "no dead letters\n"
    assert json.loads(run("list", "--json").output) == []
    bury("0123456789")
    bury("0123456789-0", message="two\nlines")
    bury("abcdefghij", (delivery(1), delivery(2, b"\xff"), delivery(3)))
    heading, _, second, third = run("list").output.splitlines()
    assert heading.split() == ["id", "age", "handler", "change", "error"]
    assert "insert public.items id=1 @0/10 " in second
    assert second.endswith("  ValueError: two")
    assert third.startswith("abcdefgh ")
    assert "3 changes from insert public.items id=1" in third
    (listed,) = json.loads(run("list", "--json", "--table", "items").output)[-1:]
    assert listed["changes"] == ["0/10:1", "0/10:2", "0/10:3"]
    assert "body" not in listed

    shown = run("show", "abcdefgh").output
    assert "id=1, name='x'" in shown
    (second,) = [line for line in shown.splitlines() if line.startswith("  0/10:2  ")]
    assert second.endswith(r"name='\udcff'")
    assert "Traceback …" in shown
    assert json.loads(run("show", "0123456789", "--json").output)["decoded"]
    for arguments, sentence in (
        (["show", "01234567"], "01234567 may be any of 0123456789, 0123456789-0"),
        (["retry", "9"], "There is no dead letter 9"),
        (["drop"], "Select dead letters by"),
        (["list", "--older", "soon"], "'soon' is not an age"),
    ):
        ended = run(*arguments)
        assert ended.exit_code == 2
        assert sentence in ended.output

    assert run("drop", "0123456789", answer="n\n").exit_code == 1
    assert ids(box) == ["0123456789", "0123456789-0", "abcdefghij"]
    assert "1 deleted." in run("drop", "0123456789", answer="y\n").output
    assert ids(box) == ["0123456789-0", "abcdefghij"]
    assert run("retry", "--all", "--split").output == "2 sent back to their handlers.\n"
    assert ids(box) == []
    messages = list(sent(app))
    assert [message.headers["id"] for message in messages] == [
        "0123456789-0",
        *(f"abcdefghij-{number}" for number in range(3)),
    ]
    for message in messages[1:]:
        ((changes,), _, _) = message.payload
        assert len(changes) == 1
    assert messages[2].headers["root_id"] == messages[2].headers["id"]


def test_dead_retry_refuses_letters_of_unknown_tasks(box, bury, run):
    bury("a1", task="shop.gone")
    ended = run("retry", "--all")
    assert ended.exit_code == 2
    assert "shop.gone is not a task of this app" in ended.output
    assert ids(box) == ["a1"]


def test_dead_commands_leave_other_messages_in_the_queue(app, box, bury, run):
    bury("a1")
    app.send_task("shop.handle", [1], queue="flash.dead")
    assert ids(box) == ["a1"]
    assert box.other_messages == 1
    assert "also holds 1 messages that are not dead letters" in run("list").output
    run("drop", "--all", "--yes")
    assert box.count() == 1


def test_dead_retry_keeps_a_letter_that_fails_again_at_once(box, bury):
    bury("a1")
    letters_found = box.find(DeadLetterFilter())

    def fails_again(letter):
        bury("a1", failed_at=letters_found[0].failed_at)

    assert box._process(letters_found, fails_again) == 1
    assert ids(box) == ["a1"]
