"""KuzzleAuth and CircleAuth."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import time_machine
from cryptography.fernet import Fernet
from helpers import call_with, jwt_with
from hypothesis import example, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse
from urllib3.exceptions import LocationValueError
from urllib3.util import parse_url

from refresher import (
    SHARED_CACHE,
    CircleAuth,
    EncryptedStore,
    FileStore,
    InvalidArgumentError,
    KuzzleAuth,
    MemoryStore,
    OutcomeUnknownError,
    RefreshError,
    SignInRequiredError,
    TokenCache,
    UnavailableError,
    keep_alive,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher._runtime import Runtime
from refresher.testing import Answer, Clock, FakeCircle, FakeKuzzle

HOUR = 3600


@pytest.fixture
def clock():
    """A clock that goes on by itself: ours and theirs agree."""
    return Clock()


@pytest.fixture
def root(kuzzle):
    """A token that is good for another half hour."""
    return kuzzle.login("foo", ago=HOUR / 2)


@pytest.fixture
def pair(circle):
    return circle.sign_in()


def me(kuzzle, auth, **options):
    """Ask Kuzzle who I am."""
    return requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10, **options)


def kuid(response):
    return response.json()["result"]["_id"]


def sent(fake, path):
    """The requests for *path*."""
    return [request for request in fake.requests if request.path == path]


def refreshes(fake):
    paths = ("/_refreshToken", "/v1/w3s/users/token/refresh")
    return [request for request in fake.requests if request.path in paths]


def circle_auth(circle, pair, **changes):
    arguments = {"user_token": pair.user_token, "refresh_token": pair.refresh_token, "device_id": "device-1"}
    return CircleAuth(**{**arguments, "api_key": circle.api_key, "base_url": circle.url, **changes})


def user(circle, auth, **options):
    """Ask Circle who the user is."""
    return requests.get(f"{circle.url}/v1/w3s/user", auth=auth, timeout=10, **options)


# While a token lives


def test_a_living_token_is_used_as_it_is(kuzzle):
    """Right after the sign-in too: nothing is refreshed, and nobody waits."""
    jwt = kuzzle.login()
    auth = KuzzleAuth(kuzzle.url, jwt)
    assert [kuid(me(kuzzle, auth)) for _ in range(3)] == ["foo"] * 3
    assert auth.jwt == jwt
    assert refreshes(kuzzle) == []


def test_refreshed_in_time(kuzzle):
    """A token that is about to expire is refreshed before the request, with the arguments given, and once."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), expires_in="2h", strategy="local")
    assert [kuid(me(kuzzle, auth)) for _ in range(3)] == ["foo"] * 3
    (request,) = refreshes(kuzzle)
    assert request.query == {"expiresIn": ["2h"], "strategy": ["local"]}
    assert sent(kuzzle, "/_me")[0].headers["Authorization"] == f"Bearer {auth.jwt}"
    assert kuzzle.knows(auth.jwt)


def test_the_whole_day(kuzzle):
    """One object, a request a minute, a day: one exchange a lifetime, and no request is refused."""
    start = int(kuzzle.clock())
    with time_machine.travel(start, tick=False) as now:
        auth = KuzzleAuth(kuzzle.url, kuzzle.login(), cache=TokenCache(ahead=90))
        for minute in range(24 * 60):
            now.move_to(start + minute * 60)
            assert me(kuzzle, auth).status_code == 200
            assert kuid(me(kuzzle, auth)) == "foo"
    assert 24 <= len(refreshes(kuzzle)) <= 25


def test_downtime_while_the_token_lives(kuzzle, caplog):
    """In the window, a service that can't refresh costs no request."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 20), queuable=False)
    kuzzle.fail_next("services.cache.read_failed")
    assert kuid(me(kuzzle, auth)) == "foo"
    assert "going on with the old token" in caplog.text


def test_downtime_when_the_token_is_dead(kuzzle):
    """Then the failure is told, and the request is not sent."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR), queuable=False)
    kuzzle.fail_next("services.cache.read_failed")
    with pytest.raises(UnavailableError):
        me(kuzzle, auth)
    assert sent(kuzzle, "/_me") == []


@pytest.mark.parametrize("token", ["api key", "infinite"])
def test_tokens_without_end(kuzzle, token):
    """API keys and infinite tokens are sent as they are. If they are refused, no refresh would help."""
    jwt = kuzzle.api_key() if token == "api key" else kuzzle.login("foo", "-1")
    auth = KuzzleAuth(kuzzle.url, jwt)
    assert kuid(me(kuzzle, auth)) == "foo"
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(SignInRequiredError):
        me(kuzzle, auth)
    assert refreshes(kuzzle) == []


def test_a_clock_that_is_behind(kuzzle, monkeypatch):
    """By our clock a token has more time left than it has. The service's answers tell what time it is."""
    start, passed = int(kuzzle.clock()), [0]
    monkeypatch.setattr(time, "clock_gettime", lambda _: 1e6 + passed[0])
    with time_machine.travel(start, tick=False) as now:
        auth = KuzzleAuth(kuzzle.url, kuzzle.login())
        now.move_to(start - HOUR)
        kuzzle.clock.advance(HOUR)
        assert kuid(me(kuzzle, auth)) == "foo"
        now.move_to(start - 10)
        passed[0] += HOUR - 10
        assert kuid(me(kuzzle, auth)) == "foo"
    assert len(refreshes(kuzzle)) == 1


def test_a_clock_that_is_ahead(kuzzle):
    """By our clock a token is dead. It's refreshed, and no harm is done."""
    jwt = kuzzle.login(ago=120)
    with time_machine.travel(int(kuzzle.clock()) + 2 * HOUR, tick=False):
        kuzzle.clock.advance(-2 * HOUR)
        auth = KuzzleAuth(kuzzle.url, jwt)
        assert [kuid(me(kuzzle, auth)) for _ in range(3)] == ["foo"] * 3
    assert len(refreshes(kuzzle)) == 1


@pytest.mark.parametrize("kept", [False, True])
def test_an_answer_that_was_kept(kuzzle, root, kept):
    """What requests-cache gives again tells nothing of the time: it may be from long ago."""

    class Kept(HTTPAdapter):
        def send(self, *args, **options):
            response = super().send(*args, **options)
            response.from_cache = kept
            response.headers["Date"] = "Wed, 01 Jan 2020 00:00:00 GMT"
            return response

    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache(runtime=Runtime()))
    with requests.Session() as session:
        session.mount("http://", Kept())
        assert kuid(session.get(f"{kuzzle.url}/_me", auth=auth, timeout=5)) == "foo"
    earliest, _, _ = auth._cache._ledger.observed.service_now(auth._scope)
    assert (earliest == -math.inf) == kept


def test_an_answer_without_a_date(kuzzle, root):
    """It tells no time."""
    kuzzle.next_answers.append(Answer(200, {"result": {"_id": "foo"}}))
    assert kuid(me(kuzzle, KuzzleAuth(kuzzle.url, root))) == "foo"


# Signing in and out


def test_signing_in_and_out(kuzzle, root):
    """Without a token requests are anonymous; from when it's set they are the user's, till it's None."""
    auth = KuzzleAuth(kuzzle.url)
    assert auth.jwt is None
    assert kuid(me(kuzzle, auth)) == "-1"
    auth.jwt = root
    assert kuid(me(kuzzle, auth)) == "foo"
    auth.jwt = None
    assert kuid(me(kuzzle, auth)) == "-1"
    headers = [request.headers["Authorization"] for request in sent(kuzzle, "/_me")]
    assert headers == [None, f"Bearer {root}", None]


def test_signing_out_meanwhile(kuzzle):
    """Who signs out during a refresh stays signed out."""
    saved = []
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), on_refresh=saved.append)

    def answer(request):
        auth.jwt = None
        return kuzzle.truly(request)

    kuzzle.next_answers.append(answer)
    me(kuzzle, auth)
    assert auth.jwt is None
    assert saved == []
    kuzzle.next_answers.append(lambda request: setattr(auth, "jwt", None) or kuzzle.refuse(request, "refused"))
    auth.jwt = kuzzle.login(ago=60)
    assert me(kuzzle, auth).status_code == 401


def test_jwt_is_the_last_one(kuzzle, root):
    """What others have made of the token is read, too."""
    auth = KuzzleAuth(kuzzle.url, root)
    token = refresh_kuzzle_token(kuzzle.url, root)
    assert auth.jwt == token.jwt
    assert kuid(me(kuzzle, auth)) == "foo"
    assert len(refreshes(kuzzle)) == 1


# Saving


def authorization(kuzzle, auth):
    """What a request would carry."""
    request = requests.Request("GET", f"{kuzzle.url}/_me").prepare()
    return auth(request).headers.get("Authorization", "").removeprefix("Bearer ")


@pytest.mark.parametrize("make", [lambda _: MemoryStore(), FileStore], ids=["MemoryStore", "FileStore"])
@pytest.mark.parametrize("refreshed", [False, True])
def test_what_is_ready_is_not_stale(kuzzle, tmp_path, make, refreshed):
    """What this process did since counts at once, and half a second later what others did."""
    store = make(tmp_path)
    mine, theirs = TokenCache(store), TokenCache(store)
    jwt = kuzzle.login(ago=HOUR - 10 if refreshed else HOUR / 2)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=mine)
    for cache, lifetime, seconds in ((mine, "2h", 0), (theirs, "3h", 0.55)):
        before = [authorization(kuzzle, auth) for _ in range(3)][-1]
        after = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, expires_in=lifetime).jwt
        time.sleep(seconds)
        assert [authorization(kuzzle, auth) for _ in range(2)] == [after, after]
        assert after != before
        assert auth._cache._ledger.hit(auth._ready.call) is not None
    other = auth.jwt = kuzzle.login("other", ago=HOUR / 2)
    assert [authorization(kuzzle, auth) for _ in range(2)] == [other, other]
    auth.jwt = None
    assert authorization(kuzzle, auth) == ""
    auth.jwt = jwt
    assert authorization(kuzzle, auth) == after
    mine.forget(kuzzle.url, jwt)
    assert auth._cache._ledger.hit(auth._ready.call) is None


def test_what_is_ready_expires(kuzzle, root):
    """It does so by the wall clock, too: it may have been set, or frozen for a test."""
    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache())
    assert [authorization(kuzzle, auth) for _ in range(2)] == [root, root]
    with time_machine.travel(time.time() + HOUR / 2 - 5):
        assert authorization(kuzzle, auth) != root


def test_what_is_ready_when_a_clock_is_wrong(kuzzle, root):
    """It counts for half a second, if it turns out that the service's clock is another than was thought."""
    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache())
    assert [authorization(kuzzle, auth) for _ in range(2)] == [root, root]
    kuzzle.clock.advance(HOUR / 2 - 20)
    requests.get(kuzzle.url, auth=auth, timeout=10)
    time.sleep(0.55)
    assert authorization(kuzzle, auth) != root


@given(rest=st.text(max_size=20))
@example(rest="\\@elsewhere")
@example(rest="@elsewhere:80")
@example(rest="//elsewhere")
def test_what_is_ready_stays_at_home(rest):
    """Whatever follows the slash after host and port, requests connects to that host and port."""
    auth = KuzzleAuth("http://home:7512/base")
    assert auth._prefix == "http://home:7512/"
    with contextlib.suppress(ValueError):
        url = requests.Request("GET", auth._prefix + rest).prepare().url
        target = parse_url(url)
        assert (target.scheme, target.host, target.port) == ("http", "home", 7512)


class Asked(HTTPAdapter):
    """Asks the real adapter what it would connect to, and answers with a redirect, and then with nothing."""

    def __init__(self, location=None):
        super().__init__()
        self.location, self.went = location, []

    def send(self, request, **options):
        pool = self.get_connection_with_tls_context(request, True)
        self.went.append(((pool.scheme, pool.host, pool.port), "X-User-Token" in request.headers))
        status, headers = (302, {"Location": self.location}) if self.location else (200, {})
        self.location = None
        answer = HTTPResponse(io.BytesIO(), headers, status, preload_content=False)
        return self.build_response(request, answer)


def ask(url, location=None):
    """Send a request with a token. Return what requests would connect to, and whether the token went there."""
    adapter = Asked(location)
    with requests.Session() as session, contextlib.suppress(ValueError, requests.RequestException, LocationValueError):
        session.trust_env = False
        for scheme in ("http://", "https://"):
            session.mount(scheme, adapter)
        now = time.time()
        user_token = jwt_with({"iat": now, "exp": now + HOUR})
        tokens = {"user_token": user_token, "refresh_token": "r", "device_id": "d", "api_key": "k"}
        session.get(url, auth=CircleAuth(**tokens, base_url="https://home:7512/base"))
    return adapter.went


pieces = st.sampled_from([
    "http:", "https:", "HTTP:", "/", "//", "\\", "@", ":", "?", "#", "%5C", "%40", "%2F", ".", "..", ";", "[", "]", " ",
    "\t", "\x7f", "\xa0", "\u2028", "home", "HOME", "home:7512", "home%3A7512", "other", "other:7512", ":7512", ":80",
    "[::1]", "x", "base",
])  # fmt: skip
spellings = st.lists(pieces, max_size=9).map("".join)
starts = st.sampled_from(["", "https://home:7512", "https://home:7512/", "http://", "//", "/"])


@settings(max_examples=1500, deadline=None)
@given(start=starts, rest=spellings)
@example(start="https://home:7512", rest="\\@other/")
@example(start="", rest="////other/")
def test_the_token_stays_at_home(start, rest):
    """Whatever a URL or a redirect looks like, requests connects to our origin if the token goes along."""
    for went in (ask(start + rest), ask("https://home:7512/here", start + rest)):
        assert all(place == ("https", "home", 7512) for place, has_token in went if has_token), went
    assert [has_token for _, has_token in ask("https://home:7512/here", "/there")] == [True, True]


def test_on_refresh(kuzzle):
    """It gets each new token once, and before the request is sent."""
    saved = []
    auth = KuzzleAuth(
        kuzzle.url,
        kuzzle.login(ago=HOUR - 10),
        on_refresh=lambda token: saved.append((token, len(sent(kuzzle, "/_me")))),
    )
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: me(kuzzle, auth), range(64)))
    ((token, before),) = saved
    assert token.jwt == auth.jwt
    assert token.kuid == "foo"
    assert before < 16
    assert len(refreshes(kuzzle)) == 1


def test_on_refresh_raises(kuzzle):
    """The caller is told, the token is not lost, and the next request hands it over again."""
    saved = []

    def save(token):
        saved.append(token.jwt)
        if len(saved) == 1:
            raise ZeroDivisionError

    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), on_refresh=save)
    with pytest.raises(ZeroDivisionError):
        me(kuzzle, auth)
    assert kuzzle.knows(auth.jwt)
    assert [kuid(me(kuzzle, auth)) for _ in range(3)] == ["foo"] * 3
    assert saved == [auth.jwt] * 2
    assert len(refreshes(kuzzle)) == 1


def test_on_refresh_after_signing_out(kuzzle):
    """What could not be saved is not handed over any more when the user has signed out."""
    saved = []
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), on_refresh=lambda token: saved.append(1 / 0))
    with pytest.raises(ZeroDivisionError):
        me(kuzzle, auth)
    auth.jwt = kuzzle.login("foo", "2h")
    assert kuzzle.knows(auth.jwt)
    assert kuid(me(kuzzle, auth)) == "foo"


# When a token is refused


def refuse_after(kuzzle, meanwhile):
    """Let something happen between a request's departure and its answer."""

    def answer(request):
        meanwhile()
        return kuzzle.truly(request)

    kuzzle.next_answers.append(answer)


def test_successor_of_another_process(kuzzle, root, tmp_path):
    """The token is spent while the request is on its way: the successor is found, and the request repeated."""
    one, two = (TokenCache(FileStore(tmp_path / "store")) for _ in range(2))
    auth = KuzzleAuth(kuzzle.url, root, cache=one)

    def meanwhile():
        refresh_kuzzle_token(kuzzle.url, root, cache=two)
        kuzzle.clock.advance(2)

    refuse_after(kuzzle, meanwhile)
    response = me(kuzzle, auth)
    assert kuid(response) == "foo"
    assert [each.status_code for each in response.history] == [401]
    assert len(refreshes(kuzzle)) == 1
    assert len(sent(kuzzle, "/_me")) == 2


def test_request_of_a_former_user(kuzzle, root):
    """What somebody began who has signed out meanwhile is not sent again with the token of who has signed in."""
    auth = KuzzleAuth(kuzzle.url, root)

    def meanwhile():
        auth.sign_out()
        auth.jwt = kuzzle.login("bar")

    kuzzle.users["bar"] = "pass"
    refuse_after(kuzzle, meanwhile)
    response = me(kuzzle, auth)
    assert (response.status_code, response.history) == (401, [])
    assert kuid(me(kuzzle, auth)) == "bar"


@pytest.mark.parametrize(("user", "statuses"), [("foo", [401, 200]), ("bar", [401])])
def test_request_of_a_former_session(kuzzle, root, user, statuses):
    """It is sent again with the new token if that is the same user's."""
    kuzzle.users["bar"] = "pass"
    auth = KuzzleAuth(kuzzle.url, root)

    def meanwhile():
        requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {root}"}, timeout=10)
        auth.jwt = kuzzle.login(user)

    refuse_after(kuzzle, meanwhile)
    response = me(kuzzle, auth)
    assert [each.status_code for each in (*response.history, response)] == statuses


def test_session_has_ended(kuzzle, root):
    """Nothing leads on from here: sign in again. The service is asked once."""
    auth = KuzzleAuth(kuzzle.url, root)
    requests.post(f"{kuzzle.url}/_logout", auth=auth, timeout=10)
    for _ in range(3):
        with pytest.raises(SignInRequiredError) as caught:
            me(kuzzle, auth)
    assert caught.value.__context__ is None
    assert len(refreshes(kuzzle)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"error": {"id": "plugin.strategy.missing_user"}}, id="wrong password"),
        pytest.param({"error": {"id": "security.rights.unauthorized"}}, id="no rights"),
        pytest.param({"error": {"message": "not you", "status": 401}}, id="a plugin"),
    ],
)
def test_another_401(kuzzle, root, answer):
    """A 401 that another token would not help is the answer."""
    kuzzle.next_answers.append(Answer(401, {**answer, "status": 401}, {"Content-Type": "application/json"}))
    assert me(kuzzle, KuzzleAuth(kuzzle.url, root)).status_code == 401
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize("answer", [Answer(401), Answer(401, b"<h1>Who?</h1>"), Answer(401, b"[" * 99999)])
def test_a_401_that_does_not_tell(kuzzle, root, answer):
    """It could be the token: it's refreshed and the request repeated, once."""
    kuzzle.next_answers.append(answer)
    assert kuid(me(kuzzle, KuzzleAuth(kuzzle.url, root))) == "foo"
    assert len(refreshes(kuzzle)) == 1
    assert len(sent(kuzzle, "/_me")) == 2


@pytest.mark.parametrize("length", ["1048577", "many"])
def test_a_401_that_is_too_long(kuzzle, root, length):
    """An answer that is longer than any error isn't read."""
    kuzzle.next_answers.append(f"HTTP/1.1 401\r\nContent-Length: {length}\r\n\r\n".encode() + b" " * 1048577)
    response = me(kuzzle, KuzzleAuth(kuzzle.url, root), stream=True)
    assert response.status_code == (401 if length == "1048577" else 200)
    assert all(each.raw.closed for each in response.history)
    response.close()


def test_no_loop(kuzzle, root):
    """A service that refuses new tokens, too, gets one repetition and one refresh, not one for each request."""
    auth = KuzzleAuth(kuzzle.url, root)

    def refuse(request):
        return kuzzle.truly(request) if request.path == "/_refreshToken" else kuzzle.refuse(request, "refused")

    kuzzle.next_answers.extend([refuse] * 6)
    for _ in range(4):
        with pytest.raises(SignInRequiredError, match="the newest token that is known"):
            me(kuzzle, auth)
    assert len(refreshes(kuzzle)) == 1
    assert len(sent(kuzzle, "/_me")) == 5


def test_newer_token_that_is_refused_too(kuzzle, root):
    """The request is sent again for each newer token: another process may be refreshing them, too."""
    store = MemoryStore()
    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache(store))

    def spend(request):
        refresh_kuzzle_token(kuzzle.url, root, expires_in="2h", cache=TokenCache(store))
        return kuzzle.refuse(request, "refused")

    kuzzle.next_answers.extend([lambda request: kuzzle.refuse(request, "refused"), kuzzle.truly, spend])
    response = me(kuzzle, auth)
    assert [each.status_code for each in (*response.history, response)] == [401, 401, 200]
    assert len(refreshes(kuzzle)) == 2


def test_another_user_signs_in_while_a_request_is_repeated(kuzzle, root):
    """It is not sent once more, as that user's."""
    store, bob = MemoryStore(), kuzzle.login("bob", ago=HOUR / 2)
    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache(store))

    def refuse(request, jwt=None):
        if jwt:
            auth.jwt = jwt
        return kuzzle.refuse(request, "refused")

    kuzzle.next_answers.extend([refuse, kuzzle.truly, lambda request: refuse(request, bob)])
    with pytest.raises(SignInRequiredError):
        me(kuzzle, auth)
    assert len(sent(kuzzle, "/_me")) == 2
    assert kuid(me(kuzzle, auth)) == "bob"


def test_refused_while_there_is_an_entry_that_cannot_be_read(kuzzle, root):
    """It may have a newer token, so nobody is told to sign in, also if the token is new."""
    old, new = Fernet.generate_key(), Fernet.generate_key()
    mine, other = (TokenCache(EncryptedStore(store, keys)) for store in [MemoryStore()] for keys in ([old], [new, old]))
    auth = KuzzleAuth(kuzzle.url, root, cache=mine, timeout=1)
    refresh_kuzzle_token(kuzzle.url, root, cache=mine)
    token = refresh_kuzzle_token(kuzzle.url, root, expires_in="2h", cache=other)
    kuzzle.clock.advance(2)
    with pytest.raises(OutcomeUnknownError):
        me(kuzzle, auth)
    assert kuzzle.knows(token.jwt)


class Gated(MemoryStore):
    """Once, it is slow to answer when it has looked."""

    def __init__(self):
        super().__init__()
        self.gates = []

    def get(self, key):
        text = super().get(key)
        if self.gates and not key.endswith("-attempt"):
            self.gates.pop().wait(10)
        return text


def test_refused_while_another_call_looks(kuzzle, root):
    """What that has found is not the answer to one whose token was refused since."""
    store, gate = Gated(), threading.Event()
    cache = TokenCache(store, runtime=(runtime := Runtime()))
    cache._ledger.is_local = False
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    runtime.sleep(0.6)  # until the store is asked again
    store.gates.append(gate)

    def spend(request):
        refresh_kuzzle_token(kuzzle.url, root, expires_in="2h", cache=TokenCache(store))
        threading.Timer(0.3, gate.set).start()
        return kuzzle.refuse(request, "refused")

    kuzzle.next_answers.append(spend)
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache)
        assert kuid(me(kuzzle, KuzzleAuth(kuzzle.url, root, cache=cache))) == "foo"
        looking.result()
    assert len(refreshes(kuzzle)) == 2


def test_many_are_refused_at_once(kuzzle, root):
    """16 threads, one token that has died: one refresh, 16 answers."""
    auth = KuzzleAuth(kuzzle.url, root)
    barrier = threading.Barrier(16)

    def refuse(request):
        barrier.wait(10)
        return kuzzle.refuse(request, "refused")

    kuzzle.next_answers.extend([refuse] * 16)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: kuid(me(kuzzle, auth)), range(16))) == {"foo"}
    assert len(refreshes(kuzzle)) == 1


# What is repeated


BODIES = {
    "none": dict,
    "json": lambda: {"json": {"a": 1}},
    "form": lambda: {"data": {"a": "1"}},
    "text": lambda: {"data": "abc"},
    "bytes": lambda: {"data": b"abc"},
    "bytearray": lambda: {"data": bytearray(b"abc")},
    "memoryview": lambda: {"data": memoryview(b"abc")},
    "upload": lambda: {"files": {"a": io.BytesIO(b"abc")}},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_body_is_repeated(kuzzle, root, body):
    """What was sent is sent again, unchanged."""
    kuzzle.fail_next("security.token.invalid")
    requests.post(f"{kuzzle.url}/anything", auth=KuzzleAuth(kuzzle.url, root), timeout=10, **body())
    first, second = sent(kuzzle, "/anything")
    assert first.body == second.body
    assert first.headers["Content-Type"] == second.headers["Content-Type"]
    assert first.headers["Authorization"] != second.headers["Authorization"]


def test_file_is_read_from_where_it_was(kuzzle, root):
    """A file that can be rewound is sent again from where it stood."""
    file = io.BytesIO(b"0123456789")
    file.read(4)
    kuzzle.fail_next("security.token.invalid")
    requests.post(f"{kuzzle.url}/anything", auth=KuzzleAuth(kuzzle.url, root), data=file, timeout=10)
    assert [request.body for request in sent(kuzzle, "/anything")] == [b"456789"] * 2


def test_one_shot_body(kuzzle, root):
    """What can be read only once is not sent again, nor half of it. The next request has the new token."""
    auth = KuzzleAuth(kuzzle.url, root)
    kuzzle.fail_next("security.token.invalid")
    once = (part for part in (b"abc", b"def"))
    response = requests.post(f"{kuzzle.url}/anything", auth=auth, data=once, timeout=10)
    assert response.status_code == 401
    assert [request.body for request in sent(kuzzle, "/anything")] == [b"abcdef"]
    assert auth.jwt != root
    assert kuid(me(kuzzle, auth)) == "foo"


def test_streamed_answer(kuzzle, root):
    """An answer that is streamed is not read in passing."""
    kuzzle.fail_next("security.token.invalid")
    response = me(kuzzle, KuzzleAuth(kuzzle.url, root), stream=True)
    assert not response.raw.isclosed()
    assert b'"foo"' in b"".join(response.iter_content(10))


def test_of_a_session(kuzzle):
    """One session may have the auth, lend its connections to refreshes, and keep cookies and settings."""
    with requests.Session() as session:
        session.auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), session=session)
        session.headers["X-Mine"] = "1"
        kuzzle.next_answers.append(kuzzle.truly)
        kuzzle.next_answers.append(Answer(401, b"", {"Set-Cookie": "seen=1"}))
        # The token has just been refreshed, so it's not to blame: this is the answer.
        assert session.get(f"{kuzzle.url}/_me").status_code == 401
        assert kuid(session.get(f"{kuzzle.url}/_me")) == "foo"
    assert {request.headers["X-Mine"] for request in kuzzle.requests} == {"1"}
    assert kuzzle.requests[-1].headers["Cookie"] == "seen=1"
    assert len(refreshes(kuzzle)) == 1


# Where it goes


def test_another_name_of_the_host(kuzzle, root, caplog):
    """Who calls one host by two names, as ``localhost`` and ``127.0.0.1``, finds in the log why there is no token."""
    caplog.set_level(logging.DEBUG, "refresher")
    url = kuzzle.url.replace("127.0.0.1", "localhost")
    assert requests.get(f"{url}/_me", auth=KuzzleAuth(kuzzle.url, root), timeout=10).json()["result"]["_id"] == "-1"
    assert caplog.messages == [f"no token for a request that does not go to {kuzzle.url}/"]


@pytest.fixture
def stranger():
    with FakeKuzzle() as fake:
        fake.next_answers.extend([Answer(200, b"{}")] * 4)
        yield fake


def test_only_to_its_own_origin(kuzzle, circle, pair, root, stranger):
    """No other host, port or scheme gets a token, and what it answers is its own affair."""
    stranger.next_answers.appendleft(Answer(401))
    for auth in (KuzzleAuth(kuzzle.url, root), circle_auth(circle, pair)):
        requests.get(stranger.url, auth=auth, timeout=10)
    for request in stranger.requests:
        assert "Authorization" not in request.headers
        assert "X-User-Token" not in request.headers
    assert kuzzle.requests == circle.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_elsewhere(kuzzle, circle, pair, root, stranger, status):
    """A redirect to another origin is followed without the token, the API key too, even if it's asked for."""
    stranger.next_answers.appendleft(Answer(401, {"code": 155104}))
    stranger.next_answers.appendleft(Answer(401))
    for fake, auth in ((kuzzle, KuzzleAuth(kuzzle.url, root)), (circle, circle_auth(circle, pair))):
        fake.next_answers.append(Answer(status, b"", {"Location": f"{stranger.url}/there"}))
        response = requests.post(f"{fake.url}/here", auth=auth, timeout=10)
        assert response.url == f"{stranger.url}/there"
        assert "Authorization" in fake.requests[0].headers
    assert len(stranger.requests) == 2
    for request in stranger.requests:
        assert "Authorization" not in request.headers
        assert "X-User-Token" not in request.headers


def test_redirect_within(circle, pair):
    """A redirect to the same origin keeps the token; of a request that was repeated, the new one."""
    circle.fail_next(155104)
    circle.next_answers.append(circle.truly)
    circle.next_answers.append(Answer(302, b"", {"Location": "/v1/w3s/user"}))
    response = requests.get(f"{circle.url}/here", auth=circle_auth(circle, pair), timeout=10)
    assert response.json()["data"]["user"]["id"] == "user-1"
    assert [each.status_code for each in response.history] == [302]
    assert len(refreshes(circle)) == 1


def test_redirect_after_a_repetition(circle, pair, stranger):
    """Also when the repetition is redirected elsewhere, the token stays here."""
    circle.fail_next(155104)
    circle.next_answers.append(circle.truly)
    circle.next_answers.append(Answer(302, b"", {"Location": stranger.url}))
    requests.get(f"{circle.url}/here", auth=circle_auth(circle, pair), timeout=10)
    (request,) = stranger.requests
    assert "Authorization" not in request.headers
    assert "X-User-Token" not in request.headers


def test_redirect_after_a_sign_out(circle, pair, stranger):
    """Also if somebody signs out meanwhile: what was sent with the request stays here."""
    auth = circle_auth(circle, pair)

    def answer(_):
        auth.sign_out()
        return Answer(307, b"", {"Location": stranger.url})

    circle.next_answers.append(answer)
    requests.post(f"{circle.url}/here", auth=auth, timeout=10)
    (request,) = stranger.requests
    assert "Authorization" not in request.headers
    assert "X-User-Token" not in request.headers


@pytest.mark.parametrize(
    ("location", "kept"),
    [
        ("https://kuzzle/there", True),
        ("https://kuzzle:443/there", True),
        ("/there", True),
        ("there?x=1:2#//", True),
        ("?x", True),
        ("//kuzzle/there", False),
        ("HTTPS://KUZZLE/there", True),
        ("http://kuzzle/there", False),
        ("https://kuzzle:444/there", False),
        ("https://kuzzle.example/there", False),
        ("https://kuzzle@stranger/there", False),
        ("//stranger", False),
        ("https://stranger\\@kuzzle/", False),
        ("https://kuzzle\\@stranger/", False),
        ("////stranger/", False),
        ("/\\stranger/", False),
        ("https://[", False),
        ("mailto:kuzzle", False),
    ],
)
def test_redirect(location, kept):
    """The token goes along only where a redirect leads to the same origin however it is read."""
    auth = KuzzleAuth("https://kuzzle", "kauth-e30")
    request = requests.Request("GET", "https://kuzzle/here", auth=auth).prepare()
    response = requests.Response()
    response.status_code, response.request, response.url = 302, request, request.url
    response.headers["Location"] = location
    assert request.headers["Authorization"] == "Bearer kauth-e30"
    (hook,) = request.hooks["response"]
    assert hook(response) is response
    assert ("Authorization" in request.headers) == kept


def test_netrc(kuzzle, root, tmp_path, monkeypatch):
    """A .netrc entry for the host does not replace the token."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login planted password planted")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert kuid(me(kuzzle, KuzzleAuth(kuzzle.url, root))) == "foo"
    assert len(kuzzle.requests) == 1


# Circle


def test_circle(circle, pair):
    """The API key and the user token go with every request, and no refresh while they are good."""
    auth = circle_auth(circle, pair)
    assert [user(circle, auth).json()["data"]["user"]["id"] for _ in range(3)] == ["user-1"] * 3
    headers = circle.requests[0].headers
    assert headers["Authorization"] == f"Bearer {circle.api_key}"
    assert headers["X-User-Token"] == pair.user_token
    assert refreshes(circle) == []


def test_circle_refreshes_in_time(circle, pair, monkeypatch):
    """A pair that is about to expire, or has, is refreshed first. The API key may be in the environment."""
    monkeypatch.setenv("CIRCLE_WEB3_API_KEY", circle.api_key)
    saved = []
    auth = circle_auth(circle, pair, api_key=None, on_refresh=saved.append)
    with time_machine.travel(circle.clock() + 2 * HOUR, tick=False):
        assert [user(circle, auth).status_code for _ in range(3)] == [200] * 3
    (token,) = saved
    assert circle.requests[-1].headers["X-User-Token"] == token.user_token
    assert token.refresh_token != pair.refresh_token
    assert len(refreshes(circle)) == 1


@pytest.mark.parametrize("code", [155103, 155104, 155105])
@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_circle_refuses(circle, pair, code, status):
    """A user token that is unknown, expired or invalid is replaced, whatever the status."""
    circle.next_answers.append(Answer(status, {"code": code, "message": "no"}))
    assert user(circle, circle_auth(circle, pair)).status_code == 200
    assert len(refreshes(circle)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(401, {"code": 401, "message": "Malformed authorization."}), id="API key"),
        pytest.param(Answer(404, {"code": 155102, "message": "no such user"}), id="user"),
        pytest.param(Answer(403, b"<html>"), id="HTML"),
        pytest.param(Answer(401, b"[155104]"), id="a list"),
        pytest.param(Answer(200, {"code": 155104}), id="a success"),
    ],
)
def test_circle_refuses_something_else(circle, pair, answer):
    """What another token would not help is the answer."""
    circle.next_answers.append(answer)
    assert user(circle, circle_auth(circle, pair)).status_code == answer.status
    assert len(circle.requests) == 1


def refuse_users(circle, times):
    """Let Circle refuse every user token, and carry out refreshes."""

    def refuse(request):
        if request.path.endswith("refresh"):
            return circle.truly(request)
        return Answer(403, {"code": 155104, "message": "expired"})

    circle.next_answers.extend([refuse] * times)


def test_circle_with_an_adapter_that_signs(circle, pair):
    """An adapter may put the real API key on what is sent. A rejected request ends with a verdict all the same."""

    class Vault(HTTPAdapter):
        def add_headers(self, request, **options):
            request.headers["Authorization"] = f"Bearer {circle.api_key}"

    session = requests.Session()
    session.mount(circle.url, Vault())
    auth = circle_auth(circle, pair, api_key=f"TEST_API_KEY:{32 * '1'}:{32 * '2'}", session=session)
    refuse_users(circle, 20)
    with pytest.raises(SignInRequiredError, match="the newest token that is known"):
        session.get(f"{circle.url}/v1/w3s/user", auth=auth, timeout=10)
    assert len(circle.requests) < 6


def test_infinite_token_that_is_over(kuzzle, clock, root):
    """Functions do not hand out a token any more of which an auth object was told that its session has ended."""
    cache = TokenCache(clock=clock)
    token = refresh_kuzzle_token(kuzzle.url, root, expires_in="-1", cache=cache)
    clock.advance(90)
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {token.jwt}"}, timeout=10)
    auth = KuzzleAuth(kuzzle.url, root, cache=cache)
    with pytest.raises(SignInRequiredError):
        requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert cache.peek(kuzzle.url, root).state == "refused"


def test_kuzzle_that_says_so_the_second_time(kuzzle, root):
    """An error that anybody may have written is worth one refresh. What Kuzzle itself says of the new token counts."""

    def refuse(request):
        return kuzzle.truly(request) if request.path.endswith("_refreshToken") else kuzzle.refuse(request, "refused")

    kuzzle.next_answers.append(Answer(401, b"<html>"))
    kuzzle.next_answers.extend([refuse] * 2)
    with pytest.raises(SignInRequiredError, match="the newest token that is known"):
        requests.get(f"{kuzzle.url}/_me", auth=KuzzleAuth(kuzzle.url, root), timeout=10)
    assert len(kuzzle.requests) == 3


@pytest.mark.parametrize("answer", [Answer(401, b"<html>"), Answer(401, b"")])
def test_infinite_token_behind_a_gateway(kuzzle, root, answer):
    """What Kuzzle itself did not say is the answer: such a token cannot be refreshed."""
    cache = TokenCache()
    refresh_kuzzle_token(kuzzle.url, root, expires_in="-1", cache=cache)
    kuzzle.next_answers.append(answer)
    auth = KuzzleAuth(kuzzle.url, root, cache=cache)
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 401
    assert len(kuzzle.requests) == 2


def test_circle_never_content(circle, pair):
    """A service that refuses new tokens, too, costs one refresh a minute and no session."""
    auth = circle_auth(circle, pair)
    refuse_users(circle, 6)
    for _ in range(4):
        with pytest.raises(SignInRequiredError, match=r"the newest token that is known: sign in again \(403\)"):
            user(circle, auth)
    assert len(refreshes(circle)) == 1
    assert user(circle, auth).status_code == 200


def test_circle_never_content_with_many_workers(circle, pair):
    """Nor does it cost one for each process: a store tells why its newest token was asked for."""
    store = MemoryStore()
    refuse_users(circle, 20)
    for _ in range(4):
        auth = circle_auth(circle, pair, cache=TokenCache(store, runtime=Runtime()))
        with pytest.raises(SignInRequiredError, match=r"the newest token that is known"):
            user(circle, auth)
    assert len(refreshes(circle)) == 1


class AnotherMachine(Runtime):
    """It was started at another time, and its clock is half an hour ahead."""

    def now(self):
        return super().now() + HOUR / 2


class TwoKeys(FakeCircle):
    """It has another API key."""

    def receive(self, request):
        if request.headers["Authorization"] == "Bearer TEST_API_KEY:other:one":
            request.headers.replace_header("Authorization", f"Bearer {self.api_key}")
        return super().receive(request)


def test_circle_with_two_api_keys(clock):
    """A user token that is rejected is refreshed, whichever key its pair was first asked for with."""
    cache = TokenCache(clock=clock)
    with TwoKeys(clock=clock) as circle:
        pair = circle.sign_in()
        clock.advance(HOUR - 10)
        for api_key in (circle.api_key, "TEST_API_KEY:other:one"):
            auth = circle_auth(circle, pair, cache=cache, api_key=api_key)
            assert user(circle, auth).status_code == 200
        clock.advance(HOUR / 2)
        circle.fail_next(155104)
        assert user(circle, auth).status_code == 200
        assert len(refreshes(circle)) == 2


def test_circle_that_keeps_refresh_tokens(clock):
    """A pair may have a new user token alone: that is sent, and handed over."""
    saved, cache = [], TokenCache(clock=clock)
    with FakeCircle(clock=clock, rotate=False) as circle:
        auth = circle_auth(circle, circle.sign_in(), cache=cache, on_refresh=saved.append)
        for _ in range(3):
            assert user(circle, auth).status_code == 200
            clock.advance(HOUR - 10)
            assert [outcome.outcome for outcome in keep_alive([auth])] == ["refreshed"]
            clock.advance(40)
    assert len({pair.user_token for pair in saved}) == 3


def test_circle_not_content_on_two_machines(circle, pair):
    """A token that has been replaced by a machine whose clock is ahead is not young for ever to the others."""
    store = MemoryStore()
    other, runtime = circle_auth(circle, pair, cache=TokenCache(store, runtime=AnotherMachine())), Runtime()
    runtime.boot = "here"
    auth = circle_auth(circle, pair, cache=TokenCache(store, runtime=runtime))
    for each in (other, auth):
        assert user(circle, each).status_code == 200
        circle.fail_next(155103)
        assert user(circle, each).status_code == 200
    assert len(refreshes(circle)) == 2


@pytest.mark.parametrize("module", [None, "tests"])
def test_session_that_is_replaced(kuzzle, root, monkeypatch, module):
    """Whatever sends a session's requests, a 401 is answered with a refresh."""
    real = requests.Session.send

    def send(*arguments, **options):
        return real(*arguments, **options)

    send.__module__ = module
    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache())
    monkeypatch.setattr(requests.Session, "send", send)
    kuzzle.fail_next("security.token.invalid")
    assert kuid(me(kuzzle, auth)) == "foo"


def test_circle_right_after_a_refresh(circle, pair):
    """A user token that is refused when it is new says nothing of its refresh token, which is tried."""
    cache = TokenCache()
    new = refresh_user_token(**call_with(circle, pair), cache=cache)
    circle.fail_next(155104)
    assert user(circle, circle_auth(circle, pair, cache=cache)).status_code == 200
    assert circle.requests[-1].headers["X-User-Token"] != new.user_token


def test_circle_after_a_minute(circle, pair, monkeypatch):
    """A token that has been good for a while and is refused is replaced, once for all that have it."""
    monkeypatch.setattr(time, "clock_gettime", lambda _: time.time())
    cache = TokenCache()
    with time_machine.travel(circle.clock() + 2 * HOUR, tick=False) as now:
        auths = [circle_auth(circle, pair, cache=cache) for _ in range(3)]
        circle.clock.advance(2)
        assert [user(circle, auth).status_code for auth in auths] == [200] * 3
        assert len(refreshes(circle)) == 1
        now.shift(120)
        circle.fail_next(155105)
        assert [user(circle, auth).status_code for auth in auths] == [200] * 3
    assert len(refreshes(circle)) == 2
    assert len({request.headers["X-User-Token"] for request in sent(circle, "/v1/w3s/user")}) == 2


def test_circle_user_id(circle, pair):
    """With a user id, a pair is had first."""
    auth = circle_auth(circle, pair, user_token=None, user_id="user-1")
    assert [user(circle, auth).status_code for _ in range(3)] == [200] * 3
    assert len(refreshes(circle)) == 1


def test_circle_opaque_token(circle):
    """A user token that does not tell when it dies is refreshed first."""
    circle.next_answers.append(Answer(200, {"data": {"userToken": "opaque", "refreshToken": "next"}}))
    circle.next_answers.append(Answer(200, {"data": {}}))
    auth = CircleAuth(user_token="old", refresh_token="r", device_id="d", api_key=circle.api_key, base_url=circle.url)
    assert user(circle, auth).status_code == 200
    assert circle.requests[1].headers["X-User-Token"] == "opaque"


# As an object


def test_pickled_before_it_was_used(kuzzle, root):
    """A copy for another process begins with the newest token that this one knows, as the first may be spent."""
    cache = TokenCache()
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    auth = pickle.loads(pickle.dumps(KuzzleAuth(kuzzle.url, root, cache=cache)))
    assert auth.jwt == token.jwt
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=5).json()["result"]["_id"] == "foo"


def test_pickled_after_a_sign_out(kuzzle):
    """Nobody has signed in there either."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=60), cache=TokenCache())
    auth.sign_out()
    assert pickle.loads(pickle.dumps(auth)).jwt is None


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda auth: pickle.loads(pickle.dumps(auth))])
@pytest.mark.parametrize("own", ["shared", "none", "file", "memory"])
def test_pickled(kuzzle, circle, pair, root, own, again, tmp_path):
    """A copy goes on from the last token, settings and cache the same; a memory that is copied is empty."""
    saved = {"shared": SHARED_CACHE, "none": None, "memory": TokenCache(lease=5.0)}
    cache = saved.get(own, TokenCache(FileStore(tmp_path / "store"), ahead=90))
    kuzzle_auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), expires_in="2h", cache=cache)
    auth_of_circle = circle_auth(circle, pair, cache=cache)
    me(kuzzle, kuzzle_auth)
    circle.fail_next(155104)
    user(circle, auth_of_circle)
    assert kuid(me(kuzzle, again(kuzzle_auth))) == "foo"
    assert user(circle, again(auth_of_circle)).status_code == 200
    assert again(kuzzle_auth).jwt == kuzzle_auth.jwt
    assert len(refreshes(kuzzle)) == len(refreshes(circle)) == 1
    if own == "shared":
        assert again(kuzzle_auth)._cache is SHARED_CACHE
    if own == "memory":
        assert again(cache)._limit == 5.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", "planted"),
        ("jwt", "planted token"),
        ("jwt", ""),
        ("jwt", '{"jwt":"planted"}'),
        ("expires_in", "planted"),
        ("trigger_events", "planted"),
        ("strategy", "plan\nted"),
        ("queuable", "planted"),
        ("timeout", "planted"),
        ("cache", "planted"),
        ("session", "planted"),
        ("on_refresh", "planted"),
    ],
)
def test_bad_arguments(name, value):
    """What is wrong is named when the object is made, and its value is not told."""
    with pytest.raises(InvalidArgumentError, match=f"^{name} ") as caught:
        KuzzleAuth(**{"url": "http://kuzzle", "jwt": "kauth-e30", name: value})
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("user_token", "planted token"), ("base_url", "http://planted"), ("retry", 1)]
)
def test_bad_arguments_for_circle(name, value):
    """The same for Circle."""
    good = {"user_token": "u", "refresh_token": "r", "device_id": "d", "api_key": "k"}
    with pytest.raises(InvalidArgumentError, match=f"^{name} "):
        CircleAuth(**{**good, name: value})


def test_setting_a_bad_token(kuzzle, root):
    """A bad token is refused, and the one before stays."""
    auth = KuzzleAuth(kuzzle.url, root)
    with pytest.raises(InvalidArgumentError, match=r"^jwt "):
        auth.jwt = "planted token"
    assert auth.jwt == root


@pytest.mark.parametrize(
    "claims", [{"exp": 1e299, "iat": -1e299}, {"exp": 1e306}, {"exp": 10**400}, {"exp": -5}, {"exp": 2e10}]
)
def test_strange_claims(kuzzle, claims):
    """A token that tells impossible times does no harm."""
    auth = KuzzleAuth(kuzzle.url, f"kauth-{jwt_with(claims)}")
    kuzzle.next_answers.append(Answer(200, {"result": {"_id": "someone"}}))
    if claims["exp"] == -5:
        with pytest.raises(RefreshError):
            me(kuzzle, auth)
    else:
        assert kuid(me(kuzzle, auth)) == "someone"


def test_no_secret_shows(kuzzle, circle, pair, root, caplog):
    """Neither the objects nor the log tell a secret."""
    caplog.set_level(logging.DEBUG, "refresher")
    auths = [KuzzleAuth(kuzzle.url, root), circle_auth(circle, pair)]
    kuzzle.fail_next("security.token.invalid")
    circle.fail_next(155104)
    me(kuzzle, auths[0])
    user(circle, auths[1])
    told = f"{auths} {caplog.text}"
    for secret in (root, auths[0].jwt, pair.user_token, pair.refresh_token, circle.api_key):
        assert secret not in told
    assert caplog.text.count("ok, 1 attempt") == 2


@pytest.mark.parametrize("others", [{}, {"other": "1", "third": "2"}])
def test_session_that_logged_in_with_a_cookie(running_target, others):
    """Kuzzle does not take a token and its login cookie together: the cookie stays back. Others are sent."""
    with requests.Session() as session:
        session.cookies.update(others)
        login = f"{running_target.url}/_login/local?cookieAuth=true"
        assert session.post(login, json=running_target.credentials, timeout=10).status_code == 200
        assert "authToken" in session.cookies
        auth = KuzzleAuth(running_target.url, running_target.login(), cache=TokenCache())
        answer = session.get(f"{running_target.url}/_me", auth=auth, timeout=10)
        assert kuid(answer) == running_target.kuid
        sent = answer.request.headers.get("Cookie", "")
        assert sorted(filter(None, sent.split("; "))) == [f"{name}={value}" for name, value in others.items()]
        assert "authToken" in session.get(f"{running_target.url}/_me", timeout=10).request.headers["Cookie"]
    by_hand = requests.get(f"{running_target.url}/_me", auth=auth, headers={"Cookie": b"other=1"}, timeout=10)
    assert (kuid(by_hand), by_hand.request.headers["Cookie"]) == (running_target.kuid, b"other=1")


def test_contract(running_target):
    """The same on each Kuzzle: a living token is used, a spent one leads on, or to the sign-in."""
    jwt = running_target.login()
    cache = TokenCache()
    auths = [KuzzleAuth(running_target.url, jwt, cache=each) for each in (cache, None)]
    assert [kuid(me(running_target, auth)) for auth in auths] == [running_target.kuid] * 2
    token = refresh_kuzzle_token(running_target.url, jwt, cache=cache)
    running_target.wait(1.2)
    assert kuid(me(running_target, auths[0])) == running_target.kuid
    assert auths[0].jwt == token.jwt
    with pytest.raises(SignInRequiredError):
        me(running_target, auths[1])


def test_circle_and_kuzzle_do_not_mix(kuzzle, root):
    """Each has its own headers."""
    with FakeCircle() as circle:
        auth = circle_auth(circle, circle.sign_in())
        request = requests.Request("GET", kuzzle.url, auth=auth).prepare()
    assert not {"Authorization", "X-User-Token"} & set(request.headers)
