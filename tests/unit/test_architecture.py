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
    "errors": {"escaping"},
    "settings": {"django", "errors"},
    "protocol": set(),
    "protocol.lsn": set(),
    "protocol.messages": {"protocol"},
    "protocol.pgoutput": {"protocol", "errors"},
    # The application's side: declare, decode, handle.
    "values": {"comparison"},
    "comparison": set(),
    "conditions": {"comparison", "values", "errors"},
    "rows": {"values", "protocol"},
    "changes": {"escaping", "models", "rows", "protocol"},
    "payload": {"changes", "escaping", "rows", "protocol", "errors"},
    "models": {"django", "errors"},
    "subscriptions": {"conditions", "changes", "models", "errors"},
    "handlers": {"subscriptions", "conditions", "changes", "errors"},
    # Capture, in the direction of the data.
    "backoff": set(),
    "control": set(),
    "progress": {"protocol"},
    "protocol.frames": {"protocol", "errors"},
    "replication": {"protocol", "errors"},
    "spool": {"errors"},
    "transactions": {"rows", "spool", "protocol", "errors"},
    "transitions": {"changes", "conditions", "rows", "subscriptions", "protocol"},
    "routing": {
        *("catalog", "changes", "column_types", "conditions", "escaping", "payload", "protocol"),
        *("rows", "subscriptions", "transitions", "errors"),
    },
    "enqueued": {"payload", "protocol", "rows"},
    "messages": {
        *("changes", "enqueued", "payload", "rows", "settings", "subscriptions", "errors"),
    },
    "outbox": {"enqueued", "messages", "payload", "protocol"},
    "backpressure": {"messages"},
    "publishing": {
        *("backoff", "backpressure", "enqueued", "messages", "outbox", "protocol"),
        *("publishers", "errors"),
    },
    "letters": {
        "changes",
        "escaping",
        "messages",
        "payload",
        "subscriptions",
        "errors",
    },
    # A Celery worker, when it starts; nothing of the application's side imports it.
    "dead": {"backoff", "escaping", "letters", "messages", "publishers", "settings", "errors"},
    "publishers": {"publishers"},
    "publishers.base": {"enqueued", "messages", "errors"},
    "publishers.redis": {"publishers", "enqueued", "messages"},
    "publishers.journal": {"enqueued", "messages", "errors"},
    "publishers.amqp": {"publishers", "messages", "errors"},
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
    "ddl": {"backoff", "catalog", "changes", "escaping", "publications", "slots", "errors"},
    "script": {"ddl"},
    "tables": {"catalog", "column_types", "publications", "subscriptions", "errors"},
    "preflight": {
        *("catalog", "ddl", "findings", "progress", "publications", "replication", "settings"),
        *("script", "slots", "spool", "standbys", "subscriptions", "tables", "errors"),
    },
    # The replication worker.
    "oversize": {"changes", "escaping", "letters", "messages", "payload", "protocol", "rows"}
    | {"errors"},
    "watch": {"progress", "protocol", "settings", "slots", "errors"},
    "session": {
        *("catalog", "changes", "control", "enqueued", "messages", "outbox", "payload"),
        *(
            "progress",
            "protocol",
            "publishing",
            "replication",
            "routing",
            "settings",
            "subscriptions",
        ),
        *("transactions", "watch", "errors"),
    },
    "replicator": {
        *("backoff", "catalog", "control", "ddl", "enqueued", "escaping", "letters", "messages"),
        *("outbox", "oversize", "preflight", "progress"),
        *("protocol", "publications", "publishers", "publishing", "replication", "session"),
        *("settings", "slots", "subscriptions", "watch", "errors"),
    },
    # Commands import what they do.
    "status": {
        *("backpressure", "doctor", "messages", "publications", "publishers", "settings", "slots"),
        *("subscriptions", "errors"),
    },
    "doctor": {"findings", "publishers", "settings", "spool", "subscriptions", "errors"},
    "letterbox": {"escaping", "letters", "publishers", "subscriptions", "errors"},
    "explain": {
        *("catalog", "preflight", "publications", "pushdown", "settings", "subscriptions"),
    },
    "reset": {"ddl", "publications", "settings", "status", "errors"},
    "tail": {
        *("catalog", "changes", "control", "ddl", "payload", "protocol", "publications"),
        "replication",
        *("routing", "rows", "subscriptions", "transactions", "errors"),
    },
    "sources": {"findings", "settings", "subscriptions", "errors"},
    "cli": {"cli"},
    "cli.project": {"catalog", "escaping", "handlers", "letterbox", "replicator", "settings"}
    | {"subscriptions", "errors"},
    "cli.replicate": {
        "cli",
        "control",
        "doctor",
        "findings",
        "publishers",
        "replicator",
        "sources",
    },
    "cli.status": {"cli", "status"},
    "cli.doctor": {"cli", "doctor", "escaping", "explain", "findings", "preflight", "script"}
    | {"sources", "standbys"},
    "cli.reset": {"cli", "reset"},
    "cli.tail": {"cli", "control", "subscriptions", "tail", "errors"},
    "cli.dead": {"cli", "letterbox", "tail", "errors"},
    "django": set(),
    "django.apps": {"django"},
    "django.admin": {"django", "errors"},
    "django.overview": {"catalog", "errors", "escaping", "handlers", "letterbox", "letters"}
    | {"settings", "status"},
    "django.project": {"errors"},
    "django.checks": {"catalog", "django", "errors", "handlers", "settings", "subscriptions"}
    | {"tables"},
    "django.dsn": set(),
    "django.history": {"subscriptions"},
    "django.instances": {"changes", "errors", "protocol", "rows", "subscriptions"},
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
    for module in ("redis", "sqlalchemy", *(f"flash_celery.{name}" for name in capture)):
        assert module not in loaded
