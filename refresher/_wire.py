"""Requests and replies as the providers see them, and the errors that replies mean. Nothing here is sent."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping

import attrs

from ._checks import is_uuid
from .errors import (
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)

__version__ = "0.1.0"


@attrs.frozen(kw_only=True)
class Request:
    """
    A POST, written down.

    Args:
        provider: ``"kuzzle"`` or ``"circle"``, for errors and logs.
        credential: The secret that this request is about.
        request_id: Names the request in the service's logs.
        bearer: Goes into ``Authorization``, past any ``.netrc``.
        cookies: Cookies by name: what to send, or None to hold back the session's own.
        idempotency_key: What makes a repetition the same request.
        spends: Whether the credential may be used up by it.
    """

    provider: str
    url: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    credential: str = attrs.field(repr=False)
    request_id: str
    bearer: str | None = attrs.field(default=None, repr=False)
    cookies: Mapping[str, str | None] = attrs.field(factory=dict, repr=False)
    body: bytes | None = attrs.field(default=None, repr=False)
    idempotency_key: str | None = None
    spends: bool = True


@attrs.frozen(kw_only=True)
class Reply:
    """What came back. *sent_at* is when the request left, in seconds since 1970 by the local clock."""

    status: int
    headers: Mapping[str, str] = attrs.field(repr=False)
    cookies: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    body: bytes = attrs.field(repr=False)
    sent_at: float

    def json(self) -> dict[str, object]:
        """Read the body as a JSON object: see `json_object`."""
        return json_object(self.body)

    def date(self) -> float | None:
        """Read when the service wrote it, in seconds since 1970 by the service's clock."""
        return instant_of(self.headers.get("Date", ""))


def json_object(text: bytes) -> dict[str, object]:
    """Read a JSON object. Anything else reads as an empty one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def new_id() -> str:
    """Draw a UUID v4."""
    return str(uuid.uuid4())


_WHAT: dict[type[RefreshError], str] = {
    SignInRequiredError: "does not accept the token any more: sign in again",
    UnavailableError: "is busy or down: try later",
    OutcomeUnknownError: "failed, and may have spent the token: try again",
    RequestRefusedError: "refused the request: look at the arguments, keys and rights",
    ReplyError: "or a proxy answered with something else than a token: look at the URL",
}


def failure(
    kind: type[RefreshError],
    request: Request,
    reply: Reply | None = None,
    *,
    spent: bool | None,
    what: str | None = None,
    code: object = None,
    id: str | None = None,
) -> RefreshError:
    """
    Make the error of one exchange.

    Args:
        what: What happened, if it is not what *kind* says. No word of it may come from the reply.
        code: The ``code`` of the reply, if it is a number.
        id: The ``id`` of the reply, if it is a known one.
    """
    if not request.spends:
        spent = False
        kind = UnavailableError if kind is OutcomeUnknownError else kind
    if isinstance(code, bool) or not isinstance(code, int) or abs(code) >= 2**31:
        code = None
    status = None if reply is None else reply.status
    details = ", ".join(str(detail) for detail in (status, id or code) if detail is not None)
    return kind(
        f"{request.provider.title()} {what or _WHAT[kind]}" + (f" ({details})" if details else ""),
        provider=request.provider,
        status=status,
        code=code,
        id=id,
        request_id=request.request_id if reply is None else _request_id(request, reply),
        retry_after=None if reply is None else _retry_after(reply),
        spent=spent,
        idempotency_key=request.idempotency_key,
    )


def unrecognized(request: Request, reply: Reply) -> RefreshError:
    """Make the error of a reply that the service itself did not write, or not as it should."""
    if reply.status in (429, 503):
        return failure(UnavailableError, request, reply, spent=False)
    if reply.status >= 500:
        return failure(OutcomeUnknownError, request, reply, spent=None)
    if 300 <= reply.status < 400:
        what = "or a proxy answered with a redirect, which is not followed"
        return failure(ReplyError, request, reply, spent=False, what=what)
    return failure(ReplyError, request, reply, spent=None if reply.status < 300 else False)


def _request_id(request: Request, reply: Reply) -> str:
    """Read the id the service gave to the request, unless it quotes what we sent: that could be a secret."""
    answered = reply.headers.get("X-Kuzzle-Request-Id") or reply.headers.get("X-Request-Id") or ""
    sent = f"{request.credential} {request.bearer} {[*request.headers.values()]} {request.body!r}"
    return answered if is_uuid(answered) and answered not in sent else request.request_id


def _retry_after(reply: Reply) -> float | None:
    """Read ``Retry-After``, in seconds from now."""
    value = reply.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    date = instant_of(value)
    return None if date is None else max(0.0, date - time.time())


def instant_of(text: str) -> float | None:
    """Read the date of a header, in seconds since 1970."""
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
