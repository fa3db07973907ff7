"""The faults one by one, on both fakes."""

from __future__ import annotations

import re
import time

import pytest
import requests
from test_fakes import SignedIn, exchange

from refresher.testing import FAULTS, FakeKuzzle, Fault

CUT_OFF = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)
# What a client sees that waits long enough: an exception, or the status and the type of the answer.
SEEN = {
    "lost": CUT_OFF,
    "late": (200, "application/json"),
    "dripping": (200, "application/json"),
    "truncated": CUT_OFF,
    "garbage": (200, "application/json"),
    "empty": (200, None),
    "incomplete": (200, None),
    "other_user": (200, "application/json"),
    "interim": (103, None),  # as http.client has it, which takes it for the answer
    "gateway_timeout": (504, "text/html"),
    "reset": CUT_OFF,
    "down": CUT_OFF,
    "refused": (None, "application/json"),
    "busy": (429, "application/json"),
    "busy_retry_after": (429, "application/json"),
    "unavailable": (503, "application/json"),
    "error": (500, "application/json"),
    "bad_gateway": (502, "text/html"),
    "redirect": (307, "text/html"),
    "portal": (200, "text/html"),
}


@pytest.fixture(params=["kuzzle", "circle"])
def fake(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def user(fake):
    """Somebody who is signed in to a fake."""
    return SignedIn(fake)


@pytest.fixture
def suffer(user):
    """Send a refresh that suffers a fault, and give the answer."""

    def send(fault):
        user.fake.suffer(fault)
        return user.refresh()

    return send


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(user, suffer, fault):
    """A fault does what it says, spends the token or not, and is over."""
    if SEEN[fault] is CUT_OFF:
        with pytest.raises(CUT_OFF):
            suffer(fault)
    else:
        response = suffer(fault)
        status, kind = SEEN[fault]
        assert response.status_code == (status or user.status_of_refusal)
        assert response.headers.get("Content-Type") == kind
    if FAULTS[fault].spends:
        user.fake.assert_spent_once(user.token)
    else:
        with pytest.raises(AssertionError, match="never"):
            user.fake.assert_spent_once(user.token)
        if fault == "down":
            time.sleep(0.6)
        assert user.refresh().status_code == 200
    assert not user.fake.next_answers


def test_all_are_seen():
    """The table above has them all, and each says what it is."""
    assert FAULTS.keys() == SEEN.keys()
    for name, fault in FAULTS.items():
        assert (fault.name, str(fault)) == (name, name)
        assert fault.description.endswith(".")


def test_late(suffer):
    """It takes a second."""
    start = time.monotonic()
    suffer("late")
    assert 1.0 <= time.monotonic() - start < 3.0


def test_dripping(suffer):
    """It takes two seconds or so."""
    start = time.monotonic()
    assert suffer("dripping").json()
    assert 1.0 < time.monotonic() - start < 8.0


def test_garbage(suffer):
    """The body is no JSON."""
    with pytest.raises(requests.JSONDecodeError):
        suffer("garbage").json()


@pytest.mark.parametrize(("fault", "body"), [("empty", b""), ("incomplete", b'{"result": {}, "data": {}}')])
def test_bodies(suffer, fault, body):
    """There is no token in them."""
    assert suffer(fault).content == body


def test_other_user(user, suffer):
    """The answer is a good one, of somebody else."""
    answer = user.read(suffer("other_user"))
    assert answer.owner == "somebody-else"
    assert user.fake.knows(answer.token)


def test_interim(fake):
    """The answer follows."""
    fake.suffer("interim")
    answer = exchange(fake.url, b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 103 ")
    assert b"\r\n\r\nHTTP/1.1 404\r\n" in answer


def test_headers(suffer):
    """What to wait for, and where not to go."""
    assert suffer("busy_retry_after").headers["Retry-After"] == "1"
    assert suffer("redirect").headers["Location"] == "http://stranger.invalid/"


def test_other_requests_suffer_too(kuzzle):
    """A fault happens to the next request, whatever that asks for."""
    kuzzle.suffer("other_user")
    answer = requests.post(f"{kuzzle.url}/_login/local?username=foo&password=bar", timeout=10).json()
    assert answer["result"]["_id"] == "somebody-else"
    kuzzle.suffer("other_user")
    assert requests.get(f"{kuzzle.url}/_me", timeout=10).json()["result"]["_id"] == "-1"


def test_times(user):
    """A fault may happen several times, and several faults one after the other."""
    user.fake.suffer("busy", times=2)
    user.fake.suffer(FAULTS["portal"])
    kinds = [user.refresh().status_code for _ in range(4)]
    assert kinds == [429, 429, 200, 200]
    user.fake.assert_spent_once(user.token)


@pytest.mark.parametrize("fault", ["nope", 3, None, ["lost"]], ids=repr)
def test_unknown_fault(user, fault):
    """A fault that doesn't exist is refused, with those that do."""
    with pytest.raises(ValueError, match=rf"^no such fault: {re.escape(repr(fault))}\. There are: lost, late, "):
        user.fake.suffer(fault)


def test_own_fault(user):
    """One may bring a fault of one's own."""
    fault = Fault("teapot", "It is one.", spends=False, apply=lambda fake: fake.next_answers.append(b""))
    user.fake.suffer(fault)
    with pytest.raises(requests.ConnectionError):
        user.refresh()


def test_down_without_a_server():
    """A fake that doesn't run stays as it is."""
    fake = FakeKuzzle()
    fake.suffer("down")
    assert fake.url.endswith(":0")


def test_stop_while_down(user):
    """Whoever stops a fake that is down stops it for good."""
    user.fake.suffer("down")
    user.fake.stop()
    time.sleep(0.7)
    with pytest.raises(requests.ConnectionError):
        user.refresh()


def test_start_while_down(user):
    """Whoever starts a fake that is down need not wait."""
    user.fake.suffer("down")
    user.fake.start()
    assert user.refresh().status_code == 200
    time.sleep(0.7)
    assert user.refresh().status_code in (200, 401)
