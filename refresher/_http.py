"""One request and its reply: the only place that touches the network."""

from __future__ import annotations

import functools
import json
import os
import re
import ssl
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from http.cookiejar import Cookie, eff_request_host  # type: ignore[attr-defined]
from typing import Any

import attrs
import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from requests.cookies import MockRequest, RequestsCookieJar, create_cookie, get_cookie_header
from urllib3 import Retry, Timeout
from urllib3.exceptions import HTTPError, NewConnectionError

from ._checks import is_uuid
from .errors import (
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
)

__version__ = "0.1.0"

_LARGEST_BODY = 1024 * 1024
_NEVER_SENT = (
    NewConnectionError,
    requests.ConnectTimeout,
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidURL,
    requests.exceptions.ProxyError,
    ssl.SSLCertVerificationError,
)


@attrs.frozen(kw_only=True)
class Request:
    """
    A POST, written down.

    Args:
        provider: ``"kuzzle"`` or ``"circle"``, for errors and logs.
        credential: The secret that this request is about.
        request_id: Names the request in the service's logs.
        bearer: Goes into ``Authorization``, past any ``.netrc``.
        cookies: Cookies by name: what to send, or None to hold back the session's own.
        idempotency_key: What makes a repetition the same request.
        spends: Whether the credential may be used up by it.
    """

    provider: str
    url: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    credential: str = attrs.field(repr=False)
    request_id: str
    bearer: str | None = attrs.field(default=None, repr=False)
    cookies: Mapping[str, str | None] = attrs.field(factory=dict, repr=False)
    body: bytes | None = attrs.field(default=None, repr=False)
    idempotency_key: str | None = None
    spends: bool = True


@attrs.frozen(kw_only=True)
class Reply:
    """What came back. *sent_at* is when the request left, in seconds since 1970 by the local clock."""

    status: int
    headers: Mapping[str, str] = attrs.field(repr=False)
    cookies: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    body: bytes = attrs.field(repr=False)
    sent_at: float

    def json(self) -> dict[str, object]:
        """Read the body as a JSON object. Anything else reads as an empty one."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def date(self) -> float | None:
        """Read when the service wrote it, in seconds since 1970 by the service's clock."""
        return instant_of(self.headers.get("Date", ""))


_WHAT: dict[type[RefreshError], str] = {
    SignInRequiredError: "does not accept the token any more: sign in again",
    UnavailableError: "is busy or down: try later",
    OutcomeUnknownError: "failed, and may have spent the token: try again",
    RequestRefusedError: "refused the request: look at the arguments, keys and rights",
    ReplyError: "or a proxy answered with something else than a token: look at the URL",
}


def failure(
    kind: type[RefreshError],
    request: Request,
    reply: Reply | None = None,
    *,
    spent: bool | None,
    what: str | None = None,
    code: object = None,
    id: str | None = None,
) -> RefreshError:
    """
    Make the error of one exchange.

    Args:
        what: What happened, if it is not what *kind* says. No word of it may come from the reply.
        code: The ``code`` of the reply, if it is a number.
        id: The ``id`` of the reply, if it is a known one.
    """
    if not request.spends:
        spent = False
        kind = UnavailableError if kind is OutcomeUnknownError else kind
    if isinstance(code, bool) or not isinstance(code, int) or abs(code) >= 2**31:
        code = None
    status = None if reply is None else reply.status
    details = ", ".join(str(detail) for detail in (status, id or code) if detail is not None)
    return kind(
        f"{request.provider.title()} {what or _WHAT[kind]}" + (f" ({details})" if details else ""),
        provider=request.provider,
        status=status,
        code=code,
        id=id,
        request_id=request.request_id if reply is None else _request_id(request, reply),
        retry_after=None if reply is None else _retry_after(reply),
        spent=spent,
        idempotency_key=request.idempotency_key,
    )


def unrecognized(request: Request, reply: Reply) -> RefreshError:
    """Make the error of a reply that the service itself did not write, or not as it should."""
    if reply.status in (429, 503):
        return failure(UnavailableError, request, reply, spent=False)
    if reply.status >= 500:
        return failure(OutcomeUnknownError, request, reply, spent=None)
    if 300 <= reply.status < 400:
        what = "or a proxy answered with a redirect, which is not followed"
        return failure(ReplyError, request, reply, spent=False, what=what)
    return failure(ReplyError, request, reply, spent=None if reply.status < 300 else False)


def _request_id(request: Request, reply: Reply) -> str:
    """Read the id the service gave to the request, unless it quotes what we sent: that could be a secret."""
    answered = reply.headers.get("X-Kuzzle-Request-Id") or reply.headers.get("X-Request-Id") or ""
    sent = f"{request.credential} {request.bearer} {[*request.headers.values()]} {request.body!r}"
    return answered if is_uuid(answered) and answered not in sent else request.request_id


def _retry_after(reply: Reply) -> float | None:
    """Read ``Retry-After``, in seconds from now."""
    value = reply.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    date = instant_of(value)
    return None if date is None else max(0.0, date - time.time())


def instant_of(text: str) -> float | None:
    """Read the date of a header, in seconds since 1970."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


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
    return _session_of(os.getpid(), int(time.monotonic() / 5))


# What proxies and CA bundles are read from.
_VARIABLES = [
    *(
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    ),
    *("REQUEST_METHOD", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
]


@functools.lru_cache(maxsize=64)
def _own_settings(url: str, while_: int, *environment: str | None) -> Mapping[str, Any]:  # noqa: ARG001
    return _own_session().merge_environment_settings(url, {}, True, None, None)


def _settings(session: requests.Session | None, url: str) -> dict[str, Any]:
    """Get proxies and TLS settings, of the environment too. Reading that takes as long as a request."""
    if session is None:
        return {**_own_settings(url, int(time.monotonic() / 5), *map(os.environ.get, _VARIABLES))}
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
