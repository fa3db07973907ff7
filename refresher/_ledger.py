"""What the store and this process know of chains: looked up, assessed, kept, forgotten."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from . import _rules
from ._checks import Checks
from ._exchange import Observed
from ._rules import Attempt, Chain, Instant, Left, Lock
from ._runtime import HALF_A_DAY, MOST, Event, Memo, Runtime
from ._text import hide_all, json_object
from .services import Credential, Headers, T
from .stores import MemoryStore, Store

if TYPE_CHECKING:
    import requests

_log = logging.getLogger("refresher")

R = TypeVar("R")
LEAP = 2**20  # generations: no process is ahead or behind by so many
_LED = 1.75 * _rules.DAY  # how long a spent token leads to the newest, in seconds; hits hide its use for half a day
_GONE = 30 * _rules.DAY  # how long it is remembered that a session was forgotten, in seconds


@attrs.frozen
class Hit(Generic[T]):
    """
    What a call got, and gets again for as long as that is fresh.

    Args:
        chain: What was known of the chain.
        newest: The answer.
        steady: Until when, by the steady clock.
        wall: Until when, by the wall clock.
    """

    chain: Chain[T]
    newest: Credential[T]
    steady: float
    wall: float


@attrs.define(kw_only=True)
class Call(Generic[T]):
    """
    What a caller asks for.

    Args:
        credential: Any of the chain.
        session: Whose connections to use. None for our own.
        retry: Whether there may be more than one attempt.
        timeout: How many seconds to wait. None means as long as it takes.
        own_will_do: Whether the caller's own token will do while it is valid and has no successor.
        patient: Whether it wants a new token when one is due, and waits for that for all of its time.
        is_unwanted: Tells whether nobody wants the answer any more. Then the call gives up, unless something was sent.
        rejected: The headers that the service has just rejected. What they came from will not do, unless it is
            new: a newer one would not help.
        hit: What it got when it was last made with the same cache.
    """

    credential: Credential[T]
    session: requests.Session | None = None
    retry: bool = True
    timeout: float | None = None
    own_will_do: bool = False
    patient: bool = False
    is_unwanted: Callable[[], bool] | None = None
    rejected: Headers | None = None
    hit: Hit[T] | None = attrs.field(default=None, init=False, eq=False, repr=False)


def check_call(service: Any, retry_name: str, retry: Any, timeout: Any, *arguments: Any) -> Call[Any]:
    """
    Check the arguments of a call to a service.

    Raises:
        InvalidArgumentError: An argument is wrong.
    """
    arguments = hide_all(*arguments)
    check: Checks = service.check
    credential = service.credential(*arguments)
    return Call(credential=credential, retry=check.flag(retry_name, retry), timeout=check.seconds("timeout", timeout))


def _calls(period: float) -> Callable[..., Call[Any]]:  # noqa: ARG001
    """Remember checked calls. Types count: 1 is not True. Keywords would take a third longer."""
    return functools.lru_cache(maxsize=MOST, typed=True)(check_call)


class Ledger:
    """
    What is known of all chains of a cache.

    Args:
        store: Where it is kept. What others wrote there is believed no further than it can be checked.
        clock: Tells the time for ages. None means the runtime's clocks.
        ahead: How many seconds before its end a token is refreshed. None means the usual window.
    """

    def __init__(self, store: Store, runtime: Runtime, clock: Callable[[], float] | None, ahead: float | None) -> None:
        self.store, self.runtime, self._clock, self._ahead = store, runtime, clock, ahead
        self.name = type(store).__name__
        self.is_local = isinstance(store, MemoryStore)
        self.observed = Observed.of(runtime) if clock is None else Observed(runtime, clock)
        steady = clock or runtime.steady
        self.chains, self._aliases = Memo[Chain[Any]](steady), Memo[str](steady)
        self._looked_at, self._warned_at = Memo[float](steady), Memo[float](steady)
        self._led_at = Memo[float](steady)  # when a spent credential that is still used was last led to its chain
        self.failed_at = Memo[float](steady)  # when a refresh failed
        self.in_vain_at = Memo[float](runtime.steady)  # when this process gave up, maybe for another to have more luck
        self._refused = Memo[str](steady)  # to whom the service refused which tokens that were still valid
        self.unsaved: dict[str, Chain[Any]] = {}
        # The keys of entries that could not be read, and whether others may be able to.
        self.unread: dict[str, bool] = {}
        # Successors that came after their session was signed out, by their key, and of which chain they are.
        self.orphans: dict[str, tuple[str, Credential[Any]]] = {}
        self._troubled_at = self._settled_at = self._answered_at = -math.inf
        self._wrote_at = self._wrote_before = -math.inf  # when something was written down, and some seconds before
        self._took = 0.0  # by the slowest command that failed lately
        self._forget_threads()
        self._calls = functools.lru_cache(maxsize=1)(_calls)

    # How it stands with a chain

    def now(self) -> Instant:
        """Return the time."""
        if self._clock is None:
            return Instant(self.runtime.now(), self.runtime.steady(), self.runtime.boot)
        now = self._clock()
        # Those of two processes may differ.
        return Instant(now, now, f"{id(self._clock)} of {self.runtime.process()} of {self.runtime.boot}")

    def recall(self, credential: Credential[T]) -> tuple[Chain[T], bool]:
        """Return what memory has of a chain, and whether that is to be trusted without asking the store."""
        if self._process != self.runtime.process():
            self._forget_threads()
        own = credential.keys[0]
        key = self._aliases.get(own) or own
        chain = self.chains.get(key)
        is_led = self.is_failing or chain is None or not self._is_to_be_led(own, chain)
        is_recent = is_led and self.runtime.steady() - (self._looked_at.get(key) or -math.inf) <= _rules.TRUSTED
        if self.is_local and (self.store.get(key) != chain.text if chain and is_led else not is_recent):
            return self.look(credential)[0], True
        return chain or Chain(key=key), is_recent or self.is_local

    def connect(self, credential: Credential[Any], chain: str) -> None:
        """Remember to which chain a credential belongs, if that was forgotten while nobody used it."""
        if self._aliases.get(credential.keys[0]) is None:
            self._aliases.put(credential.keys[0], chain)

    def call(self, *arguments: Any) -> Call[Any]:
        """Check the arguments of a call, unless that was done in the last half a day."""
        return self._calls(self.runtime.steady() // HALF_A_DAY)(*arguments)

    def hit(self, call: Call[T]) -> Credential[T] | None:
        """Return what a call got when it was last made, if it would get the same. It takes no more than a look."""
        hit, runtime = call.hit, self.runtime
        if hit is None or runtime.steady() >= hit.steady or runtime.now() >= hit.wall:
            return None
        chain = hit.chain
        if (self.chains.get(chain.key) or chain) is not chain:
            return None
        if self.is_local and chain.text is not None and self.store.get(chain.key) != chain.text:
            return None
        return hit.newest

    def keep_hit(self, call: Call[T], chain: Chain[T], newest: Credential[T], seconds: float) -> None:
        """Remember what a call got, and will get for some seconds if nothing changes. At DEBUG, all are logged."""
        if self._clock is None and not _log.isEnabledFor(logging.DEBUG):
            steady = self.runtime.steady() + seconds
            if not self.is_local or chain.requested is None:
                steady = min(steady, (self._looked_at.get(chain.key) or -math.inf) + _rules.TRUSTED)
            call.hit = Hit(chain, newest, steady, self.runtime.now() + seconds)

    def assess(self, chain: Chain[T], call: Call[T]) -> tuple[Credential[T] | None, Left, float, bool]:
        """Return the newest credential with a token, how long it is valid, its window, and if a successor is wanted."""
        now, newest, requested, lifetime = self.now(), chain.newest, chain.requested, chain.lifetime
        if newest is None and call.own_will_do and (newest := call.credential.unspent()) is not None:
            lifetime = newest.lifetime
        if newest is None:
            self.observed.see(call.credential.keys[-1])
            return None, _rules.NOTHING_LEFT, 0.0, True
        if requested is not None and (age := requested.age(now)) is not None:
            left = _rules.left_here(lifetime, requested, now, age)
        else:
            seen_for = self.observed.seen_for(newest.keys[-1])
            service_now = self.observed.service_now(newest.scope)
            left = _rules.left_elsewhere(lifetime, newest.expiry, requested, now, seen_for, service_now)
        wanted = requested is not None and not chain.covers(call.credential.requested)
        is_rejected = call.rejected is not None and call.rejected == chain.to_spend(call.credential).headers
        is_dead = is_rejected and (requested is None or self._is_to_blame(chain, newest, requested))
        refused = self._refused.get(newest.keys[-1]) if chain.newest else None  # a new sign-in may yield the same token
        if is_dead or (refused is not None and refused == _rules.asker(chain.to_spend(call.credential))):
            left, wanted = _rules.NOTHING_LEFT, True
        return newest, left, _rules.window(lifetime, newest.keys[0], self._ahead), wanted

    def _is_to_blame(self, chain: Chain[Any], newest: Credential[Any], requested: Instant) -> bool:
        """Whether to refresh a rejected token: none of Kuzzle's that is new, none that has just replaced another."""
        oldest = max(requested.likely_age(now := self.now()), now.wall - requested.wall)
        is_new = -_rules.CLOCKS_DIFFER <= oldest <= _rules.REJECTED  # else a clock is wrong
        return not is_new or (newest.birth is None and not chain.is_replacement)

    def is_held_back(self, key: str, left: Left, call: Call[Any]) -> bool:
        """Whether a refresh has just failed, and the token is still valid for longer than that matters."""
        failed_for = self.runtime.steady() - (self.failed_at.get(key) or -math.inf)
        if call.patient or call.rejected is not None or failed_for >= _rules.COOLDOWN or left.least <= _rules.COOLDOWN:
            return False
        _log.debug("%s: %.0f s left, and not now", key[:8], left.least)
        return True

    def hold(self, spend: Credential[T], chain: Chain[T], attempt: Attempt | None = None) -> float:
        """Seconds until a credential may be refreshed."""
        now = self.now()
        age = None if chain.requested is None else chain.requested.age(now)
        known = None if attempt is None else attempt.at.age(now)
        return self.observed.hold(spend, 0.0 if age is None else age - chain.took, known or 0.0)

    def pause(self, spend: Credential[T], attempt: Attempt | None) -> float:
        """Seconds for which the service asked callers to wait."""
        return max(self.observed.pause(spend.scope), attempt.pause_left(self.now()) if attempt else 0.0)

    # What the store has

    def ask(self, what: str, command: Callable[..., R], *args: Any) -> tuple[R | None, bool]:
        """Give the store a command. Return its answer, and whether there is one. What it raises is logged."""
        if type(self.store) is MemoryStore:  # what it raises comes from a signal handler
            return command(*args), True
        mark, began = object(), self.runtime.steady()
        self._asked[mark] = began
        try:
            answer = command(*args)
        except Exception as error:  # a store may raise whatever it likes
            now = self.runtime.steady()
            lately = self._took if now - self._troubled_at < _rules.WINDOW else 0.0
            self._troubled_at, self._took, self.is_failing = now, max(now - began, lately), True
            self.unsettle(self._took)
            why = type(error).__name__, getattr(error, "strerror", None)  # no more: its text may hold a secret
            del error  # who keeps the stack of a log line keeps what its frames have
            self.warn(f"{what} ({': '.join(map(str, filter(None, why)))})")
            return None, False
        else:
            self._answered_at, self.is_failing = self.runtime.steady(), False
            return answer, True
        finally:
            self._asked.pop(mark, None)

    def delay(self) -> float:
        """Seconds that the store keeps everyone waiting, if it does not do what it is told."""
        now = self.runtime.steady()
        took = self._took if self.is_failing and now - self._troubled_at < _rules.WINDOW else 0.0
        return max(took, *(now - began for began in [now, *self._asked.values()]))

    def probe_if_hung(self) -> bool:
        """Ask a store that answers nobody once more, ever less often. Return whether it is one."""
        now = self.runtime.steady()
        latest = self._answered_at - _rules.TOO_SLOW  # others may have been answered just before it began to hang
        since = [began for began in list(self._asked.values()) if began > latest]
        is_hung = now - min(since, default=now) >= _rules.TOO_SLOW
        if is_hung and now - max(since) >= max(_rules.LONGEST_DELAY, (now - min(since)) / 2):
            self.runtime.start(self._probe, daemon=True)
        return is_hung

    def _probe(self) -> None:
        """Ask the store for anything: it may be one connection that is dead."""
        self.ask("cannot be read", self.store.get, 64 * "0")
        self.close()

    def unsettle(self, took: float = 0.0) -> None:
        """Give others time to write what the store does not have. Their commands may take as long as ours *took*."""
        self._settled_at = max(self._settled_at, self.runtime.steady() + _rules.SETTLED + took)

    def is_settled(self) -> bool:
        """Whether the store has been well for so long that others have had their answers, and could write."""
        return self.runtime.steady() > self._settled_at

    def is_in_the_way(self, call: Call[Any]) -> bool:
        """Whether a token is in its last moments, and the store would take too many of them."""
        if (delay := self.delay()) < _rules.TOO_SLOW:
            return False
        _, left, window, _ = self.assess(self.recall(call.credential)[0], call)
        return _rules.lock_patience(left, window) <= min(delay, _rules.LONGEST_DELAY)

    def look(self, credential: Credential[T]) -> tuple[Chain[T], bool]:
        """Return what the store and this process know of a chain, and whether the store could be asked."""
        own = credential.keys[0]
        key = self._aliases.get(own) or own
        found, is_readable = self.ask("cannot be read", self._read, key, credential)
        for each in credential.keys if found is not None else ():
            self.unread.pop(f"{each}-alias", None)  # it is not needed any more
        for each in credential.keys if key == own else ():
            if found is None and is_readable:
                text, is_readable = self.ask("cannot be read", self._text, f"{each}-alias")
                if (alias := _rules.read_alias(text, credential) or each) != own:
                    found, is_readable = self.ask("cannot be read", self._read, alias, credential, True)
                    if found is not None or alias != each:
                        key = alias
                        self._aliases.put(own, key)
        self._looked_at.put(key, self.runtime.steady())
        if found is not None and self._is_to_be_led(own, found):
            self._led_at.put(own, self.runtime.steady())
            lead = functools.partial(self._lead_again, credential, key)
            self.runtime.start(lead, daemon=self.is_local)  # a store that reads may hang then
        known = self.chains.get(key)
        current = found if found is not None and (known is None or found.generation >= known.generation) else known
        if current is not None and (other := self._other(current)) is not None:  # before it is forgotten
            self.keep(attrs.evolve(other, key=key, generation=current.generation + 1), in_memory=True)
        elif current is not None and current is found:
            self._remember(current)
        elif known is not None and is_readable and not self.unread.get(key):
            if self._seconds(known) <= 0:
                self.chains.drop(key)
                return Chain(key=key), is_readable
            if key not in self.unsaved:  # the store has lost it: others may be about to put back what is newer
                self.unsettle()
            self.unsaved[key] = known
        return self.chains.get(key) or Chain(key=key), is_readable

    def _other(self, chain: Chain[T]) -> Chain[T] | None:
        """Return the chain in which the newest token of this one was spent: after a loss, one may be two."""
        if chain.newest is None or chain.newest.birth is None:
            return None
        own = chain.newest.keys[0]
        other = self.chains.get(self._aliases.get(own) or own)
        later = None if other is None or other.newest is None else other.newest.birth
        return other if later is not None and later > chain.newest.birth else None

    def unread_of(self, chain: Chain[Any], credential: Credential[Any]) -> list[bool]:
        """Tell of each entry of a chain that could not be read, and may be newer than what is known, if others can."""
        keys = chain.key, *(f"{key}-alias" for key in credential.keys)
        return [self.unread[key] for key in keys if key in self.unread]

    def _forget_threads(self) -> None:
        """Forget what threads are doing: a forked child has none of its parent's."""
        self._process, self.is_failing, self._is_saving = self.runtime.process(), False, False
        self.flights: dict[str, Any] = {}  # by the key of the chain
        self._asked: dict[object, float] = {}  # since when commands have been waited for

    def _text(self, key: str) -> str | None:
        text = self.store.get(key)
        self.unread.pop(key, None)
        if key in getattr(self.store, "unread", ()):
            self.unread[key] = True
        return text.decode(errors="replace") if isinstance(text, bytes) else text

    def _read(self, key: str, credential: Credential[T], anew: bool = False) -> Chain[T] | None:
        """Read what the store has of a chain. What was read of the same text before is read no more."""
        text, known = self._text(key), self.chains.get(key)
        if known is not None and known.text == text and not anew:
            return known
        try:
            return _rules.read(key, text, credential)
        except ValueError:
            del text  # as in `ask`
            self.unread[key] = False
            self.warn("has an entry that cannot be read")
            return None

    def keep(self, chain: Chain[Any], spent: Credential[Any] | None = None, *, in_memory: bool = False) -> None:
        """Remember a chain with a new token, and write it down, unless the store has a higher generation."""
        chain, known = chain.with_text(), self.chains.get(chain.key)
        if known is not None and known.newest is None and known.generation > chain.generation:
            if chain.newest is not None and known.has_ended:
                self.orphans[chain.newest.keys[0]] = chain.key, chain.newest
            return  # it was forgotten here, and the store may not know that yet
        self.unsaved[chain.key] = chain
        self._remember(chain)
        if in_memory or self.save(chain) or spent is None or self.save(chain):
            return
        if self.delete(f"{spent.keys[0]}-attempt"):
            self.save(chain)  # in the room that this has kept free

    def _remember(self, chain: Chain[Any]) -> None:
        self.chains.put(chain.key, chain)
        for key in {*chain.newest.keys} - {chain.key} if chain.newest else ():
            self._aliases.put(key, chain.key)

    def save(self, chain: Chain[Any]) -> bool:
        """Write a chain down. Return whether that is done."""
        _, is_saved = self.ask("cannot be written", self._save, chain)
        if is_saved and self.unsaved.get(chain.key) is chain:
            self.unsaved.pop(chain.key, None)  # another thread may have saved it, too
        return is_saved

    def _save(self, chain: Chain[Any]) -> None:
        began, newest, seconds = self.runtime.steady(), chain.newest, math.ceil(max(1.0, self._seconds(chain)))
        there, has_ended = self._find(chain)
        if newest is not None and has_ended and there > chain.generation:
            self.orphans[newest.keys[0]] = chain.key, newest
        if newest is not None and there <= chain.generation:
            # Before the chain: whoever reads its newest token finds the way back.
            alias = _rules.write_alias(chain.key, newest)
            for key in sorted({*newest.keys} - {chain.key}):
                self.store.set(f"{key}-alias", alias, seconds)
        if there < chain.generation:
            self.store.set(chain.key, str(chain.text), seconds)
            if newest is not None and self.runtime.steady() - began > _rules.TRUSTED:
                self._look_back(chain, newest)
                known = self.chains.get(chain.key)
                if known is not None and known.generation > chain.generation:
                    self.unsaved[chain.key] = known  # another thread's write has lost its place

    def _look_back(self, chain: Chain[Any], newest: Credential[Any]) -> None:
        """See whether what was written took the place of a tombstone: its session was signed out meanwhile."""
        generation = self.generation(f"{chain.key}-ended")
        if generation > chain.generation:
            self.orphans[newest.keys[0]] = chain.key, newest
            tombstone: Chain[Any] = Chain(key=chain.key, generation=generation, has_ended=True)
            self.store.set(chain.key, str(tombstone.with_text().text), math.ceil(_GONE))

    def generation(self, key: str) -> int:
        """Return the generation that the store has. -1 if it has none."""
        there = json_object(self._text(key)).get("generation")
        return there if type(there) is int and 0 <= there < 2**53 else -1

    def _find(self, chain: Chain[Any]) -> tuple[int, bool]:
        """Return the generation that the store has, and if the session has ended. What is malformed forbids nothing."""
        if chain.newest is None:
            return self.generation(chain.key), False
        there = self._read(chain.key, chain.newest)
        return (there.generation, there.has_ended) if there else (-1, False)

    def _seconds(self, chain: Chain[Any]) -> float:
        """Return for how long a chain is worth remembering."""
        if chain.newest is None or chain.requested is None:
            return _GONE  # it was forgotten, and what others remember of it must not count
        age = chain.requested.age(self.now()) or 0.0
        return min(chain.newest.refreshable_for, _rules.FOREVER) + _rules.DAY - age

    def warn(self, what: str) -> None:
        """Log what is the matter with the store, but not again and again."""
        now, last = self.runtime.steady(), self._warned_at.get(what)
        if last is None or now - last > _rules.COOLDOWN:
            self._warned_at.put(what, now)
            _log.warning("%s %s", self.name, what)

    def adopt(self, chain: Chain[T], spend: Credential[T]) -> bool:
        """Go on where another chain did that began with a credential of this one, when an alias was lost."""
        if (key := spend.keys[0]) == chain.key:
            return False
        other = self.chains.get(key) or self.ask("cannot be read", self._read, key, spend)[0]
        if other is None and (text := self.ask("cannot be read", self._text, f"{key}-alias")[0]) is not None:
            alias = _rules.read_alias(text, spend) or chain.key  # two chains may have been one
            other = None if alias == chain.key else self.ask("cannot be read", self._read, alias, spend)[0]
        if other is None or other.newest is None or other.newest.keys[0] == key:
            return False
        self.keep(attrs.evolve(other, key=chain.key, generation=chain.generation + 1))
        return True

    def last_attempt(self, spend: Credential[Any]) -> tuple[Attempt | None, bool]:
        """Return what was last tried with a credential, and whether the store could be asked."""
        text, is_readable = self.ask("cannot be read", self._text, f"{spend.keys[0]}-attempt")
        if (attempt := Attempt.read(text)) is not None:
            self.age(attempt)  # of another machine's, this counts from the first look
            if spend.token is not None and attempt.of and attempt.of not in spend.keys:
                # It was that of another pair, with the same refresh token.
                attempt = attrs.evolve(attempt, is_open=False, idempotency_key=None, in_doubt=None)
        return attempt, is_readable

    def give_up(self, chain: Chain[Any], spend: Credential[Any]) -> None:
        """Take the newest token of a chain for expired, as it was refused. That is so for one asker."""
        if chain.newest is not None:
            self._refused.put(spend.keys[-1], _rules.asker(spend))
            self.chains.put(chain.key, attrs.evolve(chain))  # so that what calls got before is looked at again

    def age(self, attempt: Attempt) -> float:
        """Seconds since an attempt or, if another machine made it, for which it is known to have been there."""
        if (age := attempt.at.age(self.now())) is not None:
            return age
        seen, before = attempt.seen or (attempt.at, 0.0)
        here = self.observed.seen_for(f"{attempt.by} {attempt.at.steady} {before}")
        return before + max(here, seen.age(self.now()) or 0.0)

    def note(self, spend: Credential[Any], attempt: Attempt, room: str = "") -> bool:
        """Write down what is tried with a credential. Return whether that is done."""
        name, text = f"{spend.keys[0]}-attempt", attempt.write() + room
        _, is_noted = self.ask("cannot be written", self.store.set, name, text, math.ceil(_rules.DAY))
        if is_noted and self.runtime.steady() - self._wrote_at > _rules.SETTLED:
            self._wrote_before, self._wrote_at = self._wrote_at, self.runtime.steady()
        return is_noted

    def may_lack_news(self, left: Left) -> bool:
        """
        Whether others may have the successor of a token, and the store may not.

        They may have spent it in its last moments without the store, which has not been seen to work since. If it is
        still valid, they may have spent it, and the store has lost that: whoever has it puts it back.
        """
        return not self.is_local and self._wrote_before < self.runtime.steady() + left.most

    def _is_to_be_led(self, own: str, chain: Chain[Any]) -> bool:
        """Whether somebody uses a spent credential which the store may forget in the next day."""
        is_spent = chain.newest is not None and own not in (chain.key, *chain.newest.keys)
        return is_spent and self.runtime.steady() - (self._led_at.get(own) or -math.inf) > _LED / 8

    def _lead_again(self, spent: Credential[Any], chain: str) -> None:
        self.lead(spent, chain)
        self.close()

    def lead(self, spent: Credential[Any], chain: str) -> None:
        """Let a spent credential lead to its chain for one more day, and what may pass until it is led again."""
        self._led_at.put(spent.keys[0], self.runtime.steady())
        seconds = _GONE if chain in spent.keys[1:] else _LED  # the first token is the one that people keep
        for key in sorted({*spent.keys} - {chain}):
            entry = f"{key}-alias", _rules.write_alias(chain, spent), math.ceil(seconds)
            self.ask("cannot be written", self.store.set, *entry)

    def drop(self, chain: Chain[Any], keys: set[str], *, has_ended: bool = False) -> bool:
        """Forget a chain. Not just by removing it: what is remembered elsewhere, or in progress, must not count."""
        tombstone = self.bury(chain, has_ended=has_ended)
        if tombstone.has_ended:  # who has looked already, and writes late, looks for this
            mark = f"{chain.key}-ended", str(tombstone.text), math.ceil(_GONE)
            if not self.ask("cannot be written", self.store.set, *mark)[1]:
                return False
        return all([self.save(tombstone), *(self.delete(f"{key}-attempt") for key in sorted(keys))])

    def bury(self, chain: Chain[Any], *, has_ended: bool = False) -> Chain[Any]:
        """Forget a chain in this process. What the store has is left to `save`."""
        if (flight := self.flights.get(chain.key)) is not None:  # what comes of it is not kept
            flight.first_generation = min(flight.first_generation, chain.generation)
        # Others may have tokens of it that are not in the store, or that are there and not known here.
        generation, has_ended = max(0, chain.generation) + LEAP, has_ended or chain.has_ended
        tombstone: Chain[Any] = Chain(key=chain.key, generation=generation, has_ended=has_ended).with_text()
        self.unsaved[chain.key] = tombstone
        self.chains.put(chain.key, tombstone)
        return tombstone

    def save_until(self, key: str, limit: float) -> None:
        """Write a chain down, for some seconds at most."""
        end, pause = self.runtime.steady() + limit, _rules.POLL
        while (chain := self.unsaved.get(key)) is not None:
            if not self.save(chain):
                if self.runtime.steady() + pause > end:
                    break
                self.runtime.sleep(pause)
                pause = min(2 * pause, _rules.LONGEST_POLL)

    def save_all(self) -> None:
        """Write down what could not be written before."""
        for chain in list(self.unsaved.values()):
            if self.unsaved.get(chain.key) is not chain:
                continue  # another thread has
            lease = Lease(self, chain.key, self.runtime.new_name())
            lease.take()
            if lease.lock is not Lock.LOST:  # who has it may be about to say that the session is over
                self.save(chain)
            lease.give_back()

    def save_later(self, then: Callable[[], None]) -> None:
        """Write it down as soon as the store is back, while this process lives: it may have the only copy."""

        def run() -> None:
            self._is_saving = True
            while self.unsaved:
                self.runtime.sleep(_rules.TRUSTED)  # before others are told that the session is over
                self.save_all()
                for key in [key for key, chain in list(self.unsaved.items()) if self._seconds(chain) <= 0]:
                    self.unsaved.pop(key, None)
            self._is_saving = False
            then()
            self.close()

        if not self._is_saving:
            self.runtime.start(run, daemon=True)

    def delete(self, key: str) -> bool:
        """Remove an entry. Return whether that is done."""
        return self.ask("cannot be written", self.store.delete, key)[1]

    def close(self) -> None:
        """Give back the connections that the store has for this thread."""
        if (end_thread := getattr(self.store, "end_thread", None)) is not None:
            self.ask("cannot be closed", end_thread)


class Lease:
    """A flight's lock on its chain, renewed while it lasts."""

    def __init__(self, ledger: Ledger, chain: str, owner: str) -> None:
        self._ledger, self._chain, self._owner = ledger, chain, owner
        self._until = -math.inf
        self._end: Event | None = None
        self.lock = Lock.UNTRIED
        self.announce: Callable[[], bool] = lambda: True  # what is about to be spent: again if the store lost the lock

    def take(self) -> None:
        """Try to take the lock."""
        runtime, store = self._ledger.runtime, self._ledger.store
        asked = runtime.steady()
        # A lock in memory ends with its process, so its lease need not be short.
        seconds = _rules.DAY if self._ledger.is_local else _rules.LEASE
        held, _ = self._ledger.ask("cannot lock", store.acquire, self._chain, self._owner, seconds)
        if held is None and self.is_ours():
            return  # one command that failed takes nothing away
        self.lock = Lock.LOST if held is None else Lock.HELD if held > 0 else Lock.OURS
        if self.lock is Lock.OURS:
            self._until = asked + seconds
            if self._end is None and not self._ledger.is_local:
                self._end = runtime.event()
                runtime.start(self._renew, daemon=True)

    def _renew(self) -> None:
        runtime, store, ask, end = self._ledger.runtime, self._ledger.store, self._ledger.ask, self._end
        while end is not None and not runtime.wait(end, _rules.LEASE / 3):
            asked = runtime.steady()
            if self.lock is Lock.OURS and asked < self._until:
                arguments = self._chain, self._owner, _rules.LEASE
                is_ours, is_well = ask("cannot renew a lock", store.renew, *arguments)
                is_lost = is_ours is False and self.lock is Lock.OURS  # else it was given back just now
                if is_lost and ask("cannot lock", store.acquire, *arguments)[0] == 0:
                    is_ours = True
                    self.announce()
                if is_well:  # else the lease ends, unless the next try succeeds
                    self._until = asked + _rules.LEASE if is_ours else -math.inf
        self._ledger.close()

    def is_ours(self) -> bool:
        """Whether the lease has not ended."""
        return self.lock is Lock.OURS and self._ledger.runtime.steady() < self._until

    def give_back(self) -> None:
        """Let others take the lock."""
        if self._end is not None:
            self._end.set()
            self._end = None
        if self.lock is Lock.OURS:
            self.lock = Lock.UNTRIED
            store = self._ledger.store
            self._ledger.ask("cannot release a lock", store.release, self._chain, self._owner)
