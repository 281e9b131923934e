"""The Celery app of the Django project, with the tasks of all its apps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from celery import current_app

from ..errors import ConfigurationError

#: The environment variable that stops Celery's fixup for Django from running the system checks.
_SKIP_CHECKS = "CELERY_SKIP_CHECKS"


def celery_app() -> Any:
    """Return the project's Celery app, with its tasks imported.

    Raises:
        ConfigurationError: There is no app, or its tasks cannot be imported.
    """
    app = current_app._get_current_object()
    if app.main == "default" or (app.main is None and not app.conf.broker_url):
        raise ConfigurationError(
            "There is no Celery app, so the handlers are unknown; import it in the __init__.py of "
            "the project: from .celery import app."
        )
    _import_tasks(app)
    return app


@lru_cache(maxsize=8)
def _import_tasks(app: Any) -> None:
    try:
        with _checks_skipped():
            app.loader.import_default_modules()
        app.finalize()
    except Exception as error:  # a module of tasks may raise anything
        raise ConfigurationError(
            f"The tasks cannot be imported, so the handlers are unknown: {type(error).__name__}: "
            f"{error}."
        ) from error


@contextmanager
def _checks_skipped() -> Iterator[None]:
    """Stop Celery from running all of Django's checks when it imports the tasks."""
    before = os.environ.get(_SKIP_CHECKS)
    os.environ[_SKIP_CHECKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SKIP_CHECKS]
        else:
            os.environ[_SKIP_CHECKS] = before
