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

if TYPE_CHECKING:
    from ._api import refresh_kuzzle_token, refresh_user_token
    from ._cache import SHARED_CACHE, TokenCache
    from ._wire import __version__
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

# Where they are. Each is imported when it's first asked for: the command line needs few of them.
_HOMES = {
    **dict.fromkeys(("refresh_kuzzle_token", "refresh_user_token"), "_api"),
    **dict.fromkeys(("SHARED_CACHE", "TokenCache"), "_cache"),
    **dict.fromkeys(("CircleAuth", "KuzzleAuth"), "auth"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Store")), "stores"),
    **dict.fromkeys(("KuzzleToken", "UserToken"), "tokens"),
    "__version__": "_wire",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in ("auth", "errors", "stores", "tokens"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
