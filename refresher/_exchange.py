"""One refresh: sent, and sent again until it succeeds or time is up."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Generic

from . import _rules
from ._runtime import Memo
from ._text import claims, fingerprint
from .errors import OutcomeUnknownError, RefreshError, SignInRequiredError, UnavailableError
from .services import Caller, Credential, R, Reply, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    import requests

    from ._runtime import Runtime

_log = logging.getLogger("refresher")
attempts_log = logging.getLogger("refresher.attempts")

# How often somebody who waits for a late answer looks around, in seconds.
_LOOK = 0.5

# How far a service's clock is ahead of the steady one, at least and at most, and of the wall clock, whether that is
# certain, and how far a `Date` is ahead of that: if nothing is known.
_UNKNOWN = -math.inf, -math.inf, -math.inf, False, 0.0


class Observed:
    """What a process has learned: clocks and pauses of services, and when it first saw each token."""

    def __init__(self, runtime: Runtime, clock: Callable[[], float] | None = None) -> None:
        self.runtime = runtime
        self._steady = clock or runtime.steady
        self._wall = clock or runtime.now
        self._seen, self._pauses = Memo[tuple[float, float]](self._steady), Memo[float](runtime.steady)
        self._clocks = Memo[tuple[float, float, float, bool, float]](self._steady)

    @classmethod
    def of(cls, runtime: Runtime) -> Observed:
        """Return what the caches of a process share."""
        found: Observed = vars(runtime).setdefault("observed", cls(runtime))
        return found

    def forget(self, *, pauses: bool = False) -> None:
        """Forget clocks and ages. Who asked to be left alone still is, unless *pauses* are to be forgotten too."""
        for memo in (self._seen, self._clocks):
            memo.clear()
        if pauses:
            self._pauses.clear()

    def forget_clock(self, scope: str) -> None:
        """Forget what time it is at a service."""
        self._clocks.drop(scope)

    def seen_for(self, key: str) -> float:
        """Seconds since a credential was first seen."""
        return self._steady() - self.see(key)[0]

    def see(self, key: str) -> tuple[float, float]:
        """Note that there is a credential. Return since when that is known, by both clocks."""
        if (since := self._seen.get(key)) is None:
            self._seen.put(key, since := (self._steady(), self.runtime.steady()))
        return since

    def learn(self, scope: str, date: float | None, took: float, came: Credential[Any] | None = None) -> None:
        """
        Remember what time it is at a service: it wrote *date* at some moment of the last *took* seconds.

        That may be a proxy's `Date`. When the token was issued that *came* with it counts instead, which the service
        itself says, unless that may be the answer to an earlier request. It counts until a `Date` shows that a clock
        was set there: one that is not as far off any more.
        """
        issued = None if came is None or came.idempotency_key else claims(came.secret).iat
        off = 0.0 if date is None or issued is None else date - issued
        date, is_certain = date if issued is None else issued, issued is not None
        if date is None:
            return
        least = date - self._steady()
        most = least + took
        known_least, known_most, _, was_certain, known_off = self._clocks.get(scope) or _UNKNOWN
        if was_certain > is_certain:
            if not -took - _rules.CLOCKS_DIFFER <= least - known_least - known_off <= _rules.CLOCKS_DIFFER:
                self._clocks.drop(scope)
            return
        # Each narrows it down, unless a clock was set meanwhile. They have whole seconds.
        if was_certain == is_certain and max(least, known_least) <= min(most, known_most) + 1:
            least, most = max(least, known_least), min(most, known_most)
        self._clocks.put(scope, (least, most, date - self._wall(), is_certain, off))

    def service_now(self, scope: str) -> tuple[float, float, bool]:
        """
        Return the time at a service, at the earliest and at the latest, and whether that is certain. -inf if unknown.

        The latest is by the wall clock, in case it was set, or time was frozen for a test.
        """
        least, most, wall, is_certain, _ = self._clocks.get(scope) or _UNKNOWN
        now = self._steady()
        return now + least, max(now + least, now + most, self._wall() + wall), is_certain

    def hold(self, credential: Credential[Any], *ages: float) -> float:
        """Seconds until a credential may be refreshed. *ages*: for how long it is known to have been there."""
        since, truly = self.see(credential.keys[-1])
        age = max(self._steady() - since, self.runtime.steady() - truly, *ages)  # a caller's clock may stand still
        return _rules.birth_hold(credential.birth, age=age, service_now=self.service_now(credential.scope))

    def leave_alone(self, scope: str, seconds: float | None) -> None:
        """Remember that a service asked callers to wait, if it did."""
        if seconds is not None:
            self._pauses.put(scope, max(self._pauses.get(scope) or 0.0, self.runtime.steady() + seconds))

    def pause(self, scope: str) -> float:
        """Seconds for which a service still asks callers to wait."""
        return max(0.0, (self._pauses.get(scope) or 0.0) - self.runtime.steady())


class Patience:
    """Who waits for a refresh, and for how long. This one is of a single call: it ends when time is up."""

    def __init__(self, runtime: Runtime, timeout: float | None, retry: bool, tell: Callable[[str], object]) -> None:
        self._runtime, self._retry, self.tell = runtime, retry, tell
        self._until = math.inf if timeout is None else runtime.steady() + timeout

    def until(self) -> float:
        """Until when an attempt may begin, by the steady clock. It may change."""
        return self._until

    def answer_by(self) -> float:
        """Until when to connect, and then to wait for an answer. It may change."""
        return self._until

    def retry(self) -> bool:
        """Whether there may be another attempt."""
        return self._retry

    def begin(self, *, again: bool) -> None:
        """Begin an attempt, the first one or *again*. What this raises ends the refresh."""

    def depart(self) -> None:
        """Let the request leave. What this raises stops it."""

    def silence(self) -> float:
        """After how many seconds without an answer to send the request again."""
        return _rules.SILENCE

    def may_repeat(self) -> bool:
        """Whether it may be sent again."""
        return self._retry

    def look(self) -> None:
        """Look, in a thread of its own, whether there is anything to wait for. What this raises ends the refresh."""

    def failed(self, error: RefreshError) -> None:
        """Take note that an attempt has failed, and there may be another."""
        self.tell(str(error))

    def pause(self, seconds: float) -> None:
        """Let time pass before that."""
        self._runtime.sleep(seconds)


class Exchange:
    """
    Sends the requests of one refresh: it is the `Send` that a credential is given.

    Args:
        session: Whose connections to use. None for our own.
    """

    def __init__(self, observed: Observed, patience: Patience, scope: str, session: requests.Session | None) -> None:
        self._runtime, self._observed, self._patience = observed.runtime, observed, patience
        self._scope, self._session = scope, session
        self.attempts = self._failures = 0
        self.answered_at = -math.inf  # when the service could be reached, last: a refresh may have many steps
        self._lost: RefreshError | None = None  # after which nobody knows what was spent
        self._date: float | None = None  # of the last answer
        self._asked = 0.0  # when its request was sent

    @property
    def retry(self) -> bool:
        """Whether there may be another attempt."""
        return self._patience.retry()

    def __call__(self, request: Request, parse: Callable[[Reply, Request], R]) -> tuple[R, Reply]:
        """
        Send a request, again if need be, read the reply and log the outcome.

        It is sent again if nothing was spent, and also if the answer was lost: Circle recognizes a repetition by its
        idempotency key; Kuzzle refuses a token that was spent, which shows that it was.

        Raises:
            RefreshError: There was no answer in time, or it was a refusal.
        """
        started, before = self._runtime.steady(), self.attempts
        old = fingerprint(request.secret.reveal())
        path, outcome = old, "interrupted"
        try:
            while True:
                try:
                    self._wait_out_pause(request.service)
                    self._patience.begin(again=self.attempts > before)
                    self.attempts += 1
                    token, reply = self._ask(request, parse)
                    new = token if isinstance(token, str) else token.fingerprint
                    path, outcome, self.answered_at = f"{old} -> {new}", "ok", self._runtime.steady()
                    return token, reply
                except RefreshError as failed:
                    error, self._failures = failed, self._failures + 1
                self._observed.leave_alone(self._scope, error.retry_after)
                time_left = self._patience.until() - self._runtime.steady() if self.retry else -math.inf
                pause = _rules.pause_after(error, self._failures, time_left, self._runtime.pick(0.0, 1.0))
                if self._lost is not None:  # nothing was spent this time, but an answer was lost before
                    error = self._lost if isinstance(error, UnavailableError) else error
                    is_proof = request.idempotency_key is None and isinstance(error, SignInRequiredError)
                    error.spent = is_proof or error.spent or None
                if pause is None:
                    outcome = str(error)
                    raise error
                self._lost = error if isinstance(error, OutcomeUnknownError) else self._lost
                attempts_log.warning("%s %s: %s. Next try in %.1f s", request.service, old, error, pause)
                self._patience.failed(error)
                self._patience.pause(pause)
        finally:
            attempts = self.attempts - before
            _log.info(
                "%s %s: %s, %d attempt%s, %.3f s",
                *(request.service, path, outcome, attempts, "" if attempts == 1 else "s"),
                self._runtime.steady() - started,
            )

    def _wait_out_pause(self, service: str) -> None:
        """Wait for as long as the service asked, whichever call it told."""
        while (pause := self._observed.pause(self._scope)) > 0:
            error = not_yet(service, "asked to wait", pause)
            if not self.retry or pause >= self._patience.until() - self._runtime.steady():
                raise error
            self._patience.failed(error)
            self._patience.pause(pause)

    def _ask(self, request: Request, parse: Callable[[Reply, Request], R]) -> tuple[R, Reply]:
        """Send a request once, read the reply, and learn what time it is there, if the service itself wrote it."""
        self._date, self._asked = None, self._runtime.steady()
        patience, silent_at = self._patience, self._asked + _rules.SILENCE
        try:
            if request.idempotency_key is None and request.spends:
                token, reply = _Twice(self, request, parse).ask()
            else:
                caller = Caller(lambda: min(silent_at, patience.answer_by()), patience.depart)
                token, reply = self.once(request, parse, caller)
        except RefreshError as error:
            if error.id or error.code:
                self.learn()
            if error.spent:  # the token was younger than we thought: the clock there was set
                self._observed.forget_clock(self._scope)
            raise
        if not request.spends:  # else the new token tells, if it can
            self.learn()
        return token, reply

    def once(self, request: Request, parse: Callable[[Reply, Request], R], caller: Caller) -> tuple[R, Reply]:
        """Send a request, and read the reply."""
        reply = self._runtime.send(request, session=self._session, caller=caller)
        self._date = reply.date
        return parse(reply, request), reply

    def learn(self, came: Credential[Any] | None = None) -> None:
        """Learn what time it is at the service from the last answer, and the token that came with it."""
        self._observed.learn(self._scope, self._date, self._runtime.steady() - self._asked, came)


class _Twice(Generic[R]):
    """
    Sends a request whose answer must not be missed, and sends it once more if none comes: the request may be lost.

    The service takes the token from one of the two, and refuses the other. So both answers are waited for, and the
    first one with a token counts.
    """

    def __init__(self, exchange: Exchange, request: Request, parse: Callable[[Reply, Request], R]) -> None:
        self._exchange, self._request, self._parse = exchange, request, parse
        self._runtime, self._patience = exchange._runtime, exchange._patience
        self._sent_at, self._again_at = math.inf, -math.inf
        self._is_late = self._is_over = False  # the answer, and all of it
        # The second request: whether it is under way, its answer, how it failed.
        self._is_pending, self._done = False, self._runtime.event()
        self._answer: tuple[R, Reply] | None = None
        self._error: RefreshError | None = None
        self._news: Exception | None = None  # why there is nothing to wait for

    def ask(self) -> tuple[R, Reply]:
        """
        Return the first answer with a token.

        Raises:
            RefreshError: There is none.
        """
        try:
            return self._send(depart=self._depart, idle=self._idle)
        except RefreshError as error:
            first = error
            while self._is_pending:  # not for longer than for the first
                self._runtime.wait(self._done, _LOOK)
        finally:
            self._is_over = True
        if self._answer is not None:
            return self._answer
        if self._news is not None:
            raise self._news
        if isinstance(self._error, OutcomeUnknownError):
            self._exchange._lost = self._error
        raise first

    def _send(self, **how: Any) -> tuple[R, Reply]:
        return self._exchange.once(self._request, self._parse, Caller(self._answer_by, **how))

    def _answer_by(self) -> float:
        is_settled = self._is_over or self._answer is not None or self._news is not None
        return -math.inf if is_settled else self._patience.answer_by()

    def _depart(self) -> None:
        self._patience.depart()
        self._sent_at = self._runtime.steady()

    def _idle(self) -> None:
        """See whether the answer is late. It may come any moment, so what takes time is done in another thread."""
        if not self._is_late and self._runtime.steady() - self._sent_at >= self._patience.silence():
            self._is_late = True
            for work in (self._repeat, self._look):
                self._runtime.start(work, daemon=True)

    def _repeat(self) -> None:
        """Send the request again, and once more if that fails at once, while there is time for an answer."""
        while self._answer_by() > (now := self._runtime.steady()) + _rules.SILENCE:
            is_paused = self._exchange._observed.pause(self._exchange._scope) > 0
            if now >= self._again_at and self._patience.may_repeat() and not is_paused:
                self._again_at = now + _rules.SILENCE
                self._send_again(now)
            self._runtime.sleep(_LOOK)

    def _send_again(self, now: float) -> None:
        self._is_pending, self._done, request = True, self._runtime.event(), self._request
        try:
            old, silence = fingerprint(request.secret.reveal()), now - self._sent_at
            attempts_log.warning("%s %s: no answer for %.1f s. Sent again", request.service, old, silence)
            self._exchange.attempts += 1
            self._answer = self._send()
        except RefreshError as error:
            self._error = error
            self._exchange._observed.leave_alone(self._exchange._scope, error.retry_after)
            if isinstance(error, SignInRequiredError):
                self._again_at = math.inf
        finally:
            self._is_pending = False
            self._done.set()

    def _look(self) -> None:
        """Look for news."""
        while self._answer_by() > self._runtime.steady():
            try:
                self._patience.look()
            except Exception as error:
                self._news = error
            self._runtime.sleep(_LOOK)


def not_yet(service: str, what: str, seconds: float) -> UnavailableError:
    """Make the error of a refresh that has to wait for longer than its caller does."""
    return UnavailableError(
        f"{service.title()} {what}: try again in {math.ceil(seconds)} s",
        provider=service,
        retry_after=seconds,
        spent=False,
        retryable=True,
    )
