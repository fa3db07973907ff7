"""
What a service is to the rest of the package. Each has one module here, and knows nothing of the network.

A module defines a credential: what it sends to be refreshed, how it reads the reply, what each error means.
"""

# What a Protocol asks for has no body.
# pyright: reportReturnType=false

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, ClassVar, Protocol, Self, TypeVar

import attrs

from .._text import Secret, is_uuid, json_object, read_date, reveal
from ..errors import (
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)


class Token(Protocol):
    """What a refresh yields."""

    @property
    def fingerprint(self) -> str:
        """What the log calls it: tells it from another without revealing either."""

    @property
    def expires_at(self) -> datetime | None:
        """When it expires, by the service's clock. None: never."""

    def to_dict(self) -> dict[str, Any]:
        """Write it down."""


R = TypeVar("R", bound="Token | str")  # what a request yields: a token, or for the log what was done
T = TypeVar("T", bound=Token)
T_co = TypeVar("T_co", bound=Token, covariant=True)

# Of a request, by name.
Headers = Mapping[str, str | Secret[str]]

# For how long a service may ask to be left alone, in seconds.
_LONGEST_WAIT = 3600.0


@attrs.frozen(kw_only=True)
class Request:
    """
    A POST, written down. Values of headers and cookies, and the body, may be a `Secret`.

    Args:
        service: ``"kuzzle"`` or ``"circle"``, for errors and logs.
        secret: The credential that it refreshes.
        request_id: Names it in the service's logs.
        cookies: Cookies by name: what to send, or None to hold back the session's own.
        idempotency_key: What makes a repetition the same request.
        spends: Whether it may use up the credential.
    """

    service: str
    url: str
    headers: Headers
    secret: Secret[str]
    request_id: str
    cookies: Mapping[str, Secret[str] | None] = attrs.field(factory=dict)
    body: Secret[bytes] | None = None
    idempotency_key: str | None = None
    spends: bool = True


@attrs.frozen(kw_only=True)
class Reply:
    """What came back. *requested_at* is when the request left, in seconds since 1970 by the local clock."""

    status: int
    headers: Mapping[str, str] = attrs.field(repr=False)
    cookies: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    body: bytes = attrs.field(repr=False)
    requested_at: float

    def json(self) -> Secret[dict[str, Any]]:
        """Read the body as a JSON object. Anything else reads as an empty one. It may quote what was sent."""
        return Secret(json_object(self.body))

    @property
    def date(self) -> float | None:
        """When the service sent it, in seconds since 1970 by the service's own clock."""
        return read_date(self.headers.get("Date"))


@attrs.frozen
class Caller:
    """
    Who waits for a reply. What its functions raise is raised by `Runtime.send`.

    Args:
        answer_by: Returns until when to wait, for the connection and then for the answer, by `Runtime.steady`. Asked
            again and again, since that may change meanwhile; `math.inf` means no limit.
        depart: Called once, when the connection stands and before the first byte leaves. If it raises, nothing was
            sent.
        idle: Called now and then while no answer comes. Not if a session is lent: its adapter might keep what is sent
            again until the first request is over, and send it then, for nobody.
    """

    answer_by: Callable[[], float]
    depart: Callable[[], None] = lambda: None
    idle: Callable[[], None] = lambda: None


class Send(Protocol):
    """Sends a request, again if need be, and reads the reply."""

    @property
    def retry(self) -> bool:
        """Whether to send more than once."""

    def __call__(self, request: Request, parse: Callable[[Reply, Request], R], /) -> tuple[R, Reply]:
        """Send a request, and read the reply."""


class Credential(Protocol[T_co]):
    """
    A token that can be refreshed, and all that has to be sent with it. Adding a service means writing one of these.

    Refreshing it yields its successor, another credential. A credential, its successor, the successor of that and so
    on are a chain. All but `refresh` and `sign_out` is pure.
    """

    service: ClassVar[str]

    @property
    def keys(self) -> tuple[str, ...]:
        """What stores know it by: hashes of it, its own first."""

    @property
    def scope(self) -> str:
        """What a ``Retry-After`` is about: the service, and who has to wait."""

    @property
    def secret(self) -> Secret[str]:
        """What is spent."""

    @property
    def user(self) -> str | None:
        """Whose it is, if anything tells."""

    @property
    def token(self) -> T_co | None:
        """The result that it came in. None if the caller brought it."""

    @property
    def headers(self) -> Headers:
        """What a request carries that is made with it."""

    @property
    def idempotency_key(self) -> str | None:
        """What makes a repetition of its refresh the same request. None if nothing does."""

    @property
    def birth(self) -> float | None:
        """
        When it was issued, in whole seconds since 1970 by the service's clock, if a refresh within that second
        would end the session. None if it would not.
        """

    @property
    def can_expire(self) -> bool:
        """Whether it is ever to be refreshed."""

    @property
    def requested(self) -> float | None:
        """The lifetime that is asked for its successor, in seconds. None if the service decides."""

    @property
    def lifetime(self) -> float:
        """For how many seconds it is valid, from when it was asked for."""

    @property
    def refreshable_for(self) -> float:
        """For how many seconds it can be refreshed, from when it was asked for."""

    def key_for(self, anew: str, /) -> str | None:
        """Return the idempotency key to send. *anew* tells it from requests that were refused, if any were."""

    def refresh(self, send: Send, /, *, key: str | None) -> Self:
        """Spend it, and return its successor. *key*: the idempotency key to send. None means its own."""

    def sign_out(self, send: Send, /) -> None:
        """
        End the session at the service, if there is such a thing there.

        Raises:
            SignInRequiredError: The service does not know this token any more.
            RefreshError: The session may live on.
        """

    @property
    def expiry(self) -> float | None:
        """When it expires, in seconds since 1970 by the service's clock, if it says."""

    def read(self, values: Mapping[str, Any], /) -> T_co:
        """
        Read a successor's token from a store.

        Raises:
            InvalidArgumentError: It is malformed, or of another user.
        """

    def following(self, token: Any, /) -> Self:
        """Return the credential for a successor's token: what is sent with it stays as it is."""

    def unspent(self) -> Self | None:
        """Return it with a result of its own, to be used while it is valid. None if it does not say how long."""

    def is_rejected(self, status: int, body: Mapping[str, Any], /) -> bool | None:
        """Whether an error means that it was not accepted. None if that is uncertain."""


@attrs.frozen
class Meaning:
    """
    What a reply means.

    Args:
        error: What is raised.
        spent: Whether the credential is used up. None if nobody knows.
        retry: Whether to send again: yes, no, or (None) only if that is the same request.
        what: What happened.
    """

    error: type[RefreshError]
    spent: bool | None = False
    retry: bool | None = False
    what: str = ""


SIGN_IN = Meaning(SignInRequiredError, None, what="no longer accepts this token: sign in again")
REFUSED = Meaning(RequestRefusedError, what="refused the request: check the arguments, keys and rights")
BUSY = Meaning(UnavailableError, retry=True, what="is busy or down: try again later")
UNREACHED = Meaning(UnavailableError, retry=True, what="could not be reached: check the URL, or try again later")
LOST = Meaning(OutcomeUnknownError, None, retry=True, what="did not answer, or only in part: call again")
FAILED = Meaning(OutcomeUnknownError, None, retry=None, what="failed, and does not say what it did: call again")
STRANGE = Meaning(ReplyError, None, what="or a proxy sent something unexpected: check the URL and any proxy")
FOREIGN = Meaning(ReplyError, what="or a proxy found nothing there: check the URL and any proxy")
REDIRECT = Meaning(ReplyError, what="or a proxy sent a redirect, which is not followed: check the URL")
_GATEWAY = attrs.evolve(FAILED, retry=True)  # the answer is lost, as if the connection had broken

# What a reply means by its status alone. Each service adds the exceptions that it makes by its own codes.
_BY_STATUS = {408: BUSY, 425: BUSY, 429: BUSY, 502: _GATEWAY, 503: BUSY, 504: _GATEWAY}


def meaning(status: int, known: Meaning | None = None, otherwise: Meaning = FOREIGN) -> Meaning:
    """
    Return what a reply means.

    Args:
        status: Its HTTP status.
        known: What the service's own code for the error means, if it has one.
        otherwise: What any other 4xx means, if the service itself wrote it.
    """
    return known or _BY_STATUS.get(status) or {3: REDIRECT, 4: otherwise, 5: FAILED}.get(min(status // 100, 5), STRANGE)


def failure(
    what: Meaning | str,
    request: Request,
    reply: Reply | None = None,
    *,
    code: object = None,
    id: str | None = None,
    reason: str = "",
) -> RefreshError:
    """
    Make the error of one exchange. No word of its message may come from the reply.

    Args:
        what: What the reply means, or what is wrong with a token in it.
        code: The ``code`` in the reply, if it is a number.
        id: The ``id`` in the reply, if it is spelled like a name.
        reason: The root cause.
    """
    case = attrs.evolve(STRANGE, what=what) if isinstance(what, str) else what
    kind, spent = case.error, case.spent
    if not request.spends:
        kind, spent = UnavailableError if kind is OutcomeUnknownError else kind, False
    number = code if type(code) is int and abs(code) < 2**31 else None
    status = reply.status if reply else None
    details = ", ".join(str(detail) for detail in (reason or None, status, id or number) if detail is not None)
    return kind(
        f"{request.service.title()} {case.what}" + (f" ({details})" if details else ""),
        provider=request.service,
        status=status,
        code=number,
        id=id,
        request_id=_request_id(request, reply) if reply else request.request_id,
        retry_after=_retry_after(reply) if reply else None,
        spent=spent,
        idempotency_key=request.idempotency_key,
        retryable=case.retry if case.retry is not None else request.idempotency_key is not None,
    )


def _request_id(request: Request, reply: Reply) -> str:
    """Return the id that the service gave to the request, unless it quotes what we sent: that could be a secret."""
    answered = reply.headers.get("X-Kuzzle-Request-Id") or reply.headers.get("X-Request-Id") or ""
    return answered if is_uuid(answered) and not quotes(request, answered) else request.request_id


def quotes(request: Request, text: str) -> bool:
    """Whether a text occurs in what was sent."""
    body = b"" if request.body is None else request.body.reveal()
    texts = request.url, *map(reveal, (request.secret, *request.headers.values()))
    return text.encode() in body or any(text in sent for sent in texts)


def _retry_after(reply: Reply) -> float | None:
    """Read ``Retry-After``, in seconds from now. A slip of a proxy must not bind everybody for years."""
    value = reply.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", value):
        return min(float(value), _LONGEST_WAIT)
    date = read_date(value)
    # By the service's own clock: ours may be hours off.
    return None if date is None or reply.date is None else min(max(0.0, date - reply.date), _LONGEST_WAIT)
