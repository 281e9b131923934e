"""The Django app."""

from django.apps import AppConfig


class FlashCeleryConfig(AppConfig):
    """Brings `manage.py flash`; it has no models and no migrations."""

    name = "flash_celery.django"
    label = "flash_celery"
    verbose_name = "flash-celery"
