"""One request and its reply, on a connection of our own or of the caller's."""

from __future__ import annotations

import os
import ssl
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPException
from http.cookiejar import Cookie, eff_request_host  # type: ignore[attr-defined]
from typing import Any

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.cookies import MockRequest, RequestsCookieJar, create_cookie, get_cookie_header
from urllib3 import Retry, Timeout
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError

from ._connections import own_session, pool_of
from ._threads import within
from ._wire import Reply, Request, __version__, failure
from .errors import OutcomeUnknownError, UnavailableError

_LARGEST_BODY = 1024 * 1024
_NEVER_SENT = (
    ConnectTimeoutError,
    NewConnectionError,
    ProxyError,
    requests.ConnectTimeout,
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidURL,
    requests.exceptions.ProxyError,
    ssl.SSLCertVerificationError,
)
# urllib3 may send a POST again after an error on the answer, and nobody would know.
_ONCE = Retry(0, read=False)


def _adapter(session: requests.Session, url: str) -> BaseAdapter:
    """Get the session's adapter, without the retries it may have."""
    adapter = session.get_adapter(url)
    if not isinstance(adapter, HTTPAdapter) or not adapter.max_retries.total:
        return adapter
    same: HTTPAdapter = object.__new__(type(adapter))
    vars(same).update({**vars(adapter), "max_retries": _ONCE})
    return same


def send(
    request: Request, *, session: requests.Session | None, connect: float | None, timeout: float | None
) -> Reply:
    """
    Send *request* once and read the reply, whatever it is. Whatever the peer does, dripping bytes too, there is
    an end to it in time.

    The session lends its adapters, proxies, TLS settings, headers, parameters and cookies. It is
    not changed: its own ``send()`` would follow redirects, keep cookies and call hooks, so it is
    passed by.

    Args:
        request: What to send.
        session: The caller's session, or None for connections of our own.
        connect: Seconds to wait for a connection, TLS and all; None for ever.
        timeout: Seconds to wait for the answer, connection included; None for ever.

    Raises:
        UnavailableError: Nothing was sent.
        OutcomeUnknownError: Something was sent, and no complete answer came.
    """
    limit = Timeout(total=timeout, connect=connect)
    if session is None and _is_itself():
        return _reply(request, lambda: _post(request, limit))
    lender = own_session() if session is None else session
    try:
        # The socket's own timeout tells more, so it comes first.
        return within(
            None if timeout is None else timeout + 0.1,
            lambda: _reply(request, lambda: _lent(request, lender, limit)),
        )
    except TimeoutError:
        pass
    raise failure(OutcomeUnknownError, request, spent=None, what="did not answer in time")


def _is_itself() -> bool:
    """Tell that nothing stands in for requests, as in tests. What does has to see our requests too."""
    sends = HTTPAdapter.send, requests.Session.get_adapter
    return [send.__module__ for send in sends] == ["requests.adapters", "requests.sessions"]


def _reply(request: Request, post: Callable[[], Any]) -> Reply:
    """Read the reply to a request that is being sent."""
    never_sent, reason = False, ""
    sent_at = time.time()
    try:
        with post() as response:
            return Reply(
                status=response.status,
                headers=response.headers,
                cookies=_set_cookies(response),
                body=_body(response),
                sent_at=sent_at,
            )
    except (OSError, ValueError, HTTPError, HTTPException) as error:
        never_sent, reason = _was_never_sent(error), _reason(error)
    # Raised out here, so that our error has no context: those of the HTTP library hold the request.
    if never_sent:
        raise failure(UnavailableError, request, spent=False, what=f"could not be reached: {reason}")
    raise failure(OutcomeUnknownError, request, spent=None, what=f"did not answer, or not to the end: {reason}")


def _post(request: Request, timeout: Timeout) -> Any:
    """Send on a connection of our own, straight: a session and an adapter take twice as long."""
    pool, target = pool_of(request.url)
    cookies = _cookies(request)
    return pool.urlopen(
        "POST",
        target,
        request.body,
        {**_headers(request), **({"Cookie": cookies} if cookies else {})},
        retries=_ONCE,
        redirect=False,
        assert_same_host=False,
        timeout=timeout,
        preload_content=False,
        decode_content=False,
    )


def _lent(request: Request, session: requests.Session, timeout: Timeout) -> Any:
    """Send on a connection of the caller's."""
    settings: Any = session.merge_environment_settings(request.url, {}, True, None, None)
    adapter = _adapter(session, request.url)
    return adapter.send(_prepare(request, session), **{**settings, "timeout": timeout}).raw


def _headers(request: Request) -> dict[str, str]:
    headers = {
        **request.headers,
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # the answer is short; packed, it could be a bomb
        "User-Agent": f"refresher/{__version__}",
    }
    if request.bearer is not None:
        headers["Authorization"] = f"Bearer {request.bearer}"
    return headers


def _cookies(request: Request) -> str:
    return "; ".join(f"{name}={value}" for name, value in request.cookies.items() if value is not None)


def _prepare(request: Request, session: requests.Session) -> requests.PreparedRequest:
    """Write down what is sent, step by step as requests does: as a whole it would read the ``.netrc``."""
    headers = requests.structures.CaseInsensitiveDict(session.headers)
    headers.pop("Authorization", None)
    headers.update(_headers(request))
    prepared = requests.PreparedRequest()
    prepared.prepare_method("POST")
    prepared.prepare_url(request.url, session.params)
    prepared.prepare_headers({name: value for name, value in headers.items() if value is not None})
    jar = RequestsCookieJar()
    for cookie in session.cookies:
        if cookie.name not in request.cookies:
            jar.set_cookie(cookie)
    prepared.prepare_cookies(jar)
    prepared.prepare_body(request.body, None)
    if cookies := _cookies(request):
        prepared.headers["Cookie"] = "; ".join(filter(None, [prepared.headers.get("Cookie"), cookies]))
    return prepared


def _body(response: Any) -> bytes:
    """Read the body. One of more than 1 MiB, or packed in an unknown way, is no answer and reads as empty."""
    body = b""
    for chunk in response.stream(65536, decode_content=False):
        body += chunk
        if len(body) > _LARGEST_BODY:
            return b""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        try:
            # 32 + 15: gzip or deflate, it sees which.
            body = zlib.decompressobj(47).decompress(body, _LARGEST_BODY + 1)
        except zlib.error:
            return b""
    return body if len(body) <= _LARGEST_BODY else b""


def _set_cookies(response: Any) -> dict[str, str]:
    """Read names and values of the cookies in the reply, without a jar that judges them by the local clock."""
    pairs = (header.partition(";")[0].partition("=") for header in response.headers.getlist("Set-Cookie"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def _links(error: BaseException) -> Iterator[BaseException]:
    """Walk from what the HTTP library raised down to what was the matter."""
    link: BaseException | None = error
    while link is not None:
        yield link
        inner = (getattr(link, "reason", None), *link.args, link.__cause__)
        link = next((each for each in inner if isinstance(each, BaseException)), None)


def _was_never_sent(error: Exception) -> bool:
    """Tell whether the service cannot have seen the request."""
    links = list(_links(error))
    frames = [frame for link in links for frame, _ in traceback.walk_tb(link.__traceback__)]
    return (
        type(error) is OSError  # requests' complaint about a missing CA bundle
        or any(isinstance(link, _NEVER_SENT) for link in links)
        or any(frame.f_code.co_name == "do_handshake" for frame in frames)
    )


def _reason(error: Exception) -> str:
    """Say what was the matter, in words that cannot hold a secret."""
    *_, root = _links(error)
    if isinstance(root, ssl.SSLCertVerificationError):
        return str(root.verify_message)
    if isinstance(root, OSError) and root.errno:
        return os.strerror(root.errno)
    return type(root).__name__


def _cookies_for(session: requests.Session, url: str, name: str) -> list[Cookie]:
    """List the session's cookies of one *name* that would go to *url*."""
    request = requests.Request("POST", url).prepare()
    found: list[Cookie] = []
    for cookie in session.cookies:
        jar = RequestsCookieJar()
        jar.set_cookie(cookie)
        if cookie.name == name and get_cookie_header(jar, request):  # type: ignore[no-untyped-call]
            found.append(cookie)
    return found


def find_cookie(session: requests.Session, url: str, name: str) -> str | None:
    """Look up the value of the session's cookie that would go to *url*."""
    return next((cookie.value for cookie in _cookies_for(session, url, name)), None)


def keep_cookie(session: requests.Session, url: str, name: str, value: str) -> None:
    """
    Put a cookie into the session's jar, in place of all of its *name* that would go to *url*.

    It has no expiry: by that, a jar whose clock is ahead would throw away what may be the only copy of a token.
    """
    host = eff_request_host(MockRequest(requests.Request("POST", url).prepare()))[1]
    cookie: Cookie = create_cookie(  # type: ignore[no-untyped-call]
        name, value, domain=host, path="/", rest={"HttpOnly": ""}
    )
    for old in _cookies_for(session, url, name):
        session.cookies.clear(old.domain, old.path, old.name)
    session.cookies.set_cookie(cookie)
