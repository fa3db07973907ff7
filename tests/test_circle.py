"""refresh_user_token."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from helpers import CIRCLE_ERRORS, call_with, jwt_with

from refresher import (
    InvalidArgumentError,
    OutcomeUnknownError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    TokenCache,
    UnavailableError,
    UserToken,
    refresh_user_token,
)
from refresher._text import hide
from refresher.services.circle import credential
from refresher.testing import Answer, Clock, FakeCircle

pytestmark = pytest.mark.usefixtures("single")

KEY = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


def test_refresh(circle):
    """A refresh gives a new pair, also of an expired user token, and the old pair is good for nothing."""
    old = circle.sign_in()
    circle.clock.advance(7200)
    new = refresh_user_token(**call_with(circle, old))
    assert new.user_id == "user-1"
    assert not {old.user_token, old.refresh_token} & {new.user_token, new.refresh_token}
    assert new.expires_at == datetime.fromtimestamp(int(circle.clock()) + 3600, UTC)
    newer = refresh_user_token(**call_with(circle, new))
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call_with(circle, new, user_token=newer.user_token))


def test_variables_where_a_pair_is_looked_at(monkeypatch):
    """An interrupt in the middle of it shows neither token."""

    def interrupt(*_):
        raise KeyboardInterrupt

    user_token = jwt_with({"sub": "user-1", "iat": 1, "exp": 3601})
    pair = credential("planted", "device-1", hide("planted:api:key"), user_token)
    monkeypatch.setattr("refresher.services.circle.UserToken", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        pair.unspent()
    shown = repr(caught.traceback[1].frame.f_locals)
    assert "planted" not in shown
    assert user_token not in shown


def test_what_is_sent(circle):
    """Headers, and the body's members in the documented order."""
    pair = circle.sign_in()
    refresh_user_token(**call_with(circle, pair, idempotency_key=KEY, request_id=uuid.UUID(KEY)))
    (sent,) = circle.requests
    assert (sent.method, sent.target) == ("POST", "/v1/w3s/users/token/refresh")
    assert sent.headers["Authorization"] == f"Bearer {circle.api_key}"
    assert sent.headers["X-User-Token"] == pair.user_token
    assert sent.headers["X-Request-Id"] == KEY
    assert sent.headers["Content-Type"] == "application/json"
    assert list(sent.json().items()) == [
        ("idempotencyKey", KEY),
        ("refreshToken", pair.refresh_token),
        ("deviceId", "device-1"),
    ]


@pytest.mark.parametrize("key", [KEY, KEY.upper(), uuid.UUID(KEY)], ids=repr)
def test_given_key(circle, key):
    """An idempotency key that is given is sent as it is."""
    refresh_user_token(**call_with(circle, circle.sign_in(), idempotency_key=key))
    assert circle.requests[0].json()["idempotencyKey"] == str(key)


def test_derived_key(circle):
    """The same call has the same key and so the same answer; the next refresh has another."""
    pair = circle.sign_in()
    first = refresh_user_token(**call_with(circle, pair))
    again = refresh_user_token(**call_with(circle, pair))
    refresh_user_token(**call_with(circle, first))
    keys = [request.json()["idempotencyKey"] for request in circle.requests]
    assert first == again
    assert keys[0] == keys[1] != keys[2]
    assert uuid.UUID(keys[0]).version == 4
    assert uuid.UUID(keys[0]).variant == uuid.RFC_4122


def test_each_part_counts_for_the_key(circle):
    """Another user token, refresh token or device is another request."""
    circle.fail_next(5, times=5)
    calls = [
        {"user_token": "ab", "refresh_token": "c", "device_id": "d"},
        {"user_token": "a", "refresh_token": "bc", "device_id": "d"},
        {"user_token": "ab", "refresh_token": "c", "device_id": "e"},
        {"user_token": "ab", "refresh_token": "cd", "device_id": "d"},
    ]
    for call in calls:
        with pytest.raises(UnavailableError):
            refresh_user_token(**call, api_key="k", base_url=circle.url)
    assert len({request.json()["idempotencyKey"] for request in circle.requests}) == 4


def test_user_id(circle):
    """A user id is exchanged for a user token first; the key is the same each time, so the answer is too."""
    pair = circle.sign_in("user-1")
    arguments = call_with(circle, pair, user_id="user-1")
    del arguments["user_token"]
    new = refresh_user_token(**arguments)
    exchange, refresh = circle.requests
    assert exchange.path == "/v1/w3s/users/token"
    assert exchange.json() == {"userId": "user-1"}
    assert "X-User-Token" not in exchange.headers
    assert refresh.headers["X-User-Token"] not in (pair.user_token, new.user_token)
    assert exchange.headers["X-Request-Id"] == refresh.headers["X-Request-Id"]
    assert refresh_user_token(**arguments) == new


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        pytest.param(Answer(404, {"code": 155102, "message": "planted"}), SignInRequiredError, id="user unknown"),
        pytest.param(b"", UnavailableError, id="no answer"),
        pytest.param(Answer(500, b"planted"), UnavailableError, id="500"),
        pytest.param(Answer(200, {"data": {}}), ReplyError, id="no token"),
        pytest.param(Answer(200, {"data": {"userToken": "planted\n"}}), ReplyError, id="a token that is none"),
        pytest.param(Answer(200, b"planted"), ReplyError, id="no answer of Circle's"),
    ],
)
def test_exchange_spends_nothing(circle, answer, kind):
    """Whatever becomes of the exchange, the refresh token is not spent."""
    circle.next_answers.append(answer)
    with pytest.raises(kind) as caught:
        refresh_user_token(user_id="user-1", refresh_token="r", device_id="d", api_key="k", base_url=circle.url)
    assert type(caught.value) is kind
    assert caught.value.spent is False
    assert "planted" not in str(caught.value)
    assert len(circle.requests) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param({"user_id": "user-1"}, "user_token or user_id must be given, but not both", id="both"),
        pytest.param({"user_token": None}, "user_token or user_id must be given", id="neither"),
        pytest.param({"user_token": ""}, "user_token must not be empty", id="an empty user token"),
        pytest.param({"user_token": "planted\r\n"}, "user_token must not", id="a line break in the user token"),
        pytest.param({"user_token": 5}, "user_token must be a string", id="a number for a user token"),
        pytest.param({"user_token": None, "user_id": "plan"}, "user_id must be 5 to 50", id="a short user id"),
        pytest.param({"user_token": None, "user_id": "p" * 51}, "user_id must be 5 to 50", id="a long user id"),
        pytest.param({"user_token": None, "user_id": "plant\n"}, "user_id must be 5 to 50", id="a line break"),
        pytest.param({"user_token": None, "user_id": 12345}, "user_id must be a string", id="a number"),
        pytest.param({"refresh_token": ""}, "refresh_token must not be empty", id="an empty refresh token"),
        pytest.param({"refresh_token": "a planted"}, "refresh_token must not", id="a blank in the refresh token"),
        pytest.param({"refresh_token": None}, "refresh_token must be a string", id="no refresh token"),
        pytest.param({"device_id": ""}, "device_id must not be empty", id="an empty device id"),
        pytest.param({"device_id": uuid.UUID(KEY)}, "device_id must be a string", id="a UUID object"),
        pytest.param({"idempotency_key": "planted"}, "idempotency_key must be a UUID", id="a bad key"),
        pytest.param({"idempotency_key": ""}, "idempotency_key must be a UUID", id="an empty key"),
        pytest.param({"idempotency_key": "{" + KEY + "}"}, "idempotency_key must be a UUID", id="braces"),
        pytest.param({"idempotency_key": KEY + "\n"}, "idempotency_key must be a UUID", id="a line break after"),
        pytest.param({"idempotency_key": 5}, "idempotency_key must be a UUID", id="a number for a key"),
        pytest.param({"request_id": "planted"}, "request_id must be a UUID", id="a bad request id"),
        pytest.param({"api_key": None}, "api_key is missing: .* CIRCLE_WEB3_API_KEY", id="no key"),
        pytest.param({"api_key": ""}, "api_key is missing", id="an empty API key"),
        pytest.param({"api_key": "planted\n"}, "api_key must not", id="a line break in the API key"),
        pytest.param({"api_key": 5}, "api_key must be a string", id="a number for an API key"),
        pytest.param({"base_url": "http://planted"}, "base_url must use https", id="no TLS"),
        pytest.param({"base_url": "http://127.0.0.1.planted"}, "base_url must use https", id="a false loopback"),
        pytest.param({"base_url": "http://planted:80\\[::1]"}, "base_url must look", id="two hosts in one"),
        pytest.param({"base_url": "https://u:p@planted"}, "base_url must have no user", id="a password"),
        pytest.param({"base_url": None}, "base_url must be a string", id="no URL"),
        pytest.param({"retry": "no"}, "retry must be True or False", id="retry"),
        pytest.param({"timeout": 0}, "timeout must be more than zero", id="no time"),
        pytest.param({"session": "planted"}, "session must be a requests.Session", id="no session"),
    ],
)
def test_bad_arguments(circle, arguments, complaint):
    """What is wrong is found before anything is sent; the argument is named and its value is not shown."""
    with pytest.raises(ValueError, match=f"^{complaint}") as caught:
        refresh_user_token(**call_with(circle, circle.sign_in(), **arguments))
    error = caught.value
    assert isinstance(error, InvalidArgumentError)
    assert (error.provider, error.spent, error.status) == ("circle", False, None)
    assert "plant" not in str(error)
    assert circle.requests == []


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_loopback_needs_no_tls(host):
    """On the machine itself http will do."""
    with pytest.raises(UnavailableError):
        refresh_user_token(user_token="u", refresh_token="r", device_id="d", api_key="k", base_url=f"http://{host}:1")


def test_api_key_from_the_environment(circle, monkeypatch):
    """Without an API key, CIRCLE_WEB3_API_KEY counts."""
    monkeypatch.setenv("CIRCLE_WEB3_API_KEY", circle.api_key)
    assert refresh_user_token(**call_with(circle, circle.sign_in(), api_key=None)).user_id == "user-1"


MEANINGS = {
    -1: (OutcomeUnknownError, None),
    2: (RequestRefusedError, False),
    3: (RequestRefusedError, False),
    5: (UnavailableError, False),
    401: (RequestRefusedError, False),
    155102: (SignInRequiredError, None),
    155103: (SignInRequiredError, None),
    155104: (SignInRequiredError, None),
    155105: (SignInRequiredError, None),
    155109: (SignInRequiredError, None),
    155113: (RequestRefusedError, False),
    155137: (RequestRefusedError, False),
    155139: (SignInRequiredError, None),
    155140: (SignInRequiredError, None),
    156006: (RequestRefusedError, False),
    156007: (RequestRefusedError, False),
    156020: (RequestRefusedError, False),
}


@pytest.mark.parametrize("code", sorted(CIRCLE_ERRORS))
def test_meanings(circle, code):
    """Each of Circle's codes means the one thing that the caller can do about it."""
    circle.fail_next(code)
    kind, spent = MEANINGS[code]
    with pytest.raises(kind) as caught:
        refresh_user_token(**call_with(circle, circle.sign_in()))
    error = caught.value
    assert type(error) is kind
    assert (error.provider, error.status, error.code) == ("circle", CIRCLE_ERRORS[code][0], code)
    assert error.spent is spent
    assert error.request_id == circle.requests[0].headers["X-Request-Id"]
    is_sent = error.idempotency_key == circle.requests[0].json()["idempotencyKey"]
    assert is_sent is (code != 156020), "that one asks for another key"
    assert error.retryable is (kind is UnavailableError)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418])
def test_code_counts_and_not_the_status(circle, status):
    """The code tells what is the matter, whatever the status."""
    circle.next_answers.append(Answer(status, {"code": 401, "message": "planted"}))
    with pytest.raises(RequestRefusedError):
        refresh_user_token(**call_with(circle, circle.sign_in()))


@pytest.mark.parametrize(
    ("status", "body", "kind", "spent"),
    [
        pytest.param(401, {"code": 155999, "message": "planted"}, SignInRequiredError, None, id="about the user"),
        pytest.param(401, {"code": 999999, "message": "planted"}, RequestRefusedError, False, id="an unknown code"),
        pytest.param(403, {"code": 10**40, "message": "planted"}, RequestRefusedError, False, id="a long code"),
        pytest.param(404, {"code": 404, "message": "planted"}, RequestRefusedError, False, id="a wrong path"),
        pytest.param(405, {"code": 405, "message": "planted"}, RequestRefusedError, False, id="a wrong method"),
        pytest.param(408, {"code": 408, "message": "planted"}, UnavailableError, False, id="too slow"),
        pytest.param(413, {"code": 413, "message": "planted"}, RequestRefusedError, False, id="too large"),
        pytest.param(425, {"code": 425, "message": "planted"}, UnavailableError, False, id="too early"),
        pytest.param(429, {"code": 999999, "message": "planted"}, UnavailableError, False, id="throttled"),
        pytest.param(503, {"code": 999999, "message": "planted"}, UnavailableError, False, id="down"),
        pytest.param(500, {"code": 999999, "message": "planted"}, OutcomeUnknownError, None, id="failed"),
        pytest.param(401, {"message": "planted"}, ReplyError, False, id="no code"),
        pytest.param(401, {"code": "planted", "message": ""}, ReplyError, False, id="a code that is none"),
        pytest.param(401, {"code": True, "message": ""}, ReplyError, False, id="true for a code"),
        pytest.param(403, b"<html>planted", ReplyError, False, id="HTML"),
        pytest.param(429, b"<html>planted", UnavailableError, False, id="throttled by a stranger"),
        pytest.param(500, b"<html>planted", OutcomeUnknownError, None, id="a stranger failed"),
        pytest.param(307, b"<html>planted", ReplyError, False, id="a redirect"),
        pytest.param(200, b"", ReplyError, None, id="nothing"),
        pytest.param(204, b"", ReplyError, None, id="no content"),
        pytest.param(200, {"data": {}}, ReplyError, None, id="no user token"),
        pytest.param(200, {"data": None}, ReplyError, None, id="no data"),
        pytest.param(200, {"data": {"userToken": ""}}, ReplyError, None, id="an empty user token"),
        pytest.param(200, {"data": {"userToken": 5}}, ReplyError, None, id="a number"),
        pytest.param(200, {"data": {"userToken": "a\ud800"}}, ReplyError, None, id="half a character"),
    ],
)
def test_replies(circle, status, body, kind, spent):
    """What is not Circle's, or not complete, is an error that tells what became of the token."""
    circle.next_answers.append(Answer(status, body))
    with pytest.raises(kind) as caught:
        refresh_user_token(**call_with(circle, circle.sign_in()))
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.spent) == (status, spent)
    assert "planted" not in str(caught.value)


def test_failure_is_retryable(circle):
    """After an unknown outcome the same request may be sent again: its idempotency key makes it one."""
    circle.next_answers.append(Answer(500, b"planted"))
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_user_token(**call_with(circle, circle.sign_in()))
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("asked", "answered", "user_id", "is_accepted"),
    [
        pytest.param({"sub": "user-1"}, {"sub": "user-1"}, "user-1", True, id="the same"),
        pytest.param({"sub": "user-1"}, {"sub": "user-2"}, "user-2", False, id="another"),
        pytest.param({"sub": "user-1"}, {"sub": "x"}, "user-2", True, id="a subject that is no user id"),
        pytest.param({}, {"sub": "user-2"}, "user-2", True, id="it does not tell"),
        pytest.param({"sub": "user-1"}, {"sub": "user-2"}, None, True, id="nobody knows"),
    ],
)
def test_answer_of_another_user(circle, asked, answered, user_id, is_accepted):
    """An answer with another user's token is not taken, as far as the tokens tell."""
    data = {"userToken": jwt_with(answered), "userID": user_id, "refreshToken": "planted"}
    circle.next_answers.append(Answer(200, {"data": data}))
    arguments = call_with(circle, circle.sign_in(), user_token=jwt_with(asked))
    if is_accepted:
        assert refresh_user_token(**arguments).user_token == jwt_with(answered)
        return
    with pytest.raises(ReplyError, match="a token of another user") as caught:
        refresh_user_token(**arguments)
    assert (caught.value.status, caught.value.spent) == (200, None)
    assert "planted" not in str(caught.value)


def test_answer_of_another_user_id(circle):
    """Who gives a user id gets no other user's token."""
    circle.next_answers.append(circle.truly)
    circle.next_answers.append(Answer(200, {"data": {"userToken": "opaque", "userID": "user-2"}}))
    with pytest.raises(ReplyError, match="a token of another user"):
        refresh_user_token(**call_with(circle, circle.sign_in("user-1"), user_token=None, user_id="user-1"))


def test_answer_without_a_user_id(circle):
    """A session whose user is known stays theirs, also after an answer that does not name them."""
    clock = Clock()
    named = call_with(circle, circle.sign_in("user-1"), user_token=None, user_id="user-1")
    call = named | {"cache": TokenCache(clock=clock)}
    circle.next_answers.extend([circle.truly, Answer(200, {"data": {"userToken": "opaque"}})])
    pair = refresh_user_token(**call)
    assert pair.user_id == "user-1"
    clock.advance(3600)
    circle.next_answers.append(Answer(200, {"data": {"userToken": "theirs", "userID": "user-2"}}))
    with pytest.raises(ReplyError, match="a token of another user"):
        refresh_user_token(**call | {"user_id": None, "user_token": pair.user_token})


@pytest.mark.parametrize("status", [200, 201, 202])
def test_only_the_user_token_is_required(circle, status):
    """Without a refresh token in the answer, the old one is the one to use next; any 2xx will do."""
    before = time.time()
    circle.next_answers.append(Answer(status, {"data": {"userToken": "opaque", "new": [1]}, "also": "new"}))
    token = refresh_user_token(**call_with(circle, circle.sign_in(), refresh_token="old"))
    expires_at = token.expires_at
    assert token == UserToken("opaque", None, None, "old", expires_at)
    assert before - 1 <= (expires_at - timedelta(minutes=60)).timestamp() <= time.time()
    assert UserToken.from_dict(token.to_dict()) == token


@pytest.mark.parametrize("nothing", [None, "", 5, [], {}, False])
def test_optional_members_of_a_wrong_type(circle, nothing):
    """A member that is no string counts as missing: the new user token is not lost over it."""
    data = {"userToken": "new", "encryptionKey": nothing, "userID": nothing, "refreshToken": nothing}
    circle.next_answers.append(Answer(200, {"data": data}))
    token = refresh_user_token(**call_with(circle, circle.sign_in(), refresh_token="old"))
    assert (token.encryption_key, token.user_id, token.refresh_token) == (None, None, "old")


@pytest.mark.parametrize(
    ("exp", "expected"),
    [
        pytest.param(1795293527, datetime(2026, 11, 21, 20, 38, 47, tzinfo=UTC), id="seconds"),
        pytest.param(1795293527.5, datetime(2026, 11, 21, 20, 38, 47, 500000, UTC), id="a fraction"),
        pytest.param(10**300, datetime(9999, 12, 31, 23, 59, 59, 999000, UTC), id="beyond all calendars"),
        pytest.param(-(10**300), datetime(1970, 1, 1, tzinfo=UTC), id="before 1970"),
    ],
)
def test_expiry(circle, exp, expected):
    """A user token that is a JWT dies at its exp."""
    circle.next_answers.append(Answer(200, {"data": {"userToken": jwt_with({"exp": exp})}}))
    token = refresh_user_token(**call_with(circle, circle.sign_in()))
    assert token.expires_at == expected
    assert UserToken.from_dict(token.to_dict()) == token


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        pytest.param({"api_key": "TEST_API_KEY:another:key"}, 401, id="API key"),
        pytest.param({"user_token": "opaque"}, 155105, id="a user token that is none"),
        pytest.param({"user_token": jwt_with({})}, 155103, id="an unknown user token"),
        pytest.param({"refresh_token": "bogus"}, 155102, id="an unknown refresh token"),
        pytest.param({"device_id": "device-2"}, 155137, id="another device"),
    ],
)
def test_fake_refuses(circle, changes, code):
    """FakeCircle looks at each part of the credential, and a refusal spends nothing."""
    pair = circle.sign_in()
    with pytest.raises((RequestRefusedError, SignInRequiredError), match=str(code)):
        refresh_user_token(**call_with(circle, pair, **changes))
    assert refresh_user_token(**call_with(circle, pair)).user_id == "user-1"


def test_fake_refuses_anothers_token(circle):
    """One user's token does not go with another's refresh token."""
    one, two = circle.sign_in("user-1"), circle.sign_in("user-2")
    with pytest.raises(SignInRequiredError, match="155103"):
        refresh_user_token(**call_with(circle, one, user_token=two.user_token))


def test_fake_refuses_a_key_of_another_request(circle):
    """An idempotency key goes with one request."""
    refresh_user_token(**call_with(circle, circle.sign_in(), idempotency_key=KEY))
    with pytest.raises(RequestRefusedError, match="156020"):
        refresh_user_token(**call_with(circle, circle.sign_in(), idempotency_key=KEY))


def test_fake_with_a_key_of_its_own():
    """FakeCircle can be given the API key that a test has at hand."""
    with FakeCircle(api_key="LIVE_API_KEY:a:b") as fake:
        assert refresh_user_token(**call_with(fake, fake.sign_in())).user_id == "user-1"


@pytest.mark.parametrize(
    ("claims", "seconds"),
    [
        pytest.param({"exp": 5000, "iat": 2000}, 3000, id="a JWT"),
        pytest.param({"exp": 5000}, 5000 - (4000 - 3600), id="a JWT that does not tell its birth"),
        pytest.param({}, 30 * 86400, id="a JWT that does not tell"),
        pytest.param(None, 30 * 86400, id="no JWT"),
    ],
)
def test_how_long_a_pair_is_of_use(claims, seconds):
    """A pair can be refreshed until its refresh token dies; if that does not tell, for 30 days."""
    refresh_token = "opaque" if claims is None else jwt_with(claims)
    token = UserToken("u", None, None, refresh_token, datetime.fromtimestamp(4000, UTC))
    arguments = call_with(SimpleNamespace(api_key="k", url="https://c"), token, user_id=None)
    first = credential(**{name: hide(value) for name, value in arguments.items()})
    assert first.following(token).refreshable_for == seconds
