"""The Django app: put `flash_celery.django` in INSTALLED_APPS for `manage.py flash` and checks."""
