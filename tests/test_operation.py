"""Sessions in operation: peek, sign_out, keep_alive, on_event."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import prometheus_client
import pytest
import requests
from helpers import call_with, jwt_with
from IPython.lib.pretty import pretty
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import refresher
from refresher import (
    SHARED_CACHE,
    CircleAuth,
    FileStore,
    InvalidArgumentError,
    KuzzleAuth,
    MemoryStore,
    OutcomeUnknownError,
    RefreshError,
    RefreshEvent,
    RequestRefusedError,
    SignInRequiredError,
    TokenCache,
    UnavailableError,
    _keeper,
    _rules,
    keep_alive,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher._flight import Flight
from refresher._rules import Attempt, Instant
from refresher._runtime import REAL
from refresher._text import key_of
from refresher.services.kuzzle import KuzzleCredential
from refresher.testing import Answer, FakeCircle, FakeKuzzle


@pytest.fixture
def kuzzle(clean_shared_cache):
    """A FakeKuzzle whose clock goes on."""
    SHARED_CACHE.clear()  # what is known of others that had the same port
    with FakeKuzzle() as kuzzle:
        yield kuzzle


@pytest.fixture
def circle(clean_shared_cache):
    """A FakeCircle whose clock goes on."""
    SHARED_CACHE.clear()
    with FakeCircle() as circle:
        yield circle


@pytest.fixture
def events():
    return []


class Broken:
    """A store that is down, or can only be read."""

    def __init__(self, store, *, reads=False):
        self.store, self.reads, self.is_broken = store, reads, True

    def __getattr__(self, name):
        if name == "end_thread":
            raise AttributeError(name)
        if self.is_broken and not (self.reads and name == "get"):
            raise ConnectionError("the store is down")
        return getattr(self.store, name)

    def get(self, key):
        return self.__getattr__("get")(key)

    def set(self, key, value, seconds):
        return self.__getattr__("set")(key, value, seconds)

    def delete(self, key):
        return self.__getattr__("delete")(key)

    def acquire(self, key, owner, lease):
        return self.__getattr__("acquire")(key, owner, lease)

    def renew(self, key, owner, lease):
        return self.__getattr__("renew")(key, owner, lease)

    def release(self, key, owner):
        return self.__getattr__("release")(key, owner)


def locals_of(error):
    """Show the local variables of the package's frames, as debuggers do."""
    package = Path(refresher.__file__).parent
    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
    return repr([frame.locals for frame in trace.stack if package in Path(frame.filename).parents])


class Unlocked(FileStore):
    """A FileStore on which every lock's lease has just ended."""

    def acquire(self, key, owner, lease):
        return 0.0


def is_alive(kuzzle, jwt):
    """Ask Kuzzle whether it accepts a token."""
    return requests.post(f"{kuzzle.url}/_checkToken", json={"token": jwt}, timeout=10).json()["result"]["valid"]


def paths(kuzzle):
    return [request.path for request in kuzzle.requests]


def circle_auth(circle, pair, **options):
    arguments = call_with(circle, pair)
    return CircleAuth(**{**arguments, **options})


# peek


def test_peek(kuzzle):
    """What is known of a chain, from each of its tokens, without a request and without a secret."""
    cache, jwt = TokenCache(), kuzzle.login("foo", ago=1800)
    before = cache.peek(kuzzle.url, jwt)
    assert (before.provider, before.user, before.state, before.generation) == ("kuzzle", "foo", "unknown", 0)
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    sent = len(kuzzle.requests)
    for each in (jwt, token.jwt):
        status = cache.peek(kuzzle.url, each)
        assert (status.user, status.state, status.generation) == ("foo", "fresh", 1)
        assert (status.expires_at, status.fingerprint) == (token.expires_at, token.fingerprint)
        assert token.jwt not in repr(status)
        assert json.loads(json.dumps(status.to_dict()))["expires_at"] == token.expires_at.isoformat()
    assert len(kuzzle.requests) == sent


def test_peek_at_circle(circle):
    """The same for Circle, with the arguments of its call, less the API key."""
    cache, pair = TokenCache(), circle.sign_in("user-1")
    names = {name: value for name, value in call_with(circle, pair).items() if name != "api_key"}
    assert cache.peek(**names).state == "unknown"
    newer = refresh_user_token(**call_with(circle, pair), cache=cache)
    status = cache.peek(**names)
    assert (status.provider, status.user, status.state) == ("circle", "user-1", "fresh")
    assert status.expires_at == newer.expires_at


def test_states(kuzzle):
    """A token is fresh, due, expired, refused; a chain that was forgotten is unknown."""
    now = [time.time()]
    cache, jwt = TokenCache(clock=lambda: now[0]), kuzzle.login("foo", ago=1800)
    seen = []
    refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    for seconds in (3500, 3590, 3700):
        now[0] = time.time() + seconds
        seen.append(cache.peek(kuzzle.url, jwt).state)
    now[0] = time.time()
    requests.post(
        f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {_newest(cache, kuzzle, jwt)}"}, timeout=9
    )
    now[0] += 3700
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    seen.append(cache.peek(kuzzle.url, jwt).state)
    cache.forget(kuzzle.url, jwt)
    seen.append(cache.peek(kuzzle.url, jwt).state)
    assert seen == ["fresh", "due", "expired", "refused", "unknown"]


def _newest(cache, kuzzle, jwt):
    return KuzzleAuth(kuzzle.url, jwt, cache=cache).jwt


def test_peek_asks_the_store(kuzzle, tmp_path):
    """What another process refreshed is known, and what this one knows is told while the store is down."""
    jwt = kuzzle.login("foo", ago=1800)
    mine, broken = TokenCache(FileStore(tmp_path)), Broken(FileStore(tmp_path))
    refresh_kuzzle_token(kuzzle.url, jwt, cache=mine)
    theirs = TokenCache(broken)
    with pytest.raises(UnavailableError, match="Broken cannot be read"):
        theirs.peek(kuzzle.url, jwt)
    broken.is_broken = False
    assert theirs.peek(kuzzle.url, jwt).generation == 1
    broken.is_broken = True
    assert theirs.peek(kuzzle.url, jwt).generation == 1


PAIR = {"refresh_token": "r", "device_id": "d", "user_token": "u"}


@pytest.mark.parametrize("method", ["peek", "forget"])
@pytest.mark.parametrize(
    ("arguments", "flaw"),
    [
        ({}, "url is missing"),
        ({"jwt": "j"}, "url is missing"),
        ({"url": "http://x"}, "jwt is missing"),
        ({"url": "x", "jwt": "j"}, "url must look like"),
        ({"url": "http://x", "jwt": "j", "user_id": "planted"}, "user_id must not be given with url and jwt"),
        ({"url": "http://x", "jwt": "j", "base_url": "planted"}, "base_url must not be given with url and jwt"),
        ({**PAIR, "jwt": "j"}, "refresh_token must not be given with url and jwt"),
        ({**PAIR, "user_id": "user-1"}, "user_token or user_id must be given, but not both"),
        ({"refresh_token": "r"}, "user_token or user_id must be given, but not both"),
        ({"refresh_token": "r", "user_token": "u"}, "device_id must be a string"),
        ({"device_id": "d", "user_token": "u"}, "refresh_token must be a string"),
        ({**PAIR, "base_url": "http://x"}, "base_url must use https"),
    ],
    ids=str,
)
def test_no_session(method, arguments, flaw):
    """What names no session, or two, is refused, and the argument that is missing or too much is named."""
    with pytest.raises(InvalidArgumentError, match=f"^{flaw}") as caught:
        getattr(TokenCache(), method)(**arguments)
    assert "planted" not in locals_of(caught.value)


@pytest.mark.parametrize("method", ["peek", "forget"])
def test_misspelled(method):
    """So is a name that is none of theirs."""
    with pytest.raises(TypeError, match="refreshToken"):
        getattr(TokenCache(), method)(**PAIR, refreshToken="r")


def test_peek_complains_about_a_token(kuzzle):
    """A token in the place of a URL is not shown, nor is what a store says of itself."""
    jwt = kuzzle.login("foo")
    cache = TokenCache()
    for call in (cache.peek, cache.forget):
        with pytest.raises(InvalidArgumentError, match="url") as caught:
            call(jwt, kuzzle.url)
        assert jwt not in locals_of(caught.value)
        with pytest.raises(InvalidArgumentError, match="base_url") as caught:
            call(refresh_token="x", device_id="x", user_token="x", base_url=jwt)
        assert jwt not in locals_of(caught.value)

    class Talkative(Broken):
        def get(self, key):
            raise ConnectionError(jwt)

    with pytest.raises(UnavailableError, match="Talkative cannot be read") as caught:
        TokenCache(Talkative(None)).peek(kuzzle.url, jwt)
    assert jwt not in locals_of(caught.value)


def test_complaints_in_a_debugger(kuzzle):
    """What is half made has a repr, since debuggers show it."""
    for make in (
        lambda: KuzzleAuth(kuzzle.login("foo"), kuzzle.url),
        lambda: KuzzleAuth(kuzzle.url, timeout="x"),
        lambda: CircleAuth(refresh_token="x", device_id="x", user_token="x", api_key="x", base_url="x"),
        lambda: TokenCache("folder"),
        lambda: TokenCache(lease="x"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            make()
        assert "self" in locals_of(caught.value)


# sign_out


def test_sign_out(kuzzle):
    """The newest token is signed out, whichever the auth object was made with, and the session is forgotten."""
    cache, jwt = TokenCache(), kuzzle.login("foo", ago=1800)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=cache)
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    auth.sign_out()
    assert not is_alive(kuzzle, token.jwt)
    assert cache.peek(kuzzle.url, jwt).state == "unknown"
    assert auth.jwt is None
    sent = len(kuzzle.requests)
    auth.sign_out()
    assert len(kuzzle.requests) == sent, "nobody has signed in"
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    auth.jwt = kuzzle.login("foo")
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=9).json()["result"]["_id"] == "foo"


def test_sign_out_contract(running_target):
    """The same on each Kuzzle."""
    cache, jwt = TokenCache(), running_target.login()
    running_target.wait(1.1)
    token = refresh_kuzzle_token(running_target.url, jwt, cache=cache)
    KuzzleAuth(running_target.url, jwt, cache=cache).sign_out()
    assert running_target.me(token.jwt) == 401
    other = KuzzleAuth(running_target.url, token.jwt, cache=cache)
    other.sign_out()


def test_sign_out_of_an_ended_session(kuzzle):
    """A session that ended elsewhere, or whose tokens have expired, is signed out."""
    cache = TokenCache()
    for jwt in (kuzzle.login("foo"), kuzzle.login("foo", ago=7200)):
        requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {jwt}"}, timeout=9)
        KuzzleAuth(kuzzle.url, jwt, cache=cache).sign_out()


def test_sign_out_of_circle(circle):
    """Circle has no sign-out: the session is forgotten, and nothing is sent."""
    cache, pair = TokenCache(), circle.sign_in("user-1")
    auth = circle_auth(circle, pair, cache=cache)
    refresh_user_token(**call_with(circle, pair), cache=cache)
    sent = len(circle.requests)
    auth.sign_out()
    assert len(circle.requests) == sent
    names = {name: value for name, value in call_with(circle, pair).items() if name != "api_key"}
    assert cache.peek(**names).state == "unknown"


@pytest.mark.parametrize("shared", [False, True], ids=["one process", "two processes"])
def test_sign_out_during_a_refresh(kuzzle, tmp_path, shared):
    """A refresh under way is waited for, and its token is signed out."""
    jwt = kuzzle.login("foo", ago=1800)
    caches = [TokenCache(FileStore(tmp_path)) for _ in range(2)] if shared else [TokenCache()] * 2
    kuzzle.delay_next(1.0)
    with ThreadPoolExecutor() as pool:
        refresh = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=caches[0])
        while not kuzzle.requests:
            time.sleep(0.01)
        KuzzleAuth(kuzzle.url, jwt, cache=caches[1]).sign_out()
        token = refresh.result()
    assert paths(kuzzle) == ["/_refreshToken", "/_logout"]
    assert not is_alive(kuzzle, token.jwt)


@pytest.mark.parametrize(
    "forget",
    [
        pytest.param(lambda *_: None, id="signed out"),
        pytest.param(lambda cache, *of: cache.forget(*of), id="and forgotten"),
        pytest.param(lambda cache, *_: cache.clear(), id="and cleared"),
    ],
)
def test_a_successor_that_comes_too_late(kuzzle, tmp_path, forget, monkeypatch):
    """A process that was away for so long that its session was signed out signs its new token out."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    jwt = kuzzle.login("foo", ago=1800)
    theirs, mine = TokenCache(FileStore(tmp_path)), TokenCache(Unlocked(tmp_path), lease=0.2)

    def late(request):
        answer = kuzzle.truly(request)
        time.sleep(2)
        return answer

    kuzzle.next_answers.append(late)
    with ThreadPoolExecutor() as pool:
        refresh = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=theirs)
        while not kuzzle.requests:
            time.sleep(0.01)
        time.sleep(0.3)
        KuzzleAuth(kuzzle.url, jwt, cache=mine).sign_out()
        assert paths(kuzzle) == ["/_refreshToken", "/_logout"]
        forget(mine, kuzzle.url, jwt)
        with pytest.raises(SignInRequiredError):
            refresh.result()
    deadline = time.monotonic() + 10
    while paths(kuzzle).count("/_logout") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    late = [request for request in kuzzle.requests if request.path == "/_logout"][1]
    assert not is_alive(kuzzle, late.headers["Authorization"].removeprefix("Bearer "))
    assert mine.peek(kuzzle.url, jwt).state in ("unknown", "refused")


def test_a_pair_of_circles_that_comes_too_late(circle, tmp_path, monkeypatch):
    """Circle has no sign-out, and repeats its answer: who has waited is not kept asking for what is not kept."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    pair = circle.sign_in("user-1")
    theirs, mine = TokenCache(FileStore(tmp_path)), TokenCache(Unlocked(tmp_path), lease=0.2)
    circle.next_answers.append(lambda request: circle.truly(request, after=2.0))
    with ThreadPoolExecutor() as pool:
        refresh = pool.submit(functools.partial(refresh_user_token, **call_with(circle, pair), cache=theirs, timeout=6))
        while not circle.requests:
            time.sleep(0.01)
        time.sleep(0.3)
        circle_auth(circle, pair, cache=mine).sign_out()
        with pytest.raises(SignInRequiredError):
            refresh.result()
    assert len(circle.requests) <= 3


def test_the_end_cannot_be_written_down_at_once(kuzzle, tmp_path):
    """One command that fails says nothing about the next: the end of a session is written down again."""

    class Clumsy(FileStore):
        failures = 0

        def set(self, key, value, seconds):
            if key.endswith("-ended") and not self.failures:
                self.failures += 1
                raise OSError
            super().set(key, value, seconds)

    store, jwt = Clumsy(tmp_path), kuzzle.login("foo", ago=1800)
    KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(store)).sign_out()
    assert store.failures == 1
    assert paths(kuzzle) == ["/_logout"]


@pytest.mark.parametrize("lost", [0, 3])
def test_a_successor_that_is_written_too_late(kuzzle, tmp_path, lost):
    """
    A process that slept between its look at the store and its write does not undo a sign-out.

    However many tokens it has had that the store has *lost*, or never had.
    """

    class Sleepy(FileStore):
        is_sleepy, reached, go_on = False, threading.Event(), threading.Event()

        def set(self, key, value, seconds):
            if '"token"' in value and self.is_sleepy:
                self.reached.set()
                assert self.go_on.wait(20)
                time.sleep(0.6)
            super().set(key, value, seconds)

    jwt, store = kuzzle.login("foo", ago=1800), Sleepy(tmp_path)
    theirs, mine = TokenCache(store), TokenCache(Unlocked(tmp_path), lease=0.2)
    for hours in range(1, 1 + lost):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=theirs, expires_in=f"{hours}h")
    store.delete(key_of("kuzzle:2", kuzzle.url, jwt))
    store.is_sleepy = True
    with ThreadPoolExecutor() as pool:
        refresh = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=theirs, expires_in="9h")
        assert store.reached.wait(10)
        KuzzleAuth(kuzzle.url, jwt, cache=mine).sign_out()
        store.go_on.set()
        with pytest.raises(SignInRequiredError):
            refresh.result()
    deadline = time.monotonic() + 10
    while paths(kuzzle).count("/_logout") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    late = [request for request in kuzzle.requests if request.path == "/_logout"][-1]
    assert not is_alive(kuzzle, late.headers["Authorization"].removeprefix("Bearer "))
    assert paths(kuzzle).count("/_logout") == 2


def test_sign_out_hits_a_bug(kuzzle, monkeypatch):
    """An exception that is none of ours comes out as it is, at once and not after the whole timeout."""
    monkeypatch.setattr(KuzzleCredential, "sign_out", lambda *_: 1 / 0)
    auth = KuzzleAuth(kuzzle.url, kuzzle.login("foo"), cache=TokenCache(), timeout=None)
    with pytest.raises(ZeroDivisionError):
        auth.sign_out()


def test_sign_out_waits_for_news(kuzzle, tmp_path):
    """Where a refresh has left and nobody has the lock any more, its token is waited for."""
    jwt = kuzzle.login("foo", ago=1800)
    kuzzle.delay_next(1.0)
    with ThreadPoolExecutor() as pool:
        refresh = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=TokenCache(FileStore(tmp_path)))
        while not kuzzle.requests:
            time.sleep(0.01)
        KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(Unlocked(tmp_path))).sign_out()
        token = refresh.result()
    assert paths(kuzzle) == ["/_refreshToken", "/_logout"]
    assert not is_alive(kuzzle, token.jwt)


def test_sign_out_with_a_token_of_another_process(kuzzle, tmp_path):
    """A process that has only a later token of a chain signs out the newest."""
    jwt = kuzzle.login("foo", ago=1800)
    theirs = TokenCache(FileStore(tmp_path), ahead=1e6)
    older = refresh_kuzzle_token(kuzzle.url, jwt, cache=theirs, expires_in="1h")
    newer = refresh_kuzzle_token(kuzzle.url, jwt, cache=theirs, expires_in="2h")
    KuzzleAuth(kuzzle.url, older.jwt, cache=TokenCache(FileStore(tmp_path))).sign_out()
    assert not is_alive(kuzzle, newer.jwt)


def test_the_lease_ends_before_a_sign_out(kuzzle, tmp_path, monkeypatch):
    """Whoever was away for longer than its lease looks again before it signs anything out."""

    class Slow(FileStore):
        slept = 0

        def get(self, key):
            if key.endswith("-attempt") and not self.slept:
                self.slept += 1
                time.sleep(0.6)
            return super().get(key)

        def renew(self, key, owner, lease):
            raise OSError

    monkeypatch.setattr("refresher._rules.LEASE", 0.5)
    jwt = kuzzle.login("foo", ago=1800)
    KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(Slow(tmp_path))).sign_out()
    assert paths(kuzzle) == ["/_logout"]
    assert not is_alive(kuzzle, jwt)


def test_calls_during_a_sign_out(kuzzle):
    """Who wants a token while a session is signed out hears that it has ended."""
    jwt = kuzzle.login("foo", ago=1800)
    cache = TokenCache()
    kuzzle.delay_next(0.5)
    with ThreadPoolExecutor() as pool:
        end = pool.submit(KuzzleAuth(kuzzle.url, jwt, cache=cache).sign_out)
        while not kuzzle.requests:
            time.sleep(0.01)
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
        end.result()


def test_two_tabs_sign_out(kuzzle):
    """Several sign-outs of one session at once are one request, and all succeed."""
    jwt, cache = kuzzle.login("foo"), TokenCache()
    kuzzle.delay_next(0.3)
    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(KuzzleAuth(kuzzle.url, jwt, cache=cache).sign_out) for _ in range(4)]
        assert [end.result() for end in ends] == [None] * 4
    assert not is_alive(kuzzle, jwt)
    assert paths(kuzzle).count("/_logout") <= 4


def test_a_sign_in_during_a_sign_out(kuzzle):
    """The new session is kept: nobody could end it otherwise."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login("foo", ago=60), cache=TokenCache())
    kuzzle.delay_next(0.5)
    with ThreadPoolExecutor() as pool:
        end = pool.submit(auth.sign_out)
        while not kuzzle.requests:
            time.sleep(0.01)
        auth.jwt = jwt = kuzzle.login("foo")
        end.result()
    assert auth.jwt == jwt
    auth.sign_out()
    assert not is_alive(kuzzle, jwt)


def test_sign_out_of_a_service_that_is_down(kuzzle):
    """That says so, keeps the token, and can be called again."""
    jwt, cache = kuzzle.login("foo"), TokenCache()
    auth = KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=1)
    kuzzle.stop()
    with pytest.raises(UnavailableError) as caught:
        auth.sign_out()
    assert caught.value.spent is False
    assert auth.jwt == jwt
    kuzzle.start()
    auth.sign_out()
    assert not is_alive(kuzzle, jwt)


def test_an_answer_to_a_sign_out_is_lost(kuzzle):
    """It is sent again, and the refusal then says that the session has ended."""
    jwt = kuzzle.login("foo")
    kuzzle.lose_next()
    KuzzleAuth(kuzzle.url, jwt, cache=TokenCache()).sign_out()
    assert paths(kuzzle) == ["/_logout", "/_logout"]
    assert not is_alive(kuzzle, jwt)


@pytest.mark.parametrize("reads", [False, True], ids=["down", "read-only"])
def test_sign_out_without_the_store(kuzzle, tmp_path, reads):
    """Others may have a newer token, or remember the session: that is an error, until the store is back."""
    jwt, store = kuzzle.login("foo", ago=1800), Broken(FileStore(tmp_path), reads=reads)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(store), timeout=5)
    others = refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(FileStore(tmp_path)))
    with pytest.raises(UnavailableError, match="Broken cannot be"):
        auth.sign_out()
    store.is_broken = False
    auth.sign_out()
    assert not is_alive(kuzzle, others.jwt)
    assert auth.jwt is None


def test_clear_without_the_store(kuzzle, tmp_path):
    """Others would go on with what was to be forgotten: that is an error, and can be done again."""
    jwt, store = kuzzle.login("foo", ago=1800), Broken(FileStore(tmp_path), reads=True)
    store.is_broken = False
    cache = TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    store.is_broken = True
    with pytest.raises(
        UnavailableError, match="Broken cannot be reached, so other processes may still use the sessions"
    ):
        cache.clear()
    store.is_broken = False
    cache.clear()
    assert TokenCache(FileStore(tmp_path)).peek(kuzzle.url, jwt).state == "unknown"


class Watched(FileStore):
    """It notes which threads ask it, and hangs if it is told to."""

    def __init__(self, path):
        super().__init__(path)
        self.threads, self.go_on = set(), threading.Event()
        self.go_on.set()

    def get(self, key):
        self.threads.add(threading.current_thread())
        self.go_on.wait(30)
        return super().get(key)


def test_session_that_was_refused_is_fresh_for_nobody(kuzzle):
    """Not in the process that was told, and not in one that finds the refusal in the store."""
    store, jwt = MemoryStore(), kuzzle.login("foo", ago=1800)
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(store))
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {token.jwt}"}, timeout=10)
    for cache in (TokenCache(store), TokenCache(store)):
        assert refresh_kuzzle_token(kuzzle.url, jwt, cache=cache) == token
        for lifetime in ("2h", None):
            with pytest.raises(SignInRequiredError):
                refresh_kuzzle_token(kuzzle.url, jwt, expires_in=lifetime, cache=cache)
        assert [each.outcome for each in keep_alive([KuzzleAuth(kuzzle.url, jwt, cache=cache)])] == ["ended"]
    assert len(kuzzle.requests) == 3


@pytest.fixture
def watched(tmp_path):
    store = Watched(tmp_path)
    yield store
    store.go_on.set()


def test_store_is_not_asked_in_the_callers_thread(kuzzle, watched):
    """An interrupt there could hit a transaction half way, and in a coroutine Django does not allow it."""
    jwt, cache = kuzzle.login("foo", ago=1800), TokenCache(watched)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=cache)
    cache.peek(kuzzle.url, jwt)
    cache.forget(kuzzle.url, jwt)
    assert auth.jwt == jwt
    list(keep_alive([auth]))
    cache.clear()
    assert watched.threads
    assert threading.current_thread() not in watched.threads


def test_store_that_hangs_and_a_look_at_it(kuzzle, watched, monkeypatch):
    """Nobody waits for it for ever, what memory has is told, and what it is to forget is forgotten."""
    monkeypatch.setattr(_rules, "LONGEST_DELAY", 0.2)
    monkeypatch.setattr(_rules, "BRIEFLY", 0.2)
    jwt, other, cache = kuzzle.login("foo", ago=1800), kuzzle.login("bar", ago=1800), TokenCache(watched)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=5)
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    refresh_kuzzle_token(kuzzle.url, other, cache=cache)
    stranger = kuzzle.login("baz", ago=1800)
    watched.go_on.clear()
    assert auth.jwt == token.jwt
    assert cache.peek(kuzzle.url, jwt).state == "fresh"
    with pytest.raises(UnavailableError, match="Watched does not answer"):
        cache.peek(kuzzle.url, stranger)
    endless = jwt_with({"_id": "baz"})
    assert KuzzleAuth(kuzzle.url, endless, cache=cache).jwt == endless
    for forget in (lambda: cache.forget(kuzzle.url, jwt), cache.clear):
        assert cache.peek(kuzzle.url, other).state == "fresh"
        with pytest.raises(UnavailableError, match="Watched does not answer"):
            forget()
        with pytest.raises(UnavailableError, match="Watched does not answer"):
            cache.peek(kuzzle.url, jwt)
    with pytest.raises(UnavailableError, match="Watched does not answer"):
        cache.peek(kuzzle.url, other)
    assert threading.current_thread() not in watched.threads
    monkeypatch.setattr(_keeper, "_WASTE", 0.3)
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(str(number)), cache=cache) for number in range(20)]
    began = time.monotonic()
    assert {each.outcome for each in keep_alive(auths)} == {"skipped"}
    assert time.monotonic() - began < 20 * 0.2, "not for each of them"


@pytest.mark.parametrize("forget", ["forget", "clear"])
def test_store_that_hangs_and_a_refresh_that_is_forgotten(kuzzle, watched, monkeypatch, forget):
    """What it brings is not kept."""
    monkeypatch.setattr(_rules, "LONGEST_DELAY", 0.2)
    jwt, cache = kuzzle.login("foo", ago=1800), TokenCache(watched)
    sent = threading.Event()
    kuzzle.next_answers.append(lambda request: sent.set() or kuzzle.truly(request, after=1.0))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=cache, timeout=5)
        assert sent.wait(10)
        watched.go_on.clear()
        with pytest.raises(UnavailableError, match="does not answer"):
            getattr(cache, forget)(*((kuzzle.url, jwt) if forget == "forget" else ()))
        time.sleep(1.2)
        with pytest.raises(UnavailableError, match="does not answer"):
            cache.peek(kuzzle.url, jwt)
        watched.go_on.set()
        assert waiting.result(10).kuid == "foo"
    assert cache.peek(kuzzle.url, jwt).state == "unknown"


def test_store_that_hangs_and_a_session_that_is_kept_alive(kuzzle, watched):
    """It is refreshed in its last moments all the same. Until then, it waits for the store."""
    jwt, cache = kuzzle.login("foo", ago=1800), TokenCache(watched, ahead=3)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=cache, expires_in="6s", timeout=1)
    refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, expires_in="6s")
    watched.go_on.clear()
    outcomes = []
    while kuzzle.knows(cache._ledger.recall(auth._credential)[0].newest.secret.reveal()) and len(kuzzle.requests) == 1:
        outcomes += [each.outcome for each in keep_alive([auth])]
        time.sleep(0.1)
    assert outcomes[0] == "fresh"
    assert outcomes[-1] == "refreshed"


def test_sign_out_that_cannot_be_written_down(kuzzle, tmp_path):
    """The session has ended, but the store remembers it: that is an error, and the next call ends that, too."""

    class Full(FileStore):
        is_full = True

        def set(self, key, value, seconds):
            if self.is_full and not key.endswith("-attempt"):
                raise OSError
            super().set(key, value, seconds)

    store, jwt = Full(tmp_path), kuzzle.login("foo", ago=1800)
    caches = TokenCache(store, lease=0.1), TokenCache(store)
    auth, again = (KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=5) for cache in caches)
    with pytest.raises(UnavailableError, match="the session has ended at Kuzzle, but Full cannot be written"):
        auth.sign_out()
    with pytest.raises(UnavailableError, match="Full cannot be read or written"):
        auth.sign_out()
    store.is_full = False
    again.sign_out()
    assert again.jwt is None


def test_sign_out_beside_a_refresh(kuzzle, tmp_path):
    """It says what it waits for: nobody has refused the token."""
    jwt, store = kuzzle.login("foo", ago=1800), FileStore(tmp_path)
    attempt = Attempt(by="another", at=Instant(time.time(), REAL.steady(), REAL.boot), is_open=True)
    store.set(f"{key_of('kuzzle:2', kuzzle.url, jwt)}-attempt", attempt.write(), 3600)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(store), timeout=1)
    with pytest.raises(OutcomeUnknownError, match="another process is refreshing the Kuzzle token"):
        auth.sign_out()
    assert not kuzzle.requests


def test_sign_out_of_a_pair_that_was_used_again(circle, tmp_path):
    """Circle knows no sign-out, so the session may go on. To sign it out once more forgets it once more."""
    cache, old = TokenCache(FileStore(tmp_path)), circle.sign_in("user-1", device_id="device-1")
    pair = {"refresh_token": old.refresh_token, "device_id": "device-1", "user_token": old.user_token}
    auth = CircleAuth(**pair, api_key=circle.api_key, base_url=circle.url, cache=cache)
    auth.sign_out()
    refresh_user_token(**pair, api_key=circle.api_key, base_url=circle.url, cache=cache)
    again = CircleAuth(**pair, api_key=circle.api_key, base_url=circle.url, cache=cache)
    again.sign_out()
    assert cache.peek(**pair, base_url=circle.url).state == "unknown"


@pytest.mark.parametrize("is_spent", [False, True])
def test_sign_out_after_a_refresh_that_was_killed(kuzzle, tmp_path, is_spent):
    """Who was killed has no lock any more, and is not waited for if the token has not been spent."""
    jwt, store = kuzzle.login("foo", ago=1800), FileStore(tmp_path)
    if is_spent:
        refresh_kuzzle_token(kuzzle.url, jwt, cache=None)
        kuzzle.clock.advance(2)
    long_ago = Instant(time.time() - 6, REAL.steady() - 6, REAL.boot)
    attempt = Attempt(by="another", at=long_ago, is_open=True)
    store.set(f"{key_of('kuzzle:2', kuzzle.url, jwt)}-attempt", attempt.write(), 3600)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(store), timeout=1 if is_spent else 5)
    if is_spent:  # by whom may be cut off from the store, and has a token that is not signed out
        with pytest.raises(OutcomeUnknownError):
            auth.sign_out()
    else:
        auth.sign_out()
        assert auth.jwt is None
        assert not kuzzle.knows(jwt)


def test_sign_out_of_a_session_that_was_signed_out(kuzzle, tmp_path, monkeypatch):
    """Nobody has to be waited for, and a token that the store never had is signed out as well."""
    jwt = kuzzle.login("foo", ago=1800)
    cache = TokenCache(FileStore(tmp_path))
    KuzzleAuth(kuzzle.url, jwt, cache=cache).sign_out()
    monkeypatch.setattr(Flight, "_verify", None)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(FileStore(tmp_path)))
    auth.sign_out()
    assert auth.jwt is None
    assert [request.path for request in kuzzle.requests] == ["/_logout"] * 2


def test_refresh_that_begins_beside_a_sign_out(kuzzle, tmp_path):
    """Whoever has written down that it spends the token may have a newer one: that is not known to be over."""
    jwt, store = kuzzle.login("foo", ago=1800), FileStore(tmp_path)

    def answer(request):
        now = Instant(time.time(), 1.0, "another")
        attempt = Attempt(by="another", at=now, is_open=True)
        store.set(f"{key_of('kuzzle:2', kuzzle.url, jwt)}-attempt", attempt.write(), 3600)
        return kuzzle.truly(request)

    kuzzle.next_answers.append(answer)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(FileStore(tmp_path)), timeout=1)
    with pytest.raises(OutcomeUnknownError):
        auth.sign_out()
    assert auth.jwt == jwt


def test_sign_out_of_another_user_is_left_alone(kuzzle):
    """Nothing of anybody else's ends."""
    cache = TokenCache()
    mine, theirs = (kuzzle.login("foo", ago=ago) for ago in (60, 120))
    KuzzleAuth(kuzzle.url, mine, cache=cache).sign_out()
    assert is_alive(kuzzle, theirs)


# How an auth object looks


def test_repr(kuzzle, circle):
    """It shows whose token goes where, its fingerprint and the time it has left, and no secret."""
    cache, jwt = TokenCache(), kuzzle.login("foo", ago=1800)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=cache)
    assert "user='foo'" in repr(auth)
    assert "time_left='0:29:5" in repr(auth) or "time_left='0:30:00'" in repr(auth)
    assert len(kuzzle.requests) == 0
    assert "user='nobody'" in repr(KuzzleAuth(kuzzle.url))
    assert "time_left='unlimited'" in repr(KuzzleAuth(kuzzle.url, kuzzle.login("foo", expires_in="-1")))
    pair = circle.sign_in("user-1")
    both = [auth, circle_auth(circle, pair)]
    for each in both:
        assert each._repr_html_().startswith("<table>")
        told = f"{each!r} {each._repr_html_()} {pretty(each)}"
        assert "time_left" in pretty(each)
        for secret in (jwt, pair.user_token, pair.refresh_token, circle.api_key):
            assert secret not in told


# keep_alive


def test_keep_alive(kuzzle):
    """What is due is refreshed, and nothing else."""
    cache = TokenCache()
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590 if i % 3 else 60), cache=cache) for i in range(9)]
    outcomes = list(keep_alive(auths))
    refreshed = [each.auth for each in outcomes if each.outcome == "refreshed"]
    assert set(refreshed) <= set(auths)
    assert 1 <= len(refreshed) < 9
    assert len(kuzzle.requests) == len(refreshed)
    assert {each.outcome for each in outcomes} == {"refreshed", "fresh"}
    assert all(each.error is None and each.seconds >= 0 for each in outcomes)
    assert {each.outcome for each in keep_alive(auths)} == {"fresh"}


def test_keep_alive_of_many(kuzzle):
    """Of 10,000 sessions, those that are due cost a request each, and auth objects are made one by one."""
    cache = TokenCache()
    first = [kuzzle.login(f"u{i}", ago=3590 if i % 100 == 0 else 60) for i in range(1000)]
    alive = []

    def auths():
        for jwt in itertools.islice(itertools.cycle(first), 10_000):
            auth = KuzzleAuth(kuzzle.url, jwt, cache=cache)
            alive.append(1)
            yield auth

    seen = Counter()
    for number, each in enumerate(keep_alive(auths())):
        seen[each.outcome] += 1
        assert len(alive) <= number + 6
    assert len(kuzzle.requests) == 10
    assert seen["refreshed"] >= 10, "who joined a refresh has a new token too"
    assert seen.total() == 10_000


def test_at_once(kuzzle):
    """No more are refreshed at the same time than was said."""
    now, most, lock = 0, 0, threading.Lock()
    receive = kuzzle.receive

    def count(request):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1
        return receive(request)

    kuzzle.receive = count
    cache = TokenCache()
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache) for i in range(9)]
    assert [each.outcome for each in keep_alive(auths, at_once=3)] == ["refreshed"] * 9
    assert most == 3


FORKED = """
import os, sys
from refresher import KuzzleAuth, TokenCache, keep_alive

cache = TokenCache(ahead=1800)
for outcome in keep_alive([KuzzleAuth(sys.argv[1], jwt, cache=cache) for jwt in sys.argv[2:]], at_once=2):
    if outcome.outcome == "refreshed" and os.fork() == 0:
        sys.exit()
while True:
    try:
        assert os.wait()[1] == 0
    except ChildProcessError:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_keep_alive_and_a_fork(kuzzle):
    """A child that is forked in the loop does not wait for the threads of its parent."""
    jwts = [kuzzle.login(str(number), ago=2000) for number in range(6)]
    command = [sys.executable, "-W", "ignore", "-c", FORKED, kuzzle.url, *jwts]
    subprocess.run(command, timeout=30, check=True)
    assert len(kuzzle.requests) == 6


def test_keep_alive_that_is_interrupted(kuzzle, monkeypatch):
    """It does not wait for a thread that an interrupt kept from its start."""

    def interrupt(thread):
        raise KeyboardInterrupt

    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(ago=3595), cache=TokenCache())]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(keep_alive(auths))
    assert [each.outcome for each in keep_alive(auths)] == ["refreshed"]


@pytest.mark.parametrize("complaint", [RuntimeError("release unlocked lock"), KeyError("thread")])
@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda auth, *session: auth._cache.peek(*session), id="peek"),
        pytest.param(lambda auth, *session: refresh_kuzzle_token(*session, cache=auth._cache), id="refresh"),
        pytest.param(lambda auth, *_: list(keep_alive([auth])), id="keep_alive"),
    ],
)
def test_interrupt_while_a_thread_starts(kuzzle, monkeypatch, tmp_path, work, complaint):
    """It is raised, though `Thread.start` hides it if it hits a lock or comes late, and nothing is done twice."""
    truly, threads = threading.Thread.start, []

    def start(thread):
        truly(thread)
        if thread.name == "refresher":
            threads.append(thread)
            try:
                raise KeyboardInterrupt
            finally:
                raise complaint

    jwt = kuzzle.login(ago=3595)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(FileStore(tmp_path)))
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt) as caught:
        work(auth, kuzzle.url, jwt)
    for thread in threads:
        thread.join()
    assert caught.value.__suppress_context__


class TimeLimitError(Exception):
    """What a signal handler raises, as Celery's at a task's time limit."""


def test_keep_alive_at_a_time_limit(kuzzle, monkeypatch):
    """It ends at once: nothing is waited for, or told, that came meanwhile."""
    outcomes = []

    def end(*_, **__):
        monkeypatch.undo()
        raise TimeLimitError

    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(ago=3595), cache=TokenCache()) for _ in range(2)]
    monkeypatch.setattr(_keeper._Keeper, "_look", lambda keeper, auth: end() if keeper._running else None)
    with pytest.raises(TimeLimitError):
        outcomes.extend(keep_alive(auths))
    assert outcomes == []


def test_keep_alive_of_what_cannot_be_read(kuzzle):
    """What the sessions come from may fail: that is told at once, not when all that is under way is done."""
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=0.5))

    def read():
        yield KuzzleAuth(kuzzle.url, kuzzle.login(ago=3595), cache=TokenCache())
        raise LookupError

    outcomes = []
    with pytest.raises(LookupError):
        outcomes.extend(keep_alive(read()))
    assert outcomes == []


class Lazy:
    """What stands in for a value that cannot be had."""

    def __hash__(self):
        raise LookupError


def test_argument_that_cannot_be_hashed(kuzzle):
    """It is named, as any that is wrong."""
    with pytest.raises(InvalidArgumentError, match=r"^url must"):
        refresh_kuzzle_token(Lazy(), kuzzle.login(ago=1800))


@pytest.mark.parametrize("number", [1, 2])
def test_time_limit_in_the_callers_thread(kuzzle, monkeypatch, number):
    """It is neither a wrong argument nor an error of the store, whichever of its commands it hits."""
    get, numbers = MemoryStore.get, itertools.count(1)

    def end(*arguments):
        if next(numbers) == number:
            raise TimeLimitError
        return get(*arguments)

    cache, jwt = TokenCache(), kuzzle.login(ago=1800)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=cache)
    refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    monkeypatch.setattr(MemoryStore, "get", end)
    with pytest.raises(TimeLimitError):
        _ = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache) if number == 1 else auth.jwt


def test_keep_alive_without_threads(kuzzle, monkeypatch):
    """Where no thread can be started, as at the end of a process, it refreshes all the same."""

    truly = threading.Thread.start

    def start(thread):
        if thread.name == "refresher":
            raise RuntimeError("can't start new thread")
        truly(thread)

    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(ago=3595), cache=TokenCache())]
    monkeypatch.setattr(threading.Thread, "start", start)
    assert [each.outcome for each in keep_alive(auths)] == ["refreshed"]


def test_pause_that_another_call_was_told(kuzzle):
    """A call without a cache waits as long as the service has asked the one before."""
    jwt = kuzzle.login(ago=1800)
    kuzzle.next_answers.append(Answer(503, b"", {"Retry-After": "1"}))
    with pytest.raises(UnavailableError, match="503"):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=None, queuable=False)
    began = time.monotonic()
    assert refresh_kuzzle_token(kuzzle.url, jwt, cache=None).kuid == "foo"
    assert time.monotonic() - began > 0.8
    assert len(kuzzle.requests) == 2


@pytest.mark.holds
def test_young_token_without_a_cache_and_without_time(kuzzle):
    """A call that cannot wait for the end of the second of the sign-in says so."""
    with pytest.raises(UnavailableError, match="may have issued this token just now"):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo"), cache=None, timeout=0.01)
    assert not kuzzle.requests


def test_keep_alive_hands_over(kuzzle):
    """New tokens are handed over in the thread that takes the outcomes, and again in the next run if that fails."""
    threads, saved = [], []

    def save(token):
        threads.append(threading.current_thread())
        if len(threads) <= 2:
            raise OSError
        saved.append(token)

    cache = TokenCache()
    auths = [
        KuzzleAuth(kuzzle.url, jwt, cache=cache, on_refresh=save)
        for jwt in (kuzzle.login(name, ago=3595) for name in ("one", "two"))
    ]
    runs = [sorted((each.outcome, type(each.error)) for each in keep_alive(auths)) for _ in range(3)]
    assert runs == [[("refreshed", OSError)] * 2, [("fresh", type(None))] * 2, [("fresh", type(None))] * 2]
    assert {token.jwt for token in saved} == {auth.jwt for auth in auths}
    assert {*threads} == {threading.current_thread()}


def test_keep_alive_hands_over_what_is_left(kuzzle):
    """Also what comes when nobody takes outcomes any more."""
    saved, gone = [], threading.Event()

    def sessions():
        for jwt in (kuzzle.login(name, ago=3595) for name in ("one", "two")):
            yield KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(), on_refresh=saved.append)
        while len(kuzzle.requests) < 2:
            time.sleep(0.001)
        gone.set()
        raise LookupError

    kuzzle.next_answers.extend([lambda request: gone.wait(10) and kuzzle.truly(request)] * 2)
    with pytest.raises(LookupError):
        list(keep_alive(sessions()))
    assert [*map(kuzzle.knows, saved)] == [True, True]


def test_keep_alive_says_what_nobody_takes(kuzzle, caplog):
    """What on_refresh raises when nobody takes outcomes any more is in the log, without its text."""

    def save(token):
        raise OSError(token.jwt)

    def sessions():
        yield KuzzleAuth(kuzzle.url, kuzzle.login(ago=3595), cache=TokenCache(), on_refresh=save)
        raise LookupError

    with pytest.raises(LookupError):
        list(keep_alive(sessions()))
    assert "on_refresh has failed (OSError)" in caplog.text
    assert "kauth-" not in caplog.text


def test_keep_alive_hands_over_after_an_interrupt(kuzzle):
    """If on_refresh is interrupted, the tokens of others that are there are handed over all the same."""
    saved = []

    def save(token):
        saved.append(token.jwt)
        if len(saved) == 1:
            time.sleep(0.5)  # until all are there
            raise KeyboardInterrupt

    jwts = [kuzzle.login(f"user-{number}", ago=3595) for number in range(4)]
    auths = [KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(), on_refresh=save) for jwt in jwts]
    with pytest.raises(KeyboardInterrupt):
        list(keep_alive(auths))
    assert {*saved} == {auth.jwt for auth in auths} - {*jwts}


def test_keep_alive_of_the_dead(kuzzle):
    """Who has to sign in again, and who never did, is told apart from who was refreshed."""
    cache = TokenCache()
    ended, alive = (KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache) for i in range(2))
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {ended.jwt}"}, timeout=9)
    nobody = KuzzleAuth(kuzzle.url, cache=cache)
    forever = KuzzleAuth(kuzzle.url, kuzzle.login("foo", expires_in="-1"), cache=cache)
    outcomes = {each.auth: each for each in keep_alive([ended, alive, nobody, forever])}
    assert [outcomes[each].outcome for each in (ended, alive, nobody, forever)] == [
        "ended", "refreshed", "skipped", "fresh",
    ]  # fmt: skip
    assert isinstance(outcomes[ended].error, SignInRequiredError)
    assert outcomes[ended].error.__traceback__ is None  # of thousands that are kept, it would hold all that they used
    assert outcomes[nobody].error is None


def test_keep_alive_in_an_outage(kuzzle):
    """After the first failure nothing more is sent to that service; another goes on. Then all are kept."""
    cache = TokenCache()
    with FakeKuzzle() as other:
        down = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache, timeout=1) for i in range(20)]
        up = [KuzzleAuth(other.url, other.login(f"u{i}", ago=3590), cache=cache) for i in range(3)]
        kuzzle.stop()
        began = time.monotonic()
        outcomes = {each.auth: each for each in keep_alive([*down, *up], at_once=2)}
        assert time.monotonic() - began < 5
    assert {outcomes[each].outcome for each in down} == {"skipped"}
    assert all(isinstance(outcomes[each].error, UnavailableError) for each in down)
    assert {outcomes[each].error.__traceback__ for each in down} == {None}  # as above
    assert {outcomes[each].outcome for each in up} == {"refreshed"}
    kuzzle.start()
    assert {each.outcome for each in keep_alive(down)} == {"refreshed"}


def test_keep_alive_without_a_store(circle, kuzzle, tmp_path):
    """Chains that nobody knows are left, and so are tokens that could not be kept."""
    cache = TokenCache(Broken(FileStore(tmp_path)))
    opaque = CircleAuth(user_token="u", refresh_token="r", device_id="d", api_key="k", base_url=circle.url, cache=cache)
    due = KuzzleAuth(kuzzle.url, kuzzle.login("foo", ago=3580), cache=cache, timeout=1)
    outcomes = list(keep_alive([opaque, due]))
    assert [each.outcome for each in outcomes] == ["skipped", "skipped"]
    assert all("Broken cannot be read" in str(each.error) for each in outcomes)
    assert [each.error.__traceback__ for each in outcomes] == [None, None]
    assert circle.requests == kuzzle.requests == []


def test_one_that_is_refused_stops_nobody(kuzzle):
    """What is wrong with one session is no outage."""
    cache = TokenCache()
    kuzzle.max_ttl = 3_600_000
    auths = [
        KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache, expires_in="9h" if i == 0 else None)
        for i in range(3)
    ]
    outcomes = {each.auth: each for each in keep_alive(auths, at_once=1)}
    assert [outcomes[each].outcome for each in auths] == ["skipped", "refreshed", "refreshed"]
    assert isinstance(outcomes[auths[0]].error, RequestRefusedError)


def test_user_who_leaves_while_kept_alive(kuzzle):
    """The error of a refresh is told also if nobody is signed in any more when it comes."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=3590), cache=TokenCache(), timeout=1)

    def leave(_request):
        auth.jwt = None
        return Answer(503)

    kuzzle.next_answers += [leave] * 9
    (outcome,) = keep_alive([auth])
    assert (outcome.outcome, type(outcome.error)) == ("skipped", UnavailableError)
    assert auth.jwt is None


@pytest.mark.holds
def test_one_that_is_young_stops_nobody(kuzzle):
    """That a token is too new to be refreshed within its timeout is no outage of the service."""
    cache, jwts = TokenCache(), [kuzzle.login(f"u{i}", ago=3590) for i in range(3)]
    auths = [KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=9 if i else 0.2) for i, jwt in enumerate(jwts)]
    outcomes = {each.auth: each for each in keep_alive(auths, at_once=1)}
    assert [outcomes[each].outcome for each in auths] == ["skipped", "refreshed", "refreshed"]


def test_on_refresh_fails(kuzzle):
    """The session is refreshed all the same, and the error is told."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login("foo", ago=3590), cache=TokenCache(), on_refresh=lambda _: 1 / 0)
    (outcome,) = keep_alive([auth])
    assert outcome.outcome == "refreshed"
    assert isinstance(outcome.error, ZeroDivisionError)


@pytest.mark.parametrize("error", [SignInRequiredError("x"), UnavailableError("x"), OutcomeUnknownError("x")])
def test_on_refresh_fails_like_a_service(kuzzle, error):
    """What goes wrong there is no verdict on the session, and no outage of its service."""

    def fail(token):
        raise error

    cache, jwts = TokenCache(), [kuzzle.login(f"u{i}", ago=3590) for i in range(3)]
    auths = [KuzzleAuth(kuzzle.url, jwt, cache=cache, on_refresh=None if i else fail) for i, jwt in enumerate(jwts)]
    outcomes = {each.auth: each for each in keep_alive(auths, at_once=1)}
    assert [outcomes[each].outcome for each in auths] == ["refreshed"] * 3
    assert outcomes[auths[0]].error is error


def test_outcomes_come_at_once(kuzzle):
    """What has come of a refresh is told before more is begun, also if there would be room."""
    cache = TokenCache()
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=60 if i else 3590), cache=cache) for i in range(4)]

    def slowly():
        for auth in auths:
            yield auth
            time.sleep(1)

    assert [each.outcome for each in keep_alive(slowly())].index("refreshed") < 3


def test_an_outage_while_others_wait_for_their_turn(kuzzle):
    """They are not sent any more, and need not wait."""
    cache = TokenCache()
    auths = [
        KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache, queuable=False, timeout=5)
        for i in range(4)
    ]
    kuzzle.next_answers.extend([lambda request: kuzzle.refuse(request, "unavailable")] * 99)
    assert {each.outcome for each in keep_alive(auths, per_second=0.5)} == {"skipped"}
    assert len(kuzzle.requests) == 1


def test_a_slow_store_is_given_up(kuzzle, tmp_path):
    """It does not cost its timeout once for each session."""
    store = Broken(FileStore(tmp_path))
    get = store.get

    def slowly(key):
        time.sleep(0.5)
        return get(key)

    store.get = slowly
    cache = TokenCache(store)
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache, timeout=1) for i in range(20)]
    began = time.monotonic()
    assert [each.outcome for each in keep_alive(auths)] == ["skipped"] * 20
    assert time.monotonic() - began < 8


def test_auths_end_with_an_error(kuzzle):
    """What was begun is told before."""
    cache = TokenCache()
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache) for i in range(3)]
    outcomes = []
    with pytest.raises(InvalidArgumentError, match="auths"):
        outcomes.extend(each.outcome for each in keep_alive([*auths, None]))
    assert outcomes == ["refreshed"] * 3


def test_a_run_is_left_in_an_outage(kuzzle):
    """What waits for the service does so no longer."""
    cache = TokenCache()
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590 * (i < 2)), cache=cache) for i in range(3)]
    kuzzle.stop()
    run = keep_alive(auths)
    assert next(run).outcome == "fresh"
    began = time.monotonic()
    run.close()
    assert time.monotonic() - began < 5


def test_rates(circle):
    """Circle takes five requests a second; another rate may be given."""
    cache = TokenCache()
    for rate, least in ((None, 0.8), (50, 0.08)):
        auths = [circle_auth(circle, circle.sign_in(f"user-{i}"), cache=cache) for i in range(6)]
        circle.clock.advance(3590)
        requests.get(f"{circle.url}/v1/w3s/user", auth=auths[0], timeout=9)  # its Date tells what time it is there
        times = []
        receive = circle.receive

        def note(request, times=times, receive=receive):
            times.append(time.monotonic())
            return receive(request)

        circle.receive = note
        assert [each.outcome for each in keep_alive(auths, at_once=5, per_second=rate)] == ["refreshed"] * 6
        assert times[-1] - times[0] >= least - 0.05
        circle.receive = receive


def test_rates_of_user_ids(circle):
    """There a refresh is two requests, and both count."""
    cache, times, receive = TokenCache(), [], circle.receive
    auths = [
        CircleAuth(
            refresh_token=pair.refresh_token,
            device_id="device-1",
            user_id=pair.user_id,
            api_key="TEST_API_KEY:fake-id:fake-secret",
            base_url=circle.url,
            cache=cache,
        )
        for pair in (circle.sign_in(f"user-{i}") for i in range(5))
    ]

    def note(request):
        times.append(time.monotonic())
        return receive(request)

    circle.receive = note
    assert [each.outcome for each in keep_alive(auths)] == ["refreshed"] * 5
    assert len(times) == 10
    assert times[-1] - times[0] >= 1.5


def test_a_run_is_left(kuzzle):
    """Who stops in the middle leaves no thread, and nothing undone that was begun."""
    cache = TokenCache()
    auths = [KuzzleAuth(kuzzle.url, kuzzle.login(f"u{i}", ago=3590), cache=cache) for i in range(9)]
    run = keep_alive(auths, at_once=2)
    next(run)
    run.close()
    assert len(kuzzle.requests) <= 4


@pytest.mark.parametrize(
    "arguments", [{"at_once": 0}, {"at_once": True}, {"at_once": 1.5}, {"per_second": 0}, {"per_second": "5"}]
)
def test_bad_arguments(arguments):
    """Found at once, not when the first outcome is asked for."""
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        keep_alive([], **arguments)


@pytest.mark.parametrize("auths", [["SECRET"], "SECRET", {"SECRET": "SECRET"}, None, 5])
def test_no_auth_object(auths):
    """What is no auth object is a clear error. It may be a token, which is not shown."""
    with pytest.raises(InvalidArgumentError, match="auths") as caught:
        list(keep_alive(auths))
    assert "SECRET" not in locals_of(caught.value)
    with pytest.raises(InvalidArgumentError, match="at_once") as caught:
        keep_alive(auths, at_once="SECRET")
    assert "SECRET" not in locals_of(caught.value)


# on_event


def test_events(kuzzle, events):
    """One for each exchange and each verdict, and none for a hit."""
    cache, jwt = TokenCache(on_event=events.append), kuzzle.login("foo", ago=1800)
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    (event,) = events
    assert (event.provider, event.outcome, event.spent, event.attempts, event.error) == (
        "kuzzle", "refreshed", True, 1, None,
    )  # fmt: skip
    assert event.successor == token.fingerprint
    assert event.seconds > 0
    assert jwt not in repr(event)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.outcome = "down"
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {token.jwt}"}, timeout=9)
    other = kuzzle.login("foo", ago=3000)
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {other}"}, timeout=9)
    for _ in range(2):
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(kuzzle.url, other, cache=cache)
    assert [(each.outcome, each.attempts) for each in events[1:]] == [("refused", 1), ("refused", 0)]


def test_events_of_failures(kuzzle, events):
    """A failure is down, unknown, or kept, if there is a token to go on with."""
    cache = TokenCache(on_event=events.append)
    jwt, due = kuzzle.login("foo", ago=1800), kuzzle.login("foo", ago=3590)
    auth = KuzzleAuth(kuzzle.url, due, cache=cache, timeout=1)
    kuzzle.lose_next()
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, queuable=False)
    kuzzle.stop()
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=60), cache=cache, queuable=False)
    request = requests.Request("GET", f"{kuzzle.url}/_me", auth=auth).prepare()
    assert request.headers["Authorization"] == f"Bearer {due}"
    assert [(each.outcome, each.spent) for each in events] == [("unknown", None), ("down", False), ("kept", False)]
    assert all(each.error is not None for each in events)


def test_adopted(kuzzle, events, tmp_path):
    """What another process has refreshed is adopted, once."""
    jwt = kuzzle.login("foo", ago=1800)
    refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(FileStore(tmp_path)))
    cache = TokenCache(FileStore(tmp_path), on_event=events.append)
    for _ in range(3):
        token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
        time.sleep(0.6)
    assert [(each.outcome, each.successor, each.attempts) for each in events] == [("adopted", token.fingerprint, 0)]
    newer = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h", cache=TokenCache(FileStore(tmp_path)))
    assert refresh_kuzzle_token(kuzzle.url, jwt, cache=cache) == newer
    found = [(each.outcome, each.fingerprint, each.successor, each.spent) for each in events[1:]]
    assert found == [("adopted", token.fingerprint, newer.fingerprint, True)]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_on_event_fails(kuzzle, caplog, error):
    """That is logged, and harms nothing."""

    def fail(event):
        raise error("mine")

    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=60), cache=TokenCache(on_event=fail))
    assert token.kuid == "foo"
    assert "on_event" in caplog.text


def test_on_event_calls(kuzzle, events):
    """It may use the cache that it is called by, also for the same session."""
    jwt = kuzzle.login("foo", ago=1800)

    def look(event):
        events.append((event.outcome, refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)))

    cache = TokenCache(on_event=look)
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=5)
    assert events == [("refreshed", token)]


def test_on_event_while_an_answer_is_not_kept(kuzzle, tmp_path, events):
    """As long as the new token is not written down, nobody else gets the lock, whoever hears of it."""

    class Full(FileStore):
        is_full = True

        def set(self, key, value, seconds):
            if self.is_full and '"token"' in value:
                raise OSError
            super().set(key, value, seconds)

    def note(event):
        events.append((event.outcome, FileStore(tmp_path).acquire(key_of("kuzzle:2", kuzzle.url, jwt), "other", 5) > 0))
        store.is_full = False

    jwt, store = kuzzle.login("foo", ago=1800), Full(tmp_path)
    refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(store, on_event=note))
    assert events == [("refreshed", True)]


@pytest.mark.parametrize("fault", [None, "refused", "lost", "unavailable"])
def test_on_event_signs_out(kuzzle, events, fault):
    """It may end the session, too: what it hears of no longer holds the lock."""
    jwt = kuzzle.login("foo", ago=1800)
    if fault is not None:
        kuzzle.suffer(fault)

    def end(event):
        began = time.monotonic()
        KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=5).sign_out()
        events.append((event.outcome, time.monotonic() - began < 3))

    cache = TokenCache(on_event=end)
    with contextlib.suppress(RefreshError):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=9, queuable=False)
    outcome = {None: "refreshed", "refused": "refused", "lost": "unknown", "unavailable": "down"}[fault]
    assert events == [(outcome, True)]


def test_context_of_events(kuzzle, events):
    """They come in the context of the call that caused them."""
    request = contextvars.ContextVar("request")
    cache = TokenCache(on_event=lambda event: events.append(request.get()))
    request.set("r-1")
    refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=60), cache=cache)
    assert events == ["r-1"]


@pytest.mark.parametrize("name", ["clock", "on_wait", "on_event"])
def test_no_function(name):
    """What cannot be called is refused when it is handed over."""
    with pytest.raises(InvalidArgumentError, match=f"^{name} must be a function, or None"):
        TokenCache(**{name: 7})


def test_no_runtime():
    """Nor is what cannot stand in for the system."""
    with pytest.raises(InvalidArgumentError, match=r"^runtime must be a Runtime"):
        TokenCache(runtime=7)


def test_copies_have_it_too(kuzzle):
    """A cache that was pickled tells the same function."""
    cache = pickle.loads(pickle.dumps(TokenCache(on_event=print)))
    assert cache._on_event is print


class OfTenant(TokenCache):
    """A cache with something of its own."""

    tenant = "nobody"


def test_copies_have_what_a_subclass_adds():
    """Whoever derives a class from TokenCache finds its attributes in a copy."""
    cache = OfTenant()
    cache.tenant = "acme"
    assert pickle.loads(pickle.dumps(cache)).tenant == "acme"


def recipes():
    """Give the recipes of RefreshEvent, as a reader would copy them."""
    blocks = inspect.getdoc(RefreshEvent).split("::\n")[1:]
    return [textwrap.dedent(re.match(r"(?:\s*\n|    .*\n?)+", block)[0]) for block in blocks]


def test_recipes(kuzzle):
    """The recipes for Prometheus and OpenTelemetry run, and count."""
    prometheus, telemetry = recipes()
    names = {"TokenCache": TokenCache}
    exec(prometheus, names)
    refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=60), cache=names["cache"])
    shown = prometheus_client.generate_latest().decode()
    assert 'refreshes_total{outcome="refreshed",provider="kuzzle"} 1.0' in shown
    assert 'refresh_seconds_count{provider="kuzzle"} 1.0' in shown
    exec(telemetry, names)
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("view"):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=120), cache=names["cache"])
    (span,) = exporter.get_finished_spans()
    (event,) = span.events
    assert (event.name, event.attributes["outcome"]) == ("refresh", "refreshed")


def test_a_pause_that_is_longer_than_a_call_has(kuzzle):
    """A call without a cache sends nothing, and does not wait, if the service has asked the one before for more."""
    jwt = kuzzle.login(ago=1800)
    kuzzle.next_answers.append(Answer(503, b"", {"Retry-After": "3"}))
    with pytest.raises(UnavailableError, match="503"):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=None, queuable=False)
    for arguments in ({"timeout": 0.5}, {"queuable": False}):
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="asked to wait: try again in 3 s") as caught:
            refresh_kuzzle_token(kuzzle.url, jwt, cache=None, **arguments)
        assert 2 < caught.value.retry_after <= 3
        assert time.monotonic() - began < 1
    assert len(kuzzle.requests) == 1


def test_a_session_that_is_signed_out_while_it_waits_for_its_turn(kuzzle):
    """Nothing is sent for it, and the run goes on."""
    auths = [KuzzleAuth(kuzzle.url, jwt) for jwt in (kuzzle.login(user, ago=3595) for user in ("foo", "bar"))]
    kuzzle.delay_next(0.3)
    outcomes = []
    for outcome in keep_alive(auths, at_once=1):
        auths[1].jwt = None
        outcomes.append((outcome.outcome, outcome.error))
    assert outcomes == [("refreshed", None), ("skipped", None)]
    assert len(kuzzle.requests) == 1


def test_longer_lifetime_of_a_session_that_is_kept_alive(kuzzle):
    """It is refreshed, though it is fresh, if its auth object asks for a longer life."""
    cache, root = TokenCache(), kuzzle.login(ago=1800)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    auth = KuzzleAuth(kuzzle.url, root, expires_in="30d", cache=cache)
    assert [outcome.outcome for _ in range(2) for outcome in keep_alive([auth])] == ["refreshed", "fresh"]
