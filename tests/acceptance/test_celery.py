"""What Celery's users have beside queues works with handlers, seen from the outside."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import redis

from example_project.servers import free_port, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def desk(shop):
    """The project of `desk.py`."""
    shop.project = "desk"
    return shop


def lines(desk, file):
    """Return the lines of a file beside the notes."""
    path = desk.notes_file.with_name(f"notes.{file}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def configure(desk, **conf):
    given = json.loads(desk.environment.get("SHOP_CONF", "{}"))
    desk.environment["SHOP_CONF"] = json.dumps({**given, **conf})


def test_handler_is_an_ordinary_task(desk):
    """Routes, priorities, annotations, results, canvas, events and beat, in one worker."""
    configure(
        desk,
        result_backend=desk.broker.url,
        task_routes={"desk.each": {"queue": "counter", "priority": 3}},
        task_annotations={
            "desk.each": {"rate_limit": "600/m"},
            "desk.many": {"ignore_result": True, "priority": 6},
        },
        task_default_queue="others",
        beat_schedule={"tick": {"task": "desk.tick", "schedule": 0.5}},
    )
    schedule = ("-B", "-s", str(desk.folder / "schedule"))
    worker = desk.worker("threads", "flash,counter,others", options=schedule)
    replicate = desk.replicate()
    desk.database.execute(
        "INSERT INTO items VALUES (1, 'a', 'x')", "UPDATE items SET name = 'b'", "DELETE FROM items"
    )
    (each,) = desk.until_noted(1)
    assert (each["queue"], each["priority"]) == ("counter", 3)
    (canvas,) = desk.until_noted(1, "canvas")
    wait_until(lambda: len(desk.notes("named")) == 3, "the chain and the group")
    for note in desk.notes("named"):
        assert (note["id"], note["new"]["name"]) == (canvas["id"], "b")
    assert desk.until_noted(1, "collected")[0]["ids"] == [canvas["id"]] * 2
    (many,) = desk.until_noted(1, "many")
    assert desk.until_noted(2, "tick")

    keys = stored_results(desk)
    assert keys[each["task_id"]]["status"] == "SUCCESS"
    assert keys[each["task_id"]]["result"] == {"id": 1}
    assert canvas["task_id"] not in keys  # ignore_result of the task
    assert many["task_id"] not in keys  # and of task_annotations
    inspected = desk.run("inspect", "registered", "-j")
    (registered,) = json.loads(inspected.stdout).values()
    assert "desk.each [rate_limit=600/m]" in registered
    assert desk.end(replicate) == 0
    assert desk.end(worker) == 0
    assert "Traceback" not in worker.log.read_text()


def stored_results(desk):
    import redis

    with redis.Redis(port=desk.broker.port) as client:
        keys = client.keys("celery-task-meta-*")
        return {
            key.decode().removeprefix("celery-task-meta-"): json.loads(client.get(key))
            for key in keys
        }


def test_trace_leads_from_the_commit_to_the_handler(desk):
    """With OpenTelemetry and with Sentry, each with its own integration of Celery."""
    desk.environment["DESK_TRACE"] = "opentelemetry,sentry"
    desk.worker("prefork", "flash,celery")
    replicate = desk.replicate()
    desk.database.execute("INSERT INTO items VALUES (1, 'raise', 'x')")
    (each,) = desk.until_noted(1)
    wait_until(lambda: len(opentelemetry(desk)) == 3, "three spans of OpenTelemetry's")
    spans = opentelemetry(desk)
    commit, enqueued, handled = (
        spans[name] for name in ("commit public.items", "apply_async/desk.each", "run/desk.each")
    )
    assert commit["trace"] == enqueued["trace"] == handled["trace"]
    assert (commit["parent"], enqueued["parent"]) == (None, commit["span"])
    assert handled["parent"] == enqueued["span"]
    assert commit["start"] < enqueued["start"] < handled["start"]
    assert commit["pid"] == replicate.pid != handled["pid"]

    wait_until(lambda: len(sentry(desk)) == 3, "a transaction of each process, and the error")
    commit, handled, error = (
        sentry(desk)[name] for name in ("commit public.items", "desk.each", "ValueError")
    )
    assert error["extra"]["celery-job"]["task_name"] == "desk.each"
    assert error["tags"]["celery_task_id"] == each["task_id"]
    traces = [event["contexts"]["trace"] for event in (commit, handled, error)]
    assert len({trace["trace_id"] for trace in traces}) == 1
    (published,) = commit["spans"]
    assert published["op"] == "queue.publish"
    assert handled["contexts"]["trace"]["parent_span_id"] == published["span_id"]
    assert commit["start_timestamp"] < published["start_timestamp"] < handled["start_timestamp"]


def sentry(desk):
    """Transactions by their names, errors by their types; what was only logged is left out."""
    events = {}
    for line in lines(desk, "sentry"):
        event = line["event"]
        if "exception" in event:
            events[event["exception"]["values"][-1]["type"]] = event
        elif line["kind"] == "transaction":
            events[event["transaction"]] = event
    return events


def opentelemetry(desk):
    return {span["name"]: span for span in lines(desk, "opentelemetry")}


def recommended(broker):
    """The examples of docs/workers.md for this broker, and those for both."""
    text = (ROOT / "docs" / "workers.md").read_text()
    examples = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL))
    other = "rabbitmq" if broker == "redis" else "redis"
    assert {broker, other} <= set(examples)
    assert len(examples) == text.count("```python")
    return "\n".join(example for name, example in examples.items() if name != other)


@pytest.mark.parametrize("broker", ["redis", pytest.param("rabbitmq", marks=pytest.mark.soak)])
def test_celery_worker_runs_with_the_recommended_settings(request, make_shop, tmp_path, broker):
    if broker == "redis":
        desk = request.getfixturevalue("desk")
    else:
        rabbit = request.getfixturevalue("rabbit")
        rabbit.empty()
        desk = make_shop(rabbit)
        desk.project = "desk"
    examples = tmp_path / "examples.py"
    examples.write_text(recommended(broker))
    desk.environment["DESK_EXAMPLES"] = str(examples)
    desk.database.execute(
        "CREATE TABLE orders (id int PRIMARY KEY)",
        "CREATE TABLE documents (id int PRIMARY KEY, body text)",
    )
    worker = desk.worker("prefork", "flash,slow,celery")
    desk.replicate()
    desk.database.execute(
        "INSERT INTO orders VALUES (5)",
        "INSERT INTO documents VALUES (7, 'a long one')",
        "INSERT INTO items SELECT n, 'a' FROM generate_series(1, 50) AS n",
    )
    # Retries that wait leave room for others.
    desk.database.execute(
        "INSERT INTO items SELECT n, 'retry', '600' FROM generate_series(200, 203) AS n"
    )
    desk.until_noted(54)
    desk.database.execute("INSERT INTO items SELECT n, 'a' FROM generate_series(51, 100) AS n")
    desk.until_noted(104)
    (billed,) = desk.until_noted(1, "bill")
    assert billed["order"] == 5
    desk.until_said(worker, "rendering 7")
    if broker == "redis":
        with redis.Redis(port=desk.broker.port) as client:
            client.replicaof("127.0.0.1", 1)  # as after a failover
            try:
                # "Connection to broker lost" and "Cannot connect to"; before Celery 5.6 the first.
                again = lambda: worker.log.read_text().count("consumer: C") >= 2  # noqa: E731
                wait_until(again, "the worker to try to connect again")
            finally:
                client.replicaof("NO", "ONE")
        desk.database.execute("INSERT INTO items VALUES (101, 'a')")
        desk.until_noted(105)
    findings = desk.run("flash", "doctor").stdout
    assert "workers: they know every handler" in findings
    if broker == "redis":
        assert "comes back after 900 s" in findings
    else:
        assert "queue type" not in findings
        listed = rabbit.control("list_queues", "--no-table-headers", "name", "type").splitlines()
        assert {"flash\tquorum", "slow\tquorum"} <= set(listed)
    assert desk.end(worker) == 0


def test_replicate_runs_no_handlers_itself(desk):
    configure(desk, task_always_eager=True)
    ran = desk.run("flash", "replicate")
    assert ran.returncode == 2
    assert "task_always_eager" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert desk.database.execute("SELECT slot_name FROM pg_replication_slots") == []
    assert "task_always_eager" in desk.run("flash", "doctor").stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DESK_JSON": "1"}, "The serializer 'json' of this project has replaced kombu's own"),
        ({"DESK_BROADCAST": "1"}, "the queue 'flash', which does not keep a change"),
        (
            {"SHOP_CONF": json.dumps({"task_routes": "desk.by_argument"})},
            "the router desk.by_argument of task_routes raised IndexError for desk.each",
        ),
    ],
)
def test_project_whose_changes_would_reach_no_handler_is_refused(desk, environment, message):
    ran = desk.run("flash", "replicate", **environment)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert desk.database.execute("SELECT slot_name FROM pg_replication_slots") == []
    doctor = desk.run("flash", "doctor", **environment)
    assert (doctor.returncode, message in doctor.stdout) == (1, True), doctor.stdout
    if "DESK_JSON" in environment:
        worker = desk.run("worker", "-P", "solo", **environment)
        assert (worker.returncode, message in worker.stderr) == (2, True), worker.stderr


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_retries_of_protocol_1_are_refused_at_start(desk, pool):
    configure(desk, task_protocol=1)
    worker = desk.worker(pool, "flash")
    assert worker.wait(30) == 2
    assert "Error: task_protocol is 1" in worker.log.read_text()
    if pool == "solo":
        ran = desk.run("flash", "replicate")
        assert ran.returncode == 2
        assert ran.stderr.startswith("Error: task_protocol is 1")
        assert "task_protocol is 1" in desk.run("flash", "doctor").stdout


@pytest.mark.soak
def test_flower_shows_names_and_readable_arguments(desk):
    port = free_port()
    desk.worker("solo", "flash,celery", options=("-E",))
    flower = ("flower", "--address=127.0.0.1", f"--port={port}")
    desk.start(*flower, FLOWER_UNAUTHENTICATED_API="1")
    desk.replicate()

    def tasks():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tasks", timeout=10) as answer:
                return json.load(answer)
        except OSError:
            return None

    wait_until(lambda: tasks() is not None, "flower")
    numbers = iter(range(1000))

    def shown():
        # It hears only of what happens once it listens.
        desk.database.execute(f"INSERT INTO items VALUES ({next(numbers)}, 'a')")
        return [task for task in tasks().values() if task["state"] == "SUCCESS"]

    (first, *_) = wait_until(shown, "a task in flower")
    assert first["name"] == "desk.each"
    assert re.fullmatch(r"insert public\.items id=\d+ @0/[0-9A-F]+", first["args"])
    desk.database.execute("DELETE FROM items")

    def batches():
        return [task for task in tasks().values() if task["name"] == "desk.many"]

    wait_until(batches, "a batch in flower")
    argument = r"\d+ changes from delete public\.items id=\d+ @0/[0-9A-F]+"
    assert re.fullmatch(argument, batches()[0]["args"])


@pytest.mark.soak
def test_inspect_shows_running_handlers(desk):
    configure(desk, worker_prefetch_multiplier=4)
    desk.worker("threads", "flash,celery")
    desk.replicate()
    desk.database.execute("INSERT INTO items SELECT n, 'wait' FROM generate_series(1, 6) AS n")
    desk.until_noted(2)
    for what, count in (("active", 2), ("reserved", 4)):
        ran = desk.run("inspect", what)
        assert ran.returncode == 0
        assert ran.stdout.count("insert public.items id=") == count, ran.stdout
        as_json = desk.run("inspect", what, "-j")
        (running,) = json.loads(as_json.stdout).values()
        assert {task["name"] for task in running} == {"desk.each"}
    desk.notes_file.with_name("notes.go").touch()
    assert len(desk.until_noted(6)) == 6


@pytest.mark.soak
@pytest.mark.parametrize("pool", ["solo", "prefork", "threads", "gevent", "eventlet"])
def test_pools_support_retries_dead_letters_and_batches(desk, pool):
    worker = desk.worker(pool, "flash,celery")
    desk.replicate()
    desk.database.execute(
        "INSERT INTO items SELECT n, 'a' FROM generate_series(1, 20) AS n",
        "INSERT INTO items VALUES (21, 'retry'), (22, 'raise')",
        "DELETE FROM items WHERE id < 10",
    )
    assert len(desk.until_noted(22)) >= 22
    wait_until(lambda: len(desk.notes()) == 23, "the retry")
    desk.until_noted(1, "many")
    wait_until(lambda: "is a dead letter now" in worker.log.read_text(), "the dead letter")
    (letter,) = json.loads(desk.run("flash", "dead", "list", "--json").stdout)
    assert letter["error"] == "ValueError"
    assert desk.end(worker) == 0


@pytest.mark.soak
def test_rate_limit_is_kept(desk):
    configure(desk, task_annotations={"desk.each": {"rate_limit": "2/s"}})
    desk.worker("threads", "flash,celery")
    desk.replicate()
    desk.database.execute("INSERT INTO items SELECT n, 'a' FROM generate_series(1, 6) AS n")
    times = [note["at"] for note in desk.until_noted(6)]
    assert times[-1] - times[0] > 1.5
