"""
What an argument has to be. Complaints name the argument and never show its value.

Each check takes a value as it is or wrapped in a `Secret`, and returns it unwrapped, except for tokens. The frames of a
complaint hold no value: it might be a secret in the wrong place.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import re
import threading
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from . import importing
from ._text import Secret, hide, is_uuid, number, reveal
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    import requests

#: A number of seconds. None means no limit.
Seconds = float | timedelta | None

_VISIBLE = re.compile(r"[!-~]+")
# All parsers read such a URL alike. For other hosts requests is asked, which takes a while to import.
_URL = re.compile(r"(?i)https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{0,5})?(/[^\\?#]*)?", re.ASCII)
_PLAIN_HOST = re.compile(r"(?i)(?!.*\.\.)[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", re.ASCII)
_INVISIBLE = "must not be empty or have white space, control or non-ASCII characters in it"
_PORTS = {"http": 80, "https": 443}


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Return what has to be the same for a token to be sent: scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, _PORTS.get(parts.scheme) if parts.port is None else parts.port


@functools.lru_cache(maxsize=64)
def _base_url(url: str, https: bool) -> tuple[str, str]:
    """Return a base URL in one spelling, and what is wrong with it, if anything."""
    if not _VISIBLE.fullmatch(url):
        return "", _INVISIBLE
    if "@" in url.partition("//")[2].partition("/")[0] or "?" in url or "#" in url:
        return "", "must have no user name, password, query or fragment"
    try:
        scheme, host, port = origin_of(url)
        if _URL.fullmatch(url) and not _PLAIN_HOST.fullmatch(host or ""):
            with importing:
                from requests import PreparedRequest

            PreparedRequest().prepare_url(url, None)
    except ValueError:  # requests' own complaints are of this kind too
        return "", "must be a URL with a valid host and port"
    if not _URL.fullmatch(url) or not host or port == 0:
        return "", "must look like https://host, https://host:port or https://host/path"
    if https and scheme != "https" and not is_loopback(host):
        return "", "must use https, except for a loopback address"
    name = f"[{host}]" if ":" in host else host
    where = name if port == _PORTS[scheme] else f"{name}:{port}"
    return f"{scheme}://{where}{urlsplit(url).path}".rstrip("/"), ""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


class Checks:
    """The checks of one provider's arguments. Each returns the value it accepts."""

    def __init__(self, provider: str) -> None:
        self.provider = provider

    def fail(self, name: str, flaw: str) -> NoReturn:
        """Complain that the argument *name* has a *flaw*."""
        raise InvalidArgumentError(f"{name} {flaw}", provider=self.provider, spent=False)

    def need(self, is_right: bool, name: str, flaw: str) -> None:
        """Complain that the argument *name* has a *flaw*, unless it is right."""
        if not is_right:
            self.fail(name, flaw)

    def string(self, name: str, value: Any, flaw: str = "must be a string") -> Secret[str]:
        """Accept a string. One of a subclass, such as an Enum's, becomes what is in it: it may be shown otherwise."""
        value = hide(value)
        self.need(isinstance(reveal(value), str), name, flaw)
        return Secret(str.__str__(reveal(value)))

    def token(self, name: str, value: Any) -> Secret[str]:
        """Accept a secret that fits into a header."""
        value = hide(value)
        secret = self.string(name, value)
        self.need(_VISIBLE.fullmatch(secret.reveal()) is not None, name, _INVISIBLE)
        return secret

    def text(self, name: str, value: Any, shortest: int = 1, longest: int = 1000) -> str:
        """Accept a text of printable characters."""
        value = hide(value)
        text = self.string(name, value)
        is_right = shortest <= len(text.reveal()) <= longest and text.reveal().isprintable()
        self.need(is_right, name, f"must be {shortest} to {longest} printable characters")
        return text.reveal()

    def flag(self, name: str, value: Any) -> bool:
        """Accept True and False, not 1 or 0."""
        value = hide(value)
        self.need(isinstance(reveal(value), bool), name, "must be True or False")
        return bool(reveal(value))

    def uuid(self, name: str, value: Any) -> str:
        """Accept a UUID, or a string that spells one the usual way."""
        value = hide(str(reveal(value)) if isinstance(reveal(value), uuid.UUID) else value)
        text = self.string(name, value, "must be a UUID")
        self.need(is_uuid(text.reveal()), name, "must be a UUID")
        return text.reveal()

    def url(self, name: str, value: Any, *, https: bool) -> str:
        """Accept a base URL, and return it in one spelling, without trailing slashes."""
        value = hide(value)
        url, flaw = _base_url(self.string(name, value).reveal(), https)
        self.need(not flaw, name, flaw)
        return url

    def seconds(self, name: str, value: Any) -> float | None:
        """Accept a number of seconds or a timedelta; None and -1 mean no limit."""
        given: Any = reveal(value)
        value = hide(given.total_seconds() if isinstance(given, timedelta) else value)
        del given
        is_endless = isinstance(reveal(value), float) and reveal(value) == math.inf
        is_right = value is None or is_endless or number(reveal(value)) is not None
        self.need(is_right, name, "must be a number of seconds, a timedelta, or None")
        if value is None or reveal(value) == -1:
            return None
        seconds: float = reveal(value)
        is_right = 0 < seconds <= threading.TIMEOUT_MAX
        self.need(is_right, name, "must be more than zero seconds and less than 292 years; None waits forever")
        return float(seconds)

    def session(self, name: str, value: Any) -> requests.Session | None:
        """Accept a requests.Session, or None."""
        value = hide(value)
        if value is None:
            return None
        with importing:
            from requests import Session

        self.need(isinstance(reveal(value), Session), name, "must be a requests.Session")
        session: Session = reveal(value)
        return session


class Fields:
    """The members of a JSON object, each checked as it is taken out."""

    def __init__(self, provider: str, values: Any) -> None:
        self._check = Checks(provider)
        self._values: Secret[Any] = Secret(reveal(values))
        is_right = isinstance(self._values.reveal(), Mapping)
        self._check.need(is_right, "values", "must be a mapping, as to_dict() returns it")

    def _get(self, name: str) -> Secret[Any]:
        return Secret(self._values.reveal().get(name))

    def has(self, name: str) -> bool:
        """Whether there is such a member, and it is not empty."""
        return self._get(name).reveal() not in (None, "")

    def token(self, name: str) -> Secret[str]:
        """Take out a secret."""
        return self._check.token(name, self._get(name))

    def text(self, name: str) -> str:
        """Take out a text, whatever characters it has: no token is to be lost over those of its user's id."""
        found = self._check.string(name, self._get(name), "must be a text")
        self._check.need(found.reveal() != "", name, "must be a text")
        return found.reveal()

    def milliseconds(self, name: str) -> float:
        """Take out a number of milliseconds."""
        found = number(self._get(name).reveal())
        if found is None:
            self._check.fail(name, "must be a number of milliseconds")
        return found
