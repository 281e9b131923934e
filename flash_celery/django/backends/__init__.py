"""Backends of Django's Tasks: `enqueue()` writes the task into the transaction.

`TransactionalBackend` is for `django.tasks` (Django 6), that of `backport` for the package
`django-tasks`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the backend of Django 6 when it is named: older versions have no `django.tasks`."""
    if name == "TransactionalBackend":
        from .django_tasks_api import backend_for

        return backend_for("django.tasks")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
