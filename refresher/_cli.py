"""The command line."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ._api import refresh_kuzzle_token, refresh_user_token
from ._cache import TokenCache
from ._circle import BASE_URL
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
from .stores import FileStore
from .tokens import KuzzleToken, UserToken, masked

if TYPE_CHECKING:
    from .testing import Received

# As sysexits.h has them; 2 is what argparse ends with.
_STATUSES: dict[type[RefreshError], int] = {
    RequestRefusedError: 2,
    ReplyError: 69,
    UnavailableError: 75,
    OutcomeUnknownError: 75,
    SignInRequiredError: 77,
}
_LARGEST_INPUT = 1024 * 1024
# What the services call a secret, and where it's looked for.
_VARIABLES = {
    "jwt": "KUZZLE_JWT",
    "userToken": "CIRCLE_USER_TOKEN",
    "refreshToken": "CIRCLE_REFRESH_TOKEN",
    "encryptionKey": "CIRCLE_ENCRYPTION_KEY",
}

_ABOUT = "Refresh Kuzzle and Circle session tokens, and lose no session over it."
_EXIT = """\
exit status:
  0   the token is on standard output
  2   the command line, the environment, an API key or a right is wrong: mend it
  69  something that is not the service answered: look at the URL, the proxy
  75  the service is down, busy or did not answer: try later
  77  the session has ended: sign in again
"""
_KUZZLE = f"""\
Print a token that lives, refreshed if need be.

The token to begin with is read from the environment variable KUZZLE_JWT or, if that
is not set, from standard input: bare, or as JSON with a member "jwt". What became of
it is kept in the store, so each run may begin with the same token: it's refreshed
when it is about to expire, and printed as it is until then.

{_EXIT}
example:
  refresher kuzzle https://kuzzle.example.com --output token <first-token
"""
_CIRCLE = f"""\
Print a user token that lives, refreshed if need be.

The API key is read from the environment variable CIRCLE_WEB3_API_KEY, the tokens to
begin with from CIRCLE_USER_TOKEN and CIRCLE_REFRESH_TOKEN or, if those are not set,
from standard input: JSON with members "userToken" and "refreshToken", such as this
command prints. What became of them is kept in the store, so each run may begin with
the same tokens.

{_EXIT}
example:
  refresher circle --device-id "$DEVICE" --output env <first-pair.json
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse quotes what it was given, and that may be a token in the wrong place.
        told = re.split(r"(?<=unrecognized arguments): |:? ['\"]", message)[0]
        hint = "; secrets go into the environment, or standard input" if told.startswith("unrec") else ""
        super().error(f"{told}{hint} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv: The arguments. None: those of this process.

    Returns:
        The exit status.
    """
    if argv is None:
        gc.freeze()  # what is imported is no garbage: not to search it in the end saves a tenth of a short run
    parser = _Parser("refresher", description=_ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"refresher {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    add = functools.partial(
        commands.add_parser, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    kuzzle = add("kuzzle", help="print a Kuzzle token that lives, refreshed if need be", description=_KUZZLE)
    kuzzle.set_defaults(run=functools.partial(_refresh, _kuzzle))
    kuzzle.add_argument("url", metavar="URL", help="where Kuzzle answers")
    kuzzle.add_argument("--expires-in", metavar="TIME", help='how long new tokens live, such as "2h"')
    kuzzle.add_argument("--strategy", metavar="NAME", help="the authentication strategy that is asked first")
    kuzzle.add_argument("--trigger-events", action="store_true", help="sent as the JavaScript SDK does")

    circle = add(
        "circle", help="print a Circle user token that lives, refreshed if need be", description=_CIRCLE
    )
    circle.set_defaults(run=functools.partial(_refresh, _circle))
    circle.add_argument("--device-id", metavar="ID", help="the user's device (or CIRCLE_DEVICE_ID)")
    circle.add_argument("--user-id", metavar="ID", help="begin with a user id in place of a user token")
    circle.add_argument("--base-url", metavar="URL", default=BASE_URL, help="where Circle answers")

    for command in (kuzzle, circle):
        command.add_argument("--output", choices=("json", "token", "env"), default="json", help="what to print")
        command.add_argument("--store", metavar="FOLDER", help=f"where tokens are kept (default: {_folder()})")
        command.add_argument(
            "--ahead",
            metavar="SECONDS",
            type=float,
            default=360.0,
            help="refresh a token that has less time left, at most half its life (default: 360). Make it more "
            "than what lies between two runs: a Kuzzle token that dies between them is lost",
        )
        command.add_argument(
            "--timeout", metavar="SECONDS", type=float, default=30.0, help="wait no longer (default: 30)"
        )
        command.add_argument("--no-retry", action="store_true", help="try once, and don't wait out downtime")
        command.add_argument("--quiet", action="store_true", help="complain of nothing but failure")

    add("demo", help="refresh a token of each service, on servers of our own").set_defaults(run=_demo)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever was reading has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _folder() -> Path:
    """Find where the platform wants a program to keep what it has to remember."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "refresher"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "refresher"


def _refresh(call: Callable[..., KuzzleToken | UserToken], arguments: argparse.Namespace) -> int:
    try:
        with _ended_by_signals(), _complaining(quiet=arguments.quiet):
            store = FileStore(arguments.store or _folder())
            store.check()  # a token that can't be saved had better not be refreshed
            on_wait = _show_wait if sys.stderr.isatty() and not arguments.quiet else _say_nothing
            cache = TokenCache(store, ahead=arguments.ahead, on_wait=on_wait)
            token = call(arguments, timeout=arguments.timeout, cache=cache)
    except RefreshError as error:
        status = next(status for kind, status in _STATUSES.items() if isinstance(error, kind))
        return _fail(str(error), status)
    except (OSError, ImportError) as error:
        return _fail(f"the store can't be used: {error}", 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(_written(token.to_dict(), arguments.output))
    return 0


def _fail(complaint: str, status: int) -> int:
    print(f"refresher: {complaint}", file=sys.stderr)
    return status


def _kuzzle(arguments: argparse.Namespace, **options: Any) -> KuzzleToken:
    (jwt,) = _secrets("jwt")
    return refresh_kuzzle_token(
        arguments.url,
        jwt,
        expires_in=arguments.expires_in,
        trigger_events=arguments.trigger_events,
        strategy=arguments.strategy,
        queuable=not arguments.no_retry,
        **options,
    )


def _circle(arguments: argparse.Namespace, **options: Any) -> UserToken:
    device_id = arguments.device_id or os.environ.get("CIRCLE_DEVICE_ID", "")
    common = {
        **options,
        "device_id": device_id,
        "base_url": arguments.base_url,
        "retry": not arguments.no_retry,
    }
    if arguments.user_id:
        (refresh_token,) = _secrets("refreshToken")
        return refresh_user_token(refresh_token=refresh_token, user_id=arguments.user_id, **common)
    user_token, refresh_token = _secrets("userToken", "refreshToken")
    return refresh_user_token(refresh_token=refresh_token, user_token=user_token, **common)


def _secrets(*names: str) -> list[str]:
    """Read secrets from the environment, or all of them from standard input."""
    found: dict[str, object] = {name: os.environ.get(_VARIABLES[name]) for name in names}
    if not all(found.values()):
        found = _from_input(names[0])
    for name in names:
        if not isinstance(found.get(name), str) or not found[name]:
            raise InvalidArgumentError(f"{_VARIABLES[name]} is not set, and standard input has no {name}")
    return [str(found[name]).strip() for name in names]


def _from_input(name: str) -> dict[str, object]:
    """Read a JSON object, or a token on its own."""
    if sys.stdin.isatty():
        import getpass

        text = getpass.getpass(f"{name}: ")
    else:
        text = sys.stdin.read(_LARGEST_INPUT)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {name: text.strip()}
    return value if isinstance(value, dict) else {}


def _written(values: Mapping[str, object], output: str) -> str:
    if output == "json":
        return json.dumps(values)
    secrets = {variable: str(values[name]) for name, variable in _VARIABLES.items() if name in values}
    if output == "token":
        return next(iter(secrets.values()))
    return "\n".join(f"{variable}={shlex.quote(value)}" for variable, value in secrets.items())


def _say_nothing(what: str, seconds: float | None) -> None:
    pass


def _show_wait(what: str, seconds: float | None) -> None:
    """Say on one line of the terminal what is waited for, and wipe it out in the end."""
    line = f"Waiting, {seconds:.0f} s left: {what}" if seconds is not None else what
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    print(f"\r\033[K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)


@contextmanager
def _complaining(*, quiet: bool) -> Iterator[None]:
    """Print warnings on standard error, but for those of single attempts: how they end is told."""
    log, handler = logging.getLogger("refresher"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("refresher: %(message)s"))
    handler.addFilter(lambda record: not quiet and record.module != "_exchange")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end the command in a way that lets an exchange that was sent come to its end."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    old = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


def _demo(_: argparse.Namespace) -> int:
    from .testing import FakeCircle, FakeKuzzle

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
