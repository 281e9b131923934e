"""Settings of the shop. Environment variables name its servers.

SHOP_DATABASE_URL   PostgreSQL with wal_level=logical
SHOP_BROKER_URL     Redis, Valkey or RabbitMQ
SHOP_CACHE_URL      Redis or Valkey; by default the broker, if it is Redis or Valkey
SHOP_SECRET_KEY     Django's secret key, outside development
SHOP_PSQL           the psql command that the page shows, to change rows outside the shop
"""

import os

from psycopg.conninfo import conninfo_to_dict, make_conninfo

_database = conninfo_to_dict(
    os.environ.get("SHOP_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/shop")
)
_broker = os.environ.get("SHOP_BROKER_URL", "redis://127.0.0.1:6379/0")
_cache = os.environ.get("SHOP_CACHE_URL", _broker)
# The page must not show the password.
_without_password = {name: value for name, value in _database.items() if name != "password"}
PSQL = os.environ.get("SHOP_PSQL") or f'psql "{make_conninfo(**_without_password)}"'

SECRET_KEY = os.environ.get("SHOP_SECRET_KEY", "for development only")
DEBUG = True
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "shop.urls"
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
INSTALLED_APPS = ["shop", "flash_celery.django", "django.contrib.staticfiles"]
STATIC_URL = "static/"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _database.get("dbname"),
        "USER": _database.get("user"),
        "PASSWORD": _database.get("password"),
        "HOST": _database.get("host"),
        "PORT": _database.get("port"),
    }
}
CACHES = {
    "default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": _cache}
    if _cache.startswith("redis")
    else {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
}
EMAIL_BACKEND = "django.core.mail.backends.console.EmailBackend"

CELERY_BROKER_URL = _broker
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_IGNORE_RESULT = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 16
# No CELERY_FLASH_DSN: the changes are read from DATABASES["default"].
