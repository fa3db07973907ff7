"""
Print a valid Kuzzle or Circle token, or one line that says why there is none.

exit status:
  0   done: what you asked for is on standard output
  2   the command line, the environment, an API key or a right is wrong: fix it
  69  something other than the service answered: check the URL and any proxy
  75  the service is down or busy, or the run was ended: try again later
  77  the session has ended: sign in again

environment:
  REFRESHER_KEY  a Fernet key that encrypts the store, or several, separated by
                 white space: the first encrypts, and all decrypt. That needs
                 pip install 'refresher[crypto]'. Make a key with
                 openssl rand -base64 32 | tr +/ -_
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import inspect
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO
from urllib.parse import urlsplit

from . import __version__, _rules, errors
from ._cache import TokenCache, current
from ._exchange import Exchange, Observed, Patience
from ._ledger import Call
from ._runtime import REAL
from ._text import Secret, fingerprint, json_object, reveal
from .errors import InvalidArgumentError, RefreshError, RequestRefusedError, UnavailableError
from .services import Token, circle, kuzzle
from .stores import EncryptedStore, FileStore, Store
from .tokens import RefreshEvent

Credential = kuzzle.KuzzleCredential | circle.CircleCredential

# As sysexits.h has them; 2 is what argparse ends with.
_TRY_LATER = 75
_STATUSES: dict[type[RefreshError], int] = {
    errors.RequestRefusedError: 2,
    errors.ReplyError: 69,
    errors.SignInRequiredError: 77,
    RefreshError: _TRY_LATER,
}
_LARGEST_INPUT = 1024 * 1024
# What the services call a secret, and the variable that has it.
_VARIABLES = {
    "jwt": "KUZZLE_JWT",
    "userToken": "CIRCLE_USER_TOKEN",
    "refreshToken": "CIRCLE_REFRESH_TOKEN",
    "encryptionKey": "CIRCLE_ENCRYPTION_KEY",
}
_KEY = "REFRESHER_KEY"
_ENCRYPTED = "gAAAA"  # what Fernet writes begins like this
# How long to wait for the answer to a check, and for a token to be saved, in seconds; and for a signal to end the run,
# before it counts as lost.
_CHECK, _SAVING, _LOST = 10.0, 60.0, 1.0
# A disk that is full now. What is there can be read, and to refresh it can wait.
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS
# Windows has no SIGHUP, and only Windows has SIGBREAK.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class _EndedError(BaseException):
    """A signal ended the run."""


class _Run(logging.Handler):
    """
    One run of a command: what it says on standard error, and how a signal ends it.

    The first signal ends a wait, and then the run is over: further signals do nothing. GNU ``timeout`` sends two, and
    a terminal that closes sends several.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.is_quiet = self.is_ready = self.is_over = False
        self.status, self.ended_by, self.raised_at = 0, "", -math.inf
        self.about: list[str] = []  # the service, its host, the session
        self.unsaved: Mapping[str, object] = {}
        self.full: UnavailableError | None = None  # nothing can be written down now
        self.sent = 0  # how many requests

    def end(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        self.ended_by = self.ended_by or ("" if self.is_over else signal.Signals(number).name)
        self.go_on()

    def go_on(self) -> None:
        """End if there was a signal, as soon as that is expected."""
        now = time.monotonic()
        # Again if the run goes on: what hits a `__del__`, or the end of an import, is lost.
        if self.ended_by and self.is_ready and not self.is_over and now - self.raised_at > _LOST:
            self.raised_at = now
            raise _EndedError

    @contextlib.contextmanager
    def watched(self, *, for_good: bool) -> Iterator[None]:
        """Handle signals and print warnings. *for_good*: no signal hits the process on its way to its end either."""
        is_main = threading.current_thread() is threading.main_thread()
        # What is ignored stays ignored: in the background, and under nohup.
        numbers = [each for each in _SIGNALS if is_main and signal.getsignal(each) not in (signal.SIG_IGN, None)]
        handlers = {each: signal.signal(each, self.end) for each in numbers}
        log = logging.getLogger("refresher")
        log.addHandler(self)
        try:
            yield
        finally:
            self.is_over = True
            for each, handler in handlers.items():
                signal.signal(each, signal.SIG_IGN if for_good else handler)
            if not for_good:
                log.removeHandler(self)

    def count(self, event: RefreshEvent) -> None:
        """Count what was sent."""
        self.sent += event.attempts

    def wait(self, is_under_way: Callable[[], object], what: str, seconds: float = math.inf) -> None:
        """Wait for a thread, as Python does at its end anyway: now what comes can be printed."""
        began, told = time.monotonic(), 0
        while is_under_way() and (waited := time.monotonic() - began) < seconds:
            if waited > told + 1:
                told = int(waited)
                self.show_wait(what, None)
            time.sleep(0.05)
        if told:
            self.show_wait("", None)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning, unless it is about a single attempt or a wrong key: what comes of it is printed anyway."""
        is_told = record.name in ("refresher.attempts", "refresher.keys")
        if not self.is_quiet and not self.ended_by and not is_told:
            self.complain(record.getMessage())

    def complain(self, complaint: str) -> None:
        """Print one line: when, about what, and what the matter is."""
        about = " ".join([f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", *self.about])
        _write(sys.stderr, _printable(f"refresher: {about}: {complaint}") + "\n")

    def show_wait(self, what: str, seconds: float | None) -> None:
        """Say on one line of a terminal what is waited for, and wipe it out in the end."""
        can_wipe = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if can_wipe and not self.is_quiet:
            line = what if seconds is None else f"Waiting, {seconds:.0f} s left: {what}"
            _write(sys.stderr, f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}")


def _printable(line: str) -> str:
    """Replace what would control a terminal."""
    return "".join(each if each.isprintable() else "?" for each in line)


def _write(stream: TextIO | None, text: str | Secret[str]) -> str:
    """Write to a standard stream, whatever state it is in. Return what went wrong."""
    if stream is None:
        return "it is closed"
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        data = Secret(reveal(text).encode(encoding, "backslashreplace"))
        # With PYTHONUNBUFFERED there is no buffer, and Python takes no notice of how much was written.
        if isinstance(getattr(stream, "buffer", None), io.RawIOBase):
            with open(stream.fileno(), "wb", closefd=False) as buffered:
                buffered.write(data.reveal())
        else:
            stream.write(data.reveal().decode(encoding))
            stream.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):  # or Python tries again at its end, and fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return getattr(error, "strerror", None) or type(error).__name__
    return ""


class _Parser(argparse.ArgumentParser):
    """Complains in one line. What argparse quotes is left out: it may be a token in the wrong place."""

    def error(self, message: str) -> NoReturn:
        told = re.sub(r"(?s)invalid choice: .* \(choose from (.*)\)", lambda found: f"must be {found[1]}", message)
        if told == message:
            told = re.split(r":? ['\"]", message)[0]
        _write(sys.stderr, f"refresher: {told} (see {self.prog} --help)\n")
        raise SystemExit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        """Complain of what is unknown here, where the help is that of the command, and not in the parser above."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = filter(re.compile("--[a-z-]+").fullmatch, (each.partition("=")[0] for each in unknown))
            what = " ".join(["unrecognized arguments", *names])
            self.error(f"{what}; secrets go into the environment, or standard input")
        return known, unknown

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ARG002
        if trouble := _write(sys.stdout, message):
            _write(sys.stderr, f"refresher: standard output: {trouble}\n")
            raise SystemExit(_TRY_LATER if sys.stdout else 2)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv: The arguments. None means those of this process, which ends afterwards.

    Returns:
        The exit status.
    """
    if argv is None:
        gc.freeze()  # what is imported is no garbage: not to search it in the end saves a tenth of a short run
    run = _Run()
    with run.watched(for_good=argv is None):
        try:
            run.is_ready = True
            run.go_on()
            arguments = _parser().parse_args(argv)
            text = arguments.command(arguments, run)
        except (Exception, _EndedError) as error:
            run.is_over = True
            status, complaint = _judge(error, run)
            run.complain(complaint)
            return status
        run.is_over = True
        trouble = _write(sys.stdout, text) if text else ""
        run.wait(lambda: run.unsaved, "The new token is being saved", _SAVING)
        if trouble:
            fate = "Nor could the new token be saved" if run.unsaved else "Nothing is lost"
            trouble += f". {fate}: run this again" if isinstance(text, Secret) else ""  # a token
            run.complain(f"standard output: {trouble}")
            return _TRY_LATER if sys.stdout else 2
        if run.unsaved:
            run.complain("the new token could not be saved: keep what was printed, or the session may be lost")
    return run.status


def _judge(error: BaseException, run: _Run) -> tuple[int, str]:
    """Return the exit status for an error, and what to say of it."""
    if run.ended_by:
        return _TRY_LATER, f"ended by {run.ended_by}"
    for kind, status in _STATUSES.items():
        if isinstance(error, kind):
            return status, str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return _TRY_LATER, f"unexpected {type(error).__name__} in {Path(where.filename).name}, line {where.lineno}"


def _parser() -> argparse.ArgumentParser:
    """List the commands and their options."""
    shape: Any = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser("refresher", description=__doc__, **shape)
    # What only some commands have an option for.
    parser.set_defaults(expires_in=None, strategy=None, trigger_events=False, check=False, ahead=360.0)
    parser.add_argument("--version", action="version", version=f"refresher {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(group: Any, name: str, title: str, about: object, **does: Callable[..., object]) -> Any:
        added = group.add_parser(name, help=title, description=inspect.getdoc(about), epilog=exits, **shape)
        added.set_defaults(**does)
        return added

    def add_both(name: str, title: str, command: Callable[..., object]) -> list[Any]:
        group = add(commands, name, title, command, command=command)
        group = group.add_subparsers(required=True, metavar="SERVICE", parser_class=_Parser)
        finds = {"kuzzle": _kuzzle, "circle": _circle}
        return [add(group, each, f"a {each.title()} session", command, find=find) for each, find in finds.items()]

    exits = (__doc__ or "").strip().partition("\n\n")[2]
    print_kuzzle = add(commands, "kuzzle", "print a valid Kuzzle token", _kuzzle, command=_refresh, find=_kuzzle)
    print_circle = add(commands, "circle", "print a valid Circle token", _circle, command=_refresh, find=_circle)
    status_kuzzle, status_circle = add_both("status", "tell how it stands with a session", _status)
    forget_kuzzle, forget_circle = add_both("forget", "forget a session", _forget)
    add(commands, "demo", "show a refresh of each service, on servers of our own", _demo, command=_demo)

    for each in (print_kuzzle, status_kuzzle, forget_kuzzle):
        each.add_argument("url", metavar="URL", help="where Kuzzle answers")
    for each in (print_circle, status_circle, forget_circle):
        each.add_argument("--device-id", metavar="ID", help="the user's device (or CIRCLE_DEVICE_ID)")
        each.add_argument("--user-id", metavar="ID", help="the user's id, in place of a user token")
        each.add_argument("--base-url", metavar="URL", default=circle.BASE_URL, help="where Circle answers")
    status_kuzzle.add_argument("--check", action="store_true", help="ask Kuzzle too; that spends nothing")
    output: Any = {"default": "json", "help": "what to print (default: json)"}
    for each in (status_kuzzle, status_circle):
        each.add_argument("--output", choices=("json", "table"), **output)
    about = "how long new tokens are valid, such as 2h; a bare number is seconds, and -1 means for ever"
    print_kuzzle.add_argument("--expires-in", metavar="TIME", type=_lifetime, help=about)
    print_kuzzle.add_argument("--strategy", metavar="NAME", help="the authentication strategy that is asked first")
    print_kuzzle.add_argument("--trigger-events", action="store_true", help="sent as the JavaScript SDK does")
    for option in (print_kuzzle.add_argument, print_circle.add_argument):
        option("--output", choices=("json", "token", "env", "headers"), **output)
        about = (
            "refresh a token with less left (default: 6m, at most half its life); make it longer than between two runs"
        )
        option("--ahead", metavar="TIME", type=_duration, default=argparse.SUPPRESS, help=about)
        option("--timeout", metavar="TIME", type=_duration, default=30.0, help="how long to try (default: 30s)")
        option("--no-retry", action="store_true", help="try once, and don't wait out downtime")
        option("--quiet", action="store_true", help="print nothing on standard error but failures")
    for each in (print_kuzzle, print_circle, status_kuzzle, status_circle, forget_kuzzle, forget_circle):
        about = f"where tokens are kept, encrypted if {_KEY} is set (default: in XDG_STATE_HOME, or in ~/.local/state)"
        each.add_argument("--store", metavar="FOLDER", help=about)
    return parser


def _duration(text: str) -> float:
    """Read a duration, in seconds."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError("must be like 30, 30s, 15m or 2h")
    return float(found[1]) * _UNITS[found[2]]


def _lifetime(text: str) -> str:
    """Add the unit to a bare number, which Kuzzle would take for milliseconds. The rest is Kuzzle's to read."""
    return f"{text}s" if re.fullmatch("[0-9.]+ *", text) else text


# The commands. Their docstrings are the help.


def _refresh(arguments: argparse.Namespace, run: _Run) -> Secret[str]:
    """Return what to print of a session's newest token, refreshed if it is about to expire."""
    run.is_quiet = arguments.quiet
    if sys.stdout is None:
        raise InvalidArgumentError("standard output is closed, so no token could be printed")
    if not 0 < arguments.timeout <= threading.TIMEOUT_MAX:
        raise InvalidArgumentError("--timeout must be more than 0 and less than 292 years, such as 30s, 15m or 2h")
    cache, credential = _look_up(arguments, run)
    run.unsaved = cache._ledger.unsaved
    retry, timeout = not arguments.no_retry, arguments.timeout
    call = Call[Any](credential=credential, retry=retry, timeout=timeout, patient=True)
    before = cache._peek(credential).token
    try:
        if run.full and cache._status(credential).state != "fresh":
            raise run.full
        outcome: Token | BaseException = current(call, cache)
    except (RefreshError, _EndedError) as error:
        outcome = error
    run.is_over = True
    flights = cache._ledger.flights
    run.sent += any(flight.has_departed for flight in list(flights.values()))
    what = "A request was sent. Its answer is awaited, for a minute at most"
    run.wait(lambda: any(flight.is_running for flight in list(flights.values())), what)
    last = cache._peek(credential)
    newest = last.token
    is_over = isinstance(outcome, errors.SignInRequiredError)  # then that is what was refused
    if newest is not None and newest != before and not is_over and cache._status(credential).state != "expired":
        outcome = newest  # else it came too late
    is_failure = isinstance(outcome, RefreshError) and (outcome.spent is False or not run.sent)
    is_kept = is_failure and not isinstance(outcome, RequestRefusedError) and not _is_being_spent(cache, last)
    if newest is not None and is_kept and cache._status(credential).state in ("fresh", "due"):
        if not run.is_quiet:
            run.complain(f"{outcome}, going on with the old token")
        outcome = newest
    if isinstance(outcome, BaseException):
        raise outcome
    return _written(credential, outcome, arguments.output)


def _is_being_spent(cache: TokenCache, credential: Any) -> bool:
    """Whether another process is spending a credential: the service may have answered it already."""
    ledger = cache._ledger
    attempt, _ = ledger.last_attempt(credential)
    return attempt is not None and attempt.is_under_way("", cache._limit + _rules.LEASE, ledger.age(attempt))


def _look_up(arguments: argparse.Namespace, run: _Run) -> tuple[TokenCache, Credential]:
    """Find out which session is meant, and look it up in the store."""
    credential: Credential = arguments.find(arguments, run)
    cache = TokenCache(_store(arguments, run), ahead=arguments.ahead, on_wait=run.show_wait, on_event=run.count)
    ledger = cache._ledger
    for key in [name for own in credential.keys for name in (own, f"{own}-alias")]:
        if _ENCRYPTED in str(ledger.ask("cannot be read", ledger.store.get, key)[0])[:8]:
            raise InvalidArgumentError(f"{_KEY} is not set: this session was saved with a key")
    cache._peek(credential)
    if any(ledger.unread.values()):
        raise InvalidArgumentError(f"{_KEY} does not fit: this session was saved with another key, or without one")
    return cache, credential


def _status(arguments: argparse.Namespace, run: _Run) -> str:
    """
    Tell how it stands with a session, without refreshing it.

    Give any token of the session, as you would to print one. The state is fresh,
    due (valid, and refreshed by the next run that prints it with the default
    --ahead), expired, refused (the service did, lately) or unknown (it was never
    refreshed from here).

    The exit status is 77 if it is known here that the user has to sign in again.
    Only the service knows of a sign-out elsewhere, say: --check asks Kuzzle.
    """
    cache, credential = _look_up(arguments, run)
    while True:
        status, newest = cache._status(credential), cache._peek(credential)
        shown = status.to_dict()
        if arguments.check:
            shown["valid"] = _is_valid(newest, run)
        if shown.get("valid") is not False or cache._peek(credential).secret == newest.secret:
            break  # else another process has just refreshed it
    is_dead = status.state == "expired" and not isinstance(newest, circle.CircleCredential)
    if status.state == "refused" or is_dead or shown.get("valid") is False:
        run.status = 77
    if arguments.output == "json":
        return json.dumps(shown) + "\n"
    return "".join(_printable(f"{name:12} {'-' if value is None else value}") + "\n" for name, value in shown.items())


def _is_valid(newest: Any, run: _Run) -> bool:
    patience = Patience(REAL, _CHECK, True, lambda what: run.show_wait(what, None))
    try:
        return bool(newest.is_valid(Exchange(Observed.of(REAL), patience, newest.scope, None)))
    finally:
        run.show_wait("", None)


def _forget(arguments: argparse.Namespace, run: _Run) -> None:
    """
    Forget a session: remove its tokens from the store.

    Give any token of the session, as you would to print one. The service is not
    told: there, the session stays valid until it expires.
    """
    cache, credential = _look_up(arguments, run)
    if run.full:
        raise run.full
    cache._forget(credential)


def _demo(_: argparse.Namespace, __: _Run) -> str:
    """Show a refresh of each service, on servers of our own."""
    from .testing.demo import show

    return show()


def _kuzzle(arguments: argparse.Namespace, run: _Run) -> Credential:
    """
    Print a valid Kuzzle token.

    The token of your sign-in is read from the environment variable KUZZLE_JWT. If
    that is not set, it is read from standard input: bare, as JSON with a member
    "jwt", or as Kuzzle's whole answer to the sign-in. On a terminal, you are asked
    for it.

    The newest token is kept in the store, so each run may begin with the same one.
    The first run refreshes it. Later runs do when less than six minutes are left:
    see --ahead. Once a request is sent, the run waits for its answer, for up to a
    minute longer than --timeout.

    For example:
      refresher kuzzle https://kuzzle.example.com --output token <first-token

    To keep a session alive, put this into your crontab (crontab -e):
      KUZZLE=https://kuzzle.example.com
      */5 * * * * refresher kuzzle $KUZZLE --quiet <~/.kuzzle-token >/dev/null

    Runs may overlap. If they are rarer, raise --ahead. A failure is one line on
    standard error. If cron does not find refresher, write its full path.
    """
    run.about = ["kuzzle"]
    options = {name: getattr(arguments, name) for name in ("url", "expires_in", "trigger_events", "strategy")}
    credential = kuzzle.credential(jwt=_secrets("jwt")["jwt"], **options)
    run.about += [urlsplit(credential.url).netloc, fingerprint(credential.secret.reveal())]
    return credential


def _circle(arguments: argparse.Namespace, run: _Run) -> Credential:
    """
    Print a valid Circle user token.

    The API key is read from the environment variable CIRCLE_WEB3_API_KEY, and the
    tokens of your sign-in from CIRCLE_USER_TOKEN and CIRCLE_REFRESH_TOKEN. A token
    that is not set is read from standard input: JSON with members "userToken" and
    "refreshToken", such as this command prints, or Circle's whole answer. One alone
    may be bare. On a terminal, you are asked for what is missing.

    The newest tokens are kept in the store, so each run may begin with the same
    ones. The first run refreshes them. Later runs do when less than six minutes of
    the user token are left: see --ahead. Once a request is sent, the run waits for
    its answer, for up to a minute longer than --timeout.

    For example:
      refresher circle --device-id "$DEVICE" <first-pair.json
    """
    run.about = ["circle"]
    api_key = Secret("none") if arguments.command is not _refresh else _setting("CIRCLE_WEB3_API_KEY", "API key")
    if not api_key.reveal():
        raise InvalidArgumentError("the API key is missing: set CIRCLE_WEB3_API_KEY")
    device_id = arguments.device_id or _setting("CIRCLE_DEVICE_ID", "device id").reveal()
    if not device_id:
        raise InvalidArgumentError("the device id is missing: give --device-id or set CIRCLE_DEVICE_ID")
    secrets = _secrets(*(["refreshToken"] if arguments.user_id else ["userToken", "refreshToken"]))
    who = secrets.get("userToken"), arguments.user_id
    credential = circle.credential(secrets["refreshToken"], device_id, api_key, *who, arguments.base_url)
    run.about += [urlsplit(credential.base_url).netloc, fingerprint(credential.secret.reveal())]
    return credential


# What they read and write


def _setting(variable: str, name: str) -> Secret[str]:
    """Read something from the environment, or ask a terminal for it."""
    found = Secret(os.environ.get(variable, "").strip())
    if found.reveal() or sys.stdin is None or not sys.stdin.isatty():
        return found
    import getpass

    with contextlib.suppress(EOFError, UnicodeError):
        found = Secret(getpass.getpass(f"{name}: ").strip())
    return found


def _secrets(*names: str) -> dict[str, Secret[str]]:
    """Read secrets from the environment and a terminal, and what is missing from standard input."""
    found = {name: _setting(_VARIABLES[name], name) for name in names}
    missing = [name for name in names if not found[name].reveal()]
    found |= _from_input(*missing) if missing else {}
    for name in missing:
        if not found[name].reveal():
            raise InvalidArgumentError(f"{_VARIABLES[name]} is not set, and standard input has no {name}")
    return found


def _from_input(*names: str) -> dict[str, Secret[str]]:
    """Read members of a JSON object, or the first on its own."""
    data = Secret(b"")
    with contextlib.suppress(OSError, AttributeError):  # it is closed, or a folder
        # A terminal has been asked already, and would show what is typed.
        data = Secret(b"" if sys.stdin.isatty() else sys.stdin.buffer.read(_LARGEST_INPUT))
    # PowerShell writes UTF-16, and marks it as such.
    text = Secret(data.reveal().decode(json.detect_encoding(data.reveal()), "replace").strip())
    if not text.reveal().startswith(("{", "[")):
        return {names[0]: text}
    values = Secret(json_object(text.reveal()))
    for envelope in ("result", "data"):  # of Kuzzle's answer to a sign-in, and of Circle's
        if isinstance(values.reveal().get(envelope), dict):
            values = Secret(values.reveal()[envelope])
    return {name: Secret(values.reveal()[name].strip()) for name in names if isinstance(values.reveal().get(name), str)}


def _store(arguments: argparse.Namespace, run: _Run) -> Store:
    """Return the store. A token that can't be saved had better not be refreshed, so it is tried out."""
    failure: RefreshError
    try:
        store = FileStore(_folder() if arguments.store is None else arguments.store)
        try:
            store.check()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            run.full = UnavailableError(f"the store (--store) can't be written: {error}", spent=False)
        return EncryptedStore(store, Secret(os.environ[_KEY]).reveal().split()) if _KEY in os.environ else store
    except (BlockingIOError, TimeoutError):
        failure = UnavailableError("another process has locked the store: try again later")
    except (OSError, RuntimeError, ImportError, InvalidArgumentError) as error:
        failure = InvalidArgumentError(f"the store (--store, {_KEY}) can't be used: {error}")
    raise failure


def _folder() -> Path:
    """Find where the platform wants a program to keep its state."""
    state = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME", ""))
    if state.is_absolute() and sys.platform != "darwin":
        return state / "refresher"
    if os.environ.get("HOME") == "" and sys.platform != "win32":
        raise RuntimeError("HOME is empty")  # which Python takes for /
    places = {"win32": "AppData/Local", "darwin": "Library/Application Support"}
    return Path.home() / places.get(sys.platform, ".local/state") / "refresher"


def _written(credential: Credential, token: Token, output: str) -> Secret[str]:
    """Write a token down, as a line or some."""
    values = Secret(token.to_dict())
    names = [name for name in _VARIABLES if name in values.reveal()]
    if output == "json":
        return Secret(json.dumps(values.reveal()) + "\n")
    if output == "token":
        return Secret(f"{values.reveal()[names[0]]}\n")
    if output == "headers":
        headers = credential.following(token).headers  # type: ignore[arg-type]  # of the same service
        return Secret("".join(f"{name}: {reveal(value)}\n" for name, value in headers.items()))
    return Secret("".join(f"{_VARIABLES[name]}={shlex.quote(str(values.reveal()[name]))}\n" for name in names))
