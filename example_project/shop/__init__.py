"""A small shop: what people do with flash-celery, in Django."""

from .celery import app as celery_app

__all__ = ["celery_app"]
