"""
Refresh Kuzzle and Circle session tokens, and lose no session over it.

Example:
    >>> import refresher
    >>> from refresher.testing import FakeKuzzle  # a Kuzzle of our own, on the loopback
    >>> with FakeKuzzle() as kuzzle:
    ...     old = kuzzle.login("foo", ago=1800)
    ...     new = refresher.refresh_kuzzle_token(kuzzle.url, old, expires_in="2h")
    >>> new.kuid, new.jwt == old
    ('foo', False)
"""

from ._api import refresh_kuzzle_token, refresh_user_token
from ._cache import SHARED_CACHE, TokenCache
from ._http import __version__
from .auth import CircleAuth, KuzzleAuth
from .errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)
from .stores import DjangoStore, FileStore, MemoryStore, RedisStore, Store
from .tokens import KuzzleToken, UserToken

__all__ = [
    "CircleAuth",
    "DjangoStore",
    "FileStore",
    "InvalidArgumentError",
    "KuzzleAuth",
    "KuzzleToken",
    "MemoryStore",
    "OutcomeUnknownError",
    "RedisStore",
    "RefreshError",
    "ReplyError",
    "RequestRefusedError",
    "SHARED_CACHE",
    "SignInRequiredError",
    "Store",
    "TokenCache",
    "UnavailableError",
    "UserToken",
    "__version__",
    "refresh_kuzzle_token",
    "refresh_user_token",
]
