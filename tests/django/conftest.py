"""A Django project of the tests' own: in this process, and as `manage.py`."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import django
import pytest
from django.conf import settings
from django.core.management import call_command
from django.db import connections

from example_project.servers import end_with_parent
from tests.integration.conftest import flash  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
PROJECT = Path(__file__).parent / "project"


@pytest.fixture(scope="session")
def configured():
    """Django in this process. It stays, so DATABASES is empty again after each test."""
    sys.path.insert(0, str(PROJECT))
    if not settings.configured:
        namespace = runpy.run_path(str(PROJECT / "bookshop" / "settings.py"))
        settings.configure(**{name: namespace[name] for name in namespace if name.isupper()})
        django.setup()


def use(database, **options):
    """Make it DATABASES["default"]."""
    connections["default"].close()
    del connections["default"]
    connections.databases["default"] = connections.configure_settings(
        {
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": database.name,
                "USER": "postgres",
                "HOST": "127.0.0.1",
                "PORT": database.server.port,
                **options,
            }
        }
        if database
        else {}
    )["default"]


@pytest.fixture
def migrated(configured, database):
    """The database of the test, as the project's."""
    use(database)
    call_command("migrate", "sales", verbosity=0)
    yield database
    use(None)


class Process:
    """A process of the project, and what it has said; it ends with the `with`."""

    def __init__(self, log, *arguments, **how):
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                arguments, stdout=output, stderr=output, preexec_fn=end_with_parent(), **how
            )

    def said(self):
        assert self._process.poll() is None, self._log.read_text()
        return self._log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.terminate()
        self._process.wait(60)


class Site:
    """A copy of the project, and its manage.py."""

    def __init__(self, folder, database):
        self.folder = folder
        self.database = database
        shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BOOKSHOP_DSN": database.dsn if database else "",
            "BOOKSHOP_SLOT": database.slot if database else "bookshop",
        }

    def manage(self, *arguments, **environment):
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, *arguments):
        log = self.folder / f"{'-'.join(arguments).replace('/', '-')}.log"
        return Process(log, sys.executable, *arguments, cwd=self.folder, env=dict(self.environment))

    def migration(self, name, operations, after="0001_initial"):
        """Add a migration to the app `sales`."""
        (self.folder / "sales" / "migrations" / f"{name}.py").write_text(
            "from django.db import migrations, models\n\n\n"
            "class Migration(migrations.Migration):\n"
            f"    dependencies = [('sales', {after!r})]\n"
            f"    operations = [{operations}]\n"
        )


@pytest.fixture
def site(tmp_path, database):
    return Site(tmp_path / "site", database)
