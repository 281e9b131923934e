"""The ordering keys that the catalog has are those by which the rows of the stream are placed."""

from dataclasses import replace

import pytest

from flash_celery import Ordered
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.messages.lane_messages import LaneForm, LaneGroup
from flash_celery.messages.lane_placing import key_of
from flash_celery.provisioning import ordering_keys
from tests.unit.builders import Form
from tests.unit.builders import delivery as delivery_of_id

TYPES = """
CREATE DOMAIN code AS varchar(5); CREATE TYPE state AS ENUM ('new', 'paid');
CREATE TYPE pair AS (a int, b text)
"""
TABLES = {
    "int PRIMARY KEY": "CREATE TABLE t (a int PRIMARY KEY, b text)",
    "other order": "CREATE TABLE t (a code, b numeric(10,2), PRIMARY KEY (b, a))",
    "enum": "CREATE TABLE t (a state PRIMARY KEY, b char(3))",
    "composite": "CREATE TABLE t (a pair PRIMARY KEY, b int[])",
    "index": "CREATE TABLE t (a int NOT NULL, b timestamptz); CREATE UNIQUE INDEX i ON t (a); "
    "ALTER TABLE t REPLICA IDENTITY USING INDEX i",
    "partitioned": "CREATE TABLE t (a int, b int PRIMARY KEY) PARTITION BY RANGE (b); "
    "CREATE TABLE t_1 PARTITION OF t DEFAULT",
    "partitions": "CREATE TABLE t (a int NOT NULL, b int NOT NULL) PARTITION BY RANGE (b); "
    "CREATE TABLE t_0 PARTITION OF t (PRIMARY KEY (b)) FOR VALUES FROM (0) TO (1);"
    "CREATE TABLE t_1 PARTITION OF t (PRIMARY KEY (a)) DEFAULT",
}
VALUES = {"other order": "('x', 5.0)", "enum": "('paid', 'x')", "composite": "('(1,x)', '{1}')"}
VALUES["index"] = "(1, now())"


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("by", [None, ["a"]], ids=["key", "by"])
def test_ordering_keys_of_the_catalog_are_those_of_the_stream(flash, kind, by):
    flash.database.execute(TYPES, TABLES[kind])
    flash.handler("t", "insert").start()
    flash.do(f"INSERT INTO t VALUES {VALUES.get(kind, '(1, 2)')}")
    (change,) = flash.delivered()
    (subscription,) = subscriptions_of(flash.app)
    ordered = replace(subscription, ordered=Ordered(by=by))
    with flash.database.connect() as connection:
        (keys,) = ordering_keys.read(connection, [ordered]).values()
    assert key_of(change._source, by) in keys
    assert len(keys) == (2 if kind == "partitions" and by is None else 1)


def test_lanes_have_another_layout_while_a_table_has_another_key():
    """Rows that were written before its new key existed follow, and later ones again."""
    table = delivery_of_id(1).table
    old, new = key_of(table, None), (("uuid", "uuid"),)
    form = LaneForm(
        "key", "", "handle", 4, Form("flash", "handle", {}, {}), "", (frozenset([new]),)
    )
    group = LaneGroup(form, [None])
    renamed = replace(
        table, key=("uuid",), columns=(replace(table.columns[0], name="uuid", type_name="uuid"),)
    )
    messages = []
    for number in (1, 2, 3, 4):
        delivery = delivery_of_id(number)
        messages += group.add(
            delivery if number in (2, 3) else delivery._replace(table=renamed), None
        )
    messages += group.flush(None)
    forms = [message.lane_form for message in messages]
    assert [each.keys for each in forms] == [(frozenset([key]),) for key in (new, old, new)]
    assert forms[0].layout == forms[2].layout != forms[1].layout
    assert [sum(count for _, count, _ in message.pushes) for message in messages] == [1, 2, 1]
