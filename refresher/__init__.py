"""
Keep Kuzzle and Circle sessions alive: always a valid token, refreshed once for everyone.

`refresh_kuzzle_token` trades a Kuzzle token for a new one, `refresh_user_token` a Circle refresh token for a new user
token. Pass the token that the sign-in gave you, as often as you like, or any later one, at least once a day: the first
call sends a request, and later calls do when the newest token is about to expire. `KuzzleAuth` and `CircleAuth` put the
newest token on the requests that you send with `requests`.

Example:
    >>> import refresher
    >>> from refresher.testing import FakeKuzzle  # a Kuzzle on this machine, to try things on
    >>> with FakeKuzzle() as kuzzle:
    ...     old = kuzzle.login("foo", ago=1800)
    ...     new = refresher.refresh_kuzzle_token(kuzzle.url, old, expires_in="2h")
    >>> print(new.kuid, new.ttl, new.jwt == old)
    foo 2:00:00 False

More: ``help(refresher.errors)`` says what to do when something goes wrong, ``help(refresher.stores)`` how processes and
machines share tokens, ``help(refresher.testing)`` how to test your own code.

Words:
    A refresh *spends* a token and yields its *successor*. A *chain* is all that one sign-in leads to: a token, its
    successor, the successor's successor and so on. Calls with any token of a chain get the newest one.

Coming from the JavaScript SDKs:
    ``kuzzle.auth.refreshToken(options)`` is ``refresh_kuzzle_token(url, jwt, ...)``.

    ===================================  ===============================================================================
    ``expiresIn``                        ``expires_in``: the same strings, or a timedelta. ``"-1"`` means for ever, and
                                         ``"3600"`` 3.6 seconds. A number is refused, since it could be seconds, and so
                                         is a lifetime that would end the session, such as ``"-2h"``.
    ``queuable``, true                   ``queuable=True``: there is no connection to queue for, so a call waits until
                                         Kuzzle can be reached, and asks again if the response was lost.
    ``timeout``, -1                      ``timeout=30.0``: seconds for the whole call, not milliseconds. None, -1:
                                         no limit. When the SDK's timeout ends, the new token is lost. Here the refresh
                                         goes on, and the next call gets its result.
    ``triggerEvents``, false             ``trigger_events=False``
    ``strategy``                         ``strategy=None``
    ``cookieAuth`` of the protocol       ``cookie_auth=False``: not only in browsers, but with the cookie jar of any
                                         ``requests.Session``.
    ``_id``, ``jwt``                     ``kuid``, ``jwt``. ``to_dict()`` has the SDK's names and units.
    ``expiresAt``, ``ttl``               ``expires_at``, ``ttl``: a datetime and a timedelta. ``expires_at`` is when the
                                         token really expires, up to two seconds before ``expiresAt``.
    ``kuzzle.jwt``                       ``KuzzleAuth.jwt``: the newest token. Requests with the auth refresh it.
    two calls at once                    one request.
    a call in the second of the sign-in  waits until that second is over. The SDK gets the old token back, which then
                                         expires.
    ===================================  ===============================================================================

    ``client.refreshUserToken(input)`` of Circle is ``refresh_user_token(...)``.

    ===================================  ===============================================================================
    ``userToken``, ``userId``            ``user_token`` or ``user_id``: exactly one. In the SDK one wins silently.
    ``deviceId``, ``refreshToken``       ``device_id``, ``refresh_token``
    ``idempotencyKey``, a new UUID       ``idempotency_key=None``: derived from the tokens and the device, so that the
                                         same call gets a lost response back, also from another process.
    ``xRequestId``                       ``request_id=None``
    no timeout                           ``timeout=30.0``: as above.
    one attempt                          ``retry=True``: with the same key, sending it again is safe.
    ``userToken``, ``encryptionKey``,    ``user_token``, ``encryption_key``, ``user_id``, ``refresh_token`` and
    ``userID``, ``refreshToken``         ``expires_at``. ``refresh_token`` is always the one to use next.
    ===================================  ===============================================================================
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401
import importlib
import os
import threading
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# A child that is forked in the middle of an import would wait for ever for the thread that was at it. Before a fork,
# locks are taken in reverse: those of concurrent.futures and logging, imported above, come after this one.
importing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release)

if TYPE_CHECKING:
    from . import auth as auth
    from . import errors as errors
    from . import stores as stores
    from . import testing as testing
    from ._api import refresh_kuzzle_token, refresh_user_token
    from ._cache import SHARED_CACHE, TokenCache
    from ._keeper import KeepAliveOutcome, keep_alive
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
    from .stores import DjangoStore, EncryptedStore, FileStore, MemoryStore, RedisStore, Store
    from .tokens import KuzzleToken, RefreshEvent, SessionStatus, UserToken

__all__ = [
    "CircleAuth",
    "DjangoStore",
    "EncryptedStore",
    "FileStore",
    "InvalidArgumentError",
    "KeepAliveOutcome",
    "KuzzleAuth",
    "KuzzleToken",
    "MemoryStore",
    "OutcomeUnknownError",
    "RedisStore",
    "RefreshError",
    "RefreshEvent",
    "ReplyError",
    "RequestRefusedError",
    "SHARED_CACHE",
    "SessionStatus",
    "SignInRequiredError",
    "Store",
    "TokenCache",
    "UnavailableError",
    "UserToken",
    "__version__",
    "keep_alive",
    "refresh_kuzzle_token",
    "refresh_user_token",
]


# Everything is imported when it is asked for: all of it takes a while, and nobody needs all of it.
_MODULES = "auth", "errors", "stores", "testing"
_HOMES = {
    "_api": ("refresh_kuzzle_token", "refresh_user_token"),
    "_cache": ("SHARED_CACHE", "TokenCache"),
    "_keeper": ("KeepAliveOutcome", "keep_alive"),
    "auth": ("CircleAuth", "KuzzleAuth"),
    "stores": ("DjangoStore", "EncryptedStore", "FileStore", "MemoryStore", "RedisStore", "Store"),
    "tokens": ("KuzzleToken", "RefreshEvent", "SessionStatus", "UserToken"),
}

if not TYPE_CHECKING:  # with it, type checkers would accept any misspelled name

    def __getattr__(name: str) -> object:
        if name not in (*__all__, *_MODULES):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = name if name in _MODULES else next((home for home, names in _HOMES.items() if name in names), "errors")
        with importing:
            module = importlib.import_module(f".{home}", __name__)
            value = module if home == name else getattr(module, name)
        if home != "stores":  # what one of them needs may be installed later
            globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
