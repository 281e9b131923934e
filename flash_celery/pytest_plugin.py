"""Fixtures for the tests of those who use flash-celery; without them nothing changes.

`flash` runs handlers on changes a test builds, `flash_live` a replication worker on the database of
the test. See docs/testing.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .testing import Flash, Live

_MARKER = (
    "flash_live(broker=False, source='', timeout=30): how the fixture flash_live runs: tasks go to "
    "the app's broker, of which database, seconds to wait."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The setting that names the app."""
    parser.addini(
        "flash_app", "The Celery app of the fixtures flash and flash_live: shop.celery:app"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker of `flash_live`."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def flash_app(request: pytest.FixtureRequest) -> Any:
    """The Celery app: what `flash_app` names in pytest's settings, or a fixture of this name."""
    name = request.config.getini("flash_app")
    if not name:
        raise pytest.UsageError(
            "Which Celery app? Write flash_app = shop.celery:app into pytest's settings, or a "
            "fixture flash_app that returns it."
        )
    from celery import Celery
    from celery.app.utils import find_app

    try:
        app = find_app(name)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"flash_app = {name} cannot be imported: {error}.") from error
    if not isinstance(app, Celery):
        raise pytest.UsageError(f"flash_app = {name} is no Celery app.")
    return app


@pytest.fixture
def flash(flash_app: Any) -> Flash:
    """The handlers of the app, as `flash_celery.testing.Flash`; no broker, no database."""
    from .testing import Flash

    return Flash(flash_app)


@pytest.fixture
def flash_live(request: pytest.FixtureRequest, flash_app: Any) -> Iterator[Live]:
    """A replication worker on the test's database, as `flash_celery.testing.Live`."""
    from .testing import Live

    if request.config.pluginmanager.hasplugin("django") and not flash_app.conf.get("flash_dsn"):
        _require_test_database(request)
    marker = request.node.get_closest_marker("flash_live")
    with Live(flash_app, **(marker.kwargs if marker else {})) as live:
        yield live


def _require_test_database(request: pytest.FixtureRequest) -> None:
    """pytest-django makes the test database for who asks; DATABASES is the real one before."""
    from django.test import TransactionTestCase

    of_django = request.cls is not None and issubclass(request.cls, TransactionTestCase)
    asked = {"db", "transactional_db"}.intersection(request.fixturenames)
    if not (of_django or asked or request.node.get_closest_marker("django_db")):
        raise pytest.UsageError(
            "flash_live would read the real database of DATABASES: mark the test with "
            "@pytest.mark.django_db(transaction=True), or set flash_dsn."
        )
