import pytest

from flash_celery.changes.alone import Alone
from flash_celery.changes.change import Changes, Insert
from flash_celery.changes.deliveries import Delivery
from flash_celery.changes.rows import Column, Origin, Table, Transaction
from flash_celery.errors import CatalogError
from flash_celery.escaping import escaped, first_of, text_of
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import encode_row

HOSTILE = 'a"\n[2026-01-01] ERROR forged\r\x1b]0;title\x07\x1b[2J\u202etxt\u2028\x9b31m\x7f\0%s{}'


@pytest.mark.parametrize("text", ["", "id=5", 'Größe "x"', "注文 №5", "50 % \\ 'quoted'", "🦊"])
def test_escaping_keeps_printable_text(text):
    assert escaped(text) == text


def test_escaping_removes_control_characters_and_line_ends():
    shown = escaped(HOSTILE)
    assert shown.isprintable()
    assert shown.startswith('a"\\n[2026-01-01] ERROR forged\\r\\x1b]0;title\\x07\\x1b[2J\\u202e')
    assert escaped("\udc80") == "\\udc80"


def test_escaping_names_changes_errors_and_messages_in_one_line():
    columns = (Column(HOSTILE, 25, "text", identity=True),)
    table = Table(HOSTILE, HOSTILE, None, "d", (HOSTILE,), columns, HOSTILE)
    cells = [HOSTILE.replace("\0", "").encode()]
    transaction = Transaction(Lsn(1), 1, 0)
    change = Insert(cells, Origin(table, transaction, 0))
    delivery = Delivery(table, transaction, 0, 0, 0, [encode_row("I", 0, None, None, cells)])
    (argsrepr,) = Alone(delivery).labels()
    for text in (repr(change), argsrepr, repr(Changes([change])), str(CatalogError(HOSTILE))):
        assert text.isprintable()
        assert "forged" in text
    assert argsrepr == repr(change)


def test_escaping_shortens_a_key_that_is_the_whole_row():
    columns = tuple(Column(name, 25, "text", identity=True) for name in ("a", "b"))
    table = Table("public", "t", None, "f", ("a", "b"), columns)
    shown = repr(Insert([b"x" * 1_000_000, b"y"], Origin(table, Transaction(Lsn(1), 1, 0), 0)))
    assert len(shown) < 300
    assert " b=y " in shown


def test_text_of_an_error_never_raises():
    class Textless(Exception):
        def __str__(self):
            raise RuntimeError

    class Nameless(Textless):
        __repr__ = Textless.__str__

    class Text(str):
        def splitlines(self, keepends=False):
            raise RuntimeError

    class Odd(Exception):
        def __str__(self):
            return Text("odd")

    assert text_of(ValueError("x")) == "x"
    assert text_of(Textless("x")) == "Textless('x')"
    assert text_of(Nameless("x")) == "<Nameless, whose text cannot be read>"
    assert type(text_of(Odd())) is str


def test_of_many_names_the_first_are_given():
    assert first_of(["a", "b"], 2) == "a, b"
    assert first_of(["a", "b", "c", "d"], 2) == "a, b and 2 more"
