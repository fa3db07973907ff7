"""What the site answers."""

import requests
from django.conf import settings
from django.http import HttpResponse, JsonResponse
from django.shortcuts import redirect

from refresher import RefreshError, SignInRequiredError

from .tokens import auth_of


def sign_in(request):
    """Sign a user in at Kuzzle, and keep the first token in their session."""
    answer = requests.post(f"{settings.KUZZLE_URL}/_login/local", json=request.POST.dict(), timeout=10)
    if not answer.ok:
        return HttpResponse("Who are you?", status=401)
    request.session["jwt"] = answer.json()["result"]["jwt"]
    return redirect("me")


def me(request):
    """Tell users who they are at Kuzzle."""
    auth = auth_of(request.session.get("jwt"))
    try:
        answer = requests.get(f"{settings.KUZZLE_URL}/_me", auth=auth, timeout=10)
    except SignInRequiredError:
        return redirect("sign_in")
    except RefreshError:
        return HttpResponse("Try again in a minute.", status=503)
    return JsonResponse(answer.json()["result"])


def broken(request):
    """Fail after a refresh: the database forgets what the request did, and the new token is kept."""
    me(request)
    request.session["seen"] = True
    raise ZeroDivisionError


def site(request):
    """Tell who the site itself is at Kuzzle."""
    answer = requests.get(f"{settings.KUZZLE_URL}/_me", auth=auth_of(settings.KUZZLE_JWT), timeout=10)
    return JsonResponse(answer.json()["result"])
