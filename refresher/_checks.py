"""What an argument has to be. Complaints name the argument and never show its value."""

from __future__ import annotations

import functools
import ipaddress
import math
import re
import threading
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from .errors import InvalidArgumentError

if TYPE_CHECKING:
    import requests

_VISIBLE = re.compile(r"[!-~]+")
# What requests has nothing against. About other hosts it's asked; it takes a while to import.
_PLAIN_HOST = re.compile(r"(?!.*\.\.)[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", re.ASCII | re.IGNORECASE)


def is_token(value: object) -> bool:
    """Tell whether *value* can travel in a header: visible ASCII characters, at least one."""
    return isinstance(value, str) and _VISIBLE.fullmatch(value) is not None


def is_uuid(value: str) -> bool:
    """Tell whether *value* is a UUID in its usual spelling."""
    return re.fullmatch("(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value, re.ASCII) is not None


@functools.lru_cache(maxsize=64)
def _url_flaw(url: str, https: bool) -> str | None:
    """Say what is wrong with a base URL."""
    if not _VISIBLE.fullmatch(url):
        return "must not be empty or have white space, control or non-ASCII characters in it"
    try:
        parts = urlsplit(url)
        port = parts.port
        if not _PLAIN_HOST.fullmatch(parts.hostname or ""):
            from requests import PreparedRequest

            PreparedRequest().prepare_url(url, None)
    except ValueError:  # requests' own complaints are of this kind too
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "must look like https://host, https://host:port or https://host/path"
    if "@" in parts.netloc or "?" in url or "#" in url:
        return "must have no user name, password, query or fragment"
    if https and parts.scheme != "https" and not _is_loopback(parts.hostname):
        return "must be https, unless it leads to this machine"
    return None


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address. None: it's a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = address_of(host)
    return host == "localhost" if address is None else address.is_loopback


class Checks:
    """The checks of one provider's arguments. Each returns the value it accepts."""

    def __init__(self, provider: str) -> None:
        self.provider = provider

    def fail(self, name: str, flaw: str) -> NoReturn:
        """Complain that the argument *name* has a *flaw*."""
        raise InvalidArgumentError(f"{name} {flaw}", provider=self.provider, spent=False)

    def token(self, name: str, value: object) -> str:
        """Accept a secret that fits into a header."""
        if not isinstance(value, str):
            self.fail(name, "must be a string")
        if not is_token(value):
            self.fail(name, "must not be empty or have white space, control or non-ASCII characters in it")
        return value

    def text(self, name: str, value: object, shortest: int = 1, longest: int = 1000) -> str:
        """Accept a text of printable characters."""
        if not isinstance(value, str):
            self.fail(name, "must be a string")
        if not shortest <= len(value) <= longest or not value.isprintable():
            self.fail(name, f"must be {shortest} to {longest} printable characters")
        return value

    def flag(self, name: str, value: object) -> bool:
        """Accept True and False, but none of their look-alikes."""
        if not isinstance(value, bool):
            self.fail(name, "must be True or False")
        return value

    def uuid(self, name: str, value: object) -> str:
        """Accept a UUID, or a string that spells one the usual way."""
        if not isinstance(value, (str, uuid.UUID)) or not is_uuid(str(value)):
            self.fail(name, "must be a UUID")
        return str(value)

    def url(self, name: str, value: object, *, https: bool) -> str:
        """Accept a base URL and take off its trailing slashes."""
        if not isinstance(value, str):
            self.fail(name, "must be a string")
        if flaw := _url_flaw(value, https):
            self.fail(name, flaw)
        return value.rstrip("/")

    def seconds(self, name: str, value: object) -> float | None:
        """Accept a number of seconds or a timedelta; None and -1 mean as long as it takes."""
        if value is None or (value == -1 and not isinstance(value, bool)):
            return None
        if isinstance(value, timedelta):
            value = value.total_seconds()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(name, "must be a number of seconds, a timedelta, or None")
        if not 0 < value <= threading.TIMEOUT_MAX or math.isnan(value):
            self.fail(name, "must be more than zero seconds and less than 292 years; None waits forever")
        return float(value)

    def session(self, name: str, value: object) -> requests.Session | None:
        """Accept a requests.Session, or None."""
        if value is None:
            return None
        from requests import Session

        if not isinstance(value, Session):
            self.fail(name, "must be a requests.Session")
        return value
