"""The Celery app of the Django project, with the tasks of all its apps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from celery import current_app

from ..errors import ConfigurationError

#: What Celery's fixup for Django looks at.
_SKIP = "CELERY_SKIP_CHECKS"


def celery_app() -> Any:
    """The app, its tasks imported. Raises `ConfigurationError` if it or they cannot be had."""
    app = current_app._get_current_object()
    if app.main == "default" or (app.main is None and not app.conf.broker_url):
        raise ConfigurationError(
            "No Celery app is there, so no handlers are known; import it in the __init__.py of the "
            "project: from .celery import app."
        )
    _import_tasks(app)
    return app


@lru_cache(maxsize=8)
def _import_tasks(app: Any) -> None:
    try:
        with _no_checks():
            app.loader.import_default_modules()
        app.finalize()
    except Exception as error:  # whatever a module of tasks raises, which a web process need not
        raise ConfigurationError(
            f"The tasks cannot be imported, so no handlers are known: {type(error).__name__}: "
            f"{error}."
        ) from error


@contextmanager
def _no_checks() -> Iterator[None]:
    """Celery runs all of Django's checks when it imports the tasks; not now."""
    before = os.environ.get(_SKIP)
    os.environ[_SKIP] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SKIP]
        else:
            os.environ[_SKIP] = before
