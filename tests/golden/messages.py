"""Write messages of the version that this revision writes, and their changes: wire<version>.jsonl.

The last revision that wrote version 1 has written wire1.jsonl.

Run: python -m tests.golden.messages
"""

import json
from pathlib import Path

from flash_celery import UNCHANGED
from flash_celery.changes import payload
from flash_celery.changes.alone import Alone
from flash_celery.changes.deliveries import TRUNCATED, Delivery, message_row, prefixed, row_id_of
from flash_celery.changes.operations import Part
from flash_celery.changes.payload import encode
from flash_celery.changes.rows import Column, Table, Transaction
from flash_celery.protocol import pgoutput
from flash_celery.protocol.lsn import Lsn

PLACE = (Column("x", 701, "double precision", False), Column("y", 701, "double precision", False))
COLUMNS = (
    Column("id", 20, "bigint", True),
    Column("total", 1700, "numeric(10,2)", False),
    Column("tags", 1009, "text[]", False),
    Column("place", 16400, "place", False, True, PLACE),
    Column("places", 16401, "place[]", False, True, PLACE, True),
    Column("secret", 25, "text", True, False),
)
FULL = Table("public", "orders", "public.orders_1", "f", ("id",), COLUMNS, "billing")
PLAIN = Table("public", "items", None, "d", ("id",), COLUMNS[:2])
MESSAGE = Table("", "order.paid", None, "n", (), ())
OLD = [b"1", b"9.50", b'{a,"b c",NULL}', b"(1.5,)", b'{"(1,2)",NULL}', b"s"]
NEW = [b"1", b"8.00", UNCHANGED, None, b"{}", b"s"]


def row(operation, old_kind=None, old=None, new=None):
    return pgoutput.encode_row(operation, 16384, old_kind, old, new)


def examples():
    """Yield lists of deliveries, by name."""
    first = Transaction(Lsn(0x16B3748), 730, 700_000_000_000_000)
    second = Transaction(Lsn(0x16B3800), 731, 700_000_000_000_001)
    inserts = [row("I", new=[b"%d" % n, b"9.50"]) for n in range(1, 4)]
    yield "insert", [Delivery(PLAIN, first, 0, Part.WHOLE, 0, inserts[:1])]
    yield "update", [Delivery(FULL, first, 3, Part.WHOLE, 1, [row("U", "O", OLD, NEW)])]
    yield "delete", [Delivery(PLAIN, first, 1, Part.WHOLE, 0, [row("D", "K", [b"1", None])])]
    yield "truncate", [Delivery(PLAIN, first, 2, Part.WHOLE, 0, [TRUNCATED])]
    yield "message", [Delivery(MESSAGE, first, 0, Part.MESSAGE, 0, [message_row(b'{"id": 1}')])]
    yield (
        "batch",
        [
            Delivery(PLAIN, first, 0, Part.WHOLE, 0, inserts[:2]),
            Delivery(PLAIN, first, 2, Part.WHOLE, 0, inserts[2:]),
            Delivery(FULL, first, 3, Part.KEY_DELETE, 2, [row("D", "O", OLD)]),
            Delivery(FULL, first, 3, Part.KEY_INSERT, 2, [row("I", new=OLD)]),
            Delivery(MESSAGE, second, 0, Part.MESSAGE, 0, [message_row(b"paid")]),
            Delivery(PLAIN, second, 0, Part.WHOLE, 0, [row("U", new=[b"2", b"1"])]),
        ],
    )
    if payload.VERSION == 1:
        return
    from flash_celery.changes.history import Ancestor, History

    one = History("7412345678901234567", 1)
    three = History(one.system, 3, (Ancestor(1, Lsn(0x5000000)), Ancestor(2, Lsn(0x7000028))))
    context = '{"user": 5, "reason": "päid"}'
    yield "history", [Delivery(PLAIN, first._replace(history=one), 0, Part.WHOLE, 0, inserts)]
    yield "place", [Delivery(PLAIN, first._replace(history=three), 4, Part.WHOLE, 0, inserts, 2)]
    yield "context", [Delivery(PLAIN, first._replace(context=context), 0, Part.WHOLE, 0, inserts)]
    backfilled = [prefixed(each, row_id=row_id_of([each])) for each in inserts]
    chunk = Transaction(Lsn(0x16B3747), 0, second.committed_at, one, "", "items-1")
    yield "backfill", [Delivery(PLAIN, chunk, 10_000, Part.WHOLE, 1, backfilled)]
    coalesced = prefixed(row("U", "O", OLD, NEW), coalesced=3)
    yield (
        "coalesced",
        [
            Delivery(FULL, first._replace(history=one), 0, Part.WHOLE, 0, [coalesced]),
            Delivery(FULL, second._replace(history=three), 1, Part.WHOLE, 0, [row("D", "O", OLD)]),
        ],
    )


def described(change):
    """Return everything that a handler can see of a change."""
    rows = {side: dict(getattr(change, side)) for side in ("old", "new") if hasattr(change, side)}
    seen = {
        "type": type(change).__name__,
        "repr": repr(change),
        "key": dict(change.key),
        "changed": None if change.changed is None else sorted(change.changed),
        "committed_at": change.committed_at,
        "rows": rows,
        "content": getattr(change, "content", b"").decode(),
    }
    for name in ("id", "source", "schema", "table", "partition", "commit_lsn", "xid", "number"):
        seen[name] = getattr(change, name)
    if payload.VERSION > 1:
        seen |= {"context": dict(change.context), "backfill": change.backfill}
        seen |= {"coalesced": change.coalesced, "history": change.transaction.history}
        seen["position"] = change._position
    return json.loads(json.dumps(seen, default=str))


def lines():
    for name, deliveries in examples():
        alone = len(deliveries) == 1 and len(deliveries[0].rows) == 1
        value = Alone(deliveries[0]).value(0) if alone else encode(deliveries)
        kind = "flash_celery.change" if alone else "flash_celery.changes"
        seen = [described(change) for change in payload.decode(json.loads(value))]
        yield {"name": name, "type": kind, "value": value, "seen": seen}


if __name__ == "__main__":
    path = Path(__file__).parent / f"wire{payload.VERSION}.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines()))
