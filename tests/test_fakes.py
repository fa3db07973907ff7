"""What the fakes do on request."""

from __future__ import annotations

import time

import pytest
import requests
from helpers import call_with

from refresher import OutcomeUnknownError, refresh_kuzzle_token, refresh_user_token
from refresher.testing import Answer

pytestmark = pytest.mark.usefixtures("single")


@pytest.fixture(params=["kuzzle", "circle"])
def fake(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def refresh(fake, request):
    """Refresh a token there, whose clock has moved on since the sign-in."""
    if hasattr(fake, "login"):
        jwt = fake.login()
        fake.clock.advance(1)
        return lambda **options: refresh_kuzzle_token(fake.url, jwt, **options)
    pair = fake.sign_in()
    return lambda **options: refresh_user_token(**call_with(fake, pair, **options))


def test_lose_next(fake, refresh):
    """The token is spent and nobody has the new one."""
    fake.lose_next(2)
    for _ in range(2):
        with pytest.raises(OutcomeUnknownError, match="RemoteDisconnected"):
            refresh()
    assert len(fake.requests) == 2


def test_reset_next(fake, refresh):
    """The connection is reset, and nothing was done."""
    fake.reset_next()
    with pytest.raises(OutcomeUnknownError, match="Connection reset by peer"):
        refresh()
    assert fake.knows(refresh()) if hasattr(fake, "sign_in") else fake.knows(refresh().jwt)


def test_delay_next(fake, refresh):
    """The answer comes, too late for some."""
    fake.delay_next(0.3)
    with pytest.raises(OutcomeUnknownError, match="did not answer"):
        refresh(timeout=0.1)
    start = time.monotonic()
    fake.delay_next(0.2)
    requests.get(fake.url, timeout=10)
    assert time.monotonic() - start >= 0.2


def test_drip_next(fake, refresh):
    """The answer comes byte by byte."""
    fake.drip_next(0.01)
    with pytest.raises(OutcomeUnknownError):
        refresh(timeout=0.2)
    fake.drip_next(0.0001)
    assert requests.get(fake.url, timeout=10).json()


def test_statuses(fake):
    """Any answer can be ordered."""
    fake.next_answers.append(Answer(418, {"a": 1}, {"X-Mine": "1"}))
    response = requests.get(fake.url, timeout=10)
    assert (response.status_code, response.json(), response.headers["X-Mine"]) == (418, {"a": 1}, "1")


def test_head(fake):
    """An answer to HEAD has no body."""
    response = requests.head(fake.url, timeout=10)
    assert (response.status_code, response.content) == (404, b"")
    assert int(response.headers["Content-Length"]) > 0


def test_user(circle):
    """FakeCircle tells who a user token belongs to, as long as it lives."""
    pair = circle.sign_in("user-2")
    headers = {"Authorization": f"Bearer {circle.api_key}", "X-User-Token": pair.user_token}

    def ask():
        return requests.get(f"{circle.url}/v1/w3s/user", headers=headers, timeout=10).json()

    assert ask()["data"]["user"]["id"] == "user-2"
    circle.clock.advance(3600)
    assert ask()["code"] == 155104
    headers["X-User-Token"] = "opaque"
    assert ask()["code"] == 155105
