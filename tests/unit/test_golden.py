"""Messages captured from PostgreSQL 14 to 19 (`tests/golden/capture.py`)."""

import json
from pathlib import Path

import pytest

from flash_celery.errors import ProtocolError
from flash_celery.protocol import pgoutput
from flash_celery.protocol.pgoutput import decode, encode_row, read_row

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("pg*.jsonl"))
KINDS = {
    "B": pgoutput.Begin,
    "C": pgoutput.Commit,
    "O": pgoutput.Origin,
    "R": pgoutput.Relation,
    "Y": pgoutput.Type,
    "I": pgoutput.Row,
    "U": pgoutput.Row,
    "D": pgoutput.Row,
    "T": pgoutput.Truncate,
    "M": pgoutput.LogicalMessage,
    "S": pgoutput.StreamStart,
    "E": pgoutput.StreamStop,
    "c": pgoutput.StreamCommit,
    "A": pgoutput.StreamAbort,
}


def read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["tag"], line["streamed"], bytes.fromhex(line["data"])) for line in lines]


def test_golden_files_have_every_version_and_message_type():
    assert [path.stem for path in GOLDEN] == ["pg14", "pg15", "pg16", "pg17", "pg18", "pg19"]
    for path in GOLDEN:
        assert {tag for tag, _, _ in read(path)} == set(KINDS), path


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_messages_decode(path):
    for tag, streamed, data in read(path):
        message = decode(data, streamed)
        assert type(message) is KINDS[tag]
        if tag in "RYIUDTM":
            assert (message.xid is not None) == streamed


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_message_prefixes_are_refused(path):
    for _, streamed, data in read(path):
        for length in range(1, len(data)):
            with pytest.raises(ProtocolError):
                decode(data[:length], streamed)
        with pytest.raises(ProtocolError):
            decode(data + b"\0", streamed)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_rows_survive_reading_and_writing(path):
    rows = [data for tag, streamed, data in read(path) if tag in "IUD" and not streamed]
    joined, place = b"".join(rows), 0
    for data in rows:
        row, place = read_row(joined, place)
        assert encode_row(row.operation, row.relation_oid, row.old_kind, row.old, row.new) == data
    assert place == len(joined)


def test_golden_rows_equal_what_the_server_reported():
    messages = [decode(data, streamed) for _, streamed, data in read(GOLDEN[-1])]
    relations = {m.name: m for m in messages if isinstance(m, pgoutput.Relation)}
    assert relations["items"].identity == "d"
    assert [c.key for c in relations["items"].columns] == [True, False, False, False, False]
    assert relations["whole"].identity == "f"
    assert relations["indexed"].identity == "i"
    assert relations["Täble .'"].schema == 'Odd "one'
    assert relations["Täble .'"].columns[0].name == "Ein Näme"
    updates = [m for m in messages if isinstance(m, pgoutput.Row) and m.operation == "U"]
    assert {m.old_kind for m in updates} == {None, "K", "O"}
    assert any(pgoutput.UNCHANGED_TOAST in m.new for m in updates)
    truncates = [m for m in messages if isinstance(m, pgoutput.Truncate)]
    assert (truncates[0].cascade, truncates[0].restart_identity) == (True, True)
    assert len(truncates[0].relation_oids) == 2
    origins = [m for m in messages if isinstance(m, pgoutput.Origin)]
    assert origins[0].name == "elsewhere"
    greetings = {m.prefix: m for m in messages if isinstance(m, pgoutput.LogicalMessage)}
    assert (greetings["greeting"].content, greetings["greeting"].transactional) == (b"hello", True)
    assert greetings["aside"].transactional is False
    aborts = [m for m in messages if isinstance(m, pgoutput.StreamAbort)]
    assert any(a.xid != a.subxid for a in aborts)
