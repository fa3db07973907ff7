"""The cookie of a caller's session in which a token travels."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable
from http.cookiejar import Cookie, eff_request_host  # type: ignore[attr-defined]
from typing import Any

import requests
from requests.cookies import MockRequest, RequestsCookieJar, create_cookie

from ._text import Secret, hide


@functools.lru_cache(maxsize=16)
def _host(url: str) -> str:
    """Return the host, as cookie jars call it."""
    return str(eff_request_host(MockRequest(requests.Request("POST", url).prepare()))[1])


def _cookies_for(session: requests.Session, url: str, name: str) -> list[Secret[Cookie]]:
    """List the session's cookies of one *name* that are for *url*, in the order in which they are sent."""
    there = [*map(Secret, filter(None, list[Any](session.cookies)))]  # None is one that another thread has just removed
    hosts, jar = ("", _host(url)), RequestsCookieJar()
    for number, hidden in enumerate(there):
        # Those that name no domain are for their host alone, though jars send them to its subdomains as well.
        if hidden.reveal().name == name and (hidden.reveal().domain_specified or hidden.reveal().domain in hosts):
            numbered = Secret(copy.copy(hidden.reveal()))
            numbered.reveal().value = str(number)  # what is in this jar may show up in a traceback
            jar.set_cookie(numbered.reveal())
    sent = requests.Request("POST", url, cookies=jar).prepare().headers.get("Cookie", "")
    return [there[int(number)] for number in re.findall(f'{re.escape(name)}="?([0-9]+)', sent)]


def find(session: requests.Session, url: str, name: str) -> Secret[str] | None:
    """Look up the value of the session's cookie that is for *url*."""
    return hide(there[0].reveal().value) if (there := _cookies_for(session, url, name)) else None


def keep(
    session: requests.Session, url: str, name: str, value: Secret[str], is_old: Callable[[Secret[str]], bool]
) -> None:
    """
    Put a cookie for the host of *url* into the session's jar, in place of that of its *name* which is sent there first.

    What is there stays unless *is_old* says that it has been replaced: somebody has signed in or out meanwhile, or
    another thread was faster.

    What is for more paths than that one may be another service's, behind the same proxy. The new one expires in the
    year 2100: a jar whose clock is ahead would drop what may be the only copy of a token, and one that is saved would
    leave out what has no expiry.
    """
    there = _cookies_for(session, url, name)
    value_there = hide(there[0].reveal().value) if there else None
    if value_there is not None and (value_there == value or not is_old(value_there)):
        return
    path, domain = there[0].reveal().path if there else "/", _host(url)
    is_secure = any(old.reveal().secure for old in there) if there else url.startswith("https:")
    details: Any = {"domain": domain, "path": path, "secure": is_secure}
    details |= {"rest": {"HttpOnly": ""}, "expires": 4102444800, "discard": False}
    new = Secret(create_cookie(name, value.reveal(), **details))  # type: ignore[no-untyped-call]
    new.reveal().domain_specified = False
    session.cookies.set_cookie(new.reveal())  # before others go: another thread may be looking for one
    for old in there:
        if old.reveal().path == path and old.reveal().domain != domain:
            with contextlib.suppress(KeyError):  # another thread has removed it
                session.cookies.clear(old.reveal().domain, path, name)
