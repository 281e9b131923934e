"""Which module may import which: data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flash_celery"

ALLOWED = {
    # Both sides.
    "escaping": set(),
    "address": {"errors"},
    "logs": set(),
    "errors": {"escaping"},
    "dsn": {"django"},
    "settings": {"address", "dsn", "errors"},
    "protocol": set(),
    "protocol.lsn": set(),
    "protocol.messages": {"protocol"},
    "protocol.pgoutput": {"protocol", "errors"},
    # The application's side: declare, decode, handle.
    "values": {"comparison"},
    "comparison": set(),
    "patterns": set(),
    "conditions": {"comparison", "patterns", "values", "errors"},
    "rows": {"values", "protocol"},
    "operations": set(),
    "naming": set(),
    "changes": {"escaping", "models", "naming", "operations", "rows", "protocol"},
    "payload": {"changes", "escaping", "naming", "rows", "protocol", "errors"},
    "mapped": {"errors"},
    "models": {"django", "errors"},
    "row_types": {"changes", "rows", "errors"},
    "subscriptions": {"conditions", "changes", "mapped", "models", "row_types", "errors"},
    "tasks": {"errors"},
    "declarations": {"changes", "row_types", "subscriptions", "errors"},
    "clients": {"errors"},
    "handlers": {
        *(
            "changes",
            "clients",
            "conditions",
            "declarations",
            "row_types",
            "subscriptions",
            "tasks",
        ),
        "errors",
    },
    # Capture, in the direction of the data.
    "backoff": set(),
    # Plain numbers, which the capture side writes and `monitoring` reads.
    "telemetry": {"progress", "errors"},
    "hopeless": {"settings", "errors"},
    "control": set(),
    "progress": {"protocol"},
    "protocol.frames": {"protocol", "errors"},
    "replication": {"protocol", "errors"},
    "spool": {"errors"},
    "transactions": {"rows", "spool", "protocol", "errors"},
    "transitions": {"changes", "comparison", "conditions", "rows", "subscriptions", "protocol"},
    "ancestry": {"protocol", "subscriptions"},
    "relations": {
        *("ancestry", "catalog", "column_types", "conditions", "escaping", "protocol", "rows"),
        *("slots", "subscriptions", "errors"),
    },
    "routing": {
        *("catalog", "changes", "column_types", "conditions", "escaping", "payload", "protocol"),
        *("relations", "rows", "subscriptions", "telemetry", "transitions", "errors"),
    },
    "enqueued": {"payload", "protocol", "rows"},
    "options": {"changes", "settings", "subscriptions", "errors"},
    "messages": {
        *("changes", "enqueued", "naming", "options", "payload", "rows", "settings"),
        *("subscriptions", "telemetry"),
    },
    "outbox": {"enqueued", "messages", "payload", "protocol", "telemetry"},
    "backpressure": {"messages", "telemetry"},
    "tracing": {"changes", "messages"},
    "announcing": {"changes", "messages", "tracing"},
    "outage": {"messages", "telemetry", "errors"},
    "publishing": {
        *("announcing", "backoff", "backpressure", "enqueued", "messages", "outage", "outbox"),
        *("parking", "protocol", "publishers", "telemetry", "errors"),
    },
    "unconsumed": set(),
    "letters": {
        "changes",
        "escaping",
        "messages",
        "naming",
        "payload",
        "subscriptions",
        "errors",
    },
    # A Celery worker, when it starts; nothing of the application's side imports it.
    "dead": {"backoff", "escaping", "letters", "messages", "publishers", "settings", "unconsumed"}
    | {"errors"},
    "publishers": {"publishers"},
    "publishers.base": {"clients", "enqueued", "messages", "errors"},
    "publishers.redis": {"publishers", "enqueued", "messages"},
    "publishers.journal": {"enqueued", "messages", "protocol", "errors"},
    "publishers.amqp": {"publishers", "messages", "unconsumed", "errors"},
    "publishers.kombu": {"publishers", "messages"},
    "publishers.memory": {"enqueued", "messages", "errors"},
    # The catalog, and what is set up in it.
    "catalog": {"replication", "subscriptions"},
    "column_types": {"comparison", "conditions", "subscriptions", "errors"},
    "row_filters": {"comparison", "conditions"},
    "pushdown": {"catalog", "changes", "column_types", "row_filters", "subscriptions"},
    "findings": {"errors"},
    "slots": {"progress", "errors"},
    "standbys": {"catalog", "findings", "settings", "slots", "errors"},
    "publications": {"catalog", "changes", "pushdown", "slots", "subscriptions", "errors"},
    "turns": {"backoff", "escaping"},
    "ddl": {"backoff", "catalog", "changes", "escaping", "publications", "slots", "errors"},
    "script": {"ddl"},
    "server": {"findings", "replication", "settings", "spool", "standbys", "errors"},
    "tables": {"catalog", "column_types", "publications", "subscriptions", "errors"},
    "identities": {"catalog", "publications", "settings", "tables", "errors"},
    "preflight": {
        *("catalog", "ddl", "findings", "identities", "progress", "publications", "replication"),
        *("script", "server", "settings", "slots", "subscriptions", "tables", "errors"),
    },
    # The replication worker.
    "provisioning": {
        *(
            "ancestry",
            "catalog",
            "control",
            "ddl",
            "history",
            "preflight",
            "progress",
            "protocol",
            "publications",
            "replication",
        ),
        *("settings", "slots", "subscriptions", "errors"),
    },
    "oversize": {"changes", "escaping", "letters", "messages", "payload", "protocol", "rows"}
    | {"errors"},
    "watch": {"progress", "protocol", "settings", "slots", "telemetry", "errors"},
    "parking": {"letters", "messages", "unconsumed"},
    "pausing": {"ddl", "parking", "publications", "settings", "subscriptions", "turns", "errors"},
    "holding": {"escaping", "messages", "parking", "pausing", "publications", "settings"}
    | {"subscriptions", "errors"},
    "session": {
        *("ancestry", "relations"),
        *("catalog", "changes", "control", "enqueued", "messages", "outbox", "parking", "payload"),
        *(
            "progress",
            "protocol",
            "publishing",
            "replication",
            "routing",
            "settings",
            "subscriptions",
        ),
        *("telemetry", "transactions", "watch", "errors"),
    },
    "replicator": {
        *("backoff", "catalog", "control", "enqueued", "escaping", "history", "holding", "turns"),
        *("hopeless", "server"),
        *("messages", "outbox", "oversize", "progress", "provisioning", "protocol"),
        *("publications", "publishers", "publishing", "replication", "session", "settings"),
        *("slots", "subscriptions", "telemetry", "unconsumed", "watch", "errors"),
    },
    # Commands import what they do.
    "status": {
        *("backpressure", "doctor", "history", "messages", "pausing", "publications"),
        *("publishers", "settings", "slots", "subscriptions", "errors"),
    },
    "doctor": {
        *("findings", "messages", "parking", "pausing", "publications", "publishers", "settings"),
        "spool",
        *("subscriptions", "errors"),
    },
    "live": {"escaping", "protocol", "settings", "slots", "status", "subscriptions", "errors"},
    "history": {"catalog", "changes", "ddl", "findings", "protocol", "publications", "settings"}
    | {"slots", "errors"},
    "replay": {
        *("ancestry", "relations"),
        *("backpressure", "changes", "history", "messages", "outbox", "oversize", "unconsumed"),
        *("payload", "protocol", "publications", "publishers", "replication", "routing", "rows"),
        *("settings", "slots", "subscriptions", "transactions", "errors"),
    },
    "outstanding": {"changes", "payload", "protocol", "publishers", "errors"},
    "waiting": {
        *("catalog", "handlers", "letterbox", "letters", "messages", "outstanding", "pausing"),
        *("protocol", "settings", "slots", "errors"),
    },
    "unparking": {"messages", "parking", "pausing", "publishers", "settings", "subscriptions"},
    "letterbox": {"letters", "publishers", "subscriptions", "errors"},
    "explain": {
        *("catalog", "preflight", "publications", "pushdown", "settings", "subscriptions"),
    },
    "reset": {
        *("ddl", "history", "identities", "publications", "settings", "status", "turns", "errors"),
    },
    "tail": {
        "relations",
        *("catalog", "changes", "control", "ddl", "payload", "protocol", "publications"),
        "replication",
        *("routing", "rows", "subscriptions", "transactions", "errors"),
    },
    # Beside the replication worker, in threads of its own; nothing of it is imported there.
    "monitoring": set(),
    "monitoring.history": set(),
    "monitoring.broker": {"letters", "publishers", "errors"},
    "monitoring.health": {"settings", "telemetry"},
    "monitoring.metrics": {"protocol", "telemetry"},
    "monitoring.observer": {
        *("monitoring", "catalog", "doctor", "escaping", "messages", "settings", "status"),
        *("subscriptions", "telemetry", "errors"),
    },
    "monitoring.server": {"monitoring", "address", "errors"},
    "sources": {"findings", "settings", "subscriptions", "errors"},
    # For the tests of users; nothing else imports it.
    "testing": {"testing"},
    "testing.texts": {"comparison", "errors", "protocol", "rows", "values"},
    "testing.building": {"testing", "changes", "protocol", "rows", "subscriptions"},
    "testing.applying": {
        *("ancestry", "oversize", "relations"),
        *("testing", "catalog", "changes", "column_types", "comparison", "conditions", "handlers"),
        *("messages", "outbox", "payload", "protocol", "routing", "settings", "subscriptions"),
        "errors",
    },
    "testing.live": {
        *("testing", "catalog", "enqueued", "handlers", "messages", "publishers", "replicator"),
        *("reset", "settings", "errors"),
    },
    "pytest_plugin": {"testing"},
    "cli": {"cli"},
    "cli.project": {
        "catalog",
        "escaping",
        "handlers",
        "hopeless",
        "letterbox",
        "logs",
        "settings",
    }
    | {"subscriptions", "errors"},
    "cli.replicate": {
        "cli",
        "control",
        "doctor",
        "errors",
        "findings",
        "logs",
        "monitoring",
        "publishers",
        "replicator",
        "sources",
    },
    "cli.status": {"cli", "live", "status", "errors"},
    "cli.doctor": {"cli", "doctor", "escaping", "explain", "findings", "history", "pausing"}
    | {"preflight", "script", "server", "sources", "standbys"},
    "cli.wait": {"cli", "waiting", "errors"},
    "cli.replay": {"cli", "pausing", "replay", "errors"},
    "cli.pause": {"cli", "parking", "pausing", "publishers"},
    "cli.reset": {"cli", "reset", "unparking"},
    "cli.tail": {"cli", "control", "subscriptions", "tail", "errors"},
    "cli.dead": {"cli", "letterbox", "tail", "errors"},
    "cli.letters": {"escaping", "letterbox", "letters", "errors"},
    "django": set(),
    "django.apps": {"django"},
    "django.admin": {"django", "errors"},
    "django.overview": {"catalog", "errors", "escaping", "handlers", "letterbox", "letters"}
    | {"settings", "status"},
    "django.project": {"errors"},
    "django.checks": {"catalog", "django", "dsn", "errors", "handlers", "settings", "subscriptions"}
    | {"tables"},
    "django.dsn": set(),
    "django.history": {"subscriptions"},
    "django.instances": {"changes", "errors", "protocol", "rows", "subscriptions", "values"},
    "django.management": set(),
    "django.management.commands": set(),
    "django.management.commands.flash": set(),
}


def imports(path):
    inside = path.parent != PACKAGE
    package = path.parent.name
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            own = node.level == 1 and inside
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (package if own else name.partition(".")[0] for name in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_what_it_may(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if module != "__init__":
        assert set(imports(path)) <= ALLOWED[module]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_what_only_older_pythons_install_is_imported_for_them_alone(path):
    body = ast.parse(path.read_text()).body
    always = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    assert "typing_extensions" not in always


def test_importing_the_package_opens_no_way_to_a_database():
    code = "import sys, flash_celery; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    loaded = loaded.split()
    for module in ("flash_celery.changes", "flash_celery.payload"):
        assert module in loaded
    # (amqp comes with Celery itself.)
    capture = (
        "dead",
        "letters",
        "settings",
        "catalog",
        "replication",
        "replicator",
        "publications",
        "publishers",
    )
    # (kombu imports Django where it is installed.)
    optional = ("prometheus_client", "pydantic", "redis", "rich", "sqlalchemy")
    for module in (*optional, *(f"flash_celery.{name}" for name in capture)):
        assert module not in loaded
