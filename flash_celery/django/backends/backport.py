"""The backend for the package `django-tasks`."""

from __future__ import annotations

from .django_tasks_api import backend_for

TransactionalBackend = backend_for("django_tasks")
