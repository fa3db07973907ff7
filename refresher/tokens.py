"""What a refresh yields: KuzzleToken and UserToken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

import attrs

from ._checks import Fields
from ._notebook import Printer, as_html, as_text
from ._text import claims, fingerprint, hide_all, masked
from .errors import RefreshError

State = Literal["fresh", "due", "expired", "refused", "unknown"]
Outcome = Literal["refreshed", "adopted", "kept", "refused", "unknown", "down"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MILLISECOND
_LONGEST = timedelta.max // _MILLISECOND


def instant(milliseconds: float) -> datetime:
    """Turn milliseconds since 1970 into a datetime. Before 1970 is 1970, and after the year 9999 its end."""
    return _EPOCH + timedelta(milliseconds=math.floor(max(0, min(milliseconds, _LAST))))


def duration(milliseconds: float) -> timedelta:
    """Turn milliseconds into a timedelta, of no less than zero and no more than it can hold."""
    return timedelta(milliseconds=math.floor(max(0, min(milliseconds, _LONGEST))))


def _to_milliseconds(when: datetime | None) -> int:
    return -1 if when is None else (when - _EPOCH) // _MILLISECOND


class _Token:
    """
    What both tokens have in common.

    They compare on their own: pytest takes apart what attrs compares, and would show secrets.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return attrs.astuple(self) == attrs.astuple(other)  # type: ignore[arg-type]  # each of them is an attrs class

    def __hash__(self) -> int:
        return hash(attrs.astuple(self))  # type: ignore[arg-type]

    def _rows(self) -> dict[str, str]:
        """List what a notebook shows: the time it has left, and no secret."""
        values = ((field, getattr(self, field.name)) for field in attrs.fields(type(self)))  # type: ignore[arg-type]
        rows = {field.name: str(field.repr(value) if callable(field.repr) else value) for field, value in values}
        expires_at: datetime | None = getattr(self, "expires_at", None)
        if expires_at is None:
            return {**rows, "expires_at": "never", "time left": "unlimited"}
        left = max(expires_at - datetime.now(UTC), timedelta(0))
        rows["expires_at"] = f"{expires_at:%Y-%m-%d %H:%M:%S} UTC"
        return {**rows, "time left": str(left - left % timedelta(seconds=1))}

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _repr_pretty_(self, printer: Printer, cycle: bool) -> None:  # noqa: ARG002
        printer.text(as_text(type(self).__name__, self._rows()))


@attrs.frozen(eq=False)
class KuzzleToken(_Token):
    """
    A Kuzzle session token. *jwt* is masked in ``repr()`` and in notebooks.

    Attributes:
        kuid: The user's id.
        jwt: The token, with its prefix ``kauth-``. None in cookie mode: it is in the session's cookie jar.
        expires_at: When the token expires by Kuzzle's clock: an aware datetime, in UTC. None means never.
        ttl: How long it is valid, from when it was issued. None means for ever.

    Example:
        >>> token = KuzzleToken("foo", "kauth-e30", expires_at=None, ttl=None)
        >>> token
        KuzzleToken(kuid='foo', jwt=<secret eb04a126>, expires_at=None, ttl=None)
        >>> KuzzleToken.from_dict(token.to_dict()) == token
        True
    """

    kuid: str
    jwt: str | None = attrs.field(repr=masked)
    expires_at: datetime | None
    ttl: timedelta | None

    _repr_pretty_ = _Token._repr_pretty_  # IPython prefers a class's own repr() to what it inherits

    @property
    def fingerprint(self) -> str:
        """Eight digits that tell tokens apart without revealing them. In cookie mode all have the same."""
        return fingerprint(self.jwt or "")

    def to_dict(self) -> dict[str, object]:
        """Return the token, unmasked, in Kuzzle's own JSON: ``_id``, ``expiresAt`` and ``ttl`` in ms, ``jwt``."""
        return {
            "_id": self.kuid,
            "expiresAt": _to_milliseconds(self.expires_at),
            **({} if self.jwt is None else {"jwt": self.jwt}),
            "ttl": -1 if self.ttl is None else self.ttl // _MILLISECOND,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> KuzzleToken:
        """
        Read what `to_dict` wrote, or the ``result`` of Kuzzle's answer to a login or a refresh.

        The token expires at the earlier of ``expiresAt`` and the JWT's own ``exp``: Kuzzle's ``expiresAt``
        is up to two seconds late, and the JWT is what Kuzzle goes by.

        Raises:
            InvalidArgumentError: A member is missing or malformed.
        """
        (values,) = hide_all(values)
        fields = Fields("kuzzle", values)
        kuid = fields.text("_id")
        jwt = fields.token("jwt") if fields.has("jwt") else None
        expires_at, ttl = fields.milliseconds("expiresAt"), fields.milliseconds("ttl")
        exp = None if jwt is None else claims(jwt).exp
        ends = [] if expires_at == -1 else [instant(expires_at)]
        ends += [] if exp is None else [instant(exp * 1000)]
        return cls(
            kuid=kuid,
            jwt=None if jwt is None else jwt.reveal(),
            expires_at=min(ends, default=None),
            ttl=None if ttl == -1 else duration(ttl),
        )


@attrs.frozen(eq=False)
class UserToken(_Token):
    """
    A Circle user token, and the refresh token to use next. Secrets are masked in ``repr()`` and in notebooks.

    Attributes:
        user_token: What authorizes the user's requests (``X-User-Token``).
        encryption_key: What Circle's client SDKs ask for beside it. None if Circle sent none.
        user_id: The user's id. None if Circle sent none.
        refresh_token: The one to use next: the new one, or the one that was sent if none came.
        expires_at: When *user_token* expires: an aware datetime, in UTC.

    Example:
        >>> token = UserToken.from_dict({"userToken": "u", "refreshToken": "r", "expiresAt": 1795293527300})
        >>> print(token.expires_at, token.to_dict()["refreshToken"])
        2026-11-21 20:38:47.300000+00:00 r
    """

    user_token: str = attrs.field(repr=masked)
    encryption_key: str | None = attrs.field(repr=masked)
    user_id: str | None
    refresh_token: str = attrs.field(repr=masked)
    expires_at: datetime

    _repr_pretty_ = _Token._repr_pretty_  # IPython prefers a class's own repr() to what it inherits

    @property
    def fingerprint(self) -> str:
        """Eight digits that tell pairs apart without revealing them."""
        return fingerprint(self.refresh_token)

    def to_dict(self) -> dict[str, object]:
        """Return the token, unmasked, in Circle's own JSON, and ``expiresAt`` in ms, which Circle leaves out."""
        values = {
            "userToken": self.user_token,
            "encryptionKey": self.encryption_key,
            "userID": self.user_id,
            "refreshToken": self.refresh_token,
            "expiresAt": _to_milliseconds(self.expires_at),
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> UserToken:
        """
        Read what `to_dict` wrote, or the ``data`` of Circle's answer where its user token is a JWT.

        A JWT's own ``exp`` takes precedence over ``expiresAt``. Null and ``""`` stand for a missing member.

        Raises:
            InvalidArgumentError: A member is missing or malformed.
        """
        (values,) = hide_all(values)
        fields = Fields("circle", values)
        user_token = fields.token("userToken")
        exp = claims(user_token).exp
        return cls(
            user_token=user_token.reveal(),
            encryption_key=fields.text("encryptionKey") if fields.has("encryptionKey") else None,
            user_id=fields.text("userID") if fields.has("userID") else None,
            refresh_token=fields.token("refreshToken").reveal(),
            expires_at=instant(fields.milliseconds("expiresAt") if exp is None else exp * 1000),
        )


@attrs.frozen(kw_only=True)
class SessionStatus:
    """
    What is known of a session, without its secrets.

    Attributes:
        provider: ``"kuzzle"`` or ``"circle"``.
        user: The user's id. None if nobody told.
        fingerprint: Tells the newest token from others. It is what logs call it.
        state: ``"fresh"``: the next call returns the newest token. ``"due"``: it is valid, and the next call refreshes
            it. ``"expired"``: it is not valid any more. Circle refreshes it all the same, Kuzzle does not.
            ``"refused"``: the service has refused it lately. ``"unknown"``: the session was never refreshed here, or it
            was forgotten.
        expires_at: When the newest token dies, in UTC by the service's clock. None: never, or nobody knows.
        generation: How many tokens of the session there have been after its first.
    """

    provider: str
    user: str | None
    fingerprint: str
    state: State
    expires_at: datetime | None
    generation: int

    def to_dict(self) -> dict[str, object]:
        """Write it down, for JSON: ``expires_at`` in the form of ISO 8601."""
        when = None if self.expires_at is None else self.expires_at.isoformat()
        return {**attrs.asdict(self), "expires_at": when}


@attrs.frozen(kw_only=True)
class RefreshEvent:
    """
    What came of one refresh, for counters and alarms. It holds no secret.

    Attributes:
        provider: ``"kuzzle"`` or ``"circle"``.
        fingerprint: Tells the token that was to be refreshed from others.
        successor: The fingerprint of the newest token, if it is new. None if there is none.
        outcome: ``"refreshed"``: there is a new token. ``"adopted"``: another process had refreshed it. ``"kept"``: the
            refresh failed, and the old token is still valid. ``"refused"``: the service does not accept it. ``"down"``:
            the service or the store is down, and nothing was spent. ``"unknown"``: no usable answer came, and the token
            may be spent.
        spent: Whether the token is used up. None if nobody knows.
        attempts: How many requests were sent or tried.
        seconds: How long it took.
        error: What the callers were told, or would have been. None if it succeeded.

    Counters for Prometheus::

        from prometheus_client import Counter, Histogram

        refreshes = Counter("refreshes", "Refreshes of session tokens", ["provider", "outcome"])
        seconds = Histogram("refresh_seconds", "How long they took", ["provider"])

        def count(event):
            refreshes.labels(event.provider, event.outcome).inc()
            seconds.labels(event.provider).observe(event.seconds)

        cache = TokenCache(on_event=count)

    An event of the current span of OpenTelemetry, since the context of the call is there::

        from opentelemetry import trace

        def note(event):
            attributes = {"provider": event.provider, "outcome": event.outcome, "attempts": event.attempts}
            trace.get_current_span().add_event("refresh", attributes)

        cache = TokenCache(on_event=note)
    """

    provider: str
    fingerprint: str
    successor: str | None
    outcome: Outcome
    spent: bool | None
    attempts: int
    seconds: float
    error: RefreshError | None
