"""Kuzzle: ``POST /_refreshToken``, as version 2.56 was seen to do it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar, Self
from urllib.parse import quote

import attrs

from .._checks import Checks
from .._text import Secret, claims, hide, key_of, reveal
from ..errors import InvalidArgumentError
from ..tokens import KuzzleToken, duration, instant
from . import BUSY, FOREIGN, REFUSED, SIGN_IN, Headers, Reply, Request, Send, failure, meaning, quotes

COOKIE, NO_COOKIE = "authToken", "null"  # after a sign-out
check: Checks = Checks("kuzzle")

# The grammar of npm's `ms`, with which Kuzzle reads durations. ASCII, because JavaScript's \d and /i are.
_TIMESPAN = (
    r"(?ai)(?P<number>-?(?:\d+)?\.?\d+) *(?P<unit>milliseconds?|msecs?|ms|seconds?|secs?|s|minutes?|mins?|m"
    r"|hours?|hrs?|h|days?|d|weeks?|w|years?|yrs?|y)?"
)
_DAY = 86_400_000
_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": _DAY, "w": 7 * _DAY, "y": 365.25 * _DAY}
# Above this Redis refuses the lifetime (its times are 64 bits of milliseconds).
_LONGEST = 9.2e18
# Above this JavaScript cannot write the cookie's date, and Kuzzle finds out when the old token is spent.
_LONGEST_IN_COOKIE = 8.6e15

_ENDED = attrs.evolve(SIGN_IN, spent=False)
_BARE = attrs.evolve(SIGN_IN, what="does not accept a token without its prefix, kauth-: give all of it, or sign in")
_UNSEEN = attrs.evolve(FOREIGN, what="did not see the token: check the URL and any proxy")
# What an error means, where its status alone says something else.
_MEANINGS = {
    "plugin.strategy.missing_user": _ENDED,
    "security.cookie.unsupported": REFUSED,  # 500
    "security.rights.unauthorized": _UNSEEN,
    "security.token.expired": _ENDED,
    "security.token.invalid": SIGN_IN,  # expired, logged out, refreshed already: Kuzzle does not say which
    # Redis is down. (Token and cookie together have this id too, but are never sent together.) 500.
    "security.token.verification_error": BUSY,
    "services.cache.not_connected": BUSY,
    "services.cache.notconnected": BUSY,
    "services.cache.read_failed": BUSY,  # 500
    "services.cache.write_failed": BUSY,  # 500
}
# What may be quoted of an error: names like these. Messages may hold the jwt, and what is no name may be it.
_NAME = re.compile("[a-z_]+(?:\\.[a-z_]+){2}")


def milliseconds(timespan: str | timedelta) -> float | None:
    """
    Read a duration, a text as npm's ``ms`` does, which is what Kuzzle does. None if it is not one.

    Example:
        >>> milliseconds("1.5 hrs"), milliseconds("-1"), milliseconds("1mo")
        (5400000.0, -1.0, None)
    """
    if isinstance(timespan, timedelta):
        return timespan / timedelta(milliseconds=1)
    match = re.fullmatch(_TIMESPAN, timespan) if len(timespan) <= 100 else None
    if match is None:
        return None
    unit = (match["unit"] or "ms").lower()
    unit = "ms" if unit.startswith(("ms", "mil")) else unit[0]
    return float(match["number"]) * _UNITS[unit]


def _lifetime(value: Any, cookie_auth: bool) -> tuple[str | None, float | None]:
    """Accept a lifetime that Kuzzle understands and that does not end the session: as it is sent, and in seconds."""
    value = hide(value)  # it might be a secret in the wrong place
    if value is None:
        return None, None
    is_text = isinstance(reveal(value), str)
    if not is_text and not isinstance(reveal(value), timedelta):
        check.fail("expires_in", 'must be a string such as "2h" or "7200000ms", or a timedelta')
    lifetime = milliseconds(reveal(value))
    if lifetime is None:
        check.fail("expires_in", 'must be a number and a unit, such as "90s", "30m", "2h" or "1.5 days"')
    is_infinite = is_text and lifetime == -1
    if is_infinite and cookie_auth:
        check.fail("expires_in", "must not be -1 in cookie mode: the cookie would expire at once")
    if not is_infinite and not (lifetime >= 1000 and lifetime.is_integer()):
        check.fail("expires_in", "must be at least one second, in whole milliseconds; -1 means for ever")
    if lifetime > (_LONGEST_IN_COOKIE if cookie_auth else _LONGEST):
        check.fail("expires_in", "is longer than Kuzzle can count; -1 means for ever")
    text = check.string("expires_in", value).reveal() if is_text else str(int(lifetime))
    return text, math.inf if is_infinite else lifetime / 1000


@attrs.frozen(kw_only=True)
class KuzzleCredential:
    """
    A Kuzzle token, the jwt, and how it is to be refreshed.

    Args:
        requested: The lifetime asked for, in seconds. *expires_in* says it as Kuzzle is told.
        in_cookie: It travels in the session's cookie.
    """

    service: ClassVar[str] = "kuzzle"
    idempotency_key = None

    url: str
    secret: Secret[str]
    cookie_auth: bool = False
    expires_in: str | None = None
    requested: float | None = None
    trigger_events: bool = False
    strategy: str | None = None
    in_cookie: bool = False
    token: KuzzleToken | None = attrs.field(default=None, eq=False)

    def _keys(self) -> tuple[str, ...]:
        return (key_of("kuzzle:2", self.url, self.secret),)  # entries of version 0.1 are others

    keys: tuple[str, ...] = attrs.field(init=False, eq=False, repr=False, default=attrs.Factory(_keys, takes_self=True))

    @property
    def scope(self) -> str:
        """Kuzzle limits rates for each user, and is busy for all of them: a pause is for everybody."""
        return self.url

    @property
    def user(self) -> str | None:
        """The user's id."""
        return claims(self.secret).subject

    @property
    def headers(self) -> Headers:
        """What a request carries that is made with it."""
        return {"Authorization": Secret(f"Bearer {self.secret.reveal()}")}

    @property
    def birth(self) -> float | None:
        """
        Its ``iat``: within that second of Kuzzle's clock, a refresh to the same ``exp`` returns the token itself,
        which expires a second later.
        """
        known = claims(self.secret)
        if known.iat is None or known.exp is None:
            return None
        # A strategy may choose another lifetime than the one asked for.
        is_other = self.strategy is None and self.requested not in (None, math.inf)
        return None if is_other and math.floor(self.requested or 0) != known.exp - known.iat else known.iat

    def key_for(self, anew: str, /) -> None:
        """There is none."""

    def refresh(self, send: Send, /, *, key: str | None) -> Self:  # noqa: ARG002
        """Spend it."""
        return self.following(send(self.request(), parse)[0])

    def sign_out(self, send: Send, /) -> None:
        """End the session."""
        send(self._post("_logout", [], spends=False), _parse_sign_out)

    def is_valid(self, send: Send, /) -> bool:
        """Ask Kuzzle whether it accepts the token. That spends nothing."""
        body = Secret(json.dumps({"token": self.secret.reveal()}).encode())
        request = self._post("_checkToken", [], spends=False)
        # In the body alone: Kuzzle refuses a request whose own token is no good.
        headers = {"X-Kuzzle-Request-Id": request.request_id, "Content-Type": "application/json"}
        request = attrs.evolve(request, body=body, headers=headers, cookies={COOKIE: None})
        return send(request, _parse_check)[0] == "valid"

    def following(self, token: KuzzleToken, /) -> Self:
        """Return the credential for a successor's token."""
        return attrs.evolve(self, secret=Secret(token.jwt) if token.jwt else self.secret, token=token)

    def request(self) -> Request:
        """Write the request down. Kuzzle reads its options from the query alone; a flag is on by being there."""
        flags = {"cookieAuth": self.cookie_auth, "triggerEvents": self.trigger_events}
        options = {"expiresIn": self.expires_in, **flags, "strategy": self.strategy}
        given = ((name, value) for name, value in options.items() if value)
        query = [name if value is True else f"{name}={quote(str(value), safe='')}" for name, value in given]
        return self._post("_refreshToken", query)

    def _post(self, route: str, query: list[str], *, spends: bool = True) -> Request:
        request_id = str(uuid.uuid4())
        return Request(
            service="kuzzle",
            url=f"{self.url}/{route}" + ("?" + "&".join(query) if query else ""),
            headers={"X-Kuzzle-Request-Id": request_id, **({} if self.in_cookie else self.headers)},
            secret=self.secret,
            request_id=request_id,
            # Bearer and cookie together are a 500, so the session's own stays back.
            cookies={COOKIE: self.secret if self.in_cookie else None},
            spends=spends,
        )

    def read(self, values: Mapping[str, Any], /) -> KuzzleToken:
        """Read a successor's token from a store."""
        token = KuzzleToken.from_dict(values)
        if token.jwt is None or _is_of_another(token, self.secret):
            check.fail("jwt", "must be there, and of the same user")
        return token

    @property
    def expiry(self) -> float | None:
        """When it expires, by Kuzzle's clock."""
        return claims(self.secret).exp

    @property
    def lifetime(self) -> float:
        """For how many seconds it is valid, from when it was asked for."""
        if self.token is None or self.token.ttl is None:
            return math.inf
        known = claims(self.secret).lifetime
        return self.token.ttl.total_seconds() if known is None else known

    refreshable_for = lifetime

    @property
    def can_expire(self) -> bool:
        """Whether it is ever to be refreshed: Kuzzle refuses that for API keys and infinite tokens."""
        return self.expiry is not None

    def unspent(self) -> Self | None:
        """Return it with a result of its own, if it says how long it is valid."""
        known = claims(self.secret)
        if known.exp is None:
            return None
        ttl = duration(1000 * (known.exp - (known.iat or 0)))
        token = KuzzleToken(known.subject or "unknown", self.secret.reveal(), instant(1000 * known.exp), ttl)
        return self.following(token)

    def is_rejected(self, status: int, body: Mapping[str, Any], /) -> bool | None:
        """Whether an error means that the token was not accepted."""
        if status != 401:
            return False
        error = body.get("error")
        if not isinstance(error, dict):
            return None  # Kuzzle itself did not write this, or the request was a HEAD
        return error.get("id") in ("security.token.expired", "security.token.invalid")


def credential(
    url: object,
    jwt: object,
    expires_in: object = None,
    trigger_events: object = False,
    strategy: object = None,
    cookie_auth: object = False,
    in_cookie: object = False,
) -> KuzzleCredential:
    """
    Check the arguments of a call.

    Raises:
        InvalidArgumentError: An argument is wrong.
    """
    check.need(jwt is not None, "jwt", "is missing: give the token of a sign-in")
    base_url, token = check.url("url", url, https=False), check.token("jwt", jwt)
    in_cookie_mode, is_cookie = check.flag("cookie_auth", cookie_auth), check.flag("in_cookie", in_cookie)
    # The grammar of RFC 6750. Tokens in cookies, replies and stores are taken as they come.
    is_alone = re.fullmatch("[A-Za-z0-9._~+/-]+=*", token.reveal()) is not None and token.reveal() != NO_COOKIE
    check.need(is_cookie or is_alone, "jwt", "must be the token alone, without quotes, JSON or a name before it")
    lifetime, seconds = _lifetime(expires_in, in_cookie_mode)
    return KuzzleCredential(
        url=base_url,
        secret=token,
        cookie_auth=in_cookie_mode,
        expires_in=lifetime,
        requested=seconds,
        trigger_events=check.flag("trigger_events", trigger_events),
        strategy=None if strategy is None else check.text("strategy", strategy),
        in_cookie=is_cookie,
    )


def parse(reply: Reply, request: Request) -> KuzzleToken:
    """
    Read the reply to a refresh. The token has its jwt in cookie mode too.

    Raises:
        RefreshError: It has no valid new token.
    """
    return _token(_result(reply, request, "refreshToken"), reply, request)


def _parse_sign_out(reply: Reply, request: Request) -> str:
    _result(reply, request, "logout")
    return "signed out"


def _parse_check(reply: Reply, request: Request) -> str:
    is_valid = _result(reply, request, "checkToken").reveal().get("valid")
    if not isinstance(is_valid, bool):
        raise failure(meaning(reply.status), request, reply)
    return "valid" if is_valid else "not valid"


def _result(reply: Reply, request: Request, action: str) -> Secret[dict[str, Any]]:
    envelope = reply.json()
    # Request ids are not compared: gateways rewrite them, and a token must not be lost over that.
    if envelope.reveal().get("action") not in (action, None):
        raise failure("or a proxy answered another request: check the URL and any proxy", request, reply)
    result, error = (Secret[Any](envelope.reveal().get(name)) for name in ("result", "error"))
    if 200 <= reply.status < 300 and isinstance(result.reveal(), dict):
        return result
    if error.reveal() is None and {"id", "status"} <= envelope.reveal().keys():
        error = envelope  # what Kuzzle finds before routing has no envelope
    if reply.status >= 400 and isinstance(error.reveal(), dict):
        known = _name(error.reveal().get("id"), request)
        case = meaning(reply.status, _MEANINGS.get(known or ""), REFUSED)
        case = _BARE if case is SIGN_IN and request.secret.reveal().startswith("eyJ") else case
        raise failure(case, request, reply, code=error.reveal().get("code"), id=known)
    # Kuzzle's HTTP server may find fault with a request before Kuzzle sees it.
    by_uws = 400 <= reply.status <= 505 and b"<i>uWebSockets/" in reply.body
    raise failure(REFUSED if by_uws else meaning(reply.status), request, reply)


def _name(id: object, request: Request) -> str | None:
    """Return an error's id, if it may be quoted."""
    is_name = isinstance(id, str) and len(id) < 100 and _NAME.fullmatch(id) and not quotes(request, id)
    return str(id) if is_name else None


def _is_of_another(token: KuzzleToken, jwt: Secret[str]) -> bool:
    """Whether a token and a jwt are of two users, as far as they say."""
    user = claims(jwt).subject
    found = {token.kuid, claims(Secret(token.jwt or "")).subject}
    return user is not None and bool(found - {user, None})


def _token(result: Secret[dict[str, Any]], reply: Reply, request: Request) -> KuzzleToken:
    token = None
    with contextlib.suppress(InvalidArgumentError):
        token = KuzzleToken.from_dict({"jwt": reply.cookies.get(COOKIE), **result.reveal()})
    if token is None or token.jwt is None:
        raise failure("answered without a token or its lifetime: check the URL and any proxy", request, reply)
    if _is_of_another(token, request.secret):
        raise failure("answered with a token of another user: check the URL and any proxy", request, reply)
    is_old = Secret(token.jwt) == request.secret
    if is_old or (token.ttl is not None and token.ttl <= timedelta(0)):
        what = "returned the old token, which now expires" if is_old else "returned an expired token"
        raise failure(attrs.evolve(SIGN_IN, spent=True, what=f"{what}: sign in again"), request, reply)
    return token
