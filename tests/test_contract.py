"""What a real Kuzzle does, the fake does: the same assertions on both."""

from __future__ import annotations

import gzip
import socket
import zlib
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit

import pytest
import requests

from refresher import (
    InvalidArgumentError,
    RequestRefusedError,
    SignInRequiredError,
    refresh_kuzzle_token,
)
from refresher._text import claims
from refresher.services.kuzzle import milliseconds

pytestmark = pytest.mark.usefixtures("single")


def error_of(response):
    body = response.json()
    return body.get("error", body)


def test_refresh(target):
    """A refresh gives a token that dies at the JWT's own end, which is never after Kuzzle's expiresAt."""
    old = target.login()
    token = target.refresh(old, expires_in="2h")
    assert token.kuid == target.kuid
    assert token.ttl == timedelta(hours=2)
    assert token.expires_at == datetime.fromtimestamp(claims(token.jwt).exp, UTC)
    check = target.call("POST", "/_checkToken", json={"token": token.jwt}).json()["result"]
    assert check["valid"] is True
    assert check["kuid"] == target.kuid
    assert 0 <= check["expiresAt"] - token.expires_at.timestamp() * 1000 < 1000


def test_default_lifetime(target):
    """Without expires_in the server's default counts, not the old token's lifetime."""
    assert target.refresh(target.login()).ttl == timedelta(hours=1)


def test_old_token_lives_for_one_more_second(target):
    """The old token is refreshed once, and good for another second."""
    old = target.login()
    new = target.refresh(old).jwt
    assert (target.me(old), target.me(new)) == (200, 200)
    with pytest.raises(SignInRequiredError) as caught:
        target.refresh(old)
    assert (caught.value.id, caught.value.spent) == ("security.token.invalid", None)
    target.wait(1.2)
    assert (target.me(old), target.me(new)) == (401, 200)
    check = target.call("POST", "/_checkToken", json={"token": old}).json()["result"]
    assert check == {"state": "Invalid token.", "valid": False}


def test_same_second(target):
    """Refreshed to the same end within the second of its birth, a token comes back and dies: an error."""
    for _ in range(20):
        lifetime = f"{target.lifetimes()}s"
        old = target.login(lifetime)
        try:
            target.refresh(old, expires_in=lifetime)
        except SignInRequiredError as error:
            seen = (error.status, error.id, error.spent)
            break
        target.wait(0.05)
    assert seen == (200, None, True)
    assert target.me(old) == 200
    target.wait(1.2)
    assert target.me(old) == 401


def test_expiry(target):
    """A token dies at its exp, and Kuzzle has no other word for it than for garbage."""
    token = target.refresh(target.login(), expires_in="1s")
    target.wait(1.2)
    with pytest.raises(SignInRequiredError, match=r"security\.token\.invalid"):
        target.refresh(token.jwt)


def test_infinite_token(target):
    """A token for ever has no expiry and can't be refreshed. It stays good."""
    token = target.refresh(target.login(), expires_in="-1")
    assert (token.expires_at, token.ttl) == (None, None)
    with pytest.raises(RequestRefusedError) as caught:
        target.refresh(token.jwt)
    assert (caught.value.id, caught.value.spent) == ("security.token.refresh_forbidden", False)
    assert target.me(token.jwt) == 200
    assert target.call("POST", "/_logout", token.jwt).json()["result"] == {"acknowledged": True}


@pytest.fixture
def make_api_key(target):
    """Make API keys. They are deleted, since Kuzzle looks for one among a user's first ten."""
    made = []

    def make(query=""):
        path = "/api-keys/_create?refresh=wait_for" + query
        made.append(target.call("POST", path, target.login(), json={"description": "x"}).json()["result"])
        return made[-1]["_source"]

    yield make
    for key in made:
        target.call("DELETE", f"/api-keys/{key['_id']}?refresh=wait_for", target.login())


def test_api_key(target, make_api_key):
    """An API key can't be refreshed, and stays good."""
    key = make_api_key()["token"]
    with pytest.raises(RequestRefusedError) as caught:
        target.refresh(key)
    assert (caught.value.id, caught.value.spent) == ("security.token.refresh_forbidden", False)
    assert target.me(key) == 200


def test_logged_out(target):
    """A token that is logged out has to be replaced by signing in."""
    jwt = target.login()
    assert target.call("POST", "/_logout", jwt).status_code == 200
    with pytest.raises(SignInRequiredError):
        target.refresh(jwt)


def test_url_with_slash(target):
    """A trailing slash changes nothing."""
    assert refresh_kuzzle_token(target.url + "/", target.login()).kuid == target.kuid


def test_unknown_strategy(target):
    """An unknown strategy is refused with the jwt in the message: it is not in ours, and stays refreshable."""
    jwt = target.login()
    assert jwt in target.refresh_raw(jwt, "?strategy=nope").json()["error"]["message"]
    with pytest.raises(RequestRefusedError) as caught:
        target.refresh(jwt, strategy="nope")
    assert caught.value.spent is False
    assert jwt not in str(caught.value)
    assert target.refresh(jwt, strategy="local", trigger_events=True).kuid == target.kuid


TIMESPANS = """
    2h|2 hours|2H|2  h|1.5h|.5h|01h|90s|30m|1d|1 day|3 DAYS|1w|2 weeks|1y|1 yr|2 yrs|2 years|100y
    7200000|7200000ms|7200000 milliseconds|1500 msecs|1500 msec|1000|1500 millisecond|3 min|3 mins
    3 minute|3 minutes|3 sec|3 secs|3 second|3 seconds|2 hr|2 hrs|1 hour|4.35s|1 week|1 year
    -1|-1ms|-1.0|-.001s|-1 ms|9007199254740991|9007199254740993|9100000000000000000
    0|-0|garbage|null|undefined|Infinity|NaN|1e3|PT2H|1mo|1.h|1..h|+2h|2h30m|2 h m|--2h|h|.|-|2,5h
    -2h|-5000|-1s|-1y|-0.0005s|500|999ms|0.5|1.00015s|1.001s|999.9999|99999999999999999999
    9223372036854775807|293000000y|1\u017f|\u0661h|2\u00a0h
"""
TIMESPANS = [text.strip() for text in TIMESPANS.replace("\n", "|").split("|") if text.strip()]
TIMESPANS += [
    "",
    " 2h",
    "2h ",
    "2\th",
    "2h\n",
    "1" + "0" * 96 + "ms",
    "0" * 96 + "2h",
    "0" * 98 + "2hh",
    "0" * 99 + "2h",
]


@pytest.mark.parametrize("timespan", TIMESPANS)
def test_expires_in(target, timespan):
    """We accept exactly the lifetimes that Kuzzle grants and that leave the session alive."""
    jwt = target.login()
    answer = target.refresh_raw(jwt, "?expiresIn=" + quote(timespan)).json()
    result = answer["result"] or {}
    granted = "ttl" in result and (result["ttl"] == -1 or result["ttl"] >= 1000)
    try:
        token = target.refresh(target.login(), expires_in=timespan)
    except InvalidArgumentError:
        assert not granted
    else:
        assert granted
        assert result["ttl"] == milliseconds(timespan)
        assert token.to_dict()["ttl"] in (-1, int(milliseconds(timespan)), 86399999999999999)
    if answer["status"] != 200:
        assert target.refresh(jwt).kuid == target.kuid, "a refusal spends nothing"


@pytest.mark.parametrize(
    ("timespan", "lost"),
    [
        pytest.param("8500000000000000", False, id="the last dates of JavaScript"),
        pytest.param("8640000000000000", True, id="beyond them"),
        pytest.param("-1", True, id="for ever"),
    ],
)
def test_expires_in_of_cookies(target, timespan, lost):
    """In cookie mode, a lifetime that cannot be written as a cookie's date loses the session: we refuse it."""
    jwt = target.login()
    raw = target.refresh_raw(jwt, f"?expiresIn={timespan}&cookieAuth")
    assert ("1969" in raw.headers.get("Set-Cookie", "1969")) == lost
    assert target.refresh_raw(jwt).status_code == 401
    session = requests.Session()
    if lost:
        with pytest.raises(InvalidArgumentError):
            target.refresh(target.login(), expires_in=timespan, cookie_auth=True, session=session)
    else:
        assert target.refresh(target.login(), expires_in=timespan, cookie_auth=True, session=session).jwt is None


@pytest.mark.parametrize(
    ("query", "options", "expected"),
    [
        pytest.param("", {"jwt": None}, (401, "security.rights.unauthorized"), id="no token"),
        pytest.param("", {"jwt": " "}, (401, "security.rights.unauthorized"), id="an empty token"),
        pytest.param("", {"jwt": "garbage"}, (401, "security.token.invalid"), id="garbage"),
        pytest.param("?expiresIn=", {}, (500, "plugin.runtime.unexpected_error"), id="an empty lifetime"),
        pytest.param("?expiresIn=2h&expiresIn=3h", {}, (400, "api.assert.invalid_argument"), id="two lifetimes"),
        pytest.param("?body=x", {}, (400, None), id="body in the query"),
        pytest.param("?volatile=x", {}, (400, None), id="volatile in the query"),
        pytest.param(
            "",
            {"headers": {"X-Kuzzle-Volatile": "x"}},
            (400, "network.http.volatile_parse_failed"),
            id="volatile that is no JSON",
        ),
        pytest.param(
            "",
            {"data": b"x", "headers": {"Content-Type": "application/json"}},
            (400, "network.http.body_parse_failed"),
            id="a body that is no JSON",
        ),
        pytest.param(
            "",
            {"data": b"x", "headers": {"Content-Type": "text/plain"}},
            (400, "network.http.unsupported_content"),
            id="a body of another type",
        ),
        pytest.param(
            "",
            {"data": b"{}", "headers": {"Content-Type": "application/json; charset=latin1"}},
            (400, "network.http.unsupported_charset"),
            id="a body of another charset",
        ),
        pytest.param(
            "",
            {"data": b"{}", "headers": {"Content-Type": "application/json", "Content-Encoding": "br"}},
            (400, "network.http.unsupported_compression"),
            id="a body packed in another way",
        ),
        pytest.param(
            "",
            {"data": b'"' + b"x" * (2**20 - 2) + b'"', "headers": {"Content-Type": "application/json"}},
            (400, None),
            id="a body of 1 MB",
        ),
        pytest.param(
            "",
            {"data": b'"' + b"x" * (2**20 - 1) + b'"', "headers": {"Content-Type": "application/json"}},
            (413, "network.http.request_too_large"),
            id="a larger body",
        ),
        pytest.param(
            "",
            {"headers": {"Content-Type": "text/plain"}},
            (400, "network.http.unsupported_content"),
            id="another type, and no body",
        ),
        pytest.param(
            "",
            {"data": b"x", "headers": {"Content-Encoding": "gzip"}},
            (400, "network.http.unexpected_error"),
            id="a body that is not packed as it says",
        ),
        pytest.param(
            "",
            {"data": b"{}", "headers": {"Content-Encoding": ",".join(["identity"] * 4)}},
            (400, "network.http.too_many_encodings"),
            id="a body packed four times",
        ),
        pytest.param("?jwt=a&jwt=b", {"jwt": None}, (400, None), id="two tokens in the query"),
        pytest.param("?requestId=a&requestId=b", {}, (400, None), id="two request ids in the query"),
        pytest.param("?action=a&action=b", {}, (400, None), id="two actions in the query"),
        pytest.param("?action=nope", {}, (404, "api.process.action_not_found"), id="unknown action"),
        pytest.param("?controller=nope", {}, (404, "api.process.controller_not_found"), id="unknown controller"),
        pytest.param("?action=login", {}, (400, "api.assert.missing_argument"), id="login without a strategy"),
        pytest.param(
            "?action=login&strategy=local&strategy=local",
            {},
            (400, "api.assert.invalid_type"),
            id="login with two strategies",
        ),
        pytest.param(
            "?strategy=local&strategy=local", {}, (401, "security.token.refresh_forbidden"), id="two strategies"
        ),
        pytest.param("", {"headers": {"X-Kuzzle-Volatile": "[]"}}, (400, None), id="volatile that is no object"),
        pytest.param(
            "",
            {"headers": {"X-Kuzzle-Volatile": '{"sdkVersion": "6"}'}},
            (400, "api.process.incompatible_sdk_version"),
            id="a client of version 1",
        ),
        pytest.param(
            "",
            {"headers": {"X-Kuzzle-Volatile": '{"sdkName": "js@6.2.3"}'}},
            (400, "api.process.incompatible_sdk_version"),
            id="an old client",
        ),
        pytest.param(
            "",
            {"headers": {"Cookie": "authToken=x"}},
            (500, "security.token.verification_error"),
            id="token and cookie",
        ),
    ],
)
def test_errors(target, query, options, expected):
    """The ids and statuses of what can be wrong with a request, and it spends nothing."""
    jwt = target.login()
    response = target.refresh_raw(**{"jwt": jwt, "query": query, **options})
    error = error_of(response)
    assert (response.status_code, error.get("id")) == expected
    assert error["status"] == response.status_code
    assert isinstance(error["message"], str)
    assert target.refresh(jwt).kuid == target.kuid


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        pytest.param("POST", "/nope", (404, "network.http.url_not_found"), id="unknown URL"),
        pytest.param("GET", "/_refreshToken", (404, "network.http.url_not_found"), id="GET"),
        pytest.param("POST", "/_login/nope", (400, "security.credentials.unknown_strategy"), id="login strategy"),
        pytest.param("POST", "/_login/local", (401, "plugin.strategy.missing_user"), id="login without a word"),
        pytest.param("POST", "/_logout", (401, "security.rights.unauthorized"), id="logout of nobody"),
        pytest.param("POST", "/_refreshToken//", (404, "network.http.url_not_found"), id="two slashes at the end"),
        pytest.param("POST", "/_login", (404, "network.http.url_not_found"), id="login without a strategy"),
        pytest.param("PATCH", "/_refreshToken", (404, "network.http.url_not_found"), id="PATCH"),
        pytest.param("PURGE", "/_refreshToken", (400, "network.http.unsupported_verb"), id="PURGE"),
        pytest.param("POST", "/api-keys/_create", (400, "api.assert.body_required"), id="an API key for nothing"),
    ],
)
def test_other_errors(target, method, path, expected):
    """The ids and statuses of errors around the refresh."""
    response = target.call(method, path)
    assert (response.status_code, error_of(response)["id"]) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        *[(body, 200) for body in ("0", "false", '""', "null", "[]", "[1]", "{}", " {} ", '{"length": 0}')],
        *[(body, 400) for body in ("5", "true", '"x"', "1e999")],
    ],
)
def test_json_that_is_no_object(target, body, expected):
    """What JavaScript takes for nothing counts as no body, and what is no array or object is refused."""
    response = target.refresh_raw(target.login(), data=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, "requestId" in response.json()) == (expected, True)


@pytest.mark.parametrize("body", ["{", "NaN", "[]x", "\ufeff{}", '{"a": 1,}'])
def test_no_json(target, body):
    """JSON is read strictly."""
    response = target.refresh_raw(target.login(), data=body.encode(), headers={"Content-Type": "application/json"})
    assert error_of(response)["id"] == "network.http.body_parse_failed"


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("GZIP", gzip.compress),
        ("deflate, gzip", lambda body: gzip.compress(zlib.compress(body))),
        ("identity", bytes),
    ],
)
def test_packed_body(target, encoding, pack):
    """A body may be packed, several times too."""
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    response = target.call("POST", "/_checkToken", data=pack(b'{"token": "x"}'), headers=headers)
    assert response.json()["result"] == {"state": "Invalid token.", "valid": False}


def test_packing_of_nothing(target):
    """Without a body it doesn't matter how it is packed."""
    assert target.refresh_raw(target.login(), headers={"Content-Encoding": "br"}).status_code == 200


@pytest.mark.parametrize(
    ("accepted", "packing"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip", "gzip"),
        ("gzip;q=0.1, deflate;q=0.5", "deflate"),
        ("gzip;q=x", "identity"),
        ("br", "identity"),
        ("", "identity"),
    ],
)
def test_packed_answer(target, accepted, packing):
    """An answer is packed as the client prefers it."""
    response = target.call("GET", "/_me", headers={"Accept-Encoding": accepted})
    assert response.headers["Content-Encoding"] == packing
    assert response.json()["result"]["_id"] == "-1"


def test_options(target):
    """OPTIONS is answered on any path, whoever asks."""
    response = target.call("OPTIONS", "/nope", "garbage", headers={"Origin": "http://localhost"})
    assert (response.status_code, response.json()["result"]) == (200, {})
    assert response.headers["Access-Control-Allow-Origin"] == "http://localhost"
    assert "PATCH" in response.headers["Access-Control-Allow-Methods"]


def test_bare_error_across_origins(target):
    """An error that is found before routing may be read from anywhere."""
    headers = {"Content-Type": "text/plain", "Origin": "http://localhost"}
    response = target.call("POST", "/_refreshToken", headers=headers)
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert "requestId" not in response.json()


def test_other_action(target):
    """The query can name another action than the path does."""
    jwt = target.login()
    assert target.refresh_raw(jwt, "?action=getCurrentUser").json()["result"]["_id"] == target.kuid
    assert target.refresh_raw(jwt).status_code == 200


def test_envelope(target):
    """An answer's members and headers."""
    request_id = "0b8af4c5-6a3b-4bb2-90f6-0a7a56d3ba6f"
    headers = {"X-Kuzzle-Request-Id": request_id, "X-Kuzzle-Volatile": '{"a": 1}', "Origin": "http://localhost"}
    response = target.refresh_raw(target.login(), headers=headers)
    body = response.json()
    result = body.pop("result")
    assert set(result) == {"_id", "expiresAt", "jwt", "ttl"}
    assert body == {
        "action": "refreshToken",
        "controller": "auth",
        "error": None,
        "headers": {},
        "requestId": request_id,
        "status": 200,
        "volatile": {"a": 1},
    }
    wanted = {
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Allow-Origin": "http://localhost",
        "Connection": "close",
        "Content-Encoding": "gzip",
        "Content-Type": "application/json",
        "Vary": "Origin",
        "X-Kuzzle-Node": "undefined",
        "X-Kuzzle-Request-Id": request_id,
    }
    assert {name: response.headers.get(name) for name in wanted} == wanted
    assert response.reason == ""


def test_envelope_repeats_arguments(target):
    """Some arguments come back, and one sets the answer out for people."""
    response = target.refresh_raw(target.login(), "?index=i&collection=c&pretty")
    body = response.json()
    assert (body["index"], body["collection"]) == ("i", "c")
    assert response.text.startswith('{\n  "')


def test_where_the_token_may_be(target):
    """Kuzzle reads the token with any case of Bearer and in the query, on a path with any slashes."""
    assert target.call("POST", "//_refreshToken/", target.login()).status_code == 200
    lower = {"Authorization": f"bearer {target.login()}"}
    assert target.call("POST", "/_refreshToken", headers=lower).status_code == 200
    assert target.call("POST", f"/_refreshToken?jwt={target.login()}").status_code == 200
    assert target.call("POST", "/%5FrefreshToken?jwt=x", target.login()).status_code == 200


def test_where_the_token_may_not_be(target):
    """An empty token in the query is garbage; one without its scheme, or of another one, is none."""
    assert target.call("GET", "/_me?jwt=").status_code == 401
    for header in ("Basic x", "Bearer", "x"):
        result = target.call("GET", "/_me", headers={"Authorization": header}).json()["result"]
        assert result["_id"] == "-1"


def test_nobody(target):
    """Without a token one is the anonymous user, whom Kuzzle finds valid."""
    assert target.call("GET", "/users/_me").json()["result"]["_id"] == "-1"
    check = target.call("POST", "/_checkToken", json={}).json()["result"]
    assert check == {"expiresAt": None, "kuid": "-1", "valid": True}


@pytest.mark.parametrize(
    ("query", "bearer", "cookie", "body", "expected"),
    [
        pytest.param("", None, None, "good", True, id="a good token"),
        pytest.param("", None, None, "garbage", False, id="garbage"),
        pytest.param("", None, None, "", True, id="nobody's"),
        pytest.param("", "garbage", None, "good", "security.token.invalid", id="whoever asks is stale"),
        pytest.param("", "good", "good", "good", "security.token.verification_error", id="token and cookie"),
        pytest.param("", None, None, None, "api.assert.invalid_type", id="null"),
        pytest.param("", None, None, 5, "api.assert.invalid_type", id="a number"),
        pytest.param("", None, "good", "garbage", True, id="a cookie is checked instead"),
        pytest.param("", None, "garbage", "good", "security.token.invalid", id="a stale cookie asks"),
        pytest.param("?cookieAuth", None, "good", "garbage", True, id="cookie mode"),
        pytest.param("?cookieAuth", None, "garbage", "good", False, id="cookie mode, garbage"),
        pytest.param("?cookieAuth", "good", None, "garbage", True, id="cookie mode, and the token asks"),
        pytest.param("?cookieAuth", "garbage", None, "good", "security.token.invalid", id="and is stale"),
        pytest.param("?cookieAuth", None, None, "garbage", True, id="cookie mode without a cookie"),
    ],
)
def test_check_token(target, query, bearer, cookie, body, expected):
    """The token in the body is checked; in cookie mode the one that asks."""
    token = {"good": target.login()}
    headers = {} if cookie is None else {"Cookie": f"authToken={token.get(cookie, cookie)}"}
    response = target.call(
        "POST",
        "/_checkToken" + query,
        token.get(bearer, bearer),
        headers=headers,
        json={"token": token.get(body, body)},
    )
    answer = response.json()
    assert (answer["error"]["id"] if answer["error"] else answer["result"]["valid"]) == expected
    statuses = {"security.token.verification_error": 500, "security.token.invalid": 401}
    assert response.status_code == (200 if answer["error"] is None else statuses.get(expected, 400))


def test_login_with_a_stale_token(target):
    """A sign-in that carries a dead token is refused; in the query it works with GET too."""
    assert target.call("POST", "/_login/local", "garbage", json=target.credentials).status_code == 401
    assert target.call("GET", "/_login/local", params=target.credentials).status_code == 200


@pytest.mark.parametrize(
    ("query", "cookie", "status"),
    [
        pytest.param("?cookieAuth", "garbage", 200, id="a stale cookie in cookie mode"),
        pytest.param("", "garbage", 401, id="a stale cookie"),
        pytest.param("", None, 200, id="a good cookie"),
    ],
)
def test_login_with_a_cookie(target, query, cookie, status):
    """A stale cookie does not keep its user from signing in, in cookie mode. The answer is a cookie again."""
    headers = {"Cookie": f"authToken={cookie or target.login()}"}
    response = target.call("POST", "/_login/local" + query, headers=headers, json=target.credentials)
    assert response.status_code == status
    assert response.headers.get("Set-Cookie", "").startswith("authToken=kauth-") == (status == 200)


def test_login_as_a_form(target):
    """Credentials may come as a form of either kind, or half in the body and half in the query."""
    fields = {name: (None, value) for name, value in target.credentials.items()}
    for options in ({"data": target.credentials}, {"files": fields}):
        assert target.call("POST", "/_login/local", **options).json()["result"]["_id"] == target.kuid
    username, password = ({name: value} for name, value in target.credentials.items())
    assert target.call("POST", "/_login/local", data=username, params=password).status_code == 200
    fields["username"] = ("file.txt", target.credentials["username"])
    assert target.call("POST", "/_login/local", files=fields).status_code == 401


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"password": "wrong"}, (401, "plugin.strategy.missing_user")),
        ({"username": "nobody"}, (401, "plugin.strategy.missing_user")),
        ({"username": 5}, (401, "plugin.strategy.missing_user")),
        ({"username": {}}, (401, "plugin.strategy.missing_user")),
        ({"password": [""]}, (401, "plugin.strategy.missing_user")),
        ({"password": 5}, (500, "plugin.runtime.unexpected_error")),
    ],
)
def test_wrong_credentials(target, changes, expected):
    """The ids and statuses of what can be wrong with a sign-in."""
    response = target.call("POST", "/_login/local", json={**target.credentials, **changes})
    assert (response.status_code, response.json()["error"]["id"]) == expected


def test_lifetime_of_a_login(target):
    """An empty lifetime is none at a sign-in; a wrong one is found after the password."""
    ask = {"method": "POST", "json": target.credentials}
    assert target.call(path="/_login/local?expiresIn=", **ask).json()["result"]["ttl"] == 3_600_000
    response = target.call(path="/_login/local?expiresIn=x", **ask)
    assert (response.status_code, response.json()["error"]["id"]) == (400, "api.assert.invalid_argument")
    assert target.call("POST", "/_login/local?expiresIn=x").status_code == 401


@pytest.mark.parametrize(
    ("body", "error"),
    [({}, "api.assert.missing_argument"), ({"description": 5}, "api.assert.invalid_type")],
)
def test_wrong_api_key(target, body, error):
    """An API key needs a description."""
    response = target.call("POST", "/api-keys/_create", target.login(), json=body)
    assert (response.status_code, response.json()["error"]["id"]) == (400, error)


def test_api_key_that_expires(target, make_api_key):
    """An API key may have a lifetime."""
    key = make_api_key("&expiresIn=1s")
    assert key["ttl"] == 1000
    target.wait(1.1)
    assert target.me(key["token"]) == 401


def raw_exchange(url, *requests_):
    """Send bytes and read what comes, on one connection."""
    parts = urlsplit(url)
    answers = []
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as peer:
        for request in requests_:
            peer.sendall(request)
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.partition(b"\r\n\r\n")[2]:
                part = peer.recv(65536)
                assert part, "the connection was closed"
                answer += part
            answers.append(answer)
    return answers


def test_head(target):
    """HEAD is for the root alone, and its answer has a body, which HTTP forbids."""
    assert target.call("HEAD", "/").status_code == 200
    (answer,) = raw_exchange(target.url, b"HEAD /_me HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"network.http.url_not_found" in answer


def test_connection_is_closed(target):
    """A connection is closed for a client that asks for it."""
    parts = urlsplit(target.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as peer:
        peer.sendall(b"GET /_me HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := peer.recv(65536):  # to the end
            answer += part
    assert answer.startswith(b"HTTP/1.1 200")


def test_the_last_header_counts(target):
    """Of two headers of one name, the last counts."""
    lines = b"GET /_me HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nAuthorization: %s\r\n\r\n"
    bearers = (b"Bearer x", b"Basic x")
    (first,) = raw_exchange(target.url, lines % bearers)
    (second,) = raw_exchange(target.url, lines % bearers[::-1])
    assert (first[:12], second[:12]) == (b"HTTP/1.1 200", b"HTTP/1.1 401")


def head_of(size):
    head = b"GET /_me HTTP/1.1\r\nHost: x\r\nX: "
    return head + b"x" * (size - len(head) - 4) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(head_of(4096), b"200", id="4096 bytes of headers"),
        pytest.param(head_of(4097), b"431", id="4097 bytes of headers"),
    ],
)
def test_longest_headers(target, request_, status):
    """The request line and the headers may be 4096 bytes together."""
    (answer,) = raw_exchange(target.url, request_)
    assert answer.split()[1] == status


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(b"POST /_refreshToken HTTP/1.0\r\n\r\n", b"505", id="HTTP/1.0"),
        pytest.param(b"POST /_refreshToken HTTP/1.1\r\n\r\n", b"400", id="no Host"),
        pytest.param(
            b"POST /_refreshToken HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 5000 + b"\r\n\r\n",
            b"431",
            id="long headers",
        ),
    ],
)
def test_html(target, request_, status):
    """What the HTTP server finds fault with itself is answered in HTML."""
    (answer,) = raw_exchange(target.url, request_)
    assert answer.split()[1] == status
    assert b"<i>uWebSockets/20 Server</i>" in answer


def test_long_token(target):
    """A token that does not fit into the headers is refused, and our error says so."""
    with pytest.raises(RequestRefusedError) as caught:
        target.refresh("kauth-" + "x" * 5000)
    assert (caught.value.status, caught.value.spent) == (431, False)


def test_connection_stays_open(target):
    """Kuzzle says Connection: close and goes on serving."""
    request = b"POST /_checkToken HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    first, second = raw_exchange(target.url, request, request)
    assert b"Connection: close" in first
    assert b'"valid"' in second.replace(b" ", b"")


def test_cookie_mode(target):
    """In cookie mode the new token lands in the session's jar, first from the jwt and then from the cookie."""
    old, session = target.login(), requests.Session()
    token = target.refresh(old, cookie_auth=True, session=session)
    assert (token.kuid, token.jwt) == (target.kuid, None)
    first = session.cookies["authToken"]
    assert token.expires_at == datetime.fromtimestamp(claims(first).exp, UTC)
    assert target.me(first) == 200
    target.refresh(None, cookie_auth=True, session=session, expires_in="3h")
    second = session.cookies["authToken"]
    assert first not in (old, second)
    assert [cookie.name for cookie in session.cookies] == ["authToken"]
    target.wait(1.2)
    assert (target.me(old), target.me(first), target.me(second)) == (401, 401, 200)
    assert session.get(target.url + "/_me", timeout=10).json()["result"]["_id"] == target.kuid


@pytest.mark.parametrize("flag", ["cookieAuth", "cookieAuth=1", "cookieAuth=true", "cookieAuth=false"])
def test_cookie_flag(target, flag):
    """The flag is on by being there, whatever it says."""
    response = target.refresh_raw(target.login(), "?" + flag)
    assert "jwt" not in response.json()["result"]
    assert response.headers["Set-Cookie"].startswith("authToken=kauth-")
    assert response.headers["Set-Cookie"].endswith("; HttpOnly; SameSite=Strict")


def test_cookie_without_flag(target):
    """A cookie that authenticates is answered with a cookie, flag or not; authToken=null is none."""
    jwt = target.login()
    response = target.refresh_raw(None, headers={"Cookie": f"a=b; authToken={jwt}"})
    assert response.headers["Set-Cookie"].startswith("authToken=kauth-")
    assert target.refresh_raw(target.login(), headers={"Cookie": "authToken=null"}).json()["result"]["jwt"]


@pytest.mark.parametrize(
    ("cookie", "status"),
    [
        pytest.param("a=b; authToken = {jwt} ;c", 200, id="among others"),
        pytest.param("authToken={jwt}; authToken=x", 200, id="the first of two"),
        pytest.param("authToken; authToken={jwt}", 200, id="after a name alone"),
        pytest.param("authToken={percent}", 200, id="quoted with percent"),
        pytest.param('authToken="{jwt}"', 401, id="in quotes"),
        pytest.param("authToken={jwt}x", 401, id="garbage"),
    ],
)
def test_cookie_header(target, cookie, status):
    """How the cookie is found."""
    jwt = target.login()
    cookie = cookie.format(jwt=jwt, percent=jwt.replace("-", "%2D"))
    response = target.call("GET", "/_me", headers={"Cookie": cookie})
    assert response.status_code == status
    assert status == 401 or response.json()["result"]["_id"] == target.kuid


@pytest.mark.parametrize("cookie", ["null", "nul%6C", "", "null; authToken=x"])
def test_no_cookie(target, cookie):
    """Such a cookie counts as none."""
    response = target.call("GET", "/_me", headers={"Cookie": f"authToken={cookie}"})
    assert response.json()["result"]["_id"] == "-1"


@pytest.mark.parametrize(
    ("query", "bearer", "cookie", "status", "ended"),
    [
        pytest.param("", "good", None, 200, True, id="token"),
        pytest.param("", None, "good", 200, True, id="cookie"),
        pytest.param("", None, "garbage", 401, False, id="stale cookie"),
        pytest.param("?cookieAuth", None, None, 200, False, id="cookie mode, nobody"),
        pytest.param("?cookieAuth", None, "good", 200, False, id="cookie mode, cookie"),
        pytest.param("?cookieAuth", None, "garbage", 200, False, id="cookie mode, stale cookie"),
        pytest.param("?cookieAuth", "good", None, 200, True, id="cookie mode, token"),
        pytest.param("?cookieAuth", "garbage", None, 401, False, id="cookie mode, stale token"),
    ],
)
def test_logout(target, query, bearer, cookie, status, ended):
    """A sign-out always takes the cookie away. In cookie mode it leaves the cookie's token as it is."""
    jwt = target.login()
    token = {"good": jwt}
    headers = {} if cookie is None else {"Cookie": f"authToken={token.get(cookie, cookie)}"}
    response = target.call("POST", "/_logout" + query, token.get(bearer, bearer), headers=headers)
    assert response.status_code == status
    cleared = "authToken=null; Path=/; HttpOnly; SameSite=Strict" if status == 200 else None
    assert response.headers.get("Set-Cookie") == cleared
    assert target.me(jwt) == (401 if ended else 200)


def test_global_logout(target, make_api_key):
    """A sign-out may end all of a user's sessions. API keys stay good."""
    key = make_api_key()["token"]
    first, second = target.login(), target.login()
    assert target.call("POST", "/_logout?global", first).status_code == 200
    assert (target.me(first), target.me(second)) == (401, 401)
    assert target.me(key) == 200
