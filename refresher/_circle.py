"""One Circle refresh, and the exchange of a user id before it: the requests written down, the replies read."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import ClassVar

import attrs

from ._checks import Checks
from ._wire import Reply, Request, failure, new_id, unrecognized
from .errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)
from .tokens import UserToken, claims, key_of, lifespan, masked

check = Checks("circle")

BASE_URL = "https://api.circle.com"

# Documented. Nothing in the reply tells, unless the user token is a JWT that does. In seconds.
_LIFETIME = 60 * 60.0
# Undocumented: an assumption.
_REFRESH_LIFETIME = 30 * 86400.0
# How long the token of an exchange is used.
_EXCHANGED = 50 * 60.0

# The user token is unknown, expired or invalid: one that a user id was exchanged for is of no more use.
STALE = (155103, 155104, 155105)
# The idempotency key was used for something else, or too long ago. A new one is drawn, if nobody gave this one.
NEW_KEY = 156020

# What is about the arguments, the API key or the rate. Any other refusal with a 4xx means: sign in again.
_MEANINGS: dict[int, tuple[type[RefreshError], bool | None]] = {
    -1: (OutcomeUnknownError, None),  # "Something went wrong."
    2: (RequestRefusedError, False),  # a parameter is invalid
    3: (RequestRefusedError, False),  # the API key may not do this
    5: (UnavailableError, False),  # too many requests
    401: (RequestRefusedError, False),  # the API key is malformed or wrong
    155113: (RequestRefusedError, False),  # the device id is not found
    155137: (RequestRefusedError, False),  # the device id is invalid
    156006: (RequestRefusedError, False),  # a test key on live data
    156007: (RequestRefusedError, False),  # a live key on test data
    NEW_KEY: (RequestRefusedError, False),
}


@attrs.frozen(kw_only=True)
class Call:
    """The arguments of one call, checked."""

    base_url: str
    api_key: str = attrs.field(repr=False)
    user_token: str | None = attrs.field(repr=False)
    user_id: str | None
    refresh_token: str = attrs.field(repr=False)
    device_id: str
    idempotency_key: str
    key_is_final: bool
    request_id: str
    key: str = attrs.field(init=False, eq=False)

    provider: ClassVar[str] = "circle"
    kind: ClassVar[str] = ""
    read = staticmethod(UserToken.from_dict)

    @property
    def who(self) -> str:
        """The user token, or the user id."""
        return self.user_token or self.user_id or ""

    @key.default
    def _own_key(self) -> str:
        return _key(self.base_url, self.who, self.refresh_token, self.device_id)

    def following(self, last: UserToken) -> Call:
        """Say the same of a pair that has come of this call."""
        key = _derive(last.user_token, last.refresh_token, self.device_id)
        return attrs.evolve(
            self,
            user_token=last.user_token,
            refresh_token=last.refresh_token,
            user_id=None,
            idempotency_key=key,
            key_is_final=False,
        )

    def with_drawn_key(self) -> Call:
        """Take another idempotency key, unless the caller gave this one, or it was drawn already."""
        if self.key_is_final:
            return self
        return attrs.evolve(self, idempotency_key=new_id(), key_is_final=True)

    def keys(self, token: UserToken) -> list[str]:
        """List the keys of a pair that has come of this call: with its user token, and with the user id."""
        given = [token.user_token] if self.user_id is None else [token.user_token, self.user_id]
        return [_key(self.base_url, who, token.refresh_token, self.device_id) for who in given]

    def lifetime(self, token: UserToken) -> float:
        """Tell how many seconds a user token lives from its birth."""
        return lifespan(token.user_token, _LIFETIME)

    def useful(self, token: UserToken) -> float:
        """Tell for how many seconds a pair can be refreshed: as long as its refresh token lives."""
        known = claims(token.refresh_token)
        if "exp" not in known:
            return _REFRESH_LIFETIME
        return known["exp"] - known.get("iat", token.expires_at.timestamp() - self.lifetime(token))

    def is_young(self, last: UserToken | None, now: float) -> bool:  # noqa: ARG002
        """Tell that any token may be refreshed at once."""
        return False


def _derive(who: str, refresh_token: str, device_id: str) -> str:
    """
    Derive an idempotency key, so that the same call has the same one, also after a crash and elsewhere.

    None of the parts has a line break in it, so no two calls share one.
    """
    digest = hashlib.sha256(f"{who}\n{refresh_token}\n{device_id}".encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4))


def prepare(
    *,
    base_url: object,
    api_key: object,
    user_token: object,
    user_id: object,
    refresh_token: object,
    device_id: object,
    idempotency_key: object = None,
    request_id: object = None,
) -> Call:
    """
    Check the arguments of a call.

    Raises:
        InvalidArgumentError: An argument is wrong.
    """
    if (user_token is None) == (user_id is None):
        check.fail("user_token or user_id", "must be given, and not both")
    if not api_key:
        check.fail("api_key", "is missing: give it, or set CIRCLE_WEB3_API_KEY")
    who = check.token("user_token", user_token) if user_id is None else check.text("user_id", user_id, 5, 50)
    secret = check.token("refresh_token", refresh_token)
    device = check.token("device_id", device_id)
    return Call(
        base_url=check.url("base_url", base_url, https=True),
        api_key=check.token("api_key", api_key),
        user_token=who if user_id is None else None,
        user_id=None if user_id is None else who,
        refresh_token=secret,
        device_id=device,
        idempotency_key=_derive(who, secret, device)
        if idempotency_key is None
        else check.uuid("idempotency_key", idempotency_key),
        key_is_final=idempotency_key is not None,
        request_id=new_id() if request_id is None else check.uuid("request_id", request_id),
    )


def _key(base_url: str, who: str, refresh_token: str, device_id: str) -> str:
    return key_of("circle", base_url, who, refresh_token, device_id)


def key(base_url: object, who: object, refresh_token: object, device_id: object) -> str:
    """Make the key of a credential. *who* is the user token or the user id."""
    return _key(
        check.url("base_url", base_url, https=True),
        check.text("user_token or user_id", who, longest=100_000),
        check.token("refresh_token", refresh_token),
        check.token("device_id", device_id),
    )


@attrs.frozen
class Exchanged:
    """What a user id was exchanged for."""

    user_token: str = attrs.field(repr=masked)

    def to_dict(self) -> dict[str, object]:
        """Write it down as Circle does."""
        return {"userToken": self.user_token}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Exchanged:
        """Read it."""
        return cls(check.token("userToken", values.get("userToken")))


@attrs.frozen
class Exchange:
    """The exchange before a call with a user id, as a call of its own."""

    call: Call

    provider: ClassVar[str] = "circle"
    # It's made while its call's own lock is held.
    kind: ClassVar[str] = "exchange-"
    idempotency_key: ClassVar[None] = None
    read = staticmethod(Exchanged.from_dict)

    @property
    def key(self) -> str:
        """The key of its result."""
        return key_of("circle exchange", self.call.base_url, self.call.api_key, self.call.who)

    def keys(self, token: Exchanged) -> list[str]:  # noqa: ARG002
        """List the keys of its result."""
        return [self.key]

    def lifetime(self, token: Exchanged) -> float:
        """Tell for how many seconds its result is used."""
        return min(_EXCHANGED, lifespan(token.user_token, _LIFETIME))

    useful = lifetime

    def is_young(self, last: Exchanged | None, now: float) -> bool:  # noqa: ARG002
        """Tell that it may be made at once."""
        return False


def build_exchange(call: Call) -> Request:
    """Write down the exchange of the user id for a user token. It spends nothing."""
    return Request(
        provider="circle",
        url=f"{call.base_url}/v1/w3s/users/token",
        headers={"Content-Type": "application/json", "X-Request-Id": call.request_id},
        credential=call.refresh_token,
        request_id=call.request_id,
        bearer=call.api_key,
        body=json.dumps({"userId": call.user_id}).encode(),
        spends=False,
    )


def parse_exchange(reply: Reply, request: Request) -> Exchanged:
    """
    Read the user token.

    Raises:
        RefreshError: There is none.
    """
    data = _data(reply, request)
    try:
        return Exchanged.from_dict(data)
    except InvalidArgumentError:
        pass
    raise failure(ReplyError, request, reply, spent=False, what="answered without a user token")


def build(call: Call, user_token: str) -> Request:
    """Write down the refresh."""
    body = {
        "idempotencyKey": call.idempotency_key,
        "refreshToken": call.refresh_token,
        "deviceId": call.device_id,
    }
    return Request(
        provider="circle",
        url=f"{call.base_url}/v1/w3s/users/token/refresh",
        headers={
            "Content-Type": "application/json",
            "X-Request-Id": call.request_id,
            "X-User-Token": user_token,
        },
        credential=call.refresh_token,
        request_id=call.request_id,
        bearer=call.api_key,
        body=json.dumps(body).encode(),
        idempotency_key=call.idempotency_key,
    )


def parse(reply: Reply, request: Request) -> tuple[UserToken, bool]:
    """
    Read the reply, and tell whether its user token was dead by the service's own clock.

    Only the user token has to be in it; a member that is no string counts as missing.

    Raises:
        RefreshError: There is no user token in it.
    """
    data = _data(reply, request)
    values: dict[str, object] = {
        "refreshToken": request.credential,
        **{name: value for name, value in data.items() if value and isinstance(value, str)},
        "expiresAt": (reply.sent_at + _LIFETIME) * 1000,
    }
    try:
        token = UserToken.from_dict(values)
    except InvalidArgumentError:
        token = None
    if token is not None:
        now = reply.date()
        return token, now is not None and claims(token.user_token).get("exp", now) < now
    raise failure(ReplyError, request, reply, spent=None, what="answered without a user token")


def _data(reply: Reply, request: Request) -> dict[str, object]:
    """Take ``data`` out of the reply, or raise what the reply means."""
    body = reply.json()
    if 200 <= reply.status < 300 and isinstance(data := body.get("data"), dict):
        return data
    code = body.get("code")
    if reply.status >= 400 and type(code) is int and "message" in body:
        raise _refusal(code, reply, request)
    raise unrecognized(request, reply)


def _refusal(code: int, reply: Reply, request: Request) -> RefreshError:
    if code in _MEANINGS:
        kind, spent = _MEANINGS[code]
    elif reply.status in (429, 503):
        kind, spent = UnavailableError, False
    elif reply.status >= 500:
        kind, spent = OutcomeUnknownError, None
    else:
        kind, spent = SignInRequiredError, None
    return failure(kind, request, reply, spent=spent, code=code)
