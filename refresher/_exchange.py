"""Attempts at one exchange, until it succeeds, is refused, or time is up."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import attrs

from ._wire import Reply, Request, failure
from .errors import OutcomeUnknownError, RefreshError, SignInRequiredError, UnavailableError
from .stores import mutex
from .tokens import fingerprint

if TYPE_CHECKING:
    import requests

_log = logging.getLogger("refresher")
_Answer = TypeVar("_Answer")

# In seconds. The first pause is up to twice the shortest, each further one up to twice as long.
_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
# How long a thread waits for more to do, by whether it's a daemon. If not, a process that ends waits as long.
_IDLE = {True: 5.0, False: 0.05}
# How long an answer is waited for where asking again is safe.
_SILENCE = 10.0


@attrs.frozen
class Patience:
    """
    How long an exchange may take, by ``time.monotonic()``. None: as long as it takes.

    Args:
        until: When the last attempt may begin, and how long it may take to connect.
        end: Until when its answer is waited for.
        tell: Told what it is waiting for.
    """

    until: float | None
    end: float | None
    tell: Callable[[str], object] = attrs.field(repr=False)

    @classmethod
    def starting(cls, timeout: float | None, limit: float | None, tell: Callable[[str], object]) -> Patience:
        """Count from now."""
        now = time.monotonic()
        return cls(None if timeout is None else now + timeout, None if limit is None else now + limit, tell)


def left(instant: float | None) -> float | None:
    """Count the seconds until an instant. It is never over: whoever asks can still be told that it's late."""
    return None if instant is None else max(0.001, instant - time.monotonic())


_Run = Callable[[Callable[[], None]], None]

# Threads that have nothing to do at the moment, by whether they are daemons. A forked child has none of them.
_idle: dict[bool, list[SimpleQueue[_Run]]] = {True: [], False: []}
os.register_at_fork(after_in_child=lambda: _idle.update({True: [], False: []}))


def _work(run: _Run | None, *, daemon: bool) -> None:
    """Run what there is to run, until there has been nothing for a while."""
    runs: SimpleQueue[_Run] = SimpleQueue()

    def be_idle() -> None:
        with mutex:
            _idle[daemon].append(runs)

    while run is not None:
        run(be_idle)
        run = None  # what it held is not needed any more
        try:
            run = runs.get(timeout=_IDLE[daemon])
        except Empty:
            with mutex:
                is_idle = runs in _idle[daemon]
                if is_idle:
                    _idle[daemon].remove(runs)
            if not is_idle:
                run = runs.get()  # it's just being given


def in_thread(
    call: Callable[[], _Answer], tell: Callable[[_Answer | None, BaseException | None], object], *, daemon: bool
) -> None:
    """Call something in another thread, and *tell* what came of it: an answer, or an error."""

    def run(be_idle: Callable[[], None]) -> None:
        answer, failed = None, None
        try:
            answer = call()
        except BaseException as error:
            failed = error
        be_idle()  # now, because who is told may have more to do
        tell(answer, failed)

    with mutex:
        runs = _idle[daemon].pop() if _idle[daemon] else None
    if runs is not None:
        runs.put(run)
        return
    try:
        threading.Thread(
            target=_work, args=(run,), kwargs={"daemon": daemon}, name="refresher", daemon=daemon
        ).start()
    except RuntimeError:  # too many threads, or the interpreter is about to end
        run(lambda: None)


def get_ready() -> None:
    """
    Import what sends, before any clock is running: requests takes a while to import. Calls that send nothing
    don't need it.
    """
    from . import _http  # noqa: F401, PLC0415


def exchange(
    request: Request,
    parse: Callable[[Reply, Request], _Answer],
    secret: Callable[[_Answer], str],
    *,
    session: requests.Session | None,
    patience: Patience,
    retry: bool,
) -> _Answer:
    """
    Send *request*, again if need be, read the reply and log what came of it.

    Where nothing was spent, it is sent again. Where the answer was lost it is too: Circle knows a repetition by
    its idempotency key; Kuzzle refuses a token that is spent, which then tells that it is.

    Args:
        parse: Reads the reply, or raises what it means.
        secret: Takes out of the answer what succeeds the request's credential, for its fingerprint in the log.
        session: Whose connections to use; None for our own.
        patience: For how long.
        retry: Whether there may be more than one attempt.

    Raises:
        RefreshError: There was no answer in time, or it was a refusal.
    """
    started, attempts = time.monotonic(), 0
    lost: OutcomeUnknownError | None = None
    old = fingerprint(request.credential)
    path, outcome = old, "interrupted"
    try:
        while True:
            attempts += 1
            try:
                answer = parse(_attempt(request, session, patience), request)
            except RefreshError as failed:
                error = failed
            else:
                path, outcome = f"{old} -> {fingerprint(secret(answer))}", "ok"
                return answer
            if lost is not None and request.idempotency_key is None and isinstance(error, SignInRequiredError):
                error.spent = True
            pause = _pause(error, request, patience, attempts) if retry else None
            if pause is None:
                # Nothing was spent this time, but an answer was lost before.
                error = lost if lost is not None and isinstance(error, UnavailableError) else error
                outcome = str(error)
                raise error
            lost = error if isinstance(error, OutcomeUnknownError) else lost
            _log.warning("%s %s: %s. Next try in %.1f s", request.provider, old, error, pause)
            patience.tell(str(error))
            time.sleep(pause)
    finally:
        _log.info(
            "%s %s: %s, %d attempt%s, %.3f s",
            request.provider,
            path,
            outcome,
            attempts,
            "" if attempts == 1 else "s",
            time.monotonic() - started,
        )


def _attempt(request: Request, session: requests.Session | None, patience: Patience) -> Reply:
    """Send once. Whatever the peer does, dripping bytes too, there is an end to it in time."""
    connect, timeout = left(patience.until), left(patience.end)
    connect = None if connect is None else connect * 0.9  # then there is time to tell that nothing was sent
    if request.idempotency_key is not None or not request.spends:
        timeout = _SILENCE if timeout is None else min(timeout, _SILENCE)

    from ._http import send  # noqa: PLC0415

    def call() -> Reply:
        return send(request, session=session, connect=connect, timeout=timeout)

    told: SimpleQueue[tuple[Reply | None, BaseException | None]] = SimpleQueue()
    in_thread(call, lambda *outcome: told.put(outcome), daemon=True)
    try:
        # The socket's own timeout tells more, so it comes first.
        reply, error = told.get(timeout=None if timeout is None else timeout + 0.02)
    except Empty:
        reply, error = None, None
    if reply is not None:
        return reply
    raise error or failure(OutcomeUnknownError, request, spent=None, what="did not answer in time")


def _pause(error: RefreshError, request: Request, patience: Patience, attempts: int) -> float | None:
    """Tell how many seconds to wait before the next attempt. None: there is none."""
    if isinstance(error, OutcomeUnknownError):
        lost = error.status in (None, 502, 504)
        if not lost and (request.idempotency_key is None or (error.status or 0) < 500):
            return None
    elif not isinstance(error, UnavailableError):
        return None
    pause = error.retry_after
    if pause is None:
        pause = random.uniform(0, min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2**attempts))  # noqa: S311 - no secret
    if patience.until is not None and time.monotonic() + pause >= patience.until:
        return None
    return pause
