import pickle
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_celery.errors import ProtocolError
from flash_celery.protocol import pgoutput
from flash_celery.protocol.lsn import Lsn
from flash_celery.protocol.pgoutput import UNCHANGED_TOAST
from tests.unit.pgoutput_messages import INSERT, MESSAGES, XID


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
def test_pgoutput_prefixes_and_trailing_bytes_are_refused(message):
    pgoutput.decode(message)
    for end in range(len(message)):
        with pytest.raises(ProtocolError):
            pgoutput.decode(message[:end])
    with pytest.raises(ProtocolError):
        pgoutput.decode(message + b"\0")


def test_pgoutput_begin_and_commit_are_decoded():
    assert pgoutput.decode(MESSAGES["begin"]) == pgoutput.Begin(Lsn(0x16B3748), 5, 730)
    assert pgoutput.decode(MESSAGES["commit"]).end_lsn == Lsn.parse("0/16B3748")


def test_pgoutput_relation_is_decoded():
    relation = pgoutput.decode(MESSAGES["relation"])
    assert (relation.schema, relation.name, relation.identity) == ("public", "orders", "d")
    assert relation.columns == (pgoutput.Column(True, "id", 20, -1),)


def test_pgoutput_null_and_unchanged_toast_differ():
    assert pgoutput.decode(MESSAGES["insert"]).new == [b"1", None]
    assert pgoutput.decode(MESSAGES["update"]).new == [b"1", UNCHANGED_TOAST]
    assert pickle.loads(pickle.dumps(UNCHANGED_TOAST)) is UNCHANGED_TOAST


def test_pgoutput_truncate_names_every_relation():
    truncate = pgoutput.decode(MESSAGES["truncate"])
    assert truncate.relation_oids == (16385, 730)
    assert (truncate.cascade, truncate.restart_identity) == (True, True)


def test_pgoutput_streamed_rows_carry_the_subtransaction():
    assert pgoutput.decode(INSERT[:1] + XID + INSERT[1:], streamed=True).xid == 730


CELLS = st.lists(st.one_of(st.none(), st.binary(max_size=20), st.just(UNCHANGED_TOAST)), max_size=9)


@given(CELLS, CELLS, st.sampled_from(["I", "U", "U+", "D"]), st.sampled_from("KO"))
def test_pgoutput_rows_survive_writing_and_reading(old, new, operation, kind):
    with_old = operation in ("U+", "D")
    arguments = (
        operation[0],
        16385,
        kind if with_old else None,
        old if with_old else None,
        None if operation == "D" else new,
    )
    written = pgoutput.encode_row(*arguments)
    row, end = pgoutput.read_row(b"xyz" + written + INSERT, 3)
    assert (row.operation, row.relation_oid, row.old_kind, row.old, row.new) == arguments
    assert end == 3 + len(written)


@given(CELLS)
def test_one_column_and_the_end_are_found_without_reading_the_others(cells):
    written = pgoutput.encode_row("I", 16385, None, None, cells)
    for position, cell in enumerate(cells):
        assert pgoutput.read_cell(written + INSERT, pgoutput.FIRST_TUPLE, position) == cell
        with suppress(ProtocolError):
            pgoutput.read_cell(written[:-1], pgoutput.FIRST_TUPLE, position)
    assert pgoutput.end_of_tuple(written + INSERT, pgoutput.FIRST_TUPLE) == len(written)
    with pytest.raises(ProtocolError):
        pgoutput.read_cell(written + INSERT, pgoutput.FIRST_TUPLE, len(cells))
    with pytest.raises(ProtocolError):
        pgoutput.end_of_tuple(written[: pgoutput.FIRST_TUPLE + 1], pgoutput.FIRST_TUPLE)


@given(CELLS, st.sets(st.integers(0, 5)))
def test_tuple_is_cut_to_columns_as_if_they_were_read_and_encoded(cells, positions):
    written = pgoutput.encode_row("I", 16385, None, None, cells)
    kept = sorted(n for n in positions if n < len(cells))
    cut = pgoutput.cut_tuple(written + INSERT, pgoutput.FIRST_TUPLE, kept)
    assert pgoutput.read_cells(cut, 0) == ([cells[n] for n in kept], len(cut))
    with pytest.raises(ProtocolError):
        pgoutput.cut_tuple(written + INSERT, pgoutput.FIRST_TUPLE, [len(cells)])
    with suppress(ProtocolError):
        pgoutput.cut_tuple(written[:-1], pgoutput.FIRST_TUPLE, kept)
    if cells:
        with pytest.raises(ProtocolError):
            pgoutput.cut_tuple(written[:-1], pgoutput.FIRST_TUPLE, [len(cells) - 1])


@given(st.one_of(st.binary(), st.tuples(st.sampled_from(list(MESSAGES.values())), st.binary())))
def test_pgoutput_arbitrary_bytes_raise_only_protocol_errors(data):
    buffer = data if isinstance(data, bytes) else data[0][: len(data[1])] + data[1]
    for streamed in (False, True):
        with suppress(ProtocolError):
            pgoutput.decode(buffer, streamed)


def test_lsn_reads_and_prints_as_postgresql_does():
    assert str(Lsn.parse("16/B374D848")) == "16/B374D848"
    assert f"{Lsn(0x16B3748)}" == "0/16B3748"
    assert Lsn(5) - Lsn(3) == 2
