"""Scenarios of the Go library that this one descends from, with the right outcome here.

flash-celery began as a port of quix-labs/flash (its driver `wal_logical`), which was run in these
scenarios before the first line of Python; where it lost or invented changes, this must not.
"""

import ast
from pathlib import Path

import psycopg
import pytest

from flash_celery.errors import SubscriptionError

from .conftest import shown

TESTS = Path(__file__).parents[1]
HERE = "integration/test_ancestor.py"
CONDITIONS = "integration/test_conditions.py"
PUBLICATIONS = "integration/test_publications.py"
SEMANTICS = "integration/test_semantics.py"
TABLES = "integration/test_tables.py"
TRANSACTIONS = "integration/test_transactions.py"
TYPES = "integration/test_types.py"
COMMANDS = "acceptance/test_commands.py"
FAULTS = "acceptance/test_faults.py"
MEMORY = "acceptance/test_memory.py"
PIPELINE = "acceptance/test_pipeline.py"

#: Scenario → what the ancestor did, and the tests that prove what is right.
SCENARIOS = {
    "1 insert, update, delete, truncate": (
        "an update that changes nothing was not delivered",
        f"{SEMANTICS}::test_operations_are_delivered_with_old_and_new",
        f"{SEMANTICS}::test_old_holds_the_columns_of_the_identity",
    ),
    "1b what a clean end leaves": (
        "a publication, and REPLICA IDENTITY FULL for ever",
        f"{COMMANDS}::test_reset_shows_its_steps_asks_and_undoes_everything",
        f"{PUBLICATIONS}::test_writes_work_after_every_statement_of_setup_change_and_reset",
    ),
    "1c a clean end": (
        "it failed, for its own connection still held the slot",
        f"{PIPELINE}::test_sigterm_and_sigint_end_replicate_with_0_and_repeat_nothing",
    ),
    "2 fields": (
        "as here",
        f"{HERE}::test_update_of_no_named_field_is_not_delivered",
    ),
    "2b a field that does not exist": (
        "delivered as nil",
        f"{SEMANTICS}::test_unknown_column_is_refused",
    ),
    "3 a condition": (
        "as here",
        f"{HERE}::test_rows_enter_and_leave_a_condition_from_false_and_null",
        f"{SEMANTICS}::test_transitions_match_the_documented_table",
    ),
    "3b a number of another type in a condition": (
        "it never matched, silently",
        f"{HERE}::test_condition_with_a_float_on_an_int_column_is_evaluated",
        f"{CONDITIONS}::test_conditions_read_python_values_as_the_column_type",
    ),
    "3c a condition and updates only": (
        "as here",
        f"{SEMANTICS}::test_transitions_match_the_documented_table",
    ),
    "3d a condition and inserts and deletes only": (
        "a row that leaves the condition (a soft delete) was lost",
        f"{HERE}::test_soft_delete_reaches_a_handler_of_inserts_and_deletes",
        f"{SEMANTICS}::test_transitions_match_the_documented_table",
    ),
    "3e a condition on a column that is no field": (
        "as here",
        f"{SEMANTICS}::test_fields_are_sent_alone_and_conditions_can_use_others",
    ),
    "3f a dict as the value of a condition on jsonb": (
        "the process panicked",
        f"{SEMANTICS}::test_unhashable_values_work_in_a_condition",
    ),
    "4 None in a condition": (
        "on a column that does not exist it matched every row",
        f"{HERE}::test_rows_enter_and_leave_a_condition_of_none",
        f"{HERE}::test_condition_with_none_on_an_unknown_column_is_refused",
    ),
    "5 TRUNCATE of several tables": (
        "as here",
        f"{HERE}::test_truncate_that_lists_foreign_tables_first_is_delivered",
        f"{TABLES}::test_truncate_of_several_tables_some_foreign_is_delivered",
    ),
    "6 a large value that an update leaves alone": (
        "missing from the new row, although the old row had it",
        f"{SEMANTICS}::test_unchanged_large_value_is_marked",
    ),
    "6b such a value among the fields": (
        "an update that was none, with nil as the new value",
        f"{SEMANTICS}::test_unchanged_large_value_is_marked",
    ),
    "6c the identity set to DEFAULT while it runs": (
        "the process panicked",
        f"{SEMANTICS}::test_identity_changed_while_running_is_followed",
        f"{HERE}::test_delete_with_a_key_identity_is_delivered",
    ),
    "6d the identity set to NOTHING while it runs": (
        "updates of the application failed from then on",
        f"{HERE}::test_identity_nothing_is_repaired_while_running",
    ),
    "7 types": (
        "see 3.1",
        f"{HERE}::test_types_listed_by_the_ancestor_are_delivered",
        f"{TYPES}::test_handler_receives_what_psycopg_reads",
        f"{TYPES}::test_composite_is_a_dict_by_field_name",
        f"{TYPES}::test_json_numbers_keep_their_digits",
    ),
    "8 a large transaction that is streamed": (
        "all in memory: 558 MB for a million rows",
        f"{MEMORY}::test_large_commit_takes_bounded_memory",
    ),
    "8b a streamed transaction that is rolled back": (
        "not delivered, but held in memory",
        f"{HERE}::test_streamed_transaction_that_is_rolled_back_delivers_nothing",
        f"{MEMORY}::test_spool_leaves_no_files_behind",
    ),
    "8c two large transactions at a time": (
        "as here",
        f"{HERE}::test_large_transactions_at_a_time_are_delivered_apart",
        f"{TRANSACTIONS}::test_streaming_survives_interleaved_savepoints_and_a_restart",
    ),
    "8d a savepoint that is released": (
        "its rows were lost when streamed",
        f"{HERE}::test_large_savepoint_that_is_released_is_delivered",
        f"{TRANSACTIONS}::test_streaming_delivers_the_same_as_without_and_as_a_model",
    ),
    "8e a savepoint that is rolled back": (
        "the whole transaction was lost when streamed",
        f"{HERE}::test_large_savepoint_that_is_rolled_back_is_not_delivered",
        f"{TRANSACTIONS}::test_streaming_delivers_the_same_as_without_and_as_a_model",
    ),
    "8f a loop with a block that catches exceptions": (
        "the whole transaction was lost when streamed",
        f"{HERE}::test_large_loop_with_an_exception_block_is_delivered",
    ),
    "8g inserts, a TRUNCATE and an insert in one transaction": (
        "as here",
        f"{HERE}::test_truncate_between_inserts_keeps_its_order",
    ),
    "9 kill -9": (
        "what was written until the restart was lost, and a publication left behind each time",
        "acceptance/test_ancestor.py::test_changes_after_kill_9_are_delivered_after_the_restart",
        f"{FAULTS}::test_kill_9_amid_10_000_changes_loses_nothing",
    ),
    "9b a start while another process holds the slot": (
        "it stayed alive and deaf",
        "acceptance/test_ancestor.py::test_stopped_process_loses_the_slot_to_another",
        f"{PIPELINE}::test_hot_spare_waits_and_takes_over",
    ),
    "10 its walsender is terminated": (
        "it never connected again",
        f"{HERE}::test_terminated_walsender_is_replaced",
        f"{FAULTS}::test_postgresql_restart_loses_nothing",
    ),
    "10b its other connection is terminated": (
        "nothing was cleaned up at the end",
        f"{HERE}::test_terminated_catalog_connection_is_replaced",
    ),
    "10c the server is stopped": (
        "the shutdown hung until the client was killed",
        f"{FAULTS}::test_postgresql_restart_loses_nothing",
        f"{FAULTS}::test_postgresql_shuts_down_fast_while_the_broker_is_down",
    ),
    "10d slower than wal_sender_timeout": (
        "the server dropped it, and the rest was lost",
        f"{FAULTS}::test_broker_outage_outlasts_wal_sender_timeout",
    ),
    "11 two handlers of one table": (
        "as here",
        f"{HERE}::test_handlers_of_one_table_have_their_own_operations_and_fields",
        f"{SEMANTICS}::test_handlers_and_tables_can_be_combined_freely",
    ),
    "11b six handlers": (
        "the slot was made seven times",
        f"{HERE}::test_slot_serves_six_handlers",
    ),
    "12 names": (
        "dots and quotes could not be named",
        f"{TABLES}::test_table_and_column_names_can_be_any_text",
        f"{PUBLICATIONS}::test_setup_that_cannot_work_names_the_handler",
        "unit/test_subscriptions.py::test_table_names_are_read_in_every_spelling",
    ),
    "12b a partitioned table": (
        "nothing was delivered, silently",
        f"{TABLES}::test_partition_changes_reach_handlers_of_root_middle_and_leaf",
    ),
    "12c a partition": (
        "only the handlers of its root and of the partition received it",
        f"{TABLES}::test_row_moved_between_partitions_is_a_delete_and_an_insert",
        f"{TABLES}::test_partition_changes_reach_handlers_of_root_middle_and_leaf",
    ),
    "12d no primary key": (
        "as here",
        f"{HERE}::test_equal_rows_without_a_primary_key_are_all_delivered",
    ),
    "12e a stored generated column": (
        "missing from the row",
        f"{TABLES}::test_generated_and_identity_columns_are_delivered",
    ),
    "13 DDL while it runs": (
        "a table renamed, or dropped and made again, went silent",
        f"{TABLES}::test_columns_altered_while_running_are_followed",
        f"{TABLES}::test_renamed_table_stops_the_worker_and_loses_nothing",
        f"{TABLES}::test_recreated_table_is_delivered_again",
        f"{TABLES}::test_table_swapped_by_renaming_is_followed",
    ),
    "13b a field is renamed": (
        "updates were lost silently, inserts had nil",
        f"{HERE}::test_renamed_field_stops_the_worker_and_loses_nothing",
        f"{TABLES}::test_handler_column_that_disappears_stops_the_worker_and_loses_nothing",
    ),
    "14 nothing of ours, and other tables busy": (
        "the slot did not move, and WAL piled up",
        f"{TRANSACTIONS}::test_transactions_of_other_tables_advance_the_slot_100_000_times",
        f"{FAULTS}::test_slot_follows_a_server_that_is_busy_elsewhere",
    ),
    "15 an update of the primary key": (
        "as here",
        f"{SEMANTICS}::test_operations_are_delivered_with_old_and_new",
        f"{SEMANTICS}::test_composite_key_works_with_a_condition",
    ),
    "3.1 a value that cannot be decoded": (
        "it ended all delivery",
        f"{HERE}::test_values_python_cannot_represent_survive_in_a_german_database",
        f"{TYPES}::test_values_python_cannot_represent_stay_the_text_of_the_server",
        f"{TYPES}::test_undecodable_value_stops_nothing",
    ),
}


def functions(path):
    tree = ast.parse((TESTS / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_scenarios_have_tests_that_exist():
    named = {test for _, *tests in SCENARIOS.values() for test in tests}
    for test in named:
        path, _, name = test.partition("::")
        assert name in functions(path), test
    mine = {f"{HERE}::{name}" for name in functions(HERE) if name.startswith("test_")}
    assert mine - named == {f"{HERE}::test_scenarios_have_tests_that_exist"}


POSTS = "CREATE TABLE posts (id int PRIMARY KEY, slug text, active bool)"


def kinds(changes):
    return [change.operation.names()[0] for change in changes]


def test_update_of_no_named_field_is_not_delivered(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", fields=["slug"]).start()
    flash.do(
        "INSERT INTO posts VALUES (1, 'a', true)",
        "UPDATE posts SET active = false",
        "UPDATE posts SET slug = 'z'",
        "DELETE FROM posts",
    )
    assert shown(flash.delivered()) == ["insert a", "update a -> z", "delete z"]


def test_rows_enter_and_leave_a_condition_from_false_and_null(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", where={"active": True}).start()
    flash.do(
        "INSERT INTO posts VALUES (1, 'a', false), (2, 'b', NULL)",
        "UPDATE posts SET active = true WHERE id = 1",
        "UPDATE posts SET active = true WHERE id = 2",
        "UPDATE posts SET slug = 'c' WHERE id = 2",
        "UPDATE posts SET active = false WHERE id = 1",
        "UPDATE posts SET active = NULL WHERE id = 2",
        "DELETE FROM posts",
    )
    assert shown(flash.delivered()) == [
        "insert 1,a,True",
        "insert 2,b,True",
        "update 2,b,True -> 2,c,True",
        "delete 1,a,True",
        "delete 2,c,True",
    ]


def test_condition_with_a_float_on_an_int_column_is_evaluated(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", where={"id": 1.0}).start()
    flash.do("INSERT INTO posts VALUES (1, 'a'), (2, 'b')", "DELETE FROM posts")
    # The condition looks at the key alone, so that is all that is known of the old row.
    assert shown(flash.delivered()) == ["insert 1,a,-", "delete 1"]


def test_soft_delete_reaches_a_handler_of_inserts_and_deletes(flash):
    flash.database.execute("CREATE TABLE posts (id int PRIMARY KEY, slug text, deleted date)")
    flash.handler("posts", "insert|delete", where={"deleted": None}).start()
    flash.do(
        "INSERT INTO posts VALUES (1, 'a')",
        "UPDATE posts SET slug = 'b'",
        "UPDATE posts SET deleted = '2024-02-29'",
        "UPDATE posts SET deleted = NULL",
    )
    assert shown(flash.delivered()) == ["insert 1,a,-", "delete 1,b,-", "insert 1,b,-"]


def test_rows_enter_and_leave_a_condition_of_none(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", where={"active": None}).start()
    flash.do(
        "INSERT INTO posts VALUES (1, 'a', true), (2, 'b', NULL)",
        "UPDATE posts SET active = NULL WHERE id = 1",
        "UPDATE posts SET slug = 'c' WHERE id = 1",
        "UPDATE posts SET active = false WHERE id = 1",
        "DELETE FROM posts",
    )
    assert shown(flash.delivered()) == [
        "insert 2,b,-",
        "insert 1,a,-",
        "update 1,a,- -> 1,c,-",
        "delete 1,c,-",
        "delete 2,b,-",
    ]


def test_condition_with_none_on_an_unknown_column_is_refused(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", where={"activ": None})
    with pytest.raises(SubscriptionError, match="posts has no column activ; did you mean active"):
        flash.start()


def test_truncate_that_lists_foreign_tables_first_is_delivered(flash):
    flash.database.execute(
        *(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in ("ta", "tb", "tc", "td")),
        "CREATE TABLE child (id int PRIMARY KEY, a int REFERENCES ta)",
        "CREATE TABLE grandchild (id serial, child int REFERENCES child)",
    )
    for name in ("ta", "tc", "grandchild"):
        flash.handler(name, name=name)
    flash.handler("tb", "insert", name="tb").start()
    flash.do("TRUNCATE td, tc, tb")
    assert [kinds(flash.delivered(name)) for name in ("tc", "ta", "tb")] == [["truncate"], [], []]
    # Three relations in one statement, of which the one in the middle has no handler.
    flash.do("TRUNCATE ta RESTART IDENTITY CASCADE", "INSERT INTO grandchild DEFAULT VALUES")
    assert kinds(flash.delivered("ta")) == ["truncate"]
    grandchild = flash.delivered("grandchild")
    assert shown(grandchild) == ["truncate", "insert 1,-"]


def test_delete_with_a_key_identity_is_delivered(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", fields=["slug"]).start()
    flash.do(
        "INSERT INTO posts VALUES (1, 'a', true)",
        "ALTER TABLE posts REPLICA IDENTITY DEFAULT; DELETE FROM posts",
    )
    insert, delete = flash.delivered()
    assert kinds([insert, delete]) == ["insert", "delete"]
    assert dict(delete.key) == {"id": 1}
    with pytest.raises(KeyError, match="REPLICA IDENTITY FULL"):
        delete.old["slug"]


def test_identity_nothing_is_repaired_while_running(flash):
    flash.database.execute(POSTS)
    flash.handler("posts").start()
    flash.do("INSERT INTO posts VALUES (1, 'a', true)")
    flash.database.execute("ALTER TABLE posts REPLICA IDENTITY NOTHING")
    identity = "SELECT relreplident FROM pg_class WHERE relname = 'posts'"
    flash.wait(lambda: flash.database.one(identity) != "n")
    flash.do("UPDATE posts SET slug = 'b'", "DELETE FROM posts")
    changes = flash.delivered()
    assert kinds(changes) == ["insert", "update", "delete"]
    assert [dict(change.key) for change in changes] == [{"id": 1}] * 3


LISTED = {
    "int8": "9223372036854775807",
    "numeric": "'1234.50'",
    "bool": "true",
    "char(5)": "'ab'",
    "timetz": "'12:00+02'",
    "mood": "'sad'",
    "mood[]": "'{sad,ok}'",
    "positive": "5",
    "pair": "ROW(1, 'x')",
    "money": "'1.50'",
    "tsvector": "'fat cat'",
    "interval": "'1 day'",
    "json": "'12345678901234567890'",
    "jsonb": "'null'",
    "int[][]": "'{{1,2},{3,4}}'",
    "text[]": "'{a,NULL}'",
    "uuid": "'00000000-0000-0000-0000-000000000001'",
    "bytea": "'\\x00ff'",
    "inet": "'10.0.0.1'",
    "point": "'(1,2)'",
    "bit(3)": "'101'",
}


def test_types_listed_by_the_ancestor_are_delivered(flash):
    columns = ", ".join(f'"{kind}" {kind}' for kind in LISTED)
    flash.database.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'ok')",
        "CREATE DOMAIN positive AS int CHECK (VALUE > 0)",
        "CREATE TYPE pair AS (a int, b text)",
        f"CREATE TABLE typed ({columns})",
    )
    flash.handler("typed", "insert").start()
    flash.do(f"INSERT INTO typed VALUES ({', '.join(LISTED.values())})")
    (change,) = flash.delivered()
    # The order of the columns is the table's.
    assert list(change.new) == list(LISTED)
    values = {kind: str(value) for kind, value in change.new.items()}
    assert values == {
        "int8": "9223372036854775807",
        "numeric": "1234.50",
        "bool": "True",
        "char(5)": "ab   ",
        "timetz": "12:00:00+02:00",
        "mood": "sad",
        "mood[]": "['sad', 'ok']",
        "positive": "5",
        "pair": "{'a': 1, 'b': 'x'}",
        "money": "$1.50",
        "tsvector": "'cat' 'fat'",
        "interval": "1 day, 0:00:00",
        "json": "12345678901234567890",
        "jsonb": "None",
        "int[][]": "[[1, 2], [3, 4]]",
        "text[]": "['a', None]",
        "uuid": "00000000-0000-0000-0000-000000000001",
        "bytea": "b'\\x00\\xff'",
        "inet": "10.0.0.1",
        "point": "(1,2)",
        "bit(3)": "101",
    }
    assert isinstance(change.new["positive"], int)


def test_values_python_cannot_represent_survive_in_a_german_database(flash):
    name = flash.database.name
    flash.database.execute(
        f"ALTER DATABASE {name} SET datestyle = 'German'",
        f"ALTER DATABASE {name} SET intervalstyle = 'iso_8601'",
        f"ALTER DATABASE {name} SET timezone = 'Asia/Kathmandu'",
        f"ALTER DATABASE {name} SET extra_float_digits = -5",
        f"ALTER DATABASE {name} SET bytea_output = 'escape'",
        "CREATE TABLE odd (id int PRIMARY KEY, at timestamptz, span interval, f float8, b bytea)",
    )
    flash.handler("odd", "insert").start()
    flash.do(
        "INSERT INTO odd VALUES (1, '12000-01-01 00:00:00+00')",
        "INSERT INTO odd VALUES (2, '2024-02-29 12:00:00+00', '1 day 2 hours', 0.1, '\\x00ff')",
    )
    far, near = flash.delivered()
    assert far.new["at"] == "12000-01-01 00:00:00+00"
    assert near.new["at"].isoformat() == "2024-02-29T12:00:00+00:00"
    assert str(near.new["span"]) == "1 day, 2:00:00"
    assert near.new["f"] == 0.1
    assert near.new["b"] == b"\x00\xff"
    if flash.database.one("SHOW server_version_num") >= "170000":
        flash.do("INSERT INTO odd VALUES (3, NULL, 'infinity')")
        (change,) = flash.delivered()
        assert change.new["span"] == "infinity"


def many(first, last, table="items"):
    return (
        f"INSERT INTO {table} SELECT n, repeat('x', 200) FROM generate_series({first}, {last}) AS n"
    )


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def large(request, flash):
    """A replication worker whose server sends transactions of a megabyte while they are open."""
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    options = "-c logical_decoding_work_mem=64kB"
    flash.handler("items").start(
        flash_use_streaming=request.param,
        flash_dsn=psycopg.conninfo.make_conninfo(flash.database.dsn, options=options),
    )
    yield flash
    flash.stop()
    streamed = "SELECT stream_txns > 0 FROM pg_stat_replication_slots"
    flash.wait(lambda: flash.database.one(streamed) is request.param)


def ids(changes):
    return [change.new["id"] for change in changes]


def test_streamed_transaction_that_is_rolled_back_delivers_nothing(large):
    with large.database.connect() as connection:
        connection.execute(f"BEGIN; {many(1, 5000)}; ROLLBACK")
    large.do(f"BEGIN; {many(1, 1000)}; COMMIT")
    assert ids(large.delivered()) == list(range(1, 1001))


def test_large_transactions_at_a_time_are_delivered_apart(large):
    with large.database.connect() as first, large.database.connect() as second:
        first.execute("BEGIN")
        second.execute("BEGIN")
        for start in range(0, 5000, 1000):
            first.execute(many(start, start + 999))
            second.execute(many(100_000 + start, 100_000 + start + 999))
        second.execute("COMMIT")
        first.execute("COMMIT")
    large.do("SELECT 1")
    changes = large.delivered()
    assert ids(changes) == [*range(100_000, 105_000), *range(5000)]
    assert [change.ordinal for change in changes] == [*range(5000), *range(5000)]


def test_large_savepoint_that_is_released_is_delivered(large):
    large.do(
        f"BEGIN; {many(1, 5000)}; SAVEPOINT a; {many(5001, 10_000)}; RELEASE a; COMMIT",
    )
    changes = large.delivered()
    assert ids(changes) == list(range(1, 10_001))
    assert len({change.xid for change in changes}) == 1


def test_large_savepoint_that_is_rolled_back_is_not_delivered(large):
    large.do(
        f"BEGIN; {many(1, 5000)}; SAVEPOINT a; {many(5001, 10_000)}; ROLLBACK TO a; "
        f"{many(20_001, 20_010)}; COMMIT",
    )
    assert ids(large.delivered()) == [*range(1, 5001), *range(20_001, 20_011)]


def test_large_loop_with_an_exception_block_is_delivered(large):
    large.do(
        "DO $$ BEGIN FOR n IN 1..4000 LOOP BEGIN "
        "INSERT INTO items VALUES (n % 3000, repeat('x', 200)); "
        "EXCEPTION WHEN unique_violation THEN NULL; END; END LOOP; END $$"
    )
    assert sorted(ids(large.delivered())) == list(range(3000))


def test_truncate_between_inserts_keeps_its_order(large):
    large.do(f"BEGIN; {many(1, 5000)}; TRUNCATE items; INSERT INTO items VALUES (1); COMMIT")
    changes = large.delivered()
    assert kinds(changes) == [*["insert"] * 5000, "truncate", "insert"]
    assert [change.ordinal for change in changes] == list(range(5002))


def test_terminated_walsender_is_replaced(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", "insert").start()
    terminate = flash.slot("pg_terminate_backend(active_pid)")
    for number in range(3):
        flash.wait(lambda: flash.database.one(flash.slot("active")))
        flash.database.execute(terminate, f"INSERT INTO posts VALUES ({number})")
    flash.do("INSERT INTO posts VALUES (3)")
    assert list(dict.fromkeys(ids(flash.delivered()))) == [0, 1, 2, 3]


def test_terminated_catalog_connection_is_replaced(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", "insert").start()
    flash.do("INSERT INTO posts VALUES (1)")
    flash.database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'flash_celery' AND backend_type = 'client backend'",
        "INSERT INTO posts VALUES (2)",
    )
    flash.do("INSERT INTO posts VALUES (3)")
    assert list(dict.fromkeys(ids(flash.delivered()))) == [1, 2, 3]
    flash.stop()
    assert flash.error is None


def test_handlers_of_one_table_have_their_own_operations_and_fields(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", "insert|update", name="slug", fields=["slug"])
    flash.handler("posts", "update|delete", name="all").start()
    flash.do(
        "INSERT INTO posts VALUES (1, 'a', true)",
        "UPDATE posts SET active = false",
        "UPDATE posts SET slug = 'b'",
        "DELETE FROM posts",
        "TRUNCATE posts",
    )
    assert shown(flash.delivered("slug")) == ["insert a", "update a -> b"]
    assert kinds(flash.delivered("all")) == ["update", "update", "delete"]


def test_slot_serves_six_handlers(flash):
    flash.database.execute(POSTS)
    for number in range(6):
        flash.handler("posts", "insert", name=str(number))
    flash.start()
    # The slot is there before it is read: nothing from here on is missing.
    for number in range(500):
        flash.database.execute(f"INSERT INTO posts VALUES ({number})")
    flash.do("SELECT 1")
    for number in range(6):
        assert ids(flash.delivered(str(number))) == list(range(500))
    slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    assert flash.database.one(slots) == 1


def test_equal_rows_without_a_primary_key_are_all_delivered(flash):
    flash.database.execute("CREATE TABLE plain (a int, b text)")
    flash.handler("plain").start()
    flash.do(
        "INSERT INTO plain VALUES (1, 'x'), (1, 'x')",
        "UPDATE plain SET b = 'y'",
        "DELETE FROM plain",
    )
    changes = flash.delivered()
    assert shown(changes) == [
        *["insert 1,x"] * 2,
        *["update 1,x -> 1,y"] * 2,
        *["delete 1,y"] * 2,
    ]
    assert len({change.id for change in changes}) == 6


def test_renamed_field_stops_the_worker_and_loses_nothing(flash):
    flash.database.execute(POSTS)
    flash.handler("posts", "insert", fields=["slug"]).start()
    flash.do("INSERT INTO posts VALUES (1, 'a')")
    flash.database.execute(
        "ALTER TABLE posts RENAME slug TO path", "INSERT INTO posts VALUES (2, 'b')"
    )
    with pytest.raises(SubscriptionError, match=r"handler .*slug"):
        flash.wait(lambda: False)
    flash.thread.join(30)
    assert not flash.thread.is_alive()
    assert shown(flash.delivered()) == ["insert a"]
    assert flash.database.one(flash.slot("count(*)")) == 1
