"""The settings."""

import os

KUZZLE_URL = os.environ["KUZZLE_URL"]
# The first token of the site's own session. It never has to be updated: the cache has the newest one.
KUZZLE_TOKEN = os.environ["KUZZLE_TOKEN"]

CACHES = {"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": os.environ["SITE_REDIS"]}}
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["SITE_DATABASE"],
        "ATOMIC_REQUESTS": True,
    }
}
CELERY_BROKER_URL = CELERY_RESULT_BACKEND = os.environ["SITE_REDIS"]

ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["django.contrib.sessions", "shop"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "shop.kuzzle.KuzzleMiddleware",
]
ROOT_URLCONF = "shop.urls"
SECRET_KEY = "test"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
USE_TZ = True
LOGGING = {
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {
        "django.request": {"handlers": ["console"], "level": "ERROR"},
        "refresher": {"handlers": ["console"], "level": "INFO"},
    },
}
