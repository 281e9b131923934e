"""Settings from the environment: BOOKSHOP_DSN, BOOKSHOP_BROKER, BOOKSHOP_APPS."""

import os

from psycopg.conninfo import conninfo_to_dict

_dsn = conninfo_to_dict(os.environ.get("BOOKSHOP_DSN", ""))

SECRET_KEY = "for tests"
ROOT_URLCONF = "sales.urls"
USE_TZ = True
STATIC_URL = "static/"
ALLOWED_HOSTS = ["*"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.postgres",
    "django.contrib.sessions",
    "flash_celery.django.once",
    "sales",
    *os.environ.get("BOOKSHOP_APPS", "flash_celery.django").split(),
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _dsn.get("dbname"),
        "USER": _dsn.get("user"),
        "PASSWORD": _dsn.get("password"),
        "HOST": _dsn.get("host"),
        "PORT": _dsn.get("port"),
    }
    if _dsn
    else {}
}
CELERY_BROKER_URL = os.environ.get("BOOKSHOP_BROKER", "memory://")
CELERY_FLASH_REPLICATION_SLOT = os.environ.get("BOOKSHOP_SLOT", "bookshop")
