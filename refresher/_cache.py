"""
TokenCache: the newest token of each chain, refreshed once for everyone.

A caller's thread looks at memory and waits. All the rest (store, lock, network) is done by a *flight*: one thread for
each chain and process, which outlives its callers if something was sent. `_rules` says what to do, `_flight` does it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, NoReturn, SupportsIndex, TypeVar, overload

from . import _rules, importing
from ._exchange import Exchange, Observed, Patience, not_yet
from ._flight import Flight, OnEvent, SignOut, Waiter
from ._ledger import LEAP, Call, Ledger
from ._notebook import show_wait
from ._rules import Chain, Left
from ._runtime import REAL, EndingError, Runtime
from ._system import fill
from ._text import Secret, fingerprint, hide, hide_all, number, reveal
from .errors import InvalidArgumentError, RefreshError, RequestRefusedError, UnavailableError
from .services import Credential, T, circle, kuzzle
from .stores import MemoryStore, Store, check_store
from .tokens import SessionStatus

_log = logging.getLogger("refresher")

# How much longer than its timeout a caller waits: the flight may be about to say what went wrong. In seconds.
_GRACE = 0.1
_UNREAD = "has an entry of this session that cannot be read: check its key"

R = TypeVar("R")

OnWait = Callable[[str, float | None], object]


class TokenCache:
    """
    Remembers the newest token of each session, so that it is refreshed once, whoever asks and however often.

    A call with any token of a session gets the newest one. If that is about to expire, it is refreshed, once for
    all threads of this process and, if they share a store, for all processes and machines. Threads may share a
    cache.

    Args:
        store: Where entries are kept. None means in the memory of this process.
        lease: For how many seconds after it was sent a refresh goes on though nobody waits for it any more. An answer
            that takes longer is lost, and with it a session of Kuzzle's.
        clock: Tells the time, in seconds since 1970. It may be wrong. None means the system's clocks: then a
            wall clock that is set does not matter on one machine.
        ahead: How many seconds before its end a token is refreshed, at most half its lifetime. Make it more
            than what lies between two calls, or a Kuzzle token may expire between them. None means the last
            minute, or the last tenth of a shorter life, less a bit that differs from token to token.
        on_wait: Called about once a second by a call that waits for more than one: with what it waits for, and
            how many seconds at most (None: no limit). In the end with ``""`` and None. None means that a
            notebook shows it.
        on_event: Called with a `RefreshEvent` for each exchange and each verdict, in the context of the call that
            caused it, and before that returns, unless its time is up. So it should be quick. What it raises is logged.
        runtime: What the cache needs of its surroundings: clocks, threads, the network. For simulations.

    Raises:
        InvalidArgumentError: An argument is wrong, such as a path for *store*, which would be ``FileStore(path)``.

    Example:
        >>> from refresher import refresh_kuzzle_token
        >>> from refresher.testing import FakeKuzzle
        >>> cache = TokenCache()
        >>> with FakeKuzzle() as kuzzle:
        ...     first = kuzzle.login("foo", ago=1800)
        ...     one = refresh_kuzzle_token(kuzzle.url, first, cache=cache)
        ...     two = refresh_kuzzle_token(kuzzle.url, first, cache=cache)
        ...     print(one == two, len(kuzzle.requests))
        True 1
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        lease: float = 60.0,
        clock: Callable[[], float] | None = None,
        ahead: float | None = None,
        on_wait: OnWait | None = None,
        on_event: OnEvent | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        store, lease, clock, ahead = hide_all(store, lease, clock, ahead)
        on_wait, on_event, runtime = hide_all(on_wait, on_event, runtime)
        for name, value in (("lease", lease), ("ahead", ahead or Secret(0.0))):
            seconds = number(reveal(value))
            if seconds is None or not 0 <= seconds <= _rules.FOREVER:
                raise InvalidArgumentError(f"{name} must be a number of seconds, not negative and at most ten years")
        for name, value in (("clock", clock), ("on_wait", on_wait), ("on_event", on_event)):
            if value is not None and not callable(reveal(value)):
                raise InvalidArgumentError(f"{name} must be a function, or None")
        if runtime is not None and not hasattr(reveal(runtime), "steady"):
            raise InvalidArgumentError("runtime must be a Runtime, or None")
        self._store = MemoryStore() if store is None else check_store(reveal(store))
        self._limit, self._clock, self._ahead = float(reveal(lease)), reveal(clock), reveal(ahead)
        self._on_wait, self._on_event = reveal(on_wait) or show_wait, reveal(on_event)
        self._start_empty(REAL if runtime is None else reveal(runtime))

    def _start_empty(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._ledger = Ledger(self._store, runtime, self._clock, self._ahead)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_runtime", "_ledger")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._start_empty(REAL)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return "SHARED_CACHE" if self is SHARED_CACHE else super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: object) -> TokenCache:
        return self  # a copy of a session's token must not be spent apart from it

    def __repr__(self) -> str:
        return f"TokenCache({getattr(self, '_store', None)!r})"  # also in the middle of a complaint

    # What a call gets

    def _get(self, call: Call[T]) -> Credential[T]:
        """
        Return the newest credential of a chain, refreshed if it is about to expire.

        Raises:
            RefreshError: The chain has no valid token, and none could be obtained.
        """
        ledger = self._ledger
        chain, is_trusted = ledger.recall(call.credential)
        newest, left, window, wanted = ledger.assess(chain, call)
        if newest is not None and (is_trusted or ledger.probe_if_hung()) and call.rejected is None:
            if left.least > window and not wanted:
                _log.debug("%s %s: fresh, %.0f s left", newest.service, chain.key[:8], left.least)
                ledger.keep_hit(call, chain, newest, left.least - window)
                return newest
            if ledger.is_held_back(chain.key, left, call):
                return newest
        import_http()
        began = self._runtime.steady()
        end = math.inf if call.timeout is None else began + call.timeout
        while True:
            can_go_on = newest is not None and left.least > 0 and call.rejected != newest.headers and not call.patient
            soon = min(end, began + _rules.BRIEFLY) if can_go_on else math.inf
            flight, outcome = self._join(chain.key, call, end, min(end, soon))
            chain, _ = ledger.recall(call.credential)
            newest, left, window, wanted = ledger.assess(chain, call)
            valid = newest if newest is not None and left.most > 0 and call.rejected != newest.headers else None
            if isinstance(outcome, RefreshError):
                is_outage = valid is not None and isinstance(outcome, UnavailableError)  # for all who have a token
                if flight.call is not call and not is_outage and flight.is_for_one(outcome, call):
                    continue
                is_wrong = wanted and isinstance(outcome, RequestRefusedError)  # it asks for more than it may have
                if valid and (outcome._is_elsewhere or outcome.spent is False) and not (call.patient or is_wrong):
                    _log.warning("%s: %s, going on with the old token", fingerprint(valid.secret.reveal()), outcome)
                    return valid
                raise _own(outcome)
            has_expired = left.most <= 0 < chain.lifetime  # while its writing down was waited for
            if outcome is not None and flight.call.rejected != call.rejected == outcome.headers:
                continue  # that was found for another call
            wants_more = wanted or (call.patient and left.least <= window)  # than who waited with it
            if outcome is not None and not has_expired and (flight.call is call or not wants_more):
                return outcome if valid is None or wanted else valid  # another flight may have been faster
            if valid is not None and (self._runtime.steady() >= soon or (left.least > window and not wanted)):
                return valid  # it may be all that is to be had for now, or about to be written down
            if self._runtime.steady() >= end:
                raise _own(flight.too_late())

    def _join(
        self, key: str, call: Call[T], end: float, until: float, flight_type: type[Flight[T]] = Flight
    ) -> tuple[Flight[T], Any]:
        """
        Wait for a flight that is in progress, or start one. Return its outcome; None is to ask again.

        What a flight raises is its outcome if it's a `RefreshError`, and otherwise raised here.

        Args:
            end: Until when the call has time.
            until: Until when it waits. It may have a token to go on with.
        """
        runtime, flights = self._runtime, self._ledger.flights
        waiter = Waiter(runtime.event(), end, call.retry, runtime.caller())
        is_ours, told, status = False, False, ""
        flight = flights.get(key)
        if flight is None or flight.is_stuck():
            if flight is not None and flights.get(key) is flight:  # else another thread has found that, too
                flights.pop(key, None)
            flight = flights.setdefault(key, flight_type(self._ledger, key, call, self._limit, self._on_event))
            is_ours = True
        try:
            flight.join(waiter)
            if is_ours:
                runtime.start(flight.run)
            while (remaining := until + _GRACE - runtime.steady()) > 0:
                if runtime.wait(waiter.event, min(remaining, 1.0 if status else 0.1)) or flight.is_stuck():
                    break  # if it is stuck, another goes
                if call.is_unwanted is not None and call.is_unwanted():
                    waiter.until = min(waiter.until, runtime.steady())
                    if not flight.has_departed:
                        raise CancelledError
                if not flight.is_running:  # whoever was about to start it was interrupted
                    runtime.start(flight.run)
                elif status and remaining > 1:
                    self._on_wait(status, None if until == math.inf else remaining - 1)
                    told = True
                status = flight.status if flight.is_running else ""  # what the next second goes by with
            waiter.until = -math.inf  # it was not interrupted
            if isinstance(waiter.outcome, BaseException) and not isinstance(waiter.outcome, RefreshError):
                raise waiter.outcome
            return flight, waiter.outcome
        except EndingError as error:
            flights.pop(key, None)
            return flight, error
        finally:
            flight.leave(waiter)
            if told:
                self._on_wait("", None)

    def _sign_out(self, call: Call[T]) -> None:
        """
        End a session at the service, and forget it.

        Raises:
            RefreshError: It may live on. Call again.
        """
        import_http()
        end = math.inf if call.timeout is None else self._runtime.steady() + call.timeout
        while True:
            flight, outcome = self._join(self._ledger.recall(call.credential)[0].key, call, end, end, SignOut)
            if isinstance(flight, SignOut) and flight.is_over:
                return
            if isinstance(flight, SignOut) and outcome is not None:
                raise _own(outcome)
            if self._runtime.steady() >= end:
                raise _own(flight.too_late())

    # What is known, and can be forgotten

    def _aside(self, work: Callable[..., R], *arguments: Any, seconds: float | None = None) -> R:
        """
        Work with a store that others share in a thread of its own: no interrupt hits a transaction half way.

        Raises:
            UnavailableError: It takes too long, and goes on.
        """
        runtime, ledger = self._runtime, self._ledger
        if ledger.is_local:
            return work(*arguments)
        done, outcome = runtime.event(), Future[R]()

        def run() -> None:
            fill(outcome, lambda: work(*arguments))
            ledger.close()
            done.set()

        runtime.start(run)
        if not runtime.wait(done, seconds or _rules.LONGEST_DELAY):
            self._fail("does not answer")
        return outcome.result()

    def _find_out(self, work: Callable[..., R], subject: Any, call: Call[Any]) -> R:
        """Do *work* by what the store has or, if it hangs, by what this process knows, if that is anything."""
        ledger = self._ledger
        if ledger.assess(ledger.recall(call.credential)[0], call)[0] is None:
            return self._aside(work, subject)
        if not ledger.probe_if_hung():
            with contextlib.suppress(UnavailableError):
                return self._aside(work, subject, seconds=_rules.BRIEFLY)
        return work(subject, by_store=False)

    @overload
    def peek(self, url: str, jwt: str) -> SessionStatus: ...
    @overload
    def peek(self, *, refresh_token: str, device_id: str, user_token: str, base_url: str = ...) -> SessionStatus: ...
    @overload
    def peek(self, *, refresh_token: str, device_id: str, user_id: str, base_url: str = ...) -> SessionStatus: ...
    def peek(self, url: Any = None, jwt: Any = None, **pair: Any) -> SessionStatus:
        """
        Return what is known of a session. Nothing is sent to the service. Give any token, as you would to the call.

        Args:
            url: Where Kuzzle answers.
            jwt: Any token of a session at Kuzzle.
            **pair: For Circle instead: *refresh_token*, *device_id*, *user_token* or *user_id*, and *base_url*.

        Raises:
            InvalidArgumentError: An argument is wrong.
            UnavailableError: The store could not be read, and this process knows nothing of the session.

        Example:
            >>> from refresher import refresh_kuzzle_token
            >>> from refresher.testing import FakeKuzzle
            >>> cache = TokenCache()
            >>> with FakeKuzzle() as kuzzle:
            ...     jwt = kuzzle.login("foo", ago=1800)
            ...     print(cache.peek(kuzzle.url, jwt).state)
            ...     token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
            ...     status = cache.peek(kuzzle.url, jwt)
            unknown
            >>> status.user, status.state, status.generation
            ('foo', 'fresh', 1)
        """
        url, jwt, pair = hide_all(url, jwt, pair)
        credential = _find(url, jwt, pair)
        return self._find_out(self._status, credential, Call(credential=credential))

    def _status(self, credential: Credential[T], *, by_store: bool = True) -> SessionStatus:
        ledger = self._ledger
        chain, newest, left, window, _ = self._assess(Call(credential=credential), by_store)
        last = newest or credential.unspent() or credential
        attempt = ledger.last_attempt(last)[0] if by_store else None
        is_refused = any(attempt.refusal(asker, ledger.now()) for asker in attempt.errors) if attempt else False
        return SessionStatus(
            provider=credential.service,
            user=last.user,
            fingerprint=fingerprint(last.secret.reveal()),
            state=_rules.state_of(left, window, is_known=newest is not None, is_refused=is_refused),
            expires_at=last.token.expires_at if last.token else None,
            generation=chain.generation % LEAP if newest else 0,
        )

    def _is_due(self, call: Call[T], *, by_store: bool = True) -> bool:
        """Whether a session is to be refreshed. Without the store, that is done in its last moments."""
        chain, _, left, window, wanted = self._assess(call, by_store)
        if by_store and self._ledger.unsaved.get(chain.key) is chain:
            self._ledger.save(chain)  # the store has lost it, and no flight may be needed for long
        is_due = wanted or left.least <= window
        if not by_store and (is_due or chain.newest is None) and not self._ledger.is_in_the_way(call):
            self._fail("does not answer", call.credential.service)
        return is_due

    def _assess(self, call: Call[T], by_store: bool) -> tuple[Chain[T], Credential[T] | None, Left, float, bool]:
        """Return a chain as the store has it, and how it stands with it."""
        chain, is_readable = self._chain(call.credential, by_store)
        assessed = self._ledger.assess(chain, call)
        if assessed[0] is None and not is_readable:
            self._fail("cannot be read", call.credential.service)
        if assessed[0] is None and any(self._ledger.unread_of(chain, call.credential)):
            self._fail(_UNREAD, call.credential.service)
        return chain, *assessed

    def _fail(self, what: str, service: str | None = None) -> NoReturn:
        raise UnavailableError(f"{self._ledger.name} {what}", provider=service, spent=False)

    def _peek(self, credential: Credential[Any], *, by_store: bool = True) -> Credential[Any]:
        """Return the newest known credential of a chain, as it is."""
        return self._chain(credential, by_store)[0].newest or credential

    def _chain(self, credential: Credential[T], by_store: bool) -> tuple[Chain[T], bool]:
        """Return a chain as the store has it, or as this process remembers it, and whether that is sure."""
        return self._ledger.look(credential) if by_store else self._ledger.recall(credential)

    @overload
    def forget(self, url: str, jwt: str) -> None: ...
    @overload
    def forget(self, *, refresh_token: str, device_id: str, user_token: str, base_url: str = ...) -> None: ...
    @overload
    def forget(self, *, refresh_token: str, device_id: str, user_id: str, base_url: str = ...) -> None: ...
    def forget(self, url: Any = None, jwt: Any = None, **pair: Any) -> None:
        """
        Forget a session, as when its user signs out. Give any token of it, as you would to `peek`.

        A refresh in progress goes on, and its result is not kept.

        Raises:
            InvalidArgumentError: An argument is wrong.
            UnavailableError: The store could not be reached, or has an entry of the session that cannot be read. This
                process has forgotten it. Call again.
        """
        url, jwt, pair = hide_all(url, jwt, pair)
        credential = _find(url, jwt, pair)
        known, _ = self._ledger.recall(credential)
        if known.newest is not None or known.key in self._ledger.flights:  # also if the store hangs
            self._ledger.bury(known)
        self._aside(self._forget, credential, known.newest)

    def _forget(self, credential: Credential[Any], known: Credential[Any] | None = None) -> None:
        chain, is_readable = self._ledger.look(credential)
        if any(self._ledger.unread_of(chain, credential)):
            self._fail(_UNREAD, credential.service)
        newest = chain.newest or known
        self._ledger.flights.pop(chain.key, None)
        if not (self._ledger.drop(chain, {credential.keys[0], *(newest.keys if newest else ())}) and is_readable):
            what = "cannot be reached, so other processes may still use the session: call again"
            self._fail(what, credential.service)

    def clear(self) -> None:
        """
        Forget all sessions that this process knows of, and remove them from the store: others lose them, too.

        Refreshes in progress go on, and their results are not kept.

        Raises:
            UnavailableError: The store could not be reached. This process has forgotten them. Call again.
        """
        ledger = self._ledger
        ledger.observed.forget()
        known = [ledger.chains.get(key) or Chain(key=key) for key in {*ledger.chains.keys(), *ledger.flights}]
        for chain in known:  # also if the store hangs
            ledger.bury(chain)
        ledger.flights = {}
        self._aside(self._clear, [chain.newest.keys[0] for chain in known if chain.newest])

    def _clear(self, newest: list[str]) -> None:
        ledger, is_done = self._ledger, True
        kept = ledger.store.keys() if isinstance(ledger.store, MemoryStore) else ()
        for key in {*ledger.chains.keys(), *ledger.unsaved, *filter(_rules.KEY.fullmatch, kept)}:
            if (chain := ledger.chains.get(key)) is None:
                chain = Chain(key=key, generation=ledger.ask("cannot be read", ledger.generation, key)[0] or 0)
            is_done &= ledger.drop(chain, {key})
        for name in {*(f"{key}-attempt" for key in newest), *(key for key in kept if key.endswith("-attempt"))}:
            is_done &= ledger.delete(name)  # also of what has no entry, since it was refused
        if not is_done:
            self._fail("cannot be reached, so other processes may still use the sessions: call again")


def _own(error: RefreshError) -> RefreshError:
    """Give a caller an error of its own, or the tracebacks of all would become one."""
    return copy.copy(error).with_traceback(error.__traceback__)


def _find(url: Any, jwt: Any, pair: Any) -> Credential[Any]:
    """Make a credential of any of a session's tokens, to look it up. All arguments are hidden."""
    of_circle = {name: hide(value) for name, value in pair.reveal().items() if value is not None}
    if of_circle and url is None and jwt is None:
        needed: dict[str, Any] = {"refresh_token": None, "device_id": None, "api_key": Secret("any")}
        return circle.credential(**needed | of_circle)
    for name in of_circle:
        kuzzle.check.fail(name, "must not be given with url and jwt: it is Circle's")
    kuzzle.check.need(url is not None, "url", "is missing")
    return kuzzle.credential(url, jwt)


def import_http() -> None:
    """Import what sends, before any clock is running: requests takes a while, and calls that hit need it not."""
    with importing:
        from . import _http  # noqa: F401


#: The cache of all calls that are not given another.
SHARED_CACHE = TokenCache()


def current(call: Call[T], cache: TokenCache | None) -> T:
    """Return the newest token of a chain. Without a cache, spend the credential here and now."""
    if cache is not None:
        return cache._get(call).token  # type: ignore[return-value]  # the newest has one
    import_http()

    def tell(what: str) -> None:
        show_wait(what, None if call.timeout is None else max(0.0, patience.until() - REAL.steady()))

    patience = Patience(REAL, call.timeout, call.retry, tell)
    try:
        return _spend(call, patience)
    finally:
        show_wait("", None)


def _spend(call: Call[T], patience: Patience) -> T:
    """Refresh a credential here and now."""
    credential, observed = call.credential, Observed.of(REAL)
    while (hold := observed.hold(credential)) > 0:
        if hold >= patience.until() - REAL.steady():
            raise not_yet(credential.service, "may have issued this token just now", hold)
        patience.tell(f"{credential.service.title()} may have issued this token just now")
        REAL.sleep(hold)
    exchange = Exchange(observed, patience, credential.scope, call.session)
    successor = credential.refresh(exchange, key=None)
    observed.see(successor.keys[-1])
    exchange.learn(successor)
    return successor.token  # type: ignore[return-value]  # a successor has one
