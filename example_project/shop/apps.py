"""The Django app of the shop."""

from django.apps import AppConfig
from django.conf import settings


class ShopConfig(AppConfig):
    name = "shop"

    def ready(self):
        if settings.CACHES["default"].get("LOCATION"):
            from . import activity  # noqa: F401 - connects its signal receivers
