"""Texts that others wrote: JSON, JWTs, UUIDs, dates. And secrets, with what may be shown of them."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import attrs

S = TypeVar("S")


def fingerprint(secret: str) -> str:
    """Return eight digits that tell secrets apart without revealing them."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def masked(secret: object) -> str:
    """Return what to show in place of a secret."""
    return f"<secret {fingerprint(secret)}>" if isinstance(secret, str) else "None" if secret is None else "<secret>"


class Secret(Generic[S]):
    """
    Holds a secret where debuggers, tracebacks with local variables and crash reports do not show it.

    Example:
        >>> Secret("kauth-e30"), Secret("kauth-e30").reveal()
        (<secret eb04a126>, 'kauth-e30')
    """

    __slots__ = ("reveal",)
    reveal: Callable[[], S]

    def __init__(self, value: S) -> None:
        self.reveal = itertools.repeat(value).__next__  # half the size of a function, and as opaque

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and bool(self.reveal() == other.reveal())

    def __hash__(self) -> int:
        return hash(self.reveal())

    def __repr__(self) -> str:
        return masked(self.reveal()) if isinstance(self.reveal(), str) else "<secret>"

    def __reduce__(self) -> tuple[type, tuple[S]]:
        return type(self), (self.reveal(),)


def hide(value: S | Secret[S] | None) -> Secret[S] | None:
    """Wrap what may be a secret, unless it is None or wrapped already."""
    return value if value is None or isinstance(value, Secret) else Secret(value)


def hide_all(*values: Any) -> Any:
    """Wrap what may be secrets. A caller that assigns them to its own arguments has none in its frame."""
    return map(hide, values)


@overload
def reveal(value: str | Secret[str]) -> str: ...
@overload
def reveal(value: Secret[S]) -> S: ...
@overload
def reveal(value: S) -> S: ...
def reveal(value: Any) -> Any:
    """Unwrap a secret. Anything else is returned as it is."""
    return value.reveal() if isinstance(value, Secret) else value


def key_of(*parts: str | Secret[str]) -> str:
    """Hash a credential. Its parts have no line breaks in them, so no two credentials share a key."""
    return hashlib.sha256("\n".join([reveal(part) for part in parts]).encode("utf-8", "surrogatepass")).hexdigest()


def number(value: object) -> float | None:
    """Take a finite number out of JSON, or the next that a float can be. True and False do not count."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        return None
    return max(-sys.float_info.max, min(value, sys.float_info.max))


def json_object(text: str | bytes | None) -> dict[str, Any]:
    """Read a JSON object. Anything else reads as an empty one."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_uuid(value: str) -> bool:
    """Whether *value* is a UUID in its usual spelling."""
    return re.fullmatch("(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value, re.ASCII) is not None


@functools.lru_cache(maxsize=16)
def read_date(text: str | None) -> float | None:
    """Read the date in a header, in seconds since 1970."""
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(text or "").timestamp()
    except (ValueError, OverflowError):
        return None


@attrs.frozen
class Claims:
    """
    What a token says of itself. None if it does not say.

    Args:
        iat: When it was issued, in seconds since 1970.
        exp: When it expires, in seconds since 1970.
        subject: The user: ``_id``, as Kuzzle writes it, or ``sub``.
    """

    iat: float | None = None
    exp: float | None = None
    subject: str | None = None

    @property
    def lifetime(self) -> float | None:
        """Seconds from issue to expiry. Both are whole seconds, so it may be valid for a second less."""
        if self.iat is None or self.exp is None:
            return None
        return max(0.0, self.exp - self.iat - 1)


@functools.lru_cache(maxsize=16)
def claims(token: str | Secret[str]) -> Claims:
    """Read a token's claims. A text that is not a JWT has none. The signature is up to the service."""
    try:
        values = json.loads(base64.urlsafe_b64decode(reveal(token).split(".")[1] + "=="))
        subject = values.get("_id", values.get("sub"))
    except (IndexError, ValueError, RecursionError, AttributeError):
        return Claims()
    times = (number(values.get(name)) for name in ("iat", "exp"))
    # Beyond that, Python can't count in seconds and milliseconds alike.
    iat, exp = (time if time is not None and abs(time) < 1e300 else None for time in times)
    return Claims(iat, exp, subject if isinstance(subject, str) else None)
