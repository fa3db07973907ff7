"""One Circle refresh, and the exchange of a user id before it: the requests written down, the replies read."""

from __future__ import annotations

import hashlib
import json
import uuid

import attrs

from ._checks import Checks
from ._http import Reply, Request, failure, unrecognized
from .errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)
from .tokens import UserToken

check = Checks("circle")

# Documented. Nothing in the reply tells, unless the user token is a JWT that does.
_LIFETIME = 60 * 60 * 1000

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
    156020: (RequestRefusedError, False),  # use a new idempotency key
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
    request_id: str


def prepare(
    *,
    base_url: object,
    api_key: object,
    user_token: object,
    user_id: object,
    refresh_token: object,
    device_id: object,
    idempotency_key: object,
    request_id: object,
) -> Call:
    """
    Check the arguments of a call.

    Raises:
        InvalidArgumentError: An argument is wrong.
    """
    if (user_token is None) == (user_id is None):
        check.fail("user_token or user_id", "must be given, and not both")
    who = check.token("user_token", user_token) if user_id is None else check.text("user_id", user_id, 5, 50)
    secret = check.token("refresh_token", refresh_token)
    device = check.token("device_id", device_id)
    if idempotency_key is None:
        # Derived, not drawn: the same call has the same key, also after a crash and on another machine. None
        # of the parts can hold a line break, so no two calls share one.
        digest = hashlib.sha256(f"{who}\n{secret}\n{device}".encode()).digest()
        idempotency_key = uuid.UUID(bytes=digest[:16], version=4)
    return Call(
        base_url=check.url("base_url", base_url, https=True),
        api_key=check.token("api_key", api_key),
        user_token=who if user_id is None else None,
        user_id=None if user_id is None else who,
        refresh_token=secret,
        device_id=device,
        idempotency_key=check.uuid("idempotency_key", idempotency_key),
        request_id=str(uuid.uuid4()) if request_id is None else check.uuid("request_id", request_id),
    )


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


def parse_exchange(reply: Reply, request: Request) -> str:
    """
    Read the user token.

    Raises:
        RefreshError: There is none.
    """
    try:
        return check.token("userToken", _data(reply, request).get("userToken"))
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


def parse(reply: Reply, request: Request) -> UserToken:
    """
    Read the reply. Only the user token has to be in it; a member that is no string counts as missing.

    Raises:
        RefreshError: There is no user token in it.
    """
    values: dict[str, object] = {
        "refreshToken": request.credential,
        **{name: value for name, value in _data(reply, request).items() if value and isinstance(value, str)},
        "expiresAt": reply.sent_at * 1000 + _LIFETIME,
    }
    try:
        return UserToken.from_dict(values)
    except InvalidArgumentError:
        pass
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
