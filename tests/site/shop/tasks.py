"""What is done in the background."""

import requests
from celery import shared_task
from django.conf import settings

from refresher import OutcomeUnknownError, UnavailableError

from .tokens import auth_of


@shared_task(autoretry_for=(OutcomeUnknownError, UnavailableError), retry_backoff=True)
def count_documents(jwt):
    """Do something at Kuzzle for the user who was given *jwt*: an old token will do."""
    answer = requests.get(f"{settings.KUZZLE_URL}/_me", auth=auth_of(jwt), timeout=10)
    return answer.json()["result"]["_id"]
