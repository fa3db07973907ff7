"""One request and its reply, on a connection of our own or of the caller's: the only socket."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import http.client
import io
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from http.client import HTTPException, HTTPResponse, IncompleteRead, RemoteDisconnected, ResponseNotReady, parse_headers
from typing import Any, TypeVar

import attrs
import requests
import urllib3.util
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.cookies import RequestsCookieJar
from requests.exceptions import ConnectTimeout, InvalidSchema, InvalidURL
from requests.utils import is_ipv4_address
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Retry, Timeout
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError

from . import __version__
from ._system import is_of_signal, work_aside
from ._text import reveal
from .services import LOST, UNREACHED, Caller, Reply, Request, failure

_T = TypeVar("_T")

_LARGEST_BODY = 1024 * 1024
_MOST_INTERIM_ANSWERS = 100
_MOST_CHUNKS = 2000
# How often to ask whether the caller still waits, in seconds: while a thread works, while a socket is read. How long to
# connect without asking, and to one address of several.
_THREAD_SLICE, _SOCKET_SLICE, _AT_ONCE, _ONE_ADDRESS = 0.04, 0.5, 0.1, 10.0
# By how many seconds the caller may decide to wait longer, on a connection of its own.
_EXTENSION = 60.0
# How many pieces of an answer to read after the caller's time is up, if they are there.
_OVERTIME = 5
# For how many seconds we keep our connections, and what the environment says of proxies and CA bundles.
_PERIOD = 5.0
# urllib3 may send a POST again after an error on the answer, and nobody would know.
_ONCE = Retry(0, read=False)
_RAW: Any = {"retries": _ONCE, "redirect": False, "assert_same_host": False, "preload_content": False}

# A reply is short. Compressed, a few bytes could become gigabytes.
_OURS = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": f"refresher/{__version__}"}

# What the network and those who speak to it raise.
_FAILURES = (OSError, ValueError, HTTPException, HTTPError)
_NEVER_SENT = (ConnectTimeoutError, NewConnectionError, ProxyError, ConnectTimeout, InvalidSchema, InvalidURL)
# If this fails, nothing was sent. OpenSSL's errors do not say so.
_CONNECTING = "urllib3.connection", "connect"
_REASONS: dict[type, str] = {
    TimeoutError: "timed out",
    socket.gaierror: "unknown host name",
    RemoteDisconnected: "the connection was closed",
    IncompleteRead: "the response was incomplete",
    urllib3.exceptions.IncompleteRead: "the response was incomplete",
}


@attrs.define
class _Call:
    """For how long the caller of `send` waits, and whether the request has left."""

    caller: Caller
    steady: Callable[[], float]
    sent_at: float | None = None
    refusal: Exception | None = None
    overtime: int = 0

    def remaining(self) -> float:
        """Seconds until the caller gives up, on connecting or on the answer."""
        return self.caller.answer_by() - self.steady()

    def leave(self) -> None:
        """Note that the request leaves now, unless the caller stops it."""
        if self.remaining() <= 0:
            raise TimeoutError
        self._let(self.caller.depart)
        self.sent_at = time.time()

    def rest(self) -> None:
        """Let the caller do something else, while nothing comes."""
        context = _current.set(None)
        try:
            self._let(self.caller.idle)
        finally:
            _current.reset(context)

    def _let(self, decide: Callable[[], None]) -> None:
        try:
            decide()
        except Exception as error:
            self.refusal = error
            raise HTTPException from None

    def receive(self, sock: socket.socket, buffer: Any) -> int:
        """Receive a piece of data, for as long as the caller waits."""
        while True:
            remaining = self.remaining()
            # What came while this process was suspended is still read, but a peer that drips has to end.
            self.overtime += remaining <= 0
            if self.overtime > _OVERTIME:
                raise TimeoutError
            sock.settimeout(min(max(remaining, 0.001), _SOCKET_SLICE))
            try:
                return sock.recv_into(buffer)
            except TimeoutError as error:
                if remaining <= 0 or _of_signal(error) is not None:
                    raise
            self.rest()


# The call that connections of our own are used for at the moment.
_current: contextvars.ContextVar[Any] = contextvars.ContextVar("_current")


def send(request: Request, *, session: requests.Session | None, caller: Caller, steady: Callable[[], float]) -> Reply:
    """
    Send a request once and read the reply, whatever it is. `Runtime.send` says more; *steady* is its clock.

    The wait ends, whatever the peer does, even if it sends byte by byte. As long as nothing was sent, it ends
    when `caller.answer_by()` is over.

    A caller's session lends its adapters, proxies, TLS settings, headers, parameters and cookies. It is not
    changed: its own ``send()`` would follow redirects, keep cookies and call hooks, so that is not used. Its
    adapters do not say when they have connected, so `caller.depart` is called before.

    Raises:
        UnavailableError: Nothing was sent.
        OutcomeUnknownError: Something was sent, and no complete answer came.
    """
    call = _Call(caller, steady)
    classes = HTTPConnectionPool.ConnectionCls, HTTPSConnectionPool.ConnectionCls
    parts = HTTPAdapter.send, requests.Session.get_adapter, requests.Session.send, *classes
    # Those of urllib3-future, which takes urllib3's place, and sockets of PyOpenSSL do not work like Python's own.
    is_usual = not _is_replaced(*parts) and all(issubclass(each, http.client.HTTPConnection) for each in classes)
    # A pool's lock is held by the call that a signal handler or a __del__ interrupts.
    is_own = is_usual and not urllib3.util.IS_PYOPENSSL and _current.get(None) is None
    lender = session if session is not None or is_own else requests.Session()
    context = _current.set(call)
    trouble: BaseException
    # A signal handler may raise in the main thread: Celery's does, at a task's time limit.
    failures = _FAILURES if threading.current_thread() is threading.main_thread() else Exception
    try:
        return _send_on_own(request, call) if lender is None else _send_on_lent(request, lender, call)
    except BaseException as error:
        interrupt = _of_signal(error)
        if isinstance(error, failures) and interrupt is None:
            was_sent = call.sent_at is not None and (lender is None or not _was_never_sent(error))
            trouble = call.refusal or failure(LOST if was_sent else UNREACHED, request, reason=_reason(error))
        else:
            trouble = (interrupt or error).with_traceback(None)
            trouble.__context__ = None
    finally:
        _current.reset(context)
    raise trouble  # out here, without a context and the frames of the HTTP library: those hold the request


def _send_on_own(request: Request, call: _Call) -> Reply:
    """Send on a connection of our own, straight: a session and an adapter take twice as long."""
    pool, target = _pools(os.getpid(), call.steady() // _PERIOD)(request.url)
    limit = Timeout(connect=_timeout(call.remaining()), read=None)
    return _reply(pool.urlopen("POST", target, reveal(request.body), _headers(request), timeout=limit, **_RAW), call)


def _send_on_lent(request: Request, session: requests.Session, call: _Call) -> Reply:
    """Send on a connection of the caller's, in a thread: it may not keep to its time."""
    options: Any = session.merge_environment_settings(request.url, {}, True, None, None)
    post, prepared = _poster(session, request.url), _prepare(request, session)
    connect = _timeout(call.remaining())
    call.leave()
    # A thread that nobody waits for any more comes to an end too.
    options["timeout"] = connect, _timeout(call.remaining() + _EXTENSION)
    return _watched(lambda: _reply(_unread(post(prepared, **options)), call), call.remaining)


def _watched(work: Callable[[], _T], remaining: Callable[[], float]) -> _T:
    """
    Run *work* in a thread of its own, as it may take too long, and wait for it while time remains.

    Raises:
        TimeoutError: It is not done. It goes on, and its outcome is dropped.
    """
    outcome = work_aside(work, daemon=True)
    while not outcome.done():
        is_late = remaining() <= 0
        # Also once more if late: a socket's own timeout tells more, and what came while suspended is taken.
        wait([outcome], timeout=_THREAD_SLICE)
        if is_late and not outcome.done():
            raise TimeoutError
    error = outcome.exception()
    if isinstance(error, Exception) and not isinstance(error, _FAILURES):
        raise HTTPException(error)  # an adapter may raise whatever it likes
    return outcome.result()


def _timeout(seconds: float) -> float | None:
    """Return a timeout that a socket accepts. None means no limit."""
    return None if seconds > 1e9 else max(seconds, 0.001)


# The request


def _headers(request: Request, cookies: str | None = None) -> dict[str, str]:
    """List all headers to send. *cookies*: those of the session."""
    pairs = [cookies, *(f"{name}={reveal(value)}" for name, value in request.cookies.items() if value)]
    headers = {**{name: reveal(value) for name, value in request.headers.items()}, **_OURS}
    return {**headers, "Cookie": "; ".join(filter(None, pairs))} if any(pairs) else headers


def _prepare(request: Request, session: requests.Session) -> requests.PreparedRequest:
    """Write down what is sent. The session's own way to do so would read the ``.netrc``."""
    prepared = requests.Request("POST", request.url, data=reveal(request.body), params=session.params).prepare()
    headers: Any = session.headers
    prepared.headers.update((name, value) for name, value in headers.items() if value is not None)
    prepared.headers.pop("Authorization", None)
    jar, there = RequestsCookieJar(), list[Any](session.cookies)
    for cookie in filter(None, there):  # None is one that another thread has just removed
        if cookie.name not in request.cookies:
            jar.set_cookie(cookie)
    prepared.prepare_cookies(jar)
    prepared.headers.update(_headers(request, prepared.headers.get("Cookie")))
    return prepared


def _is_replaced(*parts: Any) -> bool:
    """Whether parts of requests or urllib3 are replaced, as in tests. What replaces them gets our requests too."""
    homes = "requests.adapters", "requests.sessions", "urllib3.connection"
    return any(part.__module__ not in homes for part in parts)


def _poster(session: requests.Session, url: str) -> Callable[..., requests.Response]:
    """Get what sends a prepared request: the session's adapter, without the retries it may have."""
    stand_in = getattr(vars(session).get("send"), "__func__", requests.Session.send)
    if _is_replaced(stand_in):
        return functools.partial(stand_in, session, allow_redirects=False)
    adapter = session.get_adapter(url)
    retries = getattr(adapter, "max_retries", None)
    if isinstance(retries, Retry) and (retries.total != 0 or retries.status_forcelist):
        same: BaseAdapter = object.__new__(type(adapter))
        vars(same).update({**vars(adapter), "max_retries": _ONCE})
        return same.send
    return adapter.send


# The reply


def _reply(response: Any, call: _Call, interim: int = 0) -> Reply:
    """Read the reply, to its end. Adapters take an interim answer for it."""
    status, fields, at = response.status, response.headers, call.sent_at or 0.0
    try:
        if status == 101 or interim > _MOST_INTERIM_ANSWERS:
            raise ResponseNotReady
        if status < 200:
            original: Any = response._original_response
            original.headers = None  # so that it begins again
            original.begin()
            options: Any = {"preload_content": False, "original_response": original}
            final = urllib3.HTTPResponse(original, original.getheaders(), original.status, **options)
            return _reply(final, call, interim + 1)
        return Reply(status=status, headers=fields, cookies=_cookies(fields), body=_body(response), requested_at=at)
    finally:
        response.close()
        response.release_conn()  # its place in a pool


def _unread(response: Any) -> Any:
    """Return what to read a response of requests from. What tests put in its place may have a content only."""
    if response.raw is not None and not getattr(response, "_content_consumed", False):
        return response.raw
    content = io.BytesIO(response.content or b"")
    return urllib3.HTTPResponse(content, response.headers, response.status_code, preload_content=False)


def _body(response: Any) -> bytes:
    """Read the body. One of more than 1 MiB reads as empty. To read a flood of chunks would take too long."""
    received = io.BytesIO()
    for number, _ in enumerate(map(received.write, response.stream(65536, decode_content=False))):
        if number >= _MOST_CHUNKS:
            raise ResponseNotReady
        if received.tell() > _LARGEST_BODY:
            return b""
    return _decoded(received.getvalue(), response.headers.get("Content-Encoding", ""))


def _decoded(body: bytes, encoding: str) -> bytes:
    """Decompress a body, if that is possible: servers and proxies do not always do what they say."""
    # 32 + 15: gzip or zlib, as its first bytes say. -15: without any.
    for window in (47, -15) if re.search("(?i)gzip|deflate", encoding) else ():
        with contextlib.suppress(zlib.error):
            stream = zlib.decompressobj(window)
            plain = stream.decompress(body, _LARGEST_BODY + 1)
            if stream.eof or len(plain) > _LARGEST_BODY:
                return plain if len(plain) <= _LARGEST_BODY else b""
    return body


def _cookies(headers: Any) -> dict[str, str]:
    """Read names and values of the cookies in the reply, without a jar that judges them by the local clock."""
    cookies = (text.partition(";")[0] for name, text in headers.items() if name.lower() == "set-cookie")
    return {name.strip(): value.strip() for name, _, value in (cookie.partition("=") for cookie in cookies)}


# Errors


def _links(error: BaseException) -> Iterator[BaseException]:
    """Yield the HTTP library's error and its causes. The last one is the root."""
    link: BaseException | None = error
    while link is not None:
        yield link
        inner = (getattr(link, "reason", None), *link.args, link.__cause__)
        link = next((each for each in inner if isinstance(each, BaseException)), None)


def _of_signal(error: BaseException) -> BaseException | None:
    """Return what a signal handler raised, which may look like an error of the network, if that is behind an error."""
    found = [*filter(is_of_signal, _links(error))]
    return found[-1] if found else None


def _was_never_sent(error: Exception) -> bool:
    """Whether the service cannot have seen the request, although an adapter had it."""
    if type(error) is OSError and error.errno is None:  # requests' complaint about a missing CA bundle
        return True
    links = list(_links(error))
    frames = (frame for link in links for frame, _ in traceback.walk_tb(link.__traceback__))
    places = ((frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames)
    return _CONNECTING in places or any(isinstance(link, _NEVER_SENT) for link in links)


def _reason(error: Exception) -> str:
    """Return the root cause, in words that cannot contain a secret."""
    *_, root = _links(error)
    if isinstance(root, ssl.SSLError):  # their numbers are OpenSSL's
        reason = str(getattr(root, "reason", None) or "").replace("_", " ").lower()  # what is made in Python has none
        return str(getattr(root, "verify_message", None) or reason or "TLS failed")
    number = 0 if isinstance(root, socket.gaierror) else getattr(root, "errno", None) or 0
    # Windows has no words for the errors of its sockets, which begin at 10,000.
    return os.strerror(number) if 0 < number < 10_000 else _REASONS.get(type(root), type(root).__name__)


# Connections of our own, for callers who lend none


class _Response(HTTPResponse):
    """
    The response after all interim ones, for as long as the caller waits, however many pieces it comes in.

    If anything came before it or comes after it, its connection is not used again.
    """

    def __init__(self, connection: Any, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp: Any
        self.fp.raw.readinto = self._receive
        self._connection, self._sock, self._interim, self._is_cut = connection, sock, 0, False
        self._call: _Call | None = _current.get()

    def _receive(self, buffer: Any) -> int:
        if self._call is None:
            return 0
        count = self._call.receive(self._sock, buffer)
        self._is_cut = count == 0
        return count

    def _read_status(self) -> tuple[str, int, str]:
        while self._interim <= _MOST_INTERIM_ANSWERS:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if status >= 200 or status == 101:
                return version, status, reason
            parse_headers(self.fp)
            self._interim += 1
        raise ResponseNotReady

    def begin(self) -> None:
        super().begin()
        if self._is_cut:
            raise IncompleteRead(b"")  # to http.client, headers that break off are all there are
        self.will_close = self.will_close or self._interim > 0

    def _close_conn(self) -> None:
        self._call = None
        more = self.fp.peek(1) or getattr(self._sock, "pending", int)()
        super()._close_conn()  # type: ignore[misc]
        if more:
            self._connection.close()


def _censor(record: logging.LogRecord) -> bool:
    """Leave out of urllib3's complaint about malformed headers what they are: the new token may be among them."""
    complaint = "Failed to parse headers"
    if _current.get(None) is not None and complaint in str(record.msg):
        record.msg, record.args, record.exc_info = complaint, (), None
    return True


logging.getLogger("urllib3.connection").addFilter(_censor)

# What stands in for urllib3's connections in a test may do so while this is imported.
_Base: Any = object


class _Connection(_Base):  # type: ignore[misc]
    """A connection that keeps to the time of the call it's used for."""

    timeout: Any
    debuglevel = 0  # it would print tokens

    def connect(self) -> Any:
        call = _current.get()

        def connect() -> None:
            super(_Connection, self).connect()
            if call.remaining() <= 0:  # nobody waits for it any more
                self.close()
                raise TimeoutError

        # Names are looked up without a timeout, and each address has one of its own, and so has TLS. One address alone
        # keeps to its time, and mostly answers sooner than a thread starts.
        if type(self) is _patient(HTTPConnectionPool.ConnectionCls) and is_ipv4_address(self.host):
            limit, self.timeout = self.timeout, _timeout(min(call.remaining(), _AT_ONCE))
            try:
                return super().connect()
            except ConnectTimeoutError as error:
                if isinstance(error, NewConnectionError) or _of_signal(error) is not None:
                    raise
            self.timeout = limit
        return _watched(connect, call.remaining)

    def _new_conn(self) -> Any:
        """Connect to one address after the other. One that drops what it gets must not take the time of all."""
        remaining = _current.get().remaining()
        self.timeout = min(self.timeout or math.inf, max(remaining / 2, 2.0), _ONE_ADDRESS)
        sock = super()._new_conn()
        sock.settimeout(_timeout(remaining))  # of TLS
        return sock

    def _tunnel(self) -> None:
        super()._tunnel()
        self.sock.settimeout(_timeout(_current.get().remaining()))  # of TLS, again

    def putrequest(self, *args: Any, **options: Any) -> None:
        if self.is_closed:
            self.connect()
        _current.get().leave()
        super().putrequest(*args, **options)

    def send(self, piece: Any) -> None:
        self.sock.settimeout(_timeout(_current.get().remaining()))
        super().send(piece)

    def response_class(self, *args: Any, **options: Any) -> _Response:
        return _Response(self, *args, **options)


# Makes of a kind of connection one that is patient.
_patient = functools.lru_cache(
    lambda kind: kind if issubclass(kind, _Connection) else type("Connection", (_Connection, kind), {})
)


@functools.lru_cache(maxsize=1)
def _pools(process: int, period: float) -> Callable[[str], tuple[Any, str]]:  # noqa: ARG001
    """
    Get what finds our connections to a URL, and what to ask for on them.

    They are new every few seconds: a connection that was idle for longer may be broken, and a request on it
    would be lost. If connecting anew fails, it is certain that nothing was sent. And they are new in each
    process: a forked child that used its parent's connections would read its parent's answers.
    """
    return functools.lru_cache(maxsize=64)(functools.partial(_find_pool, HTTPAdapter(pool_maxsize=64)))


def _find_pool(adapter: Any, url: str) -> tuple[Any, str]:
    # It takes as long as a request, so it's remembered.
    request = requests.Request("POST", url).prepare()
    settings: Any = requests.Session().merge_environment_settings(url, {}, True, None, None)
    pool: Any = adapter.get_connection_with_tls_context(request, settings["verify"], settings["proxies"])
    adapter.cert_verify(pool, url, settings["verify"], None)
    pool.ConnectionCls = _patient(pool.ConnectionCls)
    return pool, adapter.request_url(request, settings["proxies"])
