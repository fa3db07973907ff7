"""
A Kuzzle and a Circle of your own, on loopback sockets, for tests and demonstrations.

They do what the real services were seen to do. A Kuzzle token is refreshed once, is valid for one more
second, and comes back unchanged within the clock second in which it was issued. Circle rotates its refresh
tokens and answers a repeated idempotency key as it did before. You can move their clocks.

Example:
    >>> from refresher import refresh_kuzzle_token
    >>> from refresher.testing import FakeKuzzle
    >>> with FakeKuzzle() as kuzzle:
    ...     old = kuzzle.login("foo", ago=1800)
    ...     new = refresh_kuzzle_token(kuzzle.url, old)
    ...     kuzzle.clock.advance(1)
    ...     print(kuzzle.knows(old), kuzzle.knows(new.jwt))
    False True
    >>> kuzzle.assert_spent_once(old)

Both do as they are told:

===========================================  =========================================================================
``suffer("lost")``                           The next request goes wrong in this way. `FAULTS` lists all ways.
``fail_next("api.process.overloaded")``      The next request is refused with this error of Kuzzle's. For Circle, pass
                                             a code: ``fail_next(155104)``.
``delay_next(2)``, ``drip_next(0.1)``        The next response comes two seconds late; byte by byte.
``next_answers.append(Answer(502, b"no"))``  The next request gets this response; or raw bytes, or what a function of
                                             the request returns.
``clock.advance(3600)``                      An hour passes for the service.
``stop()``, ``start()``                      The service is down; it is up again.
``assert_spent_once(old)``                   Fails unless a token was refreshed exactly once.
===========================================  =========================================================================

pytest finds the fixtures ``fake_kuzzle`` and ``fake_circle`` by itself. They leave `refresher.SHARED_CACHE` alone:
after a test that uses ``clean_shared_cache`` too, it is empty again, and no ``Retry-After`` holds back the next test.

`StoreContract` tests a `refresher.Store` of your own.

Behind a proxy, set ``NO_PROXY=127.0.0.1``, or the proxy gets what is meant for the fakes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .circle import FakeCircle
    from .contract import StoreContract
    from .faults import FAULTS, Fault
    from .kuzzle import FakeKuzzle
    from .server import Answer, Clock, Received

__all__ = ["Answer", "Clock", "FAULTS", "FakeCircle", "FakeKuzzle", "Fault", "Received", "StoreContract"]

_MODULES = {
    "Answer": "server",
    "Clock": "server",
    "FAULTS": "faults",
    "FakeCircle": "circle",
    "FakeKuzzle": "kuzzle",
    "Fault": "faults",
    "Received": "server",
    "StoreContract": "contract",
}

if not TYPE_CHECKING:  # with it, type checkers would accept any misspelled name

    def __getattr__(name: str) -> object:
        # pytest imports this package wherever refresher is installed: the rest waits for a test that uses it.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
