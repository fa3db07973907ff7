"""A Django project of one file: a view that refreshes. ``gunicorn django_site:application``."""

from __future__ import annotations

import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    CACHES={
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": os.environ["SITE_CACHE"],
        }
    },
    ROOT_URLCONF=__name__,
    SECRET_KEY="test",
)
django.setup()

from refresher import DjangoStore, TokenCache, refresh_kuzzle_token  # noqa: E402

cache = TokenCache(DjangoStore())


def who(request):
    """Refresh, on every request, the token that was given to the site."""
    token = refresh_kuzzle_token(os.environ["SITE_KUZZLE"], os.environ["SITE_JWT"], cache=cache)
    return JsonResponse({"jwt": token.jwt, "pid": os.getpid()})


urlpatterns = [path("who", who)]
application = get_wsgi_application()
