"""Which module may import which: data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flash_celery"

ALLOWED = {
    "errors": set(),
    "settings": {"errors"},
    "values": set(),
    "conditions": {"values", "errors"},
    "changes": {"values", "protocol"},
    "payload": {"changes", "protocol", "errors"},
    "subscriptions": {"conditions", "changes", "errors"},
    "handlers": {"subscriptions", "conditions", "changes", "errors"},
    "backoff": set(),
    "progress": {"protocol"},
    "transitions": {"changes", "subscriptions", "protocol"},
    "transactions": {"changes", "protocol", "errors"},
    "catalog": {"replication", "subscriptions"},
    "routing": {
        *("catalog", "changes", "payload", "protocol"),
        *("subscriptions", "transitions", "errors"),
    },
    "messages": {"changes", "payload", "settings", "subscriptions", "errors"},
    "outbox": {"messages", "payload", "protocol"},
    "publishing": {"backoff", "messages", "outbox", "protocol", "publishers", "errors"},
    "publications": {"backoff", "catalog", "changes", "subscriptions", "errors"},
    "preflight": {
        *("catalog", "publications", "replication", "settings", "subscriptions", "errors"),
    },
    "status": {"messages", "publishers", "settings", "subscriptions", "errors"},
    "doctor": {"preflight", "publishers", "subscriptions", "errors"},
    "reset": {"publications", "settings", "status", "errors"},
    "tail": {
        *("catalog", "changes", "payload", "protocol", "publications", "replication"),
        *("routing", "subscriptions", "transactions", "errors"),
    },
    # Commands import what they do.
    "cli": {
        *("catalog", "doctor", "errors", "handlers", "preflight", "publishers", "replicator"),
        *("reset", "settings", "status", "subscriptions", "tail"),
    },
    "django": set(),
    "django.apps": set(),
    "django.management": set(),
    "django.management.commands": set(),
    "django.management.commands.flash": set(),
    "replicator": {
        *("backoff", "catalog", "preflight", "publications", "replication", "protocol"),
        *("transactions", "routing", "messages", "outbox", "publishing", "publishers"),
        *("progress", "settings", "subscriptions", "changes", "payload", "errors"),
    },
    "publishers": {"publishers"},
    "publishers.base": {"messages", "errors"},
    "publishers.redis": {"publishers", "messages"},
    "publishers.amqp": {"publishers", "messages", "errors"},
    "publishers.kombu": {"publishers", "messages"},
    "publishers.memory": {"messages", "errors"},
    "replication": {"protocol", "errors"},
    "protocol.frames": {"protocol", "errors"},
    "protocol.lsn": set(),
    "protocol.pgoutput": {"protocol", "errors"},
    "protocol": set(),
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
    for module in ("redis", "sqlalchemy", "flash_celery.settings"):
        assert module not in loaded
