"""One request and its reply: the only place that touches the network."""

from __future__ import annotations

import functools
import os
import ssl
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from http.cookiejar import Cookie, eff_request_host  # type: ignore[attr-defined]
from typing import Any

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.cookies import MockRequest, RequestsCookieJar, create_cookie, get_cookie_header
from urllib3 import Retry, Timeout
from urllib3.exceptions import HTTPError, NewConnectionError

from ._wire import Reply, Request, __version__, failure
from .errors import OutcomeUnknownError, UnavailableError

_LARGEST_BODY = 1024 * 1024
_NEVER_SENT = (
    NewConnectionError,
    requests.ConnectTimeout,
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidURL,
    requests.exceptions.ProxyError,
    ssl.SSLCertVerificationError,
)


def _while() -> int:
    """Count the whiles of a few seconds: what is kept for one is made anew in the next."""
    return int(time.monotonic() / 5)


@functools.lru_cache(maxsize=1)
def _session_of(process: int, while_: int) -> requests.Session:  # noqa: ARG001
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=64))
    return session


def _own_session() -> requests.Session:
    """
    Get the session of callers who have none.

    There is a new one every few seconds: a connection that was idle for longer may be dead, and a request on it
    be lost, where a new one tells that nothing was sent. And there is one for each process: a forked child that
    used its parent's connections would read its parent's answers.
    """
    return _session_of(os.getpid(), _while())


_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
# What proxies and CA bundles are read from.
_VARIABLES = (*_PROXIES, *map(str.upper, _PROXIES), "REQUEST_METHOD", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@functools.lru_cache(maxsize=64)
def _own_settings(url: str, while_: int, *environment: str | None) -> Mapping[str, Any]:  # noqa: ARG001
    return _own_session().merge_environment_settings(url, {}, True, None, None)


def _settings(session: requests.Session | None, url: str) -> dict[str, Any]:
    """Get proxies and TLS settings, of the environment too. Reading that takes as long as a request."""
    if session is None:
        return {**_own_settings(url, _while(), *map(os.environ.get, _VARIABLES))}
    return {**session.merge_environment_settings(url, {}, True, None, None)}


def _adapter(session: requests.Session, url: str) -> BaseAdapter:
    """
    Get the session's adapter, without the retries it may have.

    urllib3 may send a POST again after an error on the answer, and nobody would know.
    """
    adapter = session.get_adapter(url)
    if not isinstance(adapter, HTTPAdapter) or not adapter.max_retries.total:
        return adapter
    same: HTTPAdapter = object.__new__(type(adapter))
    vars(same).update({**vars(adapter), "max_retries": Retry(0, read=False)})
    return same


def send(
    request: Request, *, session: requests.Session | None, connect: float | None, timeout: float | None
) -> Reply:
    """
    Send *request* once and read the reply, whatever it is.

    The session lends its adapters, proxies, TLS settings, headers, parameters and cookies. It is
    not changed: its own ``send()`` would follow redirects, keep cookies and call hooks, so it is
    passed by.

    Args:
        request: What to send.
        session: The caller's session, or None for one of our own.
        connect: Seconds to wait for a connection, TLS and all; None for ever.
        timeout: Seconds to wait for the answer, connection included; None for ever.

    Raises:
        UnavailableError: Nothing was sent.
        OutcomeUnknownError: Something was sent, and no complete answer came.
    """
    lender = session or _own_session()
    never_sent, reason = False, ""
    sent_at = time.time()
    try:
        prepared = _prepare(request, lender)
        settings = _settings(session, request.url)
        adapter = _adapter(lender, request.url)
        settings["timeout"] = Timeout(total=timeout, connect=connect)
        with adapter.send(prepared, **settings) as response:
            return Reply(
                status=response.status_code,
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


@functools.lru_cache(maxsize=64)
def _prepared_url(url: str) -> str:
    prepared = requests.PreparedRequest()
    prepared.prepare_url(url, None)
    return prepared.url or url


def _prepare(request: Request, session: requests.Session) -> requests.PreparedRequest:
    """Write down what is sent, step by step as requests does: as a whole it would take three times as long."""
    headers = requests.structures.CaseInsensitiveDict(session.headers)
    headers.pop("Authorization", None)
    headers.update(request.headers)
    headers["Accept"] = "application/json"
    headers["Accept-Encoding"] = "identity"  # the answer is short; packed, it could be a bomb
    headers["User-Agent"] = f"refresher/{__version__}"
    if request.bearer is not None:
        headers["Authorization"] = f"Bearer {request.bearer}"
    prepared = requests.PreparedRequest()
    prepared.prepare_method("POST")
    prepared.url = _prepared_url(request.url)
    if session.params:
        prepared.prepare_url(prepared.url, session.params)
    prepared.prepare_headers({name: value for name, value in headers.items() if value is not None})
    jar = RequestsCookieJar()
    for cookie in session.cookies:
        if cookie.name not in request.cookies:
            jar.set_cookie(cookie)
    prepared.prepare_cookies(jar)
    prepared.prepare_body(request.body, None)
    cookies = [f"{name}={value}" for name, value in request.cookies.items() if value is not None]
    if cookies:
        prepared.headers["Cookie"] = "; ".join(filter(None, [prepared.headers.get("Cookie"), *cookies]))
    return prepared


def _body(response: requests.Response) -> bytes:
    """Read the body. One of more than 1 MiB, or packed in an unknown way, is no answer and reads as empty."""
    body = b""
    for chunk in response.raw.stream(65536, decode_content=False):
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


def _set_cookies(response: requests.Response) -> dict[str, str]:
    """Read names and values of the cookies in the reply, without a jar that judges them by the local clock."""
    pairs = (header.partition(";")[0].partition("=") for header in response.raw.headers.getlist("Set-Cookie"))
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
