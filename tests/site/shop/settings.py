"""The settings."""

import os

KUZZLE_URL = os.environ["KUZZLE_URL"]
# The site's own session: the token it was first given. It's never changed, what became of it is in the cache.
KUZZLE_JWT = os.environ["KUZZLE_JWT"]

CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": os.environ["SITE_REDIS"],
    }
}
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
MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]
ROOT_URLCONF = "shop.urls"
SECRET_KEY = "test"
USE_TZ = True
LOGGING = {
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"refresher": {"handlers": ["console"], "level": "INFO"}},
}
