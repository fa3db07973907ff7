"""One Kuzzle refresh: the request written down, the reply read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import ClassVar
from urllib.parse import quote

import attrs

from ._checks import Checks
from ._wire import Reply, Request, failure, unrecognized
from .errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)
from .tokens import KuzzleToken, claims, key_of, lifespan, subject

COOKIE = "authToken"
# What refuses a token that another one may replace.
STALE = ("security.token.expired", "security.token.invalid")

check = Checks("kuzzle")

# The grammar of npm's `ms`, which Kuzzle reads durations with. ASCII, because JavaScript's \d and /i are.
_TIMESPAN = (
    r"(?P<number>-?(?:\d+)?\.?\d+) *(?P<unit>milliseconds?|msecs?|ms|seconds?|secs?|s|minutes?|mins?|m"
    r"|hours?|hrs?|h|days?|d|weeks?|w|years?|yrs?|y)?"
)
_UNITS = {
    "ms": 1,
    "s": 1000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 7 * 86_400_000,
    "y": 365.25 * 86_400_000,
}
# Above this Redis refuses the lifetime (its times are 64 bits of milliseconds).
_LONGEST = 9.2e18
# Above this JavaScript cannot write the cookie's date, and Kuzzle finds out when the old token is spent.
_LONGEST_IN_COOKIE = 8.6e15

_REFUSED = (RequestRefusedError, False)
_BUSY = (UnavailableError, False)
_SIGN_IN = (SignInRequiredError, None)
_UNKNOWN = (OutcomeUnknownError, None)
# What an error means, and whether the token is spent. Observed on Kuzzle 2.56.
_MEANINGS: dict[str, tuple[type[RefreshError], bool | None]] = {
    "api.assert.invalid_argument": _REFUSED,
    "api.process.incompatible_sdk_version": _REFUSED,
    "api.process.not_enough_nodes": _BUSY,
    "api.process.overloaded": _BUSY,
    "api.process.shutting_down": _BUSY,
    "api.process.too_many_requests": _BUSY,
    "api.process.unauthorized_origin": _REFUSED,
    "network.entrypoint.shutting_down": _BUSY,
    "network.http.body_parse_failed": _REFUSED,
    "network.http.request_too_large": _REFUSED,
    "network.http.unsupported_charset": _REFUSED,
    "network.http.unsupported_compression": _REFUSED,
    "network.http.unsupported_content": _REFUSED,
    "network.http.url_not_found": _REFUSED,
    "network.http.volatile_parse_failed": _REFUSED,
    # A plugin failed, before or after the refresh: its pipes run on both sides of it.
    "plugin.runtime.unexpected_error": _UNKNOWN,
    "plugin.strategy.missing_user": (SignInRequiredError, False),
    "security.cookie.unsupported": _REFUSED,
    "security.credentials.unknown_strategy": _REFUSED,
    "security.rights.forbidden": _REFUSED,
    "security.rights.unauthorized": (SignInRequiredError, False),
    "security.token.expired": (SignInRequiredError, False),
    # Expired, logged out, already refreshed: Kuzzle has one answer for all of them.
    "security.token.invalid": _SIGN_IN,
    # An API key, an infinite token, a strategy that says no: the token stays good. The message can be the jwt.
    "security.token.refresh_forbidden": _REFUSED,
    "security.token.ttl_exceeded": _REFUSED,
    # Redis is away. (Token and cookie together have this id too, but are never sent together.)
    "security.token.verification_error": _BUSY,
    "services.cache.not_connected": _BUSY,
    "services.cache.notconnected": _BUSY,
    "services.cache.read_failed": _BUSY,
    "services.cache.write_failed": _BUSY,
}


def milliseconds(timespan: str) -> float | None:
    """
    Read a duration as npm's ``ms`` does, which is what Kuzzle does. None: it is none.

    Example:
        >>> milliseconds("1.5 hrs"), milliseconds("-1"), milliseconds("1mo")
        (5400000.0, -1.0, None)
    """
    match = re.fullmatch(_TIMESPAN, timespan, re.ASCII | re.IGNORECASE) if len(timespan) <= 100 else None
    if match is None:
        return None
    unit = (match["unit"] or "ms").lower()
    unit = "ms" if unit.startswith(("ms", "mil")) else unit[0]
    return float(match["number"]) * _UNITS[unit]


def _expires_in(value: object, *, cookie_auth: bool) -> str:
    """Accept a lifetime that Kuzzle understands and that leaves a session alive, as Kuzzle spells it."""
    if isinstance(value, timedelta):
        if value % timedelta(milliseconds=1) or value < timedelta(seconds=1):
            check.fail("expires_in", "must be at least one second, in whole milliseconds")
        value = f"{value // timedelta(milliseconds=1)}"
    if not isinstance(value, str):
        check.fail("expires_in", 'must be a string such as "2h" or "7200000ms", or a timedelta')
    lifetime = milliseconds(value)
    if lifetime is None:
        check.fail("expires_in", 'must be a number and a unit, such as "90s", "30m", "2h" or "1.5 days"')
    if lifetime == -1 and cookie_auth:
        check.fail("expires_in", "must not be -1 in cookie mode: the cookie would be born dead")
    if lifetime != -1 and (lifetime < 1000 or not lifetime.is_integer()):
        check.fail("expires_in", "must be at least one second, in whole milliseconds; -1 means for ever")
    if lifetime > (_LONGEST_IN_COOKIE if cookie_auth else _LONGEST):
        check.fail("expires_in", "is longer than Kuzzle can count; -1 means for ever")
    return value


def _key(url: str, jwt: str) -> str:
    return key_of("kuzzle", url, jwt)


def key(url: object, jwt: object) -> str:
    """Make the key of a credential."""
    return _key(check.url("url", url, https=False), check.token("jwt", jwt))


@attrs.frozen(kw_only=True)
class Call:
    """The arguments of one call, checked. *in_cookie*: the token comes from the session's cookie."""

    url: str
    query: str
    jwt: str = attrs.field(repr=False)
    in_cookie: bool
    key: str = attrs.field(init=False, eq=False)

    provider: ClassVar[str] = "kuzzle"
    kind: ClassVar[str] = ""
    idempotency_key: ClassVar[None] = None

    @staticmethod
    def read(values: Mapping[str, object]) -> KuzzleToken:
        """Read a token's JSON, its jwt too."""
        return KuzzleToken.from_dict({**values, "jwt": check.token("jwt", values.get("jwt"))})

    @key.default
    def _own_key(self) -> str:
        return _key(self.url, self.jwt)

    def keys(self, token: KuzzleToken) -> list[str]:
        """List the keys of a token that has come of this call."""
        return [_key(self.url, token.jwt or "")]

    def following(self, last: KuzzleToken) -> Call:
        """Say the same of a token that has come of this call."""
        return attrs.evolve(self, jwt=last.jwt or self.jwt)

    def lifetime(self, token: KuzzleToken) -> float | None:
        """Tell how many seconds a token lives from its birth; None: for ever."""
        return None if token.ttl is None else lifespan(token.jwt or "", token.ttl.total_seconds())

    useful = lifetime

    def is_young(self, last: KuzzleToken | None, now: float) -> bool:
        """
        Tell whether a token may have been born this second: a refresh would give it back, and it would die.

        The clock that says *now* may be a minute off either way.
        """
        jwt = self.jwt if last is None else last.jwt or ""
        return claims(jwt).get("iat", -math.inf) > now - 60


def prepare(
    *,
    url: object,
    jwt: object,
    expires_in: object,
    cookie_auth: object,
    trigger_events: object,
    strategy: object,
    in_cookie: bool = False,
) -> Call:
    """
    Check the arguments of a call.

    Raises:
        InvalidArgumentError: An argument is wrong.
    """
    cookie_mode = check.flag("cookie_auth", cookie_auth)
    # Kuzzle reads these from the query alone; a flag is on by being there, even as "=false".
    query = []
    if expires_in is not None:
        query.append("expiresIn=" + quote(_expires_in(expires_in, cookie_auth=cookie_mode), safe=""))
    if cookie_mode:
        query.append("cookieAuth")
    if check.flag("trigger_events", trigger_events):
        query.append("triggerEvents")
    if strategy is not None:
        query.append("strategy=" + quote(check.text("strategy", strategy), safe=""))
    return Call(
        url=check.url("url", url, https=False),
        query="?" + "&".join(query) if query else "",
        jwt=check.token("jwt", jwt),
        in_cookie=in_cookie,
    )


def build(call: Call, *, request_id: str) -> Request:
    """Write down the request."""
    return Request(
        provider="kuzzle",
        url=f"{call.url}/_refreshToken{call.query}",
        headers={"X-Kuzzle-Request-Id": request_id},
        credential=call.jwt,
        request_id=request_id,
        bearer=None if call.in_cookie else call.jwt,
        # Bearer and cookie together are a 500, so the session's own stays back.
        cookies={COOKIE: call.jwt if call.in_cookie else None},
    )


def parse(reply: Reply, request: Request) -> KuzzleToken:
    """
    Read the reply. The token has its jwt in cookie mode too.

    Raises:
        RefreshError: There is no living new token in it.
    """
    envelope = reply.json()
    # Not by its id: gateways rewrite those, and a token is not to be lost over that. See also _token().
    if envelope.get("action") not in ("refreshToken", None):
        raise failure(ReplyError, request, reply, spent=None, what="or a proxy answered another request")
    if 200 <= reply.status < 300 and isinstance(result := envelope.get("result"), dict):
        return _token(result, reply, request)
    error = envelope.get("error")
    if error is None and {"id", "status"} <= envelope.keys():
        error = envelope  # what Kuzzle finds before routing has no envelope
    if reply.status >= 400 and isinstance(error, dict):
        raise _refusal(error, reply, request)
    if 400 <= reply.status <= 505 and b"<i>uWebSockets/" in reply.body:
        # Kuzzle's HTTP server found fault with the request before Kuzzle saw it.
        raise failure(RequestRefusedError, request, reply, spent=False)
    raise unrecognized(request, reply)


def _token(result: dict[str, object], reply: Reply, request: Request) -> KuzzleToken:
    try:
        token = KuzzleToken.from_dict({"jwt": reply.cookies.get(COOKIE), **result})
    except InvalidArgumentError:
        token = None
    if token is None or token.jwt is None:
        raise failure(ReplyError, request, reply, spent=None, what="answered without a token or its lifetime")
    user = subject(request.credential)
    if user is not None and {token.kuid, subject(token.jwt)} - {user, None}:
        raise failure(ReplyError, request, reply, spent=None, what="answered with a token of another user")
    if token.jwt == request.credential:
        # It happens within the second of the token's birth, and the token dies a second later.
        raise failure(SignInRequiredError, request, reply, spent=True, what="gave the old token back")
    if token.ttl is not None and token.ttl <= timedelta(0):
        raise failure(SignInRequiredError, request, reply, spent=True, what="gave a token that is dead already")
    return token


def _refusal(error: dict[str, object], reply: Reply, request: Request) -> RefreshError:
    # Only names that we know are passed on: an error may quote the jwt.
    known = next((name for name in _MEANINGS if name == error.get("id")), None)
    if known is not None:
        kind, spent = _MEANINGS[known]
    elif reply.status == 401:
        kind, spent = _SIGN_IN
    elif reply.status in (429, 503):
        kind, spent = _BUSY
    else:
        kind, spent = _REFUSED if reply.status < 500 else _UNKNOWN
    return failure(kind, request, reply, spent=spent, code=error.get("code"), id=known)
