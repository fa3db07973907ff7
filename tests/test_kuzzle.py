"""refresh_kuzzle_token."""

from __future__ import annotations

import enum
import json
from datetime import UTC, datetime, timedelta

import pytest
import requests
from helpers import KUZZLE_ERRORS, jwt_with
from requests.cookies import create_cookie

from refresher import (
    InvalidArgumentError,
    KuzzleAuth,
    KuzzleToken,
    OutcomeUnknownError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    UnavailableError,
    refresh_kuzzle_token,
)
from refresher.services import Reply
from refresher.services.kuzzle import credential, parse
from refresher.testing import Answer, FakeKuzzle

pytestmark = pytest.mark.usefixtures("single")

JWT = "kauth-e30.e30.c2ln"
URL = "http://127.0.0.1:1"


def request(**changes):
    arguments = {
        "url": "http://kuzzle",
        "jwt": JWT,
        "expires_in": None,
        "cookie_auth": False,
        "trigger_events": False,
        "strategy": None,
    }
    return credential(**{**arguments, **changes}).request()


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        pytest.param({}, "http://kuzzle/_refreshToken", id="nothing"),
        pytest.param({"url": "https://k:1/a/b//"}, "https://k:1/a/b/_refreshToken", id="a prefix"),
        pytest.param({"url": "http://[::1]:7512"}, "http://[::1]:7512/_refreshToken", id="IPv6"),
        pytest.param({"expires_in": "2 hours"}, "http://kuzzle/_refreshToken?expiresIn=2%20hours", id="a timespan"),
        pytest.param({"expires_in": "-1"}, "http://kuzzle/_refreshToken?expiresIn=-1", id="for ever"),
        pytest.param(
            {"expires_in": timedelta(hours=2)},
            "http://kuzzle/_refreshToken?expiresIn=7200000",
            id="a timedelta",
        ),
        pytest.param({"cookie_auth": True}, "http://kuzzle/_refreshToken?cookieAuth", id="cookie mode"),
        pytest.param({"trigger_events": True}, "http://kuzzle/_refreshToken?triggerEvents", id="events"),
        pytest.param({"strategy": "a&b=c"}, "http://kuzzle/_refreshToken?strategy=a%26b%3Dc", id="a strategy"),
        pytest.param(
            {"expires_in": "30m", "cookie_auth": True, "trigger_events": True, "strategy": "local"},
            "http://kuzzle/_refreshToken?expiresIn=30m&cookieAuth&triggerEvents&strategy=local",
            id="everything",
        ),
    ],
)
def test_build(arguments, url):
    """All arguments travel in the query, flags bare and only when on."""
    assert request(**arguments).url == url


def test_what_is_sent(kuzzle):
    """A POST without a body, with the token in Authorization and our name on it."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    refresh_kuzzle_token(kuzzle.url, jwt)
    (sent,) = kuzzle.requests
    assert (sent.method, sent.target, sent.body) == ("POST", "/_refreshToken", b"")
    assert sent.headers["Authorization"] == f"Bearer {jwt}"
    assert sent.headers["User-Agent"].startswith("refresher/")
    assert "Cookie" not in sent.headers


def test_path_prefix(kuzzle):
    """Behind a path prefix, the prefix is kept."""
    kuzzle.fail_next("network.http.url_not_found")
    with pytest.raises(RequestRefusedError):
        refresh_kuzzle_token(kuzzle.url + "/prefix/", JWT)
    assert kuzzle.requests[0].target == "/prefix/_refreshToken"


@pytest.mark.parametrize("name", ["url", "jwt", "expires_in", "timeout", "strategy", "cookie_auth", "session"])
@pytest.mark.parametrize("value", [b"planted", object(), ["planted"], 5.5j], ids=lambda value: type(value).__name__)
def test_wrong_types(kuzzle, name, value):
    """An argument of a wrong type is named, and nothing is sent."""
    arguments = {"url": kuzzle.url, "jwt": JWT, name: value}
    with pytest.raises(InvalidArgumentError, match=f"^{name} ") as caught:
        refresh_kuzzle_token(**arguments)
    assert "planted" not in str(caught.value)
    assert kuzzle.requests == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param({"jwt": None}, "jwt is missing", id="no token"),
        pytest.param({"jwt": ""}, "jwt must not be empty", id="an empty token"),
        pytest.param({"jwt": "planted token"}, "jwt must not", id="a blank in the token"),
        pytest.param({"jwt": "planted\n"}, "jwt must not", id="a line break after the token"),
        pytest.param({"jwt": "planted\x00"}, "jwt must not", id="a NUL in the token"),
        pytest.param({"jwt": "plantéd"}, "jwt must not", id="no ASCII"),
        pytest.param({"jwt": "planted\ud800"}, "jwt must not", id="half a character"),
        pytest.param({"jwt": '"planted"'}, "jwt must be the token alone", id="quotes around the token"),
        pytest.param({"jwt": '{"jwt":"planted"}'}, "jwt must be the token alone", id="JSON"),
        pytest.param({"jwt": "KUZZLE_JWT=planted"}, "jwt must be the token alone", id="a name before the token"),
        pytest.param({"jwt": "="}, "jwt must be the token alone", id="nothing but padding"),
        pytest.param({"jwt": "null"}, "jwt must be the token alone", id="JSON's null"),
        pytest.param({"url": ""}, "url must not be empty", id="no URL"),
        pytest.param({"url": "planted"}, "url", id="no scheme"),
        pytest.param({"url": "ftp://planted"}, "url must look like", id="another scheme"),
        pytest.param({"url": "http://"}, "url must look like", id="no host"),
        pytest.param({"url": "http:planted"}, "url", id="no slashes"),
        pytest.param(
            {"url": "http://planted:99999"}, "url must be a URL with a valid host and port", id="a port too high"
        ),
        pytest.param({"url": "http://planted:0"}, "url must look like", id="port 0"),
        pytest.param(
            {"url": "http://planted:x"}, "url must be a URL with a valid host and port", id="a port that is none"
        ),
        pytest.param({"url": "http://[planted"}, "url must be a URL with a valid host and port", id="half a bracket"),
        pytest.param({"url": "http://u:planted@host"}, "url must have no user name", id="a password in the URL"),
        pytest.param({"url": "http://host?planted"}, "url must have no user name", id="a query"),
        pytest.param({"url": "http://host#planted"}, "url must have no user name", id="a fragment"),
        pytest.param({"url": "http://host/ planted"}, "url must not", id="a blank in the URL"),
        pytest.param({"url": "http://*planted"}, "url must look like", id="a wildcard"),
        pytest.param({"url": "http://plantéd"}, "url must not", id="a host not in ASCII"),
        pytest.param({"expires_in": 7200}, "expires_in must be a string", id="seconds or milliseconds?"),
        pytest.param({"expires_in": 7200.0}, "expires_in must be a string", id="a float"),
        pytest.param({"expires_in": True}, "expires_in must be a string", id="a flag"),
        pytest.param({"expires_in": "planted"}, "expires_in must be a number and a unit", id="no timespan"),
        pytest.param({"expires_in": "-2h"}, "expires_in must be at least one second", id="a negative one"),
        pytest.param({"expires_in": "500"}, "expires_in must be at least one second", id="a short one"),
        pytest.param({"expires_in": "1.00015s"}, "expires_in must be at least one", id="half a millisecond"),
        pytest.param({"expires_in": "300000000y"}, "expires_in is longer", id="a long one"),
        pytest.param({"expires_in": timedelta(0)}, "expires_in must be at least one", id="no time"),
        pytest.param({"expires_in": timedelta(milliseconds=-1)}, "expires_in must be at least", id="not -1"),
        pytest.param({"expires_in": timedelta(hours=1, microseconds=1)}, "expires_in must be", id="a microsecond"),
        pytest.param({"strategy": ""}, "strategy must be", id="an empty strategy"),
        pytest.param({"strategy": "planted\n"}, "strategy must be", id="a line break in the strategy"),
        pytest.param({"timeout": 0}, "timeout must be more than zero", id="no time to wait"),
        pytest.param({"timeout": -2}, "timeout must be more than zero", id="less than no time to wait"),
        pytest.param({"timeout": float("nan")}, "timeout must be a number", id="not a number"),
        pytest.param({"timeout": float("inf")}, "timeout must be more than zero", id="infinity"),
        pytest.param({"timeout": True}, "timeout must be a number", id="a flag for a timeout"),
        pytest.param({"timeout": "30"}, "timeout must be a number", id="a text for a timeout"),
        pytest.param({"timeout": timedelta(0)}, "timeout must be more than zero", id="timedelta(0)"),
        pytest.param({"queuable": 1}, "queuable must be True or False", id="queuable"),
        pytest.param({"cookie_auth": 1}, "cookie_auth must be True or False", id="cookie_auth"),
        pytest.param({"trigger_events": "no"}, "trigger_events must be True or False", id="trigger_events"),
        pytest.param({"cookie_auth": True}, "session is needed in cookie mode", id="no jar"),
        pytest.param(
            {"cookie_auth": True, "session": requests.Session(), "jwt": None},
            "jwt is missing, and the session has no authToken cookie",
            id="no cookie",
        ),
        pytest.param(
            {"cookie_auth": True, "session": requests.Session(), "expires_in": "-1"},
            "expires_in must not be -1 in cookie mode",
            id="a cookie for ever",
        ),
        pytest.param(
            {"cookie_auth": True, "session": requests.Session(), "expires_in": timedelta(days=10**8)},
            "expires_in is longer",
            id="a cookie for too long",
        ),
        pytest.param(
            {"url": "http://[", "cookie_auth": True, "session": requests.Session(), "jwt": None},
            "url must be a URL with a valid host and port",
            id="a URL whose cookies can't be looked up",
        ),
    ],
)
def test_bad_arguments(kuzzle, arguments, complaint):
    """What is wrong is found before anything is sent; the argument is named and its value is not shown."""
    with pytest.raises(ValueError, match=f"^{complaint}") as caught:
        refresh_kuzzle_token(**{"url": kuzzle.url, "jwt": JWT, **arguments})
    error = caught.value
    assert isinstance(error, RequestRefusedError)
    assert (error.provider, error.spent, error.status) == ("kuzzle", False, None)
    assert "plant" not in str(error)
    assert kuzzle.requests == []


class Masked(str):
    """A string that does not show itself."""

    __slots__ = ()

    def __str__(self):
        return "***"

    def __format__(self, spec):
        return "***"


class Choice(str, enum.Enum):  # noqa: UP042 - of a StrEnum, str() is what is in it
    """A string whose name is shown in its place."""

    LOCAL = "local"
    LIFETIME = "2h"


def test_strings_of_other_classes(kuzzle):
    """What counts is what is in a string, not how it is shown."""
    jwt, again = kuzzle.login(ago=60), kuzzle.login(ago=120)
    options = {
        "strategy": Choice.LOCAL,
        "expires_in": Choice.LIFETIME,
        "timeout": enum.IntEnum("T", {"SHORT": 5}).SHORT,
    }
    token = refresh_kuzzle_token(Masked(kuzzle.url), Masked(jwt), **options)
    assert (token.ttl, kuzzle.knows(token.jwt)) == (timedelta(hours=2), True)
    auth = KuzzleAuth(Masked(kuzzle.url), Masked(again))
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=5).json()["result"]["_id"] == "foo"
    read = KuzzleToken.from_dict({**token.to_dict(), "_id": Masked("foo"), "jwt": Masked(token.jwt)})
    assert f"{read.kuid} {read.jwt}" == f"foo {token.jwt}"


class Series:
    """What compares each of its members, as those of numpy and pandas do."""

    __hash__ = None

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise ValueError("planted")


def test_series_as_a_timeout(kuzzle):
    """It is no number of seconds."""
    with pytest.raises(InvalidArgumentError, match=r"^timeout must be a number of seconds"):
        refresh_kuzzle_token(kuzzle.url, JWT, timeout=Series())


@pytest.mark.parametrize("timeout", [10**5000, -(10**5000)], ids=["huge", "less"])
def test_huge_timeouts(kuzzle, timeout):
    """A number that no float can hold is no different from other wrong ones."""
    with pytest.raises(InvalidArgumentError, match=r"^timeout must be more than zero seconds"):
        refresh_kuzzle_token(kuzzle.url, JWT, timeout=timeout)


@pytest.mark.parametrize("timeout", [None, -1, -1.0, 5, 5.5, timedelta(seconds=5), timedelta(days=20000), 9e9])
def test_timeouts(kuzzle, timeout):
    """Seconds, timedeltas, None and -1 are all timeouts."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    assert refresh_kuzzle_token(kuzzle.url, jwt, timeout=timeout).kuid == "foo"


MEANINGS = {
    "api.assert.body_required": (RequestRefusedError, False),
    "api.assert.invalid_argument": (RequestRefusedError, False),
    "api.assert.invalid_type": (RequestRefusedError, False),
    "api.assert.missing_argument": (RequestRefusedError, False),
    "api.process.action_not_found": (RequestRefusedError, False),
    "api.process.controller_not_found": (RequestRefusedError, False),
    "api.process.incompatible_sdk_version": (RequestRefusedError, False),
    "api.process.not_enough_nodes": (UnavailableError, False),
    "api.process.overloaded": (UnavailableError, False),
    "api.process.shutting_down": (UnavailableError, False),
    "api.process.too_many_requests": (UnavailableError, False),
    "api.process.unauthorized_origin": (RequestRefusedError, False),
    "network.entrypoint.shutting_down": (UnavailableError, False),
    "network.http.body_parse_failed": (RequestRefusedError, False),
    "network.http.request_too_large": (RequestRefusedError, False),
    "network.http.too_many_encodings": (RequestRefusedError, False),
    "network.http.unexpected_error": (RequestRefusedError, False),
    "network.http.unsupported_charset": (RequestRefusedError, False),
    "network.http.unsupported_compression": (RequestRefusedError, False),
    "network.http.unsupported_content": (RequestRefusedError, False),
    "network.http.unsupported_verb": (RequestRefusedError, False),
    "network.http.url_not_found": (RequestRefusedError, False),
    "network.http.volatile_parse_failed": (RequestRefusedError, False),
    "plugin.runtime.unexpected_error": (OutcomeUnknownError, None),
    "plugin.strategy.missing_user": (SignInRequiredError, False),
    "security.cookie.unsupported": (RequestRefusedError, False),
    "security.credentials.unknown_strategy": (RequestRefusedError, False),
    "security.rights.forbidden": (RequestRefusedError, False),
    "security.rights.unauthorized": (ReplyError, False),  # a proxy took the token off
    "security.token.expired": (SignInRequiredError, False),
    "security.token.invalid": (SignInRequiredError, None),
    "security.token.refresh_forbidden": (RequestRefusedError, False),
    "security.token.ttl_exceeded": (RequestRefusedError, False),
    "security.token.verification_error": (UnavailableError, False),
    "services.cache.not_connected": (UnavailableError, False),
    "services.cache.read_failed": (UnavailableError, False),
    "services.cache.write_failed": (UnavailableError, False),
}


@pytest.mark.parametrize("id", sorted(KUZZLE_ERRORS))
def test_meanings(kuzzle, id):
    """Each of Kuzzle's errors means the one thing that the caller can do about it."""
    kuzzle.fail_next(id)
    kind, spent = MEANINGS[id]
    with pytest.raises(kind, match=id) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    error = caught.value
    status, code, _ = KUZZLE_ERRORS[id]
    assert type(error) is kind
    assert (error.provider, error.status, error.code, error.id, error.spent) == (
        "kuzzle",
        status,
        code,
        id,
        spent,
    )
    assert error.request_id == kuzzle.requests[0].headers["X-Kuzzle-Request-Id"]
    assert error.retryable is (kind is UnavailableError)


def test_token_without_its_prefix(kuzzle):
    """Who cut it off, as to read it, is told what is missing. The session lives."""
    jwt = kuzzle.login(ago=60)
    with pytest.raises(SignInRequiredError, match="a token without its prefix, kauth-: give all of it"):
        refresh_kuzzle_token(kuzzle.url, jwt.removeprefix("kauth-"))
    assert kuzzle.knows(jwt)


def enveloped(error):
    return {"action": "refreshToken", "controller": "auth", "error": error, "result": None, "status": 0}


HTML = b"<html><body>planted</body></html>"
GOOD = {"_id": "foo", "expiresAt": 1795293527300, "jwt": "kauth-new", "ttl": 3600000}


@pytest.mark.parametrize(
    ("status", "body", "kind", "spent"),
    [
        pytest.param(401, enveloped({"message": "planted", "status": 401}), RequestRefusedError, False, id="401"),
        pytest.param(400, enveloped({"message": "planted", "status": 400}), RequestRefusedError, False, id="400"),
        pytest.param(403, enveloped({"message": "x", "id": "planted"}), RequestRefusedError, False, id="403"),
        pytest.param(408, enveloped({"message": "x", "id": "planted"}), UnavailableError, False, id="408"),
        pytest.param(425, enveloped({"message": "x", "id": "planted"}), UnavailableError, False, id="425"),
        pytest.param(429, enveloped({"message": "x", "id": "planted"}), UnavailableError, False, id="429"),
        pytest.param(503, enveloped({"message": "x", "id": "planted"}), UnavailableError, False, id="503"),
        pytest.param(500, enveloped({"message": "x", "id": ["planted"]}), OutcomeUnknownError, None, id="500"),
        pytest.param(400, {"id": "planted", "status": 400}, RequestRefusedError, False, id="bare"),
        pytest.param(403, {"message": "planted"}, ReplyError, False, id="a gateway's own"),
        pytest.param(200, HTML, ReplyError, None, id="a captive portal"),
        pytest.param(204, b"", ReplyError, None, id="nothing"),
        pytest.param(200, b"[]", ReplyError, None, id="no object"),
        pytest.param(200, {"error": None, "result": "planted"}, ReplyError, None, id="no result"),
        pytest.param(200, enveloped({"message": "planted"}), ReplyError, None, id="an error of status 200"),
        pytest.param(301, HTML, ReplyError, False, id="a redirect"),
        pytest.param(404, HTML, ReplyError, False, id="404 of a stranger"),
        pytest.param(407, HTML, ReplyError, False, id="a proxy that wants a password"),
        pytest.param(429, HTML, UnavailableError, False, id="429 of a stranger"),
        pytest.param(502, HTML, OutcomeUnknownError, None, id="502 of a proxy"),
        pytest.param(503, HTML, UnavailableError, False, id="503 of a proxy"),
        pytest.param(504, HTML, OutcomeUnknownError, None, id="504 of a proxy"),
        pytest.param(400, {"error": "planted"}, ReplyError, False, id="an error that is none"),
        *(
            pytest.param(200, {"result": {**GOOD, name: value}}, ReplyError, None, id=f"{name}: {value!r:.9}")
            for name, values in {
                "_id": [None, 5, ""],
                "jwt": [None, 5, "", "a b", "\ud800", ["x"]],
                "expiresAt": [None, "5", True, float("nan"), float("inf"), {}],
                "ttl": [None, "5", False, float("-inf"), []],
            }.items()
            for value in values
        ),
        pytest.param(200, {"result": {**GOOD, "jwt": JWT}}, SignInRequiredError, True, id="the same token"),
        pytest.param(200, {"result": {**GOOD, "ttl": -2}}, SignInRequiredError, True, id="a dead token"),
        pytest.param(200, {"result": {**GOOD, "ttl": 0}}, SignInRequiredError, True, id="a stillborn token"),
    ],
)
def test_replies(kuzzle, status, body, kind, spent):
    """What is not Kuzzle's, or not complete, is an error that tells what became of the token."""
    kuzzle.next_answers.append(Answer(status, body))
    with pytest.raises(kind) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.spent, caught.value.id) == (status, spent, None)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("id", "shown"),
    [
        pytest.param("security.token.brand_new", "security.token.brand_new", id="a name that we do not know"),
        pytest.param("a_part.of_the.jwt", None, id="a part of the jwt"),
        pytest.param("security.token", None, id="half a name"),
        pytest.param("security.token.invalid\n", None, id="a line break"),
        pytest.param("security.token.Planted", None, id="a capital"),
        pytest.param("security.token.v2", None, id="a digit"),
        pytest.param("a." * 2 + "planted" * 20, None, id="a long one"),
        pytest.param(["security.token.invalid"], None, id="a list"),
    ],
)
def test_id(kuzzle, id, shown):
    """An error's id is shown if it is spelled like a name and is no part of what was sent."""
    kuzzle.next_answers.append(Answer(400, enveloped({"message": "x", "id": id})))
    with pytest.raises(RequestRefusedError) as caught:
        refresh_kuzzle_token(kuzzle.url, "kauth-a_part.of_the.jwt")
    assert caught.value.id == shown
    assert (shown or "(400)") in str(caught.value)


@pytest.mark.parametrize(
    ("url", "same"),
    [
        pytest.param("HTTP://Kuzzle", "http://kuzzle", id="capitals"),
        pytest.param("http://kuzzle:80", "http://kuzzle", id="the usual port"),
        pytest.param("https://kuzzle:443/", "https://kuzzle", id="the usual port of TLS"),
        pytest.param("http://kuzzle:", "http://kuzzle", id="a colon"),
        pytest.param("http://kuzzle:0080//", "http://kuzzle", id="zeros"),
        pytest.param("http://[::1]:80/a/", "http://[::1]/a", id="IPv6"),
        pytest.param("http://kuzzle/A", "http://kuzzle/A", id="a path keeps its capitals"),
    ],
)
def test_spellings(url, same):
    """However a URL is spelled, it is the same credential."""
    first, second = credential(url=url, jwt=JWT), credential(url=same, jwt=JWT)
    assert first.url == same
    assert first.keys == second.keys
    assert first == second


@pytest.mark.parametrize(
    "url", ["http://kuzzle:443", "https://kuzzle:80", "http://kuzzle/a", "http://kuzzl", "http://KUZZLE/A"]
)
def test_other_urls(url):
    """Another scheme, port, host or path is another credential."""
    assert credential(url=url, jwt=JWT).keys != credential(url="http://kuzzle/a/b", jwt=JWT).keys
    assert credential(url=url, jwt=JWT).keys != credential(url="http://kuzzle", jwt=JWT).keys


@pytest.mark.parametrize(
    ("claims", "expires_at", "expected"),
    [
        pytest.param({"exp": 1000}, 1_000_999, datetime(1970, 1, 1, 0, 16, 40, tzinfo=UTC), id="exp is earlier"),
        pytest.param({"exp": 1001}, 1_000_999, datetime(1970, 1, 1, 0, 16, 40, 999000, UTC), id="expiresAt is"),
        pytest.param({}, 1_000_999, datetime(1970, 1, 1, 0, 16, 40, 999000, UTC), id="no exp"),
        pytest.param({"exp": True}, 1_000_999, datetime(1970, 1, 1, 0, 16, 40, 999000, UTC), id="no number"),
        pytest.param({"exp": 1e999}, 1_000_999, datetime(1970, 1, 1, 0, 16, 40, 999000, UTC), id="infinity"),
        pytest.param([], 1_000_999, datetime(1970, 1, 1, 0, 16, 40, 999000, UTC), id="no claims"),
        pytest.param({}, -1, None, id="never"),
        pytest.param({}, 10**18, datetime(9999, 12, 31, 23, 59, 59, 999000, UTC), id="beyond all calendars"),
        pytest.param({}, -(10**18), datetime(1970, 1, 1, tzinfo=UTC), id="before 1970"),
    ],
)
def test_expiry(claims, expires_at, expected):
    """A token dies at the earlier of expiresAt and its own exp; -1 is never."""
    result = {"_id": "foo", "expiresAt": expires_at, "jwt": "kauth-" + jwt_with(claims), "ttl": 10**18}
    reply = Reply(status=200, headers={}, body=json.dumps({"result": result}).encode(), requested_at=0)
    token = parse(reply, request(jwt="kauth-old"))
    assert token.expires_at == expected
    assert KuzzleToken.from_dict(token.to_dict()) == token


def test_retry_after_by_an_unknown_clock():
    """A date to wait for counts only beside the service's own: the local clock may be hours off."""
    headers = {"Retry-After": "Sat, 21 Nov 2026 20:38:47 GMT"}
    for date, seconds in ((None, None), ("Sat, 21 Nov 2026 20:37:47 GMT", 60.0)):
        told = headers if date is None else {**headers, "Date": date}
        with pytest.raises(UnavailableError) as caught:
            parse(Reply(status=429, headers=told, body=b"", requested_at=0), request())
        assert caught.value.retry_after == seconds


@pytest.mark.parametrize(
    ("envelope", "what"),
    [
        pytest.param({"action": "getCurrentUser"}, "answered another request", id="another action"),
        pytest.param({"result": {**GOOD, "_id": "bar"}}, "a token of another user", id="another user"),
        pytest.param(
            {"result": {**GOOD, "jwt": "kauth-" + jwt_with({"_id": "bar"})}},
            "a token of another user",
            id="another user's jwt",
        ),
    ],
)
def test_answers_of_others(envelope, what):
    """What was not meant for this request is not taken, and leaves the outcome open."""
    reply = Reply(status=200, headers={}, body=json.dumps({"result": GOOD, **envelope}).encode(), requested_at=0)
    with pytest.raises(ReplyError, match=what) as caught:
        parse(reply, request(jwt="kauth-" + jwt_with({"_id": "foo"})))
    assert caught.value.spent is None


def test_server_with_other_rules():
    """A server's own limits, strategies and settings come back as errors that spend nothing."""
    with FakeKuzzle(
        max_ttl=7_200_000, cookies=False, strategies={"demo": lambda: "3s", "silent": lambda: None}
    ) as fake:
        jwt = fake.login()
        fake.clock.advance(1)
        for lifetime in ("3h", "-1"):
            with pytest.raises(RequestRefusedError, match="ttl_exceeded"):
                refresh_kuzzle_token(fake.url, jwt, expires_in=lifetime)
        with pytest.raises(RequestRefusedError, match=r"security\.cookie\.unsupported"):
            refresh_kuzzle_token(fake.url, jwt, cookie_auth=True, session=requests.Session())
        token = refresh_kuzzle_token(fake.url, jwt, strategy="demo", expires_in="30m")
        assert token.ttl == timedelta(seconds=3)
        token = refresh_kuzzle_token(fake.url, token.jwt, strategy="silent", expires_in="30m")
        assert token.ttl == timedelta(minutes=30)


def test_no_grace():
    """With a grace period of nothing, Kuzzle lets old tokens live on, though it refreshes none of them."""
    with FakeKuzzle(grace=0) as fake:
        jwt = fake.login()
        fake.clock.advance(1)
        refresh_kuzzle_token(fake.url, jwt)
        fake.clock.advance(1000)
        assert fake.knows(jwt)
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(fake.url, jwt)


def test_down(kuzzle):
    """A server that is not there has spent nothing; when it is back, it goes on."""
    jwt = kuzzle.login()
    kuzzle.stop()
    kuzzle.stop()
    with pytest.raises(UnavailableError, match=r"could not be reached: .* \(Connection refused\)") as caught:
        refresh_kuzzle_token(kuzzle.url, jwt)
    assert (caught.value.spent, caught.value.status) == (False, None)
    kuzzle.start()
    kuzzle.clock.advance(1)
    assert refresh_kuzzle_token(kuzzle.url, jwt).kuid == "foo"


# Cookie mode


def test_one_credential_on_the_wire(kuzzle):
    """A jwt keeps the session's authToken back, a cookie its Authorization; other cookies go along."""
    session = requests.Session()
    session.headers["Authorization"] = "Bearer stale"
    session.cookies.set("authToken", "stale")
    session.cookies.set("sticky", "node-1")
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    refresh_kuzzle_token(kuzzle.url, jwt, session=session)
    refresh_kuzzle_token(kuzzle.url, kuzzle.login(), expires_in="2h", session=session, cookie_auth=True)
    kuzzle.clock.advance(1)
    refresh_kuzzle_token(kuzzle.url, session=session, cookie_auth=True)
    plain, first, second = [(r.headers.get("Authorization"), r.headers["Cookie"]) for r in kuzzle.requests]
    assert plain == (f"Bearer {jwt}", "sticky=node-1")
    assert first[1] == "sticky=node-1"
    assert second[0] is None
    assert second[1].startswith("sticky=node-1; authToken=kauth-")


@pytest.mark.parametrize("domain", ["", "127.0.0.1"])
def test_cookie_takes_the_place_of_the_old(kuzzle, domain):
    """The new cookie replaces the old one, however that was put into the jar, and no stranger's."""
    session = requests.Session()
    session.cookies.set("authToken", kuzzle.login(), domain=domain)
    session.cookies.set("authToken", "stranger", domain="example.com")
    kuzzle.clock.advance(1)
    refresh_kuzzle_token(kuzzle.url, session=session, cookie_auth=True)
    ours, stranger = sorted(session.cookies, key=lambda cookie: cookie.domain)
    assert (ours.domain, ours.path, ours.has_nonstandard_attr("HttpOnly")) == ("127.0.0.1", "/", True)
    assert kuzzle.knows(ours.value)
    assert stranger.value == "stranger"


def test_cookie_on_localhost(kuzzle):
    """A host name without a dot has a cookie of its own too."""
    session = requests.Session()
    url = kuzzle.url.replace("127.0.0.1", "localhost")
    refresh_kuzzle_token(url, kuzzle.login(), expires_in="2h", session=session, cookie_auth=True)
    kuzzle.clock.advance(1)
    refresh_kuzzle_token(url, session=session, cookie_auth=True)
    assert len(session.cookies) == 1


def test_cookie_under_a_wrong_clock(kuzzle):
    """A local clock that is years ahead does not throw the new cookie away."""
    kuzzle.clock.advance(-10 * 365 * 86400)
    session = requests.Session()
    refresh_kuzzle_token(kuzzle.url, kuzzle.login(), expires_in="2h", session=session, cookie_auth=True)
    assert kuzzle.knows(session.cookies["authToken"])
    assert not next(iter(session.cookies)).is_expired()


def test_cookie_is_taken_as_it_comes(kuzzle):
    """What Kuzzle put into the jar is sent back, whatever characters it has."""
    session = requests.Session()
    session.cookies.set("authToken", "kauth-!", domain="127.0.0.1")
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, session=session, cookie_auth=True)
    assert kuzzle.requests[0].headers["Cookie"] == "authToken=kauth-!"


def test_expired_cookie_is_none(kuzzle):
    """A cookie that the jar would not send any more is not a token."""
    session = requests.Session()
    session.cookies.set_cookie(create_cookie("authToken", "x", domain="127.0.0.1", expires=1))
    with pytest.raises(InvalidArgumentError, match="jwt is missing"):
        refresh_kuzzle_token(kuzzle.url, session=session, cookie_auth=True)


@pytest.mark.parametrize("path", ["/app", "/app/"])
def test_cookie_of_a_path(kuzzle, path):
    """A proxy may give a cookie the path that it gives to Kuzzle, and the new one keeps it."""
    session = requests.Session()
    session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1", path=path)
    answer = {"_id": "foo", "expiresAt": -1, "ttl": -1}
    kuzzle.next_answers.append(Answer(200, {"result": answer}, {"Set-Cookie": "authToken=kauth-new; Path=/"}))
    refresh_kuzzle_token(f"{kuzzle.url}/app", session=session, cookie_auth=True)
    assert [(cookie.path, cookie.value) for cookie in session.cookies] == [(path, "kauth-new")]


def test_cookie_after_a_sign_out(kuzzle):
    """What Kuzzle puts in its place then is not a token, and is not sent as one."""
    session = requests.Session()
    login = {"username": "foo", "password": "bar"}
    session.post(f"{kuzzle.url}/_login/local?cookieAuth", json=login, timeout=5)
    session.post(f"{kuzzle.url}/_logout?cookieAuth", timeout=5)
    kuzzle.requests.clear()
    with pytest.raises(InvalidArgumentError, match="jwt is missing"):
        refresh_kuzzle_token(kuzzle.url, session=session, cookie_auth=True)
    assert not kuzzle.requests


def test_infinite_cookie(kuzzle):
    """If a strategy decides for a token for ever, its cookie has no end, and the session is not lost."""
    kuzzle.strategies["demo"] = lambda: "-1"
    session = requests.Session()
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(), strategy="demo", session=session, cookie_auth=True)
    assert (token.jwt, token.expires_at) == (None, None)
    assert kuzzle.knows(session.cookies["authToken"])


def test_cookie_that_was_not_asked_for(kuzzle):
    """A new token that comes as a cookie all the same is not lost."""
    answer = {"_id": "foo", "expiresAt": -1, "ttl": -1}
    kuzzle.next_answers.append(Answer(200, {"result": answer}, {"Set-Cookie": "authToken=kauth-new; Path=/"}))
    assert refresh_kuzzle_token(kuzzle.url, JWT).jwt == "kauth-new"
