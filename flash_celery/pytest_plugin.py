"""A pytest plugin with fixtures for your tests. It does nothing to tests that do not use them.

`flash` runs handlers on changes that a test builds; `flash_live` runs a replication worker on the
database of the test. See docs/testing.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .testing import Flash, Live

_MARKER = (
    "flash_live(broker=False, source='', timeout=30): options of the fixture flash_live: whether "
    "tasks go to the app's broker, the database (a name in flash_sources), and seconds to wait."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting `flash_app`."""
    parser.addini(
        "flash_app", "The Celery app of the fixtures flash and flash_live: shop.celery:app"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the marker `flash_live`."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def flash_app(request: pytest.FixtureRequest) -> Any:
    """The Celery app that `flash_app` in pytest's settings names; override it to return another."""
    name = request.config.getini("flash_app")
    if not name:
        raise pytest.UsageError(
            "The Celery app is unknown: write flash_app = shop.celery:app into pytest's settings, "
            "or a fixture flash_app that returns the app."
        )
    from celery import Celery
    from celery.app.utils import find_app

    try:
        app = find_app(name)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"flash_app = {name} cannot be imported: {error}.") from error
    if not isinstance(app, Celery):
        raise pytest.UsageError(f"flash_app = {name} is not a Celery app.")
    return app


@pytest.fixture
def flash(flash_app: Any) -> Flash:
    """The handlers of the app (`flash_celery.testing.Flash`), without a broker or a database."""
    from .testing import Flash

    return Flash(flash_app)


@pytest.fixture
def flash_live(request: pytest.FixtureRequest, flash_app: Any) -> Iterator[Live]:
    """A replication worker on the test's database (`flash_celery.testing.Live`)."""
    from .testing import Live

    if request.config.pluginmanager.hasplugin("django") and not flash_app.conf.get("flash_dsn"):
        _require_test_database(request)
    marker = request.node.get_closest_marker("flash_live")
    with Live(flash_app, **(marker.kwargs if marker else {})) as live:
        yield live


def _require_test_database(request: pytest.FixtureRequest) -> None:
    """Raise `UsageError` unless the test uses the test database of pytest-django.

    In other tests DATABASES is the real database.
    """
    from django.test import TransactionTestCase

    is_django_test = request.cls is not None and issubclass(request.cls, TransactionTestCase)
    has_fixture = {"db", "transactional_db"}.intersection(request.fixturenames)
    if not (is_django_test or has_fixture or request.node.get_closest_marker("django_db")):
        raise pytest.UsageError(
            "flash_live would read the real database of DATABASES: mark the test with "
            "@pytest.mark.django_db(transaction=True), or set flash_dsn."
        )
