"""A service that the package does not know has all that it does for those it knows."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest
from third_service import HarborCredential, Ticket, renew_harbor_pass

import refresher
from refresher import (
    FileStore,
    InvalidArgumentError,
    OutcomeUnknownError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    TokenCache,
    UnavailableError,
)
from refresher._text import Secret
from refresher.services import Credential
from refresher.testing import Answer
from refresher.testing.server import Server


class FakeHarbor(Server):
    """A Harbor. A pass is renewed once."""

    def __init__(self, clock=None):
        super().__init__(clock)
        self._passes = {}
        self.renewed = Counter()

    def sign_in(self, owner="ada"):
        new = secrets.token_urlsafe()
        self._passes[new] = owner
        return new

    def _answer(self, request):
        old = request.json().get("pass")
        headers = {"Content-Type": "application/json", "Date": formatdate(self.clock(), usegmt=True)}
        if old not in self._passes:
            return Answer(410, {"reason": "pass used" if self.renewed[old] else "pass unknown"}, headers)
        owner = self._passes.pop(old)
        self.renewed[old] += 1
        ticket = {"owner": owner, "ticket": secrets.token_urlsafe(), "pass": self.sign_in(owner)}
        return Answer(200, {**ticket, "seconds": 600, "until": self.clock() + 600}, headers)


@pytest.fixture
def harbor(clock):
    """A FakeHarbor."""
    with FakeHarbor(clock) as fake:
        yield fake


@pytest.fixture
def cache(clock):
    return TokenCache(clock=clock)


def test_it_is_a_credential(harbor):
    """What the file defines is a `Credential`, and its pass and ticket are not shown."""
    credential: Credential[Ticket] = HarborCredential(url=harbor.url, secret=Secret("p" * 20))
    ticket = renew_harbor_pass(harbor.url, harbor.sign_in(), cache=None)
    for shown in (repr(credential), repr(credential.following(ticket)), repr(ticket)):
        assert not any(secret in shown for secret in ("p" * 20, ticket.ticket, ticket.next_pass))
    assert Ticket.from_dict(ticket.to_dict()) == ticket


def test_it_is_written_in_one_file():
    """No line of the package knows of it."""
    package = Path(refresher.__file__).parent
    assert [path for path in package.rglob("*.py") if "harbor" in path.read_text("utf-8").lower()] == []


def test_successors(harbor, cache):
    """From any pass of a chain a call gets the newest ticket, and each pass is renewed once."""
    first = harbor.sign_in()
    tickets = []
    for _ in range(4):
        tickets.append(renew_harbor_pass(harbor.url, first, cache=cache))
        harbor.clock.advance(590)
    newest = renew_harbor_pass(harbor.url, first, cache=cache)
    assert len(harbor.requests) == 5
    for ticket in tickets:
        assert renew_harbor_pass(harbor.url, ticket.next_pass, cache=cache) == newest
    assert len(harbor.requests) == 5
    assert set(harbor.renewed.values()) == {1}
    assert newest.owner == "ada"


def test_next_run(harbor, clock, tmp_path):
    """What one run has renewed, the next finds in the store."""
    first = harbor.sign_in()
    one, two = (
        renew_harbor_pass(harbor.url, first, cache=TokenCache(FileStore(tmp_path), clock=clock)) for _ in range(2)
    )
    assert one == two
    assert len(harbor.requests) == 1


def test_single_flight(harbor, clock, tmp_path):
    """Threads and processes that share a store renew a pass once."""
    first = harbor.sign_in()
    harbor.next_answers.append(lambda request: harbor.truly(request, after=0.2))
    caches = [TokenCache(FileStore(tmp_path), clock=clock) for _ in range(4)]
    with ThreadPoolExecutor(32) as pool:
        tickets = list(
            pool.map(lambda number: renew_harbor_pass(harbor.url, first, cache=caches[number % 4]), range(32))
        )
    assert len(set(tickets)) == 1
    assert len(harbor.requests) == 1


def test_late_answer(harbor, cache):
    """An answer for which nobody waits any more is kept, and the next call gets it."""
    first = harbor.sign_in()
    harbor.next_answers.append(lambda request: harbor.truly(request, after=0.6))
    with pytest.raises(OutcomeUnknownError):
        renew_harbor_pass(harbor.url, first, timeout=0.2, cache=cache)
    assert renew_harbor_pass(harbor.url, first, cache=cache).owner == "ada"
    assert len(harbor.requests) == 1


def test_while_it_is_due(harbor, cache):
    """While a ticket is still valid, an outage of the service is not its callers' trouble."""
    first = harbor.sign_in()
    ticket = renew_harbor_pass(harbor.url, first, cache=cache)
    harbor.clock.advance(570)
    harbor.next_answers.append(Answer(503))
    assert renew_harbor_pass(harbor.url, first, retry=False, cache=cache) == ticket


def test_refusal_is_remembered(harbor, cache):
    """A pass that is no good is refused once, and not sent again at once."""
    for _ in range(3):
        with pytest.raises(SignInRequiredError, match=r"^Harbor no longer accepts this token: sign in again"):
            renew_harbor_pass(harbor.url, "unknown", cache=cache)
    assert len(harbor.requests) == 1


@pytest.mark.parametrize(
    ("answer", "error", "spent"),
    [
        pytest.param(Answer(409, {"reason": "tide is out"}), UnavailableError, False, id="its own word for busy"),
        pytest.param(Answer(429), UnavailableError, False, id="everybody's word for busy"),
        pytest.param(Answer(422, {"reason": "no such pier"}), RequestRefusedError, False, id="refused"),
        pytest.param(Answer(200, {"ticket": "t"}), ReplyError, None, id="no ticket"),
        pytest.param(Answer(500), OutcomeUnknownError, None, id="failed"),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_errors(harbor, cache, cached, answer, error, spent):
    """Its errors are those of all services, with a cache and without."""
    harbor.next_answers.append(answer)
    with pytest.raises(error) as caught:
        renew_harbor_pass(harbor.url, harbor.sign_in(), retry=False, cache=cache if cached else None)
    assert (caught.value.provider, caught.value.spent) == ("harbor", spent)


def test_arguments(harbor):
    """Its arguments are checked as all others are."""
    with pytest.raises(InvalidArgumentError, match=r"^harbor_pass must be a string"):
        renew_harbor_pass(harbor.url, 5)


def test_busy_is_waited_out(harbor, cache):
    """While it is busy, a call tries again."""
    harbor.next_answers.append(Answer(409, {"reason": "tide is out"}))
    began = time.monotonic()
    assert renew_harbor_pass(harbor.url, harbor.sign_in(), timeout=5, cache=cache).owner == "ada"
    assert time.monotonic() - began < 2
    assert len(harbor.requests) == 2
