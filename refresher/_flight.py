"""One refresh in progress: a thread that does what the rules say, for all who wait for it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any, Generic

import attrs

from . import _rules
from ._exchange import Exchange, Patience, not_yet
from ._ledger import Call, Lease, Ledger
from ._rules import Attempt, Chain, Instant, Left, Lock, Step, View
from ._runtime import Event
from ._text import fingerprint
from .errors import OutcomeUnknownError, RefreshError, RequestRefusedError, SignInRequiredError, UnavailableError
from .services import Credential, T
from .tokens import Outcome, RefreshEvent

_log = logging.getLogger("refresher")

# After so many seconds a flight looks whether its process is about to end.
_LONGEST_NAP = 5.0
_REFUSED = "{} does not accept the token any more, and another process may have a newer one"

OnEvent = Callable[[RefreshEvent], object]


class _Abandoned(Exception):  # noqa: N818
    """Nobody waits for this flight any more, and nothing was spent."""

    spent = idempotency_key = retry_after = None


class _LookAgain(Exception):  # noqa: N818
    """The lease has ended: somebody else may have spent the token."""


class Waiter:
    """
    A call that waits for a flight.

    *until*: for how long, by the steady clock. *is_there*: tells whether its thread has not ended with the process.
    *outcome*: None is to ask again.
    """

    def __init__(self, event: Event, until: float, retry: bool, is_there: Callable[[], bool]) -> None:
        self.event, self.until, self.retry, self.is_there = event, until, retry, is_there
        self.outcome: Any = None

    def tell(self, outcome: Any) -> None:
        self.outcome = outcome
        self.event.set()


class Flight(Patience, Generic[T]):
    """
    A refresh in progress, and those who wait for it. It is the `Patience` of its exchange.

    No lock guards it: each step is one operation on a list or an attribute, so a signal handler, a ``__del__`` or an
    exception at any point leaves it usable.
    """

    kind = "refresh"
    _longest = math.inf  # for how many seconds others may be about to come back with an answer
    is_for_all = True  # its failure is that of all who wait, not of its first caller alone
    has_departed = False  # something is on the wire
    # Everyone has been told, an answer was lost, the lock has been given back, a try failed.
    _done = _is_in_doubt = _has_let_go = _has_failed = False
    _may_repeat = False  # somebody allowed more than one attempt
    first_generation = math.inf  # the one that it has found first, or that was forgotten meanwhile

    def __init__(self, ledger: Ledger, chain_key: str, call: Call[T], limit: float, on_event: OnEvent | None) -> None:
        self._ledger, self._runtime, self._on_event = ledger, ledger.runtime, on_event
        self._began, self._known = self._runtime.steady(), ledger.chains.get(chain_key) or Chain(key=chain_key)
        self.chain_key, self.call, self._limit = chain_key, call, limit
        self._name = self._runtime.new_name()
        self._service = call.credential.service.title()
        self._lease = Lease(ledger, chain_key, self._name)
        self._is_alone = ledger.is_in_the_way(call)  # the store is passed by
        self.waiters: list[Waiter] = []
        self._sent_for: list[Waiter] = []  # who waited when the request left, or came soon after
        self.departed_at: Instant | None = None
        self._announced_at = self._urgent_at = math.inf  # and when the token's last moments begin
        # When it first found that another had the lock, by generation: who has refreshed one may be at the next.
        self._held_since: dict[int, float] = {}
        self._key: str | None = None  # with which the answer can be asked for again
        self._asker: str | None = None  # to whom it may have been lost
        self._tried: dict[str, Attempt | None] = {}  # what others were last seen to try with which credential
        self._spent: Credential[T] | None = None
        # One for all of its attempts: the pauses between them grow longer.
        self._exchange = Exchange(ledger.observed, self, call.credential.scope, call.session)
        self._failure: RefreshError | None = None
        self.status = f"{ledger.name} is slow"
        self._alarm = self._runtime.event()  # ends the pause that the flight makes
        self._claim = [True]
        self._may_blink = not ledger.is_failing  # one command of the store may fail, and say nothing about the next

    def run(self) -> None:
        """Refresh, once, in whichever thread is first."""
        try:
            self._claim.pop()
        except IndexError:
            return
        try:
            outcome: Any = self._refresh()
        except _Abandoned:
            outcome = None
        except BaseException as error:
            outcome = error
        self._finish(outcome)
        self._clean_up()

    @property
    def is_running(self) -> bool:
        """Whether a thread has begun. Its starter may have been interrupted before that."""
        return not self._claim

    def _finish(self, outcome: Any) -> None:
        """Tell everyone."""
        self._done = True
        if self._exchange.attempts and self._spent is None:
            self._ledger.in_vain_at.put(self.chain_key, self._runtime.steady())
        if self._ledger.flights.get(self.chain_key) is self:
            self._ledger.flights.pop(self.chain_key, None)  # it may be forgotten just now
        try:
            if self._on_event is not None and self.chain_key not in self._ledger.unsaved:
                self._let_go()  # it may call the cache again
            self._report(outcome)
        except BaseException:  # it may be a SystemExit, and there are callers who wait
            _log.exception("on_event has failed")
        while self.waiters:
            waiter = self.waiters.pop()
            # It may have joined when the last attempt was just failing.
            waiter.tell(None if self._failure and self._has_time(waiter, self._failure) else outcome)

    def _has_time(self, waiter: Waiter, error: RefreshError) -> bool:
        """Whether a call waits for long enough for another attempt after one that has failed."""
        pause = max(error.retry_after or 0.0, self._ledger.observed.pause(self.call.credential.scope))
        return error.retryable and waiter.retry and waiter.until - self._runtime.steady() > pause + _rules.LAST_CALL

    def _report(self, outcome: Any) -> None:
        """Say what came of it, if that is an exchange or a verdict, or news of one."""
        if self._on_event is None:
            return
        credential = self._spent or self._known.newest or self.call.credential
        chain = self._ledger.chains.get(self.chain_key) or Chain(key=self.chain_key)
        error = outcome if isinstance(outcome, RefreshError) else None
        if error is not None:
            newest, left, _, _ = self._ledger.assess(chain, self.call)
            credential = newest or credential
            what: Outcome = _rules.outcome_of(error, is_valid=left.most > 0)
        elif self._spent is not None:
            what = "refreshed"
        elif chain.newest and chain.generation > self._known.generation:
            what = "adopted"
        else:
            return
        self._on_event(
            RefreshEvent(
                provider=credential.service,
                fingerprint=fingerprint(credential.secret.reveal()),
                successor=fingerprint(chain.newest.secret.reveal()) if chain.newest and error is None else None,
                outcome=what,
                spent=True if error is None else error.spent,
                attempts=self._exchange.attempts,
                seconds=self._runtime.steady() - self._began,
                error=error,
            )
        )

    def join(self, waiter: Waiter) -> None:
        """Wait for this flight too. It goes on for as long as its most patient caller waits."""
        self.waiters.append(waiter)
        self._may_repeat |= waiter.retry
        if self.departed_at is not None and self._ledger.now().steady - self.departed_at.steady < self._limit:
            self._sent_for.append(waiter)
        self._alarm.set()
        if self._done:
            waiter.tell(None)

    def is_for_one(self, error: RefreshError, call: Call[T]) -> bool:
        """Whether an error is about this flight's own call alone, and not about another one."""
        if isinstance(error, SignInRequiredError):
            chain, _ = self._ledger.recall(call.credential)
            return len({_rules.asker(chain.to_spend(each.credential)) for each in (self.call, call)}) > 1
        is_own = isinstance(error, RequestRefusedError) and self.call.credential != call.credential
        return is_own or not self.is_for_all

    def leave(self, waiter: Waiter) -> None:
        """Wait no more."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)
            if self._lease.lock is Lock.HELD:  # the next callers need not wait for another process as long
                self._ledger.failed_at.put(self.chain_key, self._runtime.steady())
            if (now := self._runtime.steady()) < waiter.until and waiter in self._sent_for:  # it was interrupted
                self._gone_at = now
            self._alarm.set()

    # Patience

    def _waiting(self) -> list[Waiter]:
        return [waiter for waiter in list(self.waiters) if waiter.is_there()]

    def until(self) -> float:
        return max((waiter.until for waiter in self._waiting()), default=-math.inf)

    def _time_left(self) -> float:
        return self.until() - self._runtime.steady()

    def answer_by(self) -> float:
        """Connect while somebody waits. Give a request that was sent the time that an exchange may take in any case."""
        # Who came later would rather have another attempt than wait for an answer that was lost.
        waiting = (waiter.until for waiter in self._waiting() if waiter in self._sent_for)
        return max([self._gone_at + self._limit, *waiting]) if self.has_departed else self.until()

    def retry(self) -> bool:
        return any(waiter.retry for waiter in self._waiting())

    def _check(self) -> None:
        """Go on only if somebody waits, and no other has taken its place."""
        if not self._waiting() or self._ledger.flights.get(self.chain_key, self) is not self:
            raise _Abandoned

    def _go_on(self) -> None:
        """Go on only if somebody waits, and the lease has not ended."""
        self.has_departed = False
        self._check()
        if self._lease.lock is Lock.OURS and not self._lease.is_ours():
            raise _LookAgain

    def _is_old(self, leases: int = 1) -> bool:
        """Whether others would take what was announced for lost."""
        return self._runtime.steady() - self._announced_at > leases * _rules.LEASE

    def begin(self, *, again: bool) -> None:
        has_time = self._is_old(2) or self._time_left() > 4 * _rules.LONGEST_POLL
        is_in_vain = has_time and self._runtime.steady() - self._exchange.answered_at > 4 * _rules.LEASE
        if again and self._is_old() and (is_in_vain or self._lease.lock is not Lock.OURS):
            raise _LookAgain
        self._go_on()

    def depart(self) -> None:
        self._go_on()
        if self._is_old() and not self._lease.announce():
            raise _LookAgain
        self._sent_for, self.departed_at, self._gone_at = list(self.waiters), self._ledger.now(), self._runtime.steady()
        self.has_departed = True

    def silence(self) -> float:
        return _rules.silence(self._urgent_at - self._gone_at)

    def may_repeat(self) -> bool:
        return self._may_repeat and (self._lease.lock is not Lock.OURS or self._lease.is_ours())

    def look(self) -> None:
        """Go on waiting only if nobody else has refreshed the token."""
        chain, _ = self._ledger.look(self.call.credential)
        self._ledger.close()
        if chain.newest is not None and chain.generation > self._spending:
            raise _LookAgain

    def failed(self, error: RefreshError) -> None:
        """Tell those who do not want another attempt, or cannot wait for it."""
        self.has_departed = False
        self.status = str(error)
        self._is_in_doubt |= error.spent is not False
        self._has_failed = True
        for waiter in list(self.waiters):
            if not waiter.retry or (error.spent is False and not self._has_time(waiter, error)):
                self.leave(waiter)
                waiter.tell(error)

    def pause(self, seconds: float) -> None:
        """Sleep. Whoever joins or leaves ends that early, and so do a token's last moments."""
        now = self._runtime.steady()
        soon = max(self._urgent_at, now + self._runtime.pick(0.25, 0.75))
        end = min(now + seconds, soon if now < self._urgent_at + _rules.LAST_MOMENTS else math.inf)
        while self._waiting() and (remaining := end - self._runtime.steady()) > 0:
            self._alarm = self._runtime.event()
            # Who left just now has set the alarm before. Less than this may be no time at all.
            self._runtime.wait(self._alarm, max(0.001, min(remaining, _LONGEST_NAP)) if self.waiters else 0.0)
        self._check()

    def too_late(self) -> RefreshError:
        """Make the error of a call whose time is up."""
        if self._failure is not None:
            return self._failure
        if self.has_departed or (self._is_in_doubt and self.departed_at) or self._lease.lock is Lock.HELD:
            what = f"{self._service} did not answer in time, and the {self.kind} goes on: call again"
            return self._unknown(what, idempotency_key=self.call.credential.idempotency_key)
        return UnavailableError(f"Time is up: {self.status}", provider=self.call.credential.service, spent=False)

    def _unknown(self, what: str, **details: Any) -> OutcomeUnknownError:
        error = OutcomeUnknownError(what, provider=self.call.credential.service, **details)
        error._is_elsewhere = self.departed_at is None
        return error

    # What it does

    def _refresh(self) -> Credential[T] | None:
        """Do what the rules say, until there is an answer. None if its callers have to ask again."""
        call, lease, ledger, poll = self.call, self._lease, self._ledger, _rules.POLL
        while True:
            self._check()
            if lease.lock is Lock.OURS and not lease.is_ours():
                lease.lock = Lock.UNTRIED
            chain, is_readable = self._look()
            if chain.key != self.chain_key:
                return None  # it belongs to another chain, which may have a flight already
            view, spend, attempt = self._view(chain, is_readable)
            step = _rules.next_step(view)
            if step is Step.SEND:
                announced = self._announce(spend, attempt, chain)
                if not announced:  # what cannot be written down is as good as not locked
                    step = _rules.next_step(attrs.evolve(view, lock=Lock.LOST))
                if step is Step.SEND and (successor := self._spend(chain, spend, attempt, announced)) is not None:
                    return successor
            if ledger.is_held_back(chain.key, view.left, call):
                return spend
            if step is Step.USE:
                if call.rejected != spend.headers:
                    return spend
                is_newest = view.readable and self._is_newest(chain, spend) and not self._is_being_spent(attempt)
                if is_newest and self._close(spend, attempt):  # else others could not write a successor down either
                    return spend
            if step is Step.REFUSE:
                if ledger.adopt(chain, spend):
                    continue
                ledger.give_up(chain, spend)
            if step is Step.WAIT_FOR_BIRTH and attempt is None:
                self._close(spend, None)  # so that the next process knows that it is older
            if step is Step.LOCK:
                self._take_lock(view.patience)
            elif step is Step.WAIT_FOR_LOCK:
                self._wait_for_lock(min(poll, _rules.LONGEST_POLL), view.patience)
            elif step is not Step.SEND:
                self._wait_or_fail(step, view, poll)
                if lease.lock is not Lock.OURS:
                    lease.lock = Lock.UNTRIED
            poll = min(1.2 * poll, 2 * _rules.LONGEST_POLL)

    def _look(self) -> tuple[Chain[T], bool]:
        """Look at what the store has, unless that would take the rest of a token's life."""
        self._is_alone = self._ledger.is_in_the_way(self.call)
        if self._is_alone:
            self._lease.lock = Lock.LOST
            return self._ledger.recall(self.call.credential)[0], False
        chain, is_readable = self._ledger.look(self.call.credential)
        self.first_generation = min(self.first_generation, chain.generation if is_readable else math.inf)
        if chain.newest is None and self.first_generation < math.inf:  # if forgotten since, what comes is not kept
            chain = attrs.evolve(chain, generation=int(self.first_generation))
        return chain, is_readable

    def _is_newest(self, chain: Chain[T], spend: Credential[T]) -> bool:
        """Whether the store shows no newer token. What was tried is read before: when that is gone, this is there."""
        ledger, (newer, is_readable) = self._ledger, self._look()
        is_proof = is_readable and ledger.is_settled() and not ledger.unread_of(chain, self.call.credential)
        return is_proof and newer.generation <= chain.generation and not ledger.adopt(chain, spend)

    def is_stuck(self) -> bool:
        """Whether it waits for the store while a token is in its last moments, so that another had better go."""
        waits_for_answer = self.has_departed and self._spent is None
        return not (self._is_alone or waits_for_answer or self._done) and self._ledger.is_in_the_way(self.call)

    def _view(self, chain: Chain[T], is_readable: bool) -> tuple[View, Credential[T], Attempt | None]:
        """Put together what is known, what would be spent, and what was last tried with that."""
        call, ledger = self.call, self._ledger
        newest, left, window, wanted = ledger.assess(chain, call)
        spend = call.credential if newest is None else call.credential.following(newest.token)
        attempt = None
        if is_readable and (left.least <= window or wanted or call.rejected is not None):
            attempt, is_readable = ledger.last_attempt(spend)
            # The store may have lost what was there a moment ago.
            attempt = self._tried[spend.keys[-1]] = attempt or self._tried.get(spend.keys[-1])
        patience = _rules.lock_patience(left, window)
        if newest is None:  # the caller's own may be about to expire, a second later there
            _, own, its_window, _ = ledger.assess(chain, attrs.evolve(call, own_will_do=True))
            patience = _rules.lock_patience(Left(own.least, own.least + 1.0), its_window)
        self._urgent_at = (now := self._runtime.steady()) + patience
        if self._lease.lock is Lock.HELD:
            patience = max(self._held_since.setdefault(chain.generation, now) + _rules.ONE_EXCHANGE - now, patience)
        view = View(
            left=left,
            window=window,
            wanted=wanted,
            readable=is_readable,
            lock=self._lease.lock,
            patience=patience,
            refusal=attempt.refusal(_rules.asker(spend), ledger.now()) if attempt else None,
            hold=ledger.hold(spend, chain, attempt),
            pause=ledger.pause(spend, attempt),
            is_alone=self._is_alone,
        )
        return view, spend, attempt

    def _is_being_spent(self, *attempts: Attempt | None) -> bool:
        """Whether another process may come back with the successor of a token."""
        age, limit = self._ledger.age, min(self._limit + _rules.LEASE, self._longest)
        return any(one and one.is_under_way(self._name, limit, age(one)) for one in attempts)

    def _take_lock(self, patience: float) -> None:
        """Try to take the lock. If this process has failed just now, let others try before: they may have more luck."""
        failed_for = self._runtime.steady() - (self._ledger.in_vain_at.get(self.chain_key) or -math.inf)
        if failed_for < _rules.BRIEFLY and patience > 4 * _rules.LONGEST_POLL and not self._ledger.is_local:
            self.pause(min(2 * _rules.LONGEST_POLL, self._time_left() / 2))
        self._lease.take()

    def _wait_for_lock(self, poll: float, longest: float = math.inf) -> None:
        """Try again soon to take the lock that another has."""
        self._wait_for_others(f"another process is refreshing the {self._service} token", poll, longest)
        self._lease.take()

    def _wait_for_others(self, why: str, seconds: float, longest: float = math.inf, **details: Any) -> None:
        """Wait for some seconds, more or less, for what another process does."""
        self.status = why
        if (time_left := self._time_left() - _rules.LAST_CALL) <= 0:
            raise self._unknown(f"Time is up, and {why}: call again", **details)
        self.pause(min(self._runtime.pick(0.5, 1.5) * seconds, longest, time_left))

    def _wait_or_fail(self, step: Step, view: View, poll: float) -> None:
        """Wait for what a step says, as long as the callers do. Otherwise raise what is the matter."""
        service, time_left = self.call.credential.service, self._time_left()
        if step is Step.REFUSE and view.refusal is not None:
            raise view.refusal
        if step is Step.USE:
            return self._wait_for_news(poll)
        if step is Step.WAIT_FOR_BIRTH:
            self.status = f"{self._service} may have issued this token just now"
            # Not at one go: another process may know that the token is older, and refresh it.
            if (seconds := min(view.hold, _rules.LONGEST_POLL, time_left - _rules.LAST_CALL)) > 0:
                return self.pause(seconds)
            raise not_yet(service, "may have issued this token just now", view.hold)
        if step is Step.WAIT_FOR_SERVICE:
            self.failed(not_yet(service, "asked to wait", view.pause))
            return self.pause(min(view.pause, _LONGEST_NAP))  # others may have a newer token before that is over
        self.status = f"{self._ledger.name} cannot be read or written"
        may_blink, self._may_blink = self._may_blink and self._ledger.delay() < _rules.LONGEST_POLL, False
        if time_left > _rules.LAST_CALL and self.retry() and (view.left.most <= 0 or may_blink):
            return self.pause(min(self._runtime.pick(0.5, 1.5) * poll, time_left))
        self.is_for_all = view.left.most <= 0  # else who has a token goes on with it
        what = f"{self.status}, so nothing was sent to {self._service}: try again later"
        raise UnavailableError(what, provider=service, spent=False)

    def _announce(self, spend: Credential[T], attempt: Attempt | None, chain: Chain[T]) -> bool:
        """Write down what is about to be spent. What cannot be written down cannot be kept either."""
        self._key = (attempt and attempt.idempotency_key) or spend.key_for(_anew(attempt, chain))
        doubt = attempt.in_doubt if attempt else None
        self._asker, self._is_in_doubt = doubt or _rules.asker(spend), self._is_in_doubt or doubt is not None
        room = max(_rules.ROOM, len(chain.text or "")) * " "

        def announce() -> bool:
            self._announced_at = self._runtime.steady()
            return self._ledger.note(spend, self._attempt(spend, attempt, is_open=True), room)

        if self._is_alone:
            self._announced_at = math.inf
            return False
        self._lease.announce = announce
        return announce()

    def _attempt(self, spend: Credential[T], before: Attempt | None, **details: Any) -> Attempt:
        """Describe what this flight does with a credential. What the service has said of that before stays known."""
        at, key = self._ledger.now(), self._key or (before.idempotency_key if before else None)
        doubt = before.in_doubt if before and not self._asker else None
        doubt = self._asker if self._is_in_doubt or details.get("is_open") else doubt
        own = Attempt(by=self._name, of=spend.keys[-1], at=at, idempotency_key=key, in_doubt=doubt, **details)
        return attrs.evolve(own, errors=before.errors) if before else own

    def _spend(
        self, chain: Chain[T], spend: Credential[T], attempt: Attempt | None, announced: bool
    ) -> Credential[T] | None:
        """Refresh a credential, and keep what comes of it. None if there is something newer already."""
        ledger, self._spending = self._ledger, chain.generation
        if spend.idempotency_key and chain.newest is None and ledger.unread.get(chain.key):
            raise self._unread(spent=False)  # the answer would be that to an earlier request
        self.status = f"{self._service} is slow"
        _log.debug("%s %s: to be refreshed", spend.service, chain.key[:8])
        try:
            successor = spend.refresh(self._exchange, key=self._key)
        except _LookAgain:
            self.has_departed = False
            self._make_way(spend, attempt)
            return None
        except SignInRequiredError as error:
            # If the store hangs now.
            self._failure = self._unknown(f"{_REFUSED.format(self._service)}: call again", status=error.status)
            self._close(spend, attempt)
            try:
                self._verify(chain, spend, attempt, self._time_for_news(chain) if announced else self._limit, error)
            except OutcomeUnknownError:
                self._close(spend, attempt)
                raise
            self._failure = None
            return None
        except (RefreshError, _Abandoned) as error:
            key, self._key = self._key, self._next_key(spend, error)
            # Another has not been sent yet, or its answer is lost as well.
            self._is_in_doubt &= self._key == key or isinstance(error, OutcomeUnknownError)
            self._failure = error if isinstance(error, RefreshError) else None
            # Else to ask again brings the answer that was lost.
            if spend.idempotency_key is None or not isinstance(error, OutcomeUnknownError) or error.status is not None:
                ledger.failed_at.put(chain.key, self._runtime.steady())
            self._close(spend, attempt, error.retry_after or 0.0)
            raise
        self._spent = spend
        self._exchange.learn(successor)
        self._keep(chain, spend, successor)
        if successor.keys[0] in ledger.orphans:  # what is asked for now is asked for after the sign-out
            self.first_generation = math.inf
            return None
        return successor

    def _make_way(self, spend: Credential[T], attempt: Attempt | None) -> None:
        """Let another machine try what was tried in vain for seconds: it may have more luck."""
        if self._has_failed:
            self._close(spend, attempt)
            self._lease.give_back()
            self.pause(2 * _rules.LONGEST_POLL)  # the others have tried the lock by then

    def _next_key(self, spend: Credential[T], error: RefreshError | _Abandoned) -> str | None:
        """
        Return the idempotency key for the next attempt. None: the usual.

        One that was refused is not sent again, unless an answer to it was lost before, which may come again.
        """
        self._is_in_doubt |= isinstance(error, OutcomeUnknownError)
        if isinstance(error, RequestRefusedError) and error.idempotency_key is not None and not self._is_in_doubt:
            key = spend.key_for(f"after {error.idempotency_key}")
            return None if key == error.idempotency_key else key  # it is the caller's own
        return (error.idempotency_key or self._key) if error.spent is not False or self._is_in_doubt else None

    def _unread(self, **details: Any) -> RefreshError:
        what = f"{self._ledger.name} has an entry of this {self._service} session that cannot be read: check its key"
        return self._unknown(what, **details)

    def _close(self, spend: Credential[T], attempt: Attempt | None, pause: float = 0.0) -> bool:
        """Write down that this attempt is over. Another, from before it or since, may still bring an answer."""
        self.has_departed = False
        ledger, now, looked_at = self._ledger, self._ledger.now(), self._runtime.steady()
        if self._is_alone:
            return False
        done = self._attempt(spend, attempt, pause=pause)
        for one in (attempt, ledger.last_attempt(spend)[0]):
            if one is not None and self._is_being_spent(one):
                age = ledger.age(one)  # so that the next process knows for how long it has been there
                done = attrs.evolve(one, pause=max(one.pause, pause and pause + age), seen=(now, age))
        return self._note(spend, done, looked_at)

    def _note(self, spend: Credential[T], done: Attempt, looked_at: float) -> bool:
        """Write down an attempt that is over. Return whether that is done, and took no other's place."""
        is_noted = self._ledger.note(spend, done)
        if not is_noted or self._lease.is_ours() or self._runtime.steady() - looked_at <= _rules.TRUSTED:
            return is_noted
        # It was suspended, and another process may have announced one meanwhile.
        now, doubt = self._ledger.now(), done.in_doubt or _rules.asker(spend)
        self._ledger.note(spend, attrs.evolve(done, by="", at=now, is_open=True, errors={}, seen=None, in_doubt=doubt))
        return False

    def _keep(self, chain: Chain[T], spend: Credential[T], successor: Credential[T]) -> None:
        """Keep what came of a credential."""
        ledger = self._ledger
        requested, lifetime = self.departed_at or ledger.now(), successor.lifetime
        took = max(0.0, ledger.now().steady - requested.steady)
        if spend.idempotency_key and successor.expiry is not None:
            # It may be the answer to an earlier request. If it would be over, it is the service's clock that is wrong.
            left = successor.expiry - ledger.observed.service_now(spend.scope)[1] + took
            lifetime = min(lifetime, left if left > 0 else lifetime)
        ledger.observed.see(successor.keys[-1])
        newer = attrs.evolve(chain, generation=chain.generation + 1, newest=successor, requested=requested, took=took)
        is_replacement = self.call.rejected is not None
        newer = attrs.evolve(newer, asked_for=spend.requested, lifetime=lifetime, is_replacement=is_replacement)
        ledger.keep(newer, spend, in_memory=self._is_alone)

    def _verify(
        self, chain: Chain[T], spend: Credential[T], before: Attempt | None, wait: float, error: SignInRequiredError
    ) -> None:
        """
        Return if there is a newer token than the one that was refused, or comes in some seconds.

        Raises:
            SignInRequiredError: It was the newest, and nobody has the answer to a refresh of it.
            OutcomeUnknownError: That could not be found out.
        """
        ledger, poll = self._ledger, _rules.POLL
        refused_at = self._runtime.steady()
        while True:
            tried, is_readable = ledger.last_attempt(spend)
            newer, is_there = ledger.look(self.call.credential)  # after that: when that is gone, its successor is there
            is_newer = newer.generation > chain.generation and newer.newest is not None
            if is_newer or ledger.adopt(chain, spend):
                return
            if ledger.unread_of(chain, self.call.credential):
                raise self._unread(status=error.status)
            now, is_settled = self._runtime.steady(), is_readable and is_there and ledger.is_settled()
            if now - refused_at >= wait and is_settled and not self._is_being_spent(before, tried):
                verdict, asker = self._attempt(spend, tried or before), _rules.asker(spend)
                if error.idempotency_key is not None and self._asker == asker:  # else its answer may still be lost
                    verdict = attrs.evolve(verdict, idempotency_key=None, in_doubt=None)
                if self._note(spend, verdict.refused(asker, error), now):  # else nobody could save a successor either
                    ledger.give_up(chain, spend)
                    raise error
            self._wait_for_news(poll, error.status)
            # A store that drops entries may not have it for long.
            is_soon = now - refused_at < 2 * _rules.SETTLED
            poll = min(1.5 * poll, 2 * _rules.POLL if is_soon else 4 * _rules.LONGEST_POLL)

    def _time_for_news(self, chain: Chain[T]) -> float:
        """Seconds to wait for others to save the successor of a token: a job with little time has to be told, too."""
        _, left, _, _ = self._ledger.assess(chain, attrs.evolve(self.call, own_will_do=True, rejected=None))
        time_left = self._time_left() - 2 * _rules.LAST_CALL
        return max(0.0, min(_rules.SETTLED, time_left)) if self._ledger.may_lack_news(left) else 0.0

    def _wait_for_news(self, seconds: float, status: int | None = None) -> None:
        """Wait for another process to save the successor of a token that the service refused."""
        began = self._runtime.steady()
        self._wait_for_others(_REFUSED.format(self._service), seconds, status=status)
        if self._runtime.steady() - began > _rules.SETTLED:  # it was suspended, and cannot know how the store was
            self._ledger.unsettle()

    def _let_go(self) -> None:
        """Let go of the lock, if that is not done."""
        if not self._has_let_go:
            self._has_let_go = True
            if self._spent is not None and self.chain_key not in self._ledger.unsaved:
                self._ledger.delete(f"{self._spent.keys[0]}-attempt")  # its outcome is known now
                self._ledger.lead(self._spent, self.chain_key)
            self._lease.give_back()

    def _clean_up(self) -> None:
        """Write down what could not be written before, and let go of the lock."""
        ledger = self._ledger
        if self._spent is not None:  # this process may have the only copy
            ledger.save_until(self.chain_key, self._limit)
        self._let_go()
        if not ledger.is_failing:
            ledger.save_all()
        if ledger.unsaved:
            ledger.save_later(self._sign_orphans_out)
        self._sign_orphans_out()
        ledger.close()

    def _sign_orphans_out(self) -> None:
        """Sign out what came too late for the sign-out of its session."""
        ledger = self._ledger
        for key, (chain_key, orphan) in list(ledger.orphans.items()):
            patience = Patience(self._runtime, max(self._limit, _rules.LEASE), True, _log.debug)
            session = self.call.session if chain_key == self.chain_key else None
            with contextlib.suppress(RefreshError):  # the next flight tries again
                with contextlib.suppress(SignInRequiredError):
                    orphan.sign_out(Exchange(ledger.observed, patience, orphan.scope, session))
                ledger.orphans.pop(key, None)


def _anew(attempt: Attempt | None, chain: Chain[Any]) -> str:
    """Tell this from requests that were refused, or whose session was forgotten."""
    refusals = sum(each.count for each in attempt.errors.values()) if attempt else 0
    forgotten = chain.generation if chain.newest is None else 0
    return f"{refusals} {forgotten}" if refusals or forgotten else ""


class SignOut(Flight[T]):
    """
    The end of a session: its newest token is signed out, and all of it is forgotten.

    Nobody refreshes it meanwhile, since it holds the lock. Who joins it asks again when it is over.
    """

    kind = "sign-out"
    is_for_all = False  # who wants a token asks again
    is_over = False
    _longest = _rules.LEASE  # unless the token is found to be spent: who was killed before that has no lock any more
    _told = ""  # the key of the token that was signed out last
    _wait = 0.0  # seconds for which another process may still come with a newer one

    def is_stuck(self) -> bool:
        """Never: nothing may pass it by."""
        return False

    def _refresh(self) -> None:
        self._is_alone = False  # the store is asked in any case
        while not self.is_over:
            self._check()
            chain, is_readable = self._ledger.look(self.call.credential)
            if chain.key != self.chain_key:
                return
            self._end(chain, is_readable)

    def _end(self, chain: Chain[T], is_readable: bool) -> None:
        """Sign its newest token out, make sure that nobody has a newer one, and forget the chain."""
        ledger, lease, newest = self._ledger, self._lease, chain.newest or self.call.credential
        if is_readable and lease.lock is not Lock.LOST and not lease.is_ours():
            return self._wait_for_lock(_rules.LONGEST_POLL) if lease.lock is Lock.HELD else lease.take()
        attempt, is_readable = ledger.last_attempt(newest) if is_readable else (None, False)
        if self._is_being_spent(attempt):
            self._close(newest, attempt)
            return self._wait_for_lock(_rules.LONGEST_POLL)
        if newest.keys[0] != self._told:
            self.status = f"{self._service} is slow"
            try:
                newest.sign_out(self._exchange)
            except _LookAgain:
                return None
            except SignInRequiredError:  # it has ended already, or been refreshed
                self._wait, self._longest = self._time_for_news(chain), math.inf
            self.has_departed, self._told = False, newest.keys[0]
        if not is_readable:
            self.status = f"{ledger.name} cannot be read, and may have a newer token of the session"
            return self.pause(_rules.LONGEST_POLL)
        if chain.has_ended and chain.newest is None and chain.key not in ledger.unsaved:
            self.is_over = True  # the store says so
            return None
        verdict = SignInRequiredError(f"{self._service} has ended the session", provider=newest.service)
        try:
            return self._verify(chain, newest, attempt, self._wait, verdict)
        except SignInRequiredError:
            pass
        except OutcomeUnknownError:
            if ledger.is_settled():
                raise
            what = f"{ledger.name} cannot be read or written, and may have a newer token of the session: call again"
            raise UnavailableError(what, provider=newest.service, spent=False) from None
        while not ledger.drop(chain, {*self.call.credential.keys, *newest.keys}, has_ended=True):
            self.status = f"the session has ended at {self._service}, but {ledger.name} cannot be written: call again"
            if (time_left := self._time_left() - _rules.LAST_CALL) <= 0:
                raise UnavailableError(self.status, provider=newest.service, spent=False)
            self.pause(min(_rules.LONGEST_POLL, time_left))
        self.is_over = True
        return None

    def _report(self, outcome: object) -> None:
        """Say nothing: it is no refresh."""
