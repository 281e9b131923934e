"""flash-celery in Django: put `flash_celery.django` in INSTALLED_APPS for `manage.py flash`."""
