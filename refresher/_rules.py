"""
What to do next about a chain. Everything here is pure: clocks and stores were asked before.

A credential and all that came of it are a *chain*; refreshing *spends* its newest token and yields that one's
*successor*. A token is

* fresh: more than its window is left, and it is the answer to every call;
* due: it is still valid, and refreshed. Callers wait for that briefly, and go on with it if that fails;
* expired, or not there: callers wait for a new one as long as they can.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Generic

import attrs

from ._text import Secret, is_uuid, json_object, key_of, number
from .errors import RefreshError, RequestRefusedError, SignInRequiredError
from .services import Credential, T
from .tokens import Outcome, State

# In seconds, if nothing else is said.
WINDOW = 60.0  # before its end a token is refreshed: this long, or a tenth of its life
BRIEFLY = 2.0  # how long callers wait for a successor while the token is still valid
COOLDOWN = 5.0  # how long a failure holds back the next try, while the token is still valid
LAST_CALL = 0.1  # before its deadline, a call makes its last attempt
BIRTH_SECOND = 1.0  # how long a refresh may return the token itself, from its birth
REJECTED = 60.0  # how long a token that has just been refreshed is not to blame for a rejection
LAST_MOMENTS = 3.0  # before its end a token is refreshed without waiting for the store or the lock
SILENCE, SHORTEST_SILENCE = 10.0, 2.5  # after which a request that has no answer is sent again
LEASE = 5.0  # of a lock, renewed by its holder
TOO_SLOW, LONGEST_DELAY = 0.5, 10.0  # how long a store may take to answer, and how much of that counts
TRUSTED = 0.5  # how long memory is trusted where others share the store
SETTLED = 2.0  # how long a store must have been well before it proves anything
POLL, LONGEST_POLL = 0.05, 0.25  # how often a lock that another holds is tried
ONE_EXCHANGE = 0.2  # how long the lock's holder is waited for in any case
DAY = 86400.0  # how long it is remembered what was tried with a token
FOREVER = 3650 * DAY
ROOM = 8192  # how many bytes a store must have for what is about to come, at least
REFUSALS = (60.0, 300.0, 3600.0)  # how long the first, second, third refusal of a credential is remembered
CLOCKS_DIFFER = 5.0  # how far ahead another machine's clock may be
KEY = re.compile("[0-9a-f]{64}")  # what a chain is known by
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # between attempts


@attrs.frozen
class Instant:
    """A moment, by the wall clock and by the steady clock of one boot of a machine."""

    wall: float
    steady: float
    boot: str

    @classmethod
    def read(cls, values: Any) -> Instant:
        """
        Read what `attrs.asdict` made of one.

        Raises:
            ValueError: It is malformed.
        """
        wall, steady = (number(values[name]) for name in ("wall", "steady"))
        if wall is None or steady is None or max(abs(wall), abs(steady)) > 1e15:
            raise ValueError("no moment")
        return cls(wall, steady, str(values["boot"]))

    def age(self, now: Instant) -> float | None:
        """Seconds since then, if that is known for sure. A moment that is yet to come is not what it says."""
        is_known = self.boot == now.boot and self.steady <= now.steady + CLOCKS_DIFFER
        return max(0.0, now.steady - self.steady) if is_known else None

    def likely_age(self, now: Instant) -> float:
        """Seconds since then, by the wall clocks if need be."""
        age = self.age(now)
        return now.wall - self.wall if age is None else age


@attrs.frozen(kw_only=True)
class Chain(Generic[T]):
    """
    What is known of a chain. This is also what the store has of it.

    Args:
        key: What the store knows it by: the key of the credential it began with.
        generation: Counts its tokens. If two copies of a chain differ, the higher generation wins.
        newest: Its newest credential. None if none is known: it was forgotten, or the caller's own is the newest.
        requested: When the newest token was asked for.
        took: Seconds until it arrived.
        asked_for: The lifetime that was asked for, in seconds. None if the service chose it.
        lifetime: Seconds it is valid for, from when it was asked for.
        is_replacement: Whether that was because the service had rejected the one before.
        has_ended: Whether it was signed out: a successor that comes too late for that has to be signed out as well.
        text: The store's entry.
    """

    key: str
    generation: int = 0
    newest: Credential[T] | None = None
    requested: Instant | None = None
    took: float = 0.0
    asked_for: float | None = None
    lifetime: float = 0.0
    is_replacement: bool = False
    has_ended: bool = False
    text: str | None = attrs.field(default=None, repr=False)

    def covers(self, requested: float | None) -> bool:
        """Whether its newest token was requested with the lifetime that a call asks for, or more."""
        most = self.lifetime + 1 if self.asked_for is None or self.lifetime == math.inf else self.asked_for
        return requested is None or requested <= most

    def to_spend(self, credential: Credential[T]) -> Credential[T]:
        """Return what is spent for a call with a credential: with its newest token, if that is known."""
        return credential if self.newest is None else credential.following(self.newest.token)

    def with_text(self) -> Chain[T]:
        """Write down what the store has of it."""
        # Its key is in there, as nothing else tells that it is not another's.
        entry: dict[str, object] = {"generation": self.generation, "chain": self.key, "ended": self.has_ended}
        if self.newest is not None and self.newest.token is not None and self.requested is not None:
            entry |= {"token": self.newest.token.to_dict(), "requested": attrs.asdict(self.requested)}
            entry |= {"took": self.took, "asked_for": -1 if self.asked_for == math.inf else self.asked_for}
            entry |= {"lifetime": None if self.lifetime == math.inf else self.lifetime, "replaces": self.is_replacement}
        return attrs.evolve(self, text=json.dumps(entry))


def read(key: str, text: str | None, credential: Credential[T]) -> Chain[T] | None:
    """
    Read what the store has of a credential's chain. None if it has nothing.

    Raises:
        ValueError: The entry is malformed, or of another user.
    """
    if text is None:
        return None
    entry = Secret(json_object(text))
    try:
        generation = entry.reveal()["generation"]
        if type(generation) is int and 0 <= generation < 2**53 and entry.reveal()["chain"] == key:
            if "token" not in entry.reveal():
                has_ended = entry.reveal().get("ended") is True
                return Chain(key=key, generation=generation, has_ended=has_ended, text=text)
            names = "took", "asked_for", "lifetime"
            took, asked_for, lifetime = (number(entry.reveal().get(name)) for name in names)
            newest = credential.following(credential.read(entry.reveal()["token"]))
            return Chain(
                key=key,
                generation=generation,
                newest=newest,
                requested=Instant.read(entry.reveal()["requested"]),
                took=min(max(took or 0.0, 0.0), DAY),
                asked_for=math.inf if asked_for == -1 else asked_for,
                lifetime=max(0.0, min(newest.lifetime, math.inf if lifetime is None else lifetime)),
                is_replacement=entry.reveal().get("replaces") is True,
                text=text,
            )
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError("no chain")


def write_alias(chain: str, credential: Credential[Any]) -> str:
    """Write down that a credential belongs to a chain. Only a process that has its secret can."""
    return json.dumps({"chain": chain, "proof": key_of(chain, credential.secret)})


def read_alias(text: str | None, credential: Credential[Any]) -> str | None:
    """Return the chain that a credential belongs to. None if the store does not say, or the proof is wrong."""
    entry = json_object(text)
    chain = str(entry.get("chain"))
    # It becomes the name of an entry: a file's, say.
    return chain if KEY.fullmatch(chain) and entry.get("proof") == key_of(chain, credential.secret) else None


def asker(credential: Credential[Any]) -> str:
    """Return a hash of a credential and of who has it: what one asker is refused, another may be given."""
    return key_of(credential.keys[-1], credential.scope)


@attrs.frozen
class Refusal:
    """What the service said when it refused a credential, as arguments of the error, when, and how often in a row."""

    said: Mapping[str, Any]
    at: Instant
    count: int

    @classmethod
    def read(cls, values: Any) -> Refusal:
        """
        Read it. Whoever writes to the store writes no lines into a log, and nothing to a terminal.

        Raises:
            KeyError, TypeError, ValueError: It is malformed.
        """
        said = dict(values["said"])
        if not all(map(_is_plain, said.values())):
            raise ValueError("no words")
        SignInRequiredError(**said)
        return cls(said, Instant.read(values["at"]), int(min(max(number(values["count"]) or 0.0, 0.0), 1000)))


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) < 1000 and value.isprintable()
    return value is None or isinstance(value, (int, float))


@attrs.frozen(kw_only=True)
class Attempt:
    """
    What was last tried with a credential.

    Its methods are given an *age*: how many seconds ago that was, or since this machine first saw it, by a steady
    clock. Wall clocks of other machines may be hours off.

    Args:
        by: The flight that did.
        at: When it began, or ended.
        of: The credential's last key. If Circle keeps a refresh token, the first is that of all pairs.
        is_open: Whether it may still be in progress: only its flight can know the outcome.
        errors: What the service said when it refused the credential to each `asker`, when, and how often in a row: a
            session may have several names, and several API keys.
        pause: Seconds from *at* for which the service asked callers to wait.
        seen: When a process last looked for what came of it, and how old it was then, at least: machines whose clocks
            tell nothing of *at* look for it in turn.
        idempotency_key: With which the credential was sent, so that others get the same answer.
        in_doubt: The `asker` to whom an answer to that may have been lost: then it is sent again even if it is refused.
    """

    by: str
    at: Instant
    of: str = ""
    is_open: bool = False
    errors: Mapping[str, Refusal] = attrs.field(factory=dict)
    pause: float = 0.0
    seen: tuple[Instant, float] | None = None
    idempotency_key: str | None = None
    in_doubt: str | None = None

    def write(self) -> str:
        """Write it down."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def read(cls, text: str | None) -> Attempt | None:
        """Read it. None if nothing was tried, or that cannot be read."""
        if text is None:
            return None
        entry = json_object(text)
        try:
            seen, age = entry["seen"] or (None, 0.0)
            return cls(
                by=str(entry["by"]),
                of=str(entry.get("of", "")),
                at=Instant.read(entry["at"]),
                is_open=entry["is_open"] is True,
                errors={key: Refusal.read(error) for key, error in entry["errors"].items()},
                pause=min(max(number(entry.get("pause")) or 0.0, 0.0), DAY),
                seen=seen and (Instant.read(seen), min(max(number(age) or 0.0, 0.0), DAY)),
                idempotency_key=key if is_uuid(key := str(entry.get("idempotency_key"))) else None,
                in_doubt=doubt if KEY.fullmatch(doubt := str(entry.get("in_doubt"))) else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def refused(self, asker: str, error: SignInRequiredError) -> Attempt:
        """Return it with what the service said when it refused the credential to an asker."""
        before, said = self.errors.get(asker), {"message": str(error), **vars(error)}
        refusal = Refusal(said, self.at, 1 + (before.count if before else 0))
        return attrs.evolve(self, errors={**self.errors, asker: refusal})

    def refusal(self, asker: str, now: Instant) -> RefreshError | None:
        """Return what the service said when it refused the credential, if that was not long ago."""
        refusal = self.errors.get(asker)
        if refusal is None or self.is_open:
            return None
        longest = (0.0, *REFUSALS)[min(refusal.count, len(REFUSALS))]
        counts = -CLOCKS_DIFFER <= refusal.at.likely_age(now) < longest
        return SignInRequiredError(**refusal.said) if counts else None

    def pause_left(self, now: Instant) -> float:
        """Seconds for which the service still asks callers to wait."""
        age = self.at.likely_age(now)
        return max(0.0, self.pause - max(age, 0.0)) if age > -CLOCKS_DIFFER else 0.0

    def is_under_way(self, owner: str, limit: float, age: float) -> bool:
        """Whether somebody else may still come back with the answer."""
        return self.is_open and self.by != owner and age < limit


@attrs.frozen
class Left:
    """How many seconds a token is still valid: *least* at worst, *most* at best, as clocks may be wrong."""

    least: float
    most: float


NOTHING_LEFT = Left(-math.inf, -math.inf)


def left_here(lifetime: float, requested: Instant, now: Instant, age: float) -> Left:
    """
    Return how long a token is still valid that was asked for on this machine since it was started.

    A wall clock that was set may make it look old. Then it is refreshed early, which does no harm.
    """
    return Left(lifetime - max(age, now.wall - requested.wall), lifetime - age)


def left_elsewhere(
    lifetime: float,
    expiry: float | None,
    requested: Instant | None,
    now: Instant,
    seen_for: float,
    service_now: tuple[float, float, bool],
) -> Left:
    """
    Return how long a token is still valid that another machine asked for, or the caller. Wall clocks may be hours off.

    Args:
        lifetime: Seconds it is valid for, from when it was asked for.
        expiry: When it expires, by the service's clock, if it says.
        requested: When it was asked for. None if nobody knows.
        now: The time.
        seen_for: Seconds since this process first saw it.
        service_now: The earliest and the latest that it may be by the service's clock, and whether that is certain.
    """
    most = lifetime - seen_for
    earliest, latest, is_certain = service_now
    if is_certain and expiry is not None:
        most = min(expiry - earliest, most)
        return Left(min(expiry - latest, most) - 1.0, most)  # it may be a second later there
    doubts = [] if requested is None else [lifetime - (now.wall - requested.wall)]
    if expiry is not None:
        doubts += [expiry - max(now.wall, latest + 1.0)]
        most = min(most, expiry - min(now.wall, earliest))  # if both clocks say so
    least = min([most, *doubts])
    return Left(least, most if requested is None else least)


def window(lifetime: float, key: str, ahead: float | None) -> float:
    """Return how long before its end a token is refreshed. It varies from token to token."""
    if ahead is not None:
        return min(ahead, lifetime / 2)
    return min(WINDOW, lifetime / 10) * (1 - 0.6 * int(key[:8], 16) / 2**32)


def last_moments(window: float) -> float:
    """Return how long before its end a token is refreshed whatever the store says."""
    return max(0.25, min(LAST_MOMENTS, window / 8))


def lock_patience(left: Left, window: float) -> float:
    """Return how long to wait for a lock that another holds: until a valid token is in its last moments."""
    return left.least - last_moments(window) if left.most > 0 else math.inf


def silence(time_left: float) -> float:
    """Return for how long no answer comes before a request is sent again. *time_left*: to a token's last moments."""
    return min(SILENCE, max(time_left / 2, SHORTEST_SILENCE))


def birth_hold(birth: float | None, *, age: float, service_now: tuple[float, float, bool]) -> float:
    """
    Return how many seconds a token must not be refreshed yet, since it would be returned unchanged and expire.

    No token is valid for less than two seconds, so this ends before the token does.

    Args:
        birth: The second by the service's clock in which that is so. None if there is none.
        age: Seconds that somebody is known to have had it, by a clock that nobody sets.
        service_now: The earliest and the latest that it may be by the service's clock, and whether that is certain.
    """
    earliest, _, is_certain = service_now
    if birth is None or (is_certain and earliest >= birth + BIRTH_SECOND + CLOCKS_DIFFER):
        return 0.0
    return max(0.0, BIRTH_SECOND - age)


def outcome_of(error: RefreshError, *, is_valid: bool) -> Outcome:
    """Return what an event says of a failure. *is_valid*: there is a token to go on with."""
    if isinstance(error, (SignInRequiredError, RequestRefusedError)):
        return "refused"
    if error.spent is not False:
        return "unknown"
    return "kept" if is_valid else "down"


def pause_after(error: RefreshError, attempts: int, time_left: float, drawn: float) -> float | None:
    """
    Return how many seconds to wait before the next attempt. None if there is none.

    Args:
        error: How the last one failed.
        attempts: How many there were.
        time_left: Seconds until the deadline. The last attempt comes just before it.
        drawn: A number between 0 and 1.
    """
    asked, most = error.retry_after or 0.0, time_left - LAST_CALL
    if not error.retryable or asked >= most:
        return None
    longest = min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2.0 ** min(attempts, 10))
    return max(asked, min(drawn * longest, most))


def state_of(left: Left, window: float, *, is_known: bool, is_refused: bool) -> State:
    """Return how it stands with a chain."""
    if is_refused or not is_known:
        return "refused" if is_refused else "unknown"
    return "expired" if left.most <= 0 else "fresh" if left.least > window else "due"


class Step(enum.Enum):
    """What a flight does next."""

    USE = "the newest token is the answer"
    LOCK = "try to take the lock"
    SEND = "spend it, once it is written down that it is about to be"
    WAIT_FOR_LOCK = "another process is refreshing the token"
    WAIT_FOR_STORE = "the store cannot be reached"
    WAIT_FOR_BIRTH = "the token is too young to be refreshed"
    WAIT_FOR_SERVICE = "the service asked to wait"
    REFUSE = "the service has refused the token lately"


class Lock(enum.Enum):
    """Whether the lock of a chain is ours. That it cannot be had does not mean that another holds it."""

    UNTRIED = "untried"
    OURS = "ours"
    HELD = "held by another"
    LOST = "the store does not say"


@attrs.frozen(kw_only=True)
class View:
    """
    What a flight knows.

    Args:
        left: How long the newest token is valid.
        window: How long before its end it is refreshed.
        wanted: Whether a successor is wanted, however long that is.
        readable: Whether the store could be read.
        lock: Whether the lock is ours.
        patience: Seconds to wait for it, if another has it. Also a token that is not known here, but brought by the
            caller, has an end.
        refusal: What the service said if it has refused the token lately.
        hold: Seconds until it may be refreshed.
        pause: Seconds for which the service asked callers to wait.
        is_alone: Whether the store is not asked, as that would take too many of a token's last moments.
    """

    left: Left
    window: float
    wanted: bool
    readable: bool
    lock: Lock
    patience: float
    refusal: RefreshError | None
    hold: float
    pause: float
    is_alone: bool = False


def next_step(view: View) -> Step:
    """Say what to do next about a chain."""
    if view.left.least > view.window and not view.wanted:
        return Step.USE
    # In its last moments: a certain loss is worse than a possible one.
    urgent = view.is_alone or lock_patience(view.left, view.window) <= 0
    if not view.readable and not urgent:
        return Step.WAIT_FOR_STORE
    if view.refusal is not None:
        return Step.REFUSE
    if view.pause > 0:
        return Step.WAIT_FOR_SERVICE
    if view.hold > 0:
        return Step.WAIT_FOR_BIRTH
    if view.lock is Lock.UNTRIED:
        return Step.LOCK
    if view.lock is Lock.HELD and view.patience > 0:
        return Step.WAIT_FOR_LOCK
    return Step.WAIT_FOR_STORE if view.lock is Lock.LOST and not urgent else Step.SEND
