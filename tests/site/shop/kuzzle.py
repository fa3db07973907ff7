"""Kuzzle, asked in the name of whoever has signed in."""

import requests
from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.http import HttpResponse
from django.shortcuts import redirect
from django.utils.deprecation import MiddlewareMixin

from refresher import DjangoStore, KuzzleAuth, RefreshError, SignInRequiredError, TokenCache

# All processes share the newest tokens. `keepalive` runs every five minutes, so tokens are refreshed when less than a
# quarter of an hour is left.
tokens = TokenCache(DjangoStore(), ahead=900)


def ask(jwt, path, method="GET"):
    """Return Kuzzle's result for the user whose first token was *jwt*."""
    if jwt is None:
        raise SignInRequiredError("nobody has signed in")
    auth = KuzzleAuth(settings.KUZZLE_URL, jwt, cache=tokens, timeout=5)
    answer = requests.request(method, settings.KUZZLE_URL + path, auth=auth, timeout=10)
    if answer.status_code == 403:
        raise PermissionDenied
    answer.raise_for_status()
    return answer.json()["result"]


class KuzzleMiddleware(MiddlewareMixin):
    """Answer requests whose view could not do its work because of Kuzzle."""

    def process_exception(self, request, error):
        """Ask the user to sign in, or to come back. Other errors are left to Django."""
        if isinstance(error, SignInRequiredError):
            # Not just changed: another tab may have removed it, and then it could not be saved.
            request.session.flush()
            return redirect("sign_in")
        if isinstance(error, (RefreshError, requests.RequestException)):
            return HttpResponse("Try again in a minute.", status=503, headers={"Retry-After": "60"})
        return None
