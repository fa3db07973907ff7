"""What the site answers."""

import requests
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.http import JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from refresher import KuzzleAuth, SignInRequiredError

from .kuzzle import ask, tokens


# With ATOMIC_REQUESTS, a view that changes the session would keep the database locked while it waits for Kuzzle.
@transaction.non_atomic_requests
def sign_in(request):
    """Sign a user in at Kuzzle, and keep the first token in the session."""
    if request.method != "POST":
        return render(request, "shop/sign_in.html")
    credentials = {name: request.POST.get(name, "") for name in ("username", "password")}
    answer = requests.post(f"{settings.KUZZLE_URL}/_login/local", json=credentials, timeout=10)
    if answer.status_code in (400, 401):
        return render(request, "shop/sign_in.html", {"is_wrong": True}, status=401)
    answer.raise_for_status()
    request.session.cycle_key()
    request.session["jwt"] = answer.json()["result"]["jwt"]
    return redirect("me")


def me(request):
    """Tell users who they are at Kuzzle."""
    return JsonResponse(ask(request.session.get("jwt"), "/_me"))


@transaction.non_atomic_requests  # Django allows no others to be async
async def me_async(request):
    """Tell users who they are, without blocking the event loop."""
    jwt = await request.session.aget("jwt")
    return JsonResponse(await sync_to_async(ask, thread_sensitive=False)(jwt, "/_me"))


@transaction.non_atomic_requests
@require_POST
def sign_out(request):
    """End a session: first at Kuzzle, with its newest token, then here."""
    if jwt := request.session.get("jwt"):
        KuzzleAuth(settings.KUZZLE_URL, jwt, cache=tokens, timeout=5).sign_out()
    request.session.flush()
    return redirect("sign_in")


def broken(request):
    """Fail after a refresh: the database forgets what the request did, and the new token is kept."""
    me(request)
    request.session["seen"] = True
    raise ZeroDivisionError


def site(request):
    """Tell who the site itself is at Kuzzle. If its own session has ended, no visitor has to sign in for that."""
    try:
        return JsonResponse(ask(settings.KUZZLE_TOKEN, "/_me"))
    except SignInRequiredError as error:
        raise ImproperlyConfigured("the session of KUZZLE_TOKEN has ended") from error
