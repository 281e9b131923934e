"""The Django app."""

from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import Tags, register
from django.db.backends.signals import connection_created

from ..handlers import django_context


class FlashCeleryConfig(AppConfig):
    """The app: `manage.py flash`, system checks, a page in the admin; no models or migrations."""

    name = "flash_celery.django"
    label = "flash_celery"
    verbose_name = "flash-celery"

    def ready(self) -> None:
        """Register the system checks, and have connections write contexts and tasks."""
        from ..transactional_tasks import in_atomic
        from . import checks

        in_atomic.install()
        backends = (each.get("BACKEND", "") for each in getattr(settings, "TASKS", {}).values())
        if any(str(each).startswith(f"{self.name}.backends.") for each in backends):
            from .backends import celery_task  # noqa: F401 - registers the task

        register(checks.handlers, "flash_celery")
        register(checks.database, Tags.database)
        connection_created.connect(_install, dispatch_uid="flash_celery")


def _install(connection: Any, **_: Any) -> None:
    django_context.install(connection)
