"""The command line."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from ._api import refresh_kuzzle_token, refresh_user_token
from ._http import __version__
from .testing import FakeCircle, FakeKuzzle, Received
from .tokens import masked


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv: The arguments. None: those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser("refresher", description="Refresh Kuzzle and Circle session tokens.")
    parser.add_argument("--version", action="version", version=f"refresher {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="refresh a token of each service, on servers of our own")
    demo.set_defaults(run=_demo)
    arguments = parser.parse_args(argv)
    status: int = arguments.run()
    return status


def _demo() -> int:
    with FakeKuzzle() as kuzzle:
        print("KUZZLE. A user signs in and gets a token that is good for an hour. Half an hour later:\n")
        jwt = kuzzle.login("foo", ago=1800)
        print('    >>> refresh_kuzzle_token(url, jwt, expires_in="2h")')
        token = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h")
        _show(token, kuzzle.requests[-1])
        kuzzle.clock.advance(1)
        print("A second later the old token, which is spent, is good for nothing any more:\n")
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
