"""Refresh once: one request for all who need one new token, and none for those who have it already."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import requests
from cryptography.fernet import Fernet
from helpers import call_with, wait_until

import refresher._api
import refresher._cache
import refresher._ledger
import refresher._runtime
import refresher._system
from refresher import (
    SHARED_CACHE,
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
    _runtime,
    keep_alive,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher._flight import Flight
from refresher._ledger import Call
from refresher._rules import KEY, Chain
from refresher._runtime import HALF_A_DAY, Memo, Runtime
from refresher.services.kuzzle import credential as kuzzle_credential
from refresher.testing import Answer, FakeCircle, FakeKuzzle

HOUR = 3600


@pytest.fixture
def store(clock):
    return MemoryStore(timer=clock)


@pytest.fixture
def cache(store, clock):
    return TokenCache(store, clock=clock)


@pytest.fixture
def root(kuzzle, clock):
    """A token that has been there for a while."""
    jwt = kuzzle.login()
    clock.advance(1800)
    return jwt


def together(count, call):
    """Let threads do the same at once, and list what each got or was refused with."""
    barrier = threading.Barrier(count)

    def one(number):
        barrier.wait()
        try:
            return call(number)
        except RefreshError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# Successors


@pytest.mark.no_cover  # it takes three times as long
def test_a_year_of_kuzzle_tokens(kuzzle, cache, store, clock, root):
    """The same call, for a year: always a usable token, one request a lifetime, and no more to remember."""
    sizes = []
    for lifetimes in range(1, 24 * 365 + 1):
        token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
        assert kuzzle.knows(token.jwt)
        assert len(kuzzle.requests) == lifetimes
        clock.advance(HOUR - 20)
        if lifetimes % 1000 == 0:
            sizes.append(len(store.keys()))
    # Spent tokens are remembered for a day: that many and no more, however long the chain.
    assert max(sizes) <= 2 * 24 + 10
    assert abs(sizes[-1] - sizes[0]) <= 1  # the last thread may not be done


def test_memory_of_a_cache(kuzzle, cache, clock, root, monkeypatch):
    """Nor does a cache itself keep what was not used for a day."""
    steady_clock(monkeypatch, clock)
    sizes = []
    for _ in range(24 * 6):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
        clock.advance(HOUR - 20)
        sizes.append(sum(len(each.keys()) for each in vars(cache._ledger).values() if isinstance(each, Memo)))
    assert max(sizes[:48]) == max(sizes) < 100


@pytest.mark.parametrize("rotate", [True, False], ids=["new refresh tokens", "one refresh token"])
def test_a_month_of_circle_pairs(cache, clock, rotate):
    """The same call, for 30 days, also where no answer brings a new refresh token."""
    with FakeCircle(clock=clock, rotate=rotate) as circle:
        call = call_with(circle, circle.sign_in())
        for lifetimes in range(1, 24 * 30 + 1):
            token = refresh_user_token(**call, cache=cache)
            assert circle.knows(token)
            assert refresh_user_token(**call, cache=cache) == token
            assert len(circle.requests) == lifetimes
            clock.advance(HOUR + 100 if lifetimes % 2 else HOUR - 20)


def test_any_token_of_a_chain_leads_to_the_last(kuzzle, circle, cache, clock, root):
    """Whoever holds an earlier token gets the newest, from the cache: for a day after it could be refreshed."""
    jwts, pairs = [root], [circle.sign_in()]
    for _ in range(24):
        jwts.append(refresh_kuzzle_token(kuzzle.url, jwts[len(jwts) // 2], cache=cache).jwt)
        pairs.append(refresh_user_token(**call_with(circle, pairs[len(pairs) // 2]), cache=cache))
        clock.advance(HOUR - 20)
    clock.advance(-HOUR)
    sent = len(kuzzle.requests), len(circle.requests)
    assert {refresh_kuzzle_token(kuzzle.url, jwt, cache=cache).jwt for jwt in jwts} == {jwts[-1]}
    assert {refresh_user_token(**call_with(circle, pair), cache=cache) for pair in pairs} == {pairs[-1]}
    assert (len(kuzzle.requests), len(circle.requests)) == sent == (24, 24)


def test_calls_are_free(kuzzle, cache, root):
    """A fresh token is the answer, if no longer lifetime is asked for; another server has tokens of its own."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert refresh_kuzzle_token(kuzzle.url + "/", root, expires_in="1h", cache=cache) == token
    assert refresh_kuzzle_token(kuzzle.url, token.jwt, cache=cache) == token
    assert len(kuzzle.requests) == 1
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url + "/prefix/..", root, cache=TokenCache())


def test_entries_vanish(kuzzle, circle, cache, store, clock, root):
    """What is of no more use is gone: a Kuzzle chain a day after its last token, a Circle pair after 31 days."""
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(25 * HOUR - 2)
    assert store.keys()
    clock.advance(2)
    assert store.keys() == []
    refresh_user_token(**call_with(circle, circle.sign_in()), cache=cache)
    clock.advance(31 * 24 * HOUR - 2)
    assert store.keys()
    clock.advance(2)
    assert store.keys() == []


def test_token_for_ever(kuzzle, cache, clock, root):
    """A token that never expires is never refreshed."""
    token = refresh_kuzzle_token(kuzzle.url, root, expires_in="-1", cache=cache)
    clock.advance(365 * 24 * HOUR)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    assert len(kuzzle.requests) == 1


def test_each_part_is_the_credential(circle, cache):
    """Another user token, refresh token or device is another credential."""
    circle.fail_next(155103, 4)
    call = {"user_token": "u", "refresh_token": "r", "device_id": "d", "api_key": "k", "base_url": circle.url}
    for changes in ({}, {"user_token": "v"}, {"refresh_token": "s"}, {"device_id": "e"}):
        with pytest.raises(SignInRequiredError):
            refresh_user_token(**{**call, **changes}, cache=cache)
    assert len(circle.requests) == 4


def test_shared_by_default(kuzzle, root):
    """Without a word about it, all calls of a process share one cache; None is none."""
    token = refresh_kuzzle_token(kuzzle.url, root)
    assert refresh_kuzzle_token(kuzzle.url, root) == token
    assert refresh_kuzzle_token(kuzzle.url, root, cache=SHARED_CACHE) == token
    assert len(kuzzle.requests) == 1
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=None)


@pytest.mark.holds
def test_no_cache(kuzzle, circle, root, monkeypatch):
    """Without a cache the caller does all of it, retries and the exchange of a user id too."""
    monkeypatch.setattr("refresher._rules._SHORTEST_PAUSE", 0.001)
    monkeypatch.setattr(Runtime, "start", lambda *_, **__: pytest.fail("nobody else is needed"))
    kuzzle.fail_next("api.process.overloaded", 2)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=None)
    assert kuzzle.knows(token.jwt)
    with FakeKuzzle() as new:
        token = refresh_kuzzle_token(new.url, new.login(), cache=None)
        token = refresh_kuzzle_token(new.url, token.jwt, cache=None)
        assert new.knows(token.jwt), "young tokens are held"
    pair = circle.sign_in()
    assert refresh_user_token(**by_id(circle, pair), cache=None).user_id == "user-1"
    circle.fail_next(155104)
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call_with(circle, circle.sign_in()), cache=None)
    assert paths(circle) == ["token", "refresh", "refresh"]


@pytest.mark.holds
@pytest.mark.parametrize("fresh_cache", [TokenCache, lambda: None])
def test_new_tokens_are_seen(fresh_cache):
    """A token counts as seen from when it was answered: a second later it is not held."""
    with FakeKuzzle() as kuzzle:
        token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=fresh_cache())
        time.sleep(1)
        started = time.monotonic()
        refresh_kuzzle_token(kuzzle.url, token.jwt, cache=fresh_cache())
        assert time.monotonic() - started < 0.9


@pytest.mark.parametrize("cache", ["planted", MemoryStore(), {}])
def test_what_is_no_cache(cache):
    """What is no cache is refused."""
    with pytest.raises(InvalidArgumentError, match=r"^cache must be"):
        refresh_kuzzle_token("http://127.0.0.1:1", "jwt", cache=cache)
    with pytest.raises(InvalidArgumentError, match=r"^cache must be"):
        refresh_user_token(user_token="u", refresh_token="r", device_id="d", api_key="k", cache=cache)


def test_cookie_mode(kuzzle, cache, root):
    """In cookie mode every session gets the last token into its jar, with or without a request."""
    one, two = requests.Session(), requests.Session()
    token = refresh_kuzzle_token(kuzzle.url, root, cookie_auth=True, session=one, cache=cache)
    assert token == refresh_kuzzle_token(kuzzle.url, root, cookie_auth=True, session=two, cache=cache)
    assert refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=two, cache=cache) == token
    assert one.cookies["authToken"] == two.cookies["authToken"] != root
    assert len(kuzzle.requests) == 1


# Threads


def test_threads_share_one_exchange(kuzzle, cache, clock, root):
    """64 threads, one token past its window: one request, 64 equal results."""
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 20)
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=0.2))
    results = together(64, lambda _: refresh_kuzzle_token(kuzzle.url, root, cache=cache))
    assert len(kuzzle.requests) == 2
    assert len(set(results)) == 1
    assert kuzzle.knows(results[0].jwt)


def test_threads_on_each_kuzzle(target):
    """Where those who lose a race would be refused, nobody races; and so again, with the new token."""
    jwt, cache = target.login(), TokenCache()
    for lifetime in ("1h", "3h"):
        results = together(64, lambda _: target.refresh(jwt, expires_in=lifetime, cache=cache))  # noqa: B023
        assert len(set(results)) == 1
        assert target.me(results[0].jwt) == 200
        cache._ledger._clock = lambda: time.time() + HOUR - 20


@pytest.mark.parametrize("id", ["security.token.invalid", "api.process.overloaded"])
def test_threads_share_an_error(kuzzle, cache, root, id):
    """The leader fails: 64 threads have the same error, each its own, after one request."""
    kuzzle.next_answers.append(
        lambda request: time.sleep(0.3) or Answer(503 if "over" in id else 401, {"error": {"id": id, "message": ""}})
    )
    results = together(64, lambda _: refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache))
    assert len(kuzzle.requests) == 1
    assert {(str(error), error.spent) for error in results} == {(str(results[0]), results[0].spent)}
    assert results[0].id == id
    assert len({*map(id_of, results)}) == 64
    assert len({id_of(error.__traceback__) for error in results}) == 64


id_of = id


def test_different_tokens_do_not_wait_for_each_other(kuzzle, cache, clock):
    """A slow exchange of one token holds up no other."""
    slow, quick = kuzzle.login("foo", "2h"), kuzzle.login("foo", "3h")
    clock.advance(1)
    release = threading.Event()
    kuzzle.next_answers.append(lambda request: release.wait(10) and kuzzle.truly(request))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, slow, cache=cache)
        while not kuzzle.requests:
            time.sleep(0.001)
        assert refresh_kuzzle_token(kuzzle.url, quick, cache=cache).kuid == "foo"
        assert not waiting.done()
        release.set()
        assert waiting.result().kuid == "foo"


def test_caller_gives_up_and_exchange_goes_on(kuzzle, cache, root):
    """A caller that gives up has its error in time; the next one has the token, without another request."""
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=0.8))
    with pytest.raises(OutcomeUnknownError, match="the refresh goes on") as caught:
        refresh_kuzzle_token(kuzzle.url, root, timeout=0.1, cache=cache)
    assert (caught.value.provider, caught.value.spent) == ("kuzzle", None)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 1


def test_circle_caller_gives_up(circle, cache):
    """On Circle the error has the key that a repetition would have, too."""
    call = call_with(circle, circle.sign_in())
    circle.next_answers.append(lambda request: circle.truly(request, after=0.5))
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_user_token(**call, timeout=0.1, cache=cache)
    assert caught.value.idempotency_key == circle.requests[0].json()["idempotencyKey"]
    assert refresh_user_token(**call, cache=cache).user_id == "user-1"
    assert len(circle.requests) == 1


def test_without_threads(kuzzle, cache, root, monkeypatch):
    """Where no thread can be started, the caller does the work."""
    start = threading.Thread.start

    def start_no_flight(thread):
        if thread.name.startswith("refresher"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_no_flight)
    with requests.Session() as session:
        assert refresh_kuzzle_token(kuzzle.url, root, cache=cache, session=session).kuid == "foo"
    done = []
    Runtime().start(lambda: done.append(1), daemon=True)
    assert not done, "what may be left undone is not worth a wait"


def test_handler_that_raises_while_a_thread_starts(monkeypatch):
    """Its own error is raised, whatever it is, and whatever was being handled."""
    truly, done = threading.Thread.start, threading.Event()

    class TimeLimitError(RuntimeError):
        pass

    def start(thread):
        truly(thread)
        done.wait(10)
        raise TimeLimitError("too slow")

    monkeypatch.setattr(threading.Thread, "start", start)
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(TimeLimitError):
            refresher._system.start_thread(done.set, daemon=True)


@pytest.mark.parametrize("error", [RuntimeError("deadlock"), RuntimeError("thread limit"), KeyError("limit")])
def test_handler_whose_error_looks_like_one_of_threads(monkeypatch, error):
    """It is raised nevertheless, and not what the caller was handling."""

    def end(*_):
        raise error

    before = signal.signal(signal.SIGTERM, end)
    monkeypatch.setattr(threading.Thread, "start", lambda _: signal.raise_signal(signal.SIGTERM))
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(type(error)) as caught:
            refresher._system.start_thread(int, daemon=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value is error


@pytest.mark.skipif(os.name != "posix", reason="no such signal")
def test_unavailable_error_of_a_signal_handler(kuzzle):
    """What a handler raises ends the call, whatever it is."""

    def stop(*_):
        raise StopError("stopped", spent=False)

    class StopError(UnavailableError):
        pass

    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=3590))
    kuzzle.delay_next(1.0)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(StopError):
            requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_interpreter_without_daemon_threads(monkeypatch):
    """Where none may be made, there is none."""

    def make(*_, **__):
        raise RuntimeError("daemon threads are not supported in this interpreter")

    monkeypatch.setattr(threading, "Thread", make)
    assert not refresher._system.start_thread(int, daemon=True)


def test_event():
    """An event that has happened has done so for all who wait for it, and for who comes later."""
    runtime = Runtime()
    event = runtime.event()
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(runtime.wait, event, 5) for _ in range(3)]
        time.sleep(0.1)
        event.set()
        assert [wait.result() for wait in waits] == [True] * 3
    assert runtime.wait(event, 0)


def test_clear_forgets_refusals(kuzzle, cache, root):
    """A refusal that is remembered is forgotten with the rest."""
    kuzzle.fail_next("security.token.invalid")
    for _ in range(2):
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    cache.clear()
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache).kuid == "foo"


@pytest.mark.parametrize(
    "forget", [lambda cache, *_: cache.clear(), lambda cache, *session: cache.forget(*session)], ids=["clear", "forget"]
)
def test_refusals_of_newest_tokens_are_forgotten(kuzzle, clock, root, tmp_path, forget):
    """Also in a store that others share."""
    cache = TokenCache(FileStore(tmp_path), clock=clock)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 20)
    kuzzle.fail_next("security.token.invalid")
    (outcome,) = keep_alive([KuzzleAuth(kuzzle.url, root, cache=cache)])
    assert outcome.outcome == "ended"
    forget(cache, kuzzle.url, root)
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, token.jwt, cache=cache).jwt)


def test_clear_of_what_another_cache_has_kept(kuzzle, root):
    """All of a MemoryStore's sessions end, and who has one in memory is told that what the store has is newer."""
    store = MemoryStore()
    theirs = TokenCache(store)
    theirs.forget(kuzzle.url, root)  # so that what follows has a high number
    refresh_kuzzle_token(kuzzle.url, root, cache=theirs)
    TokenCache(store).clear()
    assert theirs.peek(kuzzle.url, root).state == "unknown"


def test_clear_that_leaves_a_refusal(kuzzle, root, tmp_path, monkeypatch):
    """It says so: others would go by that."""
    cache = TokenCache(store := FileStore(tmp_path))
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    name, delete = f"{kuzzle_credential(kuzzle.url, token.jwt).keys[0]}-attempt", store.delete

    def fail(key):
        if key == name:
            raise ConnectionError
        delete(key)

    monkeypatch.setattr(store, "delete", fail)
    with pytest.raises(UnavailableError, match="call again"):
        cache.clear()


def test_what_is_over_is_not_put_back(kuzzle, clock, root, tmp_path):
    """A store that has dropped a session which nobody can refresh any more has lost nothing."""
    cache = TokenCache(store := FileStore(tmp_path), clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(26 * HOUR)
    store.delete(kuzzle_credential(kuzzle.url, root).keys[0])
    assert cache.peek(kuzzle.url, root).state == "unknown"
    assert not cache._ledger.unsaved


def test_cleared_while_the_service_asks_to_wait(kuzzle, cache, root):
    """Who asked to be left alone still is."""
    kuzzle.next_answers.append(Answer(429, b"", {"Retry-After": "30"}))
    for _ in range(2):
        with pytest.raises(UnavailableError):
            refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache)
        cache.clear()
    assert len(kuzzle.requests) == 1


def test_memo():
    """What is dropped is forgotten, and what is cleared, too."""
    memo = Memo(lambda: 0.0)
    for key in "abc":
        memo.put(key, key)
    memo.drop("a")
    assert (memo.get("a"), memo.keys()) == (None, {"b", "c"})
    memo.clear()
    assert memo.keys() == set()


def test_joining_a_refresh_as_it_ends(kuzzle, cache, root):
    """A call that finds a refresh at the moment it ends starts another, if that one did not help."""

    class Late(dict):
        def get(self, key, default=None):
            return ended.pop() if ended else super().get(key, default)

    ended = []
    cache._ledger.flights = Late()
    finish = Flight._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flight, "_finish", lambda flight, outcome: (finish(flight, outcome), ended.append(flight)))
        kuzzle.fail_next("api.process.overloaded")
        with pytest.raises(UnavailableError):
            refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache)
    assert len(ended) == 1
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache).kuid == "foo"
    assert len(kuzzle.requests) == 2


# Before the end


def test_service_down_while_the_token_lives(kuzzle, cache, clock, root, caplog, monkeypatch):
    """In the window, a failure that spent nothing is a warning and holds back the next try; later an error."""
    steady_clock(monkeypatch, clock)
    token = refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache)
    clock.advance(HOUR - 20)
    kuzzle.fail_next("api.process.overloaded", 3)
    assert refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache) == token
    assert "going on with the old token" in caplog.text
    assert refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache) == token
    assert len(kuzzle.requests) == 2, "the second call was held back"
    clock.advance(6)
    assert refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache) == token
    assert len(kuzzle.requests) == 3
    clock.advance(14)
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache)


def test_slow_service_while_the_token_lives(kuzzle, cache, clock, root, monkeypatch):
    """In the window, callers wait briefly and then go on with the token that lives."""
    monkeypatch.setattr(refresher._rules, "BRIEFLY", 0.05)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 20)
    release = threading.Event()
    kuzzle.next_answers.append(lambda request: release.wait(10) and kuzzle.truly(request))
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    assert refresh_kuzzle_token(kuzzle.url, root, timeout=None, cache=cache) == token
    release.set()
    while (new := refresh_kuzzle_token(kuzzle.url, root, cache=cache)) == token:
        time.sleep(0.001)
    assert kuzzle.knows(new.jwt)
    assert len(kuzzle.requests) == 2


def test_refused_while_the_token_lives(kuzzle, cache, clock, root):
    """In the window, a refusal of the token is an error: nobody knows whether it's spent."""
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 20)
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)


def test_jitter(kuzzle, cache):
    """1,000 tokens of one birth are refreshed over at least half of the window."""
    tokens = [kuzzle.login("foo", f"{7200 + number}s") for number in range(1000)]
    aheads = []
    for jwt in tokens:
        call = Call(credential=kuzzle_credential(url=kuzzle.url, jwt=jwt), own_will_do=True)
        _, _, ahead, _ = cache._ledger.assess(Chain(key=call.credential.keys[0]), call)
        aheads.append(ahead)
    assert max(aheads) - min(aheads) > 30
    assert min(aheads) > 20
    assert max(aheads) <= 60


@pytest.mark.parametrize(("lifetime", "window"), [("10s", 1), ("100s", 10), ("600s", 60), ("1y", 60)])
def test_window(kuzzle, cache, clock, root, monkeypatch, lifetime, window):
    """The window is a tenth of the lifetime, and a minute at most. A JWT may be a second older than it says."""
    steady_clock(monkeypatch, clock)
    token = refresh_kuzzle_token(kuzzle.url, root, expires_in=lifetime, cache=cache)
    clock.advance(token.ttl.total_seconds() - 1 - window - 0.1)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    clock.advance(window * 0.8)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) != token


# Circle's user ids


def by_id(circle, pair, **changes):
    call = call_with(circle, pair, user_id=pair.user_id, **changes)
    del call["user_token"]
    return call


def paths(circle):
    return [request.path.rpartition("/")[2] for request in circle.requests]


def test_one_exchange_for_each_chain(circle, cache):
    """A user id is exchanged when its chain begins, once for all threads; nothing of that is kept."""
    pairs = [circle.sign_in("user-1", f"device-{number}") for number in range(4)]

    def call(number):
        number %= 4
        return refresh_user_token(**by_id(circle, pairs[number], device_id=f"device-{number}"), cache=cache)

    tokens = together(16, call)
    assert all(circle.knows(token) for token in tokens)
    assert len(set(tokens)) == 4
    assert sorted(paths(circle)) == ["refresh"] * 4 + ["token"] * 4


def test_successors_of_a_user_id(circle, cache, clock):
    """What came of a user id is found by it and by the pair, and refreshed without another exchange."""
    pair = circle.sign_in()
    first = refresh_user_token(**by_id(circle, pair), cache=cache)
    clock.advance(2 * HOUR)
    second = refresh_user_token(**by_id(circle, pair), cache=cache)
    assert refresh_user_token(**by_id(circle, first), cache=cache) == second
    assert refresh_user_token(**call_with(circle, first), cache=cache) == second
    assert refresh_user_token(**call_with(circle, second), cache=cache) == second
    assert paths(circle) == ["token", "refresh", "refresh"]


def test_fresh_exchange_that_is_refused(circle, cache):
    """A user token that is refused right after its exchange is not exchanged again."""
    circle.next_answers.append(circle.truly)
    circle.fail_next(155104)
    with pytest.raises(SignInRequiredError, match="155104"):
        refresh_user_token(**by_id(circle, circle.sign_in()), cache=cache)
    assert paths(circle) == ["token", "refresh"]


# Refusals


def test_refusal_is_remembered(kuzzle, cache, clock, root):
    """A dead session is asked for once a minute; a new credential is not affected."""
    kuzzle.fail_next("security.token.invalid", 2)
    for _ in range(5):
        with pytest.raises(SignInRequiredError, match="401, security") as caught:
            refresh_kuzzle_token(kuzzle.url, root, cache=cache)
        assert (caught.value.id, caught.value.code, caught.value.status) == (
            "security.token.invalid",
            117506049,
            401,
        )
    assert len(kuzzle.requests) == 1
    clock.advance(61)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert len(kuzzle.requests) == 2
    jwt = kuzzle.login()
    clock.advance(1)
    assert refresh_kuzzle_token(kuzzle.url, jwt, cache=cache).kuid == "foo"


def test_other_failures_are_not_remembered(kuzzle, cache, root):
    """What may pass is tried again by the next call."""
    kuzzle.fail_next("api.process.overloaded")
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache)
    assert refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=cache).kuid == "foo"


# Clocks


@pytest.mark.parametrize("off", [-HOUR, HOUR, -365 * 24 * HOUR])
def test_wrong_clock(kuzzle, clock, root, off):
    """A clock that is an hour off, either way, changes nothing."""
    cache = TokenCache(clock=lambda: clock() + off)
    for lifetimes in range(1, 4):
        token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
        assert kuzzle.knows(token.jwt)
        clock.advance(HOUR - 61)
        assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
        assert len(kuzzle.requests) == lifetimes
        clock.advance(41)


def key(kuzzle, jwt):
    """What stores know a token by."""
    return kuzzle_credential(url=kuzzle.url, jwt=jwt).keys[0]


def steady_clock(monkeypatch, clock):
    """Let the steady clock be moved on with the fake one, which nobody sets."""
    steady, start = Runtime.steady, clock()
    monkeypatch.setattr(Runtime, "steady", lambda runtime: steady(runtime) + clock() - start)


def test_clock_set_back(kuzzle, clock, root, monkeypatch):
    """A clock that is set back by an hour hands out no dead token."""
    steady_clock(monkeypatch, clock)
    step = [0]
    monkeypatch.setattr(Runtime, "now", lambda _: clock() + step[0])
    cache = TokenCache()
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(1800)
    step[0] = -HOUR
    clock.advance(HOUR - 1820)
    for _ in range(10):
        assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt)
    assert len(kuzzle.requests) == 2


def test_clock_set_forward(kuzzle, clock, root, monkeypatch):
    """A clock that is set forward by an hour makes for one refresh ahead of time, and no storm."""
    steady_clock(monkeypatch, clock)
    step = [0]
    monkeypatch.setattr(Runtime, "now", lambda _: clock() + step[0])
    cache = TokenCache()
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(600)
    step[0] = HOUR
    for _ in range(10):
        assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt)
        clock.advance(60)
    assert len(kuzzle.requests) == 2


def test_entry_of_another_boot(kuzzle, clock, root, store, monkeypatch):
    """What another machine wrote is as old as the clocks say; from the future it counts as new."""
    steady_clock(monkeypatch, clock)
    cache = TokenCache(store, clock=clock)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    monkeypatch.setattr(refresher._runtime.REAL, "boot", "another")
    behind = TokenCache(store, clock=lambda: clock() - 2 * HOUR)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=behind) == token
    clock.advance(HOUR - 20)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) != token


def test_no_boot_id(monkeypatch):
    """Where the system has no name for a boot, each process is one of its own."""
    monkeypatch.setattr(refresher._system.Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert Runtime().boot != Runtime().boot


# Forgetting


def test_forget(kuzzle, cache, clock, root):
    """What is forgotten is asked for anew."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    cache.forget(kuzzle.url, token.jwt)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(1)
    assert refresh_kuzzle_token(kuzzle.url, token.jwt, cache=cache).jwt != token.jwt


class Vanishing(dict):
    """The flights of a cache that is cleared just when one of them wants to remove itself."""

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.clear()
        return found


def test_forget_at_the_end_of_a_refresh(kuzzle, cache, root):
    """Whoever waits for it has the answer."""
    cache._ledger.flights = Vanishing()
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5).jwt)


@pytest.mark.parametrize("which", [0, 1])
def test_wrong_key(kuzzle, root, which):
    """Who cannot read the entries of a session does not forget it, or know nothing of it, without a word."""
    store, keys = MemoryStore(), [Fernet.generate_key() for _ in range(2)]
    right, wrong = (TokenCache(EncryptedStore(store, key)) for key in keys)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=right)
    jwt = (root, token.jwt)[which]
    for command in (wrong.forget, wrong.peek):
        with pytest.raises(UnavailableError, match="an entry of this session that cannot be read: check its key"):
            command(kuzzle.url, jwt)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(EncryptedStore(store, keys[0]))) == token


def test_entry_that_could_not_be_read_for_a_moment(kuzzle, root):
    """What stood in the way for a moment is no matter once the session has been found."""
    inner, key = MemoryStore(), Fernet.generate_key()
    token = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(EncryptedStore(inner, key)))
    cache, (name,) = TokenCache(EncryptedStore(inner, key)), filter(KEY.fullmatch, inner.keys())
    entry = inner.get(name)
    inner.delete(name)
    inner.set(f"{name}-alias", "junk", 99)
    with pytest.raises(UnavailableError, match="cannot be read"):
        cache.peek(kuzzle.url, root)
    inner.set(name, entry, 99)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    cache.forget(kuzzle.url, root)
    assert cache.peek(kuzzle.url, root).state == "unknown"


def test_key_that_others_have_changed(kuzzle, root):
    """What this process knows of a session is told, though it cannot read what the store has of it by now."""
    store, (ours, theirs) = MemoryStore(), (Fernet.generate_key() for _ in range(2))
    cache = TokenCache(EncryptedStore(store, ours))
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    names = store.keys()
    for name in names:
        EncryptedStore(store, theirs).set(name, "{}", 99)
    assert cache.peek(kuzzle.url, root).state == "fresh"


@pytest.mark.parametrize("how", ["forget", "clear"])
def test_forgotten_tokens_are_gone(kuzzle, cache, root, how):
    """A cache holds no token that it has forgotten."""
    left = weakref.ref(refresh_kuzzle_token(kuzzle.url, root, cache=cache))
    assert left() is not None
    left = weakref.ref(refresh_kuzzle_token(kuzzle.url, root, cache=cache))
    assert left() is not None
    cache.forget(kuzzle.url, root) if how == "forget" else cache.clear()
    wait_until(lambda: gc.collect() + 1 and left() is None)  # a thread may not have ended yet


class Interrupted(dict):
    """What is looked up in it is put elsewhere by another thread at the same time."""

    def get(self, key):
        self.memo.put(key, "newer")
        return super().get(key)


def test_memory_of_two_threads(clock):
    """What one looks up after half a day does not take the place of what another remembers just now."""
    memo = Memo(clock)
    memo.put("key", "old")
    clock.advance(HALF_A_DAY + 1)
    memo.put("another", "value")
    memo._old = Interrupted(memo._old)
    memo._old.memo = memo
    assert memo.get("key") == memo.get("key") == "newer"


def test_forget_circle(circle, cache):
    """A pair is forgotten by any pair that led to it."""
    old = circle.sign_in()
    new = refresh_user_token(**call_with(circle, old), cache=cache)
    forgotten = {"refresh_token": old.refresh_token, "device_id": "device-1", "base_url": circle.url}
    cache.forget(user_token=old.user_token, **forgotten)
    assert refresh_user_token(**call_with(circle, new), cache=cache) != new
    assert len(circle.requests) == 2


@pytest.mark.parametrize("how", ["forget", "clear"])
@pytest.mark.parametrize("before", [0, 1])
def test_forget_while_a_refresh_is_under_way(kuzzle, cache, clock, root, how, before):
    """A refresh under way does not bring back what is forgotten; who waits for it gets it all the same."""
    jwt = root
    for _ in range(before):
        jwt = refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt
        clock.advance(HOUR - 20)
    release = threading.Event()
    kuzzle.next_answers.append(lambda request: release.wait(10) and kuzzle.truly(request))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache)
        while len(kuzzle.requests) == before:
            time.sleep(0.001)
        cache.forget(kuzzle.url, root) if how == "forget" else cache.clear()
        release.set()
        assert waiting.result(10) is not None
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert kuzzle.requests[-1].headers["Authorization"] == f"Bearer {root}"
    assert jwt is not None


def test_call_after_forgetting_does_not_join(kuzzle, cache, root):
    """A call after forgetting does not wait for the refresh that was under way before."""
    release = threading.Event()
    kuzzle.next_answers.append(lambda request: release.wait(10) and b"")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, root, queuable=False, cache=cache)
        while not kuzzle.requests:
            time.sleep(0.001)
        cache.forget(kuzzle.url, root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryStore, "acquire", lambda *_: 0.0)
            assert refresh_kuzzle_token(kuzzle.url, root, cache=cache).kuid == "foo"
        assert not waiting.done()
        release.set()
        with pytest.raises(OutcomeUnknownError):
            waiting.result(10)


# Forks


FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@FORKS
def test_fork_while_threads_refresh(kuzzle, cache, clock, root):
    """A child that is forked while another thread refreshes works at once, on connections of its own."""
    other = kuzzle.login("foo", "2h")
    clock.advance(1)
    release = threading.Event()
    kuzzle.next_answers.append(lambda request: release.wait(10) and kuzzle.truly(request))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache)
        while not kuzzle.requests:
            time.sleep(0.001)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                mine = refresh_kuzzle_token(kuzzle.url, other, cache=cache, timeout=5)
                os.write(write, f"{kuzzle.url} {mine.kuid} {len(cache._ledger.flights)}".encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read, 1000).decode() == f"{kuzzle.url} foo 0"
        release.set()
        assert waiting.result(10).kuid == "foo"
    os.close(read)
    os.close(write)


@FORKS
@pytest.mark.no_cover  # the child would wait for coverage's own lock for ever, if another thread had it
def test_fork_in_mid_change(store):
    """A child that is forked while other threads change the store finds it whole, and no lock held by them."""
    stop = threading.Event()

    def change(number):
        while not stop.is_set():
            store.acquire("lock", f"owner-{number}", 60)
            store.set("key", "theirs" * 100, 60)
            store.delete("key")
            store.release("lock", f"owner-{number}")

    with ThreadPoolExecutor(2) as pool:
        pool.map(change, range(2))
        try:
            for _ in range(20):
                pid = os.fork()
                if pid == 0:
                    got = store.acquire("lock", "mine", 60) == 0.0
                    store.set("key", "mine", 60)
                    os._exit(0 if got and store.get("key") == "mine" else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()


# Secrets


def test_keys_tell_nothing(kuzzle, circle, cache, store, root, caplog):
    """No key and no line in the log has a token in it, or enough of one to be of use."""
    caplog.set_level(logging.DEBUG)
    pair = circle.sign_in()
    new = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    newer = refresh_user_token(**by_id(circle, pair), cache=cache)
    told = " ".join([*store.keys(), caplog.text])
    for secret in (
        root,
        new.jwt,
        pair.refresh_token,
        newer.refresh_token,
        newer.user_token,
        newer.encryption_key,
    ):
        pieces = [secret[start : start + 12] for start in range(len(secret) - 12)]
        assert [piece for piece in pieces if piece in told] == []


def told(what):
    """A cache that writes down what its callers wait for."""
    return TokenCache(on_wait=lambda *told: what.append(told))


def test_on_wait(kuzzle, root):
    """A call that waits for more than a second tells what for, and how long. One that is quick says nothing."""
    what = []
    cache = told(what)
    kuzzle.delay_next(0.1)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert what == []
    cache.clear()
    kuzzle.clock.advance(-1)
    fresh = kuzzle.login("foo", "2h")
    kuzzle.clock.advance(1)
    kuzzle.fail_next("api.process.overloaded")
    kuzzle.delay_next(1.5)
    refresh_kuzzle_token(kuzzle.url, fresh, cache=cache, timeout=20)
    *waits, end = what
    assert [text for text, _ in waits] == ["Kuzzle is busy or down: try again later (503, api.process.overloaded)"]
    assert 18 < waits[0][1] < 20
    assert end == ("", None)


def test_on_wait_for_ever(kuzzle, root):
    """Without a timeout there is no end to tell."""
    what = []
    kuzzle.delay_next(1.2)
    refresh_kuzzle_token(kuzzle.url, root, cache=told(what), timeout=None)
    assert what == [("Kuzzle is slow", None), ("", None)]


def test_on_wait_for_the_exchange(circle):
    """What the exchange before a refresh waits for is told in the same place, once."""
    what = []
    circle.fail_next(5)
    circle.delay_next(1.3)
    call = call_with(circle, circle.sign_in(), user_token=None, user_id="user-1")
    refresh_user_token(**call, cache=told(what))
    assert what[-1] == ("", None)
    assert {text for text, _ in what[:-1]} <= {"Circle is busy or down: try again later (429, 5)", "Circle is slow"}
    assert 2 <= len(what) <= 3


def test_on_wait_without_a_cache(kuzzle, root, monkeypatch):
    """Without a cache a call tells what it tries again for."""
    what = []
    monkeypatch.setattr(refresher._cache, "show_wait", lambda *told: what.append(told))
    kuzzle.fail_next("api.process.overloaded")
    refresh_kuzzle_token(kuzzle.url, root, timeout=20, cache=None)
    (busy, left), end = what
    assert busy == "Kuzzle is busy or down: try again later (503, api.process.overloaded)"
    assert 19 < left < 20
    assert end == ("", None)


@pytest.mark.holds
def test_on_wait_for_a_young_token_without_a_cache(monkeypatch):
    """Without a cache, too, a call says why it does not begin."""
    what = []
    monkeypatch.setattr(refresher._cache, "show_wait", lambda *told: what.append(told))
    with FakeKuzzle() as kuzzle:
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(), timeout=20, cache=None)
    (young, left), end = what
    assert young == "Kuzzle may have issued this token just now"
    assert 19 < left <= 20
    assert end == ("", None)


def test_on_wait_for_another(kuzzle, clock, tmp_path):
    """Who waits for the lock of another process says so."""
    clock.advance(1800)
    what, root = [], kuzzle.login()
    store = FileStore(tmp_path / "store")
    cache = TokenCache(store, on_wait=lambda *told: what.append(told))
    assert store.acquire(key(kuzzle, root), "another", 5) == 0.0
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=1.5)
    assert what[0][0] == "another process is refreshing the Kuzzle token"


def test_last_second_behind_a_lock(kuzzle, clock, tmp_path):
    """A service may count a second later than it seems, so a token is not given up while a lock is waited for."""
    cache = TokenCache(store := FileStore(tmp_path / "store"), clock=clock)
    refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache)  # tells what time it is there
    clock.advance(-clock() % 1)
    root = kuzzle.login()
    clock.advance(HOUR - 0.9)
    assert store.acquire(key(kuzzle, root), "another", 5) == 0.0
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=3)
    assert kuzzle.knows(token.jwt)


@pytest.mark.holds
def test_on_wait_for_a_young_token(monkeypatch):
    """What a second went by with is told at its end, not what comes then."""
    what = []
    with FakeKuzzle() as kuzzle:
        kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=0.5))
        cache = TokenCache(on_wait=lambda *told: what.append(told[0]))
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache)
    assert what == ["Kuzzle may have issued this token just now", ""]


def test_ahead(kuzzle, clock, root, monkeypatch):
    """A cache can refresh further ahead, but not before half the life of a token is over."""
    steady_clock(monkeypatch, clock)
    for ahead, early, late in ((900, HOUR - 905, 10), (1e8, HOUR / 2 - 5, 10)):
        cache = TokenCache(ahead=ahead, clock=clock)
        token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
        clock.advance(early)
        assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
        clock.advance(late)
        root = refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt
        assert root != token.jwt
        clock.advance(1)


def test_decisions_are_logged(kuzzle, clock, root, caplog, monkeypatch):
    """At level DEBUG the log tells why a request was sent or not."""
    steady_clock(monkeypatch, clock)
    caplog.set_level(logging.DEBUG, "refresher")
    cache = TokenCache(clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 20)
    kuzzle.fail_next("api.process.overloaded", 2)
    for _ in range(2):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, queuable=False)
    chain = key(kuzzle, root)[:8]
    decisions = [record.message for record in caplog.records if record.levelno == logging.DEBUG]
    assert [text.removeprefix("kuzzle ") for text in decisions if chain in text] == [
        f"{chain}: to be refreshed",
        f"{chain}: fresh, 3599 s left",
        f"{chain}: to be refreshed",
        f"{chain}: 19 s left, and not now",
    ]


def test_same_call_again(kuzzle, circle, cache, root):
    """The same call gives the same object, and a call with other arguments an equal one, without a request."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    first = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) is first
    with requests.Session() as session:
        for other in ({"expires_in": "1h"}, {"timeout": 5}, {"queuable": False}, {"session": session}):
            again = refresh_kuzzle_token(kuzzle.url, root, cache=cache, **other)
            assert again == first == token
    call = call_with(circle, circle.sign_in(), cache=cache)
    refresh_user_token(**call)
    assert refresh_user_token(**call) is refresh_user_token(**call)
    assert len(kuzzle.requests) == len(circle.requests) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expires_in", "planted"),
        ("timeout", []),
        ("strategy", ""),
        ("session", 5),
        ("cookie_auth", 1),
        ("url", {}),
    ],
)
def test_bad_arguments_after_a_good_call(kuzzle, cache, root, name, value):
    """A fresh token in the cache is no excuse for a wrong argument."""
    for _ in range(2):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    with pytest.raises(InvalidArgumentError, match=f"^{name} "):
        refresh_kuzzle_token(**{"url": kuzzle.url, "jwt": root, "cache": cache, name: value})


def test_same_call_after_others(kuzzle, clock, store, root, monkeypatch):
    """What others have made of a token counts at once, also where the same call was made before."""
    steady_clock(monkeypatch, clock)
    mine, theirs = TokenCache(store, clock=clock), TokenCache(store, clock=clock, ahead=HOUR / 2)
    for _ in range(2):
        first = refresh_kuzzle_token(kuzzle.url, root, cache=mine)
    clock.advance(HOUR / 2)
    second = refresh_kuzzle_token(kuzzle.url, root, cache=theirs)
    assert second != first
    assert refresh_kuzzle_token(kuzzle.url, root, cache=mine) == second
    theirs.forget(kuzzle.url, root)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=mine)


@pytest.mark.parametrize("which", ["wall clock", "steady clock"])
def test_same_call_when_time_is_over(kuzzle, clock, cache, root, monkeypatch, which):
    """Either clock ends it: one may have been set, the other may not be ours."""
    moved = {"wall clock": 0.0, "steady clock": 0.0}
    monkeypatch.setattr(time, "clock_gettime", lambda _: 1e6 + moved["steady clock"])
    cache = TokenCache(clock=lambda: clock() + moved["wall clock"])
    for _ in range(2):
        token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    moved[which] = HOUR - 5
    kuzzle.clock.advance(HOUR - 5)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) != token


def test_many_different_calls(kuzzle, cache, root, monkeypatch):
    """However many different calls are made, the memory of them stays small."""
    monkeypatch.setattr(refresher._ledger, "MOST", 10)
    for seconds in range(1, 100):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=seconds)
    assert len(cache._ledger.chains.keys()) == len(cache._ledger._looked_at.keys()) == 1
    assert len(kuzzle.requests) == 1
    assert cache._ledger._calls(cache._ledger.runtime.steady() // HALF_A_DAY).cache_info().currsize == 10


@pytest.mark.parametrize("make", [lambda _: MemoryStore(), FileStore], ids=["MemoryStore", "FileStore"])
def test_same_call_after_a_change(kuzzle, root, tmp_path, make):
    """What this process did since counts at once, and half a second later what others did."""
    store = make(tmp_path)
    mine, theirs = TokenCache(store), TokenCache(store)
    call = functools.partial(refresh_kuzzle_token, kuzzle.url, root, cache=mine)
    for cache, lifetime, seconds in (
        (mine, "2h", 0),
        (theirs, "3h", 0 if isinstance(store, MemoryStore) else 0.55),
    ):
        before = [call() for _ in range(3)][-1]
        after = refresh_kuzzle_token(kuzzle.url, root, cache=cache, expires_in=lifetime)
        time.sleep(seconds)
        assert call() == after != before
        assert call() is call()
    assert len(kuzzle.requests) == 3
    mine.forget(kuzzle.url, root)
    with pytest.raises(SignInRequiredError):
        call()


@pytest.mark.parametrize("which", ["time", "steady"])
def test_same_call_when_a_clock_of_the_system_is_over(kuzzle, clock, root, monkeypatch, which):
    """Either clock ends it here, too: one may have been set, or frozen for a test."""
    moved, now, steady = {"time": 0.0, "steady": 0.0}, time.time, _runtime._STEADY
    monkeypatch.setattr(time, "time", lambda: now() + moved["time"])
    monkeypatch.setattr(_runtime, "_STEADY", lambda: steady() + moved["steady"])
    call = functools.partial(refresh_kuzzle_token, kuzzle.url, root, cache=TokenCache(runtime=Runtime()))
    token = [call() for _ in range(3)][-1]
    for seconds in (HOUR - 120, 115):
        assert call() is token
        moved[which] += seconds
        clock.advance(seconds)
    assert call() != token


def test_same_call_after_half_a_day(kuzzle, root, monkeypatch):
    """What was not called for half a day takes no room any more."""
    cache, now = TokenCache(runtime=Runtime()), [0.0]
    monkeypatch.setattr(_runtime, "_STEADY", lambda: now[0])
    sizes = []
    for seconds in (1, 2, 3):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, expires_in="7d", timeout=seconds)
        sizes.append(cache._ledger._calls(now[0] // HALF_A_DAY).cache_info().currsize)
        now[0] += 0.75 * HALF_A_DAY
    assert sizes == [1, 2, 1]


def test_threads_end(kuzzle, clock, root):
    """When a refresh is over, so are its threads."""
    before = threading.active_count()
    for _ in range(20):
        root = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache()).jwt
        clock.advance(2)
    assert threading.active_count() <= before + 3
    deadline = time.monotonic() + 5
    while any(thread.name == "refresher" and not thread.daemon for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("daemon", [False, True])
def test_end_of_a_process(daemon):
    """A process that ends, a forked one too, waits for what was started, but not for a daemon."""
    program = f"""
        import os, time
        from refresher._runtime import REAL
        REAL.start(lambda: None, daemon={daemon})
        if os.fork() == 0:
            REAL.start(lambda: (time.sleep(0.5), print("done", flush=True)), daemon={daemon})
        else:
            os.wait()
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # that this process has threads, and forks
    command = [sys.executable, "-c", textwrap.dedent(program)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=20).stdout
    assert out == ("" if daemon else "done\n")


@pytest.mark.parametrize("name", ["lease", "ahead"])
@pytest.mark.parametrize("value", ["planted", -1, float("nan"), True, timedelta(hours=1)], ids=repr)
def test_bad_settings(name, value):
    """What is no number of seconds is named when the cache is made."""
    with pytest.raises(InvalidArgumentError, match=f"^{name} must be a number of seconds"):
        TokenCache(**{name: value})


@pytest.mark.parametrize("cache", [pytest.param(None, id="none"), pytest.param(TokenCache(), id="its own")])
def test_time_is_up_while_connecting(kuzzle, root, monkeypatch, cache):
    """A call whose time ended while it was connecting says that the service could not be reached."""

    def send(*_, **__):
        time.sleep(0.2)
        raise UnavailableError("Kuzzle could not be reached", provider="kuzzle", spent=False, retryable=True)

    monkeypatch.setattr(Runtime, "send", send)
    monkeypatch.setattr("refresher._cache._GRACE", 5.0)
    with pytest.raises(UnavailableError, match="could not be reached"):
        refresh_kuzzle_token(kuzzle.url, root, timeout=0.1, cache=cache)


class Sluggish(Runtime):
    """Its threads take a while to begin."""

    def start(self, work, *, daemon=False):
        super().start(lambda: (time.sleep(0.25), work()), daemon=daemon)


def test_threads_that_are_slow_to_begin(kuzzle, root):
    """Who waits starts another one, and the token is spent once all the same."""
    kuzzle.delay_next(0.6)
    cache = TokenCache(runtime=Sluggish())
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 1


class Stillborn(Runtime):
    """Whoever starts its first thread is interrupted before that begins."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def start(self, work, *, daemon=False):
        when, self.when = self.when, None
        if when is not None:
            when()
            raise KeyboardInterrupt
        super().start(work, daemon=daemon)


def test_whoever_was_about_to_start_a_refresh_was_interrupted(kuzzle, root):
    """Who waits for the same refresh starts it."""

    def when():
        (flight,) = cache._ledger.flights.values()
        while len(flight.waiters) < 2 and not flight.is_running:  # who came may have started it already
            time.sleep(0.01)

    cache = TokenCache(runtime=Stillborn(when))
    with ThreadPoolExecutor() as pool:
        one, two = (pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, timeout=5) for _ in range(2))
        errors = [one.exception(), two.exception()]
    assert {type(error) for error in errors} == {type(None), KeyboardInterrupt}
    assert len(kuzzle.requests) == 1


def test_pauses_without_a_cache(kuzzle, root, monkeypatch):
    """A service that is busy is not hammered, and a call that has to wait does not spin."""
    told = []
    monkeypatch.setattr("refresher._cache.show_wait", lambda *what: told.append(what))
    kuzzle.fail_next("api.process.overloaded", 1000)
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, cache=None, timeout=1)
    assert len(kuzzle.requests) < 50
    kuzzle.next_answers.clear()
    kuzzle.next_answers.append(Answer(503, b"", {"Retry-After": "1"}))
    with pytest.raises(UnavailableError, match="503"):
        refresh_kuzzle_token(kuzzle.url, root, cache=None, queuable=False)
    told.clear()
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=None).jwt)
    assert len(told) < 10


def test_on_wait_at_the_end_of_a_call(kuzzle, root):
    """What is left is never less than nothing."""
    what = []
    cache = TokenCache(on_wait=lambda *told: what.append(told))
    kuzzle.delay_next(4)
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=1.5)
    assert what[-1] == ("", None)
    assert what[:-1]
    assert all(left >= 0 for _, left in what[:-1])
