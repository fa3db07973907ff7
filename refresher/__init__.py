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

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._api import refresh_kuzzle_token, refresh_user_token
from ._cache import SHARED_CACHE, TokenCache
from ._wire import __version__
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

if TYPE_CHECKING:
    from .auth import CircleAuth, KuzzleAuth

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


def __getattr__(name: str) -> object:
    # This needs requests at once, which takes longer to import than all the rest.
    if name in ("auth", "CircleAuth", "KuzzleAuth"):
        auth = importlib.import_module(".auth", __name__)
        return auth if name == "auth" else getattr(auth, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
