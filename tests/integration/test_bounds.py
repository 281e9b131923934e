"""Clients of the database cannot make the worker use unbounded resources (docs/security.md)."""

import json
import re
import threading
import time
from pathlib import Path
from threading import Event

import amqp
import psutil
import pytest
import redis

from example_project.servers import Valkey
from flash_celery import UNCHANGED, Batch, Operation, Ordered, on_message
from flash_celery.capture.router import MAX_FIELDS
from flash_celery.commands import replay
from flash_celery.dead_letters import letters
from flash_celery.dead_letters.failed_tasks import store_letter
from flash_celery.errors import PublishError
from flash_celery.handlers.app_subscriptions import subscriptions_of
from flash_celery.messages import lane_entries
from flash_celery.postgres.column_types import DEEPEST
from flash_celery.postgres.source import Source
from flash_celery.provisioning import replay_slot
from flash_celery.publishing.brokers import for_app
from flash_celery.settings import Settings

from .conftest import Flash, shown

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


def test_nested_composites_do_not_multiply(flash):
    """A hundred thousand fields, of three types of fifty."""
    flash.database.execute(
        f"CREATE TYPE c AS ({', '.join(f'x{n} int' for n in range(50))})",
        f"CREATE TYPE b AS ({', '.join(f'x{n} c' for n in range(50))})",
        f"CREATE TYPE a AS ({', '.join(f'x{n} b[]' for n in range(50))})",
        "CREATE TYPE pair AS (left_ int, right_ text)",
        "CREATE TABLE items (id int PRIMARY KEY, small pair, large a, list a[], other pair)",
    )
    flash.handler("items").start()
    flash.do(f"INSERT INTO items VALUES (1, '(1,a)', '({',' * 49})', '{{NULL}}', '(2,b)')")
    body = flash.publisher.queues["flash"][0].body
    assert len(body) < 3000
    (change,) = flash.delivered()
    assert change.new["small"] == {"left_": 1, "right_": "a"}
    assert change.new["other"] == {"left_": 2, "right_": "b"}
    assert change.new["large"] == f"({',' * 49})"
    assert change.new["list"] == "{NULL}"


def test_deep_composite_is_text_below_a_depth(flash):
    levels = DEEPEST + 3
    flash.database.execute(
        "CREATE TYPE level_0 AS (x int)",
        *(f"CREATE TYPE level_{n} AS (x level_{n - 1})" for n in range(1, levels)),
        f"CREATE TABLE items (id int PRIMARY KEY, deep level_{levels - 1})",
    )
    flash.handler("items").start()
    value = "5"
    for n in range(levels):
        value = f"ROW({value})::level_{n}"
    flash.do(f"INSERT INTO items VALUES (1, {value})")
    (change,) = flash.delivered()
    value, depth = change.new["deep"], 0
    while isinstance(value, dict):
        value, depth = value["x"], depth + 1
    assert depth == DEEPEST
    assert value.startswith("(")


def test_most_fields_allowed_are_delivered(flash):
    wide = MAX_FIELDS // 2
    columns = ", ".join(f"x{n} int" for n in range(wide))
    flash.database.execute(
        f"CREATE TYPE wide AS ({columns})",
        "CREATE TABLE items (id int PRIMARY KEY, one wide, two wide, three wide)",
    )
    flash.handler("items").start()
    value = f"'({',' * (wide - 1)})'"
    flash.do(f"INSERT INTO items VALUES (1, {value}, {value}, {value})")
    (change,) = flash.delivered()
    kinds = [type(change.new[name]).__name__ for name in ("one", "two", "three")]
    assert kinds == ["dict", "dict", "str"]


@pytest.mark.parametrize("options", [{}, {"batch": 10}], ids=["each", "batched"])
def test_oversize_change_is_a_dead_letter_and_stops_no_handler(flash, options):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, note text)")
    flash.database.execute("ALTER TABLE items REPLICA IDENTITY FULL")
    flash.handler("items", **options).start(flash_max_change_size=1000)
    flash.do(
        "INSERT INTO items SELECT n, 'a', repeat('x', n * 400) FROM generate_series(1, 4) AS n",
        "UPDATE items SET name = 'b', note = repeat('y', 400) WHERE id = 3",
        "DELETE FROM items WHERE id = 4",
    )
    delivered = [f"{c.operation.names()[0]} {c.key['id']}" for c in flash.delivered()]
    assert delivered == ["insert 1", "insert 2"]
    dead = [letters.decode(sealed.body) for sealed in flash.publisher.queues["flash.dead"]]
    assert [letter.error for letter in dead] == ["ChangeTooLarge"] * 4
    assert dead[0].message.startswith("insert public.items id=3 @")
    changes = [change for letter in dead for change in letters.changes_of(letter)]
    assert shown(changes) == [
        *("insert 3,a,UNCHANGED", "insert 4,a,UNCHANGED"),
        "update 3,a,UNCHANGED -> 3,b,UNCHANGED",
        "delete 4,a,UNCHANGED",
    ]
    assert [letter.changes for letter in dead] == [[change.id] for change in changes]
    assert len({letter.id for letter in dead}) == 4


def test_oversize_message_is_a_dead_letter(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items")
    on_message("big")(flash.app.tasks["handler"])
    flash.start(flash_max_change_size=1000)
    emit = "SELECT pg_logical_emit_message(true, 'big', repeat('x', {}))"
    flash.do(emit.format(2000), emit.format(10))
    assert [change.content for change in flash.delivered()] == [b"x" * 10]
    (sealed,) = flash.publisher.queues["flash.dead"]
    (change,) = letters.changes_of(letters.decode(sealed.body))
    assert (change.prefix, change.content) == ("big", b"")


@pytest.fixture
def small(rabbit):
    """RabbitMQ takes messages of 20,000 bytes at most."""
    limit = "application:set_env(rabbit, max_message_size, {0})"
    # Where later releases keep it.
    limit += ", persistent_term:put(max_message_size, {0})"
    rabbit.empty()
    before = rabbit.evaluate("element(2, application:get_env(rabbit, max_message_size))")
    rabbit.evaluate(limit.format(20_000))
    yield rabbit
    rabbit.evaluate(limit.format(re.search(r"\d+", before)[0]))


def received(rabbit, queue):
    """Bodies of the messages in a queue, taken out."""
    with amqp.Connection(host=f"127.0.0.1:{rabbit.port}") as connection:
        channel = connection.channel()
        messages = iter(lambda: channel.basic_get(queue, no_ack=True), None)
        return [message.body for message in messages]


def start_retaining(flash):
    """Start with a window of past changes, and return a time since which it has all."""
    flash.start(flash_replay_window=3600)
    with flash.database.connect() as connection:
        source = Source(connection, Settings.from_app(flash.app))
        flash.wait(lambda: replay_slot.oldest(source))
    return str(flash.database.one("SELECT clock_timestamp()"))


def replay_since(flash, since):
    """Enqueue the changes again; return the number of messages."""
    with flash.database.connect() as connection:
        source = Source(connection, Settings.from_app(flash.app))
        wanted, subscriptions = replay.parse_span(source, since, None), subscriptions_of(flash.app)
        return replay.enqueue_changes(flash.app, source, subscriptions, "handler", wanted)


@pytest.mark.parametrize("options", [{}, {"batch": 1000}], ids=["each", "batched"])
def test_oversize_change_for_rabbitmq_stops_no_handler(flash, small, options):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, note text, other text)")
    flash.app.conf.broker_url = small.url
    flash.handler("items", **options)
    flash.publisher = for_app(flash.app)
    before = start_retaining(flash)
    flash.do(
        "INSERT INTO items SELECT n, CASE n WHEN 50 THEN repeat('x', 15000) ELSE 'a' END, "
        "repeat('y', 1000) FROM generate_series(1, 100) AS n",
        "UPDATE items SET note = repeat('x', 30000) WHERE id = 7",
        "UPDATE items SET note = 'b' WHERE id = 8",
        "INSERT INTO items SELECT n, 'a', repeat('y', 400 * (n - 1000)) "
        "FROM generate_series(1001, 1060) AS n",
    )
    assert flash.replicator.telemetry.failures == {"PublishError": 1}
    flash.stop()
    bodies = received(small, "flash")
    changes = [change for body in bodies for change in letters.changes_in(body)]
    ids = dict.fromkeys(change.new["id"] for change in changes)  # some may have come twice
    delivered = [n for n in range(1, 101) if n != 50]
    large = [n for n in range(1001, 1061) if n not in ids]
    assert 1 < len(large) < 30
    assert list(ids) == [*delivered, *range(1001, large[0])]
    assert [c.new["id"] for c in changes if c.operation is Operation.UPDATE] == [8]
    assert len(bodies) < len(changes) or not options
    dead = [letters.decode(sealed) for sealed in received(small, "flash.dead")]
    assert {letter.error for letter in dead} == {"ChangeTooLarge"}
    assert "and the broker takes messages of 20000;" in dead[0].message
    rest = [change for letter in dead for change in letters.changes_of(letter)]
    assert [change.new["id"] for change in rest] == [50, 7, *large]
    assert (rest[1].new["note"], rest[1].new["other"]) == (UNCHANGED, "y" * 1000)
    replay_since(flash, before)
    again = [change for body in received(small, "flash") for change in letters.changes_in(body)]
    assert dict.fromkeys(change.id for change in again) == dict.fromkeys(c.id for c in changes)
    assert len(received(small, "flash.dead")) == len(dead)


@pytest.mark.parametrize("ordered", [False, True])
def test_oversize_change_for_redis_stops_no_handler(flash, ordered):
    with Valkey(**{"proto-max-bulk-len": "1mb"}) as own, redis.Redis(port=own.port) as client:
        flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, note text)")
        flash.app.conf.broker_url = own.url
        flash.handler("items", ordered=ordered)
        flash.publisher = for_app(flash.app)
        before = start_retaining(flash)
        flash.do(
            "INSERT INTO items SELECT n, repeat('x', CASE n % 3 WHEN 0 THEN 5000000 ELSE 5000 END) "
            "FROM generate_series(1, 7) AS n"
        )
        flash.stop()
        dead = [json.loads(text)["body"] for text in client.lrange("flash.dead", 0, -1)]
        changes = [c for body in dead for c in letters.changes_of(letters.decode(body))]
        assert sorted((c.key["id"], c.new["note"]) for c in changes) == [
            (3, UNCHANGED),
            (6, UNCHANGED),
        ]
        lanes = [key for key in client.scan_iter() if re.search(rb"\.\d+$", key)]
        keys = lanes or ["flash"]
        assert sum(map(client.llen, keys)) == 5
        assert replay_since(flash, before) == 7
        assert sum(map(client.llen, keys)) == 10
        assert client.llen("flash.dead") == 4
        client.execute_command("ACL", "SETUSER", "default", "-lpush", "-rpush")
        with pytest.raises(PublishError, match=r"failed: .* 0 messages were enqueued before\. Run"):
            replay_since(flash, before)


@pytest.mark.parametrize("ordered", [False, True])
def test_restart_between_a_refusal_and_its_dead_letter_loses_nothing(flash, ordered):
    with Valkey(**{"proto-max-bulk-len": "1mb"}) as own, redis.Redis(port=own.port) as client:
        flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, note text)")
        flash.app.conf.broker_url = own.url
        flash.handler("items", ordered=ordered)
        flash.publisher = publisher = for_app(flash.app)
        find_out, refused, stopped = publisher._check_length, Event(), Event()

        def find_out_and_wait():
            try:
                find_out()
            except PublishError:  # the message is too long; nothing says so once Redis is back
                refused.set()
                assert stopped.wait(30)
                raise

        publisher._check_length = find_out_and_wait
        flash.start()
        flash.database.execute(
            "INSERT INTO items SELECT n, repeat('x', CASE n % 3 WHEN 0 THEN 5000000 ELSE 5000 END) "
            "FROM generate_series(1, 6) AS n"
        )
        assert refused.wait(30)
        own.stop()
        stopped.set()
        own.start()
        flash.do("INSERT INTO items VALUES (7)")
        flash.stop()
        dead = [json.loads(text)["body"] for text in client.lrange("flash.dead", 0, -1)]
        changes = [c for body in dead for c in letters.changes_of(letters.decode(body))]
        assert sorted(change.key["id"] for change in changes) == [3, 6]
        lanes = [key for key in client.scan_iter() if re.search(rb"\.\d+$", key)]
        assert sum(map(client.llen, lanes or ["flash"])) == 5


def test_oversize_message_that_redis_gets_in_base64_stops_nothing(flash):
    """kombu encodes bytes so, which compressed messages are; it makes them a third larger."""
    sizes = range(700_000, 2_400_000, 200_000)
    words = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 80000) n)"
    with Valkey(**{"proto-max-bulk-len": "1mb"}) as own, redis.Redis(port=own.port) as client:
        flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, note text)")
        flash.app.conf.update(broker_url=own.url, task_compression="gzip")
        flash.handler("items")
        flash.publisher = for_app(flash.app)
        rows = ", ".join(f"({size}, left({words}, {size}))" for size in sizes)
        flash.start().do(f"INSERT INTO items VALUES {rows}")
        flash.stop()
        waiting = [len(text) for text in client.lrange("flash", 0, -1)]
        assert len(waiting) + client.llen("flash.dead") == len(sizes)
        assert 700_000 < max(waiting) < 1 << 20


def test_oversize_change_of_an_ordered_handler_stops_nothing(flash, small):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, note text)")
    flash.app.conf.broker_url = small.url
    flash.handler("items", "insert|update|delete", ordered=Ordered(lanes=2))
    flash.publisher = for_app(flash.app)
    flash.start()
    flash.do(
        "INSERT INTO items SELECT n, CASE n % 5 WHEN 0 THEN repeat('x', 30000) ELSE 'a' END "
        "FROM generate_series(1, 10) AS n",
        "UPDATE items SET note = 'b' WHERE id = 5",
    )
    flash.stop()
    lanes = [queue for queue in small.queues() if re.search(r"\.[01]$", queue)]
    changes = [
        change
        for lane in lanes
        for body in received(small, lane)
        for change in lane_entries.decode(body).changes
    ]
    handled = {(c.key["id"], c.operation.names()[0]) for c in changes}
    assert handled == {(n, "insert") for n in range(1, 10) if n != 5} | {(5, "update")}
    dead = [letters.decode(sealed) for sealed in received(small, "flash.dead")]
    assert {letter.error for letter in dead} == {"ChangeTooLarge"}
    assert {c.key["id"] for letter in dead for c in letters.changes_of(letter)} == {5, 10}


@pytest.mark.parametrize("on", ["rabbitmq", "redis"])
@pytest.mark.parametrize("batch", [None, Batch(1, transaction=True)], ids=["single", "part"])
def test_dead_letter_that_is_too_large_is_stored_without_large_values(flash, request, on, batch):
    """It is larger than the message that has failed, the more so if that was compressed."""
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, note text, other text)")
    flash.handler("items", **({"batch": batch} if batch else {})).start()
    flash.do("INSERT INTO items SELECT n, repeat('x', 1000000), 'a' FROM generate_series(1, 2) n")
    flash.stop()
    message = flash.publisher.queues["flash"][0]
    changes = letters.changes_in(message.body)
    options = {"error": "ValueError", "text": "no", "traceback": "t" * 3000}
    letter = letters.from_message(message, "flash", arguments=[changes], **options)
    if on == "rabbitmq":
        small = request.getfixturevalue("small")
        flash.app.conf.broker_url = small.url
        assert store_letter(flash.app, letter)
        (sealed,) = received(small, "flash.dead")
    else:
        with Valkey(**{"proto-max-bulk-len": "1mb"}) as own, redis.Redis(port=own.port) as client:
            flash.app.conf.broker_url = own.url
            assert store_letter(flash.app, letter)
            sealed = json.loads(client.lpop("flash.dead"))["body"]
    stored = letters.decode(sealed)
    assert (stored.error, stored.traceback) == (letter.error, letter.traceback)
    assert "Its largest values are left out: the broker takes " in stored.message
    found = letters.changes_of(stored)
    assert [change.id for change in found] == [change.id for change in changes]
    assert {(change.new["note"], change.new["other"]) for change in found} == {(UNCHANGED, "a")}
    failed, retried = (
        json.loads(body)[0][0]["__value__"].get("part")
        for body in (message.body, letters.retry_message(stored).body)
    )
    assert failed == retried == ([0, 0] if batch else None)


def test_recreated_tables_leave_nothing_behind(flash):
    """Only what there is now is known, however many there have been."""
    create = "CREATE TABLE items (id int PRIMARY KEY, name text)"
    flash.database.execute(create)
    flash.handler("items").start()
    for number in range(3):
        flash.do(f"INSERT INTO items VALUES ({number}, 'a')")
        flash.database.execute("DROP TABLE items", create)
        oid = flash.database.one("SELECT 'items'::regclass::oid::int8")
        published = f"SELECT count(*) FROM pg_publication_rel WHERE prrelid = {oid}"
        flash.wait(lambda published=published: flash.database.one(published) == 4)
    flash.do("INSERT INTO items VALUES (9, 'a')")
    assert [change.key["id"] for change in flash.delivered()] == [0, 1, 2, 9]
    record = flash.database.one(
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication "
        "WHERE pubname = 'flash_publication_insert'"
    )
    assert record.count(str(oid)) == 8  # four operations, now and before


@pytest.mark.soak
def test_huge_message_without_a_handler_passes(flash):
    """It is in memory about four times, and gone."""
    size = 200 << 20
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY)")
    flash.handler("items")

    @on_message("paid")
    @flash.app.task(name="paid", shared=False)
    def paid(message): ...

    flash.start()
    flash.do("INSERT INTO items VALUES (1)")
    process, most, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, process.memory_info().rss)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    flash.do(
        f"SELECT pg_logical_emit_message(true, 'x', repeat('x', {size}))",
        "INSERT INTO items VALUES (2)",
    )
    done.set()
    watcher.join(30)
    assert [change.key["id"] for change in flash.delivered()] == [1, 2]
    assert most - before < 5 * size


def pass_by(flash, position):
    """Run the statements of docs/operating.md that move the slot past a row."""
    page = OPERATING.read_text()
    statements = page.partition("## A row that PostgreSQL cannot send")[2].partition("```sql")[2]
    statements = statements.partition("```")[0].replace("0/1B0A3F8", position)
    flash.database.execute(statements.replace("flash_replication", flash.database.slot))


@pytest.fixture
def legacy(new_database, new_app):
    """A database in an encoding with bytes that have no character in UTF-8."""
    options = "ENCODING 'WIN1252' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    flash = Flash(new_database(options), new_app())
    yield flash
    flash.stop()


def test_row_that_cannot_be_sent_holds_up_only_what_comes_after_it(legacy, caplog):
    """What comes before it arrives with the error, and is delivered once."""
    flash = legacy
    caplog.set_level("INFO")
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text)")
    flash.handler("items", "insert").start().do("INSERT INTO items VALUES (1, 'a')")
    flash.stop()
    flash.database.execute(
        "SET client_encoding = 'WIN1252'; INSERT INTO items VALUES (2, 'b')",
        "SET client_encoding = 'WIN1252'; INSERT INTO items VALUES (3, E'\\x81')",
        "INSERT INTO items VALUES (4, 'd')",
    )
    caplog.clear()
    flash.start(wait=False)
    flash.wait(lambda: caplog.text.count("Replicating the slot") >= 3)
    assert shown(flash.delivered()) == ["insert 1,a", "insert 2,b"]
    assert "docs/operating.md, A row that PostgreSQL cannot send" in caplog.text
    assert caplog.text.count("everything behind it waits") == 1
    flash.stop()
    if flash.database.connect().info.server_version < 150000:
        return  # it has no pg_walinspect
    position = re.search("cannot send the row at ([0-9A-F/]+) ", caplog.text).group(1)
    pass_by(flash, position)
    flash.start().do("INSERT INTO items VALUES (5, 'e')")
    assert shown(flash.delivered()) == ["insert 4,d", "insert 5,e"]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_without_an_encoding_is_delivered_byte_by_byte(new_database, new_app, streaming):
    """The text of a database in SQL_ASCII is whatever bytes its clients have written."""
    options = "ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    database = new_database(options)
    database.dsn += "?client_encoding=UTF8"
    flash = Flash(database, new_app())
    flash.database.execute(
        "CREATE TABLE items (name text PRIMARY KEY, names text[], document json)",
        "ALTER TABLE items REPLICA IDENTITY FULL",
    )
    flash.handler("items").handler("items", name="fields", fields=["names"])
    for lookup in ("contains", "icontains", "regex"):
        flash.handler("items", name=lookup, where={f"name__{lookup}": "af"})
    flash.start(flash_use_streaming=streaming)
    try:
        flash.do(
            "SELECT pg_logical_emit_message(true, E'caf\\351', '')",
            "INSERT INTO items VALUES (E'caf\\351', ARRAY[E'\\351'], E'\"\\351\"')",
            "INSERT INTO items VALUES (E'\\303\\251')",
            "UPDATE items SET names = NULL WHERE document IS NOT NULL",
        )
    finally:
        flash.stop()
    bad, _, update = changes = flash.delivered()
    assert "with a key that cannot be decoded" in repr(bad)
    assert [change.new["name"] for change in changes] == ["caf\udce9", "é", "caf\udce9"]
    assert bad.new["name"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert dict(bad.new) == {**update.old}
    assert (bad.new["names"], bad.new["document"]) == ("{\udce9}", '"\udce9"')
    assert len(flash.delivered("fields")) == 3
    for lookup in ("contains", "icontains", "regex"):
        matching = [change.operation.names()[0] for change in flash.delivered(lookup)]
        assert matching == ["insert", "update"]


def test_key_that_is_no_text_stops_its_backfill_alone_when_its_row_moves(
    new_database, new_app, caplog
):
    """The key would be recorded, so that its row is read when it may have been passed by."""
    options = "ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    database = new_database(options)
    database.dsn += "?client_encoding=UTF8"
    flash = Flash(database, new_app())
    flash.database.execute("CREATE TABLE items (name text PRIMARY KEY)")
    flash.handler("items", "insert", backfill=True).start()
    flash.stop()
    flash.database.execute("DELETE FROM flash_celery_backfills", "INSERT INTO items VALUES ('a')")
    with flash.database.connect() as older, older.transaction():
        older.execute("SELECT pg_current_xact_id()")  # the backfill waits for it
        flash.start()
        try:
            flash.do(
                "UPDATE items SET name = E'caf\\351'",
                "INSERT INTO items VALUES ('b')",
            )
        finally:
            flash.stop()
    assert shown(flash.delivered()) == ["insert a", "insert b"]
    assert flash.database.one("SELECT state FROM flash_celery_backfills") == "stopped"
    assert "is stopped, because the rows that move cannot be recorded" in caplog.text


def test_row_that_cannot_be_sent_pauses_its_backfill_alone(legacy, caplog):
    """It is named by its place, because its values may be secret; the others are done."""
    flash = legacy
    flash.database.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text)",
        "CREATE TABLE others (id int PRIMARY KEY)",
        "INSERT INTO items SELECT n, 'a' FROM generate_series(1, 9) n",
        "SET client_encoding = 'WIN1252'; UPDATE items SET name = E'\\x81' WHERE id = 7",
        "INSERT INTO others VALUES (1)",
    )
    place = flash.database.one("SELECT ctid::text FROM items WHERE id = 7")
    flash.handler("items", backfill=True)
    flash.handler("others", name="others", backfill=True).start()
    states = "SELECT array_agg(state ORDER BY table_name) FROM flash_celery_backfills"
    exists = "SELECT to_regclass('flash_celery_backfills') IS NOT NULL"
    flash.wait(lambda: flash.database.one(exists))
    flash.wait(lambda: flash.database.one(states) == ["paused", "done"])
    assert len(flash.delivered("others")) == 1
    (line,) = [line for line in caplog.messages if "cannot send the row" in line]
    assert f"public.items with the ctid {place} " in line
    assert f"correct or delete it (WHERE ctid = '{place}')" in line
    flash.database.execute(
        "DELETE FROM items WHERE id = 7",
        "UPDATE flash_celery_backfills SET state = 'requested' WHERE state = 'paused'",
    )
    flash.wait(lambda: flash.database.one(states) == ["done", "done"])
    flash.do("SELECT pg_logical_emit_message(true, '', '')")
    keys = [change.key["id"] for change in flash.delivered() if change.backfill]
    assert keys == [1, 2, 3, 4, 5, 6, 8, 9]


@pytest.mark.soak
@pytest.mark.parametrize("columns", [1, 2])
def test_row_of_more_than_a_gigabyte_is_named_and_can_be_passed(flash, caplog, columns):
    """PostgreSQL refuses the text of one value and that of a row at different places."""
    extensions = "SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_walinspect'"
    if not flash.database.one(extensions):
        pytest.skip("this PostgreSQL has no pg_walinspect")
    large = f"convert_to(repeat('a', {560_000_000 // columns}), 'UTF8')"
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, a bytea, b bytea)")
    flash.handler("items", "insert").start().do("INSERT INTO items VALUES (1)")
    flash.database.execute(f"INSERT INTO items VALUES (2, {', '.join([large] * columns)})")
    flash.database.execute("INSERT INTO items VALUES (3)")
    flash.wait(lambda: "everything behind it waits" in caplog.text, 120)
    assert "docs/operating.md, A row that PostgreSQL cannot send" in caplog.text
    position = re.search("cannot send the row at ([0-9A-F/]+),", caplog.text).group(1)
    flash.stop()
    pass_by(flash, position)
    flash.start().do("INSERT INTO items VALUES (4)")
    assert [change.key["id"] for change in flash.delivered()] == [1, 3, 4]


@pytest.mark.soak
def test_row_of_more_than_a_gigabyte_passes_without_its_column(flash):
    flash.database.execute("CREATE TABLE items (id int PRIMARY KEY, name text, b bytea)")
    if flash.database.connect().info.server_version < 150000:
        pytest.skip("PostgreSQL 14 has no column lists")
    flash.handler("items", "insert", fields=["name"]).start(flash_push_down=True)
    flash.do("INSERT INTO items SELECT 1, 'a', convert_to(repeat('a', 560000000), 'UTF8')")
    assert [dict(change.new) for change in flash.delivered()] == [{"name": "a"}]
