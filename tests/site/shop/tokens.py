"""The tokens of the site and of its users."""

from django.conf import settings

from refresher import DjangoStore, KuzzleAuth, TokenCache

# All processes that share the cache refresh once. A quarter of an hour ahead, because `keepalive` comes every
# five minutes.
tokens = TokenCache(DjangoStore(), ahead=900)


def auth_of(jwt):
    """Send, with each request, the token that *jwt* has become."""
    return KuzzleAuth(settings.KUZZLE_URL, jwt, cache=tokens)
