"""Attempts at one exchange, until it succeeds, is refused, or time is up."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import attrs

from ._wire import Reply, Request
from .errors import OutcomeUnknownError, RefreshError, SignInRequiredError, UnavailableError
from .tokens import fingerprint

if TYPE_CHECKING:
    import requests

_log = logging.getLogger("refresher")
_Answer = TypeVar("_Answer")

# In seconds. The first pause is up to twice the shortest, each further one up to twice as long.
_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
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


def get_ready() -> None:
    """
    Import what sends, before any clock is running: requests takes a while to import. Calls that send nothing
    don't need it.
    """
    from . import _http  # noqa: F401


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
    """Send once."""
    connect, timeout = left(patience.until), left(patience.end)
    connect = None if connect is None else connect * 0.9  # then there is time to tell that nothing was sent
    if request.idempotency_key is not None or not request.spends:
        timeout = _SILENCE if timeout is None else min(timeout, _SILENCE)

    from ._http import send

    return send(request, session=session, connect=connect, timeout=timeout)


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
