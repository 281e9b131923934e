"""The Django app."""

from django.apps import AppConfig
from django.core.checks import Tags, register


class FlashCeleryConfig(AppConfig):
    """The app: `manage.py flash`, system checks, a page in the admin; no models or migrations."""

    name = "flash_celery.django"
    label = "flash_celery"
    verbose_name = "flash-celery"

    def ready(self) -> None:
        """Register the system checks, and look for tasks in `atomic()` blocks."""
        from ..transactional_tasks import in_atomic
        from . import checks

        in_atomic.install()

        register(checks.handlers, "flash_celery")
        register(checks.database, Tags.database)
