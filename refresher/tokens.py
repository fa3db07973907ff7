"""What a refresh yields: KuzzleToken and UserToken."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import attrs

from ._checks import Checks
from ._notebook import Printer, as_html, as_text

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MILLISECOND
_LONGEST = timedelta.max // _MILLISECOND


def fingerprint(secret: str) -> str:
    """Tell two secrets apart without telling either."""
    return hashlib.sha256(secret.encode()).hexdigest()[:8]


def key_of(*parts: str) -> str:
    """Make a key of a credential, from which nobody can tell the parts. They have no line breaks in them."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def number(value: object) -> float | None:
    """Take a finite number out of JSON. True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def claims(token: str) -> dict[str, float]:
    """
    Read when a JWT was issued (``iat``) and when it dies (``exp``), in seconds since 1970.

    What it does not tell is left out. Nobody checks the signature here: that's the service's business.
    """
    payload = _payload(token)
    found = {name: number(payload.get(name)) for name in ("iat", "exp")}
    # Beyond that, Python can't count in seconds and milliseconds alike.
    return {name: value for name, value in found.items() if value is not None and abs(value) < 1e300}


def subject(token: str) -> str | None:
    """Read whose a Kuzzle JWT is, where it tells."""
    kuid = _payload(token).get("_id")
    return kuid if isinstance(kuid, str) else None


@functools.lru_cache(maxsize=16)
def _payload(token: str) -> Mapping[str, object]:
    """Read what a JWT says. For one refresh the same two are read several times."""
    try:
        payload = token.split(".")[1]
        values = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def lifespan(token: str, otherwise: float) -> float:
    """
    Tell how many seconds a JWT lives from its birth, if it does.

    Its times are whole seconds, so it was born up to a second later than it says and dies that much younger.
    """
    known = claims(token)
    return max(0.0, known["exp"] - known["iat"] - 1) if {"exp", "iat"} <= known.keys() else otherwise


def instant(milliseconds: float) -> datetime:
    """Turn milliseconds since 1970 into a datetime. Before 1970 is 1970, and after the year 9999 its end."""
    return _EPOCH + timedelta(milliseconds=math.floor(max(0, min(milliseconds, _LAST))))


def duration(milliseconds: float) -> timedelta:
    """Turn milliseconds into a timedelta, of no less than zero and no more than it can hold."""
    return timedelta(milliseconds=math.floor(max(0, min(milliseconds, _LONGEST))))


def _to_milliseconds(when: datetime | None) -> int:
    return -1 if when is None else (when - _EPOCH) // _MILLISECOND


def masked(secret: str | None) -> str:
    """Stand in for a secret where people look."""
    return "None" if secret is None else f"<secret {fingerprint(secret)}>"


def _rows(token: KuzzleToken | UserToken) -> dict[str, str]:
    """List what a notebook shows of a token: the time it has left, and no secret."""
    values = ((field, getattr(token, field.name)) for field in attrs.fields(type(token)))
    rows = {field.name: (field.repr if callable(field.repr) else str)(value) for field, value in values}
    if token.expires_at is None:
        return {**rows, "expires_at": "never", "time left": "unlimited"}
    left = max(token.expires_at - datetime.now(UTC), timedelta(0))
    return {
        **rows,
        "expires_at": f"{token.expires_at:%Y-%m-%d %H:%M:%S} UTC",
        "time left": str(left - left % timedelta(seconds=1)),
    }


def _html(token: KuzzleToken | UserToken) -> str:
    return as_html(type(token).__name__, _rows(token))


def _pretty(token: KuzzleToken | UserToken, printer: Printer, cycle: bool) -> None:  # noqa: ARG001
    printer.text(as_text(type(token).__name__, _rows(token)))


@attrs.frozen
class KuzzleToken:
    """
    A Kuzzle session token. *jwt* is masked in ``repr()`` and in notebooks.

    Args:
        kuid: The user's id.
        jwt: The token, with its prefix ``kauth-``. None in cookie mode: it's in the session's cookie jar.
        expires_at: When the token dies, in UTC by Kuzzle's clock. None: never.
        ttl: How long it lives from its birth. None: for ever.

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

    _repr_html_ = _html
    _repr_pretty_ = _pretty

    def to_dict(self) -> dict[str, object]:
        """Write the token down, unmasked, as Kuzzle does: ``_id``, ``expiresAt`` and ``ttl`` in ms, ``jwt``."""
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

        The token dies at the earlier of ``expiresAt`` and the JWT's own ``exp``: Kuzzle's ``expiresAt``
        is up to two seconds late, and the JWT is what Kuzzle goes by.

        Raises:
            InvalidArgumentError: A member is missing or malformed.
        """
        check = Checks("kuzzle")
        kuid = check.text("_id", values.get("_id"))
        jwt = None if values.get("jwt") is None else check.token("jwt", values["jwt"])
        expires_at, ttl = (number(values.get(name)) for name in ("expiresAt", "ttl"))
        if expires_at is None or ttl is None:
            check.fail("ttl" if ttl is None else "expiresAt", "must be a number of milliseconds")
        exp = claims(jwt or "").get("exp")
        ends = [] if expires_at == -1 else [instant(expires_at)]
        ends += [] if exp is None else [instant(exp * 1000)]
        return cls(
            kuid=kuid,
            jwt=jwt,
            expires_at=min(ends, default=None),
            ttl=None if ttl == -1 else duration(ttl),
        )


@attrs.frozen
class UserToken:
    """
    A Circle user token, and the refresh token to use next. Secrets are masked in ``repr()`` and in notebooks.

    Args:
        user_token: What authorizes the user's requests (``X-User-Token``).
        encryption_key: What Circle's client SDKs ask for beside it. None if Circle sent none.
        user_id: The user's id. None if Circle sent none.
        refresh_token: The one to use next: the new one, or the one that was sent if none came.
        expires_at: When *user_token* dies, in UTC.

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

    _repr_html_ = _html
    _repr_pretty_ = _pretty

    def to_dict(self) -> dict[str, object]:
        """Write the token down, unmasked, as Circle does, and ``expiresAt`` in ms, which Circle leaves out."""
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

        A JWT's own ``exp`` goes before ``expiresAt``. Null and ``""`` stand for a missing member.

        Raises:
            InvalidArgumentError: A member is missing or malformed.
        """
        check = Checks("circle")
        user_token = check.token("userToken", values.get("userToken"))
        exp = claims(user_token).get("exp")
        expires_at = number(values.get("expiresAt")) if exp is None else exp * 1000
        if expires_at is None:
            check.fail("expiresAt", "must be a number of milliseconds")
        return cls(
            user_token=user_token,
            encryption_key=check.token("encryptionKey", values["encryptionKey"])
            if values.get("encryptionKey")
            else None,
            user_id=check.text("userID", values["userID"]) if values.get("userID") else None,
            refresh_token=check.token("refreshToken", values.get("refreshToken")),
            expires_at=instant(expires_at),
        )
