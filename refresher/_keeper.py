"""Many sessions kept alive: keep_alive."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import attrs

from ._text import Secret
from .auth import Auth
from .errors import InvalidArgumentError, RefreshError, RequestRefusedError, SignInRequiredError, UnavailableError

# How many requests a second a service takes from one who asks, where it tells.
_PER_SECOND = {"circle": 5.0}


@attrs.frozen(kw_only=True)
class KeepAliveOutcome:
    """What `keep_alive` did about one session."""

    auth: Auth[Any]
    """The auth object."""
    outcome: Literal["refreshed", "fresh", "ended", "skipped"]
    """
    ``"refreshed"``: it has a new token. ``"fresh"``: it needs none yet. ``"ended"``: the service refused its newest
    token, so its user has to sign in again. ``"skipped"``: it was not refreshed. *error* says why; None means that
    nobody has signed in.
    """
    seconds: float = 0.0
    """How long that took."""
    error: Exception | None = None
    """What went wrong. After ``"refreshed"``, what *on_refresh* raised."""


def keep_alive(
    auths: Iterable[Auth[Any]], *, at_once: int = 4, per_second: float | None = None
) -> Iterator[KeepAliveOutcome]:
    """
    Refresh all sessions that are due, and tell of each session what came of it, as soon as that is known.

    After the first sign that a service or a store is down, nothing more is sent to that service in this run: its
    sessions that are due are ``"skipped"``. Run it again, more often than a token's window is long: see *ahead* of
    `TokenCache`.

    Args:
        auths: Auth objects. They are taken one by one, so a generator of many sessions needs little memory.
        at_once: How many sessions are refreshed at the same time.
        per_second: How many refreshes are begun in a second, for each service, at most. None means as many as it
            takes: 5 for Circle, any number for Kuzzle.

    Yields:
        One outcome for each auth object. The order is not that of *auths*.

    Raises:
        InvalidArgumentError: An argument is wrong, or one of *auths* is no auth object.

    Example:
        >>> from refresher import KuzzleAuth
        >>> from refresher.testing import FakeKuzzle
        >>> with FakeKuzzle() as kuzzle:
        ...     auths = [KuzzleAuth(kuzzle.url, kuzzle.login("foo", ago=ago)) for ago in (3590, 1800)]
        ...     print(sorted(outcome.outcome for outcome in keep_alive(auths)))
        ['fresh', 'refreshed']
    """
    hidden = Secret(auths)
    del auths
    if type(at_once) is not int or at_once < 1:
        raise InvalidArgumentError("at_once must be a whole number, 1 or more")
    is_number = isinstance(per_second, (int, float)) and not isinstance(per_second, bool)
    if per_second is not None and not (is_number and 0 < per_second <= 1e6):
        raise InvalidArgumentError("per_second must be a number of refreshes, more than 0, or None")
    return _Keeper(at_once, per_second).run(hidden)


class _Keeper:
    """One run of `keep_alive`."""

    def __init__(self, at_once: int, per_second: float | None) -> None:
        self._at_once, self._per_second = at_once, per_second
        self._outages: dict[str, RefreshError] = {}  # by whom a pause is about
        self._next: dict[str, float] = {}  # when the next refresh may begin

    def run(self, auths: Secret[Iterable[Auth[Any]]]) -> Iterator[KeepAliveOutcome]:
        """Go through all auth objects."""
        running: set[Future[KeepAliveOutcome]] = set()
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="refresher") as pool:
            for each in map(Secret, auths.reveal()):  # it may be a token in the wrong place
                if not isinstance(each.reveal(), Auth):
                    raise InvalidArgumentError("auths must be KuzzleAuth or CircleAuth objects")
                auth = each.reveal()
                outcome = self._look(auth)
                while outcome is None and len(running) >= self._at_once:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (each.result() for each in done)
                outcome = outcome or self._skip(auth)
                if outcome is not None:
                    yield outcome
                else:
                    self._wait_for_turn(auth)
                    running.add(pool.submit(contextvars.copy_context().run, self._refresh, auth))
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (each.result() for each in done)

    def _look(self, auth: Auth[Any]) -> KeepAliveOutcome | None:
        """Return what came of a session that is not due."""
        try:
            is_due = auth._is_due()
        except UnavailableError as error:
            return KeepAliveOutcome(auth=auth, outcome="skipped", error=error)
        if is_due is None:
            return KeepAliveOutcome(auth=auth, outcome="skipped")
        return None if is_due else KeepAliveOutcome(auth=auth, outcome="fresh")

    def _skip(self, auth: Auth[Any]) -> KeepAliveOutcome | None:
        """Return what came of a session whose service is down."""
        error = self._outages.get(auth._scope)
        return None if error is None else KeepAliveOutcome(auth=auth, outcome="skipped", error=error)

    def _wait_for_turn(self, auth: Auth[Any]) -> None:
        """Begin no more refreshes in a second than the service takes."""
        rate, runtime = self._per_second or _PER_SECOND.get(auth._service), auth._runtime
        if rate is not None:
            now = runtime.steady()
            turn = max(now, self._next.get(auth._scope, now))
            self._next[auth._scope] = turn + 1 / rate
            if turn > now:
                runtime.sleep(turn - now)

    def _refresh(self, auth: Auth[Any]) -> KeepAliveOutcome:
        """Refresh one session."""
        began = auth._runtime.steady()
        before = auth._newest()
        outcome: Literal["refreshed", "fresh", "ended", "skipped"] = "skipped"
        failure: Exception | None = None
        try:
            auth._current(patient=True)
            outcome = "fresh" if auth._newest() == before else "refreshed"
        except SignInRequiredError as error:
            outcome, failure = "ended", error
        except RefreshError as error:
            failure = error
            if not isinstance(error, RequestRefusedError):
                self._outages.setdefault(auth._scope, error)
        except Exception as error:  # on_refresh may raise whatever it likes, after the refresh
            outcome, failure = "refreshed", error
        seconds = auth._runtime.steady() - began
        return KeepAliveOutcome(auth=auth, outcome=outcome, seconds=seconds, error=failure)
