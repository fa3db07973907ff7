"""
Harbor, a service that does not exist: ``POST /passes/renew``, which takes a pass and gives a ticket and a new pass.

This is all that a third service takes: what its call yields, its credential, and how to read its reply.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, Self

import attrs

from refresher import SHARED_CACHE, InvalidArgumentError, TokenCache
from refresher._cache import current
from refresher._checks import Checks, Seconds
from refresher._ledger import Call
from refresher._text import Secret, fingerprint, key_of, masked, number
from refresher.services import BUSY, REFUSED, SIGN_IN, Reply, Request, Send, failure, meaning
from refresher.tokens import instant

check = Checks("harbor")
_MEANINGS = {"pass used": SIGN_IN, "pass unknown": SIGN_IN, "tide is out": BUSY}


@attrs.frozen(kw_only=True)
class Ticket:
    """A Harbor ticket. *next_pass* is the pass to renew next."""

    owner: str
    ticket: str = attrs.field(repr=masked)
    next_pass: str = attrs.field(repr=masked)
    expires_at: datetime
    seconds: float

    @property
    def fingerprint(self) -> str:
        """Tells it from another ticket without revealing either."""
        return fingerprint(self.next_pass)

    def to_dict(self) -> dict[str, Any]:
        """Write it down, unmasked, in Harbor's own words."""
        return {
            "owner": self.owner,
            "ticket": self.ticket,
            "pass": self.next_pass,
            "until": self.expires_at.timestamp(),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """
        Read what `to_dict` wrote, or Harbor's reply.

        Raises:
            InvalidArgumentError: Something is missing or malformed.
        """
        until, seconds = (number(values.get(name)) for name in ("until", "seconds"))
        if until is None or seconds is None or seconds <= 0:
            check.fail("until and seconds", "must be numbers")
        return cls(
            owner=check.text("owner", values.get("owner")),
            ticket=check.token("ticket", values.get("ticket")).reveal(),
            next_pass=check.token("pass", values.get("pass")).reveal(),
            expires_at=instant(1000 * until),
            seconds=seconds,
        )


@attrs.frozen(kw_only=True)
class HarborCredential:
    """A Harbor pass, and where it is renewed."""

    service: ClassVar[str] = "harbor"
    idempotency_key: ClassVar[None] = None
    requested: ClassVar[None] = None
    birth: ClassVar[None] = None
    can_expire: ClassVar[bool] = True
    refreshable_for: ClassVar[float] = 30 * 86_400.0

    url: str
    secret: Secret[str]
    token: Ticket | None = attrs.field(default=None, eq=False)
    keys: tuple[str, ...] = attrs.field(init=False, eq=False, repr=False)

    @keys.default
    def _keys(self) -> tuple[str, ...]:
        return (key_of("harbor", self.url, self.secret),)

    @property
    def scope(self) -> str:
        """Harbor is busy for everybody."""
        return key_of("harbor", self.url)

    @property
    def user(self) -> str | None:
        """Who owns it."""
        return self.token and self.token.owner

    def sign_out(self, send: Send, /) -> None:
        """Do nothing: Harbor has no sign-out."""

    @property
    def headers(self) -> dict[str, str | Secret[str]]:
        """What a request carries that is made with it."""
        return {"X-Ticket": Secret(self.token.ticket)} if self.token else {}

    @property
    def lifetime(self) -> float:
        """For how many seconds its ticket is good."""
        return self.token.seconds if self.token else 0.0

    @property
    def expiry(self) -> float | None:
        """When its ticket expires, by Harbor's clock."""
        return self.token.expires_at.timestamp() if self.token else None

    def key_for(self, anew: str, /) -> None:
        """There is none."""

    def refresh(self, send: Send, /, *, key: str | None) -> Self:
        """Spend it."""
        request = Request(
            service="harbor",
            url=f"{self.url}/passes/renew",
            headers={"Content-Type": "application/json"},
            secret=self.secret,
            request_id=str(uuid.uuid4()),
            body=Secret(json.dumps({"pass": self.secret.reveal()}).encode()),
        )
        return self.following(send(request, parse)[0])

    def following(self, token: Ticket, /) -> Self:
        """Return the credential for a successor's ticket."""
        return attrs.evolve(self, secret=Secret(token.next_pass), token=token)

    def read(self, values: Mapping[str, Any], /) -> Ticket:
        """Read a successor's ticket from a store."""
        return Ticket.from_dict(values)

    def unspent(self) -> None:
        """Nobody knows the ticket that came with a caller's own pass."""

    def is_rejected(self, status: int, body: Mapping[str, Any], /) -> bool:
        """Tell whether an error means that the ticket is no good."""
        return status == 401


def parse(reply: Reply, request: Request) -> Ticket:
    """
    Read the reply.

    Raises:
        RefreshError: There is no ticket in it.
    """
    body = reply.json().reveal()
    if 200 <= reply.status < 300:
        try:
            return Ticket.from_dict(body)
        except InvalidArgumentError:
            pass
        raise failure("answered without a ticket", request, reply)
    reason = body.get("reason")
    known = _MEANINGS.get(reason) if isinstance(reason, str) else None
    raise failure(meaning(reply.status, known, REFUSED), request, reply)


def renew_harbor_pass(
    url: str,
    harbor_pass: str,
    *,
    retry: bool = True,
    timeout: Seconds = 30.0,
    cache: TokenCache | None = SHARED_CACHE,
) -> Ticket:
    """Trade a Harbor pass for a ticket and a new pass."""
    secret = check.token("harbor_pass", harbor_pass)
    credential = HarborCredential(url=check.url("url", url, https=False), secret=secret)
    retry, seconds = check.flag("retry", retry), check.seconds("timeout", timeout)
    return current(Call(credential=credential, retry=retry, timeout=seconds), cache)
