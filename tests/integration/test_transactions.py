"""Which rows count: savepoints, rollbacks, prepared and empty transactions."""

from .conftest import shown

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text)"


def test_savepoints_released_and_rolled_back(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as connection:
        connection.execute(
            "BEGIN; INSERT INTO items VALUES (1); SAVEPOINT a; INSERT INTO items VALUES (2);"
            "SAVEPOINT b; INSERT INTO items VALUES (3); ROLLBACK TO b;"
            "INSERT INTO items VALUES (4); RELEASE a; INSERT INTO items VALUES (5); COMMIT"
        )
        connection.execute("BEGIN; INSERT INTO items VALUES (6); ROLLBACK")
    flash.do("INSERT INTO items VALUES (7)")
    changes = flash.told()
    assert shown(changes) == [f"insert {n},-" for n in (1, 2, 4, 5, 7)]
    assert [change.index for change in changes] == [0, 1, 2, 3, 0]
    assert len({change.xid for change in changes[:4]}) == 1


def test_a_block_that_catches_exceptions(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    flash.do(
        "DO $$ BEGIN FOR n IN 1..300 LOOP BEGIN INSERT INTO items VALUES (n % 200, 'x'); "
        "EXCEPTION WHEN unique_violation THEN NULL; END; END LOOP; END $$"
    )
    assert len(flash.told()) == 200


def test_a_prepared_transaction_is_told_when_it_commits(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    if flash.database.one("SHOW max_prepared_transactions") == "0":
        flash.stop()
        flash.database.server.stop()
        flash.database.server.options["max_prepared_transactions"] = 10
        flash.database.server.start()
        flash.start()
    with flash.database.connect() as connection:
        connection.execute("BEGIN; INSERT INTO items VALUES (1); PREPARE TRANSACTION 'one'")
        connection.execute("BEGIN; INSERT INTO items VALUES (2); PREPARE TRANSACTION 'two'")
    flash.do("INSERT INTO items VALUES (3)")
    assert shown(flash.told()) == ["insert 3,-"]
    flash.do("COMMIT PREPARED 'one'", "ROLLBACK PREPARED 'two'")
    assert shown(flash.told()) == ["insert 1,-"]


def test_empty_transactions_and_other_tables_move_the_slot(flash):
    flash.database.execute(ITEMS, "CREATE TABLE other (id int)")
    flash.handler("items").start()
    with flash.database.connect() as connection:
        for _ in range(2000):
            connection.execute("INSERT INTO other VALUES (1)")
    flash.do("INSERT INTO items VALUES (1)")
    assert shown(flash.told()) == ["insert 1,-"]


def test_two_interleaved_transactions_come_in_commit_order(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as first, flash.database.connect() as second:
        first.execute("BEGIN")
        second.execute("BEGIN")
        for n in range(0, 2000, 2):
            first.execute("INSERT INTO items VALUES (%s)", [n])
            second.execute("INSERT INTO items VALUES (%s)", [n + 1])
        second.execute("COMMIT")
        first.execute("COMMIT")
    flash.do("SELECT 1")
    ids = [change.new["id"] for change in flash.told()]
    assert ids == [*range(1, 2000, 2), *range(0, 2000, 2)]


def test_copy_and_a_large_transaction_with_a_truncate_inside(flash):
    flash.database.execute(ITEMS)
    flash.handler("items").start()
    with flash.database.connect() as connection:
        connection.execute("BEGIN")
        with connection.cursor().copy("COPY items FROM STDIN") as copy:
            for n in range(5000):
                copy.write_row((n, "x"))
        connection.execute("TRUNCATE items; INSERT INTO items VALUES (1); COMMIT")
    flash.do("SELECT 1")
    changes = flash.told()
    assert [c.operation.names()[0] for c in changes] == [*["insert"] * 5000, "truncate", "insert"]
    assert [change.index for change in changes] == list(range(5002))
    assert len({change.id for change in changes}) == 5002


def test_ids_are_the_same_after_a_restart(flash):
    flash.database.execute(ITEMS)
    flash.handler("items", "insert|truncate").start()
    with flash.database.connect() as connection:
        connection.execute(
            "BEGIN; INSERT INTO items VALUES (1); SAVEPOINT a; INSERT INTO items VALUES (2);"
            "ROLLBACK TO a; UPDATE items SET name = 'x'; INSERT INTO items VALUES (3); COMMIT"
        )
    flash.do("SELECT 1")
    ids = [change.id for change in flash.told()]
    assert len(ids) == 2
    assert ids[0] != ids[1]
