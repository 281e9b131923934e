"""Contexts of transactions: their format, and which statements need them."""

import json

import pytest

from flash_celery import context, on_change
from flash_celery.changes import transaction_context
from flash_celery.handlers.own_writes import depth, writer
from flash_celery.handlers.written_context import WrittenContext, is_read, statement_for
from flash_celery.testing import Flash, insert, message, transaction

READS = [
    "SELECT 1",
    " \n(SELECT 1)",
    "-- update\n/* insert */ select * from a for update",
    "SHOW ALL",
    'SAVEPOINT "a"',
    "WITH a AS (SELECT 1) SELECT * FROM a",
    "WITH a AS (SELECT 1) SELECT * FROM b FOR NO KEY UPDATE",
    "DECLARE a CURSOR FOR SELECT 1",
    "EXPLAIN SELECT 1",
]
WRITES = [
    "INSERT INTO a VALUES (1)",
    "/* shown */ update a set b = 1",
    "WITH a AS (DELETE FROM b RETURNING *) SELECT * FROM a",
    "SELECT 1; INSERT INTO a VALUES (1)",
    "EXPLAIN ANALYZE DELETE FROM a",
    "CALL a()",
    "COPY a FROM STDIN",
    "TRUNCATE a",
    "",
]


@pytest.mark.parametrize("statement", READS)
def test_read_needs_no_context(statement):
    assert is_read(statement)


@pytest.mark.parametrize("statement", WRITES)
def test_everything_else_needs_a_context(statement):
    assert not is_read(statement)


def test_rollback_to_a_savepoint_restores_the_context_of_its_beginning():
    written = WrittenContext()
    followed = [written.follow(each) for each in ("SAVEPOINT a", "INSERT INTO b VALUES (1)")]
    assert followed == [True, False]
    written.write("A", ())
    for statement in ("savepoint b", "SAVEPOINT c"):
        written.follow(statement)
    written.write("B", ())
    for statement, text in [
        ("RELEASE SAVEPOINT c", "B"),
        ("ROLLBACK TO SAVEPOINT b", "A"),
        ("ROLLBACK TO b", "A"),
        ("ROLLBACK WORK TO SAVEPOINT a;", ""),
        ("ROLLBACK TO SAVEPOINT unseen", ""),
    ]:
        assert written.follow(statement)
        assert written.text == text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"1",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b"\xff",
        b"[" * 4000,
        b'{"a": "' + b"x" * 5000 + b'"}',
        '{"a": "' + "é" * 2000 + '"}',
    ],
)
def test_content_of_anyone_that_is_no_context_is_refused(content):
    content = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(ValueError, match="it is"):
        transaction_context.decode(content)


def test_context_is_read_as_it_was_written():
    values = {"user": 7, "name": "é'\\\"", "tags": [None, True, 1.5, {"a": []}]}
    text = transaction_context.encode(values)
    assert json.loads(transaction_context.decode(text.encode())) == values
    assert text.isascii()
    assert transaction_context.decode(b"{}") == ""
    assert "%" not in statement_for('{"a":"%s"}')


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"user": object()}, "takes texts, numbers"),
        ({"user": float("nan")}, "takes texts, numbers"),
        ({"user": "x" * 5000}, "4096 at most; leave out or shorten some of user"),
        ({"handler": "a", "depth": 1}, "depth, handler is what a handler says"),
    ],
)
def test_context_that_cannot_travel_is_refused_where_it_is_given(values, said):
    with pytest.raises(ValueError, match=said):
        context(None, **values)


def test_context_of_something_else_names_what_it_takes():
    with pytest.raises(TypeError, match="not a int"):
        context(1, user=7)


def test_context_reads_what_a_handler_says_and_nothing_else():
    assert (writer('{"handler":"a","depth":3}'), depth('{"handler":"a","depth":3}')) == ("a", 3)
    for forged in ('{"handler":1,"depth":"x"}', '{"depth":-1}', '{"depth":true}', ""):
        assert (writer(forged), depth(forged)) == ("", 0)


def test_handler_gets_the_context_and_leaves_out_its_own(new_app):
    app, seen = new_app(), []

    @app.task(name="audit", shared=False)
    def audit(change):
        seen.append(dict(change.context))

    @app.task(name="careful", shared=False)
    def careful(change): ...

    on_change("orders")(audit)
    on_change("orders", ignore_own=True)(careful)
    flash = Flash(app)
    change = insert("orders", id=1, context={"user": 7})
    assert [task.handler for task in flash.enqueued(change)] == ["audit", "careful"]
    assert all(run.error is None for run in flash.apply(change))
    assert seen == [{"user": 7}]
    with pytest.raises(TypeError):
        change.context["user"] = 8
    own = insert("orders", id=1, context={"handler": "careful", "change": "0/1:0", "depth": 1})
    assert [task.handler for task in flash.enqueued(own)] == ["audit"]
    assert insert("orders", id=1).context == {}
    assert message("a", b"", context={"user": 7}).context == {"user": 7}
    with pytest.raises(ValueError, match=r"transaction\(context="):
        insert("orders", id=1, transaction=transaction(), context={})
