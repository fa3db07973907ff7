"""Many sessions kept alive: keep_alive."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Literal

import attrs

from ._cache import TokenCache
from ._system import work_aside
from ._text import Secret, hide_all, number, reveal
from .auth import Auth
from .errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    RefreshError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)

_log = logging.getLogger("refresher")

# How many requests a second a service takes from one who asks, where it tells.
_PER_SECOND = {"circle": 5.0}
# How many seconds a store may cost by not answering, before it counts as down.
_WASTE = 2.0
_WRONG = "auths must be KuzzleAuth or CircleAuth objects"


@attrs.frozen(kw_only=True)
class KeepAliveOutcome:
    """
    What `keep_alive` did about one session.

    Attributes:
        auth: The auth object.
        outcome: ``"refreshed"``: it has a new token. ``"fresh"``: it needs none yet. ``"ended"``: the service refused
            its newest token, so its user has to sign in again. ``"skipped"``: it was not refreshed. *error* says why;
            None means that nobody has signed in.
        seconds: How long that took.
        error: What went wrong. After ``"refreshed"`` and ``"fresh"``, what *on_refresh* raised.
    """

    auth: Auth[Any]
    outcome: Literal["refreshed", "fresh", "ended", "skipped"]
    seconds: float = 0.0
    error: Exception | None = None


def keep_alive(
    auths: Iterable[Auth[Any]], *, at_once: int = 4, per_second: float | None = None
) -> Iterator[KeepAliveOutcome]:
    """
    Refresh all sessions that are due, and tell of each session what came of it, as soon as that is known.

    After the first sign that a service or a store is down, nothing more is sent to that service in this run: its
    sessions that are due are ``"skipped"``. Run it again, more often than a token's window is long: see *ahead* of
    `TokenCache`. Each session's *on_refresh* is called in the thread that takes the outcomes.

    Args:
        auths: Auth objects. They are taken one by one, so a generator of many sessions needs little memory.
        at_once: How many sessions are refreshed at the same time.
        per_second: How many refreshes are begun in a second, for each service, at most. None means as many as it
            takes: 5 for Circle, any number for Kuzzle. A refresh by a Circle *user_id* counts as two.

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
    auths, at_once, per_second = hide_all(auths, at_once, per_second)  # there may be tokens among them
    if type(reveal(at_once)) is not int or reveal(at_once) < 1:
        raise InvalidArgumentError("at_once must be a whole number, 1 or more")
    rate = None if per_second is None else number(reveal(per_second))
    if per_second is not None and (rate is None or not 0 < rate <= 1e6):
        raise InvalidArgumentError("per_second must be a number of refreshes, more than 0, or None")
    if not isinstance(reveal(auths), Iterable):
        raise InvalidArgumentError(_WRONG)
    return _Keeper(reveal(at_once), rate).run(iter(reveal(auths)))


class _Keeper:
    """One run of `keep_alive`."""

    def __init__(self, at_once: int, per_second: float | None) -> None:
        self._at_once, self._per_second = at_once, per_second
        self._outages: dict[str, RefreshError] = {}  # by whom a pause is about
        self._wasted: dict[TokenCache, float] = {}  # seconds that a store has cost by not answering
        self._next: dict[str, float] = {}  # when the next refresh may begin
        self._doubts: set[str] = set()  # services with one failure that may be an outage
        self._running: set[Future[KeepAliveOutcome]] = set()
        self._is_unwanted = False  # nobody wants the rest
        self._process = os.getpid()

    def run(self, auths: Iterator[Auth[Any]]) -> Iterator[KeepAliveOutcome]:
        """Go through all auth objects."""
        try:
            for hidden in map(Secret, auths):
                if not isinstance(hidden.reveal(), Auth):  # it may be a token
                    yield from self._rest()
                    raise InvalidArgumentError(_WRONG)
                yield from self._step(hidden.reveal())
            yield from self._rest()
        finally:
            self._is_unwanted = True
            if self._process == os.getpid():  # a forked child has none of these threads
                for each in wait(self._running).done:
                    if each.exception() is None and (last := self._hand_over(each.result())) is not each.result():
                        _log.warning("keep_alive was left, and on_refresh has failed (%s)", type(last.error).__name__)

    def _rest(self) -> Iterator[KeepAliveOutcome]:
        while self._running:
            yield from self._done()

    def _step(self, auth: Auth[Any]) -> Iterator[KeepAliveOutcome]:
        """Begin with one auth object, when there is room for it, and tell what came of others meanwhile."""
        outcome = self._look(auth)
        yield from self._done(0)
        while outcome is None and len(self._running) >= self._at_once:
            yield from self._done()
        if outcome is None and (outcome := self._skip(auth)) is None:
            yield from self._wait_for_turn(auth)
            outcome = self._skip(auth)
        if outcome is not None:
            yield outcome
        else:
            self._begin(auth)

    def _begin(self, auth: Auth[Any]) -> None:
        """Refresh one session in a thread. Python would wait for a pool's, even if this one is a daemon."""
        consumer = threading.current_thread()
        is_there = consumer.is_alive if consumer.is_alive() else lambda: True  # else this is a handler of atexit
        self._running.add(work_aside(lambda: self._refresh(auth, is_there), daemon=consumer.daemon))

    def _done(self, seconds: float | None = None) -> Iterator[KeepAliveOutcome]:
        """Tell what has come of refreshes, after some seconds at most."""
        outcomes = []
        for each in wait(self._running, seconds, return_when=FIRST_COMPLETED).done:
            self._running.discard(each)  # if this one is interrupted, the others are handed over in the end
            outcomes.append(self._hand_over(each.result()))
        yield from outcomes

    def _hand_over(self, outcome: KeepAliveOutcome) -> KeepAliveOutcome:
        """Hand a new token over here, not in one of our threads: connections to databases are for one thread each."""
        try:
            outcome.auth._hand_over()
        except Exception as error:  # on_refresh may raise whatever it likes
            outcome = attrs.evolve(outcome, error=outcome.error or error)
        return outcome

    def _look(self, auth: Auth[Any]) -> KeepAliveOutcome | None:
        """Return what came of a session that is not due."""
        cache, began = auth._cache, auth._cache._runtime.steady()
        wasted = self._wasted.get(cache, 0.0)
        try:
            is_due = auth._is_due(by_store=wasted <= _WASTE)
        except UnavailableError as error:
            return KeepAliveOutcome(auth=auth, outcome="skipped", error=error.with_traceback(None))
        finally:
            if cache._ledger.is_failing or cache._ledger.probe_if_hung():
                self._wasted[cache] = wasted + cache._runtime.steady() - began
        if is_due is None:
            return KeepAliveOutcome(auth=auth, outcome="skipped")
        # There may be a token that on_refresh has failed to take.
        return None if is_due else self._hand_over(KeepAliveOutcome(auth=auth, outcome="fresh"))

    def _skip(self, auth: Auth[Any]) -> KeepAliveOutcome | None:
        """Return what came of a session whose service is down."""
        error = self._outages.get(auth._scope)
        return None if error is None else KeepAliveOutcome(auth=auth, outcome="skipped", error=error)

    def _wait_for_turn(self, auth: Auth[Any]) -> Iterator[KeepAliveOutcome]:
        """Begin no more refreshes in a second than the service takes."""
        rate, runtime = self._per_second or _PER_SECOND.get(auth._service), auth._cache._runtime
        if rate is not None:
            turn = max(runtime.steady(), self._next.get(auth._scope, -math.inf))
            self._next[auth._scope] = turn + auth._cost / rate
            while (seconds := turn - runtime.steady()) > 0:
                if self._running:
                    yield from self._done(seconds)
                else:
                    runtime.sleep(seconds)

    def _refresh(self, auth: Auth[Any], is_there: Callable[[], bool]) -> KeepAliveOutcome:
        """Refresh one session, unless nobody wants the rest, or who took the outcomes has ended with the process."""
        runtime, first, began = auth._cache._runtime, auth._credential, auth._cache._runtime.steady()
        # What memory has will do: here the store would have to be asked by one more thread.
        before = None if first is None else (auth._cache._ledger.recall(first)[0].newest or first).keys[-1]
        outcome: Literal["refreshed", "fresh", "ended", "skipped"] = "skipped"
        failure: Exception | None = None
        try:
            last = auth._advance(auth._sign_in, patient=True, is_unwanted=lambda: self._is_unwanted or not is_there())
            if last is not None:
                outcome = "fresh" if last.keys[-1] == before else "refreshed"
        except SignInRequiredError as error:
            outcome, failure = "ended", error
        except RefreshError as error:
            failure = error
            # The service is in order if it has refused a token, though that is no verdict yet. If nothing was sent, as
            # another process has the lock, or an entry of the store cannot be read, that is no sign of an outage.
            was_refused = isinstance(error, OutcomeUnknownError) and (error.status or 500) < 500
            if not (was_refused or error._is_elsewhere or isinstance(error, RequestRefusedError) or auth._is_young):
                # What is no clear sign may be the trouble of one session alone. Two of them are an outage.
                if error.retryable or auth._scope in self._doubts:
                    self._outages.setdefault(auth._scope, error)
                self._doubts.add(auth._scope)
        failure = failure and failure.with_traceback(None)  # its frames have all of a refresh
        return KeepAliveOutcome(auth=auth, outcome=outcome, seconds=runtime.steady() - began, error=failure)
