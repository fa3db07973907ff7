"""What the fakes do on request."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from email.message import Message
from urllib.parse import urlsplit

import attrs
import pytest
import requests

from refresher import SHARED_CACHE, KuzzleAuth, refresh_kuzzle_token, testing
from refresher.testing import Answer, Clock, FakeCircle, FakeKuzzle, Received
from refresher.testing.circle import ERRORS as CIRCLE_ERRORS
from refresher.testing.kuzzle import ERRORS as KUZZLE_ERRORS
from refresher.tokens import KuzzleToken, UserToken


@attrs.frozen
class Read:
    """What is in a good answer."""

    owner: str
    token: str | UserToken


class SignedIn:
    """Somebody who is signed in to a fake, and refreshes without our help."""

    def __init__(self, fake):
        self.fake = fake
        self.key = str(uuid.uuid4())
        if isinstance(fake, FakeKuzzle):
            self.status_of_refusal = 401
            self.token = self.jwt = fake.login()
            fake.clock.advance(1)
        else:
            self.status_of_refusal = 403
            self.pair = fake.sign_in()
            self.token = self.pair.refresh_token

    def refresh(self, **changes):
        """Send the request. For Circle it carries the same idempotency key each time."""
        if isinstance(self.fake, FakeKuzzle):
            options = {
                "url": self.fake.url + "/_refreshToken",
                "headers": {"Authorization": f"Bearer {self.jwt}"},
            }
        else:
            options = {
                "url": self.fake.url + "/v1/w3s/users/token/refresh",
                "headers": {
                    "Authorization": f"Bearer {self.fake.api_key}",
                    "X-User-Token": self.pair.user_token,
                },
                "json": {"idempotencyKey": self.key, "refreshToken": self.token, "deviceId": "device-1"},
            }
        return requests.post(**{**options, **changes}, timeout=10, allow_redirects=False)

    def read(self, response):
        body = response.json()
        if isinstance(self.fake, FakeKuzzle):
            return Read(body["result"]["_id"], body["result"]["jwt"])
        return Read(body["data"]["userID"], UserToken.from_dict(body["data"]))


@pytest.fixture(params=["kuzzle", "circle"])
def fake(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def user(fake):
    return SignedIn(fake)


def received(method, target, body=b"", **headers):
    message = Message()
    for name, value in {"Host": "fake", **headers}.items():
        message[name.replace("_", "-")] = value
    return Received(method, target, message, body)


# What may go wrong


def test_lose_next(user):
    """The token is spent and nobody has the new one."""
    user.fake.lose_next(2)
    for _ in range(2):
        with pytest.raises(requests.ConnectionError):
            user.refresh()
    assert len(user.fake.requests) == 2
    user.fake.assert_spent_once(user.token)


def test_reset_next(user):
    """The connection is reset, and nothing was done."""
    user.fake.reset_next()
    with pytest.raises(requests.ConnectionError, match="reset by peer"):
        user.refresh()
    assert user.fake.knows(user.read(user.refresh()).token)


def test_delay_next(user):
    """The answer comes, late."""
    user.fake.delay_next(0.2)
    start = time.monotonic()
    assert user.refresh().status_code == 200
    assert time.monotonic() - start >= 0.2


def test_drip_next(user):
    """The answer comes byte by byte."""
    user.fake.drip_next(0.0001)
    start = time.monotonic()
    assert user.refresh().json()
    assert time.monotonic() - start >= 0.02


def test_any_answer(fake):
    """Any answer can be ordered."""
    fake.next_answers.append(Answer(418, {"a": 1}, {"X-Mine": "1"}))
    response = requests.get(fake.url, timeout=10)
    assert (response.status_code, response.json(), response.headers["X-Mine"]) == (418, {"a": 1}, "1")


@pytest.mark.parametrize("id", KUZZLE_ERRORS)
def test_kuzzle_errors(kuzzle, id):
    """Kuzzle's errors can be ordered, in the shape that each has. They spend nothing."""
    user = SignedIn(kuzzle)
    kuzzle.fail_next(id)
    response = user.refresh()
    body = response.json()
    error = body.get("error", body)
    assert (response.status_code, error["code"], error["id"]) == (
        KUZZLE_ERRORS[id][0],
        KUZZLE_ERRORS[id][1],
        id,
    )
    assert body.get("action") == ("refreshToken" if "requestId" in body else None)
    assert user.refresh().status_code == 200


@pytest.mark.parametrize("code", CIRCLE_ERRORS)
def test_circle_errors(circle, code):
    """Circle's errors can be ordered. They spend nothing."""
    user = SignedIn(circle)
    circle.fail_next(code, times=2)
    for _ in range(2):
        response = user.refresh()
        assert (response.status_code, response.json()["code"]) == (CIRCLE_ERRORS[code][0], code)
    assert user.refresh().status_code == 200


def test_unknown_errors(kuzzle, circle):
    """An error that doesn't exist can't be ordered, and nothing is. One is told which there are."""
    with pytest.raises(ValueError, match=r"^no such id: 'no\.such\.error'\. There are: api\.assert\.body_required, "):
        kuzzle.fail_next("no.such.error")
    with pytest.raises(ValueError, match=r"^no such code: '155104'\. There are: -1, 2, "):
        circle.fail_next("155104")
    assert not kuzzle.next_answers
    assert not circle.next_answers


# Once means once


def test_spent_once(user):
    """A refreshed token was spent once. Refused requests, and an answer that comes again, count for nothing."""
    user.refresh()
    user.fake.assert_spent_once(user.token)
    user.refresh()
    user.fake.assert_spent_once(user.token)


def test_never_spent(user):
    """A token that nobody refreshed was not spent. It is not told which."""
    with pytest.raises(AssertionError, match=r"^<secret [0-9a-f]{8}> was never refreshed$") as caught:
        user.fake.assert_spent_once(user.token)
    assert user.token not in str(caught.value)


def test_spent_twice():
    """Circle may let a refresh token live on. Then it is told how often it was spent."""
    with FakeCircle(rotate=False) as circle:
        user = SignedIn(circle)
        for _ in range(3):
            body = user.refresh().json()
            user.key = str(uuid.uuid4())
            user.pair = attrs.evolve(user.pair, user_token=body["data"]["userToken"])
        assert "refreshToken" not in body["data"]
        with pytest.raises(AssertionError, match="was refreshed 3 times, not once"):
            circle.assert_spent_once(user.pair)


def test_spent_tokens(kuzzle, circle):
    """The token may be given as our calls give it."""
    user = SignedIn(kuzzle)
    token = KuzzleToken(kuid="foo", jwt=user.jwt, expires_at=None, ttl=None)
    user.refresh()
    kuzzle.assert_spent_once(token)
    with pytest.raises(ValueError, match="cookie mode"):
        kuzzle.assert_spent_once(attrs.evolve(token, jwt=None))
    user = SignedIn(circle)
    user.refresh()
    circle.assert_spent_once(user.pair)


def test_many_at_once(user):
    """Of many requests at once, one spends the token."""
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(user.refresh().status_code)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [200] + [401] * 7 if isinstance(user.fake, FakeKuzzle) else [200] * 8
    assert sorted(statuses) == expected
    user.fake.assert_spent_once(user.token)


# The server


def test_clock():
    """A clock stands still, or shows the time. It can be moved."""
    still, running = Clock(1000.0), Clock()
    still.advance(5)
    running.advance(-3600)
    assert still() == 1005.0
    assert running() == pytest.approx(time.time() - 3600, abs=5)


def test_received():
    """A request shows what it asks for, and in its repr no secret."""
    request = received("POST", "//a/b?x=1&flag&x=2#end", b'{"secret": "s3cr3t"}', Authorization="Bearer s3cr3t")
    assert (request.path, request.query) == ("//a/b", {"x": ["1", "2"], "flag": [""]})
    assert request.json() == {"secret": "s3cr3t"}
    assert received("POST", "/").json() == received("POST", "/", b"[1]").json() == {}
    assert "s3cr3t" not in repr(request)


def test_without_a_socket(fake):
    """Requests can be answered without a socket."""
    answer = fake.receive(received("GET", "/nope"))
    assert answer.status == 404
    assert answer.to_bytes().startswith(b"HTTP/1.1 404\r\n")
    assert answer.to_bytes(with_body=False).endswith(b"\r\n\r\n")
    assert fake.requests[-1].target == "/nope"


def test_stop_and_start(user):
    """A fake can be stopped and started, and knows what it knew."""
    url = user.fake.url
    user.fake.stop()
    user.fake.stop()
    with pytest.raises(requests.ConnectionError):
        user.refresh()
    user.fake.start()
    user.fake.start()
    assert user.fake.url == url
    assert user.refresh().status_code == 200


def test_stop_ends_connections(fake):
    """Stopping ends connections that are open."""
    with requests.Session() as session:
        assert session.get(fake.url, timeout=10).status_code == 404
        fake.stop()
        with pytest.raises(requests.ConnectionError):
            session.get(fake.url, timeout=10)


def exchange(url, data):
    """Send bytes, and read to the end of the connection."""
    parts = urlsplit(url)
    answer = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as peer:
        peer.sendall(data)
        while part := peer.recv(65536):
            answer += part
    return answer


def test_chunked(circle):
    """A body may come in chunks."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    exchange(circle.url, head + b'7\r\n{"a": 1\r\n1\r\n}\r\n0\r\n\r\n')
    assert circle.requests[-1].json() == {"a": 1}


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", id="chunk"),
        pytest.param(b"Content-Length: x\r\n\r\n", id="length"),
    ],
)
def test_body_without_an_end(fake, end):
    """A body of which nobody can tell how long it is, is refused."""
    answer = exchange(fake.url, b"POST / HTTP/1.1\r\nHost: x\r\n" + end)
    assert answer.startswith(b"HTTP/1.1 400")
    assert fake.requests == []


def test_no_http(fake, capfd):
    """What is no HTTP is refused, without a word on stderr."""
    assert b"400" in exchange(fake.url, b"one two three four\r\n\r\n")
    assert capfd.readouterr().err == ""


def test_continue(fake):
    """A client that waits for leave to send its body, gets it."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert exchange(fake.url, head + b"{}").startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404")


def test_head(circle):
    """An answer to HEAD has no body, unless Kuzzle gives it."""
    answer = exchange(circle.url, b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")
    assert answer.endswith(b"\r\n\r\n")


def ask_badly(fake, *answers):
    """Send requests to a fake that cannot answer them. What the first one met counts."""
    for answer in answers:
        fake.next_answers.append(answer)
        with pytest.raises(requests.ConnectionError):
            requests.get(fake.url, timeout=10)


def assert_told(capfd, name):
    """The thread that answered writes down what it met, soon after the client saw the end of its connection."""
    deadline = time.monotonic() + 5
    told = ""
    while name not in told and time.monotonic() < deadline:
        told += capfd.readouterr().err
    assert name in told


@pytest.mark.parametrize("kind", [FakeKuzzle, FakeCircle])
def test_a_fault_of_the_fake_is_told(kind, capfd):
    """What goes wrong within the fake itself, or in a test's own function, is not hidden."""
    fake = kind()
    with pytest.raises(ZeroDivisionError), fake:
        ask_badly(fake, lambda request: 1 / 0, None)
    with fake:
        requests.get(fake.url, timeout=10)
    assert_told(capfd, "ZeroDivisionError")


@pytest.mark.parametrize(
    "answer", [{"a": 1}, "text", None, lambda request: None], ids=["dict", "text", "None", "nothing"]
)
def test_what_is_no_answer(answer, capfd):
    """What no answer can be made of fails the test, not only the client."""
    with pytest.raises(TypeError, match=r"next_answers must hold Answers, bytes, or functions"), FakeKuzzle() as fake:
        ask_badly(fake, answer)


def test_test_that_fails_itself(capfd):
    """A function may call pytest.fail(), too. That is no Exception; no thread may die of it later on."""
    with pytest.raises(pytest.fail.Exception, match="no such request"), FakeKuzzle() as fake:
        ask_badly(fake, lambda request: pytest.fail("no such request"))
    assert_told(capfd, "Failed: no such request")


def test_failure_beside_another(capfd):
    """A test that fails by itself fails for that."""

    def fail(fake):
        ask_badly(fake, None)
        raise KeyError

    with pytest.raises(KeyError), FakeKuzzle() as fake:
        fail(fake)


def test_client_that_hangs_up(fake, capfd):
    """A client that hangs up before its answer is nobody's fault."""
    parts = urlsplit(fake.url)
    fake.next_answers.append(Answer(200, b"x" * 1000, pace=0.001))
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        peer.recv(1)
    assert requests.get(fake.url, timeout=10).status_code == 404
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_no_such_attribute():
    """The handler's methods are for HTTP's methods only."""
    handler = testing.server._Handler.__new__(testing.server._Handler)
    assert callable(handler.do_ANYTHING)
    with pytest.raises(AttributeError):
        handler.anything  # noqa: B018


# Kuzzle


def test_knows(kuzzle):
    """A token is known while it is good, and so is an API key."""
    jwt, key = kuzzle.login(expires_in="10s"), kuzzle.api_key()
    short = kuzzle.api_key(expires_in="20s")
    assert [kuzzle.knows(token) for token in (jwt, key, short, "garbage", None)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=60), cache=None)
    assert kuzzle.knows(jwt=token)
    with pytest.raises(ValueError, match="in cookie mode"):
        kuzzle.knows(attrs.evolve(token, jwt=None))
    kuzzle.clock.advance(10)
    assert [kuzzle.knows(token) for token in (jwt, key, short)] == [False, True, True]
    kuzzle.clock.advance(10)
    assert [kuzzle.knows(token) for token in (jwt, key, short)] == [False, True, False]


def test_grace(clock):
    """How long a refreshed token lives on can be chosen. 0 is for ever, as in Kuzzle."""
    for grace, later in ((5.0, False), (0.0, True)):
        with FakeKuzzle(clock=clock, grace=grace) as kuzzle:
            user = SignedIn(kuzzle)
            assert user.refresh().status_code == 200
            clock.advance(4.9)
            assert kuzzle.knows(user.jwt)
            clock.advance(0.2)
            assert kuzzle.knows(user.jwt) == later


@pytest.mark.parametrize(
    ("lifetime", "error"),
    [
        ("1h", None),
        ("61m", "security.token.ttl_exceeded"),
        ("-1", "security.token.ttl_exceeded"),
        ("-1h", None),
    ],
)
def test_max_ttl(clock, lifetime, error):
    """Lifetimes can be limited."""
    with FakeKuzzle(clock=clock, max_ttl=3_600_000) as kuzzle:
        user = SignedIn(kuzzle)
        body = user.refresh(params={"expiresIn": lifetime}).json()
        assert (body["error"] or {}).get("id") == error


@pytest.mark.parametrize(
    ("query", "cookie", "status"),
    [("", None, 200), ("?cookieAuth", None, 500), ("", "authToken=x", 500), ("", "a=b", 200)],
)
def test_without_cookies(clock, query, cookie, status):
    """Without cookie mode, the flag and the cookie are refused."""
    with FakeKuzzle(clock=clock, cookies=False) as kuzzle:
        jwt = kuzzle.login()
        headers = {"Authorization": f"Bearer {jwt}", **({"Cookie": cookie} if cookie else {})}
        response = requests.post(f"{kuzzle.url}/_checkToken{query}", headers=headers, timeout=10)
        assert response.status_code == status
        assert status == 200 or response.json()["error"]["id"] == "security.cookie.unsupported"
        response = requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {jwt}"}, timeout=10)
        assert (response.status_code, "Set-Cookie" in response.headers) == (200, False)


def test_strategies(clock):
    """A strategy may have its own say about the lifetime, or none, or none of that name."""
    with FakeKuzzle(clock=clock, strategies={"mine": lambda: "3h", "shy": lambda: None}) as kuzzle:
        seen = []
        for strategy in ("mine", "shy", "nope"):
            response = SignedIn(kuzzle).refresh(params={"strategy": strategy, "expiresIn": "30m"})
            seen.append((response.json()["result"] or {}).get("ttl"))
    assert seen == [10_800_000, 1_800_000, None]


def test_users(clock):
    """The users can be chosen."""
    with FakeKuzzle({"me": "secret"}, clock=clock) as kuzzle:
        url = f"{kuzzle.url}/_login/local"
        assert requests.post(url, json={"username": "me", "password": "secret"}, timeout=10).ok
        assert not requests.post(url, json={"username": "foo", "password": "bar"}, timeout=10).ok


def test_old_http(kuzzle):
    """A request without sockets may be of another version of HTTP, too."""
    request = attrs.evolve(received("GET", "/_me"), version="HTTP/1.0")
    answer = kuzzle.receive(request)
    assert (answer.status, answer.close) == (505, True)


def test_headers_of_an_sdk(kuzzle):
    """Kuzzle's clients are let in if they are new enough, and those that it doesn't know, always."""
    for name, status in (
        ("js@7.17.1", 200),
        ("js@10.0.0", 400),
        ("mine@0.1", 200),
        ("js", 200),
        ("php@3.9", 400),
    ):
        answer = kuzzle.receive(received("GET", "/_me", X_Kuzzle_Volatile=f'{{"sdkName": "{name}"}}'))
        assert answer.status == status, name


# Circle


def ask(circle, method, path, **options):
    headers = {"Authorization": f"Bearer {circle.api_key}", **options.pop("headers", {})}
    return requests.request(method, f"{circle.url}/v1/w3s/{path}", headers=headers, timeout=10, **options)


def test_user(circle):
    """FakeCircle tells who a user token belongs to, as long as it lives."""
    pair = circle.sign_in("user-2")
    headers = {"X-User-Token": pair.user_token}
    assert ask(circle, "GET", "user", headers=headers).json()["data"]["user"]["id"] == "user-2"
    circle.clock.advance(3600)
    assert ask(circle, "GET", "user", headers=headers).json()["code"] == 155104
    assert ask(circle, "GET", "user", headers={"X-User-Token": "opaque"}).json()["code"] == 155105
    assert ask(circle, "GET", "user", headers={"X-User-Token": "a.b.c"}).json()["code"] == 155103


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        pytest.param("0b8af4c5-6a3b-4bb2-90f6-0a7a56d3ba6f", True, id="UUID"),
        pytest.param("my-request", False, id="no UUID"),
        pytest.param(None, False, id="none"),
    ],
)
def test_request_id(circle, given, echoed):
    """A request id comes back if it is a UUID. Else Circle makes one."""
    headers = {"X-Request-Id": given} if given else {}
    answered = ask(circle, "GET", "user", headers=headers).headers["X-Request-Id"]
    assert uuid.UUID(answered)
    assert (answered == given) == echoed


def test_exchange_of_a_user_id(circle):
    """A user's id is exchanged for a user token, if there is such a user."""
    circle.sign_in("user-2")
    data = ask(circle, "POST", "users/token", json={"userId": "user-2"}).json()["data"]
    assert set(data) == {"userToken", "encryptionKey"}
    headers = {"X-User-Token": data["userToken"]}
    assert ask(circle, "GET", "user", headers=headers).json()["data"]["user"]["id"] == "user-2"
    assert ask(circle, "POST", "users/token", json={"userId": "nobody"}).json()["code"] == 155102


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"userId": 5}', b'{"userId": "me"}'])
def test_wrong_parameters(circle, body):
    """What is missing or malformed is named."""
    answer = ask(circle, "POST", "users/token", data=body).json()
    assert answer["code"] == 2
    assert [error["location"] for error in answer["errors"]] == ["userId"]


def test_wrong_api_key(circle):
    """Another API key is refused."""
    response = ask(circle, "GET", "user", headers={"Authorization": "Bearer x"})
    assert (response.status_code, response.json()["code"]) == (401, 401)


def test_refusals(circle):
    """A pair is refreshed by its own user, on its own device, and once; a key is for one request."""
    mine, other = circle.sign_in("user-1"), circle.sign_in("user-2")

    def refresh(key=None, user_token=mine.user_token, refresh_token=mine.refresh_token, device_id="device-1"):
        body = {
            "idempotencyKey": key or str(uuid.uuid4()),
            "refreshToken": refresh_token,
            "deviceId": device_id,
        }
        headers = {"X-User-Token": user_token}
        return ask(circle, "POST", "users/token/refresh", json=body, headers=headers).json().get("code")

    assert refresh(user_token=other.user_token) == 155103
    assert refresh(device_id="another") == 155137
    assert refresh(refresh_token="unknown") == 155102
    key = str(uuid.uuid4())
    assert (refresh(key), refresh(key)) == (None, None)
    assert refresh(key, device_id="another") == 156020
    assert refresh() == 155103, "the user token went with the pair"
    assert not circle.knows(mine)
    assert circle.knows(other)


# The package


def test_lazy_names():
    """What is imported when it's asked for is there, and what is not there is told as usual."""
    assert testing.__all__ == sorted(testing.__all__)
    assert set(testing.__all__) <= set(dir(testing))
    for name in testing.__all__:
        assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        testing.Nonsense  # noqa: B018


@pytest.mark.parametrize("name", ["", ".faults"])
def test_examples_run(name):
    """The examples in the documentation do what they say."""
    module = importlib.import_module("refresher.testing" + name)
    globs = {**vars(module), **{each: getattr(testing, each) for each in testing.__all__}}
    result = doctest.testmod(module, globs=globs)
    assert result.attempted
    assert not result.failed


def test_import_without_pytest():
    """The fakes need no pytest, and importing them is quick until one is used."""
    code = """
        import sys
        sys.modules["pytest"] = None
        import refresher.testing
        print("http.server" in sys.modules, end=" ")
        from refresher.testing import FakeKuzzle
        with FakeKuzzle() as fake:
            print(fake.knows(fake.login()))
    """
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    assert out.stdout == "False True\n"


def test_entry_point():
    """pytest finds the fixtures by itself."""
    (found,) = importlib.metadata.entry_points(group="pytest11", name="refresher")
    assert found.value == "refresher.testing.fixtures"


@pytest.mark.parametrize("clean", ["", ", clean_shared_cache"])
def test_fixtures(tmp_path, monkeypatch, clean):
    """They leave the shared cache alone, unless a test wants it clean. They import no fake early."""
    (tmp_path / "test_mine.py").write_text(
        textwrap.dedent("""
            import sys

            import pytest

            early = {"requests", "http.server"} & set(sys.modules)

            from refresher import SignInRequiredError, UnavailableError, refresh_kuzzle_token
            from refresher.testing import Answer

            seen = []


            def test_first(fake_kuzzle, fake_circle CLEAN):
                assert not early
                assert fake_circle.knows(fake_circle.sign_in())
                jwt = fake_kuzzle.login(ago=1800)
                for _ in range(2):
                    refresh_kuzzle_token(fake_kuzzle.url, jwt)
                assert len(fake_kuzzle.requests) == 1, "the second call was answered from the cache"
                seen.extend([fake_kuzzle, jwt])
                fake_kuzzle.next_answers.append(Answer(429, b"", {"Retry-After": "3600"}))
                with pytest.raises(UnavailableError):
                    refresh_kuzzle_token(fake_kuzzle.url, fake_kuzzle.login(ago=1800))


            def test_second():
                kuzzle, jwt = seen
                if not "CLEAN":
                    refresh_kuzzle_token(kuzzle.url, jwt)
                    assert len(kuzzle.requests) == 2
                    return
                with kuzzle, pytest.raises(SignInRequiredError):
                    refresh_kuzzle_token(kuzzle.url, jwt)
                assert len(kuzzle.requests) == 3
        """).replace("CLEAN", clean)
    )
    # Nor do other plugins, which pytest would find.
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    plugins = ["-p", "refresher.testing.fixtures", "-p", "no:cacheprovider"]
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr


def test_a_port_that_was_used_before():
    """A fake whose clock was wrong does not decide how old the tokens of the next one are, on the same port."""
    SHARED_CACHE.clear()
    with FakeKuzzle(clock=Clock(time.time() - 3600)) as kuzzle:
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=60))
        SHARED_CACHE.clear()  # as the fixtures do
        kuzzle.clock = Clock()
        auth = KuzzleAuth(kuzzle.url, kuzzle.login("foo", ago=3590))
        requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=9)
        assert [request.path for request in kuzzle.requests][1:] == ["/_refreshToken", "/_me"]
