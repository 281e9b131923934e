"""The Celery task that runs a task of Django's Tasks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from celery import shared_task

from ...errors import TransactionError

#: `django.tasks` of Django 6, and the package `django-tasks`. They have no types in common.
APIS = ("django.tasks", "django_tasks")


@shared_task(  # type: ignore[untyped-decorator]
    bind=True, name="flash_celery.django_task", typing=False
)
def django_task(
    self: Any, api: str, alias: str, path: str, args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """Run the task at an import path, through the backend that has enqueued it."""
    if api not in APIS:
        raise TransactionError(f"{api!r:.50} is none of {', '.join(APIS)}.")
    return import_module(api).task_backends[alias].execute(self.request, path, args, kwargs)
