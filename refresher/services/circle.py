"""Circle: ``POST /v1/w3s/users/token/refresh``, and the exchange of a user id for a user token before it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import attrs

from .._checks import Checks
from .._text import Secret, claims, hide, key_of, number, reveal
from ..errors import InvalidArgumentError, RefreshError
from ..tokens import UserToken, instant
from . import BUSY, FAILED, REFUSED, SIGN_IN, Headers, Reply, Request, Send, failure, meaning

BASE_URL = "https://api.circle.com"
check: Checks = Checks("circle")

# In seconds, as documented. The reply does not say, unless the user token is a JWT.
_LIFETIME = 60 * 60.0
# Undocumented: an assumption.
_REFRESH_LIFETIME = 30 * 86400.0

# How far apart two times may be that count as one, in seconds: some are whole seconds.
_MOMENT = 2.0
# How many pairs in a row, issued when they were asked for, are no coincidence, whatever the local clock says.
_SURE = 5
# How many requests one refresh may take: a month of pairs, refreshed every hour, that have all expired.
_MOST_STEPS = 1000

# The idempotency key was used for something else, or too long ago.
_NEW_KEY = 156020
# What is about the arguments, the API key or the rate.
_MEANINGS = {
    -1: attrs.evolve(FAILED, retry=False),  # "Something went wrong."
    2: REFUSED,  # a parameter is invalid
    3: REFUSED,  # the API key may not do this
    5: BUSY,  # too many requests
    401: REFUSED,  # the API key is malformed or wrong
    155113: REFUSED,  # the device id is not found
    155137: REFUSED,  # the device id is invalid
    156006: REFUSED,  # a test key on live data
    156007: REFUSED,  # a live key on test data
    _NEW_KEY: REFUSED,
}
# Any other of these is about the user or the user's tokens.
_SIGN_IN = range(155000, 156000)


def _as_uuid(digest: str) -> str:
    return str(uuid.UUID(bytes=bytes.fromhex(digest)[:16], version=4))


@attrs.frozen(kw_only=True)
class CircleCredential:
    """
    A Circle refresh token, and all that has to be sent with it.

    Args:
        secret: The refresh token.
        user_id: What it was known by before there was a user token. It leads to the successors as well.
        given_key: The idempotency key to send. None means a derived one.
    """

    service: ClassVar[str] = "circle"
    birth = requested = None
    can_expire = True

    base_url: str
    api_key: Secret[str]
    user_token: Secret[str] | None
    user_id: str | None
    secret: Secret[str]
    device_id: str
    given_key: str | None = None
    request_id: str | None = attrs.field(default=None, eq=False)
    token: UserToken | None = attrs.field(default=None, eq=False)

    def _keys(self) -> tuple[str, ...]:
        # By the user's id first: calls by it and calls by a user token are about one session, and wait for each other.
        subject = claims(self.user_token).subject if self.user_token else None
        names = [who for who in (self.user or subject, self.user_token) if who is not None]
        return tuple(key_of("circle:2", self.base_url, who, self.secret, self.device_id) for who in names)

    keys: tuple[str, ...] = attrs.field(init=False, eq=False, repr=False, default=attrs.Factory(_keys, takes_self=True))

    @property
    def scope(self) -> str:
        """Circle limits rates for each API key."""
        return key_of("circle", self.base_url, self.api_key)

    @property
    def user(self) -> str | None:
        """The user's id."""
        return self.token.user_id if self.user_id is None and self.token else self.user_id

    @property
    def headers(self) -> Headers:
        """What a request carries that is made with it."""
        return {
            "Authorization": Secret(f"Bearer {self.api_key.reveal()}"),
            "X-User-Token": self.user_token or Secret(self.user_id or ""),
        }

    @property
    def idempotency_key(self) -> str:
        """
        What makes a repetition the same request, also after a crash and from another machine.

        None of the parts has a line break in it, so no two credentials share a key.
        """
        if self.given_key is not None:
            return self.given_key
        return _as_uuid(key_of(self.user_token or self.user_id or "", self.secret, self.device_id))

    def key_for(self, anew: str, /) -> str:
        """Return the idempotency key to send: another one, unless it was given. After a crash it is the same."""
        return _as_uuid(key_of(self.idempotency_key, anew)) if anew and not self.given_key else self.idempotency_key

    def refresh(self, send: Send, /, *, key: str | None) -> Self:
        """
        Spend it.

        If the user token in the answer has expired by Circle's own clock, the answer is that to an earlier run of this
        call, and nobody received it. That pair is refreshed in turn, until there is a valid one or time is up.
        """
        request_id = self.request_id or str(uuid.uuid4())
        first = step = attrs.evolve(self, given_key=key or self.given_key)
        user_token = step.user_token or Secret(send(step.exchange_request(request_id), parse)[0].user_token)
        last, alike, is_again, own = math.nan, 0, False, self.given_key
        for _ in range(_MOST_STEPS):
            try:
                pair, reply = send(step.request(user_token, request_id), step.parse)
            except RefreshError as error:
                last_key, is_first = step.idempotency_key, step.token is first.token
                if error.code == _NEW_KEY:
                    error.idempotency_key = (own if is_first else None) or _as_uuid(key_of(last_key, "refused"))
                if error.idempotency_key in (None, last_key) or is_again or not (own or send.retry):
                    # The key of a later step is none to send with this credential.
                    error.idempotency_key = error.idempotency_key if is_first else own
                    raise
                step, is_again = attrs.evolve(step, given_key=error.idempotency_key), True
            else:
                step, user_token, is_again = step.following(pair), Secret(pair.user_token), False
                # If two were issued when they were asked for, and are valid by the local clock, the `Date` is wrong.
                left = pair.expires_at.timestamp() - reply.requested_at
                alike = alike + 1 if abs(left - last) < _MOMENT else 1
                if alike >= (2 if left > 0 else _SURE) or not _has_expired(pair, reply):
                    return step
                last = left
        raise failure("keeps returning expired tokens: try again later", first.request(user_token, request_id))

    def sign_out(self, send: Send, /) -> None:
        """Do nothing: Circle has no sign-out."""

    def following(self, pair: UserToken, /) -> Self:
        """Return the credential for a successor's pair."""
        user_token, secret = Secret(pair.user_token), Secret(pair.refresh_token)
        if pair.user_id is None and self.user is not None:  # whose it is stays known
            pair = attrs.evolve(pair, user_id=self.user)
        return attrs.evolve(self, user_token=user_token, secret=secret, given_key=None, token=pair)

    def exchange_request(self, request_id: str) -> Request:
        """Write down the exchange of the user id for a user token. It spends nothing."""
        headers = {"Authorization": self.headers["Authorization"]}
        return self._post("/v1/w3s/users/token", request_id, headers, {"userId": self.user_id}, spends=False)

    def request(self, user_token: Secret[str], request_id: str) -> Request:
        """Write down the refresh."""
        key, headers = self.idempotency_key, {**self.headers, "X-User-Token": user_token}
        body = {"idempotencyKey": key, "refreshToken": self.secret, "deviceId": self.device_id}
        return self._post("/v1/w3s/users/token/refresh", request_id, headers, body, idempotency_key=key)

    def parse(self, reply: Reply, request: Request) -> UserToken:
        """Read the reply to the refresh: see `parse`. It has to be of the same user, as far as both say."""
        pair = parse(reply, request)
        if self._is_of_another(pair):
            raise failure("answered with a token of another user: check the URL and any proxy", request, reply)
        return pair

    def _is_of_another(self, pair: UserToken) -> bool:
        """Whether a pair is another user's. A JWT's ``sub`` counts if the pair shows that it is the user's id."""
        known = self.user
        if known is None and self.user_token and claims(Secret(pair.user_token)).subject == pair.user_id:
            known = claims(self.user_token).subject
        return None not in (known, pair.user_id) and known != pair.user_id

    def _post(self, path: str, request_id: str, headers: Headers, body: Mapping[str, Any], **others: Any) -> Request:
        return Request(
            service="circle",
            url=self.base_url + path,
            headers={**headers, "Content-Type": "application/json", "X-Request-Id": request_id},
            secret=self.secret,
            request_id=request_id,
            body=Secret(json.dumps(body, default=reveal).encode()),
            **others,
        )

    def read(self, values: Mapping[str, Any], /) -> UserToken:
        """Read a successor's pair from a store."""
        pair = UserToken.from_dict(values)
        check.need(not self._is_of_another(pair), "userToken", "must be of the same user")
        return pair

    @property
    def expiry(self) -> float | None:
        """When the user token expires, by Circle's clock, if it is a JWT that says."""
        return None if self.user_token is None else claims(self.user_token).exp

    @property
    def lifetime(self) -> float:
        """For how many seconds its user token is valid, from when it was asked for."""
        known = None if self.user_token is None else claims(self.user_token).lifetime
        return _LIFETIME if known is None else known

    @property
    def refreshable_for(self) -> float:
        """For how many seconds its refresh token is valid, from when it was asked for."""
        known = claims(self.secret)
        if known.exp is None or self.token is None:
            return _REFRESH_LIFETIME
        return known.exp - (self.token.expires_at.timestamp() - self.lifetime if known.iat is None else known.iat)

    def unspent(self) -> Self | None:
        """Return it with a result of its own, if its user token is a JWT that says how long it is valid."""
        if self.user_token is None or self.expiry is None or claims(self.user_token).iat is None:
            return None
        own = UserToken(self.user_token.reveal(), None, self.user_id, self.secret.reveal(), instant(1000 * self.expiry))
        return attrs.evolve(self, token=own)

    def is_rejected(self, status: int, body: Mapping[str, Any], /) -> bool:  # noqa: ARG002
        """Whether an error means that the user token is unknown, expired or invalid."""
        return body.get("code") in (155103, 155104, 155105)


def default_api_key(api_key: Any) -> Secret[str] | None:
    """Return the caller's API key, or that of the environment."""
    return hide(os.environ.get("CIRCLE_WEB3_API_KEY") if api_key is None else api_key)


def credential(
    refresh_token: object,
    device_id: object,
    api_key: Secret[str] | None,
    user_token: object = None,
    user_id: object = None,
    base_url: object = BASE_URL,
    idempotency_key: object = None,
    request_id: object = None,
) -> CircleCredential:
    """
    Check the arguments of a call.

    Raises:
        InvalidArgumentError: An argument is wrong.
    """
    check.need((user_token is None) != (user_id is None), "user_token or user_id", "must be given, but not both")
    if not api_key or not api_key.reveal():
        check.fail("api_key", "is missing: give it, or set CIRCLE_WEB3_API_KEY")
    return CircleCredential(
        base_url=check.url("base_url", base_url, https=True),
        api_key=check.token("api_key", api_key),
        user_token=None if user_token is None else check.token("user_token", user_token),
        user_id=None if user_id is None else check.text("user_id", user_id, 5, 50),
        secret=check.token("refresh_token", refresh_token),
        device_id=check.token("device_id", device_id).reveal(),
        given_key=None if idempotency_key is None else check.uuid("idempotency_key", idempotency_key),
        request_id=None if request_id is None else check.uuid("request_id", request_id),
    )


def parse(reply: Reply, request: Request) -> UserToken:
    """
    Read the reply to a refresh or an exchange.

    Only the user token has to be in it; a member that is no string counts as missing.

    Raises:
        RefreshError: There is no user token in it.
    """
    body = reply.json()
    data = Secret[Any](body.reveal().get("data"))
    if not 200 <= reply.status < 300 or not isinstance(data.reveal(), dict):
        code = number(body.reveal().get("code")) if "message" in body.reveal() else None
        if reply.status < 400 or type(code) is not int:
            raise failure(meaning(reply.status), request, reply)
        otherwise = SIGN_IN if code in _SIGN_IN else REFUSED
        raise failure(meaning(reply.status, _MEANINGS.get(code), otherwise), request, reply, code=code)
    with contextlib.suppress(InvalidArgumentError):
        return UserToken.from_dict(
            {
                "refreshToken": request.secret.reveal(),
                **{name: value for name, value in data.reveal().items() if value and isinstance(value, str)},
                "expiresAt": (reply.requested_at + _LIFETIME) * 1000,
            }
        )
    raise failure("answered without a user token: check the URL and any proxy", request, reply)


def _has_expired(token: UserToken, reply: Reply) -> bool:
    """Whether a user token had expired when the service sent it, or just about, by the service's own clock."""
    exp = claims(Secret(token.user_token)).exp
    return reply.date is not None and exp is not None and exp < reply.date + _MOMENT
