"""What is done in the background."""

import requests
from celery import shared_task

from refresher import RefreshError, RequestRefusedError, SignInRequiredError

from .kuzzle import ask


@shared_task(
    autoretry_for=(RefreshError, requests.RequestException),
    dont_autoretry_for=(RequestRefusedError, SignInRequiredError),
    retry_backoff=True,
)
def get_kuid(jwt):
    """Do something at Kuzzle for a user. *jwt* is the session's first token, however old."""
    return ask(jwt, "/_me")["_id"]
