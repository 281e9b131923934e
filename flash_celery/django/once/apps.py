"""The Django app."""

from django.apps import AppConfig


class FlashCeleryOnceConfig(AppConfig):
    """The app: one migration, which creates `flash_celery_marks` in databases of PostgreSQL."""

    name = "flash_celery.django.once"
    label = "flash_celery_once"
    verbose_name = "flash-celery: once"
