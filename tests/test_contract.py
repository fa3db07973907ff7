"""What a real Kuzzle does, the fake does: the same assertions on both."""

from __future__ import annotations

import socket
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
from refresher._kuzzle import milliseconds
from refresher.tokens import claims

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
    assert token.expires_at == datetime.fromtimestamp(claims(token.jwt)["exp"], UTC)
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


def test_api_key(target):
    """An API key can't be refreshed, and stays good."""
    made = target.call("POST", "/api-keys/_create?refresh=wait_for", target.login(), json={"description": "x"})
    key = made.json()["result"]["_source"]["token"]
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
        assert (
            target.refresh(target.login(), expires_in=timespan, cookie_auth=True, session=session).jwt is None
        )


@pytest.mark.parametrize(
    ("query", "options", "expected"),
    [
        pytest.param("", {"jwt": None}, (401, "security.rights.unauthorized"), id="no token"),
        pytest.param("", {"jwt": " "}, (401, "security.rights.unauthorized"), id="an empty token"),
        pytest.param("", {"jwt": "garbage"}, (401, "security.token.invalid"), id="garbage"),
        pytest.param("?expiresIn=", {}, (500, "plugin.runtime.unexpected_error"), id="an empty lifetime"),
        pytest.param(
            "?expiresIn=2h&expiresIn=3h", {}, (400, "api.assert.invalid_argument"), id="two lifetimes"
        ),
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
            {"data": b'"' + b"x" * 1_100_000 + b'"', "headers": {"Content-Type": "application/json"}},
            (413, "network.http.request_too_large"),
            id="a large body",
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
        pytest.param(
            "POST", "/_login/nope", (400, "security.credentials.unknown_strategy"), id="login strategy"
        ),
        pytest.param("POST", "/_login/local", (401, "plugin.strategy.missing_user"), id="login without a word"),
        pytest.param("POST", "/_logout", (401, "security.rights.unauthorized"), id="logout of nobody"),
    ],
)
def test_other_errors(target, method, path, expected):
    """The ids and statuses of errors around the refresh."""
    response = target.call(method, path)
    assert (response.status_code, error_of(response)["id"]) == expected


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


def test_where_the_token_may_be(target):
    """Kuzzle reads the token with any case of Bearer and in the query, on a path with any slashes."""
    assert target.call("POST", "//_refreshToken/", target.login()).status_code == 200
    lower = {"Authorization": f"bearer {target.login()}"}
    assert target.call("POST", "/_refreshToken", headers=lower).status_code == 200
    assert target.call("POST", f"/_refreshToken?jwt={target.login()}").status_code == 200


def test_nobody(target):
    """Without a token one is the anonymous user, whom Kuzzle finds valid."""
    assert target.call("GET", "/users/_me").json()["result"]["_id"] == "-1"
    check = target.call("POST", "/_checkToken", json={}).json()["result"]
    assert check == {"expiresAt": None, "kuid": "-1", "valid": True}


def test_login_with_a_stale_token(target):
    """A sign-in that carries a dead token is refused; in the query it works with GET too."""
    assert target.call("POST", "/_login/local", "garbage", json=target.credentials).status_code == 401
    assert target.call("GET", "/_login/local", params=target.credentials).status_code == 200


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
    assert token.expires_at == datetime.fromtimestamp(claims(first)["exp"], UTC)
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


def test_cookie_logout(target):
    """A sign-out in cookie mode takes the cookie away, even of nobody, and leaves its token as it is."""
    response = target.call("POST", "/_logout?cookieAuth")
    assert response.headers["Set-Cookie"] == "authToken=null; Path=/; HttpOnly; SameSite=Strict"
    jwt = target.login()
    target.call("POST", "/_logout?cookieAuth", headers={"Cookie": f"authToken={jwt}"})
    assert target.me(jwt) == 200
    target.call("POST", "/_logout?cookieAuth", jwt)
    assert target.me(jwt) == 401
