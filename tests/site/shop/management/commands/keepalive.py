"""``manage.py keepalive``, for cron: refresh the sessions that are due, also on days without visitors."""

from collections import Counter

from django.conf import settings
from django.contrib.sessions.models import Session
from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from refresher import KuzzleAuth, keep_alive
from shop.kuzzle import tokens


def auths():
    """Yield an auth object for the site itself, and for each user who has signed in."""
    yield KuzzleAuth(settings.KUZZLE_URL, settings.KUZZLE_TOKEN, cache=tokens)
    for session in Session.objects.filter(expire_date__gt=timezone.now()).iterator():
        if jwt := session.get_decoded().get("jwt"):
            yield KuzzleAuth(settings.KUZZLE_URL, jwt, cache=tokens)


class Command(BaseCommand):
    """Refresh the site's own session and those of its users, if they are about to expire."""

    help = __doc__

    def handle(self, **_):
        """Refresh them, and count. At a terminal the count goes up as one watches."""
        counts, failure = Counter(), None
        for outcome in keep_alive(auths()):
            counts[outcome.outcome] += 1
            if outcome.outcome == "skipped":
                failure = outcome.error
            if self.stdout.isatty():
                self.stdout.write(f"\r{_told(counts)}", ending="")
        self.stdout.write(f"\r{_told(counts)}" if self.stdout.isatty() else _told(counts))
        if failure is not None:
            raise CommandError(f"{counts['skipped']} sessions were skipped: {failure}")


def _told(counts):
    return ", ".join(f"{counts[name]} {name}" for name in ("refreshed", "fresh", "ended", "skipped"))
