"""A Django site whose users sign in at Kuzzle, and which has a session of its own there."""

from .celery import app

__all__ = ["app"]
