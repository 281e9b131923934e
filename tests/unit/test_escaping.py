import pytest

from flash_celery.changes.change import Changes, Insert
from flash_celery.changes.payload import Delivery, encode_each
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.errors import CatalogError
from flash_celery.escaping import escaped
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row

HOSTILE = 'a"\n[2026-01-01] ERROR forged\r\x1b]0;title\x07\x1b[2J\u202etxt\u2028\x9b31m\x7f\0%s{}'


@pytest.mark.parametrize("text", ["", "id=5", 'Größe "x"', "注文 №5", "50 % \\ 'quoted'", "🦊"])
def test_what_prints_stays_as_it_is(text):
    assert escaped(text) == text


def test_nothing_that_moves_a_terminal_or_ends_a_line_is_left():
    shown = escaped(HOSTILE)
    assert shown.isprintable()
    assert shown.startswith('a"\\n[2026-01-01] ERROR forged\\r\\x1b]0;title\\x07\\x1b[2J\\u202e')
    assert escaped("\udc80") == "\\udc80"


def test_a_change_an_error_and_a_message_are_named_in_one_printable_line():
    columns = (Column(HOSTILE, 25, "text", identity=True),)
    table = Table(HOSTILE, HOSTILE, None, "d", (HOSTILE,), columns, HOSTILE)
    cells = [HOSTILE.replace("\0", "").encode()]
    transaction = Transaction(Lsn(1), 1, 0)
    change = Insert(cells, table, transaction, 0)
    delivery = Delivery(table, transaction, 0, 0, 0, [encode_row("I", 0, None, None, cells)])
    ((_, _, argsrepr),) = encode_each(delivery)
    for said in (repr(change), argsrepr, repr(Changes([change])), str(CatalogError(HOSTILE))):
        assert said.isprintable()
        assert "forged" in said
    assert argsrepr == repr(change)


def test_a_key_is_the_whole_row_where_there_is_none_and_is_not_said_whole():
    columns = tuple(Column(name, 25, "text", identity=True) for name in ("a", "b"))
    table = Table("public", "t", None, "f", ("a", "b"), columns)
    shown = repr(Insert([b"x" * 1_000_000, b"y"], table, Transaction(Lsn(1), 1, 0), 0))
    assert len(shown) < 300
    assert " b=y " in shown
