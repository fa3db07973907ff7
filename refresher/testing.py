"""
A Kuzzle and a Circle of your own, on loopback sockets, for tests and demonstrations.

They do what the real services were seen to do: a Kuzzle token is refreshed once, lives for one more
second, and comes back unchanged within the clock second of its birth; Circle rotates its refresh
tokens and answers a repeated idempotency key as it did before. Their clock moves when you move it.

Example:
    >>> from refresher import refresh_kuzzle_token
    >>> with FakeKuzzle() as kuzzle:
    ...     old = kuzzle.login("foo", ago=1800)
    ...     new = refresh_kuzzle_token(kuzzle.url, old)
    ...     kuzzle.clock.advance(1)
    ...     print(kuzzle.knows(old), kuzzle.knows(new.jwt))
    False True

With pytest, ``pytest_plugins = ["refresher.testing"]`` gives the fixtures ``fake_kuzzle`` and ``fake_circle``.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import gzip
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import socket
import socketserver
import struct
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import attrs

from ._checks import is_uuid
from ._kuzzle import milliseconds
from .tokens import UserToken, claims

__all__ = ["Answer", "Clock", "FakeCircle", "FakeKuzzle", "Received"]


class Clock:
    """
    A clock that can be moved on.

    Args:
        now: What it shows, in seconds since 1970, until it is moved. None: the time, and it goes on by itself.
    """

    def __init__(self, now: float | None = None) -> None:
        self._now = now
        self._moved = 0.0

    def __call__(self) -> float:
        """Read the clock, in seconds since 1970."""
        return (time.time() if self._now is None else self._now) + self._moved

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass."""
        self._moved += seconds


@attrs.frozen
class Received:
    """A request as it arrived. What may be secret is not in its ``repr()``."""

    method: str
    target: str = attrs.field(repr=False)
    headers: Message = attrs.field(repr=False)
    body: bytes = attrs.field(repr=False)
    version: str = "HTTP/1.1"

    @property
    def path(self) -> str:
        """The path, without the query."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        """The arguments of the query. A bare flag is an empty string."""
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    def json(self) -> dict[str, Any]:
        """Read the body as a JSON object. An empty body, or any other JSON, counts as an empty one."""
        value = json.loads(self.body or b"{}")
        return value if isinstance(value, dict) else {}


@attrs.frozen
class Answer:
    """
    An answer to send.

    Args:
        status: The HTTP status.
        body: Bytes, or something to be sent as JSON.
        headers: The headers.
        pace: Seconds to wait before each byte.
        reset: Whether to reset the connection instead.
    """

    status: int = 200
    body: object = attrs.field(default=b"", repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    pace: float = 0.0
    reset: bool = False


class _Refusal(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, error: dict[str, object]) -> None:
        super().__init__(status, error)
        self.status = status
        self.error = error


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 11.0  # Kuzzle's own patience with an idle connection

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        received = Received(self.command, self.path, self.headers, self._body(), self.request_version)
        answer = self.server.fake.receive(received)
        # HTTP/1.1 keeps connections open, whatever the answer says: so does Kuzzle.
        self.close_connection = isinstance(answer, bytes) or answer.reset
        if isinstance(answer, bytes):
            self.wfile.write(answer)
        elif answer.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            data = _on_the_wire(answer, with_body=self.command != "HEAD")
            step = 1 if answer.pace else len(data)
            for start in range(0, len(data), step):
                time.sleep(answer.pace)
                self.wfile.write(data[start : start + step])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:size]
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: object) -> None:
        pass


def _on_the_wire(answer: Answer, *, with_body: bool) -> bytes:
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    head = [f"HTTP/1.1 {answer.status}", *(f"{name}: {value}" for name, value in answer.headers.items())]
    head += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(head).encode("latin-1") + (body if with_body else b"")


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, fake: _Fake) -> None:
        self.fake = fake
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client may hang up at any time. Anything else is a fault of the fake, and told.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Fake(abc.ABC):
    """
    A server on the loopback. It runs in a ``with`` statement, or from `start` to `stop`.

    Its clock is the real one, until it is moved: ``fake.clock.advance(3600)``.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.requests: list[Received] = []
        self.next_answers: deque[Answer | bytes | Callable[[Received], Answer | bytes]] = deque()
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start to answer; after a `stop`, on the same port."""
        self._server = _Server(self._port, self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Close all connections and refuse new ones. What it knows, it keeps."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._server.connections):
                with contextlib.suppress(OSError):  # the client may have closed it
                    connection.shutdown(socket.SHUT_RDWR)
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def receive(self, request: Received) -> Answer | bytes:
        """Answer a request: with what waits in *next_answers*, else as the service would."""
        with self._lock:
            self.requests.append(request)
            if not self.next_answers:
                return self._answer(request)
            answer = self.next_answers.popleft()
        # Not under the lock: it may take its time.
        return answer(request) if callable(answer) else answer

    def lose_next(self, times: int = 1) -> None:
        """Do what the next requests ask for, and hang up without an answer."""
        self.next_answers.extend([lambda request: self.truly(request) and b""] * times)

    def reset_next(self, times: int = 1) -> None:
        """Reset the connections of the next requests, and do nothing for them."""
        self.next_answers.extend([Answer(reset=True)] * times)

    def delay_next(self, seconds: float, times: int = 1) -> None:
        """Answer the next requests *seconds* late."""
        self.next_answers.extend([lambda request: self.truly(request, after=seconds)] * times)

    def drip_next(self, seconds: float, times: int = 1) -> None:
        """Answer the next requests byte by byte, *seconds* apart."""
        self.next_answers.extend([lambda request: attrs.evolve(self.truly(request), pace=seconds)] * times)

    def truly(self, request: Received, *, after: float = 0.0) -> Answer:
        """Answer a request as the service would, *after* some seconds: for functions in *next_answers*."""
        time.sleep(after)
        with self._lock:
            return self._answer(request)

    @abc.abstractmethod
    def _answer(self, request: Received) -> Answer: ...


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _sign(payload: Mapping[str, object], key: bytes) -> str:
    parts = ({"alg": "HS256", "typ": "JWT"}, payload)
    signed = ".".join(_base64url(json.dumps(part, separators=(",", ":")).encode()) for part in parts)
    return f"{signed}.{_base64url(hmac.digest(key, signed.encode(), hashlib.sha256))}"


_INVALID_EXPIRES_IN = (
    'Invalid argument "expiresIn". Expected: a number of milliseconds, or a parsable timespan string'
)
_NO_TIMESPAN = 'Caught an unexpected plugin error: val is not a non-empty string or a valid number. val=""'
_BOTH = "Error verifying token: Both token and cookie are present, could not decide which one to use"
_UNAUTHENTICATED = 'Unauthorized: authentication required to execute the action "auth:{}".'
# id: status, code, message
_KUZZLE_ERRORS: dict[str, tuple[int, int, str]] = {
    "api.assert.invalid_argument": (400, 33619970, _INVALID_EXPIRES_IN),
    "api.process.incompatible_sdk_version": (400, 33685510, "Incompatible SDK client."),
    "api.process.not_enough_nodes": (503, 33685515, "Rejected: this cluster is disabled."),
    "api.process.overloaded": (503, 33685506, "Request discarded: Kuzzle Server is temporarily overloaded."),
    "api.process.shutting_down": (503, 33685511, "Rejected: this node is shutting down."),
    "api.process.too_many_requests": (429, 33685512, "Rejected: requests rate limit exceeded for this user."),
    "api.process.unauthorized_origin": (401, 33685516, 'The origin "http://stranger" is not authorized.'),
    "network.entrypoint.shutting_down": (503, 50593795, "Rejected: instance is shutting down"),
    "network.http.body_parse_failed": (400, 50397196, "Unable to convert the HTTP body to JSON."),
    "network.http.request_too_large": (413, 50397185, "Maximum HTTP request size exceeded."),
    "network.http.unsupported_charset": (400, 50397193, "Unsupported request charset."),
    "network.http.unsupported_compression": (400, 50397188, "Unsupported compression algorithm."),
    "network.http.unsupported_content": (400, 50397192, "Invalid request content-type."),
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
# Found before routing: no envelope.
_BARE = {
    "network.http.body_parse_failed",
    "network.http.request_too_large",
    "network.http.unsupported_charset",
    "network.http.unsupported_compression",
    "network.http.unsupported_content",
}


def _kuzzle_refusal(id: str, message: str | None = None) -> _Refusal:
    status, code, usual = _KUZZLE_ERRORS[id]
    return _Refusal(
        status, {"code": code, "id": id, "message": message or usual, "props": [], "status": status}
    )


@attrs.define
class _Session:
    kuid: str
    expires_at: float  # milliseconds, as Kuzzle says it; -1: never
    ttl: float  # milliseconds; -1: for ever
    gone_at: float  # when Redis forgets it, in seconds
    refreshed: bool = False


class FakeKuzzle(_Fake):
    """
    A Kuzzle server: login, refresh, check, who am I, logout.

    Args:
        users: Passwords by user name.
        clock: Its clock.
        grace: How many seconds a refreshed token lives on. 0: till its own end, as in Kuzzle.
        max_ttl: The longest lifetime it grants, in milliseconds; -1: any.
        cookies: Whether cookie mode is supported.
        strategies: What a strategy's own refresh answers: another ``expiresIn``, or None for the one asked for.

    Attributes:
        requests: What it received.
        next_answers: What to answer instead of the truth: an `Answer`, raw bytes, or a function of the request.
    """

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
        self.users = dict({"foo": "bar"} if users is None else users)
        self.grace = grace
        self.max_ttl = max_ttl
        self.cookies = cookies
        self.strategies = dict(strategies or {})
        self._secret = secrets.token_bytes()
        self._sessions: dict[str, _Session] = {}
        self._api_keys: dict[str, str] = {}
        self._routes: dict[tuple[str, str], tuple[str, Callable[[Received], Answer]]] = {
            ("GET", "/_login/local"): ("login", self._login),
            ("POST", "/_login/local"): ("login", self._login),
            ("POST", "/_refreshToken"): ("refreshToken", self._refresh),
            ("POST", "/_checkToken"): ("checkToken", self._check),
            ("GET", "/_me"): ("getCurrentUser", self._me),
            ("GET", "/users/_me"): ("getCurrentUser", self._me),
            ("POST", "/_logout"): ("logout", self._logout),
            ("POST", "/api-keys/_create"): ("createApiKey", self._create_api_key),
        }

    def login(self, username: str = "foo", expires_in: str | None = None, *, ago: float = 0.0) -> str:
        """Let a user have signed in some seconds *ago*, without asking for a password, and give the jwt."""
        with self._lock:
            self.clock.advance(-ago)
            try:
                return self._issue(username, expires_in)[0]
            finally:
                self.clock.advance(ago)

    def api_key(self, username: str = "foo") -> str:
        """Make an API key for a user. It lives for ever."""
        payload = {"_id": username, "iat": int(self.clock()), "jti": secrets.token_hex(8)}
        key = "kapikey-" + _sign(payload, self._secret)
        self._api_keys[key] = username
        return key

    def knows(self, jwt: str | None) -> bool:
        """Tell whether a token authenticates its user now."""
        return jwt is not None and self._find(jwt) is not None

    def fail_next(self, id: str, times: int = 1) -> None:
        """Refuse the next requests with the error of that *id*, and do nothing else for them."""
        self.next_answers.extend([lambda request: self._refuse(request, _kuzzle_refusal(id))] * times)

    # How a request becomes an answer

    def _answer(self, request: Received) -> Answer:
        if request.version == "HTTP/1.0":
            return self._html(505, "HTTP Version Not Supported")
        if request.headers["Host"] is None:
            return self._html(400, "Bad Request")
        if len(str(request.headers)) + len(request.target) > 4096:
            return self._html(431, "Request Header Fields Too Large")
        try:
            self._check_format(request)
            _, handle = self._route(request)
            if handle is None:
                if request.path.startswith("/_login/"):
                    raise _kuzzle_refusal("security.credentials.unknown_strategy")
                raise _kuzzle_refusal("network.http.url_not_found")
            if not self.cookies and ("cookieAuth" in request.query or self._cookie(request)):
                raise _kuzzle_refusal("security.cookie.unsupported")
            return handle(request)
        except _Refusal as refusal:
            return self._refuse(request, refusal)

    def _route(self, request: Received) -> tuple[str | None, Callable[[Received], Answer] | None]:
        path = re.sub("/+", "/", request.path).rstrip("/")
        return self._routes.get((request.method, path), (None, None))

    @staticmethod
    def _html(status: int, phrase: str) -> Answer:
        page = f"<h1>{phrase}</h1><hr><i>uWebSockets/20 Server</i>".encode()
        return Answer(status, page, {"Connection": "close"})

    @staticmethod
    def _check_format(request: Received) -> None:
        if len(request.body) > 1_000_000:
            raise _kuzzle_refusal("network.http.request_too_large")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise _kuzzle_refusal("network.http.unsupported_compression")
        if request.body and request.headers.get_content_type() != "application/json":
            raise _kuzzle_refusal("network.http.unsupported_content")
        if (request.headers.get_content_charset() or "utf-8") != "utf-8":
            raise _kuzzle_refusal("network.http.unsupported_charset")
        try:
            request.json()
        except ValueError:
            raise _kuzzle_refusal("network.http.body_parse_failed") from None
        for name in ("body", "volatile"):
            if name in request.query:
                raise _Refusal(400, {"message": f'Attribute {name} must be of type "object"', "status": 400})
        if "X-Kuzzle-Volatile" in request.headers and FakeKuzzle._volatile(request) is None:
            raise _kuzzle_refusal("network.http.volatile_parse_failed")

    @staticmethod
    def _volatile(request: Received) -> object:
        try:
            return json.loads(request.headers.get("X-Kuzzle-Volatile", ""))
        except ValueError:
            return None

    def _refuse(self, request: Received, refusal: _Refusal) -> Answer:
        if refusal.error.get("id") in _BARE:
            headers = {"Content-Type": "application/json", "uWebSockets": "20"}
            return Answer(refusal.status, refusal.error, headers)
        return self._envelope(request, refusal.status, error=refusal.error)

    def _envelope(
        self,
        request: Received,
        status: int = 200,
        *,
        result: object = None,
        error: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        action, _ = self._route(request)
        request_id = request.headers.get("X-Kuzzle-Request-Id") or str(uuid.uuid4())
        body = json.dumps(
            {
                "action": action,
                "controller": "auth" if action else None,
                "error": error,
                "headers": {},
                "requestId": request_id,
                "result": result,
                "status": status,
                "volatile": self._volatile(request),
            }
        ).encode()
        packed = "gzip" in request.headers.get("Accept-Encoding", "")
        origin = request.headers.get("Origin")
        return Answer(
            status,
            gzip.compress(body) if packed else body,
            {
                "Connection": "close",
                "X-Kuzzle-Request-Id": request_id,
                **(headers or {}),
                "X-Kuzzle-Node": "undefined",
                "Accept-Encoding": "gzip,deflate,identity",
                "content-type": "application/json",
                "Access-Control-Allow-Credentials": "true",
                **({"Access-Control-Allow-Origin": origin, "Vary": "Origin"} if origin else {}),
                "Content-Encoding": "gzip" if packed else "identity",
                "Date": formatdate(self.clock(), usegmt=True),
                "uWebSockets": "20",
            },
        )

    # Who is asking

    @staticmethod
    def _cookie(request: Received) -> str | None:
        for pair in request.headers.get("Cookie", "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == "authToken" and value != "null":
                return value
        return None

    def _token(self, request: Received) -> str | None:
        """Take the token out of a request."""
        scheme, _, bearer = request.headers.get("Authorization", "").rstrip().partition(" ")
        cookie = self._cookie(request)
        token = bearer if scheme.lower() == "bearer" and bearer else request.query.get("jwt", [None])[0]
        if token and cookie:
            raise _kuzzle_refusal("security.token.verification_error", _BOTH)
        return token or cookie

    def _find(self, jwt: str) -> _Session | None:
        """Look a token up, if it is still good."""
        session = self._sessions.get(jwt)
        if session is not None and self.clock() < min(session.gone_at, claims(jwt).get("exp", math.inf)):
            return session
        if jwt in self._api_keys:
            return _Session(self._api_keys[jwt], -1, -1, math.inf)
        return None

    def _authenticate(self, request: Received) -> tuple[str, _Session] | None:
        """Find out who sent a request; None: nobody in particular."""
        jwt = self._token(request)
        if not jwt:
            return None
        session = self._find(jwt)
        if session is None:
            raise _kuzzle_refusal("security.token.invalid")
        return jwt, session

    def _require(self, request: Received, action: str) -> tuple[str, _Session]:
        found = self._authenticate(request)
        if found is None:
            raise _kuzzle_refusal("security.rights.unauthorized", _UNAUTHENTICATED.format(action))
        return found

    # What it does

    def _issue(self, kuid: str, expires_in: str | None) -> tuple[str, _Session]:
        if expires_in == "":
            raise _kuzzle_refusal("plugin.runtime.unexpected_error")
        ttl = milliseconds("1h" if expires_in is None else expires_in)
        if self.max_ttl > -1 and ttl is not None and (ttl > self.max_ttl or ttl == -1):
            raise _kuzzle_refusal("security.token.ttl_exceeded")
        if not ttl:
            raise _kuzzle_refusal("api.assert.invalid_argument")
        now = self.clock()
        payload: dict[str, object] = {"_id": kuid, "iat": int(now)}
        if ttl != -1:
            payload["exp"] = int(now) + math.floor(ttl / 1000)
        jwt = "kauth-" + _sign(payload, self._secret)
        # Redis takes whole milliseconds, and counts time in 64 bits.
        if ttl > 0 and (not ttl.is_integer() or now * 1000 + ttl >= 2**63):
            raise _kuzzle_refusal("services.cache.write_failed")
        if ttl == -1:
            session = _Session(kuid, -1, -1, math.inf)
        else:
            ttl = int(ttl) if ttl.is_integer() else ttl
            gone_at = now + ttl / 1000 if ttl >= 1 else math.inf
            session = _Session(kuid, int(now * 1000) + ttl, ttl, gone_at)
        self._sessions[jwt] = session
        return jwt, session

    def _give(self, request: Received, jwt: str, session: _Session) -> Answer:
        result = {"_id": session.kuid, "expiresAt": session.expires_at, "jwt": jwt, "ttl": session.ttl}
        if "cookieAuth" not in request.query and not self._cookie(request):
            return self._envelope(request, result=result)
        del result["jwt"]
        # JavaScript's dates end here.
        if abs(session.expires_at) > 8.64e15:
            raise _kuzzle_refusal("plugin.runtime.unexpected_error", "option expires is invalid: Invalid Date")
        expires = formatdate(min(session.expires_at / 1000, 253402300799), usegmt=True)
        cookie = f"authToken={jwt}; Path=/; Expires={expires}; HttpOnly; SameSite=Strict"
        return self._envelope(request, result=result, headers={"Set-Cookie": cookie})

    @staticmethod
    def _expires_in(request: Received) -> str | None:
        values = request.query.get("expiresIn", [])
        if len(values) > 1:
            raise _kuzzle_refusal("api.assert.invalid_argument")
        return values[0] if values else None

    def _login(self, request: Received) -> Answer:
        self._authenticate(request)
        given = request.json() or {name: values[0] for name, values in request.query.items()}
        username = str(given.get("username"))
        if username not in self.users or self.users[username] != given.get("password"):
            raise _kuzzle_refusal("plugin.strategy.missing_user")
        # An empty expiresIn counts as none here, but not in a refresh.
        return self._give(request, *self._issue(username, self._expires_in(request) or None))

    def _refresh(self, request: Received) -> Answer:
        jwt, session = self._require(request, "refreshToken")
        expires_in = self._expires_in(request)
        strategy = request.query.get("strategy", [""])[0]
        if strategy not in ("", "local"):
            if strategy not in self.strategies:
                raise _kuzzle_refusal("security.token.refresh_forbidden", f"{jwt} cannot be refreshed.")
            expires_in = self.strategies[strategy]() or expires_in
        if session.refreshed:
            raise _kuzzle_refusal("security.token.invalid")
        if session.ttl < 0:
            what = "API Key" if jwt in self._api_keys else "Token with infinite TTL"
            raise _kuzzle_refusal("security.token.refresh_forbidden", f"{what} cannot be refreshed.")
        new, given = self._issue(session.kuid, expires_in)
        # The old token is written last: if both are one, this is what is left of it.
        gone_at = self.clock() + self.grace if self.grace else math.inf
        self._sessions[jwt] = attrs.evolve(session, refreshed=True, gone_at=gone_at)
        return self._give(request, new, given)

    def _check(self, request: Received) -> Answer:
        token = request.json().get("token")
        session = self._find(str(token))
        if not token:
            return self._envelope(request, result={"expiresAt": None, "kuid": "-1", "valid": True})
        if session is None:
            return self._envelope(request, result={"state": "Invalid token.", "valid": False})
        return self._envelope(
            request, result={"expiresAt": session.expires_at, "kuid": session.kuid, "valid": True}
        )

    def _me(self, request: Received) -> Answer:
        found = self._authenticate(request)
        kuid = found[1].kuid if found else "-1"
        return self._envelope(request, result={"_id": kuid, "strategies": ["local"]})

    def _logout(self, request: Received) -> Answer:
        cookie_mode = "cookieAuth" in request.query
        # In cookie mode the cookie is taken back and its token left as it is: Kuzzle doesn't look at it.
        if not (cookie_mode and self._cookie(request)):
            found = self._authenticate(request) if cookie_mode else self._require(request, "logout")
            self._sessions.pop(found[0] if found else "", None)
        headers = {"Set-Cookie": "authToken=null; Path=/; HttpOnly; SameSite=Strict"} if cookie_mode else None
        return self._envelope(request, result={"acknowledged": True}, headers=headers)

    def _create_api_key(self, request: Received) -> Answer:
        _, session = self._require(request, "createApiKey")
        source = {"expiresAt": -1, "ttl": -1, "userId": session.kuid, "token": self.api_key(session.kuid)}
        return self._envelope(request, result={"_id": str(uuid.uuid4()), "_source": source})


# code: status, message
_CIRCLE_ERRORS: dict[int, tuple[int, str]] = {
    -1: (400, "Something went wrong."),
    2: (400, "API parameter invalid"),
    3: (403, "Forbidden"),
    5: (429, "Too many requests"),
    401: (401, "Malformed authorization."),
    155102: (404, "Cannot find the user in the system."),
    155103: (401, "Cannot find the user token in the system."),
    155104: (403, "The user token has expired."),
    155105: (403, "The user token is invalid."),
    155109: (403, "The user is disabled."),
    155113: (404, "The device id is not found."),
    155137: (400, "The device id is invalid."),
    155139: (401, "The social sign-in has expired."),
    155140: (401, "The social sign-in has failed."),
    156006: (403, "A test API key cannot be used on live data."),
    156007: (403, "A live API key cannot be used on test data."),
    156020: (409, "Use a new idempotency key."),
}


def _circle_refusal(code: int, **members: object) -> _Refusal:
    status, message = _CIRCLE_ERRORS[code]
    return _Refusal(status, {"code": code, "message": message, **members})


@attrs.frozen
class _Pair:
    user_id: str
    device_id: str
    user_token: str


class FakeCircle(_Fake):
    """
    Circle's user token service: sign-in, the exchange of a user id, the refresh; and ``GET /v1/w3s/user``.

    Args:
        clock: Its clock.
        api_key: The API key it accepts.
        rotate: Whether a refresh brings a new refresh token. If not, it has none in its answer.

    Attributes:
        requests: What it received.
        next_answers: What to answer instead of the truth: an `Answer`, raw bytes, or a function of the request.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        api_key: str = "TEST_API_KEY:fake-id:fake-secret",
        rotate: bool = True,
    ) -> None:
        super().__init__(clock)
        self.api_key = api_key
        self.rotate = rotate
        self._secret = secrets.token_bytes()
        self._user_tokens: dict[str, str] = {}
        self._pairs: dict[str, _Pair] = {}
        self._answered: dict[str, tuple[bytes, dict[str, object]]] = {}

    def knows(self, token: UserToken) -> bool:
        """Tell whether the user token and the refresh token of a pair are good now."""
        alive = self.clock() < claims(token.user_token).get("exp", 0)
        return alive and token.user_token in self._user_tokens and token.refresh_token in self._pairs

    def sign_in(self, user_id: str = "user-1", device_id: str = "device-1") -> UserToken:
        """Sign a user in on a device, as a social sign-in would."""
        with self._lock:
            return UserToken.from_dict(self._issue_pair(user_id, device_id))

    def fail_next(self, code: int, times: int = 1) -> None:
        """Refuse the next requests with that *code*, and do nothing else for them."""
        self.next_answers.extend([lambda request: self._refuse(request, _circle_refusal(code))] * times)

    def _issue_user_token(self, user_id: str) -> dict[str, object]:
        now = int(self.clock())
        payload = {"sub": user_id, "iat": now, "exp": now + 3600, "jti": secrets.token_hex(8)}
        token = _sign(payload, self._secret)
        self._user_tokens[token] = user_id
        return {"userToken": token, "encryptionKey": base64.b64encode(secrets.token_bytes()).decode()}

    def _issue_pair(self, user_id: str, device_id: str) -> dict[str, object]:
        issued = self._issue_user_token(user_id)
        refresh_token = secrets.token_urlsafe(48)
        self._pairs[refresh_token] = _Pair(user_id, device_id, str(issued["userToken"]))
        return {**issued, "userID": user_id, "refreshToken": refresh_token}

    def _answer(self, request: Received) -> Answer:
        routes = {
            ("GET", "/v1/w3s/user"): self._user,
            ("POST", "/v1/w3s/users/token"): self._exchange,
            ("POST", "/v1/w3s/users/token/refresh"): self._refresh,
        }
        handle = routes.get((request.method, request.path))
        if handle is None:
            return self._reply(request, 404, {"code": 404, "message": "Not found."})
        try:
            if request.headers.get("Authorization") != f"Bearer {self.api_key}":
                raise _circle_refusal(401)
            return self._reply(request, 200, {"data": handle(request)})
        except _Refusal as refusal:
            return self._refuse(request, refusal)

    def _refuse(self, request: Received, refusal: _Refusal) -> Answer:
        return self._reply(request, refusal.status, refusal.error)

    def _reply(self, request: Received, status: int, body: object) -> Answer:
        request_id = request.headers.get("X-Request-Id") or str(uuid.uuid4())
        date = formatdate(self.clock(), usegmt=True)
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id, "Date": date}
        return Answer(status, body, headers)

    @staticmethod
    def _members(request: Received, **wanted: Callable[[str], bool]) -> list[str]:
        """Take the members of the body, each a string that passes its check."""
        try:
            given = request.json()
        except ValueError:
            given = {}
        errors = [
            {
                "error": "invalid_value",
                "message": "invalid",
                "location": name,
                "invalidValue": given.get(name),
            }
            for name, good in wanted.items()
            if not isinstance(given.get(name), str) or not good(given[name])
        ]
        if errors:
            raise _circle_refusal(2, errors=errors)
        return [given[name] for name in wanted]

    def _owner(self, user_token: str) -> str:
        """Tell whose a user token is, expired or not."""
        if user_token.count(".") != 2:
            raise _circle_refusal(155105)
        if user_token not in self._user_tokens:
            raise _circle_refusal(155103)
        return self._user_tokens[user_token]

    def _user(self, request: Received) -> dict[str, object]:
        user_token = request.headers.get("X-User-Token", "")
        user_id = self._owner(user_token)
        if self.clock() >= claims(user_token)["exp"]:
            raise _circle_refusal(155104)
        return {"user": {"id": user_id, "status": "ENABLED"}}

    def _exchange(self, request: Received) -> dict[str, object]:
        (user_id,) = self._members(request, userId=lambda value: 5 <= len(value) <= 50)
        if user_id not in {pair.user_id for pair in self._pairs.values()}:
            raise _circle_refusal(155102)
        return self._issue_user_token(user_id)

    def _refresh(self, request: Received) -> dict[str, object]:
        key, refresh_token, device_id = self._members(
            request, idempotencyKey=is_uuid, refreshToken=bool, deviceId=bool
        )
        if key in self._answered:
            body, answered = self._answered[key]
            if body != request.body:
                raise _circle_refusal(156020)
            return answered
        user_token = request.headers.get("X-User-Token", "")
        user_id = self._owner(user_token)
        pair = self._pairs.get(refresh_token)
        if pair is None:
            raise _circle_refusal(155102)
        if pair.user_id != user_id:
            raise _circle_refusal(155103)
        if pair.device_id != device_id:
            raise _circle_refusal(155137)
        for token in {pair.user_token, user_token}:
            self._user_tokens.pop(token, None)
        if self.rotate:
            del self._pairs[refresh_token]
            data = self._issue_pair(pair.user_id, pair.device_id)
        else:
            data = self._issue_user_token(pair.user_id)
            self._pairs[refresh_token] = attrs.evolve(pair, user_token=str(data["userToken"]))
        self._answered[key] = (request.body, data)
        return data


try:
    import pytest
except ImportError:
    pass
else:

    @pytest.fixture
    def fake_kuzzle() -> Iterator[FakeKuzzle]:
        """Run a `FakeKuzzle`."""
        with FakeKuzzle() as fake:
            yield fake

    @pytest.fixture
    def fake_circle() -> Iterator[FakeCircle]:
        """Run a `FakeCircle`."""
        with FakeCircle() as fake:
            yield fake
