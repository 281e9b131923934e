"""Tables of every kind, and DDL while the replication worker runs."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import redis

from flash_celery.capture.lost_rows import LostRows
from flash_celery.changes.rows import Transaction
from flash_celery.errors import SubscriptionError
from flash_celery.messages import lane_entries
from flash_celery.postgres.source import Source
from flash_celery.protocol.lsn import Lsn
from flash_celery.provisioning import ddl, record
from flash_celery.publishing.brokers import for_app
from flash_celery.settings import Settings
from flash_celery.table_name import TableName
from flash_celery.worker.lost_tables import LostTables

from .conftest import Flash, shown

PARTED = """
CREATE TABLE parted (id int, at int, note text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (at);
CREATE TABLE parted_2a PARTITION OF parted_2 FOR VALUES FROM (10) TO (15);
CREATE TABLE parted_2b PARTITION OF parted_2 FOR VALUES FROM (15) TO (20);
"""


def wheres(changes):
    return [f"{c.operation.names()[0]} {c.table} {c.partition}" for c in changes]


def test_partition_changes_reach_handlers_of_root_middle_and_leaf(flash):
    flash.database.execute(PARTED)
    for name in ("parted", "parted_2", "parted_2a"):
        flash.handler(name, name=name)
    flash.start()
    flash.do(
        "INSERT INTO parted VALUES (1, 1), (2, 11)",
        "INSERT INTO parted_2b VALUES (3, 16)",
        "UPDATE parted SET note = 'x' WHERE id = 2",
        "DELETE FROM parted WHERE id = 1",
    )
    assert wheres(flash.delivered("parted")) == [
        "insert parted public.parted_1",
        "insert parted public.parted_2a",
        "insert parted public.parted_2b",
        "update parted public.parted_2a",
        "delete parted public.parted_1",
    ]
    assert wheres(flash.delivered("parted_2")) == [
        "insert parted_2 public.parted_2a",
        "insert parted_2 public.parted_2b",
        "update parted_2 public.parted_2a",
    ]
    assert [c.operation.names()[0] for c in flash.delivered("parted_2a")] == ["insert", "update"]


def test_truncate_of_a_leaf_and_of_the_root_is_delivered(flash):
    flash.database.execute(PARTED)
    flash.handler("parted", "truncate", name="root")
    flash.handler("parted_2", "truncate", name="middle")
    flash.handler("parted_1", "truncate", name="leaf").start()
    flash.do("TRUNCATE parted_1")
    assert wheres(flash.delivered("root")) == ["truncate parted public.parted_1"]
    assert [c.table for c in flash.delivered("leaf")] == ["parted_1"]
    assert flash.delivered("middle") == []
    flash.do("TRUNCATE parted")
    # PostgreSQL sends the partitions, and not what they are partitions of.
    assert wheres(flash.delivered("root")) == [
        "truncate parted public.parted_1",
        "truncate parted public.parted_2a",
        "truncate parted public.parted_2b",
    ]
    assert len(flash.delivered("leaf")) == 1
    assert len(flash.delivered("middle")) == 2


def test_row_moved_between_partitions_is_a_delete_and_an_insert(flash):
    flash.database.execute(PARTED)
    flash.handler("parted").start()
    flash.do("INSERT INTO parted VALUES (1, 1)", "UPDATE parted SET at = 11")
    assert wheres(flash.delivered()) == [
        "insert parted public.parted_1",
        "delete parted public.parted_1",
        "insert parted public.parted_2a",
    ]


def test_row_moved_between_partitions_reaches_handlers_of_leaves_and_root(flash):
    flash.database.execute(PARTED)
    for name in ("parted", "parted_2", "parted_1", "parted_2a"):
        flash.handler(name, name=name)
    flash.start()
    flash.do(
        "INSERT INTO parted VALUES (1, 1)",
        "UPDATE parted SET at = 11",
        "UPDATE parted SET at = 16",
    )
    kinds = {
        name: [c.operation.names()[0] for c in flash.delivered(name)]
        for name in ("parted", "parted_2", "parted_1", "parted_2a")
    }
    assert kinds == {
        "parted": ["insert", "delete", "insert", "delete", "insert"],
        "parted_2": ["insert", "delete", "insert"],
        "parted_1": ["insert", "delete"],
        "parted_2a": ["insert", "delete"],
    }


def test_partition_tree_with_another_column_order_can_be_attached(flash):
    flash.database.execute(PARTED)
    flash.handler("parted", where={"note": "in"}, fields=["id", "note"], key=["id"]).start()
    flash.database.execute(
        "CREATE TABLE late (gone int, note text, at int NOT NULL, id int NOT NULL) "
        "PARTITION BY RANGE (id)",
        "CREATE TABLE late_1 (id int NOT NULL, gone int, note text, more int, at int NOT NULL)",
        "ALTER TABLE late_1 DROP more",
        "ALTER TABLE late ATTACH PARTITION late_1 FOR VALUES FROM (0) TO (100)",
        "ALTER TABLE late DROP gone",
        "ALTER TABLE parted ATTACH PARTITION late FOR VALUES FROM (20) TO (30)",
    )
    full = "SELECT relreplident FROM pg_class WHERE relname = 'late_1'"
    flash.wait(lambda: flash.database.one(full) == "f")
    flash.do(
        "INSERT INTO parted VALUES (1, 21, 'in'), (2, 22, 'out')",
        "UPDATE parted SET note = 'in' WHERE id = 2",
        "UPDATE parted SET id = 3 WHERE id = 2",
        "UPDATE parted SET at = 11 WHERE id = 1",
        "UPDATE parted SET note = 'out'",
    )
    changes = flash.delivered()
    rows = [c.new if hasattr(c, "new") else c.old for c in changes]
    assert [
        (c.operation.names()[0], c.partition, row["id"], row["note"])
        for c, row in zip(changes, rows, strict=True)
    ] == [
        ("insert", "public.late_1", 1, "in"),
        ("insert", "public.late_1", 2, "in"),
        ("delete", "public.late_1", 2, "in"),
        ("insert", "public.late_1", 3, "in"),
        ("delete", "public.late_1", 1, "in"),
        ("insert", "public.parted_2a", 1, "in"),
        ("delete", "public.parted_2a", 1, "in"),
        ("delete", "public.late_1", 3, "in"),
    ]


def test_truncate_cascading_to_a_partitioned_table_is_delivered(flash):
    flash.database.execute(
        PARTED,
        "CREATE TABLE others (id int PRIMARY KEY)",
        "ALTER TABLE parted ADD other serial REFERENCES others",
    )
    flash.handler("parted", "insert|truncate").handler("others", "insert", name="others").start()
    flash.do(
        "INSERT INTO others VALUES (1)",
        "INSERT INTO parted (id, at, note) VALUES (1, 1, '')",
        "TRUNCATE others RESTART IDENTITY CASCADE",
        "INSERT INTO others VALUES (1)",
        "INSERT INTO parted (id, at, note) VALUES (1, 1, '')",
    )
    changes = flash.delivered()
    assert wheres(changes) == [
        "insert parted public.parted_1",
        "truncate parted public.parted_1",
        "truncate parted public.parted_2a",
        "truncate parted public.parted_2b",
        "insert parted public.parted_1",
    ]
    assert [changes[place].new["other"] for place in (0, 4)] == [1, 1]
    assert len({change.id for change in changes}) == 5
    assert shown(flash.delivered("others")) == ["insert 1", "insert 1"]


def test_partition_attached_and_detached_while_running_is_followed(flash):
    flash.database.execute(PARTED)
    flash.handler("parted", fields=["note"]).start()
    flash.do(
        "CREATE TABLE late (id int NOT NULL, at int NOT NULL, note text)",
        "ALTER TABLE parted ATTACH PARTITION late FOR VALUES FROM (20) TO (30)",
        "INSERT INTO parted VALUES (1, 21, 'a')",
    )
    full = "SELECT relreplident FROM pg_class WHERE relname = 'late'"
    flash.wait(lambda: flash.database.one(full) == "f")
    flash.do("UPDATE late SET id = 2", "UPDATE late SET note = 'b'")
    changes = flash.delivered()
    assert shown(changes) == ["insert a", "update a -> b"]
    assert changes[0].partition == "public.late"
    reader = flash.database.one(flash.slot("active_pid"))
    flash.do("ALTER TABLE parted DETACH PARTITION late")
    # 14 sends its rows until the stream is restarted, once the worker has noticed.
    flash.wait(lambda: flash.database.one(flash.slot("active_pid")) not in (reader, None))
    flash.do("INSERT INTO late VALUES (3, 22, 'c')")
    flash.do("UPDATE late SET note = 'd'", "DELETE FROM late")
    assert flash.delivered() == []


@pytest.mark.parametrize("ordered", ["id", True])
def test_row_that_moves_to_another_partition_keeps_its_lane_if_the_key_allows(
    flash, valkey, ordered
):
    flash.database.execute(PARTED, "INSERT INTO parted VALUES (1, 1)")
    with redis.Redis(port=valkey.port) as client:
        client.flushall()
        flash.app.conf.broker_url = f"redis://127.0.0.1:{valkey.port}/0"
        flash.handler("parted", ordered=ordered)
        flash.publisher = for_app(flash.app)
        flash.start().do("UPDATE parted SET at = 11", "UPDATE parted SET at = 2")
        flash.stop()
        lanes = [key for key in client.scan_iter() if re.search(rb"\.\d+$", key)]
        entries = [map(lane_entries.decode, client.lrange(key, 0, -1)) for key in lanes]
    moved = [[each for entry in lane for each in shown(entry.changes)] for lane in entries]
    away, back = ["delete 1,1", "insert 1,11,-"], ["delete 1,11", "insert 1,2,-"]
    assert sorted(each for lane in moved for each in lane) == sorted(away + back)
    # The primary key has the partitioning column.
    assert moved == [away + back] if ordered == "id" else len(moved) > 1


def test_partition_created_while_running_is_delivered_at_once(flash):
    flash.database.execute(PARTED)
    flash.handler("parted", "insert").start()
    flash.do(
        "CREATE TABLE late PARTITION OF parted FOR VALUES FROM (20) TO (30)",
        "INSERT INTO parted VALUES (1, 25)",
    )
    assert wheres(flash.delivered()) == ["insert parted public.late"]


def test_inheritance_is_not_partitioning(flash):
    flash.database.execute(
        "CREATE TABLE parent (id int PRIMARY KEY)", "CREATE TABLE child () INHERITS (parent)"
    )
    flash.handler("parent").start()
    flash.do("INSERT INTO parent VALUES (1)", "INSERT INTO child VALUES (2)")
    assert shown(flash.delivered()) == ["insert 1"]


def test_inheritance_parent_and_children_are_delivered_by_their_own_names(flash):
    flash.database.execute(
        "CREATE TABLE parent (id int PRIMARY KEY)",
        "CREATE TABLE child (name text) INHERITS (parent)",
    )
    flash.handler("parent").handler("child", name="child").start()
    flash.do(
        "INSERT INTO parent VALUES (1)",
        "INSERT INTO child VALUES (2, 'a')",
        "UPDATE parent SET id = id + 10",
        "TRUNCATE parent",
        "INSERT INTO child VALUES (3, 'b')",
        "TRUNCATE ONLY parent",
        "DELETE FROM parent",
    )
    parent, child = flash.delivered(), flash.delivered("child")
    assert shown(parent) == ["insert 1", "update 1 -> 11", "truncate", "truncate"]
    # It has no primary key of its own, so its identity is FULL.
    assert shown(child) == [
        "insert 2,a",
        "update 2,a -> 12,a",
        "truncate",
        "insert 3,b",
        "delete 3,b",
    ]
    assert {change.partition for change in (*parent, *child)} == {None}


NAMES = [
    *("UPPER", "Sales Dept", "has.dot", 'q"q', "'s", "naïve ☕ 🙂", "select"),
    # As long as a name may be: 63 bytes.
    *("x" * 63, "🙂" * 15 + "x.X"),
]


def test_table_and_column_names_can_be_any_text(flash):
    for number, name in enumerate(NAMES):
        quoted = '"' + name.replace('"', '""') + '"'
        flash.database.execute(
            f"CREATE SCHEMA {quoted}",
            f"CREATE TABLE {quoted}.{quoted} ({quoted} int PRIMARY KEY, other text)",
        )
        flash.handler(f"{quoted}.{quoted}", name=str(number), where={f"{name}__gt": 0})
    flash.start()
    for number, name in enumerate(NAMES):
        quoted = '"' + name.replace('"', '""') + '"'
        flash.do(f"INSERT INTO {quoted}.{quoted} VALUES (1, 'x')")
        (change,) = flash.delivered(str(number))
        assert (change.schema, change.table, change.new[name]) == (name, name, 1)
        assert change.key == {name: 1}


def test_generated_and_identity_columns_are_delivered(flash):
    flash.database.execute(
        "CREATE TABLE made (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a int, "
        "b int GENERATED ALWAYS AS (a * 2) STORED)"
    )
    flash.handler("made", fields=["a"], name="a").handler("made", name="all").start()
    flash.do("INSERT INTO made (a) VALUES (5)", "UPDATE made SET a = 6", "DELETE FROM made")
    assert shown(flash.delivered("a")) == ["insert 5", "update 5 -> 6", "delete 6"]
    insert, update, _ = flash.delivered("all")
    published = flash.database.one("SHOW server_version_num") >= "180000"
    assert dict(insert.new) == {"id": 1, "a": 5, **({"b": 10} if published else {})}
    assert update.new["a"] == 6


@pytest.mark.parametrize("named", [{"fields": ["b"]}, {"where": {"b": 10}}, {"key": ["b"]}])
def test_stored_column_is_delivered_or_refused(flash, named):
    flash.database.execute(
        "CREATE TABLE made (id int PRIMARY KEY, a int, "
        "b int NOT NULL GENERATED ALWAYS AS (a * 2) STORED)"
    )
    flash.handler("made", **named)
    if flash.database.one("SHOW server_version_num") < "180000":
        with pytest.raises(SubscriptionError, match=r"made\.b is a generated column"):
            flash.start()
        return
    flash.start()
    flash.do("INSERT INTO made (id, a) VALUES (1, 5)", "DELETE FROM made")
    insert, delete = flash.delivered()
    assert (insert.new["b"], delete.old["b"]) == (10, 10)


@pytest.mark.parametrize("named", [{"fields": ["b"]}, {"where": {"b": 10}}, {"key": ["b"]}])
def test_virtual_column_in_fields_is_refused(flash, named):
    if flash.database.one("SHOW server_version_num") < "180000":
        return
    flash.database.execute(
        "CREATE TABLE made (id int PRIMARY KEY, a int, b int GENERATED ALWAYS AS (a * 2) VIRTUAL)"
    )
    flash.handler("made", "insert", **named)
    with pytest.raises(SubscriptionError, match=r"made\.b is a generated column.*is computed from"):
        flash.start()
    assert flash.database.one("SELECT count(*) FROM pg_publication") == 0


REFUSED = {
    "view": "CREATE VIEW goods AS SELECT 1 AS id",
    "materialized view": "CREATE MATERIALIZED VIEW goods AS SELECT 1 AS id",
    "foreign table": "CREATE FOREIGN DATA WRAPPER none;"
    "CREATE SERVER far FOREIGN DATA WRAPPER none;"
    "CREATE FOREIGN TABLE goods (id int) SERVER far",
    "unlogged": "CREATE UNLOGGED TABLE goods (id int PRIMARY KEY)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_without_changes_in_the_wal_are_refused(flash, kind):
    flash.database.execute(REFUSED[kind])
    flash.handler("goods", "insert")
    with pytest.raises(SubscriptionError, match=f"handler: public.goods is .*{kind}"):
        flash.start()
    assert flash.database.one("SELECT count(*) FROM pg_publication") == 0


@pytest.mark.parametrize("how", ["before", "running", "altered"])
def test_unlogged_partition_is_refused_also_when_added_later(flash, how):
    running = how != "before"
    late = "TABLE late PARTITION OF parted FOR VALUES FROM (20) TO (30)"
    flash.database.execute(PARTED)
    if how == "altered":
        flash.database.execute(f"CREATE {late}")
    flash.handler("parted", "insert")
    if running:
        flash.start()
        flash.do("INSERT INTO parted VALUES (1, 1)")
    flash.database.execute(
        "ALTER TABLE late SET UNLOGGED" if how == "altered" else f"CREATE UNLOGGED {late}"
    )
    with pytest.raises(SubscriptionError, match=r'late is unlogged.*"public"."late" SET LOGGED'):
        flash.wait(lambda: False) if running else flash.start()
    flash.stop()
    flash.error = None
    flash.database.execute("ALTER TABLE late SET LOGGED", "INSERT INTO parted VALUES (2, 21)")
    flash.start()
    flash.do("INSERT INTO parted VALUES (3, 22)")
    assert [change.new["id"] for change in flash.delivered()] == ([1, 2, 3] if running else [3])


IDENTITY = "SELECT relreplident::text FROM pg_class WHERE relname = 'part'"


def test_partitioned_table_that_loses_its_key_stops_the_worker_only(flash):
    flash.database.execute(
        "CREATE TABLE parts (id int CONSTRAINT key PRIMARY KEY, note text) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parts FOR VALUES FROM (0) TO (10)",
    )
    flash.handler("parts").start()
    flash.do("INSERT INTO parts VALUES (1, 'a')")
    flash.database.execute("ALTER TABLE parts DROP CONSTRAINT key")
    with pytest.raises(SubscriptionError, match="parts is partitioned and has no primary key"):
        flash.wait(lambda: False)
    flash.database.execute("UPDATE parts SET note = 'b'", "ALTER TABLE parts ADD PRIMARY KEY (id)")
    flash.stop()
    flash.error = None
    flash.start()
    flash.wait(lambda: flash.database.one(IDENTITY) == "d")
    flash.do("UPDATE parts SET note = 'c'")
    assert shown(flash.delivered()) == ["insert 1,a", "update 1,a -> 1,b", "update 1 -> 1,c"]


def test_partition_that_loses_its_identity_index_gets_another(flash):
    flash.database.execute(
        "CREATE TABLE parts (id int PRIMARY KEY, note text NOT NULL) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parts FOR VALUES FROM (0) TO (10)",
        "CREATE UNIQUE INDEX by_note ON part (id, note)",
        "ALTER TABLE part REPLICA IDENTITY USING INDEX by_note",
    )
    flash.handler("parts").start()
    flash.do("INSERT INTO parts VALUES (1, 'a')", "DROP INDEX by_note")
    flash.wait(lambda: flash.database.one(IDENTITY) == "f")
    flash.do("UPDATE parts SET note = 'b'")
    assert shown(flash.delivered()) == ["insert 1,a", "update 1,a -> 1,b"]


def test_virtual_column_beside_others_is_ignored(flash):
    if flash.database.one("SHOW server_version_num") < "180000":
        return  # there are none before
    flash.database.execute(
        "CREATE TABLE made (id int PRIMARY KEY, a int, b int GENERATED ALWAYS AS (a * 2) VIRTUAL)"
    )
    flash.handler("made").start()
    flash.do("INSERT INTO made (id, a) VALUES (1, 5)", "UPDATE made SET a = 6")
    assert shown(flash.delivered()) == ["insert 1,5", "update 1 -> 1,6"]


def test_virtual_column_under_full_is_refused(flash):
    if flash.database.one("SHOW server_version_num") < "180000":
        return
    flash.database.execute(
        "CREATE TABLE made (id int PRIMARY KEY, a int, b int GENERATED ALWAYS AS (a * 2) VIRTUAL)"
    )
    flash.handler("made", fields=["a"])
    from flash_celery.errors import ReplicaIdentityMissing

    with pytest.raises(ReplicaIdentityMissing, match="virtual column b"):
        flash.start()
    flash.database.execute("INSERT INTO made (id) VALUES (1)", "UPDATE made SET a = 1")


@pytest.mark.parametrize("push_down", [False, True])
def test_virtual_column_added_under_full_stops_the_worker_only(flash, push_down):
    if flash.database.one("SHOW server_version_num") < "180000":
        return
    flash.database.execute("CREATE TABLE made (id int PRIMARY KEY, a int)")
    flash.handler("made", where={"a__gt": 1}).start(flash_push_down=push_down)
    flash.do("INSERT INTO made VALUES (1, 5)")
    flash.database.execute("ALTER TABLE made ADD b int GENERATED ALWAYS AS (a * 2) VIRTUAL")
    flash.thread.join(20)
    assert "virtual column b" in str(flash.error)
    flash.database.execute("UPDATE made SET a = 7", "UPDATE made SET a = 0")
    flash.error = None
    flash.database.execute("ALTER TABLE made DROP b")
    flash.start()
    flash.do("INSERT INTO made VALUES (2, 5)", "UPDATE made SET a = 0 WHERE id = 2")
    # The old rows of the writes in between are unknown; nothing is lost.
    delivered = shown(flash.delivered())
    assert delivered[0] == "insert 1,5"
    assert delivered[1].startswith("update")
    assert delivered[1].endswith("1,7")
    assert delivered[-2:] == ["insert 2,5", "delete 2,5"]


def test_partition_dropped_during_the_set_up_does_not_end_it(flash, monkeypatch, caplog):
    monkeypatch.setattr(ddl, "LOCK_TIMEOUT", "50ms")
    caplog.set_level("WARNING")
    flash.database.execute(
        "CREATE TABLE logs (id int PRIMARY KEY, note text) PARTITION BY LIST (id)",
        *(f"CREATE TABLE logs_{n} PARTITION OF logs FOR VALUES IN ({n})" for n in (1, 2, 3)),
    )
    flash.handler("logs", fields=["note"])
    with flash.database.connect() as reader, ThreadPoolExecutor(1) as pool:
        reader.execute("BEGIN")
        reader.execute("SELECT FROM logs_1")
        started = pool.submit(flash.start)
        flash.wait(lambda: '"logs_1" REPLICA IDENTITY FULL waits for' in caplog.text)
        flash.database.execute("DROP TABLE logs_2")
        reader.execute("ROLLBACK")
        started.result()
    flash.do("INSERT INTO logs VALUES (3, 'a')", "UPDATE logs SET note = 'b'")
    assert shown(flash.delivered()) == ["insert a", "update a -> b"]


@pytest.mark.parametrize("how", ["REPACK", "REPACK (CONCURRENTLY)"])
def test_table_that_is_repacked_is_followed(flash, how):
    if flash.database.one("SHOW server_version_num") < "190000":
        return  # REPACK is new there
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    flash.handler("items").start()
    flash.do("INSERT INTO items VALUES (1, 'a')", f"{how} items", "UPDATE items SET name = 'b'")
    assert shown(flash.delivered()) == ["insert 1,a", "update 1 -> 1,b"]


def test_table_of_1600_columns_is_delivered(flash):
    columns = ", ".join(f"c{n} int" for n in range(1599))
    flash.database.execute(f"CREATE TABLE wide (id int PRIMARY KEY, {columns})")
    flash.handler("wide").start()
    flash.do("INSERT INTO wide (id, c0, c1598) VALUES (1, 2, 3)")
    (change,) = flash.delivered()
    assert len(change.new) == 1600
    assert (change.new["c0"], change.new["c7"], change.new["c1598"]) == (2, None, 3)


def test_row_of_100_mb_is_delivered(flash):
    flash.database.execute("CREATE TABLE heavy (id int PRIMARY KEY, body bytea)")
    flash.handler("heavy", "insert").start()
    flash.do("INSERT INTO heavy SELECT 1, decode(repeat('ab', 50000000), 'hex')")
    (change,) = flash.delivered()
    assert len(change.new["body"]) == 50_000_000


def test_text_of_100_mb_is_delivered(flash):
    flash.database.execute("CREATE TABLE heavy (id int PRIMARY KEY, body text)")
    flash.handler("heavy", "insert").start()
    flash.do("INSERT INTO heavy SELECT 1, repeat('0123456789', 10000000)")
    (change,) = flash.delivered()
    assert change.new["body"] == "0123456789" * 10_000_000


def test_truncate_of_several_tables_some_foreign_is_delivered(flash):
    flash.database.execute(
        "CREATE TABLE ta (id int PRIMARY KEY)",
        "CREATE TABLE tb (id int PRIMARY KEY, a int REFERENCES ta)",
        "CREATE TABLE tc (id int PRIMARY KEY)",
    )
    flash.handler("ta", name="a").handler("tb", "insert", name="b").handler("tc", name="c").start()
    flash.do("TRUNCATE tb, ta, tc RESTART IDENTITY", "TRUNCATE ta CASCADE")
    a, c = flash.delivered("a"), flash.delivered("c")
    assert shown(a) == ["truncate", "truncate"]
    assert shown(c) == ["truncate"]
    assert flash.delivered("b") == []
    assert len({change.id for change in (*a, *c)}) == 3


def test_columns_altered_while_running_are_followed(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, a int, b text)")
    flash.handler("items", fields=["a"], name="a").handler("items", name="all").start()
    flash.do(
        "INSERT INTO items VALUES (1, 1, 'x')",
        "ALTER TABLE items ADD c int DEFAULT 5",
        "UPDATE items SET a = 2",
        "ALTER TABLE items DROP b",
        "UPDATE items SET a = 3",
        "ALTER TABLE items RENAME c TO d",
        "UPDATE items SET a = 4",
        "ALTER TABLE items ALTER a TYPE text",
        "UPDATE items SET a = '5'",
    )
    assert [change.new["a"] for change in flash.delivered("a")] == [1, 2, 3, 4, "5"]
    assert [dict(change.new) for change in flash.delivered("all")] == [
        {"id": 1, "a": 1, "b": "x"},
        {"id": 1, "a": 2, "b": "x", "c": 5},
        {"id": 1, "a": 3, "c": 5},
        {"id": 1, "a": 4, "d": 5},
        {"id": 1, "a": "5", "d": 5},
    ]


@pytest.mark.parametrize("ddl", ["DROP name", "RENAME name TO title"])
def test_handler_column_that_disappears_stops_the_worker_and_loses_nothing(flash, ddl):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    flash.handler("items", "insert", where={"name": "a"}).start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    flash.database.execute(f"ALTER TABLE items {ddl}", "INSERT INTO items VALUES (2)")
    with pytest.raises(SubscriptionError, match=r"handler .*name"):
        flash.wait(lambda: False)
    flash.thread.join(30)
    assert not flash.thread.is_alive()
    assert shown(flash.delivered()) == ["insert 1,a"]
    assert flash.database.one(flash.slot("count(*)")) == 1


def test_recreated_table_is_delivered_again(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    flash.handler("items", where={"name": "a"}).start()
    flash.do("INSERT INTO items VALUES (1, 'a')")
    with flash.database.connect() as connection, connection.transaction():
        connection.execute("DROP TABLE items")
        connection.execute("CREATE TABLE items (id int PRIMARY KEY, name text, more int)")
    published = "SELECT count(*) FROM pg_publication_tables WHERE tablename = 'items'"
    flash.wait(lambda: flash.database.one(published) == 4)
    flash.do("INSERT INTO items VALUES (2, 'a', 5)", "UPDATE items SET name = 'b'")
    assert shown(flash.delivered()) == ["insert 1,a", "insert 2,a,5", "delete 2,a,5"]


def test_renamed_table_stops_the_worker_and_loses_nothing(flash, new_app):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items").start()
    flash.do("INSERT INTO items VALUES (1)")
    flash.database.execute("ALTER TABLE items RENAME TO goods", "INSERT INTO goods VALUES (2)")
    with pytest.raises(SubscriptionError, match="handler: there is no table public.items"):
        flash.wait(lambda: False)
    renamed = Flash(flash.database, new_app())
    try:
        renamed.handler("goods").start()
        renamed.do("INSERT INTO goods VALUES (3)")
        assert shown(renamed.delivered()) == ["insert 2", "insert 3"]
    finally:
        renamed.stop()


@pytest.mark.parametrize(
    ("ddl", "name"),
    [
        ("ALTER TABLE items RENAME TO goods", "goods"),
        ("ALTER TABLE items SET SCHEMA shop", "shop.items"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"where": {"n": 2}}], ids=["plain", "where"])
def test_rows_written_before_a_table_and_its_handler_were_renamed_are_delivered(
    flash, new_app, ddl, name, options
):
    """A deploy: the replication worker stops, and its table gets another name."""
    flash.database.execute(
        "CREATE SCHEMA shop",
        "CREATE TABLE items (id int PRIMARY KEY, n int)",
        "ALTER TABLE items REPLICA IDENTITY FULL",
    )
    flash.handler("items", **options).start()
    flash.do("INSERT INTO items VALUES (1, 2)")
    flash.stop()
    flash.database.execute(
        "INSERT INTO items VALUES (2, 2)", "UPDATE items SET id = 3 WHERE id = 1", ddl
    )
    flash.database.execute(f"INSERT INTO {name} VALUES (4, 2)")
    renamed = Flash(flash.database, new_app())
    try:
        renamed.handler(name, **options).start()
        renamed.do(f"INSERT INTO {name} VALUES (5, 2)")
        changes = renamed.delivered()
        assert [row for row in shown(changes) if "insert" in row] == [
            "insert 2,2",
            "insert 4,2",
            "insert 5,2",
        ]
        assert {(change.partition, str(change.table)) for change in changes} == {
            (None, name.rpartition(".")[2])
        }
    finally:
        renamed.stop()


def test_rows_of_a_table_that_was_renamed_and_dropped_are_reported_lost(flash, new_app, caplog):
    """Nothing in PostgreSQL tells any more what the table was called last."""
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items").start()
    flash.do("INSERT INTO items VALUES (1)")
    flash.stop()
    oid = flash.database.one("SELECT 'items'::regclass::oid::int8")
    flash.database.execute(
        "INSERT INTO items VALUES (2), (3)",
        "DELETE FROM items WHERE id = 2",
        "ALTER TABLE items RENAME TO goods",
        "DROP TABLE goods",
        "CREATE TABLE goods (id int PRIMARY KEY)",
    )
    for number in (1, 2):
        renamed = Flash(flash.database, new_app())
        try:
            renamed.handler("goods").start()
            renamed.do(f"INSERT INTO goods VALUES ({number})")
            assert shown(renamed.delivered()) == [f"insert {number}"]
        finally:
            renamed.stop()
    assert caplog.text.count("3 rows of public.items, committed from") == 1
    with flash.database.connect() as connection:
        source = Source(connection, Settings.from_app(flash.app))
        (gap,) = record.read_record(source).gaps
        # A session that was killed before it has acknowledged them reads them again.
        table, _, reason = gap["reason"].removeprefix("rows of ").partition(": ")
        first = Transaction(Lsn.parse(gap["since"]), 1, 0)
        LostTables().found(source, LostRows(TableName.parse(table), reason, first))
        assert record.read_record(source).gaps == [gap]
        # A worker that ends before it has read them leaves that to the next.
        assert record.published_tables(source).orphans == {oid}
    assert gap["reason"].startswith("rows of public.items: the table was dropped before they were")
    assert Lsn.parse(gap["since"]) < Lsn.parse(gap["until"])


def test_table_swapped_by_renaming_is_followed(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items").start()
    with flash.database.connect() as connection, connection.transaction():
        connection.execute("ALTER TABLE items RENAME TO items_old")
        connection.execute("CREATE TABLE items (id int PRIMARY KEY, n int)")
    published = "SELECT string_agg(DISTINCT tablename, ',') FROM pg_publication_tables"
    flash.wait(lambda: flash.database.one(published) == "items")
    flash.do("INSERT INTO items VALUES (1, 2)", "INSERT INTO items_old VALUES (7)")
    assert shown(flash.delivered()) == ["insert 1,2"]


def test_key_that_is_stored_out_of_line_is_known_in_updates(flash):
    """PostgreSQL does not send it in the new row, only as the old key."""
    flash.database.execute(
        "CREATE TABLE items (id text PRIMARY KEY, n int)",
        "ALTER TABLE items ALTER id SET STORAGE EXTERNAL",
    )
    flash.handler("items", "update", name="plain", key=["id"])
    flash.handler("items", name="chosen", where={"id__startswith": "a"})
    flash.start()
    flash.database.execute("ALTER TABLE items REPLICA IDENTITY DEFAULT")
    keys = ["a" * 2500, "b" * 2500]
    flash.do(
        *(f"INSERT INTO items VALUES ('{key}', 0)" for key in keys),
        "UPDATE items SET n = 1",
    )
    plain = flash.delivered("plain")
    assert [change.key["id"] for change in plain] == keys
    assert [dict(change.new) for change in plain] == [{"id": key, "n": 1} for key in keys]
    chosen = flash.delivered("chosen")
    assert [(c.operation.names()[0], c.key["id"][0]) for c in chosen] == [
        ("insert", "a"),
        ("update", "a"),
    ]


def test_dropped_type_is_text(flash):
    flash.database.execute(
        "CREATE TYPE mood AS ENUM ('ok')", "CREATE TABLE items (id int PRIMARY KEY, m mood)"
    )
    flash.handler("items", "insert").start()
    flash.stop()
    flash.database.execute(
        "INSERT INTO items VALUES (1, 'ok')",
        "ALTER TABLE items ALTER m TYPE text",
        "DROP TYPE mood",
    )
    flash.start()
    flash.do("SELECT 1")
    assert shown(flash.delivered()) == ["insert 1,ok"]


def test_composite_type_altered_while_running_is_followed(flash):
    flash.database.execute(
        "CREATE TYPE inner_pair AS (l int, r text)",
        "CREATE DOMAIN pairs AS inner_pair[]",
        "CREATE TYPE pair AS (l int, many pairs)",
        "CREATE TABLE items (id serial PRIMARY KEY, p pair)",
    )
    flash.handler("items", "insert").start()
    flash.do("INSERT INTO items (p) VALUES (ROW(1, ARRAY[ROW(1, 'a')::inner_pair]))")
    assert flash.delivered()[0].new["p"] == {"l": 1, "many": [{"l": 1, "r": "a"}]}

    def described(value, row, otherwise):
        flash.do(f"INSERT INTO items (p) VALUES ({row})")
        (change,) = flash.delivered()
        assert change.new["p"] in (value, otherwise)
        return change.new["p"] == value

    flash.database.execute("ALTER TYPE inner_pair ADD ATTRIBUTE x int")
    expected = {"l": 1, "many": [{"l": 1, "r": "a", "x": 3}]}
    row = "ROW(1, ARRAY[ROW(1, 'a', 3)::inner_pair])"
    flash.wait(lambda: described(expected, row, {"l": 1, "many": ["(1,a,3)"]}))
    flash.database.execute("ALTER TYPE inner_pair DROP ATTRIBUTE l")
    expected = {"l": 1, "many": [{"r": "a", "x": 3}]}
    row = "ROW(1, ARRAY[ROW('a', 3)::inner_pair])"
    flash.wait(lambda: described(expected, row, {"l": 1, "many": ["(a,3)"]}))


def test_rows_of_retyped_columns_pass_a_condition_that_no_longer_fits(flash):
    flash.database.execute(
        "CREATE TYPE mood AS ENUM ('ok')", "CREATE TABLE items (id int PRIMARY KEY, m mood, n int)"
    )
    flash.handler("items", "insert", where={"m": "ok"})
    flash.handler("items", "insert", name="number", where={"n__isnull": True}).start()
    flash.stop()
    flash.database.execute(
        "INSERT INTO items VALUES (1, 'ok', 7)",
        "ALTER TABLE items ALTER m TYPE text, ALTER n TYPE text",
        "DROP TYPE mood",
        "INSERT INTO items VALUES (2, 'bad', 'seven'), (3, 'ok', 'six')",
    )
    again(flash, name="number", where={"n": "seven"})
    flash.do("SELECT 1")
    assert shown(flash.delivered()) == ["insert 1,ok,7", "insert 3,ok,six"]
    assert shown(flash.delivered("number")) == ["insert 1,ok,7", "insert 2,bad,seven"]


@pytest.mark.parametrize(
    "gone", ["DROP TABLE parted_1", "ALTER TABLE parted DETACH PARTITION parted_1"]
)
def test_rows_of_a_partition_dropped_before_reading_are_delivered(flash, gone):
    flash.database.execute(PARTED)
    flash.handler("parted", "insert").start()
    flash.stop()
    flash.database.execute("INSERT INTO parted VALUES (1, 1, 'a')", gone)
    flash.start()
    flash.do("INSERT INTO parted VALUES (2, 11, 'b')")
    changes = flash.delivered()
    assert wheres(changes) == [
        "insert parted public.parted_1",
        "insert parted public.parted_2a",
    ]
    assert changes[0].new["note"] == "a"


TWO_TREES = """
CREATE TABLE one (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE two (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE leaf PARTITION OF one FOR VALUES FROM (0) TO (100);
"""
MOVE = (
    "ALTER TABLE one DETACH PARTITION leaf",
    "ALTER TABLE two ATTACH PARTITION leaf FOR VALUES FROM (0) TO (100)",
)


@pytest.mark.parametrize("handled", [False, True])
def test_row_is_delivered_to_the_parents_its_partition_had_when_written(flash, handled):
    flash.database.execute(TWO_TREES)
    flash.handler("one", "insert", name="one")
    if handled:
        flash.handler("two", "insert", name="two")
    flash.start().stop()
    flash.database.execute("INSERT INTO leaf VALUES (1)", *MOVE, "INSERT INTO leaf VALUES (2)")
    flash.start()
    flash.do("INSERT INTO leaf VALUES (3)")
    delivered = shown(flash.delivered("one")), shown(flash.delivered("two"))
    if handled:  # no snapshot lies between the first two: deliver to both
        assert delivered == (["insert 1", "insert 2"], ["insert 1", "insert 2", "insert 3"])
    else:  # PostgreSQL 14 does not notice that the second one is unpublished
        old = flash.database.one("SHOW server_version_num") < "150000"
        assert delivered == (["insert 1", "insert 2"] if old else ["insert 1"], [])


LATE = (
    "CREATE TABLE late PARTITION OF one FOR VALUES FROM (100) TO (200)",
    "INSERT INTO one VALUES (101)",
)


@pytest.mark.parametrize(
    "unseen",
    [
        (*LATE, "DROP TABLE late"),
        (*LATE, "ALTER TABLE one DETACH PARTITION late"),
        ("; ".join((*LATE, "ALTER TABLE one DETACH PARTITION late")),),
    ],
    ids=["dropped", "detached", "in one transaction"],
)
@pytest.mark.parametrize("alike", [False, True])
def test_rows_of_a_partition_that_came_and_went_unseen_are_delivered(flash, unseen, alike, caplog):
    """They are the only table's that it can have been part of; or else that is said."""
    flash.database.execute(TWO_TREES, "CREATE TABLE plain (id int PRIMARY KEY)")
    flash.handler("one", "insert").handler("plain", "insert", name="plain")
    if alike:
        flash.handler("two", "insert", name="two")
    flash.start().stop()
    flash.database.execute(*unseen)
    flash.start()
    flash.do("INSERT INTO one VALUES (1)")
    assert shown(flash.delivered()) == (["insert 1"] if alike else ["insert 101", "insert 1"])
    assert flash.delivered("two") == []
    flash.stop()
    found = [(r.levelname, r.message) for r in caplog.records if "public.late" in r.message]
    assert [level for level, _ in found] == (["ERROR", "ERROR"] if alike else ["WARNING"])
    if alike:
        gap, counted = (message for _, message in found)
        assert "are missing" in gap
        assert counted.startswith("1 row of public.late, committed from ")


def test_rows_of_a_removed_handler_reach_no_other(flash, new_app, caplog):
    from .conftest import Flash

    flash.database.execute(TWO_TREES, "CREATE TABLE plain (id int PRIMARY KEY)")
    flash.handler("one", "insert").handler("plain", "insert", name="plain")
    flash.handler("two", "insert", name="two").start().stop()
    flash.database.execute(
        "INSERT INTO plain VALUES (1)",
        "CREATE TABLE late PARTITION OF two FOR VALUES FROM (0) TO (100)",
        "INSERT INTO two VALUES (1)",
    )
    fewer = Flash(flash.database, new_app("fewer")).handler("one", "insert").start()
    try:
        fewer.do("INSERT INTO one VALUES (2)")
    finally:
        fewer.stop()
    assert shown(fewer.delivered()) == ["insert 2"]
    warnings = [line for line in caplog.messages if "for a handler that is gone" in line]
    assert [line.split()[2] for line in warnings] == ["public.plain", "public.late"]


def test_rows_that_an_open_transaction_wrote_before_a_handler_was_there_are_a_gap(
    flash, new_app, caplog
):
    """PostgreSQL does not send them, however late they are committed; a backfill delivers them."""
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY)",
        "CREATE TABLE orders (id int PRIMARY KEY)",
        "CREATE TABLE refunds (id int PRIMARY KEY)",
    )
    flash.handler("items").start().stop()
    more = Flash(flash.database, new_app("more"))
    more.handler("items").handler("orders", name="orders")
    more.handler("refunds", name="refunds", backfill=True)
    recorded = (
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication "
        "WHERE pubname = 'flash_publication_insert'"
    )
    try:
        with psycopg.connect(flash.database.dsn) as late:
            late.execute("INSERT INTO orders VALUES (1)")
            late.execute("INSERT INTO refunds VALUES (1)")
            more.start()
        done = "SELECT count(*) = 1 FROM flash_celery_backfills WHERE state = 'done'"
        more.wait(lambda: more.database.one(done))
        more.do("INSERT INTO orders VALUES (2)")
    finally:
        more.stop()
    assert shown(more.delivered("orders")) == ["insert 2"]
    assert shown(more.delivered("refunds")) == ["insert 1"]
    (line,) = [text for text in caplog.messages if "had written to" in text]
    assert "had written to public.orders before it was published: PID" in line
    assert "had written to public.orders before" in more.database.one(recorded)


def test_rows_of_open_transactions_are_a_gap_though_a_later_step_fails_at_first(
    flash, new_app, caplog, monkeypatch
):
    """The next attempt has nothing to publish for that table."""
    monkeypatch.setattr(ddl, "LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr(ddl, "_LOCK_ATTEMPTS", 1)
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY)",
        "CREATE TABLE orders (id int PRIMARY KEY)",
        "CREATE TABLE refunds (id int PRIMARY KEY)",
    )
    flash.handler("items").start().stop()
    more = Flash(flash.database, new_app("more"))
    more.handler("items").handler("orders", name="orders").handler("refunds", name="refunds")
    try:
        with psycopg.connect(flash.database.dsn) as late:
            late.execute("INSERT INTO orders VALUES (1)")
            with psycopg.connect(flash.database.dsn) as blocker:
                blocker.execute("LOCK TABLE refunds IN SHARE UPDATE EXCLUSIVE MODE")
                more.start(wait=False)
                more.wait(lambda: "waits for PID" in caplog.text)
            more.wait(lambda: more.database.one(more.slot("bool_and(active)")))
    finally:
        more.stop()
    (line,) = [text for text in caplog.messages if "had written to" in text]
    assert "had written to public.orders before it was published: PID" in line


def test_rows_of_a_dropped_table_are_not_taken_for_a_partition(flash, new_app, caplog):
    """Its columns are those of a partitioned table, and dropping took it out of publications."""
    from .conftest import Flash

    flash.database.execute(TWO_TREES, "CREATE TABLE plain (id int PRIMARY KEY)")
    flash.handler("one", "insert").handler("plain", "insert", name="plain").start().stop()
    flash.database.execute("INSERT INTO plain VALUES (1)", "DROP TABLE plain")
    for name in ("fewer", "again"):
        fewer = Flash(flash.database, new_app(name)).handler("one", "insert").start()
        try:
            fewer.do("INSERT INTO one VALUES (2)", "DELETE FROM one")
            assert shown(fewer.delivered()) == ["insert 2"]
        finally:
            fewer.stop()
    assert "Rows of public.plain arrive that were written for a handler that is gone" in caplog.text


def test_detached_partition_is_a_table_of_its_own(flash):
    flash.database.execute(TWO_TREES)
    flash.handler("one", "insert", name="one").handler("leaf", "insert", name="leaf").start()
    flash.do("INSERT INTO one VALUES (1)")
    before = flash.replicator.telemetry.reconnections
    flash.database.execute(MOVE[0])
    flash.wait(lambda: flash.replicator.telemetry.reconnections > before)
    flash.do("INSERT INTO leaf VALUES (2)", "TRUNCATE leaf")
    assert (shown(flash.delivered("one")), shown(flash.delivered("leaf"))) == (
        ["insert 1"],
        ["insert 1", "insert 2"],
    )


def again(flash, name="handler", **options):
    """A new version of the handler."""
    from flash_celery import on_change

    flash.stop()
    task = flash.app.tasks[name]
    task.__dict__.pop("flash_subscriptions")
    on_change("items", **options)(task)
    flash.start()


def test_column_renamed_with_unread_changes_is_followed(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, status text)")
    flash.handler("items", where={"status": "paid"}, fields=["status"]).start()
    flash.stop()
    flash.database.execute(
        "INSERT INTO items VALUES (1, 'paid'), (2, 'open')",
        "ALTER TABLE items RENAME status TO state",
        "INSERT INTO items VALUES (3, 'paid'), (4, 'open')",
    )
    again(flash, where={"state": "paid"}, fields=["state"])
    flash.do("SELECT 1")
    # The first two can no longer be evaluated: they are delivered.
    assert [change.key["id"] for change in flash.delivered()] == [1, 2, 3]


def test_column_added_with_unread_changes_is_followed(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    flash.handler("items").start()
    flash.stop()
    flash.database.execute(
        "INSERT INTO items VALUES (1, 'a')",
        "UPDATE items SET name = 'b'",
        "ALTER TABLE items ADD extra int",
        "UPDATE items SET extra = 5",
    )
    again(flash, fields=["extra"], key=["extra"])
    flash.do("UPDATE items SET name = 'c'")
    changes = flash.delivered()
    assert [change.operation.names()[0] for change in changes][:2] == ["insert", "update"]
    assert changes[-1].new["extra"] == 5


@pytest.mark.parametrize(
    "alteration",
    [
        "DROP TABLE items",
        "SET (publish = '')",
        "SET (publish_via_partition_root = true)",
        "ADD TABLES IN SCHEMA public",
    ],
)
def test_publication_altered_while_running_stops_the_worker(flash, alteration):
    from flash_celery.errors import PublicationMismatch

    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items").start()
    if flash.database.one("SHOW server_version_num") < "150000":
        alteration = alteration.replace("ADD TABLES IN SCHEMA public", "DROP TABLE items")
    flash.database.execute(f"ALTER PUBLICATION flash_publication_insert {alteration}")
    lost = "altered by hand.* changes written since may be missing.* Nothing had been altered at 20"
    with pytest.raises(PublicationMismatch, match=lost):
        flash.wait(lambda: False)


def test_hot_spare_with_other_handlers_alters_nothing(flash, new_app):
    from .conftest import Flash

    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text)", "CREATE TABLE others (id int)"
    )
    flash.handler("items", where={"name": "a"}).handler("others", "insert", name="others").start()
    standby = Flash(flash.database, new_app("standby"))
    standby.handler("items", "insert", name="standby").start()
    try:
        flash.do(
            "INSERT INTO others VALUES (1)",
            "INSERT INTO items VALUES (1, 'a')",
            "UPDATE items SET name = 'b'",
        )
        assert shown(flash.delivered("others")) == ["insert 1"]
        assert shown(flash.delivered()) == ["insert 1,a", "delete 1,a"]
    finally:
        flash.stop()
        standby.do("INSERT INTO items VALUES (2, 'a')")
        assert shown(standby.delivered("standby")) == ["insert 2,a"]
        standby.stop()


def test_table_with_unread_changes_can_become_a_partition(flash, caplog):
    """PostgreSQL 14 does not notice, until we do; what it left out by then is said."""
    flash.database.execute(
        "CREATE TABLE parts (id int PRIMARY KEY, name text) PARTITION BY RANGE (id)",
        "CREATE TABLE part_0 PARTITION OF parts FOR VALUES FROM (0) TO (1)",
        "CREATE TABLE part (id int PRIMARY KEY, name text)",
    )
    flash.handler("parts", name="root").start()
    noted = "SELECT obj_description(oid) FROM pg_publication WHERE pubname LIKE '%_insert'"
    part = flash.database.one("SELECT 'part'::regclass::oid")
    flash.publisher.broken = True  # so that everything is decoded once it has been noticed
    flash.database.execute(
        "INSERT INTO parts VALUES (0, 'a')",
        "INSERT INTO part VALUES (1, 'a')",
        "CREATE TABLE part_2 PARTITION OF parts FOR VALUES FROM (1000) TO (2000)",
        "ALTER TABLE parts ATTACH PARTITION part FOR VALUES FROM (1) TO (1000)",
        "INSERT INTO parts VALUES (2, 'b')",
    )
    flash.wait(lambda: f'"{part}"' in flash.database.one(noted))
    flash.publisher.broken = False
    flash.do("INSERT INTO parts VALUES (3, 'c')")
    warnings = [line for line in caplog.messages if "may not have sent" in line]
    if flash.database.one("SHOW server_version_num") >= "150000":
        assert (shown(flash.delivered("root")), warnings) == (
            ["insert 0,a", "insert 2,b", "insert 3,c"],
            [],
        )
    else:
        assert shown(flash.delivered("root")) == ["insert 0,a", "insert 3,c"]
        assert [line.split(" between")[0][-11:] for line in warnings] == ["public.part"]


@pytest.mark.parametrize("streaming", [False, True])
def test_partition_of_a_transaction_not_yet_visible_is_followed(flash, streaming):
    """It is sent when its commit is in the WAL; a synchronous standby may take its time then."""
    flash.database.execute(
        "CREATE TABLE parts (id int PRIMARY KEY, name text) PARTITION BY RANGE (id)",
        "CREATE TABLE part (id int PRIMARY KEY, name text)",
    )
    flash.handler("parts", name="root").handler("part", "delete", name="part")
    flash.start(flash_use_streaming=streaming)
    if flash.database.one("SHOW server_version_num") >= "150000":  # 14 may not notice: see above
        flash.do("INSERT INTO part VALUES (1, 'a')")

    def write():
        rows = 40_000 if streaming else 2
        flash.database.execute(
            "SET logical_decoding_work_mem = '64kB'; "
            "ALTER TABLE parts ATTACH PARTITION part FOR VALUES FROM (0) TO (1000000); "
            f"INSERT INTO parts SELECT n, 'b' FROM generate_series(2, {rows + 1}) AS n"
        )

    standbys = "synchronous_standby_names"
    flash.database.execute(f"ALTER SYSTEM SET {standbys} = 'absent'", "SELECT pg_reload_conf()")
    writer = threading.Thread(target=write)
    try:
        flash.wait(lambda: flash.database.one(f"SHOW {standbys}") == "absent")
        writer.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        flash.wait(lambda: flash.database.one(waits))
        time.sleep(0.5)
        assert flash.delivered("root") == []
    finally:
        flash.database.execute(f"ALTER SYSTEM RESET {standbys}", "SELECT pg_reload_conf()")
        writer.join(20)
    flash.do("SELECT 1")
    assert [change.new["id"] for change in flash.delivered("root")][:2] == [2, 3]


def test_partition_moved_by_a_transaction_not_yet_visible_is_followed(flash):
    """Its commit lies before the look at the start, which sees the partition where it was."""
    flash.database.execute(TWO_TREES)
    flash.handler("one", "insert", name="one").handler("two", "insert", name="two").start().stop()
    standbys = "synchronous_standby_names"
    flash.database.execute(f"ALTER SYSTEM SET {standbys} = 'absent'", "SELECT pg_reload_conf()")
    move = "; ".join((*MOVE, "INSERT INTO two VALUES (5)"))
    writer = threading.Thread(target=flash.database.execute, args=[move])
    try:
        flash.wait(lambda: flash.database.one(f"SHOW {standbys}") == "absent")
        writer.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        flash.wait(lambda: flash.database.one(waits))
        flash.start(flash_dsn=f"{flash.database.dsn}?options=-csynchronous_commit%3Dlocal")
        time.sleep(0.5)
    finally:
        flash.database.execute(f"ALTER SYSTEM RESET {standbys}", "SELECT pg_reload_conf()")
        writer.join(20)
    flash.do("INSERT INTO two VALUES (6)")
    assert [change.new["id"] for change in flash.delivered("two")] == [5, 6]
