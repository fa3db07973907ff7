# ruff: noqa: T201
"""``refresher demo``: a refresh of each service, on the fakes."""

from __future__ import annotations

import functools
import os

from .._api import refresh_kuzzle_token, refresh_user_token
from .._text import masked
from .circle import FakeCircle
from .kuzzle import FakeKuzzle
from .server import Received


def main() -> int:
    """Show a refresh of each service. A proxy could not reach the fakes, so this process uses none from here on."""
    os.environ.update(no_proxy="*", NO_PROXY="*")
    with FakeKuzzle() as kuzzle:
        print("KUZZLE. A user signs in and gets a token that is valid for an hour. Half an hour later:\n")
        jwt = kuzzle.login("foo", ago=1800)
        print('    >>> refresh_kuzzle_token(url, jwt, expires_in="2h")')
        token = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h")
        _show(token, kuzzle.requests[-1])
        kuzzle.clock.advance(1)
        print("A second later the old token, which is spent, no longer works:\n")
        print(f"    old token {masked(jwt)}: {_state(kuzzle.knows(jwt))}")
        print(f"    new token {masked(token.jwt)}: {_state(kuzzle.knows(token.jwt))}\n")

    with FakeCircle() as circle:
        print("CIRCLE. A user signs in and gets an hour's user token and a refresh token. Two hours on:\n")
        old = circle.sign_in("user-1", device_id="device-1")
        circle.clock.advance(7200)
        refresh = functools.partial(
            refresh_user_token,
            user_token=old.user_token,
            refresh_token=old.refresh_token,
            device_id="device-1",
            api_key=circle.api_key,
            base_url=circle.url,
        )
        print('    >>> refresh_user_token(user_token=..., refresh_token=..., device_id="device-1")')
        pair = refresh()
        _show(pair, circle.requests[-1])
        print("The refresh token is spent. Had the answer been lost, the same call would still bring it back,")
        print("since it carries the same idempotency key:\n")
        print(f"    the same pair again: {'yes' if refresh() == pair else 'no'}")
    return 0


def _show(result: object, request: Received) -> None:
    print(f"    {result}\n\nThis was sent for it:\n\n    {request.method} {request.target}")
    for name in ("Authorization", "X-User-Token"):
        if name in request.headers:
            scheme, _, secret = request.headers[name].rpartition(" ")
            print(f"    {name}: {scheme} {masked(secret)}".replace(":  ", ": "))
    for name, value in request.json().items():
        print(f"    {name}: {masked(value) if name == 'refreshToken' else value}")
    print()


def _state(good: bool) -> str:
    return "good" if good else "refused"
