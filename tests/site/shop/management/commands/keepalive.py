"""``manage.py keepalive``, for cron: refresh the site's own session, also on days without visitors."""

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from refresher import RefreshError, refresh_kuzzle_token
from shop.kuzzle import tokens


class Command(BaseCommand):
    """Refresh the site's own session, if it is about to expire."""

    help = __doc__

    def handle(self, **_):
        """Refresh it."""
        try:
            token = refresh_kuzzle_token(settings.KUZZLE_URL, settings.KUZZLE_JWT, cache=tokens)
        except RefreshError as error:
            raise CommandError(str(error)) from None
        self.stdout.write(f"{token.kuid}, valid until {token.expires_at:%Y-%m-%d %H:%M} UTC")
