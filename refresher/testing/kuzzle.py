"""FakeKuzzle: what version 2.56 of Kuzzle was seen to do over HTTP."""

from __future__ import annotations

import email
import gzip
import hashlib
import json
import math
import re
import secrets
import uuid
import zlib
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, ClassVar, NoReturn
from urllib.parse import parse_qs, unquote

import attrs

from .._text import claims
from ..services.kuzzle import milliseconds
from ..tokens import KuzzleToken
from .faults import Fake, check_known, jwt_of
from .server import Answer, Clock, Received, sign

_INVALID_EXPIRES_IN = 'Invalid argument "expiresIn". Expected: a number of milliseconds, or a parsable timespan string'
_NO_TIMESPAN = 'Caught an unexpected plugin error: val is not a non-empty string or a valid number. val=""'
_NOT_TEXT = 'Caught an unexpected plugin error: The "password" argument must be of type string'
_BOTH = "Error verifying token: Both token and cookie are present, could not decide which one to use"
_UNAUTHENTICATED = 'Unauthorized: authentication required to execute the action "auth:{}".'

ERRORS: Mapping[str, tuple[int, int, str]] = {
    "api.assert.body_required": (400, 33619976, "The request must specify a body."),
    "api.assert.invalid_argument": (400, 33619970, _INVALID_EXPIRES_IN),
    "api.assert.invalid_type": (400, 33619969, 'Wrong type for argument "body.token" (expected: string)'),
    "api.assert.missing_argument": (400, 33619971, 'Missing argument "strategy".'),
    "api.process.action_not_found": (404, 33685509, "API action not found"),
    "api.process.controller_not_found": (404, 33685508, "API controller not found."),
    "api.process.incompatible_sdk_version": (400, 33685510, "Incompatible SDK client."),
    "api.process.not_enough_nodes": (503, 33685515, "Rejected: this cluster is disabled."),
    "api.process.overloaded": (503, 33685506, "Request discarded: Kuzzle Server is temporarily overloaded."),
    "api.process.shutting_down": (503, 33685511, "Rejected: this node is shutting down."),
    "api.process.too_many_requests": (429, 33685512, "Rejected: requests rate limit exceeded for this user."),
    "api.process.unauthorized_origin": (401, 33685516, 'The origin "http://stranger" is not authorized.'),
    "network.entrypoint.shutting_down": (503, 50593795, "Rejected: instance is shutting down"),
    "network.http.body_parse_failed": (400, 50397196, "Unable to convert the HTTP body to JSON."),
    "network.http.request_too_large": (413, 50397185, "Maximum HTTP request size exceeded."),
    "network.http.too_many_encodings": (400, 50397187, "Too many encodings."),
    "network.http.unexpected_error": (400, 50397186, "Caught an unexpected HTTP error."),
    "network.http.unsupported_charset": (400, 50397193, "Unsupported request charset."),
    "network.http.unsupported_compression": (400, 50397188, "Unsupported compression algorithm."),
    "network.http.unsupported_content": (400, 50397192, "Invalid request content-type."),
    "network.http.unsupported_verb": (400, 50397190, "Unsupported HTTP verb."),
    "network.http.url_not_found": (404, 50397191, "API URL not found."),
    "network.http.volatile_parse_failed": (400, 50397195, "Unable to convert the header to JSON."),
    "plugin.runtime.unexpected_error": (500, 67239938, _NO_TIMESPAN),
    "plugin.strategy.missing_user": (401, 67305492, "wrong username or password"),
    "security.cookie.unsupported": (500, 117899266, "Cookie authentication not supported."),
    "security.credentials.unknown_strategy": (400, 117571585, "Unknown authentication strategy"),
    "security.rights.forbidden": (403, 117637122, "Insufficient permissions to execute the action"),
    "security.rights.unauthorized": (401, 117637121, _UNAUTHENTICATED.format("refreshToken")),
    "security.token.expired": (401, 117506054, "Token expired"),
    "security.token.invalid": (401, 117506049, "Invalid token."),
    "security.token.refresh_forbidden": (401, 117506056, "API Key cannot be refreshed."),
    "security.token.ttl_exceeded": (400, 117506052, "expiresIn value exceeds maximum allowed value"),
    "security.token.verification_error": (500, 117506055, "Error verifying token: Cache read fail"),
    "services.cache.not_connected": (503, 16973827, "Unable to connect to the cache server."),
    "services.cache.read_failed": (500, 16973826, "Cache read fail"),
    "services.cache.write_failed": (500, 16973828, "Cache write fail: ERR value is not an integer"),
}
"""What Kuzzle refuses with. Its id: the HTTP status, the code, the message."""

# Found before the request is routed. Such an answer has no envelope.
_BARE = {
    "network.http.body_parse_failed",
    "network.http.request_too_large",
    "network.http.too_many_encodings",
    "network.http.unexpected_error",
    "network.http.unsupported_charset",
    "network.http.unsupported_compression",
    "network.http.unsupported_content",
}
_CONTENT_TYPES = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_LARGEST_BODY = 1 << 20
# uWebSockets' own limits.
_LONGEST_HEAD = 4096
_MOST_HEADERS = 98
# JavaScript's dates end here.
_LAST_DATE = 8.64e15
# The first digit of the oldest version that Kuzzle 2 works with.
_OLDEST_SDKS = {"js": "7", "csharp": "2", "cpp": "2", "java": "3", "android": "5", "go": "3", "php": "4"}
_ACCESS_CONTROL = {
    "Access-Control-Allow-Headers": (
        "Content-Type, Access-Control-Allow-Headers, Authorization, X-Requested-With, Content-Encoding, "
        "Content-Length, X-Kuzzle-Volatile"
    ),
    "Access-Control-Allow-Methods": "GET,POST,PUT,PATCH,DELETE,OPTIONS,HEAD",
}


class _RefusalError(Exception):
    """Ends the handling of a request."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error)
        self.error = error


def _error(id: str, message: str | None = None) -> dict[str, Any]:
    status, code, usual = ERRORS[id]
    return {"code": code, "id": id, "message": message or usual, "props": [], "status": status}


def _refuse(id: str, message: str | None = None) -> NoReturn:
    raise _RefusalError(_error(id, message))


def _wrong_type(name: str, wanted: str) -> NoReturn:
    """Refuse an argument of the request itself. Such an error has no id."""
    raise _RefusalError({"message": f"Attribute {name} must be of type {wanted}", "status": 400})


@attrs.define
class _Session:
    kuid: str
    expires_at: float  # milliseconds, as Kuzzle says it; -1: never
    ttl: float  # milliseconds; -1: for ever
    gone_at: float  # when Redis forgets it, in seconds
    refreshed: bool = False


@attrs.define
class _Call:
    """A request as Kuzzle reads it."""

    headers: dict[str, str]  # by name in lower case: of several that have one name, the last
    body: Any = None
    # Of the query: a string each, or a list of those that are given twice.
    arguments: dict[str, Any] = attrs.field(factory=dict)
    jwt: str | None = None
    volatile: object = None
    action: str | None = None
    controller: str | None = None
    token: str | None = None  # the one that authenticated its user
    session: _Session | None = None  # None: nobody in particular
    set_cookie: str | None = None

    def cookie_flag(self) -> bool:
        """
        Whether the answer is to be given as a cookie.

        The argument is a flag: it is set by being there, whatever it says. Kuzzle writes down what it found, so
        a second question finds it set in any case.
        """
        found = "cookieAuth" in self.arguments
        self.arguments["cookieAuth"] = found
        return found

    def text(self, name: str, default: str | None = None) -> str:
        """Take a string out of the body."""
        value = self.body.get(name, default) if isinstance(self.body, dict) else default
        if value is None and not (isinstance(self.body, dict) and name in self.body):
            _refuse("api.assert.missing_argument", f'Missing argument "body.{name}".')
        if not isinstance(value, str):
            _refuse("api.assert.invalid_type", f'Wrong type for argument "body.{name}" (expected: string)')
        return value

    def credential(self, name: str) -> object:
        """Take something to sign in with out of the body or the query."""
        for source in (self.body, self.arguments):
            value = source.get(name) if isinstance(source, dict) else None
            if value and not isinstance(value, (dict, list)):
                return value
        return None

    @property
    def cookie(self) -> str | None:
        """The token in the cookie."""
        for pair in self.headers.get("cookie", "").split(";"):
            name, equals, value = pair.partition("=")
            if equals and name.strip() == "authToken":
                value = unquote(value.strip())
                return value if value not in ("", "null") else None
        return None


class FakeKuzzle(Fake):
    """
    A Kuzzle server: login, refresh, check, who am I, logout.

    Args:
        users: Passwords by user name.
        clock: Its clock.
        grace: How many seconds a refreshed token stays valid. 0 means until it expires, as in Kuzzle.
        max_ttl: The longest lifetime it grants, in milliseconds; -1: any.
        cookies: Whether cookie mode is supported.
        strategies: What a strategy's own refresh answers: another ``expiresIn``, or None for the one asked for.

    Attributes:
        requests: What it received.
        next_answers: What to answer instead of the truth: an `Answer`, raw bytes, or a function of the request.
    """

    # HTTP forbids it, and Kuzzle does it.
    head_has_body = True

    _errors: ClassVar[Mapping[str, str]] = {
        "busy": "api.process.too_many_requests",
        "error": "services.cache.read_failed",
        "refused": "security.token.invalid",
        "unavailable": "api.process.overloaded",
    }

    def __init__(
        self,
        users: Mapping[str, str] | None = None,
        *,
        clock: Clock | None = None,
        grace: float = 1.0,
        max_ttl: float = -1,
        cookies: bool = True,
        strategies: Mapping[str, Callable[[], str | None]] | None = None,
    ) -> None:
        super().__init__(clock)
        self.users: dict[str, str] = dict({"foo": "bar"} if users is None else users)
        self.grace = grace
        self.max_ttl = max_ttl
        self.cookies = cookies
        self.strategies: dict[str, Callable[[], str | None]] = dict(strategies or {})
        self._secret = secrets.token_bytes()
        self._sessions: dict[str, _Session] = {}
        self._api_keys: dict[str, _Session] = {}
        # Besides there is /_login/<strategy>.
        self._routes: dict[tuple[str, ...], str] = {
            ("POST", "_refreshToken"): "refreshToken",
            ("POST", "_checkToken"): "checkToken",
            ("GET", "_me"): "getCurrentUser",
            ("GET", "users", "_me"): "getCurrentUser",
            ("POST", "_logout"): "logout",
            ("POST", "api-keys", "_create"): "createApiKey",
        }
        self._actions: dict[str, Callable[[_Call], dict[str, object]]] = {
            "login": self._login,
            "refreshToken": self._refresh,
            "checkToken": self._check,
            "getCurrentUser": self._me,
            "logout": self._logout,
            "createApiKey": self._create_api_key,
        }

    def login(self, username: str = "foo", expires_in: str | None = None, *, ago: float = 0.0) -> str:
        """Let a user have signed in some seconds *ago*, without asking for a password, and give the jwt."""
        with self._lock:
            self.clock.advance(-ago)
            try:
                return self._issue(username, expires_in)[0]
            finally:
                self.clock.advance(ago)

    def api_key(self, username: str = "foo", expires_in: str | None = None) -> str:
        """Make an API key for a user. It never expires, unless you say otherwise."""
        ttl = self._lifetime("-1" if expires_in is None else expires_in)
        now = self.clock()
        payload = self._claims(username, ttl, jti=secrets.token_hex(8))
        key = "kapikey-" + sign(payload, self._secret)
        self._api_keys[key] = _Session(username, -1 if ttl == -1 else int(now * 1000) + ttl, ttl, math.inf)
        return key

    def knows(self, jwt: str | KuzzleToken | None) -> bool:
        """
        Whether a token authenticates its user now.

        Raises:
            ValueError: It is that of cookie mode.
        """
        return jwt is not None and self._find(jwt_of(jwt)) is not None

    def fail_next(self, id: str, times: int = 1) -> None:
        """Refuse the next requests with the error of that *id*, and do nothing else for them."""
        check_known("id", id, ERRORS)
        error = _error(id)
        self.next_answers.extend([lambda request: self._refusal(request, error)] * times)

    def refuse(self, request: Received, why: str) -> Answer:
        """Refuse a request in Kuzzle's own words."""
        return self._refusal(request, _error(self._errors[why]))

    # How a request becomes an answer

    def _answer(self, request: Received) -> Answer:
        html = self._malformed(request)
        if html is not None:
            return html
        call = _Call(_headers(request))
        try:
            call.body = self._read_body(request, call.headers)
            return self._envelope(request, call, result=self._route(request, call))
        except _RefusalError as refusal:
            return self._refusal(request, refusal.error, call)

    @staticmethod
    def _malformed(request: Received) -> Answer | None:
        """Find what uWebSockets refuses on its own, in HTML."""
        head = len(f"{request.method} {request.target} {request.version}\r\n\r\n")
        head += sum(len(f"{name}: {value}\r\n") for name, value in request.headers.items())
        status = None
        if request.version != "HTTP/1.1":
            status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
        elif request.headers["Host"] is None:
            status = HTTPStatus.BAD_REQUEST
        elif head > _LONGEST_HEAD or len(request.headers) > _MOST_HEADERS:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        if status is None:
            return None
        page = f"<h1>{status.phrase}</h1><hr><i>uWebSockets/20 Server</i>"
        return Answer(status.value, page.encode(), {"Connection": "close"}, close=True)

    @staticmethod
    def _read_body(request: Received, headers: Mapping[str, str]) -> Any:
        """Read the body, whatever it is. What is empty counts as none."""
        kind = headers.get("content-type", "")
        if len(request.body) > _LARGEST_BODY:
            _refuse("network.http.request_too_large")
        if kind and kind.partition(";")[0].strip() not in _CONTENT_TYPES:
            _refuse("network.http.unsupported_content")
        charset = re.search(r"charset=([\w-]+)", kind.lower())
        if charset is not None and charset[1] != "utf-8":
            _refuse("network.http.unsupported_charset")
        if not request.body:
            return None
        body = _unpack(request.body, headers.get("content-encoding", ""))
        if "multipart/form-data" in kind:
            return _multipart(kind, body)
        text = body.decode(errors="replace")
        if "application/x-www-form-urlencoded" in kind:
            return _pairs(text)
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            _refuse("network.http.body_parse_failed")
        # In JavaScript an empty array is not false, but this has a length of 0.
        if isinstance(value, dict) and value.get("length") == 0 and value["length"] is not False:
            return None
        return value or (value if isinstance(value, dict) else None)

    def _route(self, request: Received, call: _Call) -> dict[str, object]:
        """Find out what a request asks for, and do it."""
        if request.method == "OPTIONS":
            return {}
        if request.method not in _METHODS:
            _refuse("network.http.unsupported_verb", f'Unsupported HTTP verb "{request.method}".')
        self._read_arguments(request, call)
        if request.method == "HEAD" and not request.path.strip("/"):
            return {}
        action, parameters = self._look_up(request)
        if action is None:
            _refuse("network.http.url_not_found", f"API URL not found: {request.path.removesuffix('/')}.")
        call.arguments |= parameters
        call.action = call.action or action
        call.controller = call.controller or "auth"
        return self._execute(call)

    def _look_up(self, request: Received) -> tuple[str | None, dict[str, str]]:
        """Find the action that a method and a path stand for, and what the path says besides."""
        *parents, last = request.path.removesuffix("/").split("/")
        parts = [unquote(part) for part in (*filter(None, parents), last)]
        action = self._routes.get((request.method, *parts))
        if action is None and parts[0] == "_login" and len(parts) == 2 and request.method in ("GET", "POST"):
            return "login", {"strategy": parts[1]}
        return action, {}

    @staticmethod
    def _read_arguments(request: Received, call: _Call) -> None:
        """Read the query. Some of its arguments stand for parts of the request."""
        arguments = _pairs(request.target.partition("#")[0].partition("?")[2])
        if call.headers.get("authorization", "").lower().startswith("bearer "):
            arguments["jwt"] = call.headers["authorization"][len("bearer ") :]
        if "x-kuzzle-volatile" in call.headers:
            try:
                arguments["volatile"] = json.loads(call.headers["x-kuzzle-volatile"], parse_constant=_no_constant)
            except (ValueError, RecursionError):
                _refuse("network.http.volatile_parse_failed")
        body = arguments.pop("body", call.body)
        jwt, volatile, action, controller = (
            arguments.pop(name, None) for name in ("jwt", "volatile", "action", "controller")
        )
        if isinstance(jwt, list):
            _wrong_type("jwt", '"string"')
        if volatile is not None and not isinstance(volatile, dict):
            _wrong_type("volatile", '"object"')
        if body is not None and not isinstance(body, (dict, list)):
            _wrong_type("body", '"object" or "array"')
        for name, value in (("controller", controller), ("action", action)):
            if isinstance(value, list):
                _wrong_type(name, '"string"')
        if isinstance(arguments.get("requestId"), list):
            _wrong_type("requestId", '"string"')
        call.arguments, call.body, call.jwt, call.volatile = arguments, body, jwt, volatile
        call.action, call.controller = action, controller

    def _execute(self, call: _Call) -> dict[str, object]:
        """Find out who is asking, and do what is asked for."""
        self._authenticate(call)
        if call.controller != "auth":
            _refuse("api.process.controller_not_found", f'API controller "{call.controller}" not found.')
        if call.action not in self._actions:
            _refuse("api.process.action_not_found", f'API action "auth":"{call.action}" not found')
        _check_sdk(call.volatile)
        return self._actions[call.action](call)

    def _refusal(self, request: Received, error: Mapping[str, Any], call: _Call | None = None) -> Answer:
        status: int = error["status"]
        if error.get("id") not in _BARE:
            return self._envelope(request, call or self._quiet_call(request), status, error=error)
        headers = {**_ACCESS_CONTROL, "Content-Type": "application/json"}
        if "Origin" in request.headers:
            headers["Access-Control-Allow-Origin"] = "*"
        return Answer(status, error, {**headers, **self._trailer()})

    def _quiet_call(self, request: Received) -> _Call:
        """Read what an envelope repeats of a request that is not looked at any further."""
        action, _ = self._look_up(request)
        return _Call(_headers(request), action=action, controller=action and "auth")

    def _trailer(self) -> dict[str, str]:
        return {"Date": formatdate(self.clock(), usegmt=True), "uWebSockets": "20"}

    def _envelope(
        self,
        request: Received,
        call: _Call,
        status: int = 200,
        *,
        result: object = None,
        error: object = None,
    ) -> Answer:
        request_id = call.headers.get("x-kuzzle-request-id") or str(uuid.uuid4())
        content = {
            "action": call.action,
            **{name: value for name, value in call.arguments.items() if name in ("collection", "index")},
            "controller": call.controller,
            "error": error,
            "headers": {},
            "requestId": request_id,
            "result": result,
            "status": status,
            "volatile": call.volatile,
        }
        if "pretty" in request.query:
            text = json.dumps(content, indent=2)
        else:
            text = json.dumps(content, separators=(",", ":"))
        body, packing = _pack(text.encode(), call.headers)
        origin = call.headers.get("origin")
        return Answer(
            status,
            body,
            {
                "Connection": "close",
                "X-Kuzzle-Request-Id": request_id,
                **({"Set-Cookie": call.set_cookie} if call.set_cookie else {}),
                "X-Kuzzle-Node": "undefined",
                "Accept-Encoding": "gzip,deflate,identity",
                **_ACCESS_CONTROL,
                "content-type": "application/json",
                "Access-Control-Allow-Credentials": "true",
                **({"Access-Control-Allow-Origin": origin, "Vary": "Origin"} if origin else {}),
                "Content-Encoding": packing,
                **self._trailer(),
            },
        )

    # Who is asking

    def _find(self, jwt: str) -> _Session | None:
        """Look a token up, if it is still valid."""
        session = self._sessions.get(jwt) or self._api_keys.get(jwt)
        alive = session is not None and self.clock() < min(session.gone_at, claims(jwt).exp or math.inf)
        return session if alive else None

    def _authenticate(self, call: _Call) -> None:
        """Find out who sent a request."""
        if not self.cookies and call.cookie_flag():
            _refuse("security.cookie.unsupported")
        cookie = call.cookie
        if cookie is not None:
            if not self.cookies:
                _refuse("security.cookie.unsupported")
            if call.jwt:
                _refuse("security.token.verification_error", _BOTH)
            call.jwt = cookie
            # In cookie mode, a dead cookie must not keep its user from signing in or out.
            spared = call.controller == "auth" and call.action in ("login", "checkToken", "logout")
            if call.cookie_flag() and spared:
                return
        call.session = self._verify(call.jwt)
        call.token = call.jwt

    def _verify(self, jwt: str | None) -> _Session | None:
        """Look a token up. None is nobody's, and valid."""
        session = None if jwt is None else self._find(jwt)
        if jwt is not None and session is None:
            _refuse("security.token.invalid")
        return session

    @staticmethod
    def _require(call: _Call) -> tuple[str, _Session]:
        """Insist on a user."""
        if call.session is None or call.token is None:
            _refuse("security.rights.unauthorized", _UNAUTHENTICATED.format(call.action))
        return call.token, call.session

    # What Kuzzle does

    def _lifetime(self, expires_in: object) -> float:
        """Read a lifetime, in milliseconds."""
        if expires_in == "":
            _refuse("plugin.runtime.unexpected_error")
        ttl = milliseconds(expires_in) if isinstance(expires_in, str) else None
        if not ttl:
            _refuse("api.assert.invalid_argument")
        return int(ttl) if ttl.is_integer() else ttl

    def _claims(self, kuid: str, ttl: float, **more: object) -> dict[str, object]:
        now = int(self.clock())
        expiry: dict[str, object] = {} if ttl == -1 else {"exp": now + math.floor(ttl / 1000)}
        return {"_id": kuid, "iat": now, **expiry, **more}

    def _issue(self, kuid: str, expires_in: object = None) -> tuple[str, _Session]:
        ttl = self._lifetime("1h" if expires_in is None else expires_in)
        if self.max_ttl > -1 and (ttl > self.max_ttl or ttl == -1):
            _refuse("security.token.ttl_exceeded")
        now = self.clock()
        jwt = "kauth-" + sign(self._claims(kuid, ttl), self._secret)
        # Redis takes whole milliseconds, and counts time in 64 bits.
        if ttl > 0 and (not isinstance(ttl, int) or now * 1000 + ttl >= 2**63):
            _refuse("services.cache.write_failed")
        if ttl == -1:
            session = _Session(kuid, -1, -1, math.inf)
        else:
            gone_at = now + ttl / 1000 if ttl >= 1 else math.inf
            session = _Session(kuid, int(now * 1000) + ttl, ttl, gone_at)
        self._sessions[jwt] = session
        return jwt, session

    def _give(self, call: _Call, jwt: str, session: _Session) -> dict[str, object]:
        if self._recipient is not None:
            jwt, session = self._issue(self._recipient)
        result = {"_id": session.kuid, "expiresAt": session.expires_at, "jwt": jwt, "ttl": session.ttl}
        if not (self.cookies and call.cookie_flag()):
            return result
        del result["jwt"]
        if abs(session.expires_at) > _LAST_DATE:
            _refuse("plugin.runtime.unexpected_error", "option expires is invalid: Invalid Date")
        expires = formatdate(min(session.expires_at / 1000, 253402300799), usegmt=True)
        call.set_cookie = f"authToken={jwt}; Path=/; Expires={expires}; HttpOnly; SameSite=Strict"
        return result

    def _login(self, call: _Call) -> dict[str, object]:
        strategy = call.arguments.get("strategy")
        if strategy is None:
            _refuse("api.assert.missing_argument")
        if not isinstance(strategy, str):
            _refuse("api.assert.invalid_type", 'Wrong type for argument "strategy" (expected: string)')
        if strategy != "local":
            _refuse("security.credentials.unknown_strategy", f'Unknown authentication strategy "{strategy}"')
        username, password = call.credential("username"), call.credential("password")
        if not username or not password:
            _refuse("plugin.strategy.missing_user", "Missing credentials")
        if not isinstance(username, str) or username not in self.users:
            _refuse("plugin.strategy.missing_user")
        if not isinstance(password, str):
            _refuse("plugin.runtime.unexpected_error", _NOT_TEXT)
        if self.users[username] != password:
            _refuse("plugin.strategy.missing_user")
        # An empty expiresIn counts as none here, but not in a refresh.
        return self._give(call, *self._issue(username, call.arguments.get("expiresIn") or None))

    def _refresh(self, call: _Call) -> dict[str, object]:
        jwt, session = self._require(call)
        expires_in = call.arguments.get("expiresIn")
        strategy = call.arguments.get("strategy")
        if strategy and strategy != "local":
            if not isinstance(strategy, str) or strategy not in self.strategies:
                _refuse("security.token.refresh_forbidden", f"{jwt} cannot be refreshed.")
            expires_in = self.strategies[strategy]() or expires_in
        if session.refreshed:
            _refuse("security.token.invalid")
        if jwt in self._api_keys or session.ttl < 0:
            what = "API Key" if jwt in self._api_keys else "Token with infinite TTL"
            _refuse("security.token.refresh_forbidden", f"{what} cannot be refreshed.")
        new, given = self._issue(session.kuid, expires_in)
        # The old token is written last: if both are one, this is what is left of it.
        gone_at = self.clock() + self.grace if self.grace else math.inf
        self._sessions[jwt] = attrs.evolve(session, refreshed=True, gone_at=gone_at)
        self._spent[jwt] += 1
        return self._give(call, new, given)

    def _check(self, call: _Call) -> dict[str, object]:
        in_cookie_mode = self.cookies and call.cookie_flag()
        token = call.jwt if in_cookie_mode else call.text("token", "") or None
        try:
            session = self._verify(token)
        except _RefusalError as refusal:
            return {"state": refusal.error["message"], "valid": False}
        if session is None:
            return {"expiresAt": None, "kuid": "-1", "valid": True}
        return {"expiresAt": session.expires_at, "kuid": session.kuid, "valid": True}

    @staticmethod
    def _me(call: _Call) -> dict[str, object]:
        kuid, profile = "-1", "anonymous"
        strategies: list[object] = [[]]  # so it is
        if call.session is not None:
            kuid, profile = call.session.kuid, "default"
            strategies = ["local"]
        return {"_id": kuid, "_source": {"profileIds": [profile]}, "strategies": strategies}

    def _logout(self, call: _Call) -> dict[str, object]:
        if not (self.cookies and call.cookie_flag()):
            self._require(call)
        if call.session is not None and "global" in call.arguments:
            kuid = call.session.kuid
            self._sessions = {jwt: other for jwt, other in self._sessions.items() if other.kuid != kuid}
        elif call.token is not None:
            self._sessions.pop(call.token, None)
        if self.cookies and call.cookie_flag():
            call.set_cookie = "authToken=null; Path=/; HttpOnly; SameSite=Strict"
        return {"acknowledged": True}

    def _create_api_key(self, call: _Call) -> dict[str, object]:
        if call.body is None:
            _refuse("api.assert.body_required")
        description = call.text("description")
        kuid = call.session.kuid if call.session else "-1"
        key = self.api_key(kuid, call.arguments.get("expiresIn") or None)
        made = self._api_keys[key]
        source = {
            "description": description,
            "expiresAt": made.expires_at,
            "fingerprint": hashlib.sha256(key.encode()).hexdigest(),
            "token": key,
            "ttl": made.ttl,
            "userId": kuid,
        }
        return {"_id": str(uuid.uuid4()), "_source": source}


def _headers(request: Received) -> dict[str, str]:
    return {name.lower(): value.strip() for name, value in request.headers.items()}


def _pairs(text: str) -> dict[str, Any]:
    """Read a query or a form: an argument that is given twice is a list."""
    found = parse_qs(text, keep_blank_values=True)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _multipart(kind: str, body: bytes) -> dict[str, Any]:
    """Read a form with several parts. A file is an object."""
    message = email.message_from_bytes(b"Content-Type: " + kind.encode("latin-1") + b"\r\n\r\n" + body)
    form: dict[str, Any] = {}
    for part in message.walk():
        name = part.get_param("name", header="content-disposition")
        if isinstance(name, str):
            content = part.get_payload(decode=True)
            text = content.decode(errors="replace") if isinstance(content, bytes) else ""
            form[name] = text if part.get_filename() is None else {"file": text}
    return form


def _unpack(body: bytes, encodings: str) -> bytes:
    """Undo what Content-Encoding says, up to three times."""
    names = [name.strip().lower() for name in encodings.split(",")] if encodings else []
    if len(names) > 3:
        _refuse("network.http.too_many_encodings")
    for name in reversed(names):
        if name not in ("identity", "gzip", "deflate"):
            _refuse("network.http.unsupported_compression", f'Unsupported compression algorithm "{name}".')
        try:
            if name == "gzip":
                body = gzip.decompress(body)
            elif name == "deflate":
                body = zlib.decompress(body)
        except (OSError, EOFError, zlib.error):
            _refuse("network.http.unexpected_error")
    return body


def _pack(body: bytes, headers: Mapping[str, str]) -> tuple[bytes, str]:
    """Pack an answer as Accept-Encoding prefers it: gzip before deflate, and nothing else."""
    best, packing = -1.0, "identity"
    for choice in headers.get("accept-encoding", "").lower().split(","):
        name, _, parameter = choice.strip().partition(";")
        try:
            priority = float(parameter.partition("=")[2] or 0)
        except ValueError:
            continue
        if name.startswith(("gzip", "deflate")) and (
            priority > best or (name == "gzip" and abs(priority - best) < 0.01)
        ):
            best, packing = max(best, priority), name
    if packing == "gzip":
        return gzip.compress(body), packing
    return (zlib.compress(body), packing) if packing == "deflate" else (body, "identity")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _check_sdk(volatile: object) -> None:
    """Refuse Kuzzle's own clients if they are too old."""
    values = volatile if isinstance(volatile, dict) else {}
    if values.get("sdkVersion"):
        _refuse("api.process.incompatible_sdk_version")
    name = values.get("sdkName")
    sdk, _, version = name.partition("@") if isinstance(name, str) else ("", "", "")
    if version and version[0] < _OLDEST_SDKS.get(sdk, ""):
        _refuse("api.process.incompatible_sdk_version")
