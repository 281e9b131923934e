"""What a handler receives, on a real server: transitions, fields, keys, old and new."""

import json
import threading
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import pytest

from flash_celery import UNCHANGED
from flash_celery.errors import ReplicaIdentityMissing, SubscriptionError

from .conftest import shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, note text)"
FULL = "ALTER TABLE items REPLICA IDENTITY FULL"


def test_operations_are_delivered_with_old_and_new(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    flash.do(
        "INSERT INTO items VALUES (1, 'a', NULL), (2, 'b', '')",
        "UPDATE items SET name = 'c' WHERE id = 1",
        "UPDATE items SET name = name WHERE id = 1",
        "UPDATE items SET id = 10 WHERE id = 1",
        "DELETE FROM items WHERE id = 10",
        "TRUNCATE items",
    )
    changes = flash.delivered()
    assert shown(changes) == [
        "insert 1,a,-",
        "insert 2,b,",
        "update 1 -> 1,c,-",
        "update 1 -> 1,c,-",
        "update 1 -> 10,c,-",
        "delete 10",
        "truncate",
    ]
    assert [dict(change.key) for change in changes[:6:5]] == [{"id": 1}, {"id": 10}]
    assert [change.changed for change in changes[2:5]] == [None, None, None]
    assert len({change.id for change in changes}) == 7
    assert [c.commit_lsn for c in changes] == sorted(c.commit_lsn for c in changes)


def documented():
    """The table of docs/semantics.md, row by row; an empty cell stands for both."""
    text = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text()
    table = text.partition("<!-- table: transitions -->")[2].partition("\n\n")[0]
    for line in table.strip().splitlines()[2:]:
        before, after, field, key, delivered = (cell.strip() for cell in line.split("|")[1:-1])
        kinds = [kind.strip().lower() for kind in delivered.split(",") if kind]
        updates = "-" not in (before, after)
        for changed in [field] if field or not updates else ["yes", "no"]:
            for rekeyed in [key] if key or not updates else ["yes", "no"]:
                yield before, after, changed == "yes", rekeyed == "yes", kinds


MASKS = ["|".join(c) for n in (1, 2, 3) for c in combinations(("insert", "update", "delete"), n)]


def test_transitions_match_the_documented_table(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, status text)")
    for mask in MASKS:
        options = {"where": {"status": "in"}, "fields": ["name"], "key": ["id"]}
        flash.handler("items", mask, name=mask, **options)
    flash.start()
    rows = list(documented())
    assert len(rows) == 20
    for before, after, changed, rekeyed, kinds in rows:
        status = {"matches": "in", "does not": "out"}
        if before != "-":
            flash.database.execute(f"INSERT INTO items VALUES (1, 'a', '{status[before]}')")
        flash.do("SELECT 1")
        for mask in MASKS:
            flash.delivered(mask)
        if before == "-":
            flash.do(f"INSERT INTO items VALUES (1, 'a', '{status[after]}')")
        elif after == "-":
            flash.do("DELETE FROM items")
        else:
            key, name = 2 if rekeyed else 1, "b" if changed else "a"
            flash.do(f"UPDATE items SET id = {key}, name = '{name}', status = '{status[after]}'")
        delivered = {
            mask: [c.operation.names()[0] for c in flash.delivered(mask)] for mask in MASKS
        }
        expected = {mask: [kind for kind in kinds if kind in mask] for mask in MASKS}
        assert delivered == expected, (before, after, changed, rekeyed)
        flash.database.execute("DELETE FROM items")


def test_inserts_and_deletes_are_filtered_by_a_condition(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", where=[{"name": "paid"}, {"note": None}]).start()
    flash.do(
        "INSERT INTO items VALUES (1, 'paid', 'x'), (2, 'open', 'x'), (3, 'open', NULL)",
        "DELETE FROM items",
        "TRUNCATE items",
    )
    assert shown(flash.delivered()) == [
        "insert 1,paid,x",
        "insert 3,open,-",
        "delete 1,paid,x",
        "delete 3,open,-",
        "truncate",
    ]


def test_fields_are_sent_alone_and_conditions_can_use_others(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", fields=["name"], where={"note__ne": "hidden"}).start()
    flash.do(
        "INSERT INTO items VALUES (1, 'a', 'seen'), (2, 'b', 'hidden')",
        "UPDATE items SET note = 'other'",
        "UPDATE items SET name = 'c' WHERE id = 1",
        "UPDATE items SET name = name",
        "DELETE FROM items",
    )
    messages = flash.publisher.queues["flash"]
    assert not any("b3RoZXI" in m.body or "c2Vlbg" in m.body for m in messages)  # base64
    changes = flash.delivered()
    # The update of note brought row 2 into the condition, and changed no field of row 1.
    assert shown(changes) == ["insert a", "insert b", "update a -> c", "delete b", "delete c"]
    assert changes[2].changed == {"name"}
    assert [dict(c.key) for c in changes] == [{"id": n} for n in (1, 2, 1, 2, 1)]
    with pytest.raises(KeyError, match="do not travel"):
        changes[2].new["note"]


def test_fields_of_a_deleted_row_are_delivered(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "delete", fields=["name"])
    flash.handler("items", "delete", name="left", fields=["name"], where={"id__lt": 5})
    with pytest.raises(ReplicaIdentityMissing, match="REPLICA IDENTITY FULL;"):
        flash.start(flash_replica_identity="keep")
    flash.error = None
    flash.start(flash_replica_identity="auto")
    flash.do(
        "INSERT INTO items VALUES (1, 'a', 'x')",
        "UPDATE items SET id = 7",
        "DELETE FROM items",
    )
    assert shown(flash.delivered()) == ["delete a"]
    assert shown(flash.delivered("left")) == ["delete a"]


def test_composite_key_works_with_a_condition(flash):
    flash.database.execute(
        "CREATE TABLE lines (shop int, number int, status text, PRIMARY KEY (shop, number))"
    )
    flash.handler("lines", key=["number", "shop"], where={"status": "on"}).start()
    flash.do(
        "INSERT INTO lines VALUES (1, 1, 'on')",
        "UPDATE lines SET number = 2",
        "UPDATE lines SET shop = 5, status = 'off'",
        "UPDATE lines SET shop = 6, status = 'on'",
        "UPDATE lines SET shop = 7",
    )
    changes = flash.delivered()
    assert shown(changes) == [
        "insert 1,1,on",
        "delete 1,1,on",
        "insert 1,2,on",
        "delete 1,2,on",
        "insert 6,2,on",
        "delete 6,2,on",
        "insert 7,2,on",
    ]
    assert list(changes[0].key.items()) == [("shop", 1), ("number", 1)]
    assert [c.id.rpartition(":")[2] for c in changes] == ["0", "0-", "0+", "0", "0", "0-", "0+"]


IDENTITIES = {
    "default": ("ALTER TABLE items REPLICA IDENTITY DEFAULT", {"id"}, None, {"id"}),
    "full": (FULL, {"id", "name", "note"}, {"note"}, {"id", "name", "note"}),
    "index": (
        "ALTER TABLE items DROP CONSTRAINT items_pkey; "
        "CREATE UNIQUE INDEX by_name ON items (name); "
        "ALTER TABLE items REPLICA IDENTITY USING INDEX by_name",
        {"name"},
        None,
        {"name"},
    ),
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_old_holds_the_columns_of_the_identity(flash, identity):
    statement, old, changed, deleted = IDENTITIES[identity]
    flash.database.execute(ITEMS.replace("name text", "name text NOT NULL"), statement)
    flash.handler("items").start(flash_replica_identity="keep")
    flash.do(
        "INSERT INTO items VALUES (1, 'a', 'x')",
        "UPDATE items SET note = 'y'",
        "DELETE FROM items",
    )
    _, update, delete = flash.delivered()
    assert set(update.old) == old
    assert update.changed == changed
    assert set(delete.old) == deleted
    if identity != "full":
        with pytest.raises(KeyError, match="ALTER TABLE public.items REPLICA IDENTITY FULL"):
            update.old["note"]
    key = {"name": "a"} if identity == "index" else {"id": 1}
    assert (update.key, delete.key) == (key, key)


def test_rows_that_existed_before_are_not_delivered(flash):
    flash.database.execute(ITEMS, "INSERT INTO items VALUES (1, 'a')")
    flash.handler("items").start()
    flash.do("INSERT INTO items VALUES (2, 'b')", "UPDATE items SET name = 'c' WHERE id = 1")
    assert shown(flash.delivered()) == ["insert 2,b,-", "update 1 -> 1,c,-"]


@pytest.mark.parametrize(
    "set_up",
    [
        "CREATE TABLE items (id int, name text, note text)",
        f"{ITEMS}; ALTER TABLE items REPLICA IDENTITY NOTHING",
    ],
)
def test_table_without_identity_gets_one_or_is_refused(flash, set_up):
    flash.database.execute(set_up)
    flash.handler("items")
    with pytest.raises(ReplicaIdentityMissing, match="REPLICA IDENTITY FULL;"):
        flash.start(flash_replica_identity="keep")
    flash.error = None
    flash.start(flash_replica_identity="auto")
    flash.do("INSERT INTO items VALUES (1, 'a')", "UPDATE items SET note = 'y'")
    assert shown(flash.delivered()) == ["insert 1,a,-", "update 1,a,- -> 1,a,y"]


BIG = "repeat(md5('x'), 10000)"


@pytest.mark.parametrize("full", [True, False])
def test_unchanged_large_value_is_marked(flash, full):
    flash.database.execute(
        ITEMS, "ALTER TABLE items ALTER note SET STORAGE EXTERNAL", FULL if full else "SELECT 1"
    )
    flash.handler("items", "update", name="whole")
    if full:
        flash.handler("items", "update", name="note", fields=["note"])
        flash.handler("items", "update", name="both", fields=["name", "note"])
        flash.handler("items", "update", name="where", where={"note__startswith": "9dd4"})
    flash.start(flash_replica_identity="keep")
    flash.do(f"INSERT INTO items VALUES (1, 'a', {BIG})", "UPDATE items SET name = 'b'")
    (update,) = flash.delivered("whole")
    if not full:
        assert update.new["note"] is UNCHANGED
        assert update.new["note"] is not None
        return
    assert len(update.new["note"]) == 320_000
    assert update.changed == {"name"}
    assert flash.delivered("note") == []
    (both,) = flash.delivered("both")
    assert len(both.new["note"]) == 320_000
    (matched,) = flash.delivered("where")
    assert matched.new["name"] == "b"


def test_identity_changed_while_running_is_followed(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", fields=["name"]).start()
    flash.do("INSERT INTO items VALUES (1, 'a', 'x')")
    flash.do("ALTER TABLE items REPLICA IDENTITY DEFAULT", "UPDATE items SET note = 'y'")
    # Whether name changed is unknown, so the update is delivered.
    assert shown(flash.delivered()) == ["insert a", "update  -> a"]
    flash.wait(
        lambda: (
            flash.database.one("SELECT relreplident FROM pg_class WHERE relname = 'items'") == "f"
        )
    )
    flash.do("UPDATE items SET note = 'z'", "UPDATE items SET name = 'c'")
    assert shown(flash.delivered()) == ["update a -> c"]


def test_unknown_old_values_are_logged_once_for_each_table(flash, caplog):
    flash.database.execute(ITEMS, ITEMS.replace("items", "others"))
    flash.handler("items", fields=["name"])
    flash.handler("others", "update", name="others", where={"note": "x"}).start()
    for table in ("items", "others"):
        flash.do(f"INSERT INTO {table} VALUES (1, 'a', 'x'), (2, 'b', 'x'), (3, 'c', 'y')")
    flash.delivered()
    # In one transaction, because the worker repairs the identity as soon as it notices.
    flash.do(
        "BEGIN; ALTER TABLE items REPLICA IDENTITY DEFAULT; UPDATE items SET note = 'x';"
        "ALTER TABLE others REPLICA IDENTITY DEFAULT; UPDATE others SET name = 'b'; COMMIT"
    )
    assert [c.key["id"] for c in flash.delivered()] == [1, 2, 3]
    # Of the third row the new values are enough to tell that it is not meant.
    assert [(c.key["id"], c.changed) for c in flash.delivered("others")] == [(1, None), (2, None)]
    messages = [record.message for record in caplog.records if "cannot evaluate" in record.message]
    assert [message.partition(":")[0] for message in messages] == ["public.items", "public.others"]


def test_handler_can_start_before_the_commit_is_visible(flash):
    """A commit that waits for a standby is delivered before other sessions see it."""
    flash.database.execute(ITEMS)
    flash.handler("items", "insert").start()
    flash.do("INSERT INTO items VALUES (1)")
    assert shown(flash.delivered()) == ["insert 1,-,-"]
    writer = threading.Thread(
        target=flash.database.execute, args=["INSERT INTO items VALUES (2, 'a')"]
    )
    flash.database.execute(
        "ALTER SYSTEM SET synchronous_standby_names = 'absent'", "SELECT pg_reload_conf()"
    )
    try:
        flash.wait(lambda: flash.database.one("SHOW synchronous_standby_names") == "absent")
        writer.start()
        flash.wait(lambda: flash.publisher.queues.get("flash"))
        assert shown(flash.delivered()) == ["insert 2,a,-"]
        assert flash.database.one("SELECT max(id) FROM items") == 1
    finally:
        flash.database.execute(
            "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()"
        )
        writer.join(20)
    assert flash.database.one("SELECT max(id) FROM items") == 2


def test_handler_that_writes_its_own_table_receives_the_change(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    for _ in range(3):
        (change,) = flash.delivered()
        # As a handler would, for as long as there is something that differs.
        if change.new["note"] != "seen":
            flash.do(f"UPDATE items SET note = 'seen' WHERE id = {change.key['id']}")
        else:
            flash.do("UPDATE items SET note = 'seen' WHERE note IS DISTINCT FROM 'seen'")
            break
    assert flash.delivered() == []


def test_handlers_and_tables_can_be_combined_freely(flash):
    flash.database.execute(ITEMS, "CREATE TABLE others (id int PRIMARY KEY)")
    flash.handler("items", "insert", name="first").handler("items", "insert", name="second")
    from flash_celery import on_change

    @on_change("items", "insert")
    @on_change("others", "insert")
    @flash.app.task(name="both", shared=False)
    def both(change): ...

    flash.start()
    flash.do("INSERT INTO items VALUES (1)", "INSERT INTO others VALUES (2)")
    assert shown(flash.delivered("first")) == shown(flash.delivered("second")) == ["insert 1,-,-"]
    assert shown(flash.delivered("both")) == ["insert 1,-,-", "insert 2"]


def test_task_subscribed_twice_to_a_table_receives_two_ids(flash):
    flash.database.execute(ITEMS)
    from flash_celery import on_change

    @on_change("items", where={"name": "a"})
    @on_change("items", where={"note": "x"})
    @flash.app.task(name="handler", shared=False)
    def handler(change): ...

    flash.start()
    flash.do("INSERT INTO items VALUES (1, 'a', 'x'), (2, 'a', 'y'), (3, 'a', 'x')")
    changes = flash.delivered()
    assert [change.new["id"] for change in changes] == [1, 1, 2, 3, 3]
    assert len({change.id for change in changes}) == 5


def test_unknown_column_is_refused(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", fields=["nope"])
    with pytest.raises(SubscriptionError, match="handler: public.items has no column nope"):
        flash.start()


def test_key_of_a_deleted_row_is_delivered_with_any_identity(flash):
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, code text NOT NULL UNIQUE)",
        "ALTER TABLE items REPLICA IDENTITY USING INDEX items_code_key",
    )
    flash.handler("items")
    with pytest.raises(ReplicaIdentityMissing):
        flash.start(flash_replica_identity="keep")
    flash.error = None
    flash.start(flash_replica_identity="auto")
    flash.do("INSERT INTO items VALUES (1, 'x')", "DELETE FROM items")
    assert [change.key for change in flash.delivered()] == [{"id": 1}, {"id": 1}]


def test_condition_on_an_identity_column_that_is_not_sent_is_evaluated(flash):
    flash.database.execute("CREATE TABLE pairs (a int, b int, c int, PRIMARY KEY (a, b))")
    flash.handler("pairs", "delete", where={"b": 1}, key=["a"], fields=["a"])
    flash.start(flash_replica_identity="keep")
    flash.do("INSERT INTO pairs VALUES (1, 2, 3), (4, 1, 3)", "DELETE FROM pairs")
    assert [change.key for change in flash.delivered()] == [{"a": 4}]


def test_unhashable_values_work_in_a_condition(flash):
    flash.database.execute("CREATE TABLE tagged (id int PRIMARY KEY, tags text[], data jsonb)")
    flash.handler("tagged", "insert", where=[{"tags": ["a"]}, {"data": {"b": [1]}}]).start()
    flash.do(
        "INSERT INTO tagged VALUES (1, '{a}', NULL), (2, '{b}', '{\"b\": [1]}'), (3, NULL, NULL)"
    )
    assert [change.key["id"] for change in flash.delivered()] == [1, 2]


def test_json_too_deep_for_python_stops_nothing(flash):
    flash.database.execute("CREATE TABLE deep (data json)")
    flash.handler("deep", "insert").handler("deep", "insert", name="where", where={"data": {}})
    flash.start()
    flash.do("INSERT INTO deep SELECT (repeat('[', 5000) || repeat(']', 5000))::json")
    (change,) = flash.delivered()
    wanted = "[" * 5000 + "]" * 5000
    with suppress(RecursionError):  # from Python 3.14 on it can
        wanted = json.loads(wanted)
    assert change.new["data"] == wanted
    assert len(flash.delivered("where")) == 1


def test_unreadable_value_stops_nothing(flash):
    flash.database.execute("CREATE TABLE odd (id int, data json)")
    flash.database.execute("ALTER TABLE odd REPLICA IDENTITY FULL")
    flash.handler("odd").handler("odd", name="where", where={"data": {"a": 1}}).start()
    flash.do(
        """INSERT INTO odd VALUES (1, '1e9999999999999999999'),
        (2, '{"": 1e-9999999999999999999}'), (3, '"\\ud800"'),
        (4, ('1' || repeat('0', 6000))::json), (5, '{"a": 1}')"""
    )
    assert [change.new["id"] for change in flash.delivered()] == [1, 2, 3, 4, 5]
    # A row that cannot be evaluated is delivered.
    assert [change.new["id"] for change in flash.delivered("where")] == [1, 2, 5]
    flash.do("UPDATE odd SET data = '1e9999999999999999999' WHERE id IN (4, 5)")
    assert [type(change).__name__ for change in flash.delivered("where")] == ["Insert", "Update"]
