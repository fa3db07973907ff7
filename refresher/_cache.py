"""Who succeeded whom: the cache that follows successors, and refreshes the last of them once for everyone."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, SupportsIndex, TypeVar

import attrs
from cachetools import TTLCache

from . import _circle, _kuzzle
from ._exchange import Patience, get_ready, left
from ._notebook import show_wait
from ._threads import in_thread
from ._wire import new_id
from .errors import InvalidArgumentError, OutcomeUnknownError, RefreshError, SignInRequiredError
from .stores import MemoryStore, Store, mutex
from .tokens import key_of

_log = logging.getLogger("refresher")

# All in seconds. How long a spent credential is remembered, a refusal, and what could live for ever.
_SPENT = 30 * 86400.0
_REFUSED = 60.0
_FOREVER = 3650 * 86400.0
# How long callers wait for a new token while the old one lives, and a failure then holds back the next try.
_BRIEFLY = 2.0
_HELD_BACK = 5
# How many calls a cache remembers the answers to.
_MOST_ANSWERS = 4096
# How long a store that failed is left alone.
_DOWN = 1.0
# How much longer than its timeout a caller waits: the exchange may be about to tell what went wrong.
_GRACE = 0.1


class _Token(Protocol):
    def to_dict(self) -> dict[str, object]: ...


T = TypeVar("T", bound=_Token)
OnWait = Callable[[str, float | None], object]

_KEY = re.compile("[0-9a-f]{64}")


class Call(Protocol[T]):
    """A credential that a caller has, and what can be told of the tokens that come of it."""

    @property
    def provider(self) -> str:
        """``"kuzzle"`` or ``"circle"``."""

    @property
    def key(self) -> str:
        """Its key."""

    @property
    def kind(self) -> str:
        """Sets its lock apart, if it's taken while another is held: stores may let keys share one."""

    @property
    def idempotency_key(self) -> str | None:
        """What a repetition would carry."""

    def read(self, values: Mapping[str, object], /) -> T:
        """Read a token's JSON."""

    def keys(self, token: T, /) -> list[str]:
        """List the keys of a token as a credential, its own first."""

    def lifetime(self, token: T, /) -> float | None:
        """Tell how many seconds a token lives from when it was asked for; None: for ever."""

    def useful(self, token: T, /) -> float | None:
        """Tell for how many seconds it can be refreshed; None: for ever."""

    def is_young(self, last: T | None, now: float, /) -> bool:
        """
        Tell by a clock whether a refresh of the credential, or of its last successor, could fall into the
        second of its birth, and would be in vain.
        """


@attrs.frozen(kw_only=True)
class Credential(Generic[T]):
    """
    What a caller has, and how to get on from there.

    Args:
        call: The credential.
        refresh: Sends it, or its last successor if there is one already.
        held: The token it is, if the caller has all of it, and how many seconds that lives on. As long as it
            lives and has no successor, it will do.
        refused: Tells whether a token is the one that its service has just refused. Then it won't do, unless
            it is new: a newer one would not help.
    """

    call: Call[T]
    refresh: Callable[[T | None, Patience], T] = attrs.field(repr=False)
    held: tuple[T, float] | None = attrs.field(default=None, repr=False)
    refused: Callable[[T], bool] = attrs.field(default=lambda _: False, repr=False)


def _read_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return new_id()


# A clock that nobody sets, and what it counts from: only readings of one boot can be compared.
_BOOT = _read_boot()
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@attrs.frozen(kw_only=True)
class _Link(Generic[T]):
    """
    Where a chain of successors ends.

    Args:
        chain: Its key, that of the credential it began with.
        number: Counts its tokens. Of two opinions on a chain, that with the higher number is right.
        token: The last of them. None: there is none yet, or it was forgotten.
        left: How many seconds that lives on.
        ahead: How many seconds before its end it is refreshed.
        text: What the store has of it. None: nothing, or the caller holds the token.
    """

    chain: str
    number: int
    token: T | None = None
    left: float = 0.0
    ahead: float = 0.0
    text: str | bytes | None = attrs.field(default=None, repr=False)

    @property
    def fresh(self) -> T | None:
        """The token, if it need not be refreshed."""
        return self.token if self.left > self.ahead else None


@attrs.frozen
class _Answer:
    """A fresh token that answers a call, as long as the store has the same *text* and it's not *until* yet."""

    token: Any
    chain: str
    text: str | bytes | None = attrs.field(repr=False)
    until: float
    until_steady: float


class _Shelf:
    """A store, and the memory of this process for when the store is down or has lost something."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.memory = store if isinstance(store, MemoryStore) else MemoryStore()
        self._down_until = 0.0

    def __reduce__(self) -> tuple[object, ...]:
        return _Shelf, (self.store,)

    def _ask(self, what: Callable[[Store], Any]) -> Any:
        """Ask the store, unless it has just failed. None: it does not know, or does not answer."""
        if time.monotonic() < self._down_until:
            return None
        try:
            return what(self.store)
        except Exception as error:  # a store may raise whatever it likes
            self._down_until = time.monotonic() + _DOWN
            self._warn("is down (%s): going on in the memory of this process", type(error).__name__)
            return None

    def _warn(self, what: str, *details: str) -> None:
        _log.warning(f"%s {what}", type(self.store).__name__, *details)

    def text(self, key: str) -> Any:
        """Get an entry as it is in the store."""
        if self.store is self.memory:
            return self.memory.get(key)
        return self._ask(lambda store: store.get(key))

    def read(self, key: str) -> tuple[dict[str, Any], str | bytes | None]:
        """
        Read an entry, and its text in the store. One that is not there is empty; without a text, only this
        process knows it.
        """
        text = self.text(key)
        found = self._parse(key, text)
        if self.store is self.memory:
            return found, text
        mine = self._parse(key, self.memory.get(key))
        lost = not found or found.get("number", 0) < mine.get("number", 0)
        return (mine, None) if lost else (found, text)

    def _parse(self, key: str, text: str | bytes | None) -> dict[str, Any]:
        """Read JSON, whatever it is. What is no entry is removed."""
        if text is None:
            return {}
        try:
            values = json.loads(text)
            if isinstance(values, dict) and isinstance(values.get("number", 0), int):
                return values
        except (ValueError, TypeError, RecursionError):
            pass
        self.remove(key)
        return {}

    def remove(self, key: str) -> None:
        """Remove an entry that can't be read, and say so."""
        self._warn("had an entry that can't be read: it's removed")
        self.memory.delete(key)
        self._ask(lambda store: store.delete(key))

    def write(self, key: str, values: Mapping[str, object], seconds: float | None) -> None:
        """Write an entry, to the memory of this process in any case."""
        text = json.dumps(values)
        whole = math.ceil(_FOREVER if seconds is None else max(1.0, min(seconds, _FOREVER)))
        self.memory.set(key, text, whole)
        if self.store is not self.memory:
            self._ask(lambda store: store.set(key, text, whole))

    @contextmanager
    def lock(self, key: str, lease: float, wait: float) -> Iterator[bool]:
        """Hold the store's lock. While the store is down, there is nobody to share it with."""
        lock = self._ask(lambda store: store.lock(key, lease, wait))
        got = self._ask(lambda _: lock.__enter__()) if lock is not None else None
        try:
            yield got is not False
        finally:
            if got is not None:
                try:
                    lock.__exit__(None, None, None)
                except Exception as error:  # see above; its lease will end
                    self._warn("did not take a lock back (%s)", type(error).__name__)

    def close(self) -> None:
        """Let the store give back what it holds for this thread, if it does."""
        close = getattr(self.store, "close", None)
        if close is not None:
            self._ask(lambda _: close())


# When credentials were first seen, by ``time.monotonic()``.
_seen: TTLCache[str, float] = TTLCache(65536, ttl=120)


def _see(key: str) -> float:
    """Tell when a credential was first seen: now, if it is new."""
    with mutex:
        return _seen.setdefault(key, time.monotonic())


def _let_it_age(call: Call[T], last: T | None, now: float) -> None:
    """Let a second pass since the credential or its last successor was first seen, if it is that young."""
    if call.is_young(last, now):
        first_seen = _see(call.key if last is None else call.keys(last)[0])
        time.sleep(max(0.0, first_seen + 1.0 - time.monotonic()))


def _see_new(call: Call[T], token: T, now: float) -> None:
    """Remember when a new token was first seen, if that will matter."""
    if call.is_young(token, now):
        _see(call.keys(token)[0])


class NoCache:
    """What there is without a cache: each call refreshes, in its own thread, as nobody else wants to know."""

    def last(
        self,
        credential: Credential[T],
        timeout: float | None,
        *,
        on_wait: OnWait = show_wait,
        arguments: object = None,  # noqa: ARG002
    ) -> T:
        """Refresh a credential: see `TokenCache.last`."""
        get_ready()
        waits: list[str] = []

        def tell(news: str) -> None:
            waits.append(news)
            on_wait(news, left(patience.until))

        patience = Patience.starting(timeout, timeout, tell)
        try:
            _let_it_age(credential.call, None, time.time())
            token = credential.refresh(None, patience)
        finally:
            if waits:
                on_wait("", None)
        _see_new(credential.call, token, time.time())
        return token

    def drop(self, chain: str) -> None:
        """Forget nothing."""

    def mark(self, name: str, seconds: int) -> None:
        """Remember nothing."""

    def is_marked(self, name: str) -> bool:  # noqa: ARG002
        """Tell that nothing is."""
        return False


class _Flight(Future[Any]):
    """An exchange under way. *news* is what it is waiting for."""

    news = ""

    def tell(self, news: str) -> None:
        """Say what it is waiting for now."""
        self.news = news

    def land(self, answer: object, error: BaseException | None) -> None:
        """Say what came of it."""
        if error is None:
            self.set_result(answer)
        else:
            self.set_exception(error)


# The exchanges under way in this process, by cache and chain. A forked child has none of their threads.
_flights: dict[tuple[int, str], _Flight] = {}
os.register_at_fork(after_in_child=_flights.clear)


def _wait(flight: _Flight, timeout: float | None, on_wait: OnWait) -> None:
    """Wait for a flight, and tell what for, once that takes more than a second."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    told = False
    try:
        while (left := end - time.monotonic()) > 0:
            try:
                flight.exception(min(1.0, left))
                return
            except TimeoutError:
                if left > 1:
                    on_wait(flight.news, None if timeout is None else left - 1)
                    told = True
    finally:
        if told:
            on_wait("", None)


class TokenCache:
    """
    Remembers who succeeded whom, so that a token is refreshed once, whoever asks and however often.

    A call with any token of a chain gets the last one. If that is about to expire, it is refreshed, once for
    all threads of this process and, if they share a store, for all processes and machines. Threads and
    processes may share a cache.

    Args:
        store: Where entries live. None: in the memory of this process.
        lease: How many seconds an exchange may take when its caller has given up, and a lock may be held when
            its holder has died.
        clock: Tells the time, in seconds since 1970. It may be wrong: lifetimes are counted from when a token
            was asked for. If it is set meanwhile, tokens on this machine are counted by a clock that nobody
            sets; those that came from another machine are taken for older or younger by as much as it was set.
        ahead: How many seconds before its end a token is refreshed, at most half its lifetime. Make it more
            than what lies between two calls, or a Kuzzle token may die between them. None: the last minute, or
            the last tenth of a shorter life, less a bit that differs from token to token.
        on_wait: Called about once a second by a call that waits for more than one: with what it waits for, and
            how many seconds at most (None: as long as it takes). In the end with ``""`` and None. None: a
            notebook shows it.

    Raises:
        InvalidArgumentError: *lease* or *ahead* is no number of seconds.

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
        clock: Callable[[], float] = time.time,
        ahead: float | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        for name, value in (("lease", lease), ("ahead", 0.0 if ahead is None else ahead)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise InvalidArgumentError(f"{name} must be a number of seconds, and not negative")
        self._shelf = _Shelf(MemoryStore() if store is None else store)
        self._lease = lease
        self._clock = clock
        self._ahead = ahead
        self._on_wait = on_wait or show_wait
        self._answers: dict[object, _Answer] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_answers": {}}

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return "SHARED_CACHE" if self is SHARED_CACHE else super().__reduce_ex__(protocol)

    def answer(self, arguments: tuple[object, ...]) -> Any:
        """Get the answer to a call that was made before with the same arguments. None: it has to be found."""
        try:
            known = self._answers.get(arguments)
        except TypeError:  # one of them can't be compared: it's a wrong one
            return None
        if (
            known is None
            or self._clock() >= known.until
            or time.clock_gettime(_STEADY) >= known.until_steady
            or self._shelf.text(known.chain) != known.text
        ):
            return None
        _log.debug("%s: still fresh", known.chain[:8])
        return known.token

    def last(
        self,
        credential: Credential[T],
        timeout: float | None,
        *,
        on_wait: OnWait | None = None,
        arguments: tuple[object, ...] | None = None,
    ) -> T:
        """
        Get the last successor of a credential, in *timeout* seconds, refreshed if it is about to expire.

        Args:
            credential: What the caller has.
            timeout: How long to wait, in seconds; None: as long as it takes.
            on_wait: What to tell about the wait, if not what all calls tell.
            arguments: What the caller was called with: see `answer`.

        Raises:
            RefreshError: There is none that lives, and none could be had.
        """
        call = credential.call
        link = self._find(credential)
        if link.fresh is not None:
            _log.debug("%s %s: fresh, %.0f s left", call.provider, link.chain[:8], link.left)
            if arguments is not None and link.text is not None:
                self._keep(arguments, link)
            return link.fresh
        living = link.token if link.left > 0 else None
        if living is not None and self.is_marked(f"held back {link.chain}"):
            _log.debug("%s %s: %.0f s left, and not now", call.provider, link.chain[:8], link.left)
            return living
        get_ready()
        flight = self._join(link.chain, credential, timeout)
        patience = timeout if living is None else min(_BRIEFLY, _BRIEFLY if timeout is None else timeout)
        _wait(flight, None if patience is None else patience + _GRACE, on_wait or self._on_wait)
        failure: RefreshError
        try:
            token: T = flight.result(0)
            return token
        except TimeoutError:
            failure = OutcomeUnknownError(
                f"{call.provider.title()} did not answer in time. The refresh goes on: call again",
                provider=call.provider,
                idempotency_key=call.idempotency_key if link.token is None else None,
            )
            in_vain = True
        except RefreshError as error:
            # Each caller has an error of its own, or their tracebacks would become one.
            failure = copy.copy(error).with_traceback(error.__traceback__)
            in_vain = error.spent is False
        if living is not None and in_vain:
            _log.warning("%s %s: %s, going on with the old token", call.provider, link.chain[:8], failure)
            return living
        raise failure

    def _keep(self, arguments: tuple[object, ...], link: _Link[T]) -> None:
        if len(self._answers) >= _MOST_ANSWERS:
            self._answers.clear()  # it doesn't take long to find them again
        seconds = link.left - link.ahead
        until, until_steady = self._clock() + seconds, time.clock_gettime(_STEADY) + seconds
        self._answers[arguments] = _Answer(link.fresh, link.chain, link.text, until, until_steady)

    def known(self, credential: Credential[T]) -> T | None:
        """Get the last known successor of a credential, if there is any, as it is."""
        return self._find(credential).token

    def _follow(self, key: str) -> tuple[str, dict[str, Any], str | bytes | None]:
        """Find the chain that a credential belongs to, and read it: see `_Shelf.read`."""
        values, text = self._shelf.read(key)
        if not _KEY.fullmatch(str(values.get("see"))):
            return key, values, text
        chain: str = values["see"]
        return chain, *self._shelf.read(chain)

    def _find(self, credential: Credential[T]) -> _Link[T]:
        """Follow a credential's successors."""
        call = credential.call
        chain, values, text = self._follow(call.key)
        number: int = values.get("number", 0)
        if values.get("token") is None:
            token, left = credential.held or (None, 0.0)
            lifetime = None if token is None else call.lifetime(token)
        else:
            try:
                number, token, age = values["number"], call.read(values["token"]), self._age(**values["asked"])
                lifetime, useful = call.lifetime(token), call.useful(token)
            except (KeyError, TypeError, ValueError, AttributeError):
                self._shelf.remove(chain)
                return _Link(chain=chain, number=0)
            if text is None:
                self._shelf.write(chain, values, None if useful is None else useful - age)
            left = math.inf if lifetime is None else lifetime - age
            if credential.refused(token) and age > _REFUSED:
                left = 0.0
        ahead = 0.0
        if token is not None and lifetime is not None:
            # Tokens of one birth do not all want to be refreshed at once: each has its own part of the window.
            part = 1 - 0.6 * int(call.keys(token)[0][:8], 16) / 2**32
            ahead = part * min(60.0, lifetime / 10) if self._ahead is None else min(self._ahead, lifetime / 2)
        return _Link(chain=chain, number=number, token=token, left=left, ahead=ahead, text=text)

    def _now(self) -> dict[str, object]:
        return {"at": self._clock(), "steady": time.clock_gettime(_STEADY), "boot": _BOOT}

    def _age(self, *, at: float, steady: float, boot: str) -> float:
        """Count the seconds since, whatever was done to the clock."""
        return max(0.0, self._clock() - at, time.clock_gettime(_STEADY) - steady if boot == _BOOT else 0.0)

    def _join(self, chain: str, credential: Credential[T], timeout: float | None) -> _Flight:
        """Join the exchange that is under way for a chain, or start one."""
        place, provider = (id(self), chain), credential.call.provider
        with mutex:
            flight = _flights.get(place)
            joined = flight is not None
            if flight is None:
                flight = _flights[place] = _Flight()
        _log.debug("%s %s: %s", provider, chain[:8], "being refreshed already" if joined else "to be refreshed")
        if joined:
            return flight
        flight.tell(f"another process is refreshing the {provider.title()} token")

        def fly() -> T:
            try:
                return self._refresh(chain, credential, timeout, flight.tell)
            finally:
                with mutex:
                    if _flights.get(place) is flight:
                        del _flights[place]
                self._shelf.close()

        # An exchange that was sent is never abandoned: it goes on when its caller has given up, and the process
        # does not end before it.
        in_thread(fly, flight.land, daemon=False)
        return flight

    def _refresh(
        self, chain: str, credential: Credential[T], timeout: float | None, tell: Callable[[str], None]
    ) -> T:
        """Refresh the last token of a chain, unless somebody else has."""
        call = credential.call
        limit = None if timeout is None else max(timeout, self._lease)
        patience = Patience.starting(timeout, limit, tell)
        lease = _FOREVER if limit is None else limit
        with self._shelf.lock(call.kind + chain, lease + 1, lease) as got:
            link = self._find(credential)
            if link.fresh is not None:
                _log.debug("%s %s: another process has refreshed it", call.provider, chain[:8])
                return link.fresh
            if not got:
                raise OutcomeUnknownError(
                    f"Another process has been refreshing the {call.provider.title()} token for too long",
                    provider=call.provider,
                )
            tell(f"{call.provider.title()} is slow")
            last = call.key if link.token is None else call.keys(link.token)[0]
            self._raise_refusal(last)
            _let_it_age(call, link.token, self._clock())
            asked = self._now()
            try:
                token = credential.refresh(link.token, patience)
            except SignInRequiredError as error:
                other = self._find(credential)
                if other.token is not None and other.number > link.number:
                    return other.token
                values = {"message": str(error), "details": vars(error)}
                self._shelf.write(key_of("refused", last), values, _REFUSED)
                raise
            except RefreshError:
                self.mark(f"held back {chain}", _HELD_BACK)
                raise
            _see_new(call, token, self._clock())
            keys = call.keys(token)
            if self._follow(call.key)[1].get("number", 0) == link.number:  # else it was forgotten meanwhile
                entry = {"number": link.number + 1, "token": token.to_dict(), "asked": asked}
                self._shelf.write(chain, entry, call.useful(token))
                for key in keys:
                    if key != chain:
                        self._shelf.write(key, {"see": chain}, _SPENT)
            return token

    def _raise_refusal(self, key: str) -> None:
        values, _ = self._shelf.read(key_of("refused", key))
        if not values:
            return
        try:
            error = SignInRequiredError(str(values["message"]), **values["details"])
        except (KeyError, TypeError):
            self._shelf.remove(key_of("refused", key))
            return
        raise error

    def forget(
        self,
        url: str | None = None,
        jwt: str | None = None,
        *,
        refresh_token: str | None = None,
        device_id: str | None = None,
        user_token: str | None = None,
        user_id: str | None = None,
        base_url: str = _circle.BASE_URL,
    ) -> None:
        """
        Forget a credential and all that succeeded it, as when a user signs out.

        Give what you would give to the call: URL and jwt, or the arguments for Circle. A refresh that is under
        way for it goes on, and its result is not kept.

        Raises:
            InvalidArgumentError: An argument is wrong.
        """
        if url is not None:
            key = _kuzzle.key(url, jwt)
        else:
            key = _circle.key(base_url, user_token or user_id, refresh_token, device_id)
        chain, _, _ = self._follow(key)
        self.drop(chain)

    def clear(self) -> None:
        """Forget all that this process knows of. Refreshes under way go on, and their results are not kept."""
        with mutex:
            known = {chain for cache, chain in _flights if cache == id(self)}
        for key in {*known, *filter(_KEY.fullmatch, self._shelf.memory.keys())}:
            self.drop(key)

    def drop(self, chain: str) -> None:
        """Forget a chain by its key."""
        with mutex:
            _flights.pop((id(self), chain), None)
        self._answers.clear()
        values, _ = self._shelf.read(chain)
        # Not just removed: what other processes remember of the chain, and what is under way, must not count.
        self._shelf.write(chain, {"number": values.get("number", 0) + 1, "token": None}, _SPENT)

    def mark(self, name: str, seconds: int) -> None:
        """Remember something for some seconds, in this process."""
        self._shelf.memory.set(name, "yes", seconds)

    def is_marked(self, name: str) -> bool:
        """Tell whether that is remembered."""
        return self._shelf.memory.get(name) is not None


# The cache of all calls that are not given another.
SHARED_CACHE = TokenCache()
