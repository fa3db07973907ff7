"""The cookie of a caller's session in which a token travels."""

from __future__ import annotations

import contextlib
from http.cookiejar import Cookie, eff_request_host  # type: ignore[attr-defined]
from typing import Any

import requests
from requests.cookies import MockRequest, RequestsCookieJar, create_cookie

from ._text import Secret, hide


def _host(url: str) -> str:
    """Return the host, as cookie jars call it."""
    return str(eff_request_host(MockRequest(requests.Request("POST", url).prepare()))[1])


def _cookies_for(session: requests.Session, url: str, name: str) -> list[Cookie]:
    """List the session's cookies of one *name* that are for *url*, in the order in which they are sent."""

    def is_sent(cookie: Cookie) -> bool:
        jar = RequestsCookieJar()
        jar.set_cookie(cookie)
        return "Cookie" in requests.Request("POST", url, cookies=jar).prepare().headers

    # Those that name no domain are for their host alone, though jars send them to its subdomains as well.
    hosts = "", _host(url)
    ours = [each for each in session.cookies if each.name == name and (each.domain_specified or each.domain in hosts)]
    return sorted(filter(is_sent, ours), key=lambda cookie: -len(cookie.path))


def find(session: requests.Session, url: str, name: str) -> str | None:
    """Look up the value of the session's cookie that is for *url*."""
    return next((cookie.value for cookie in _cookies_for(session, url, name)), None)


def keep(session: requests.Session, url: str, name: str, value: Secret[str], before: Secret[str] | None) -> None:
    """
    Put a cookie for the host of *url* into the session's jar, in place of that of its *name* which is sent there first.

    If that is another than *before*, it stays: somebody has signed in or out meanwhile, or another thread was faster.

    What is for more paths than that one may be another service's, behind the same proxy. The new one expires in the
    year 2100: a jar whose clock is ahead would drop what may be the only copy of a token, and one that is saved would
    leave out what has no expiry.
    """
    there = _cookies_for(session, url, name)
    if there and hide(there[0].value) not in (None, before):
        return
    path = there[0].path if there else "/"
    details: Any = {"domain": _host(url), "path": path, "secure": any(old.secure for old in there)}
    details |= {"rest": {"HttpOnly": ""}, "expires": 4102444800, "discard": False}
    new = create_cookie(name, value.reveal(), **details)  # type: ignore[no-untyped-call]
    new.domain_specified = False
    session.cookies.set_cookie(new)  # before others go: another thread may be looking for one
    for old in there:
        if old.path == path and old.domain != new.domain:
            with contextlib.suppress(KeyError):  # another thread has removed it
                session.cookies.clear(old.domain, old.path, old.name)
