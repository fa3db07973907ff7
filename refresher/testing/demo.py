"""``refresher demo``: a refresh of each service, on the fakes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from .._api import refresh_kuzzle_token, refresh_user_token
from .._cache import TokenCache
from .._text import masked
from .circle import FakeCircle
from .kuzzle import FakeKuzzle
from .server import Received


def show() -> str:
    """Show a refresh of each service. A proxy could not reach the fakes, so this process uses none from here on."""
    os.environ.update(no_proxy="*", NO_PROXY="*")
    return "".join(f"{line}\n" for line in _lines())


def _lines() -> Iterator[str]:
    cache = TokenCache()
    with FakeKuzzle() as kuzzle:
        yield "KUZZLE. A user signs in and gets a token that is valid for an hour. Half an hour later:\n"
        jwt = kuzzle.login("foo", ago=1800)
        yield '    >>> refresh_kuzzle_token(url, jwt, expires_in="2h")'
        token = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h", cache=cache)
        yield from _result(token, kuzzle.requests[-1])
        kuzzle.clock.advance(1)
        yield "A second later the old token, which is spent, no longer works:\n"
        yield f"    old token {masked(jwt)}: {_state(kuzzle.knows(jwt))}"
        yield f"    new token {masked(token.jwt)}: {_state(kuzzle.knows(token.jwt))}\n"

    with FakeCircle() as circle:
        yield "CIRCLE. A user signs in and gets an hour's user token and a refresh token. Two hours on:\n"
        old = circle.sign_in("user-1", device_id="device-1")
        circle.clock.advance(7200)
        refresh = functools.partial(
            refresh_user_token,
            user_token=old.user_token,
            refresh_token=old.refresh_token,
            device_id="device-1",
            api_key=circle.api_key,
            base_url=circle.url,
            cache=cache,
        )
        yield '    >>> refresh_user_token(user_token=..., refresh_token=..., device_id="device-1")'
        pair = refresh()
        yield from _result(pair, circle.requests[-1])
        yield "The refresh token is spent. Had the answer been lost, the same call would still bring it back,"
        yield "since it carries the same idempotency key:\n"
        yield f"    the same pair again: {'yes' if refresh() == pair else 'no'}"


def _result(result: object, request: Received) -> Iterator[str]:
    yield f"    {result}\n\nThis was sent for it:\n\n    {request.method} {request.target}"
    for name in ("Authorization", "X-User-Token"):
        if name in request.headers:
            scheme, _, secret = request.headers[name].rpartition(" ")
            yield f"    {name}: {scheme} {masked(secret)}".replace(":  ", ": ")
    for name, value in request.json().items():
        yield f"    {name}: {masked(value) if name == 'refreshToken' else value}"
    yield ""


def _state(good: bool) -> str:
    return "good" if good else "refused"
