"""Data flows one way: a package imports only packages that come before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flash_celery"

#: The order of docs/architecture.md. A module of the package's own folder counts as a package.
ORDER = [
    "escaping",
    "errors",
    "dsn",
    "credentials",
    "settings",
    "backoff",
    "table_name",
    "protocol",
    "acknowledgement",
    "telemetry",
    "values",
    "conditions",
    "changes",
    "handlers",
    "transactional_tasks",
    "postgres",
    "provisioning",
    "capture",
    "backfill",
    "messages",
    "publishing",
    "dead_letters",
    "lanes",
    "worker",
    "commands",
    "monitoring",
    "testing",
    "pytest_plugin",
    "cli",
    "django",
]

#: Imports against the order. They stand inside a function and need an optional package.
UPWARD = {
    ("changes", "django"),  # Change.instance()
    ("dsn", "django"),  # the DSN of a Django project is in its DATABASES
}


def imported_packages(path):
    """The packages of ours that a file imports, and whether it does so inside a function."""
    parents = path.relative_to(PACKAGE).parts[:-1]
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parents[: len(parents) - node.level + 1]]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield (base or [alias.name])[0], id(node) in inside


@pytest.mark.parametrize("package", ORDER)
def test_package_imports_only_what_comes_before_it(package):
    folder = PACKAGE / package
    for path in sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]:
        for imported, lazily in imported_packages(path):
            upward = ORDER.index(imported) > ORDER.index(package)
            assert not upward or ((package, imported) in UPWARD and lazily), (path, imported)


def test_package_order_is_complete():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix != ".pyc"}
    entries.discard("__pycache__")  # Python's own, not in the repository
    assert entries - {"__init__", "py"} == set(ORDER)
    assert len(entries) <= 32


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_typing_extensions_is_imported_on_old_pythons_only(path):
    body = ast.parse(path.read_text()).body
    always = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    assert "typing_extensions" not in always


def test_package_import_loads_neither_the_capture_side_nor_optional_packages():
    code = "import sys, flash_celery; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    ).stdout
    loaded = set(loaded.split())
    assert {"flash_celery.changes.payload", "flash_celery.handlers.decorators"} <= loaded
    capture_side = ORDER[ORDER.index("postgres") :]
    assert not loaded & {f"flash_celery.{name}" for name in ("settings", *capture_side)}
    # (kombu imports Django where it is installed, and Celery imports amqp.)
    assert not loaded & {"prometheus_client", "pydantic", "redis", "rich", "sqlalchemy"}


#: These take values alone, and no collaborators.
_OF_VALUES = {"_Builder"}


def test_no_constructor_takes_more_than_eight_collaborators():
    crowded = [
        kind.name
        for path in PACKAGE.rglob("*.py")
        for kind in ast.walk(ast.parse(path.read_text()))
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        if len(method.args.args[1:] + method.args.kwonlyargs) > 8
    ]
    assert set(crowded) == _OF_VALUES
