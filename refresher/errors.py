"""
What can go wrong. Each error is named for what you do next.

All are `RefreshError`s, so this is enough for most programs::

    try:
        token = refresh_kuzzle_token(url, jwt)
    except SignInRequiredError:
        ...  # ask the user to sign in
    except RefreshError as error:
        ...  # try again in error.retry_after or 60 seconds

Situations, what a call does by itself, and what is left to do:

The service is down, starting, overloaded or throttling, or Kuzzle cannot reach its token store.
    The call waits and tries again, as long as *timeout* allows. Then it raises `UnavailableError`: try later. To be
    told at once, pass ``queuable=False`` (Kuzzle) or ``retry=False`` (Circle).
The same, while a token in the cache is still valid.
    You get that token, and a warning is logged. Nothing to do. An auth object goes on with its own token too.
Circle answers that something went wrong, and not what (code -1).
    `OutcomeUnknownError` at once: call again, later.
Circle's response is lost.
    The call asks again with the same idempotency key and gets the response. Nothing to do.
Kuzzle's response is lost.
    The call asks again. If the request was lost as well, it gets a new token. Otherwise the new token is gone, and
    `SignInRequiredError` is raised: sign in again.
Kuzzle's response does not come.
    After ten seconds, or sooner if the token is about to expire, the call asks again on another connection, unless you
    gave it a session. It still waits for the first response, too, and takes the one with a token.
The service is slow.
    `OutcomeUnknownError` when *timeout* is over. The refresh goes on until a minute after it was sent. Call again: the
    result is in the cache.
A process is killed before it has saved the new token.
    On Circle, the next call has the same idempotency key and gets the same pair. On Kuzzle, the token is lost if it was
    not in the store yet: sign in again.
The store cannot be read or written.
    A valid token that the process knows is used. Otherwise nothing is sent, and `UnavailableError` is raised with
    ``spent=False``: try later.
A token is refreshed in the second in which Kuzzle issued it.
    Kuzzle would return the same token and let it expire, so the call waits until that second is over. Nothing to do.
Many callers refresh one token at once.
    One request is sent and all get its result, if they share a cache or a store.
A caller passes a token that has been spent.
    It gets the newest token of the chain. The first token leads there for as long as the session lives, a later one for
    a day after it was spent or last passed.
A lifetime is one that would end the session, or that Kuzzle cannot read.
    `InvalidArgumentError`. Nothing was sent: fix the call. Above the server's limit it is `RequestRefusedError`.
The session has ended.
    `SignInRequiredError`: sign in again. It is remembered, so that calls in a loop send one request in a minute, then
    one in five minutes, then one in an hour.
A redirect, a proxy's page, a captive portal or a response for another user arrives, and its status is no error.
    `ReplyError`. No redirect is followed. Check the URL and any proxy.
A certificate is wrong.
    `UnavailableError` says what is wrong with it. Nothing was sent: check the CA bundle.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any


class RefreshError(Exception):
    """
    Anything this package raises on purpose.

    An error holds no secret and no object of the HTTP library, so you may log it, pickle it and paste it into a public
    issue. Its message quotes nothing that the service wrote but the name or number of an error.

    Attributes:
        provider: ``"kuzzle"`` or ``"circle"``.
        status: The HTTP status, if there was a response.
        code: The service's own number for the error, if it gave one.
        id: Kuzzle's own name for the error (``"security.token.invalid"``), if it looks like a name.
        request_id: Names the request in the service's logs, if anything does.
        retry_after: How many seconds the service asked to wait, at most an hour.
        spent: Whether the credential that was sent is used up. None if nobody knows.
        idempotency_key: What Circle's request carried, or has to carry next, if Circle asks for another than ours. A
            request with the same key is the same request.
        retryable: Whether it may help, and can do no harm, to send at once again what was sent. Whether to call again
            later, the class says.
    """

    _is_elsewhere = False  # another process may refresh the token, and this one has sent nothing

    def __init__(
        self,
        message: str,
        *,
        provider: str | None = None,
        status: int | None = None,
        code: int | None = None,
        id: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        spent: bool | None = None,
        idempotency_key: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.provider, self.status, self.code, self.id = provider, status, code, id
        self.request_id, self.retry_after, self.spent = request_id, retry_after, spent
        self.idempotency_key, self.retryable = idempotency_key, retryable

    def _render_traceback_(self) -> list[str]:
        """Show in a notebook which of the user's own lines failed, and why. Our frames and IPython's say nothing."""
        import traceback

        here = str(Path(__file__).parent)
        frames = traceback.extract_tb(self.__traceback__)
        before = itertools.takewhile(lambda frame: not frame.filename.startswith(here), frames)
        others = f"{os.sep}IPython{os.sep}", f"{os.sep}requests{os.sep}"
        own = [frame for frame in before if not any(other in frame.filename for other in others)]
        return "".join([*traceback.format_list(own), f"{type(self).__name__}: {self}"]).splitlines()


class SignInRequiredError(RefreshError):
    """The service refused the newest token, and the store has no newer one: sign in again."""


class UnavailableError(RefreshError):
    """The service or the store is down or busy. Nothing was spent: try again later."""


class OutcomeUnknownError(RefreshError):
    """
    The request was sent, but no usable response came in time. The token may be spent.

    Call again. A refresh that goes on puts its result into the cache. On Circle, the same ``idempotency_key`` brings
    a lost response back.
    """


class RequestRefusedError(RefreshError):
    """The arguments, the API key or the user's rights are wrong. Nothing was spent: fix the call."""


class InvalidArgumentError(RequestRefusedError, ValueError):
    """An argument is wrong. It was found before anything was sent: fix the call."""

    def __init__(self, message: str, *, spent: bool | None = False, **details: Any) -> None:
        super().__init__(message, spent=spent, **details)


class ReplyError(RefreshError):
    """Something other than the service answered, or without a token: check the URL and any proxy."""
