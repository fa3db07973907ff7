"""
The one rule: while a session is alive, nobody is told to sign in, and no working token is thrown away.

Each test here is a way in which that was once broken.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import attrs
import pytest
import redis
import requests
import time_machine
from helpers import by_id, call_with, jwt_with, wait_until

from refresher import (
    CircleAuth,
    FileStore,
    InvalidArgumentError,
    KuzzleAuth,
    MemoryStore,
    OutcomeUnknownError,
    RedisStore,
    RefreshError,
    ReplyError,
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
from refresher._exchange import Observed
from refresher._flight import Flight, Waiter
from refresher._ledger import Call, Lease, Ledger
from refresher._rules import Attempt, Instant, Left, Lock, asker
from refresher._runtime import REAL, EndingError, Runtime
from refresher._text import Secret, key_of
from refresher.services import Reply
from refresher.services.circle import credential as circle_credential
from refresher.services.kuzzle import credential as kuzzle_credential
from refresher.testing import Answer, Clock, FakeCircle, FakeKuzzle

HOUR = 3600


class SharedStore:
    """Entries that several caches share, as processes would. It can fail: always, or in some commands."""

    def __init__(self, clock=time.monotonic):
        self.memory = MemoryStore(timer=clock)
        self.is_down = False
        self.failing = []  # names of commands: each fails once
        self.commands = 0

    def _do(self, name, *arguments):
        self.commands += 1
        fails = self.is_down
        if name in self.failing:
            self.failing.remove(name)
            fails = True
        if fails:
            raise ConnectionError("no store")
        return getattr(self.memory, name)(*arguments)

    def get(self, key):
        return self._do("get", key)

    def set(self, key, value, seconds):
        return self._do("set", key, value, seconds)

    def delete(self, key):
        return self._do("delete", key)

    def acquire(self, key, owner, lease):
        return self._do("acquire", key, owner, lease)

    def renew(self, key, owner, lease):
        return self._do("renew", key, owner, lease)

    def release(self, key, owner):
        return self._do("release", key, owner)


class Instantly(Runtime):
    """A Kuzzle that answers at once, without threads and a network."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def start(self, work, *, daemon=False):
        work()

    def send(self, request, *, caller, **others):
        caller.depart()
        self.sent += 1
        now = int(self.now())
        jwt = "kauth-" + jwt_with({"_id": "foo", "iat": now, "exp": now + 7200, "jti": self.sent})
        result = {"_id": "foo", "jwt": jwt, "expiresAt": 1000 * (now + 7200), "ttl": 7_200_000}
        return Reply(status=200, headers={}, body=json.dumps({"result": result}).encode(), requested_at=now)


@pytest.fixture
def store(clock):
    return SharedStore(clock)


@pytest.fixture
def cache(store, clock):
    return TokenCache(store, clock=clock)


@pytest.fixture
def root(kuzzle):
    return kuzzle.login(ago=1800)


def refresh_each(kuzzle, jwts, cache, **arguments):
    """Refresh tokens at once, and list what came of each."""

    def one(jwt):
        try:
            return refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, **arguments)
        except RefreshError as error:
            return error

    with ThreadPoolExecutor(len(jwts)) as pool:
        return list(pool.map(one, jwts))


def logins(kuzzle, count):
    """Let as many users sign in half an hour ago."""
    return [kuzzle.login(f"user-{number}", ago=1800) for number in range(count)]


# An answer that arrived is kept


def test_answer_after_the_entry_has_expired(kuzzle, clock, root):
    """A service that is slow in a token's last seconds: the answer comes when the old entry is gone, and is kept."""
    cache = TokenCache(MemoryStore(timer=clock), clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 3.5)

    def answer(request):
        true = kuzzle.truly(request)
        clock.advance(5)
        return true

    kuzzle.next_answers.append(answer)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert kuzzle.knows(token.jwt)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    assert len(kuzzle.requests) == 2


@pytest.mark.parametrize("of_chain", ["first", "newest"])
def test_store_that_is_emptied_during_a_refresh(kuzzle, clock, root, own_valkey, of_chain):
    """A FLUSHALL while a refresh is under way: its answer is kept, also for the next process."""
    client = redis.Redis.from_url(own_valkey.url)
    cache = TokenCache(RedisStore(client), clock=clock)
    newest = refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt
    mine = root if of_chain == "first" else newest
    clock.advance(HOUR - 20)
    kuzzle.next_answers.append(lambda request: client.flushall() and kuzzle.truly(request))
    token = refresh_kuzzle_token(kuzzle.url, mine, cache=cache)
    assert token.jwt != newest
    clock.advance(10)
    next_process = TokenCache(RedisStore(client), clock=clock)
    assert refresh_kuzzle_token(kuzzle.url, mine, cache=next_process) == token
    for spent in (root, newest):  # it may ask once more, before the first process has written the way back
        kuzzle.assert_spent_once(spent)
    client.close()


JWT = "kauth-e30.e30.c2ln"


@pytest.mark.no_cover  # it takes three times as long
def test_a_hundred_thousand_sessions():
    """100,000 sessions in memory of the default size: all of them are there when they are called again."""
    store, runtime = MemoryStore(), Instantly()
    cache = TokenCache(store, runtime=runtime)
    urls = [f"http://kuzzle-{number}" for number in range(100_000)]
    token = refresh_kuzzle_token(urls[0], JWT, cache=cache)
    first, *keys = [key_of("kuzzle:2", url, JWT) for url in urls]
    entry = store.get(first)
    for key in keys:
        store.set(key, entry.replace(first, key), 2 * HOUR)
    assert {refresh_kuzzle_token(url, JWT, cache=cache) for url in urls} == {token}
    assert runtime.sent == 1


def test_spent_tokens_push_out_no_session(kuzzle, clock):
    """However many tokens an active session spends, idle ones are remembered."""
    cache = TokenCache(MemoryStore(maxsize=30, timer=clock), clock=clock)
    idle, active = logins(kuzzle, 10), kuzzle.login("bar", ago=1800)
    tokens = [refresh_kuzzle_token(kuzzle.url, jwt, expires_in="10d", cache=cache) for jwt in idle]
    for _ in range(100):
        active = refresh_kuzzle_token(kuzzle.url, active, cache=cache).jwt
        clock.advance(HOUR - 20)
    assert [refresh_kuzzle_token(kuzzle.url, jwt, cache=cache) for jwt in idle] == tokens
    assert kuzzle.knows(active)
    assert len(kuzzle.requests) == 110


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            PermissionError(13, "other users could replace the store's files", "/home/jwt"),
            "PermissionError: other users could replace",
        ),
        (ValueError("kauth-secret"), r"ValueError\)"),
    ],
)
def test_why_a_store_fails_is_told(kuzzle, root, store, caplog, error, why):
    """The log has what the system says, and nothing that may be a secret or a path."""

    def fail(*_):
        raise error

    store.get = fail
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store), timeout=0.5)
    assert re.search(why, caplog.text)
    assert "kauth" not in caplog.text
    assert "jwt" not in caplog.text


def test_session_that_is_dropped_is_told(kuzzle, clock, caplog):
    """What does not fit into memory is dropped, and that is in the log."""
    cache = TokenCache(MemoryStore(maxsize=3, timer=clock), clock=clock)
    for jwt in logins(kuzzle, 4):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    assert "MemoryStore is full" in caplog.text


# Stores that fail


@pytest.mark.parametrize("command", ["get", "set", "acquire", "release", "delete"])
def test_one_command_that_fails(kuzzle, clock, store, cache, command):
    """One command of a store fails while 50 users call: nobody is told to sign in."""
    roots = logins(kuzzle, 50)
    tokens = refresh_each(kuzzle, roots, cache)
    assert all(kuzzle.knows(token.jwt) for token in tokens)
    store.failing.append(command)
    assert refresh_each(kuzzle, roots, TokenCache(store, clock=clock)) == tokens
    clock.advance(HOUR - 20)
    store.failing.append(command)
    renewed = refresh_each(kuzzle, roots, TokenCache(store, clock=clock))
    assert all(kuzzle.knows(token.jwt) for token in renewed)


def test_process_that_starts_while_the_store_is_down(kuzzle, clock, store, cache, root):
    """A process that knows nothing of a session sends nothing while it cannot ask, and goes on when it can."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    store.is_down = True
    other = TokenCache(store, clock=clock)
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, root, cache=other, timeout=0.5)
    assert caught.value.spent is False
    assert time.monotonic() - started < 1
    threading.Timer(0.3, lambda: setattr(store, "is_down", False)).start()
    assert refresh_kuzzle_token(kuzzle.url, root, cache=other) == token
    assert len(kuzzle.requests) == 1


def test_living_token_while_the_store_is_down(kuzzle, clock, store, cache, root):
    """A token that this process knows is used while the store is down, and not refreshed when it is due."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    store.is_down = True
    time.sleep(0.6)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    clock.advance(HOUR - 22)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    assert len(kuzzle.requests) == 1


def wait_for_copies(cache):
    """Wait until the store has all that a process knows."""
    wait_until(lambda: not cache._ledger.unsaved)


def test_last_moments_while_the_store_is_down(kuzzle, clock, store, cache, root):
    """Before it would be lost, a token is refreshed without the store, which has the new one as soon as it's back."""
    first, other = refresh_kuzzle_token(kuzzle.url, root, cache=cache), kuzzle.login("bar", "9h", ago=1800)
    store.is_down = True
    time.sleep(0.6)
    clock.advance(HOUR - 4)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert token != first
    assert kuzzle.knows(token.jwt)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    store.is_down = False
    refresh_kuzzle_token(kuzzle.url, other, cache=cache)
    wait_for_copies(cache)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock)) == token
    assert len(kuzzle.requests) == 3


class SlowStore(SharedStore):
    """It says nothing for some seconds, and then that it is out of order."""

    silence = None

    def _do(self, name, *arguments):
        if self.silence is not None:
            self.over.wait(self.silence)
            raise TimeoutError
        return super()._do(name, *arguments)

    def __init__(self, clock):
        super().__init__(clock)
        self.over = threading.Event()


def test_looks_while_the_store_hangs(kuzzle, root):
    """One look waits for it, in a thread. The others go by what this process knows."""
    store = SlowStore(time.monotonic)
    cache = TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    store.silence, threads = 60.0, threading.active_count()
    assert [cache.peek(kuzzle.url, root).generation for _ in range(4)] == [1] * 4
    assert threading.active_count() <= threads + 1
    store.over.set()


def test_entries_of_another_version(kuzzle, root):
    """Version 0.1 had other entries. Nothing of these is in the way, also with a prefix of the user's own."""
    store, old = SharedStore(), key_of("kuzzle", kuzzle.url, root)
    store.set(old, "what 0.1 wrote", HOUR)
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {root}"}, timeout=5)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store))
    assert store.get(old) == "what 0.1 wrote"


def test_entries_of_another_version_at_circle():
    """The same for the names of Circle's sessions."""
    names = {"user_token": "u", "user_id": "user-1"}
    for name, who in names.items():
        known = circle_credential(
            refresh_token="r", device_id="d", api_key=Secret("k"), **dict.fromkeys(names) | {name: who}
        )
        assert key_of("circle", "https://api.circle.com", who, "r", "d") not in known.keys


class Flights(dict):
    """Between a look and a removal another thread may put its own there."""

    def pop(self, key, default=None):
        assert key in self
        return super().pop(key)


def test_flight_that_another_thread_has_just_begun(kuzzle, root):
    """What was not there is not removed."""
    cache = TokenCache()
    cache._ledger.flights = Flights()
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt)


def test_sign_out_that_begins_while_the_store_hangs(monkeypatch):
    """As soon as the store is back, it writes down for how long another has been about to spend the token."""
    store = SlowStore(time.monotonic)
    cache = TokenCache(store, lease=60)
    with FakeKuzzle() as kuzzle, ThreadPoolExecutor() as pool:
        jwt = kuzzle.login(ago=HOUR - 4)
        key = key_of("kuzzle:2", kuzzle.url, jwt)
        theirs = Attempt(by="another", at=Instant(time.time(), 1.0, "another"), is_open=True)
        store.set(f"{key}-attempt", theirs.write(), HOUR)
        store.silence = 30.0
        pool.submit(cache._ledger.ask, "cannot be read", store.get, key)
        time.sleep(1)
        auth = KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=2)
        leaving = pool.submit(auth.sign_out)
        time.sleep(0.2)
        store.silence = None
        store.over.set()
        with pytest.raises(RefreshError):
            leaving.result()
        assert Attempt.read(store.get(f"{key}-attempt")).seen


def test_newest_token_that_expires_while_the_store_is_down(kuzzle, clock, store, root):
    """What can no longer be used is no longer waited for."""
    cache = TokenCache(store, clock=clock, lease=3)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    store.is_down = True
    time.sleep(0.6)
    clock.advance(HOUR - 4)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(_rules.DAY + 2 * HOUR)
    wait_for_copies(cache)
    assert store.is_down


def test_joined_while_the_store_is_down(kuzzle, store, cache, root):
    """Who has no valid token waits for a store on which a call has given up that has one."""
    due, asked, go_on = kuzzle.login(ago=HOUR - 30), threading.Event(), threading.Event()
    auth = KuzzleAuth(kuzzle.url, due, cache=cache, timeout=5)

    def get(key):
        asked.set()
        go_on.wait(10)
        raise ConnectionError("no store")

    store.get = get
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(requests.get, f"{kuzzle.url}/_me", auth=auth, timeout=10)
        asked.wait(10)
        ours = pool.submit(refresh_kuzzle_token, kuzzle.url, due, cache=cache, timeout=5)
        (flight,) = cache._ledger.flights.values()
        while len(flight.waiters) < 2:
            time.sleep(0.01)
        go_on.set()
        assert theirs.result().status_code == 200
        del store.get
        assert kuzzle.knows(ours.result().jwt)


@pytest.mark.parametrize("silence", [1.0, 60.0])
def test_last_moments_while_the_store_hangs(kuzzle, clock, root, silence):
    """A store that takes longer to say nothing than a token has left is passed by, also by whoever comes later."""
    store = SlowStore(clock)
    cache = TokenCache(store, clock=clock)
    first = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    store.silence = silence
    time.sleep(0.6)
    clock.advance(HOUR - 6)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == first, "there is time"
    clock.advance(3)
    started = time.monotonic()
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)
    assert token != first
    assert kuzzle.knows(token.jwt)
    assert time.monotonic() - started < 2.5
    store.silence = None
    store.over.set()
    wait_for_copies(cache)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock)) == token
    assert len(kuzzle.requests) == 2


class Gate(SharedStore):
    """One of its writes waits at a gate: the first of the chain or, of an attempt, that after some moment."""

    def __init__(self, clock, part):
        super().__init__(clock)
        self.part, self.is_shut, self.waits, self.opens = part, False, threading.Event(), threading.Event()

    def set(self, key, value, seconds):
        if self.is_shut and self.part in key + value:
            self.is_shut = False
            self.waits.set()
            self.opens.wait(20)
        super().set(key, value, seconds)


def test_token_that_cannot_be_written_down_in_time(kuzzle, clock, root):
    """Its answer has come: the call has a token, though the store does not answer."""
    store = Gate(clock, '"token"')
    store.is_shut = True
    token = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock), timeout=2)
    store.opens.set()
    assert kuzzle.knows(token.jwt)


def test_two_flights_with_one_token(kuzzle, clock, root, monkeypatch):
    """Who was passed by in a token's last moments, as the store hung, does not spend it once more."""
    monkeypatch.setattr(_rules, "silence", lambda *_: 60.0)
    store = Gate(clock, "-attempt")
    cache = TokenCache(store, clock=clock)
    newest = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 2.6)

    def answer(request):
        token = kuzzle.truly(request)
        store.opens.set()
        time.sleep(4)
        return token

    kuzzle.next_answers.append(answer)
    store.is_shut = True
    auths = [KuzzleAuth(kuzzle.url, newest.jwt, cache=cache, timeout=10) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        passed_by = pool.submit(lambda: [*keep_alive(auths[:1])])
        store.waits.wait(5)
        time.sleep(0.6)
        later = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, timeout=10)
        assert kuzzle.knows(later.result().jwt)
        assert [outcome.outcome for outcome in passed_by.result()] == ["refreshed"]
    assert len(kuzzle.requests) == 2


class LateRenewal(SharedStore):
    """Its answer to the first renewal is late: the lock has been released by then."""

    def __init__(self, clock):
        super().__init__(clock)
        self.renewed, self.released, self.over = threading.Event(), threading.Event(), threading.Event()

    def renew(self, key, owner, lease):
        self.renewed.set()
        self.released.wait(20)
        is_ours = super().renew(key, owner, lease)
        self.over.set()
        return is_ours

    def release(self, key, owner):
        super().release(key, owner)
        self.released.set()


def test_lock_that_is_given_back_while_it_is_renewed(kuzzle, clock, root):
    """It is not taken again for a call that is over."""
    store = LateRenewal(clock)
    kuzzle.next_answers.append(lambda request: (store.renewed.wait(10), Answer(503))[1])
    with pytest.raises((UnavailableError, OutcomeUnknownError)):
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock), queuable=False)
    store.over.wait(20)
    started = time.monotonic()
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock), timeout=20).jwt)
    assert time.monotonic() - started < 2.0


def test_first_look_that_fails(kuzzle, clock, store, root):
    """One command that fails does not make a session that was forgotten, and is used again, look younger than it is."""
    TokenCache(store, clock=clock).forget(kuzzle.url, root)
    clock.advance(2)
    store.failing = ["get"]
    token = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock))
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock)) == token


def test_two_machines_with_one_refresh_token(clock, store):
    """Where Circle gives new user tokens alone, each is as old as it is, and not as old as the refresh token."""
    caches = [TokenCache(store, clock=each) for each in (clock, functools.partial(clock))]
    with FakeCircle(clock=clock, rotate=False) as circle:
        call = call_with(circle, circle.sign_in())
        for _ in range(12):
            for cache in caches:
                assert circle.knows(refresh_user_token(**call, cache=cache))
            clock.advance(HOUR / 6)
        assert len(circle.requests) <= 4


class FullDisk(FileStore):
    """A folder on a disk that is full."""

    def set(self, key, value, seconds):
        raise OSError(28, os.strerror(28))


def test_disk_that_is_full(kuzzle, root, tmp_path):
    """A script whose disk is full spends nothing, so its next run can go on."""
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(FullDisk(tmp_path)), timeout=0.5)
    assert caught.value.spent is False
    assert kuzzle.requests == []
    token = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(FileStore(tmp_path)))
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(FileStore(tmp_path))) == token


def test_no_verdict_without_the_store(kuzzle, clock, store, cache, root):
    """A refusal is no reason to sign in as long as the store, which may have a newer token, cannot be read."""

    def answer(request):
        store.is_down = True
        return kuzzle.truly(request)

    kuzzle.fail_next("security.token.invalid")
    refuse = kuzzle.next_answers.pop()
    kuzzle.next_answers.append(lambda request: answer(request) and refuse(request))
    with pytest.raises((OutcomeUnknownError, UnavailableError)):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=1)


def test_store_that_hangs_after_a_refusal(kuzzle, store, cache, root):
    """Then it is not the service that is slow, and the token may have been spent."""
    gone = threading.Event()

    def answer(request):
        answer = kuzzle.truly(request) and kuzzle.truly(request)  # another was faster
        store.get = lambda key: gone.wait(10)
        return answer

    kuzzle.next_answers.append(answer)
    with pytest.raises(OutcomeUnknownError, match="does not accept the token any more") as caught:
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=1)
    gone.set()
    assert (caught.value.spent, caught.value.status) == (None, 401)


def test_refusal_that_cannot_be_written_down(kuzzle, store, root):
    """It is told when it can be, for then others do not ask again."""
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {root}"}, timeout=5)

    def fail_once(key, value, seconds):
        if Attempt.read(value).errors:
            del store.set
            raise ConnectionError("no store")
        store.memory.set(key, value, seconds)

    store.set = fail_once
    for _ in range(2):
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store), timeout=20)
    assert "set" not in vars(store)
    assert len(kuzzle.requests) == 2


@pytest.mark.parametrize("command", ["get", "acquire", "set"])
def test_one_failed_command_when_a_token_is_due(kuzzle, store, command):
    """The token is refreshed all the same: the next call may come too late."""
    jwt = kuzzle.login(ago=HOUR - 20)
    store.failing = [command]
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(store), timeout=6)
    assert kuzzle.knows(token)
    auth = KuzzleAuth(kuzzle.url, due := kuzzle.login("bar", ago=HOUR - 20), cache=TokenCache(store))
    store.failing = [command]
    requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)
    assert auth.jwt != due


def test_redis_that_hangs(kuzzle, root):
    """A Redis that accepts connections and says nothing delays a call for no longer than its timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = redis.Redis(port=silent.getsockname()[1], socket_timeout=2)
        started = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(RedisStore(client)), timeout=1)
        assert time.monotonic() - started < 1.6
        assert caught.value.spent is False
        assert kuzzle.requests == []


@pytest.mark.parametrize("timeout", [30, None])
def test_holder_that_is_killed(fleet, kuzzle, valkey_url, timeout):
    """A process that is killed in mid-refresh delays the others for seconds, whatever its timeout was."""
    jwt = kuzzle.login(ago=1800)
    kuzzle.next_answers.append(lambda request: time.sleep(1) or b"")
    task = {"url": kuzzle.url, "jwt": jwt, "threads": 1, "kind": "redis", "where": valkey_url}
    fleet.start(1, timeout=timeout, **task)
    fleet.start(2, timeout=20, **task)
    fleet.go(0)
    while not kuzzle.requests:
        time.sleep(0.01)
    fleet.processes[0].kill()
    started = time.monotonic()
    fleet.go(1, 2)
    results = fleet.results(1, 2)
    assert time.monotonic() - started < 12
    assert len(set(results)) == 1
    assert kuzzle.knows(results[0])


# Entries that others wrote


def entries(store):
    """Return what a store has, by key."""
    keys = store.memory.keys()
    return {key: store.memory.get(key) for key in keys}


def mutations(value):
    """Yield what a JSON value could be instead, one change at a time."""
    yield from (10**400, -(10**400), "planted", None, [], {}, True, -1, 1e308, [[1]])
    if isinstance(value, dict):
        for name in value:
            yield {other: value[other] for other in value if other != name}
            for changed in mutations(value[name]):
                yield {**value, name: changed}


def test_strange_entries(kuzzle, clock, store, cache, root, monkeypatch):
    """Whatever an entry says, 400 digits too, no call fails of it; who knows the token goes on with it."""
    monkeypatch.setattr("refresher._rules.TRUSTED", 0.0)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    kept = entries(store)

    def restore():
        for key in set(entries(store)) - set(kept):
            store.memory.delete(key)
        for key, text in kept.items():
            store.memory.set(key, text, HOUR)

    assert len(kept) >= 2
    for key, text in kept.items():
        for changed in mutations(json.loads(text)):
            if isinstance(changed, dict) and "token" in text and "token" not in changed:
                continue  # so is what was forgotten written down
            if '"jwt": "planted"' in json.dumps(changed):
                continue  # nobody but Kuzzle can tell
            clock.advance(2)
            restore()
            store.memory.set(key, json.dumps(changed), HOUR)
            assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt)
            restore()
            store.memory.set(key, json.dumps(changed), HOUR)
            kuzzle.fail_next("security.token.invalid", 3)
            with contextlib.suppress(RefreshError):
                refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock), timeout=0.3)
            kuzzle.next_answers.clear()


@pytest.mark.parametrize("whose", ["another user's", "another session's"])
def test_entries_that_point_elsewhere(kuzzle, clock, store, cache, root, whose):
    """Who can write to a store, but does not know a session's tokens, cannot make others use that session."""
    kuzzle.users["bar"] = "foo"
    user = "bar" if whose == "another user's" else "foo"
    before = entries(store)
    theirs = kuzzle.login(user, "2h", ago=1800)
    token = refresh_kuzzle_token(kuzzle.url, theirs, expires_in="3h", cache=cache)
    of_theirs = [text for key, text in entries(store).items() if key not in before]
    mine = key_of("kuzzle:2", kuzzle.url, root)
    for text in [*of_theirs, json.dumps({"see": key_of("kuzzle:2", kuzzle.url, theirs)})]:
        for key in (mine, f"{mine}-alias"):
            if whose == "another user's" or "token" not in text:
                store.memory.set(key, text, HOUR)
    answer = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert (answer.kuid, answer == token) == ("foo", False)


# Tokens that do not live long


@pytest.mark.holds
def test_short_lives():
    """Tokens of a few seconds are refreshed in time, over and over, by an auth object and by several processes."""
    store, errors = SharedStore(), []
    with FakeKuzzle(clock=Clock()) as kuzzle:
        auths = [
            KuzzleAuth(kuzzle.url, kuzzle.login("foo", f"{s}s"), expires_in=f"{s}s", cache=TokenCache(store))
            for s in (4, 5)
        ]
        jwt = kuzzle.login("foo", "6s")
        processes = [TokenCache(store), TokenCache(store)]

        def call(number):
            while time.monotonic() < end:
                try:
                    if number < 2:
                        answer = requests.get(f"{kuzzle.url}/_me", auth=auths[number], timeout=10)
                        assert answer.status_code == 200
                    else:
                        cache = processes[number % 2]
                        assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, jwt, expires_in="3s", cache=cache).jwt)
                except Exception as error:
                    errors.append(error)
                    return
                time.sleep(0.05)

        end = time.monotonic() + 10
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, range(4)))
    assert errors == []


def test_longer_lifetime(kuzzle, cache, root):
    """A call that asks for a longer life than the known token was asked for gets it, once."""
    hour = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    month = refresh_kuzzle_token(kuzzle.url, root, expires_in="30d", cache=cache)
    assert (hour.ttl.days, month.ttl.days) == (0, 30)
    for asked in (None, "1h", "30d"):
        assert refresh_kuzzle_token(kuzzle.url, root, expires_in=asked, cache=cache) == month
    assert len(kuzzle.requests) == 2


# Patience


def test_last_attempt_is_at_the_end(kuzzle):
    """A call uses all of its time: Kuzzle comes back shortly before that is over, and all succeed."""
    jwts = logins(kuzzle, 20)
    kuzzle.stop()
    back = threading.Timer(2.2, kuzzle.start)
    back.start()
    results = refresh_each(kuzzle, jwts, TokenCache(), timeout=3)
    back.join()
    assert [result for result in results if isinstance(result, RefreshError)] == []


@pytest.mark.parametrize("first", [{"timeout": 1.0}, {"queuable": False}])
def test_patience_of_each_caller(kuzzle, root, first):
    """Who joins a refresh has patience of their own, whatever the first caller's was."""
    cache = TokenCache()
    release = threading.Event()

    def be_busy(request):
        release.wait(10)
        kuzzle.fail_next("api.process.overloaded")
        return kuzzle.next_answers.pop()(request)

    kuzzle.next_answers.append(be_busy)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, **first)
        while not kuzzle.requests:
            time.sleep(0.001)
        two = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, timeout=30)
        kuzzle.next_answers.append(be_busy)
        time.sleep(1.2)
        release.set()
        assert kuzzle.knows(two.result(30).jwt)
        with pytest.raises(RefreshError):
            raise one.exception(10) or AssertionError
        assert len(kuzzle.requests) == 3


def test_retry_after_is_for_everybody(kuzzle):
    """A service that wants to be left alone is left alone by all calls, not only by the one that was told."""
    cache, jwts = TokenCache(), logins(kuzzle, 10)
    kuzzle.next_answers.append(Answer(429, b"", {"Retry-After": "30"}))
    for jwt in jwts:
        with pytest.raises(UnavailableError) as caught:
            refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=5)
        assert caught.value.spent is False
        assert 25 < caught.value.retry_after <= 30
    assert len(kuzzle.requests) == 1


# Refusals


def test_dead_session_of_a_cron_job(kuzzle, clock, root):
    """A job that runs every five minutes asks for a dead session less and less often: once an hour."""
    store = MemoryStore(timer=clock)
    kuzzle.fail_next("security.token.invalid", 1000)
    for _ in range(24 * 12):
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock))
        clock.advance(300)
    assert len(kuzzle.requests) <= 24 + 3


def test_forgetting_a_refusal(kuzzle, cache, root):
    """What was forgotten is asked for again, also after a refusal."""
    kuzzle.fail_next("security.token.invalid")
    for _ in range(2):
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    cache.forget(kuzzle.url, root)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache).kuid == "foo"
    assert len(kuzzle.requests) == 2


def test_refused_idempotency_key(circle, clock, store):
    """A key whose request was refused is not sent again, by the next process either."""
    call = call_with(circle, circle.sign_in())
    circle.fail_next(155102)
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call, cache=TokenCache(store, clock=clock))
    clock.advance(HOUR)
    assert refresh_user_token(**call, cache=TokenCache(store, clock=clock)).user_id == "user-1"
    first, second = (request.json()["idempotencyKey"] for request in circle.requests)
    assert first != second


def test_replayed_answers(circle, clock):
    """After the store was lost, Circle replays what it answered before: it is followed to the pair that lives."""
    pairs = [circle.sign_in()]
    for _ in range(12):
        pairs.append(refresh_user_token(**call_with(circle, pairs[-1]), cache=TokenCache()))
        clock.advance(2 * HOUR)
    cache = TokenCache()
    token = refresh_user_token(**call_with(circle, pairs[0]), cache=cache)
    assert circle.knows(token)
    assert token not in pairs
    assert refresh_user_token(**call_with(circle, pairs[0]), cache=cache) == token


def test_replayed_answers_until_time_is_up(circle, clock):
    """A pair that has expired is never handed out: if there is no time to find a living one, it's an error."""
    pairs = [circle.sign_in()]
    for _ in range(12):
        pairs.append(refresh_user_token(**call_with(circle, pairs[-1]), cache=TokenCache()))
        clock.advance(2 * HOUR)
    cache = TokenCache()

    def slowly(request):
        circle.next_answers.append(slowly)
        return circle.truly(request, after=0.1)

    circle.next_answers.append(slowly)
    with pytest.raises((OutcomeUnknownError, UnavailableError)):
        refresh_user_token(**call_with(circle, pairs[0]), cache=cache, timeout=0.5)
    circle.next_answers.clear()
    assert circle.knows(refresh_user_token(**call_with(circle, pairs[0]), cache=cache))


@pytest.mark.parametrize("code", [-1, 3])
@pytest.mark.parametrize("cached", [True, False])
def test_failure_behind_a_replayed_answer(circle, clock, store, code, cached):
    """The key of the request that failed says nothing of the token that the call is about."""
    call = call_with(circle, circle.sign_in())
    refresh_user_token(**call, cache=None)
    clock.advance(2 * HOUR)
    circle.next_answers.append(circle.truly)
    circle.fail_next(code)
    with pytest.raises((OutcomeUnknownError, RequestRefusedError)):
        refresh_user_token(**call, cache=TokenCache(store, clock=clock) if cached else None, retry=False)
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock) if cached else None))


def test_replayed_answers_without_end(circle, clock, monkeypatch):
    """However many expired pairs Circle replays, a call ends, and says so."""
    monkeypatch.setattr("refresher.services.circle._MOST_STEPS", 3)
    pairs = [circle.sign_in()]
    for _ in range(12):
        pairs.append(refresh_user_token(**call_with(circle, pairs[-1]), cache=TokenCache()))
        clock.advance(2 * HOUR)
    with pytest.raises(ReplyError, match="keeps returning expired tokens") as caught:
        refresh_user_token(**call_with(circle, pairs[0]), cache=TokenCache())
    assert len(circle.requests) == 12 + 3
    assert caught.value.idempotency_key == circle.requests[12].json()["idempotencyKey"]


def test_later_step_whose_key_is_too_old(circle, clock):
    """The caller's own key is that of the first step alone."""
    call = {**call_with(circle, circle.sign_in()), "idempotency_key": str(uuid.uuid4()), "cache": None}
    refresh_user_token(**call)
    clock.advance(2 * HOUR)
    circle.next_answers.append(circle.truly)
    circle.fail_next(156020)
    assert circle.knows(refresh_user_token(**call))
    assert len({request.json()["idempotencyKey"] for request in circle.requests[1:]}) == 3


def test_attempt_that_may_have_taken_the_place_of_another(store):
    """Nobody knows whether an answer to the other was lost, so its key is sent again."""
    ledger = TokenCache(store)._ledger
    pair = "refresh-token", "device-1", Secret("TEST_API_KEY:id:secret"), "user-token"
    credential, key = circle_credential(*pair), str(uuid.uuid4())
    flight = Flight(ledger, credential.keys[0], Call(credential=credential), 60.0, None)
    done = Attempt(by="it", at=ledger.now(), idempotency_key=key)
    assert not flight._note(credential, done, ledger.runtime.steady() - 1.0)
    theirs, _ = ledger.last_attempt(credential)
    assert (theirs.is_open, theirs.idempotency_key, theirs.in_doubt) == (True, key, asker(credential))


class Between:
    """Lets something happen right before an attempt is looked for."""

    def __init__(self, store):
        self.store, self.happen = store, None

    def get(self, key):
        if key.endswith("-attempt") and self.happen is not None and self.happen():
            self.happen = None
        return self.store.get(key)

    def __getattr__(self, name):
        return getattr(self.store, name)


def test_lost_by_the_store_while_nothing_is_due(kuzzle, store, root):
    """keep_alive puts back what this process knows, though it refreshes nothing."""
    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache(store, runtime=Runtime()))
    requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)
    newest = auth.jwt
    for key in sorted(store.memory.keys()):
        store.memory.delete(key)
    assert [each.outcome for each in keep_alive([auth])] == ["fresh"]
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, runtime=Runtime())).jwt == newest


def test_lost_by_the_store_and_expired_since(kuzzle, clock, store, root):
    """What is worth nothing any more is not put back."""
    cache = TokenCache(store, clock=clock)
    auth = KuzzleAuth(kuzzle.url, root, cache=cache)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    for key in sorted(store.memory.keys()):
        store.memory.delete(key)
    assert cache.peek(kuzzle.url, root).state == "fresh"
    clock.advance(26 * HOUR)
    assert [each.outcome for each in keep_alive([auth])] == ["ended"]
    assert TokenCache(store, clock=clock).peek(kuzzle.url, root).state in ("expired", "refused", "unknown")


def copy_entries(source, target):
    for name in sorted(source.memory.keys()):
        if not name.endswith("-attempt"):
            target.set(name, source.memory.get(name), HOUR)


@pytest.mark.parametrize("timeout", [0.5, 1.5])
def test_valid_token_while_another_process_refreshes(kuzzle, clock, store, root, timeout):
    """Who has no two seconds goes on with it as well, when its time is up."""
    mine, theirs = (TokenCache(store, clock=clock, runtime=Runtime()) for _ in range(2))
    jwt = refresh_kuzzle_token(kuzzle.url, root, cache=mine).jwt
    clock.advance(HOUR - 20)
    auth = KuzzleAuth(kuzzle.url, jwt, cache=mine, timeout=timeout)
    gone = threading.Event()
    kuzzle.next_answers.append(lambda request: gone.wait(10) and kuzzle.truly(request))
    with ThreadPoolExecutor(1) as pool:
        refreshed = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=theirs)
        while len(kuzzle.requests) < 2:
            time.sleep(0.001)
        assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 200
        gone.set()
        assert kuzzle.knows(refreshed.result())


def write_between_two_reads(kuzzle, store, jwt, after):
    """Let another process spend a token aside, and write that down between two reads of *store*, some seconds later."""
    aside, between, spent, key = SharedStore(), Between(store), [], key_of("kuzzle:2", kuzzle.url, jwt)

    def spend():
        copy_entries(store, aside)
        token = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h", cache=TokenCache(aside, runtime=Runtime()))
        put_open_attempt(store, key)
        spent.append((time.monotonic(), token))

    def write():
        if not spent or time.monotonic() - spent[0][0] < after:
            return False
        copy_entries(aside, store)
        store.delete(f"{key}-attempt")
        return True

    between.happen = write
    return between, spend, spent


def test_successor_that_is_written_between_two_reads_of_a_verdict(kuzzle, store, root):
    """When what another has tried is gone, its successor is there: so that is looked for afterwards."""
    between, spend, spent = write_between_two_reads(kuzzle, store, root, 2.2)
    kuzzle.next_answers.append(lambda request: spend() or kuzzle.truly(request))
    token = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(between))
    assert token == spent[0][1]


def test_successor_that_is_written_between_two_reads_after_a_rejection(kuzzle, store, root):
    """The same, if it is a request that was rejected."""
    first = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, runtime=Runtime()))
    between, spend, _ = write_between_two_reads(kuzzle, store, first.jwt, 0.0)
    auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache(between))
    assert auth.jwt == first.jwt
    time.sleep(1.1)  # until it is not in the second of its birth
    spend()
    kuzzle.clock.advance(2)  # so that the spent token is rejected
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).json()["result"]["_id"] == "foo"


def test_attempt_of_an_earlier_pair(clock, store):
    """What was tried with another user token says nothing of this one, though Circle keeps the refresh token."""
    cache = TokenCache(store, clock=clock)
    with FakeCircle(clock=clock, rotate=False) as circle:
        call = call_with(circle, circle.sign_in())
        for _ in range(3):
            store.failing = ["delete"]  # of the attempt that has succeeded
            assert circle.knows(refresh_user_token(**call, cache=cache))
            clock.advance(HOUR)
        assert len({request.json()["idempotencyKey"] for request in circle.requests}) == len(circle.requests) == 3


def test_refresh_token_that_stays_leaves_no_trail(clock, store):
    """What a store has of a session does not grow with the number of its pairs."""
    cache, sizes = TokenCache(store, clock=clock), []
    with FakeCircle(clock=clock, rotate=False) as circle:
        call = call_with(circle, circle.sign_in())
        for _ in range(100):
            refresh_user_token(**call, cache=cache)
            clock.advance(HOUR)
            sizes.append(sum(map(bool, map(store.memory.get, store.memory.keys()))))
    assert max(sizes[50:]) <= max(sizes[:50]) + 1


def test_service_that_has_asked_another_process_to_wait(kuzzle, store, root):
    """Who cannot wait for so long is told at once, and for how long."""
    kuzzle.next_answers.append(Answer(503, b"", {"Retry-After": "60"}))
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, runtime=Runtime()), timeout=4)
        assert caught.value.retry_after > 50
    assert time.monotonic() - started < 2
    assert len(kuzzle.requests) == 1


# Interrupts


def run(code, *arguments, seconds=60):
    """Run a script of its own, which must end in time and complain of nothing."""
    command = [sys.executable, "-P", "-X", "faulthandler", "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


PRELUDE = """
import dis, faulthandler, gc, random, signal, sys, threading
faulthandler.dump_traceback_later(50, exit=True)
import refresher
from refresher import RefreshError, TokenCache, refresh_kuzzle_token
try:
    import refresher._rules
    refresher._rules.BIRTH_SECOND = 0.0
except ImportError:
    pass
url, *jwts = sys.argv[1:]
"""

HANDLED = """
import os, queue

def handle(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    refresh_kuzzle_token(url, jwts.pop(), cache=None, timeout=5)
    handled.append(1)

def trace(frame, event, _):
    if not handled and frame.f_code in codes:
        os.kill(os.getpid(), signal.SIGUSR1)
    return trace

handled, codes = [], [queue.LifoQueue._get.__code__, queue.LifoQueue._put.__code__]
refresh_kuzzle_token(url, jwts.pop(), cache=None)
signal.signal(signal.SIGUSR1, handle)
sys.settrace(trace)
refresh_kuzzle_token(url, jwts.pop(), cache=None, timeout=5)
sys.settrace(None)
print(handled)
"""


@pytest.mark.skipif(os.name != "posix", reason="no such signal")
def test_handler_that_calls_while_a_connection_is_taken(kuzzle):
    """A signal handler does not wait for the pool of connections, whose lock its own thread has."""
    assert run(PRELUDE + HANDLED, kuzzle.url, *logins(kuzzle, 3)) == "[1]\n"


INTERRUPTED = """
class Interrupt(BaseException):
    pass


sys.unraisablehook = lambda _: None  # where Python ignores an exception, it tells

# After these, Python runs signal handlers.
HANDLED = {
    dis.opmap[name]
    for name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME")
    if name in dis.opmap
}


def call_until(moment, jwt):
    # Call, and let a signal handler run at that moment in the calling thread. Whether it was reached.
    count, last, cache, told = 0, {}, TokenCache(), []

    def handle():
        if MODE == "raises":
            raise Interrupt
        told.append(refresh_kuzzle_token(url, jwt, cache=cache, timeout=10))

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, last[frame] = last.get(frame), frame.f_code.co_code[frame.f_lasti]
            # Python's own conditions do not survive an exception: their locks stay locked.
            spared = MODE == "raises" and frame.f_code.co_qualname.startswith("Condition.")
            if before in HANDLED and not spared:
                count += 1
                if count == moment:
                    handle()
        return trace

    sys._getframe().f_trace_opcodes = True  # or Python 3.12.1 tells of no opcode
    sys.settrace(trace)
    try:
        told.append(refresh_kuzzle_token(url, jwt, cache=cache))
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    told.append(refresh_kuzzle_token(url, jwt, cache=cache, timeout=10))
    assert len(set(told)) == 1 and told[0].jwt not in (None, jwt)
    return count >= moment


refresh_kuzzle_token(url, jwts.pop(), cache=TokenCache())
moment = 1
while call_until(moment, jwts.pop()):
    moment += 1
assert moment > 100
"""


@pytest.mark.parametrize("mode", ["raises", "calls"])
def test_signal_at_any_moment(kuzzle, mode):
    """At any moment of a call, a signal handler may raise, or call with the same cache. It goes on working."""
    run(PRELUDE + f"MODE = {mode!r}\n" + INTERRUPTED, kuzzle.url, *logins(kuzzle, 1000))
    assert len(kuzzle.requests) == len({request.headers["Authorization"] for request in kuzzle.requests})


@pytest.mark.holds
def test_sleep_that_is_patched(monkeypatch):
    """A token is not sent in the second of its birth, also if a test lets no time pass in a sleep."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with FakeKuzzle() as kuzzle:  # whose clock goes on
        assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, kuzzle.login(), cache=None, timeout=5))


FOREIGN_THREAD = """
import _thread, logging, sys, threading, time
from refresher import TokenCache, refresh_kuzzle_token
logging.disable()
use = lambda: refresh_kuzzle_token(*sys.argv[2:], timeout=None, cache=TokenCache())
_thread.start_new_thread(use, ()) if sys.argv[1] == "foreign" else threading.Thread(target=use, daemon=True).start()
time.sleep(1)
"""


@pytest.mark.parametrize("kind", ["foreign", "daemon"])
def test_thread_that_ends_with_its_process(root, kind):
    """It does so in silence, though it waits for a refresh without a limit. Python did not start the foreign one."""
    run(FOREIGN_THREAD, kind, "http://127.0.0.1:1", root)


KILLED_GREENLET = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent, gevent.event
from refresher import TokenCache, refresh_kuzzle_token
url, *jwts = sys.argv[1:]
cache, is_ready = TokenCache(), gevent.event.Event()
refresh_kuzzle_token(url, jwts[0], cache=cache)

def view(jwt):
    is_ready.wait()
    return refresh_kuzzle_token(url, jwt, cache=cache, timeout=5).kuid

killed = gevent.spawn(view, jwts[1])
gevent.sleep(0.1)
is_ready.set()
killed.kill()
with gevent.Timeout(20):
    print(gevent.spawn(view, jwts[2]).get())
"""


def test_greenlet_that_is_killed(kuzzle):
    """In a gevent worker, one that is killed as it begins a call does not stop all other calls."""
    assert run(KILLED_GREENLET, kuzzle.url, *logins(kuzzle, 3)) == "user-2\n"


FINALIZED = """
class Goodbye:
    def __init__(self):
        self.me = self

    def __del__(self):
        try:
            told.append(refresh_kuzzle_token(url, jwt, cache=cache, timeout=1).jwt)
        except RefreshError:
            pass  # this interrupted the refresh that it waited for
        if gc.get_threshold()[0]:
            Goodbye()


told, own = [], []
jwt, cache = jwts.pop(), TokenCache()
own.append(refresh_kuzzle_token(url, jwt, cache=cache).jwt)
gc.set_threshold(1)
Goodbye()
for each in jwts:
    jwt, cache = each, TokenCache()
    own.append(refresh_kuzzle_token(url, jwt, cache=cache, timeout=10).jwt)
gc.set_threshold(0)
gc.collect()
assert len(own) == len(set(own)) == len(jwts) + 1
assert len(told) > len(jwts) and set(told) <= set(own)
"""


def test_finalizer_that_refreshes(kuzzle):
    """A ``__del__`` may call with the cache that is just in use, whenever the garbage collector runs."""
    run(PRELUDE + FINALIZED, kuzzle.url, *logins(kuzzle, 200))


ENDLESS = """
import time
auth = refresher.KuzzleAuth(url, jwts[0], timeout=None, cache=TokenCache(lease=1.0))
import requests
print(requests.get(url + "/_me", auth=auth, timeout=10).status_code)
"""


def test_process_with_endless_patience_ends(fake_kuzzle):
    """A call without a timeout that went on with its living token does not keep its process from ending."""
    with FakeKuzzle(clock=Clock()) as kuzzle:
        jwt = kuzzle.login("foo", ago=HOUR - 20)
        release = threading.Event()
        kuzzle.next_answers.append(lambda request: release.wait(40) and b"")
        try:
            assert run(PRELUDE + ENDLESS, kuzzle.url, jwt, seconds=15) == "200\n"
        finally:
            release.set()


# Arguments


@pytest.mark.parametrize("store", ["folder", {}, FileStore, object()], ids=["path", "dict", "class", "object"])
def test_what_is_no_store(store):
    """What is no store is refused when the cache is made."""
    with pytest.raises(InvalidArgumentError, match=r"^store must be a Store"):
        TokenCache(store)


@pytest.mark.parametrize("name", ["lease", "ahead"])
def test_settings_without_end(name):
    """A lease for ever is refused: it would keep a session locked for ever."""
    with pytest.raises(InvalidArgumentError, match=f"^{name} must be"):
        TokenCache(**{name: math.inf})


def test_arguments_of_a_call_that_hits(kuzzle, cache, root):
    """A token in the cache is no excuse for a wrong argument, if it equals a right one too."""
    for _ in range(2):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    with pytest.raises(InvalidArgumentError, match=r"^queuable "):
        refresh_kuzzle_token(kuzzle.url, root, queuable=1, cache=cache)


def test_memory_of_a_shared_store(kuzzle, clock, store, cache, root, monkeypatch):
    """What others have made of a token counts after half a second; until then a hit does not ask the store."""
    first = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    other = TokenCache(store, clock=clock, ahead=HOUR / 2)
    refresh_kuzzle_token(kuzzle.url, root, cache=other)
    clock.advance(HOUR / 2)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == first
    commands = store.commands
    assert [refresh_kuzzle_token(kuzzle.url, root, cache=cache) for _ in range(10)] == [first] * 10
    assert store.commands == commands
    second = refresh_kuzzle_token(kuzzle.url, root, cache=other)
    assert second != first
    time.sleep(0.6)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == second


def held(kuzzle, is_over):
    """Make an answer that is given at once, and arrives when that is over."""

    def answer(request):
        given = kuzzle.truly(request)
        is_over.wait(10)
        return given

    return answer


class ProcessStore:
    """What one process has of a store that others share. When the process is gone, it does nothing any more."""

    def __init__(self, shared):
        self.shared, self.is_gone, self.renews = shared, False, True

    def __getattr__(self, name):
        if name not in ("get", "set", "delete", "acquire", "renew", "release"):
            raise AttributeError(name)

        def command(*arguments):
            if self.is_gone or (name == "renew" and not self.renews):
                raise ConnectionError("gone")
            return getattr(self.shared, name)(*arguments)

        return command


class Disk(SharedStore):
    """It has room for some characters."""

    def __init__(self, clock, room):
        super().__init__(clock)
        self.sizes, self.room = {}, room

    def set(self, key, value, seconds):
        sizes = {**self.sizes, key: len(value)}
        if sum(sizes.values()) > self.room:
            raise OSError("no space left on device")
        super().set(key, value, seconds)
        self.sizes = sizes

    def delete(self, key):
        super().delete(key)
        self.sizes.pop(key, None)


@pytest.mark.parametrize("room", [0, 1500, 2700, 3000, 3500, 8000, 8500, 9000, 9500, 12_000])
def test_disk_that_is_nearly_full(kuzzle, clock, room):
    """However little room a store has: nothing is spent whose successor does not fit into it."""
    shared, jwt = Disk(clock, room), kuzzle.login("foo" * 100, ago=1800)
    mine = ProcessStore(shared)
    with contextlib.suppress(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(mine, lease=0.1), timeout=0.5)
    time.sleep(0.3)
    mine.is_gone = True
    shared.room = 1e6
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(shared)).jwt)


def test_attempt_that_fails_beside_another(kuzzle, root, monkeypatch):
    """As long as another process may come back with the answer, a failure of this one makes no verdict possible."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    suspended, is_over = ProcessStore(store := SharedStore()), threading.Event()
    suspended.renews = False

    kuzzle.next_answers.extend([held(kuzzle, is_over), Answer(503)])
    with ThreadPoolExecutor() as pool:
        first = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=TokenCache(suspended))
        while not kuzzle.requests:
            time.sleep(0.01)
        for expected, options in ((UnavailableError, {"queuable": False}), (OutcomeUnknownError, {"timeout": 1})):
            with pytest.raises(expected):
                refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store), **options)
        is_over.set()
        token = first.result()
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store)) == token


def test_only_copy_is_written_down(kuzzle, clock, store, root):
    """A process that has the only copy of a token writes it down as soon as the store is back, whoever asks it."""
    cache = TokenCache(store, clock=clock, lease=0.1)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    store.is_down = True
    time.sleep(0.6)
    clock.advance(HOUR - 4)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    time.sleep(0.5)
    store.is_down = False
    wait_for_copies(cache)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock)) == token


def test_store_that_is_flushed_while_another_is_waited_for(kuzzle, clock, store, root):
    """Who has seen that another spends a token does not say that the session is over before that one has its answer."""
    caches = [TokenCache(store, clock=clock) for _ in range(2)]
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=4))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=caches[0], timeout=15)
        while not kuzzle.requests:
            time.sleep(0.01)
        second = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=caches[1], timeout=15)
        while not any("another process" in each.status for each in [*caches[1]._ledger.flights.values()]):
            time.sleep(0.01)
        store.memory = MemoryStore(timer=clock)
        assert second.result() == first.result()


def test_store_that_is_flushed_while_a_request_is_out(kuzzle, store, root, monkeypatch):
    """A store that loses all while a living process waits for an answer gets back what is about to be spent."""
    monkeypatch.setattr(_rules, "LEASE", 0.3)
    is_over = threading.Event()

    kuzzle.next_answers.append(held(kuzzle, is_over))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=TokenCache(store))
        while not kuzzle.requests:
            time.sleep(0.01)
        store.memory = MemoryStore()
        while not store.memory.keys():
            time.sleep(0.01)
        with pytest.raises(OutcomeUnknownError):
            refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store), timeout=1)
        is_over.set()
        assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store)) == first.result()


def test_clocks_of_callers_differ(kuzzle, clock, store, root):
    """A clock that a cache was given tells nothing about that of another: no dead token is handed out."""
    ahead, mine = TokenCache(store, clock=lambda: clock() + 600), TokenCache(store, clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=ahead, expires_in="100s")
    clock.advance(99)
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=mine, expires_in="100s").jwt)
    clock.advance(2)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=mine, expires_in="100s")
    assert kuzzle.knows(token.jwt)


class BehindProxy:
    """A service behind a proxy that dates the answers by a clock of its own."""

    ahead = 0.0

    def receive(self, request):
        answer = super().receive(request)
        date = formatdate(time.time() + self.ahead, usegmt=True)
        return attrs.evolve(answer, headers={**answer.headers, "Date": date})


class KuzzleBehindProxy(BehindProxy, FakeKuzzle):
    pass


class CircleBehindProxy(BehindProxy, FakeCircle):
    pass


@pytest.mark.holds
@pytest.mark.parametrize("ahead", [1, 3, 10, 7200])
def test_dates_of_a_proxy(ahead):
    """A `Date` that is wrong lets no token be refreshed in its first second, nor any again and again."""
    with KuzzleBehindProxy() as kuzzle:
        kuzzle.ahead, cache = ahead, TokenCache()
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("bar", ago=100), cache=cache)
        jwt = kuzzle.login("foo")
        tokens = [refresh_kuzzle_token(kuzzle.url, jwt, cache=cache) for _ in range(3)]
        assert len(set(tokens)) == 1
        assert kuzzle.knows(tokens[0].jwt)
        assert len(kuzzle.requests) == 2


@pytest.mark.holds
@pytest.mark.parametrize("ahead", [10, 7200])
def test_dates_of_a_proxy_on_ordinary_answers(ahead):
    """There is no token with them to tell that they are wrong: none is refreshed in its first second for that."""
    with KuzzleBehindProxy() as kuzzle:
        kuzzle.ahead = ahead
        for age in (0, HOUR - 20):
            jwt = kuzzle.login("foo", ago=age)
            auth = KuzzleAuth(kuzzle.url, jwt, cache=TokenCache(runtime=Runtime()))
            for _ in range(2):
                assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 200
            assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, jwt, cache=auth._cache).jwt)


@pytest.mark.holds
@pytest.mark.parametrize("told", ["by a date", "by a loss"])
def test_service_whose_clock_is_set_back(told):
    """What was certain of its clock before is not any more: tokens are held back in their first second again."""
    with FakeKuzzle() as kuzzle:
        cache, other = TokenCache(runtime=Runtime()), kuzzle.login("other")
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("bar", ago=100), cache=cache)
        kuzzle.clock.advance(-60)
        if told == "by a date":
            auth = KuzzleAuth(kuzzle.url, other, cache=cache)
            assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 200
        else:
            time.sleep(1 - kuzzle.clock() % 1)  # so that all is in one second
            with pytest.raises(SignInRequiredError, match="the old token"):
                refresh_kuzzle_token(kuzzle.url, kuzzle.login("eve"), cache=cache)
        assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo"), cache=cache).jwt)


def test_service_whose_clock_is_set_forward(store):
    """A busy process does not let another machine's token expire, however certain it was of the time before."""
    with FakeKuzzle() as kuzzle:
        jwt, cache, there = kuzzle.login(ago=60), TokenCache(store, runtime=Runtime()), Runtime()
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("bar", ago=100), cache=cache)
        kuzzle.clock.advance(HOUR / 2)
        there.boot = "another"
        token = refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(store, runtime=there))
        auth = KuzzleAuth(kuzzle.url, jwt, cache=cache)
        with time_machine.travel(time.time() + HOUR - 20):  # also for the service
            for _ in range(2):
                assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 200
        assert auth.jwt != token.jwt


def test_dates_of_a_proxy_that_stay_as_wrong_as_they_are():
    """They are no sign that a clock was set: what a new token has told of it stays certain."""
    with KuzzleBehindProxy() as kuzzle:
        kuzzle.ahead, cache = 7200, TokenCache(runtime=Runtime())
        auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 20), cache=cache)
        for _ in range(2):
            assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 200
        earliest, _, is_certain = cache._ledger.observed.service_now(auth._scope)
        assert is_certain
        assert abs(earliest - kuzzle.clock()) < 5


def test_date_of_an_outage(kuzzle, root, cache):
    """A proxy that says that Kuzzle is down, and dates that years ahead, ends no session."""
    kuzzle.next_answers.append(Answer(503, b"", {"Date": "Wed, 01 Jan 2098 00:00:00 GMT"}))
    due, options = kuzzle.login("bar", ago=HOUR - 20), {"cache": TokenCache(), "queuable": False}
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, **options)
    auth = KuzzleAuth(kuzzle.url, due, **options)
    kuzzle.next_answers.append(Answer(503))
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).json()["result"]["_id"] == "bar"


def test_replies_dated_too_late():
    """A pair that came just now is good, even if the `Date` says that it is over: it is not refreshed at each call."""
    with CircleBehindProxy() as circle:
        circle.ahead, old, cache = 7200, circle.sign_in("user-1", device_id="device-1"), TokenCache()
        tokens = {"user_token": old.user_token, "refresh_token": old.refresh_token, "device_id": "device-1"}
        for _ in range(3):
            refresh_user_token(**tokens, api_key=circle.api_key, base_url=circle.url, cache=cache)
        assert len(circle.requests) == 2


def test_threads_that_share_a_jar(kuzzle):
    """In cookie mode, the session has its cookie at any time."""
    cache, over = TokenCache(), time.monotonic() + 1
    with requests.Session() as session:
        session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1", path="/")

        def call(_):
            while time.monotonic() < over:
                refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session, cache=cache)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, range(4)))
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("first", ["user_id", "user_token"])
def test_one_session_by_two_names(circle, clock, store, first, shared):
    """A session is the same by its user's id and by its user token, but not by another user's id."""
    old = circle.sign_in("user-1", device_id="device-1")
    options = {"device_id": "device-1", "api_key": circle.api_key, "base_url": circle.url, "timeout": 5}
    names = [{"user_id": "user-1"}, {"user_token": old.user_token}]
    caches = [TokenCache(store, clock=clock)] * 2 if not shared else [TokenCache(store), TokenCache(store)]
    pairs = [
        refresh_user_token(refresh_token=old.refresh_token, **name, **options, cache=cache)
        for name, cache in zip(names if first == "user_id" else names[::-1], caches, strict=True)
    ]
    assert pairs[0] == pairs[1]
    assert refresh_user_token(refresh_token=pairs[0].refresh_token, user_id="user-1", **options, cache=caches[0])
    circle.sign_in("user-2", device_id="device-1")
    for cache in caches:
        with pytest.raises(RefreshError):
            refresh_user_token(refresh_token=old.refresh_token, user_id="user-2", **options, cache=cache)


FORKED = """
import multiprocessing, time
from refresher import KuzzleAuth, RefreshError, keep_alive

def work():
    cache = TokenCache(refresher.FileStore(jwts[0]), ahead=1800)
    auths = [KuzzleAuth(url, jwt, cache=cache) for jwt in jwts[1:]]
    threading.Thread(target=lambda: [*keep_alive(auths)], daemon=True).start()
    while sum(flight.has_departed for flight in list(cache._ledger.flights.values())) < 4:
        time.sleep(0.01)

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_daemon_of_a_child_that_ends(tmp_path):
    """What a daemon thread would begin at the end of a child that runs no handlers of atexit is not begun."""
    with FakeKuzzle(grace=0.01) as kuzzle:
        jwts = [kuzzle.login(f"user-{number}", ago=3000) for number in range(9)]
        kuzzle.next_answers += [functools.partial(kuzzle.truly, after=0.1 + 0.05 * number) for number in range(9)]
        run(PRELUDE + FORKED, kuzzle.url, str(tmp_path), *jwts)
        cache = TokenCache(FileStore(tmp_path))
        assert 0 < len(kuzzle.requests) < 9
        for jwt in jwts:
            assert kuzzle.knows(KuzzleAuth(kuzzle.url, jwt, cache=cache).jwt)


class Ending(Runtime):
    """At the very end of a process."""

    def start(self, work, *, daemon=False):
        raise EndingError("The process is ending, so nothing was sent", spent=False)


def test_call_at_the_very_end(kuzzle, root):
    """A valid token is used, though nothing can be begun any more. Without one, the call is told."""
    with pytest.raises(UnavailableError, match="is ending"):
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(runtime=Ending()))
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), cache=TokenCache(runtime=Ending()))
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 200
    with pytest.raises(UnavailableError, match="is ending"):
        auth.sign_out()
    assert not kuzzle.requests[1:]


FLUSHED = """
import atexit, logging, logging.handlers, queue, sys, threading, time

class Handler(logging.Handler):
    def emit(self, record):
        go.wait()
        try:
            print(refresh_kuzzle_token(*sys.argv[4:], cache=cache).kuid)
        except UnavailableError as error:
            print(error)

def stop():
    go.set()
    listener.stop()

go, queued = threading.Event(), queue.Queue()
listener = logging.handlers.QueueListener(queued, Handler())
listener.start()
if sys.argv[1] == "before":
    atexit.register(stop)
from refresher import FileStore, TokenCache, UnavailableError, refresh_kuzzle_token
if sys.argv[1] == "after":
    atexit.register(stop)
logging.disable()
cache = TokenCache(FileStore(sys.argv[3]))
if sys.argv[2] == "known":
    refresh_kuzzle_token(*sys.argv[4:], cache=cache)
    time.sleep(0.6)  # then the store is looked at again
queued.put(logging.makeLogRecord({}))
"""


@pytest.mark.parametrize("is_known", ["known", "unknown"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_daemon_thread_flushes_at_the_end(kuzzle, root, tmp_path, when, is_known):
    """A handler of atexit waits for a thread that calls: that goes on with a valid token, or is told if it has none."""
    told = "foo\n" if is_known == "known" else "The process is ending, so nothing was sent\n"
    assert run(FLUSHED, when, is_known, str(tmp_path), kuzzle.url, root) == told


DAEMONS = """
import logging, sys, threading, time
from refresher import KuzzleAuth, RefreshError, TokenCache, keep_alive, refresh_kuzzle_token

def use(jwt, timeout):
    while True:
        try:
            refresh_kuzzle_token(sys.argv[1], jwt, timeout=timeout)
        except RefreshError:
            time.sleep(0.2)

def keep():
    while True:
        list(keep_alive([KuzzleAuth(sys.argv[1], jwt, cache=due, timeout=None) for jwt in sys.argv[2:]]))

logging.disable()
due = TokenCache(ahead=3600)
threading.Thread(target=keep, daemon=True).start()
for jwt, timeout in zip(sys.argv[2:], (None, 2, 2, 2, 2)):
    threading.Thread(target=use, args=(jwt, timeout), daemon=True).start()
time.sleep(1)
"""


def test_process_whose_daemon_threads_call_for_ever():
    """It ends all the same: a service that is down is not asked for the sake of threads that end with it."""
    with FakeKuzzle() as kuzzle:
        jwts = logins(kuzzle, 5)
    run(DAEMONS, kuzzle.url, *jwts)


NOBODY_GOES_ON = """
import logging, sys
from refresher import KuzzleAuth, TokenCache, keep_alive

logging.disable()
due, auth = TokenCache(ahead=3600), KuzzleAuth(sys.argv[1])
outcomes = keep_alive([*(KuzzleAuth(sys.argv[1], jwt, cache=due, timeout=None) for jwt in sys.argv[2:]), auth])
print(next(outcomes).outcome)
"""


def test_process_that_leaves_keep_alive_in_the_middle():
    """It ends all the same: nobody takes the outcomes that are to come."""
    with FakeKuzzle() as kuzzle:
        jwts = [kuzzle.login(f"user-{number}", ago=3000) for number in range(3)]
    assert run(NOBODY_GOES_ON, kuzzle.url, *jwts) == "skipped\n"


MAIN_ENDS = """
import sys, threading, time
from refresher import refresh_kuzzle_token

def use():
    threading.main_thread().join()
    refresh_kuzzle_token(*sys.argv[1:])
    done.set()

def work():
    if not done.wait(20):
        sys.exit("the daemon thread waits for ever")

done = threading.Event()
threading.Thread(target=use, daemon=True).start()
threading.Thread(target=work).start()
"""


def test_daemon_thread_whose_main_thread_has_ended():
    """It is served for as long as the process lives, which others may keep alive."""
    with FakeKuzzle() as kuzzle:
        run(MAIN_ENDS, kuzzle.url, kuzzle.login(ago=1800))
        assert len(kuzzle.requests) == 1


FORK = """
import importlib.abc, os, sys, threading, time, warnings
import refresher

class Slowly(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *others):
        if name == sys.argv[1]:
            began.set()
            time.sleep(1)

def work():
    refresher.TokenCache
    refresher._cache.import_http()
    refresher.EncryptedStore(refresher.MemoryStore(), [b"A" * 43 + b"="])

began = threading.Event()
warnings.simplefilter("ignore")  # that this process has threads, and forks
sys.meta_path.insert(0, Slowly())
threading.Thread(target=work).start()
began.wait()
child = os.fork()
work()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("module", ["refresher._cache", "refresher._http", "refresher.stores.encrypted"])
def test_fork_in_the_middle_of_an_import(module):
    """The child does not wait for a thread that only its parent has."""
    run(FORK, module)


def test_work_that_begins_at_the_very_end(monkeypatch):
    """Once Python has waited for its threads, a thread does its work itself, and nothing begins in a new one."""
    ended, runtime, done = threading.Thread(), Runtime(), []
    runtime._end()
    runtime.start(lambda: done.append(1))
    monkeypatch.setattr(threading, "main_thread", lambda: ended)
    runtime._wait_for(lambda: done.append(2))
    assert done == [1]
    assert not runtime._running


def test_forgotten_while_the_store_is_down(kuzzle, store, root):
    """The process has forgotten the session, as the error says, and the store does when it's back."""
    cache = TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    store.is_down = True
    with pytest.raises(UnavailableError, match="call again"):
        cache.forget(kuzzle.url, root)
    store.is_down = False
    assert cache.peek(kuzzle.url, root).state == "unknown"
    refresh_kuzzle_token(kuzzle.url, kuzzle.login("bar", ago=1800), cache=cache)
    wait_for_copies(cache)
    assert TokenCache(store).peek(kuzzle.url, root).state == "unknown"


@pytest.mark.parametrize("is_down", [False, True], ids=["", "while the store is down"])
@pytest.mark.parametrize("forget", ["forget", "clear"])
def test_forgotten_by_a_process_that_is_behind(kuzzle, store, root, forget, is_down):
    """What others have refreshed many times since it looked is forgotten, too."""
    mine, theirs = TokenCache(store), TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, root, cache=mine)
    for hours in range(2, 8):
        refresh_kuzzle_token(kuzzle.url, root, expires_in=f"{hours}h", cache=theirs)
    store.is_down = is_down
    with pytest.raises(UnavailableError, match="call again") if is_down else contextlib.nullcontext():
        getattr(mine, forget)(*((kuzzle.url, root) if forget == "forget" else ()))
    store.is_down = False
    refresh_kuzzle_token(kuzzle.url, kuzzle.login("bar", ago=1800), cache=mine)
    wait_for_copies(mine)
    assert [each.peek(kuzzle.url, root).state for each in (mine, theirs, TokenCache(store))] == ["unknown"] * 3


@pytest.mark.parametrize("forget", ["forget", "clear"])
def test_forgotten_in_a_refresh_while_the_store_is_down(kuzzle, store, root, forget):
    """Its result is not kept: neither here nor, later, in the store."""
    cache, gone = TokenCache(store), threading.Event()
    kuzzle.next_answers.append(lambda request: gone.wait(10) and kuzzle.truly(request))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache)
        while not kuzzle.requests:
            time.sleep(0.001)
        store.is_down = True
        with pytest.raises(UnavailableError, match="call again"):
            getattr(cache, forget)(*((kuzzle.url, root) if forget == "forget" else ()))
        gone.set()
        assert waiting.result(10).kuid == "foo"
    store.is_down = False
    wait_for_copies(cache)
    assert [each.peek(kuzzle.url, root).state for each in (cache, TokenCache(store))] == ["unknown"] * 2


def test_successor_of_a_session_that_is_known_to_have_ended(kuzzle, store, root):
    """It is kept to be signed out, and for nothing else, also if the store has not heard of the end."""
    cache = TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    ledger = cache._ledger
    chain = ledger.chains.get(key_of("kuzzle:2", kuzzle.url, root))
    ledger.bury(chain, has_ended=True)
    ledger.keep(chain)
    assert list(ledger.orphans.values()) == [(chain.key, chain.newest)]
    assert ledger.chains.get(chain.key).newest is None


def test_write_that_hangs(kuzzle, clock, root):
    """While a write hangs, the token is used and refreshed all the same, and threads do not pile up."""

    class Hanging(SharedStore):
        over = threading.Event()
        is_hanging = False

        def set(self, key, value, seconds):
            if self.is_hanging and "-" not in key:
                self.over.wait(60)
            return super().set(key, value, seconds)

    store = Hanging(clock)
    cache = TokenCache(store, clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 20)
    store.is_hanging, before = True, threading.active_count()
    second = refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)
    for _ in range(8):
        time.sleep(0.55)
        second = refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)
    assert threading.active_count() - before < 8
    clock.advance(HOUR - 2)
    third = refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)
    assert third != second
    assert kuzzle.knows(third.jwt)
    store.over.set()
    store.is_hanging = False
    wait_for_copies(cache)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock)) == third


@pytest.mark.parametrize("age", [{}, {"Age": "7200"}])
def test_answers_that_were_kept(age):
    """An answer that a cache on the way has kept says nothing of the time."""
    with FakeKuzzle() as kuzzle:
        auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=60), cache=TokenCache(clock=time.time))
        old = {"Date": formatdate(time.time() - 7200, usegmt=True), **age}
        kuzzle.next_answers.append(lambda request: attrs.evolve(kuzzle.truly(request), headers=old))
        requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)
        assert math.isinf(auth._cache._ledger.observed.service_now(auth._scope)[0]) == bool(age)


@pytest.fixture
def moved(clock):
    """A process whose clocks are moved by hand."""
    runtime, start = Runtime(), clock()
    runtime.steady, runtime.now = lambda: time.monotonic() + clock() - start, clock
    return runtime


def settle():
    """Wait for the threads that write something down which nobody waits for."""
    for thread in threading.enumerate():
        if thread.name == "refresher" and not thread.daemon:
            thread.join(10)


@pytest.mark.parametrize("is_restarted", [False, True])
def test_later_token_that_is_used_for_days(kuzzle, clock, moved, is_restarted):
    """Any token of a session leads to it, if it is used once a day: in new processes, or in one that ends at last."""
    store, written = SharedStore(clock), []
    write, store.set = store.set, lambda *entry: (written.append(entry[0]), write(*entry))[1]
    cache = TokenCache(store, runtime=moved, ahead=1800)
    later = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache).jwt
    for _ in range(8):
        clock.advance(0.9 * HOUR)
        cache = TokenCache(store, runtime=moved, ahead=1800) if is_restarted else cache
        newest = refresh_kuzzle_token(kuzzle.url, later, expires_in="9h", cache=cache)
        settle()
        clock.advance(8 * HOUR)
        written.clear()
        for _ in range(2):
            assert refresh_kuzzle_token(kuzzle.url, later, expires_in="9h", cache=cache) == newest
            settle()
            clock.advance(1)
        assert len(written) == 1, "a few times a day are enough"
    assert refresh_kuzzle_token(kuzzle.url, later, cache=TokenCache(store, runtime=moved, ahead=1800)) == newest


def test_later_token_in_a_busy_process(kuzzle, clock, moved):
    """That is so too if memory answers, since others use the session a moment before."""
    store, first = SharedStore(clock), kuzzle.login(ago=1800)
    cache = TokenCache(store, runtime=moved)
    later = refresh_kuzzle_token(kuzzle.url, first, cache=cache).jwt
    newest = refresh_kuzzle_token(kuzzle.url, later, expires_in="99h", cache=cache)
    for _ in range(7):
        clock.advance(5 * HOUR)
        for jwt in (first, later):
            assert refresh_kuzzle_token(kuzzle.url, jwt, cache=cache) == newest
        settle()
    assert refresh_kuzzle_token(kuzzle.url, later, cache=TokenCache(store, runtime=moved)) == newest


@pytest.mark.parametrize("soon", [4.7, 5.9])
def test_later_token_that_is_used_once_a_day(kuzzle, clock, moved, soon):
    """It counts when it was last used, though that is not written down each time."""
    store = SharedStore(clock)
    cache = TokenCache(store, runtime=moved)
    later = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache).jwt
    newest = refresh_kuzzle_token(kuzzle.url, later, expires_in="99h", cache=cache)
    for hours in (0, soon, 23.8):
        clock.advance(hours * HOUR)
        cache = cache if hours < 10 else TokenCache(store, runtime=moved)
        assert refresh_kuzzle_token(kuzzle.url, later, cache=cache) == newest
        settle()


def test_later_token_while_the_store_is_down(kuzzle, clock):
    """Memory is trusted for half a second, as with any token."""
    store = SharedStore(clock)
    cache = TokenCache(store)
    later = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache).jwt
    newest = refresh_kuzzle_token(kuzzle.url, later, expires_in="9h", cache=cache)
    cache._ledger._led_at.clear()  # as if that was hours ago
    store.is_down = True
    assert refresh_kuzzle_token(kuzzle.url, later, cache=cache) == newest
    settle()
    commands = store.commands
    assert refresh_kuzzle_token(kuzzle.url, later, cache=cache) == newest
    assert store.commands == commands > 0


def test_store_that_reads_and_does_not_write(kuzzle, clock):
    """To lead a token to its session again is nothing that a call waits for."""
    store, go_on = SharedStore(clock), threading.Event()
    later = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=TokenCache(store)).jwt
    newest = refresh_kuzzle_token(kuzzle.url, later, expires_in="9h", cache=TokenCache(store))
    store.set = lambda *_: go_on.wait(20)
    assert refresh_kuzzle_token(kuzzle.url, later, cache=TokenCache(store), timeout=5) == newest
    assert not go_on.is_set()
    go_on.set()
    settle()


@pytest.mark.parametrize("is_later", [False, True])
@pytest.mark.parametrize("what", ["jwt", "request", "keep_alive", "sign_out"])
def test_auth_object_that_was_idle_for_days(kuzzle, clock, moved, what, is_later):
    """It knows its session again that others have refreshed meanwhile, though its token has been forgotten."""
    store, first = SharedStore(clock), kuzzle.login(ago=3500)
    cache, other = (TokenCache(store, runtime=moved, ahead=4000) for _ in range(2))
    given = refresh_kuzzle_token(kuzzle.url, first, cache=other).jwt if is_later else first
    auth = KuzzleAuth(kuzzle.url, given, cache=cache)
    requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)
    for _ in range(8):
        newest = refresh_kuzzle_token(kuzzle.url, first, expires_in="9h", cache=other).jwt
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache)  # of another user: it makes room for that
        clock.advance(8 * HOUR)
    settle()
    assert auth._sign_in.credential.secret.reveal() not in (first, newest)
    if what == "jwt":
        assert auth.jwt == newest
    elif what == "request":
        assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).json()["result"]["_id"] == "foo"
    elif what == "keep_alive":
        assert [each.outcome for each in keep_alive([auth])] == ["refreshed"]
    else:
        auth.sign_out()
        assert not kuzzle.knows(newest)


def test_other_name_after_days(circle):
    """The first tokens of a session lead to it by its other name, too, when they were spent days ago."""
    old, store = circle.sign_in("user-1", device_id="device-1"), SharedStore(circle.clock)
    options = {"refresh_token": old.refresh_token, "device_id": "device-1", "api_key": circle.api_key}

    def call(**name):
        cache = TokenCache(store, clock=circle.clock)
        return refresh_user_token(**options, **name, base_url=circle.url, cache=cache, timeout=5)

    call(user_token=old.user_token)
    circle.clock.advance(48 * HOUR)
    assert call(user_token=old.user_token) == call(user_id="user-1")


def test_write_that_comes_too_late(kuzzle, store, root, monkeypatch):
    """A write that was slow may have taken the place of a newer token. That is written down again."""
    cache = TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    key = key_of("kuzzle:2", kuzzle.url, root)
    older = cache._ledger.chains.get(key)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache, expires_in="3h")
    wait_for_copies(cache)
    monkeypatch.setattr(_rules, "TRUSTED", -1.0)
    store.delete(key)  # as it was when the write began
    cache._ledger.save(older)
    assert cache._ledger.unsaved[key].newest.token == token


def test_child_of_a_process_that_waits_for_its_store(kuzzle, store, root):
    """What a parent's threads wait for is no trouble of a forked child's: it asks the store for what is newer."""
    runtime = Runtime()
    cache = TokenCache(store, runtime=runtime)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    newer = refresh_kuzzle_token(kuzzle.url, token.jwt, expires_in="2h", cache=TokenCache(store))
    over = threading.Event()
    threading.Thread(target=cache._ledger.ask, args=("is asked", over.wait)).start()
    while not cache._ledger.probe_if_hung():
        time.sleep(0.01)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    runtime.process = lambda: -1
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == newer
    assert cache._ledger.delay() < 0.5
    over.set()


def test_one_command_that_never_ends(kuzzle, store, root):
    """A connection that is dead says nothing of the store: others do what it is asked."""
    cache = TokenCache(store)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    newer = refresh_kuzzle_token(kuzzle.url, token.jwt, expires_in="2h", cache=TokenCache(store))
    cache._ledger._looked_at.clear()
    cache._ledger._asked[object()], cache._ledger._answered_at = REAL.steady() - 60, -math.inf
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token
    until = time.monotonic() + 10
    while refresh_kuzzle_token(kuzzle.url, root, cache=cache) != newer:
        assert time.monotonic() < until


def test_store_that_hangs_is_asked_ever_less_often(store):
    """Each of those who ask may never come back."""
    runtime, asked = Runtime(), []
    ledger = TokenCache(store, runtime=runtime)._ledger
    ledger._asked[object()], ledger._answered_at = 0.0, 0.1  # another was answered just before it began to hang
    for second in range(3600):
        runtime.steady = lambda now=float(second): now
        runtime.start = lambda work, *, daemon, second=second: asked.append(second)
        assert ledger.probe_if_hung() == (second >= 1)
        if second in asked:
            ledger._asked[object()] = float(second)
    assert asked == [10, 20, 40, 80, 160, 320, 640, 1280, 2560]


def test_chain_that_two_threads_save(kuzzle, store, root):
    """Who comes second finds that it is done."""
    cache = TokenCache(store)
    ledger = cache._ledger
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    (chain,) = map(ledger.chains.get, ledger.chains.keys())

    class Shared(dict):
        def get(self, key):
            return self.pop(key, None)  # and another thread goes on in between

    ledger.unsaved = Shared({chain.key: chain})
    assert ledger.save(chain)
    written = store.commands
    ledger.unsaved = Shared()
    ledger.unsaved.values = lambda: [chain]
    ledger.save_all()
    assert store.commands == written


def test_orphans_after_an_outage(kuzzle, store, root):
    """What is found to be too late for a sign-out when the store is back is signed out then."""
    cache, done = TokenCache(store), threading.Event()
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    ledger = cache._ledger
    ledger.unsaved = {chain.key: chain for chain in map(ledger.chains.get, ledger.chains.keys())}
    ledger.save_later(done.set)
    assert done.wait(10)
    assert not ledger.unsaved


def test_one_thread_waits_for_the_store(store, root, kuzzle):
    """However many refreshes could not write down what they brought."""
    cache = TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    ledger, store.is_down, done = cache._ledger, True, []
    ledger.unsaved = {chain.key: chain for chain in map(ledger.chains.get, ledger.chains.keys())}
    for _ in range(2):
        ledger.save_later(lambda: done.append(None))
        wait_until(lambda: ledger._is_saving)
    store.is_down = False
    wait_until(lambda: not ledger._is_saving)
    time.sleep(0.1)
    assert len(done) == 1


@pytest.mark.parametrize("lease", [0.0, 0.1])
def test_orphan_that_is_found_after_an_outage(kuzzle, store, root, lease):
    """It is signed out at once, and not by the next refresh, which may never come."""
    cache, other = TokenCache(store, lease=lease), TokenCache(store)

    def meanwhile(request):
        chain = other._ledger.recall(kuzzle_credential(kuzzle.url, root))[0]
        assert other._ledger.drop(chain, {chain.key}, has_ended=True)
        store.is_down = True
        return kuzzle.truly(request)

    kuzzle.next_answers.append(meanwhile)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    wait_until(lambda: cache._ledger._is_saving)
    assert kuzzle.knows(token.jwt)
    store.is_down = False
    wait_until(lambda: not kuzzle.knows(token.jwt))


def test_connections_of_a_late_sign_out(kuzzle, store, root, monkeypatch):
    """What comes too late for a sign-out is signed out by the caller's session, as it was refreshed."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(_rules, "LEASE", 0.5)
    cache, other, session = TokenCache(store, lease=0.5), TokenCache(store), requests.Session()
    session.trust_env = False

    def meanwhile(request):
        chain = other._ledger.recall(kuzzle_credential(kuzzle.url, root))[0]
        assert other._ledger.drop(chain, {chain.key}, has_ended=True)
        return kuzzle.truly(request)

    kuzzle.next_answers.append(meanwhile)
    others = kuzzle.login("others", ago=60)
    cache._ledger.orphans["key"] = "another chain", kuzzle_credential(kuzzle.url, others)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, session=session, timeout=5)
    wait_until(lambda: "key" in cache._ledger.orphans and kuzzle.requests[-1].path == "/_logout")
    assert kuzzle.knows(others), "its own connections are another caller's"


def test_lock_that_a_failed_command_leaves(store):
    """Whoever asks again for a lock that it has, and gets no answer, has it still."""
    lease = Lease(TokenCache(store)._ledger, "chain", "owner")
    lease.take()
    store.failing.append("acquire")
    lease.take()
    assert lease.is_ours()
    lease.give_back()
    assert store.acquire("chain", "another", 5) == 0.0


def test_clock_of_a_service(clock):
    """What time it is there lies between a question and its answer, and each of them narrows it down."""
    observed, start = TokenCache(clock=clock)._ledger.observed, clock()
    clock.advance(60)
    observed.learn("here", 1000.0, 60.0)  # a process that was suspended reads its answer late
    assert observed.service_now("here") == (1000, 1060, False)
    clock.advance(10)
    observed.learn("here", 1065.0, 1.0)
    assert observed.service_now("here") == (1065, 1066, False)
    observed.learn("here", 1050.0, 30.0)
    assert observed.service_now("here") == (1065, 1066, False)
    observed.learn("here", 900.0, 1.0)  # it was set
    assert observed.service_now("here") == (900, 901, False)
    assert clock() == start + 70


def test_successor_that_is_written_at_the_second_try(kuzzle, root):
    """Until a successor is written down, others see that the token is being spent, or they would sign people out."""
    unsaved = []

    class Watched(SharedStore):
        def delete(self, key):
            unsaved.append(dict(cache._ledger.unsaved))
            super().delete(key)

    def answer(request):
        store.failing.append("set")
        return kuzzle.truly(request)

    cache = TokenCache(store := Watched())
    kuzzle.next_answers.append(answer)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    wait_for_copies(cache)
    assert unsaved
    assert not any(unsaved)


def test_store_that_was_slow_to_fail(clock):
    """Others may still wait for it as long as its slowest command took: nobody is told to sign in meanwhile."""
    runtime = Runtime()
    runtime.steady = clock
    ledger = TokenCache(SharedStore(), runtime=runtime)._ledger

    def fail(seconds):
        clock.advance(seconds)
        raise TimeoutError

    for seconds in (9, 1):
        ledger.ask("cannot be read", fail, seconds)
    clock.advance(8)
    assert not ledger.is_settled()
    clock.advance(4)
    assert ledger.is_settled()
    clock.advance(60)
    ledger.ask("cannot be read", fail, 1)
    clock.advance(4)
    assert ledger.is_settled()


def test_two_names_at_once(circle):
    """A session that is called by its user's id and by a user token at one moment is refreshed once."""
    old, store, is_over = circle.sign_in("user-1", device_id="device-1"), SharedStore(), threading.Event()

    def call(**name):
        options = {"refresh_token": old.refresh_token, "device_id": "device-1", "api_key": circle.api_key, **name}
        return refresh_user_token(**options, base_url=circle.url, cache=TokenCache(store))

    circle.next_answers.append(held(circle, is_over))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, user_token=old.user_token)
        while not circle.requests:
            time.sleep(0.01)
        second = pool.submit(call, user_id="user-1")
        time.sleep(0.3)
        is_over.set()
        assert first.result() == second.result()


def test_attempt_that_departs_late(kuzzle, root, monkeypatch):
    """A token is announced anew if it took long to connect: others wait for the answer from when it was sent."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    suspended, is_over = ProcessStore(store := SharedStore()), threading.Event()

    def answer(request):
        suspended.renews = False
        return held(kuzzle, is_over)(request)

    kuzzle.next_answers.append(answer)
    kuzzle.stop()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=TokenCache(suspended, lease=1))
        time.sleep(1.5)
        kuzzle.start()
        while not kuzzle.requests:
            time.sleep(0.01)
        second = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=TokenCache(store, lease=1))
        time.sleep(0.7)
        is_over.set()
        assert first.result() == second.result()


AT_EXIT = """
import atexit

def refresh():
    cache = TokenCache(refresher.FileStore(jwts[1]))
    try:
        refresh_kuzzle_token(url, jwts[0], cache=cache, timeout=1.3)
    except OutcomeUnknownError:
        pass

atexit.register(refresh)
"""


def test_handler_that_refreshes_at_the_end(kuzzle, root, tmp_path):
    """A process that ends waits for what a handler of atexit has sent, though Python has waited for its threads."""
    kuzzle.delay_next(3.0)
    run(PRELUDE + "from refresher import OutcomeUnknownError\n" + AT_EXIT, kuzzle.url, root, str(tmp_path))
    token = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(FileStore(tmp_path)))
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 1


KEEPS_AT_EXIT = """
import atexit
from refresher import KuzzleAuth, keep_alive

def keep():
    print([outcome.outcome for outcome in keep_alive([KuzzleAuth(url, jwts[0], cache=TokenCache())])])

atexit.register(keep)
"""


def test_keeper_at_the_end_of_the_process(kuzzle):
    """keep_alive works in a handler of atexit, too."""
    assert run(PRELUDE + KEEPS_AT_EXIT, kuzzle.url, kuzzle.login(ago=HOUR - 10)) == "['refreshed']\n"


OUTLIVES = """
from refresher import KuzzleAuth, keep_alive

def keep():
    threading.main_thread().join()
    print([outcome.outcome for outcome in keep_alive([KuzzleAuth(url, jwts[0], cache=TokenCache())])])

threading.Thread(target=keep).start()
"""


def test_keeper_that_outlives_the_main_thread(kuzzle):
    """keep_alive works in a thread that outlives the main thread, where Python has closed its pools."""
    assert run(PRELUDE + OUTLIVES, kuzzle.url, kuzzle.login(ago=HOUR - 10)) == "['refreshed']\n"


def test_each_thread_writes_for_itself(kuzzle, store, root):
    """One thread's end of patience is not another's: a chain is written down as long as one of them wants."""
    cache = TokenCache(store)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    wait_for_copies(cache)
    ledger, key = cache._ledger, key_of("kuzzle:2", kuzzle.url, root)
    store.is_down = True
    ledger.unsaved[key] = attrs.evolve(ledger.chains.get(key), generation=7)
    with ThreadPoolExecutor() as pool:
        pool.submit(ledger.save_until, key, 3)
        ledger.save_until(key, 0.5)
        assert ledger.unsaved
        time.sleep(0.5)
        store.is_down = False
    assert not ledger.unsaved


def test_what_comes_while_a_chain_is_written_down(kuzzle, root):
    """A thread that has written a chain down goes on with what another has left to it meanwhile."""

    class Watched(SharedStore):
        def set(self, key, value, seconds):
            super().set(key, value, seconds)
            if json.loads(value).get("generation") == 7:
                ledger.unsaved[key] = attrs.evolve(ledger.chains.get(key), generation=8).with_text()

    ledger, key = (cache := TokenCache(store := Watched()))._ledger, key_of("kuzzle:2", kuzzle.url, root)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    wait_for_copies(cache)
    ledger.unsaved[key] = attrs.evolve(ledger.chains.get(key), generation=7).with_text()
    ledger.save_until(key, 1)
    assert not ledger.unsaved
    assert json.loads(store.get(key))["generation"] == 8


def test_keeper_after_a_flush(kuzzle, clock, monkeypatch):
    """That a store has lost its entries costs no time, so no session is skipped for it."""
    monkeypatch.setattr(_keeper, "_WASTE", 0.0)
    store = SharedStore(clock)
    cache = TokenCache(store, clock=clock)
    auths = [KuzzleAuth(kuzzle.url, jwt, cache=cache) for jwt in logins(kuzzle, 3)]
    assert [each.outcome for each in keep_alive(auths)] == ["fresh"] * 3
    refresh_each(kuzzle, [auth.jwt for auth in auths], cache)
    store.memory = MemoryStore(timer=clock)
    assert [each.outcome for each in keep_alive(auths)] == ["fresh"] * 3


def test_circle_has_failed(circle):
    """Where Circle has answered that it failed, it is left alone for a while, as long as the old pair is valid."""
    call = {**call_with(circle, circle.sign_in()), "cache": TokenCache(clock=circle.clock), "retry": False}
    refresh_user_token(**call)
    circle.clock.advance(HOUR - 20)
    circle.next_answers.append(Answer(500, b""))
    with pytest.raises(OutcomeUnknownError):
        refresh_user_token(**call)
    before = len(circle.requests)
    assert refresh_user_token(**call)
    assert len(circle.requests) == before


def test_pair_after_a_lost_answer(circle):
    """To call again after an answer was lost brings it at once, and not the pair that it has replaced."""
    call = {**call_with(circle, circle.sign_in()), "cache": TokenCache(clock=circle.clock), "retry": False}
    refresh_user_token(**call)
    circle.clock.advance(HOUR - 20)
    circle.next_answers.append(lambda request: circle.truly(request) and b"")
    with pytest.raises(OutcomeUnknownError):
        refresh_user_token(**call)
    assert circle.knows(refresh_user_token(**call))


@pytest.mark.parametrize("is_new", [False, True])
def test_flush_while_another_process_has_the_newest_token(kuzzle, clock, is_new):
    """
    Nobody is told to sign in right after a store has lost its entries: another process may put back a newer one.

    Nor is a process that *is_new* and knows nothing: a token that is valid, and refused, may have been spent.
    """
    store = SharedStore(clock)
    busy, other = (TokenCache(store, clock=clock) for _ in range(2))
    root = kuzzle.login(ago=1800)

    def call(cache):
        return refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)

    newest = call(busy)
    if not is_new:
        assert call(other) == newest
        clock.advance(HOUR - 20)
        newest = call(busy)
    wait_for_copies(busy)
    store.memory = MemoryStore(timer=clock)
    threading.Timer(1.0, call, [busy]).start()
    assert call(other) == newest


def test_sign_out_after_a_flush(kuzzle, clock):
    """If the token was refused, its session may live on with one that the store has lost: that is signed out."""
    store = SharedStore(clock)
    busy, other = (TokenCache(store, clock=clock) for _ in range(2))
    root = kuzzle.login(ago=1800)
    newest = refresh_kuzzle_token(kuzzle.url, root, cache=busy)
    wait_for_copies(busy)
    clock.advance(2)  # Kuzzle accepts a spent token for a second
    store.memory = MemoryStore(timer=clock)
    threading.Timer(1.0, refresh_kuzzle_token, [kuzzle.url, root], {"cache": busy}).start()
    KuzzleAuth(kuzzle.url, root, cache=other, timeout=10).sign_out()
    assert not kuzzle.knows(newest.jwt)


def test_suspended_after_a_refusal(kuzzle, clock, root):
    """A process that was suspended does not know how the store was meanwhile: it gives others time once more."""
    store, elsewhere, runtime, slept = SharedStore(clock), SharedStore(clock), Runtime(), []
    newest = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(elsewhere, clock=clock))
    wait = runtime.wait

    def put_back():
        for key, text in entries(elsewhere).items():
            store.set(key, text, HOUR)

    def be_suspended(event, seconds):
        if len(kuzzle.requests) == 2 and not slept and threading.current_thread() is not threading.main_thread():
            slept.append(3)
            threading.Timer(0.7, put_back).start()
        return wait(event, seconds)

    runtime.steady, runtime.wait = lambda: time.monotonic() + sum(slept), be_suspended
    cache = TokenCache(store, clock=clock, runtime=runtime)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=20) == newest


def test_two_chains_that_are_one(kuzzle, clock, monkeypatch):
    """A store that has lost its entries makes two chains of one. Who knows both goes on with the newer token."""
    monkeypatch.setattr(_rules, "TRUSTED", -1.0)
    store = SharedStore(clock)
    ours, other = (TokenCache(store, clock=clock) for _ in range(2))
    root = kuzzle.login(ago=1800)
    first = refresh_kuzzle_token(kuzzle.url, root, cache=ours)
    clock.advance(60)
    store.memory = MemoryStore(timer=clock)
    newest = refresh_kuzzle_token(kuzzle.url, first.jwt, expires_in="2h", cache=other)
    wait_for_copies(other)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=ours) == first  # who has never had a newer one puts it back
    wait_for_copies(ours)
    for cache in other, ours, TokenCache(store, clock=clock):
        assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == newest
        wait_for_copies(cache)
        clock.advance(1)
    assert len(kuzzle.requests) == 2


def test_two_chains_that_meet(kuzzle, clock):
    """The token of one may be in the middle of the other. To look at a session writes nothing."""
    cache = TokenCache(store := SharedStore(clock), clock=clock)
    root, jwt = kuzzle.login(ago=1800), kuzzle.login(ago=900)
    second = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    clock.advance(60)
    newest = refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h", cache=cache)
    wait_for_copies(cache)
    of_root = kuzzle_credential(kuzzle.url, root)
    known = cache._ledger.chains.get(kuzzle_credential(kuzzle.url, jwt).keys[0])
    other = attrs.evolve(known, key=of_root.keys[0], newest=of_root.following(second), generation=9).with_text()
    store.set(other.key, other.text, HOUR)
    before = entries(store)
    assert cache.peek(kuzzle.url, root).fingerprint == newest.fingerprint
    assert entries(store) == before
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == newest
    assert len(kuzzle.requests) == 2


@pytest.mark.holds
def test_short_calls_of_many_processes(kuzzle, root):
    """What calls of less than a second have seen of a token in one process counts in the next."""
    store = SharedStore()
    boot = Runtime().boot

    def call():
        runtime = Runtime()
        runtime.boot = boot
        return refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, runtime=runtime), timeout=0.8)

    with pytest.raises(UnavailableError, match="may have issued"):
        call()
    time.sleep(0.4)
    assert kuzzle.knows(call().jwt)


def test_short_call_with_a_living_token(kuzzle, clock, store, cache, root):
    """A call whose time is up goes on with a token that is still valid, however short its time was."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 40)
    kuzzle.delay_next(2.0)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=0.3) == token


def test_refusals_that_are_no_verdict(kuzzle, root, monkeypatch):
    """A call that was refused, and had no time to wait for another's answer, does not keep the next from a verdict."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    killed = ProcessStore(store := SharedStore())

    def answer(request):
        killed.is_gone = True
        return held(kuzzle, threading.Event())(request)

    kuzzle.next_answers.append(answer)
    with pytest.raises(RefreshError):
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(killed, lease=0.1), timeout=0.3, queuable=False)
    cache, errors = TokenCache(store, lease=2), []
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline and SignInRequiredError not in errors:
        with pytest.raises(RefreshError) as caught:
            refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=0.7)
        errors.append(caught.type)
    assert errors[0] is OutcomeUnknownError
    assert errors[-1] is SignInRequiredError


@pytest.mark.parametrize("make", [TokenCache, lambda: None])
def test_copies_of_an_auth_object(kuzzle, make):
    """A deep copy has the same cache, or each would spend the session's token on its own."""
    auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 10), cache=make())
    for each in (copy.deepcopy(auth), auth):
        assert requests.get(f"{kuzzle.url}/_me", auth=each, timeout=10).status_code == 200


def test_flush_long_after_an_outage(clock):
    """How long commands took to fail an hour ago does not matter when the store loses its entries now."""
    runtime = Runtime()
    runtime.steady = clock
    ledger = TokenCache(SharedStore(), runtime=runtime)._ledger

    def fail():
        clock.advance(30)
        raise TimeoutError

    ledger.ask("cannot be read", fail)
    clock.advance(HOUR)
    ledger.unsettle()
    assert not ledger.is_settled()
    clock.advance(3)
    assert ledger.is_settled()


class FullStore(SharedStore):
    """It can be read, and not be written while it is full."""

    is_full = False

    def set(self, key, value, seconds):
        if self.is_full:
            raise OSError("no space left on device")
        super().set(key, value, seconds)


def test_refused_while_the_store_cannot_be_written(kuzzle, root):
    """Then another process could not write down a successor either, so a new token that is refused is no verdict."""
    cache = TokenCache(store := FullStore())
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    auth = KuzzleAuth(kuzzle.url, root, cache=cache, timeout=4)
    for store.is_full, expected in ((True, OutcomeUnknownError), (False, SignInRequiredError)):
        kuzzle.fail_next("security.token.invalid")
        with pytest.raises(expected):
            requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)


def test_newest_of_two_tokens(kuzzle, root, monkeypatch):
    """A call that waited for one token gets the next, if that has come meanwhile."""
    cache, newest = TokenCache(), []
    join = cache._join

    def join_late(*arguments):
        joined = join(*arguments)
        monkeypatch.setattr(cache, "_join", join)
        newest.append(refresh_kuzzle_token(kuzzle.url, root, cache=cache, expires_in="3h"))
        return joined

    monkeypatch.setattr(cache, "_join", join_late)
    assert [refresh_kuzzle_token(kuzzle.url, root, cache=cache)] == newest


def test_attempt_that_fails_after_another_has_begun(kuzzle, root, monkeypatch):
    """It leaves that one's announcement in the store: its answer may still come."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    suspended, over = ProcessStore(store := SharedStore()), [threading.Event() for _ in range(2)]
    suspended.renews = False
    kuzzle.next_answers.extend([lambda _: (over[0].wait(10), Answer(503))[1], held(kuzzle, over[1])])
    with ThreadPoolExecutor() as pool:
        calls = []
        for own in (suspended, store):
            options = {"cache": TokenCache(own), "queuable": False}
            calls.append(pool.submit(refresh_kuzzle_token, kuzzle.url, root, **options))
            while len(kuzzle.requests) < len(calls):
                time.sleep(0.01)
        over[0].set()
        with pytest.raises(UnavailableError):
            calls[0].result()
        assert json.loads(store.get(f"{key_of('kuzzle:2', kuzzle.url, root)}-attempt"))["is_open"]
        over[1].set()
        assert kuzzle.knows(calls[1].result().jwt)


def test_whole_seconds_of_a_date(clock):
    """Two dates that seem to contradict each other by less than a second do not: the first may have been late in it."""
    observed = TokenCache(clock=clock)._ledger.observed
    observed.learn("here", 1000.0, 0.2)
    clock.advance(0.3)
    observed.learn("here", 1001.0, 0.1)
    earliest, latest, _ = observed.service_now("here")
    assert (earliest, latest) == (pytest.approx(1001), pytest.approx(1001))


def test_time_that_is_certain(kuzzle, root):
    """What a new token tells of the time at Kuzzle is changed by no later date, unless a clock was set there."""
    refresh_kuzzle_token(kuzzle.url, root, cache=None)
    observed, scope = Observed.of(REAL), kuzzle_credential(kuzzle.url, root).scope
    before = observed.service_now(scope)
    for ahead in (-3, 0, 3):
        observed.learn(scope, before[0] + ahead, 0.0)
        observed.learn(scope, before[0] + ahead - 60, 60.0)
    after = observed.service_now(scope)
    assert before[2]
    assert after == (pytest.approx(before[0], abs=5), pytest.approx(before[1], abs=5), True)
    observed.learn(scope, 9e9, 0.0)
    assert observed.service_now(scope)[0] == -math.inf


def test_date_of_a_slow_answer():
    """The time that an answer took is how much its date leaves open."""
    with FakeKuzzle() as kuzzle:
        auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=60), cache=TokenCache(runtime=Runtime()))
        kuzzle.delay_next(0.6)
        assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code == 200
        assert len(kuzzle.requests) == 1
    earliest, latest, _ = auth._cache._ledger.observed.service_now(auth._scope)
    assert latest - earliest > 0.5


def test_verdict_right_after_an_outage(kuzzle, clock, store, root):
    """A token that was spent in its last moments, while the store was down, is no verdict as soon as that is back."""
    busy, other = (TokenCache(store, clock=clock) for _ in range(2))

    def call(cache):
        return refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)

    assert call(busy) == call(other)
    store.is_down = True
    time.sleep(0.6)
    clock.advance(HOUR - 4)
    newest = call(busy)
    clock.advance(90)
    time.sleep(0.3)
    store.is_down = False
    assert call(other) == newest


@pytest.mark.parametrize("timeout", [0.5, 5])
def test_verdict_of_an_expired_token(kuzzle, store, cache, timeout):
    """It waits for two seconds, or for as long as the call has time: a job that has less is told all the same."""
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=2 * HOUR), cache=cache, timeout=timeout)


def test_what_a_process_that_writes_knows(kuzzle, clock, root):
    """If it has written to the store since a token expired, and some seconds ago, others could write too."""
    runtime = Runtime()
    runtime.steady = clock
    ledger = TokenCache(SharedStore(clock), runtime=runtime)._ledger
    spend = kuzzle_credential(kuzzle.url, root)
    assert ledger.may_lack_news(Left(-30, -30))
    for _ in range(2):
        clock.advance(3)
        assert ledger.note(spend, Attempt(by="this", at=ledger.now()))
    assert not ledger.may_lack_news(Left(-30, -30))
    assert not ledger.may_lack_news(Left(-math.inf, -math.inf)), "of no token, it does not know when it expired"
    assert ledger.may_lack_news(Left(-1, -1))
    assert ledger.may_lack_news(Left(HOUR, HOUR)), "others may have spent it, and the store may have lost that"
    alone = TokenCache(runtime=runtime)._ledger
    assert not alone.may_lack_news(Left(-30, -30)), "nobody else writes to the memory of a process"


def put_open_attempt(store, *keys):
    """Write down that another machine began to refresh a token, hours ago by this one's clock."""
    attempt = Attempt(by="another", at=Instant(time.time() - 5 * HOUR, 1.0, "another"), is_open=True)
    for key in keys:
        store.set(f"{key}-attempt", attempt.write(), HOUR)


def test_attempt_of_a_machine_whose_clock_is_wrong(kuzzle, store, root):
    """A refusal beside it makes nobody wait for as long as the clocks differ."""
    put_open_attempt(store, key := key_of("kuzzle:2", kuzzle.url, root))
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store), timeout=1)
    found = Attempt.read(store.get(f"{key}-attempt"))
    assert (found.by, found.pause) == ("another", 0.0)


def test_tombstone_of_another_session(kuzzle, store, cache, root):
    """It is no reason to forget this one."""
    token, other = (refresh_kuzzle_token(kuzzle.url, jwt, cache=cache) for jwt in (root, kuzzle.login("bar", ago=1800)))
    cache.forget(kuzzle.url, other.jwt)
    (gone,) = (text for text in entries(store).values() if json.loads(text).get("generation", 0) > 1)
    store.set(key_of("kuzzle:2", kuzzle.url, root), gone, HOUR)
    time.sleep(0.6)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=cache) == token


def test_rejected_right_after_an_outage(kuzzle, clock, root):
    """A token that is rejected though it seems fresh is no verdict as soon as the store can be written again."""
    ours = ProcessStore(store := FullStore(clock))
    busy, other = TokenCache(ours, clock=clock, ahead=20), TokenCache(store, clock=clock, ahead=0)
    auth = KuzzleAuth(kuzzle.url, root, cache=other, expires_in="30s", timeout=8)
    first = refresh_kuzzle_token(kuzzle.url, root, cache=busy, expires_in="30s").jwt
    assert refresh_kuzzle_token(kuzzle.url, root, cache=other, expires_in="30s").jwt == first
    ours.is_gone = True
    time.sleep(0.6)
    clock.advance(27.5)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=busy, expires_in="30s").jwt != first
    clock.advance(1.2)
    store.is_full = True
    for seconds, where, name in ((0.5, store, "is_full"), (1.5, ours, "is_gone")):
        threading.Timer(seconds, setattr, (where, name, False)).start()
    assert requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=20).json()["result"]["_id"] == "foo"


def test_attempt_that_another_machine_never_ended(kuzzle, store, monkeypatch):
    """For how long it has been there is known to all processes of a machine: short ones get a verdict, too."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    boot, dead = Runtime().boot, kuzzle.login(ago=2 * HOUR)
    put_open_attempt(store, key_of("kuzzle:2", kuzzle.url, dead))
    for expected in (OutcomeUnknownError, OutcomeUnknownError, SignInRequiredError):
        runtime = Runtime()
        runtime.boot = boot
        with pytest.raises(expected) as caught:
            refresh_kuzzle_token(kuzzle.url, dead, cache=TokenCache(store, runtime=runtime, lease=2), timeout=0.4)
        assert caught.value.status == 401
        time.sleep(1.0)


@pytest.mark.parametrize("what", ["refresh", "sign out"])
def test_attempt_that_many_machines_look_for(kuzzle, store, monkeypatch, what):
    """Machines that take turns, and processes that cannot tell whether they are on the same, come to an end."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    jwt = kuzzle.login(ago=2 * HOUR if what == "refresh" else 1800)
    put_open_attempt(store, key_of("kuzzle:2", kuzzle.url, jwt))

    def call():
        runtime = Runtime()
        runtime.boot = runtime.new_name()
        cache = TokenCache(store, runtime=runtime, lease=2)
        if what == "sign out":
            KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=1.2).sign_out()
        else:
            with pytest.raises(SignInRequiredError):
                refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=1.2)

    with pytest.raises(OutcomeUnknownError):
        call()
    for _ in range(2):  # by then it has been there for as long as an answer may take
        with contextlib.suppress(OutcomeUnknownError):
            call()
    call()
    assert not kuzzle.knows(jwt)


def test_keeper_of_a_dead_session(kuzzle, store):
    """That it cannot be known yet whether a session is dead is no outage of its service: others are refreshed."""
    dead, alive = kuzzle.login(ago=2 * HOUR), kuzzle.login("bar", ago=3590)
    put_open_attempt(store, key_of("kuzzle:2", kuzzle.url, dead))
    cache = TokenCache(store)
    auths = [KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=0.5) for jwt in (dead, alive)]
    assert [outcome.outcome for outcome in keep_alive(auths, at_once=1)] == ["skipped", "refreshed"]


@pytest.mark.parametrize("code", [155102, 155103, 155104])
def test_keeper_of_a_refused_pair(circle, clock, store, code):
    """Circle refuses tokens with 404, 401 and 403. None of them is an outage."""
    calls = [call_with(circle, circle.sign_in(user)) for user in ("user-1", "user-2")]
    clock.advance(HOUR)
    cache = TokenCache(store, clock=clock)
    auths = [CircleAuth(**call, cache=cache, timeout=0.5) for call in calls]
    put_open_attempt(store, *auths[0]._credential.keys)
    circle.fail_next(code)
    outcomes = list(keep_alive(auths, at_once=1))
    assert [outcome.outcome for outcome in outcomes] == ["skipped", "refreshed"]


class LateStore(SharedStore):
    """An attempt is written late in it, as by a process that was suspended: when *meanwhile* is over."""

    def __init__(self, number, meanwhile):
        super().__init__()
        self.number, self.meanwhile = number, meanwhile

    def set(self, key, value, seconds):
        self.number -= key.endswith("-attempt")
        if key.endswith("-attempt") and self.number == 0:
            self.meanwhile(self)
        super().set(key, value, seconds)


@pytest.mark.holds
@pytest.mark.parametrize(
    ("number", "ago"), [(1, 0), (2, 2 * HOUR), (3, 2 * HOUR)], ids=["too young", "refused", "verdict"]
)
def test_suspended_before_an_attempt_is_written(kuzzle, clock, monkeypatch, number, ago):
    """What it writes then may take the place of another's announcement, so no refusal is a verdict for a while."""
    monkeypatch.setattr(_rules, "TRUSTED", 0.0)
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    jwt, has_arrived, is_over = kuzzle.login(ago=ago), threading.Event(), threading.Event()

    def answer(request):
        given = kuzzle.truly(request)
        has_arrived.set()
        is_over.wait(10)
        return given

    def refresh_elsewhere(store):
        clock.advance(2)
        kuzzle.next_answers.append(answer)
        calls.append(pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=TokenCache(store), timeout=6))
        assert has_arrived.wait(10)

    calls, store = [], LateStore(number, refresh_elsewhere)
    suspended = ProcessStore(store)
    suspended.renews = False
    with ThreadPoolExecutor() as pool:
        with pytest.raises(OutcomeUnknownError):
            refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(suspended), timeout=4)
        assert Attempt.read(store.get(f"{key_of('kuzzle:2', kuzzle.url, jwt)}-attempt")).is_open
        is_over.set()
        if not ago:
            assert kuzzle.knows(calls[0].result().jwt)


def test_first_token_in_its_last_moments(kuzzle, store, cache):
    """What the caller brings is not left to die either, while a process that is gone has the lock."""
    jwt = kuzzle.login(ago=HOUR - 2)
    store.acquire(key_of("kuzzle:2", kuzzle.url, jwt), "killed", HOUR)
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=3).jwt)


def test_lock_that_was_passed_by_long_ago(kuzzle, clock, store, cache, monkeypatch):
    """Before its next attempt, who has passed a lock by looks whether its holder has an answer by now."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    jwt, elsewhere = kuzzle.login(ago=HOUR - 2), SharedStore(clock)
    store.acquire(key_of("kuzzle:2", kuzzle.url, jwt), "holder", HOUR)
    found = []

    def answer(request):
        found.append(refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(elsewhere, clock=clock)))
        for key, text in entries(elsewhere).items():
            store.set(key, text, HOUR)
        return Answer(503, b"", {"Retry-After": "1"})

    kuzzle.next_answers.append(answer)
    assert refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=5) == found[0]
    assert len(kuzzle.requests) == 2


def test_store_that_begins_to_hang_in_the_last_moments(kuzzle, clock, root):
    """The first who notices is the last who could refresh the token, and passes the store by."""
    store = SlowStore(clock)
    cache = TokenCache(store, clock=clock)
    first = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    time.sleep(0.6)
    clock.advance(HOUR - 2)
    store.silence = 60.0
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=5)
    assert token != first
    assert kuzzle.knows(token.jwt)
    store.silence = None
    store.over.set()
    wait_for_copies(cache)


def test_attempt_of_another_machine_counts_from_the_first_look(kuzzle, store, monkeypatch):
    """Whoever was long about its own attempt has waited for the other's meanwhile."""
    put_open_attempt(store, key_of("kuzzle:2", kuzzle.url, jwt := kuzzle.login(ago=2 * HOUR)))
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    kuzzle.next_answers.append(lambda request: (time.sleep(1.5), kuzzle.truly(request))[1])
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(store, lease=3), timeout=3.9)


def test_holder_that_ends_right_after_its_answer(kuzzle, clock, store, cache, root):
    """Who waits for its lock sees the successor that it has written down, and waits no more."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    copied = SharedStore(clock)
    copied.acquire(key_of("kuzzle:2", kuzzle.url, root), "gone", HOUR)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=TokenCache(copied, clock=clock), timeout=5)
        while copied.commands < 8:
            time.sleep(0.01)
        for key, text in entries(store).items():
            copied.set(key, text, HOUR)
        assert waiting.result() == token


def test_lock_of_a_holder_that_refreshes_again(kuzzle, clock, root, monkeypatch):
    """Who has waited for a lock until the end of one token waits for the next one, too: its holder is at work."""
    monkeypatch.setattr(_rules, "ONE_EXCHANGE", 1.0)
    cache = TokenCache(store := SharedStore(clock), clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    tries, sent = [], []

    class Held(SharedStore):
        def acquire(self, key, owner, lease):
            tries.append(key)
            if len(tries) == 2:  # the holder has an answer, and a while goes by
                newest = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
                clock.advance(HOUR - 2)
                time.sleep(1.1)
                sent.append(newest)
            return 5.0 if len(tries) < 5 else super().acquire(key, owner, lease)

        def set(self, key, value, seconds):
            if key.endswith("-attempt"):
                sent.append(len(tries))
            super().set(key, value, seconds)

    shared = Held(clock)
    shared.memory = store.memory
    clock.advance(HOUR - 2)
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(shared, clock=clock), timeout=5).jwt)
    assert sent[1] == 5


def test_answer_that_a_store_takes_at_last(kuzzle, clock, root, monkeypatch):
    """A process whose time for writing is up tries once more if the store has let it give back the lock."""
    monkeypatch.setattr("refresher._ledger.Ledger.save_later", lambda *_: None)  # as if the process ended

    class AtLast(SharedStore):
        is_full = True

        def set(self, key, value, seconds):
            if self.is_full and not key.endswith("-attempt"):
                raise ConnectionError("no store")
            super().set(key, value, seconds)

        def release(self, key, owner):
            self.is_full = False
            super().release(key, owner)

    cache = TokenCache(store := AtLast(clock), clock=clock, lease=0)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    wait_for_copies(cache)
    assert refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock)) == token


def test_store_that_does_not_take_back_its_lock(kuzzle, clock, root, monkeypatch):
    """A store that is down is not asked again for each session that it lacks: that may take long."""
    monkeypatch.setattr("refresher._ledger.Ledger.save_later", lambda *_: None)  # which asks as well
    asked = []

    class Down(SharedStore):
        def acquire(self, key, owner, lease):
            asked.append(key)
            return super().acquire(key, owner, lease)

        def release(self, key, owner):
            raise ConnectionError("no store")

    cache = TokenCache(Down(clock), clock=clock)
    cache._ledger.unsaved["another"] = cache._ledger.recall(kuzzle_credential(kuzzle.url, kuzzle.login("bar")))[0]
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt)
    for thread in threading.enumerate():
        if thread.name == "refresher" and not thread.daemon:
            thread.join(10)
    assert asked == [key_of("kuzzle:2", kuzzle.url, root)]


@pytest.mark.parametrize("why", ["refused", "key refused"])
def test_lost_answer_to_a_request_with_a_new_key(circle, clock, store, why):
    """The next call, by any process, has the same key and gets the same answer."""
    call = call_with(circle, circle.sign_in())

    def refresh(**options):
        return refresh_user_token(**call, cache=TokenCache(store, clock=clock), **options)

    circle.fail_next(155109 if why == "refused" else 156020)
    circle.next_answers.extend([lambda request: (circle.truly(request), b"")[1]] * 40)
    if why == "refused":
        with pytest.raises(SignInRequiredError):
            refresh()
        clock.advance(HOUR)
    with pytest.raises(OutcomeUnknownError):
        refresh(timeout=0.5)
    circle.next_answers.clear()
    assert circle.knows(refresh())
    keys = [request.json()["idempotencyKey"] for request in circle.requests]
    assert keys[-1] == keys[1] != keys[0]


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("first", ["user_id", "user_token"])
def test_lost_answer_by_the_other_name(circle, clock, monkeypatch, first, is_killed):
    """What was lost by one name is found by the other: the store knows with which key it was asked for."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    pair = circle.sign_in()
    names = {"user_id": {"user_id": "user-1", "user_token": None}, "user_token": {}}
    caller = ProcessStore(store := SharedStore(clock))

    def lose(request):
        caller.is_gone = is_killed
        return (circle.truly(request), b"")[1]

    circle.next_answers.extend([circle.truly, lose] if first == "user_id" else [lose])
    lost = call_with(circle, pair, **names.pop(first))
    with pytest.raises(OutcomeUnknownError):
        refresh_user_token(**lost, cache=TokenCache(caller, clock=clock, lease=0.1), timeout=0.5, retry=False)
    clock.advance(10)
    (other,) = names.values()
    for failure in (True, False):  # which tells nothing, and forgets nothing
        if failure:
            circle.next_answers.append(Answer(503))
        with pytest.raises(UnavailableError) if failure else contextlib.nullcontext():
            options = {"cache": TokenCache(store, clock=clock), "timeout": 5, "retry": not failure}
            assert circle.knows(refresh_user_token(**call_with(circle, pair, **other), **options))


@pytest.mark.parametrize("between", [0, 1])
def test_refusal_after_a_lost_answer(circle, cache, between):
    """What was lost comes again with the same key, though the repetition was refused: also if Circle was busy first."""
    pair = circle.sign_in()
    circle.next_answers.append(lambda request: (circle.truly(request), b"")[1])
    circle.fail_next(5, between)
    circle.fail_next(3)
    with pytest.raises(RequestRefusedError):
        refresh_user_token(**call_with(circle, pair), cache=cache)
    assert circle.knows(refresh_user_token(**call_with(circle, pair), cache=cache))
    assert len({request.json()["idempotencyKey"] for request in circle.requests}) == 1


def test_refused_by_one_name(circle, store):
    """It says nothing of the other: Circle refuses a user's id to those who have signed in by a social account."""
    pair = circle.sign_in()
    circle.fail_next(155102)
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call_with(circle, pair, user_id="user-1", user_token=None), cache=TokenCache(store))
    assert circle.knows(refresh_user_token(**call_with(circle, pair), cache=TokenCache(store)))


OTHER_API_KEY = "TEST_API_KEY:11111111111111111111111111111111:22222222222222222222222222222222"


def test_refused_by_one_api_key(circle, store):
    """It says nothing of another: one worker with a wrong key sends nobody to sign in."""
    pair = circle.sign_in()
    circle.fail_next(155102)
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call_with(circle, pair, api_key=OTHER_API_KEY), cache=TokenCache(store))
    session = {"refresh_token": pair.refresh_token, "device_id": "device-1", "user_token": pair.user_token}
    assert TokenCache(store).peek(**session, base_url=circle.url).state == "refused"
    assert circle.knows(refresh_user_token(**call_with(circle, pair), cache=TokenCache(store)))


def test_refusals_by_other_api_keys(circle, clock, store):
    """They neither prolong nor multiply that of the right one: after a minute it asks again."""
    pair, others = circle.sign_in(), [OTHER_API_KEY, OTHER_API_KEY.replace("1", "3")]

    def call(key):
        return refresh_user_token(**call_with(circle, pair, api_key=key), cache=TokenCache(store, clock=clock))

    for key, code in ((others[0], 155102), (others[1], 155102), (circle.api_key, 155109)):
        circle.fail_next(code)
        with pytest.raises(SignInRequiredError):
            call(key)
    for _ in range(2):
        clock.advance(31)
        with pytest.raises(RefreshError):
            call(OTHER_API_KEY.replace("1", "4"))
    assert circle.knows(call(circle.api_key))


def test_refused_by_one_api_key_in_the_middle(circle, clock):
    """Nor does another key lose the token that it has: it goes on with that while Circle is busy."""
    pair, cache = circle.sign_in(), TokenCache(clock=clock)
    token = refresh_user_token(**call_with(circle, pair), cache=cache)
    clock.advance(HOUR - 20)
    circle.fail_next(155102)
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call_with(circle, pair, api_key=OTHER_API_KEY), cache=cache)
    circle.fail_next(5)
    assert refresh_user_token(**call_with(circle, pair), cache=cache, retry=False) == token


def test_keeper_of_one_wrong_api_key(circle, cache, clock):
    """A session that two auth objects keep alive is refreshed by the one that may."""
    pair = circle.sign_in()
    refresh_user_token(**call_with(circle, pair), cache=cache)
    clock.advance(HOUR - 20)
    circle.delay_next(0.5)
    auths = [CircleAuth(**call_with(circle, pair, api_key=key), cache=cache) for key in (OTHER_API_KEY, circle.api_key)]
    assert {each.auth is auths[1]: each.outcome for each in keep_alive(auths)}[True] == "refreshed"


@pytest.mark.parametrize(("wrong", "expected"), [("user_token", SignInRequiredError), ("api_key", RequestRefusedError)])
def test_call_that_joins_a_wrong_one(circle, cache, wrong, expected):
    """What another call is refused for its own arguments is not the answer to one that has others."""
    old, pair, joined = circle.sign_in(), circle.sign_in(), []
    refresh_user_token(**call_with(circle, old), cache=None)
    other = {"user_token": old.user_token, "api_key": OTHER_API_KEY}

    def answer(request):
        joined.append(runner.submit(refresh_user_token, **call_with(circle, pair), cache=cache))
        time.sleep(0.3)
        return circle.truly(request)

    with ThreadPoolExecutor(1) as runner:
        circle.next_answers.append(answer)
        with pytest.raises(expected):
            refresh_user_token(**call_with(circle, pair, **{wrong: other[wrong]}), cache=cache)
    assert circle.knows(joined[0].result())


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_verdict_that_is_written_down_while_others_act(kuzzle, clock, root, is_forgotten):
    """A newest token that was refused is handed out no more. What was forgotten meanwhile does not come back."""
    cache = TokenCache(store := MemoryStore(), clock=clock)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR / 2)

    def note(key, value, seconds, real=store.set):
        if key.endswith("-attempt") and json.loads(value)["errors"] and is_forgotten:
            store.set = real
            cache.forget(kuzzle.url, root)
        return real(key, value, seconds)

    store.set = note
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, expires_in="2h", cache=cache)
    chain = cache._ledger.chains.get(key_of("kuzzle:2", kuzzle.url, root))
    assert (chain.newest is None) is is_forgotten
    asked = len(kuzzle.requests)
    if not is_forgotten:
        with pytest.raises(SignInRequiredError):
            refresh_kuzzle_token(kuzzle.url, root, cache=cache)
        assert len(kuzzle.requests) == asked
        assert kuzzle.knows(token.jwt)


def test_newer_token_while_the_service_asked_to_wait(kuzzle, clock, store, monkeypatch):
    """Who waits for as long as another process was told finds what others have stored meanwhile."""
    monkeypatch.setattr("refresher._flight._LONGEST_NAP", 0.05)
    jwt = kuzzle.login("foo", ago=HOUR - 20)
    told = Attempt(by="one", at=Instant(time.time(), Runtime().steady(), Runtime().boot), pause=HOUR)
    name = key_of("kuzzle:2", kuzzle.url, jwt) + "-attempt"
    store.set(name, told.write(), HOUR)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, timeout=None, cache=TokenCache(store))
        with pytest.raises(UnavailableError, match="asked to wait"):
            refresh_kuzzle_token(kuzzle.url, jwt, timeout=1, cache=TokenCache(store))
        store.delete(name)
        token = refresh_kuzzle_token(kuzzle.url, jwt, timeout=5, cache=TokenCache(store))
        assert waits.result(timeout=10) == token
    assert len(kuzzle.requests) == 1


def test_how_long_a_call_waits_that_joins_a_wrong_one(circle, clock, monkeypatch):
    """Whoever has a token that is due waits briefly for all that others are refused together, not for each."""
    pair, cache, untils, joined = circle.sign_in(), TokenCache(clock=clock), [], []
    refresh_user_token(**call_with(circle, pair), cache=cache)
    clock.advance(HOUR - 20)

    def join(key, call, end, until, real=cache._join):
        if call.credential.api_key.reveal() == circle.api_key:
            untils.append(until)
        return real(key, call, end, until)

    def answer(request):
        joined.append(runner.submit(refresh_user_token, **call_with(circle, pair), cache=cache))
        time.sleep(0.3)
        return circle.truly(request)

    monkeypatch.setattr(cache, "_join", join)
    circle.next_answers.append(answer)
    with ThreadPoolExecutor(1) as runner:
        refresh_user_token(**call_with(circle, pair, api_key=OTHER_API_KEY), cache=cache)
    assert circle.knows(joined[0].result())
    assert len(untils) == 2
    assert untils[0] == untils[1]


def test_refresh_that_joins_a_sign_out(kuzzle, cache):
    """That the sign-out failed is not the answer to who wants a token."""
    jwt, joined = kuzzle.login("foo", ago=HOUR - 20), []

    def answer(request):
        joined.append(runner.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=cache))
        time.sleep(0.3)
        return Answer(
            403, {"error": {"id": "security.rights.forbidden", "status": 403, "message": "no"}, "status": 403}
        )

    kuzzle.next_answers.append(answer)
    with ThreadPoolExecutor(1) as runner, pytest.raises(RequestRefusedError):
        KuzzleAuth(kuzzle.url, jwt, cache=cache).sign_out()
    assert kuzzle.knows(joined[0].result().jwt)


def test_calls_that_are_refused_alike(circle, cache):
    """What is wrong with all of them is asked once, though each request has a name of its own."""
    call, joined = call_with(circle, circle.sign_in(), api_key=OTHER_API_KEY), []

    def answer(request):
        names = [str(uuid.uuid4()) for _ in range(3)]
        joined.extend(runner.submit(refresh_user_token, **call, cache=cache, request_id=name) for name in names)
        time.sleep(0.3)
        return circle.truly(request)

    with ThreadPoolExecutor(3) as runner:
        circle.next_answers.append(answer)
        with pytest.raises(RequestRefusedError):
            refresh_user_token(**call, cache=cache, request_id=str(uuid.uuid4()))
    assert [type(each.exception()) for each in joined] == 3 * [RequestRefusedError]
    assert len(circle.requests) == 1


def test_auth_objects_beside_a_store_that_fails_slowly(kuzzle, clock, root):
    """They learn from one command of one of them that they have to go on with the token that is due."""
    asked, joined = [], []

    class Failing(ProcessStore):
        is_down = False

        def get(self, key):
            if not self.is_down:
                return self.shared.get(key)
            asked.append(key)
            if not joined:
                joined.extend(runner.submit(use) for _ in range(8))
                time.sleep(0.3)
            raise ConnectionError

    def use():
        auth = KuzzleAuth(kuzzle.url, root, cache=cache, timeout=10)
        return requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10).status_code

    cache = TokenCache(store := Failing(SharedStore(clock)), clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 20)
    store.is_down = True
    with ThreadPoolExecutor(8) as runner:
        assert use() == 200
        assert [each.result() for each in joined] == 8 * [200]
    assert len(asked) == 1


@pytest.mark.parametrize("apart", [0.5, 5, 30])
def test_replayed_pairs_of_one_minute(circle, clock, apart):
    """They show no wrong clock of the service, however close to each other they were issued."""
    clock.advance(-48 * HOUR)
    pair = first = circle.sign_in()
    for _ in range(4):
        clock.advance(apart)
        pair = refresh_user_token(**call_with(circle, pair), cache=None)
    clock.advance(48 * HOUR)
    assert circle.knows(refresh_user_token(**call_with(circle, first), cache=TokenCache(clock=clock)))


def test_replayed_at_its_end(circle, clock):
    """A pair that is about to expire is no more than one that has expired."""
    first = circle.sign_in()
    token = refresh_user_token(**call_with(circle, first), cache=None)
    clock.advance(HOUR)
    assert refresh_user_token(**call_with(circle, first), cache=TokenCache(clock=clock)) != token


@pytest.mark.holds
def test_young_token_by_a_clock_that_stands_still(kuzzle, clock):
    """It is held for a second of real time."""
    jwt = kuzzle.login()
    clock.advance(1)
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, jwt, cache=TokenCache(clock=clock), timeout=3).jwt)


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("is_killed", [False, True])
def test_refusals_after_a_lost_answer(circle, clock, retry, is_killed):
    """A key whose answer was lost is sent by every later call, however often others are refused meanwhile."""
    call, store = call_with(circle, circle.sign_in()), SharedStore(clock)
    caller = ProcessStore(store)

    def lose(request):
        circle.truly(request)
        if is_killed:
            caller.is_gone = True
        return b""

    circle.next_answers.append(lose)
    with pytest.raises(OutcomeUnknownError):
        refresh_user_token(**call, cache=TokenCache(caller, clock=clock), retry=False, timeout=2)
    clock.advance(90)
    for api_key in (circle.api_key, OTHER_API_KEY):
        circle.fail_next(3)
        with pytest.raises(RequestRefusedError):
            refresh_user_token(**{**call, "api_key": api_key}, cache=TokenCache(store, clock=clock), retry=retry)
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock)))
    assert len({request.json()["idempotencyKey"] for request in circle.requests}) == 1


def test_lost_answer_before_a_store_that_hangs(circle, clock):
    """A call that sends nothing knows so, though an answer was lost before."""
    call, store, gate = call_with(circle, circle.sign_in()), SharedStore(clock), threading.Event()
    circle.next_answers.append(b"")
    with pytest.raises(OutcomeUnknownError):
        refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False)

    def acquire(*_):
        store.get = lambda key: gate.wait(10) and SharedStore.get(store, key)
        raise ConnectionError

    store.acquire = acquire
    with pytest.raises(UnavailableError, match="Time is up") as caught:
        refresh_user_token(**call, cache=TokenCache(store, clock=clock), timeout=1)
    gate.set()
    assert caught.value.spent is False


@pytest.mark.parametrize("is_lost", [False, True])
def test_own_idempotency_keys(circle, clock, store, is_lost):
    """The caller's key is sent, unless an answer to another was lost: only that brings the pair."""
    call, keys = call_with(circle, circle.sign_in()), [str(uuid.uuid4()) for _ in range(2)]
    circle.next_answers.append((lambda request: (circle.truly(request), b"")[1]) if is_lost else Answer(503))
    for key in keys:
        with pytest.raises(RefreshError) if key == keys[0] else contextlib.nullcontext():
            cache = TokenCache(store, clock=clock)
            assert circle.knows(refresh_user_token(**call, cache=cache, idempotency_key=key, retry=False))
    assert [request.json()["idempotencyKey"] for request in circle.requests] == [keys[0], keys[not is_lost]]


@pytest.mark.parametrize("timeout", [1, None])
def test_joined_while_a_failure_is_written_down(kuzzle, store, root, monkeypatch, timeout):
    """Who has time for another attempt than the one that has just failed gets it, whatever that call wanted."""
    cache, calls = TokenCache(store), []
    note = cache._ledger.note

    def note_late(spend, attempt, room=""):
        if not attempt.is_open and not calls:
            (flight,) = cache._ledger.flights.values()
            calls.append(pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, timeout=5))
            while len(flight.waiters) < 2:
                time.sleep(0.01)
        return note(spend, attempt, room)

    monkeypatch.setattr(cache._ledger, "note", note_late)
    kuzzle.fail_next("api.process.overloaded")
    with ThreadPoolExecutor() as pool:
        with contextlib.suppress(UnavailableError):
            refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=timeout, queuable=False)
        assert kuzzle.knows(calls[0].result().jwt)


def test_key_that_was_refused_to_a_single_attempt(circle, clock, store):
    """Circle asks for a new idempotency key. The next call sends one, though neither tries again."""
    call = call_with(circle, circle.sign_in())
    circle.fail_next(156020)
    with pytest.raises(RequestRefusedError):
        refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False)
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False))
    first, second = (request.json()["idempotencyKey"] for request in circle.requests)
    assert first != second


def test_key_that_is_too_old_for_a_lost_answer(circle, clock, store):
    """So it does if an answer to the old one was lost: that cannot come any more."""
    call = call_with(circle, circle.sign_in())
    circle.next_answers.append(b"")
    circle.fail_next(156020)
    for error in (OutcomeUnknownError, RequestRefusedError):
        with pytest.raises(error) as caught:
            refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False)
        clock.advance(HOUR)
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False))
    first, second, third = (request.json()["idempotencyKey"] for request in circle.requests)
    assert first == second != third == caught.value.idempotency_key


def test_key_that_is_refused_after_one_that_was_too_old(circle, clock, store):
    """That an answer to a former key was lost is no reason to send it again."""
    call = call_with(circle, circle.sign_in())
    circle.next_answers.append(b"")
    circle.fail_next(156020)
    circle.fail_next(3)
    for error in (OutcomeUnknownError, RequestRefusedError, RequestRefusedError):
        with pytest.raises(error):
            refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False)
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False))
    keys = [request.json()["idempotencyKey"] for request in circle.requests]
    assert len(set(keys)) == len(keys) - 1 == 3


def test_keys_that_are_all_too_old(circle):
    """Circle may ask for another key once. Then the call is refused."""
    circle.fail_next(156020, times=3)
    with pytest.raises(RequestRefusedError):
        refresh_user_token(**call_with(circle, circle.sign_in()), cache=None)
    assert len(circle.requests) == 2


def test_own_key_after_a_lost_answer_that_is_too_old(circle, clock, store):
    """If the answer cannot come any more, the caller's own key is sent: also if there is to be one attempt."""
    call, own = call_with(circle, circle.sign_in()), str(uuid.uuid4())
    circle.next_answers.append(b"")
    circle.fail_next(156020)
    with pytest.raises(OutcomeUnknownError):
        refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False)
    options = {"idempotency_key": own, "retry": False}
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock), **options))
    first, second, third = (request.json()["idempotencyKey"] for request in circle.requests)
    assert first == second != third == own


def test_keys_of_two_who_are_refused(circle, clock, store):
    """No key is sent again that was refused to another."""
    call = call_with(circle, circle.sign_in())
    for api_key in (circle.api_key, OTHER_API_KEY, circle.api_key):
        circle.fail_next(155104)
        with pytest.raises(SignInRequiredError):
            refresh_user_token(**{**call, "api_key": api_key}, cache=TokenCache(store, clock=clock))
        clock.advance(HOUR)
    assert len({request.json()["idempotencyKey"] for request in circle.requests}) == 3


def test_own_key_that_was_refused_to_a_single_attempt(circle, clock, store):
    """A later call without a key of its own does not send it either."""
    call = call_with(circle, circle.sign_in())
    own = str(uuid.uuid4())
    circle.fail_next(156020)
    with pytest.raises(RequestRefusedError):
        refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False, idempotency_key=own)
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock), retry=False))
    assert [request.json()["idempotencyKey"] == own for request in circle.requests] == [True, False]


def test_lifetime_that_is_refused(kuzzle, cache, root):
    """A call that asks for more than it may have is told so, and does not get less without a word."""
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    kuzzle.fail_next("security.rights.forbidden")
    with pytest.raises(RequestRefusedError):
        refresh_kuzzle_token(kuzzle.url, root, expires_in="30d", cache=cache)


def test_entry_of_another_chain(kuzzle, store, clock, root):
    """What is found under a session's key is believed only if it says that it is of that session."""
    other = kuzzle.login(ago=60)
    refresh_kuzzle_token(kuzzle.url, other, cache=TokenCache(store, clock=clock))
    text = store.get(key_of("kuzzle:2", kuzzle.url, other))
    store.set(key_of("kuzzle:2", kuzzle.url, root), text, HOUR)
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store, clock=clock)).jwt)
    assert len(kuzzle.requests) == 2


def test_keeper_and_an_entry_that_cannot_be_read(kuzzle, clock, store):
    """It is the trouble of one session. The service is in order, and the others are refreshed."""
    ended, *others = (kuzzle.login(f"user-{number}", ago=2000) for number in range(3))
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {ended}"}, timeout=5)
    store.set(key_of("kuzzle:2", kuzzle.url, ended), "no entry", HOUR)
    cache = TokenCache(store, clock=clock, ahead=HOUR)
    auths = [KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=3) for jwt in (ended, *others)]
    found = {each.auth: each.outcome for each in keep_alive(auths, at_once=1)}
    assert [found[auth] for auth in auths] == ["skipped", "refreshed", "refreshed"]


def test_keeper_and_sessions_that_others_refresh(kuzzle, clock, store):
    """That locks cannot be had is no sign of an outage: another process may wait for answers that never come there."""
    jwts = [kuzzle.login(f"user-{number}", ago=2000) for number in range(5)]
    for jwt in jwts[:3]:
        store.acquire(key_of("kuzzle:2", kuzzle.url, jwt), "another", HOUR)
    cache = TokenCache(store, clock=clock, ahead=HOUR)
    auths = [KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=0.5) for jwt in jwts]
    found = {each.auth: each.outcome for each in keep_alive(auths, at_once=1)}
    assert [found[auth] for auth in auths] == ["skipped"] * 3 + ["refreshed"] * 2


def test_fresh_token_while_the_store_hangs(kuzzle, clock, root):
    """It is the answer at once, and not after as long as one would wait for news."""
    store = SlowStore(clock)
    cache = TokenCache(store, clock=clock)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    time.sleep(0.6)
    store.silence = 60.0
    took = []
    for _ in range(3):
        began = time.monotonic()
        assert refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=10) == token
        took.append(time.monotonic() - began)
    store.over.set()
    assert max(took[1:]) < 0.5


@pytest.mark.parametrize("forget", ["forget", "clear"])
def test_forgotten_before_a_request_has_left(kuzzle, clock, store, root, forget):
    """What comes of a refresh that waits for a lock is not kept either."""
    key = key_of("kuzzle:2", kuzzle.url, root)
    cache = TokenCache(store, clock=clock)
    store.acquire(key, "another", HOUR)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, timeout=10)
        while not cache._ledger.flights or next(iter(cache._ledger.flights.values()))._lease.lock is not Lock.HELD:
            time.sleep(0.01)
        cache.forget(kuzzle.url, root) if forget == "forget" else cache.clear()
        store.release(key, "another")
        assert kuzzle.knows(call.result().jwt)
    wait_for_copies(cache)
    for each in (cache, TokenCache(store, clock=clock)):
        assert each.peek(kuzzle.url, root).state == "unknown"


def test_callers_own_key_after_another_was_refused(circle, clock, store):
    """Circle asks for a new idempotency key, and the caller gives one."""
    call = call_with(circle, circle.sign_in())
    circle.fail_next(156020)
    with pytest.raises(RequestRefusedError):
        refresh_user_token(**call, cache=TokenCache(store, clock=clock), idempotency_key=str(uuid.uuid4()))
    own = {"idempotency_key": str(uuid.uuid4()), "retry": False}
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock), **own))


@pytest.mark.parametrize("is_cached", [True, False])
def test_service_that_asks_to_wait_after_a_lost_answer(kuzzle, root, is_cached):
    """Nobody is told that nothing was spent."""
    kuzzle.next_answers.append(lambda request: (kuzzle.truly(request), b"")[1])
    kuzzle.next_answers.append(Answer(503, b"", {"Retry-After": "60"}))
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache() if is_cached else None, timeout=5)
    assert caught.value.spent is None


@pytest.mark.parametrize("how", ["forget", "clear"])
def test_forgotten_while_a_call_waits_for_the_store(kuzzle, clock, store, root, how):
    """What comes of a call that waits for the store is not kept."""
    store.is_down, cache = True, TokenCache(store, clock=clock)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, timeout=20)
        while store.commands < 5:
            time.sleep(0.01)
        with pytest.raises(UnavailableError):
            cache.forget(kuzzle.url, root) if how == "forget" else cache.clear()
        store.is_down = False
        assert kuzzle.knows(call.result().jwt)
    assert cache.peek(kuzzle.url, root).state == "unknown"
    assert TokenCache(store, clock=clock).peek(kuzzle.url, root).state == "unknown"


@pytest.mark.parametrize("answer", [Answer(404, b"<html>"), Answer(302, b"", {"Location": "/"})])
def test_something_strange_after_a_lost_answer(kuzzle, clock, root, answer):
    """The token may have been spent before, so it is not handed out as if it were good."""
    cache = TokenCache(clock=clock)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    clock.advance(HOUR - 15)
    kuzzle.next_answers.append(lambda request: (kuzzle.truly(request), Answer(502, b"<html>"))[1])
    kuzzle.next_answers.append(answer)
    with pytest.raises(ReplyError) as caught:
        refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    assert caught.value.spent is None


@pytest.mark.parametrize("before", ["refused before", "refused since", "forgotten"])
def test_lost_answer_beside_a_refusal(circle, clock, store, before):
    """That of a user's id says nothing of a request by a user token whose answer was lost, nor does a sign-out."""
    pair = circle.sign_in()
    by_id = {"user_id": "user-1", "user_token": None}

    def refresh(**options):
        return refresh_user_token(**call_with(circle, pair, **options), cache=TokenCache(store, clock=clock))

    def be_refused():
        circle.fail_next(155109)
        with pytest.raises(SignInRequiredError):
            refresh(**by_id)

    if before == "refused before":
        be_refused()
    if before == "forgotten":
        names = {"refresh_token": pair.refresh_token, "device_id": "device-1", "user_token": pair.user_token}
        TokenCache(store, clock=clock).forget(**names, base_url=circle.url)
    circle.next_answers.append(lambda request: (circle.truly(request), b"")[1])
    with pytest.raises(OutcomeUnknownError):
        refresh(retry=False)
    if before == "refused since":
        be_refused()
    clock.advance(HOUR / 2)
    assert circle.knows(refresh(**({} if before == "refused since" else by_id)))


@pytest.mark.parametrize("others", [[("api_key", 155103)], [("user_id", 155102), ("api_key", 401)]])
def test_lost_answer_beside_verdicts(circle, clock, store, others):
    """What others are refused, and for what they are told to sign in, says nothing of an answer that one has lost."""
    pair = circle.sign_in()
    by = {"user_id": {"user_id": "user-1", "user_token": None}, "api_key": {"api_key": OTHER_API_KEY}}

    def refresh(**options):
        return refresh_user_token(**call_with(circle, pair, **options), cache=TokenCache(store, clock=clock))

    circle.next_answers.append(lambda request: (circle.truly(request), b"")[1])
    with pytest.raises(OutcomeUnknownError):
        refresh(retry=False)
    for name, code in others:
        circle.fail_next(code)
        with pytest.raises((SignInRequiredError, RequestRefusedError)):
            refresh(**by[name])
    assert circle.knows(refresh())


def test_refusal_that_another_has_waited_for(circle, clock, store):
    """A request that was under way for a while has lost no answer: a key that was refused is not sent again."""
    call, is_asked = call_with(circle, circle.sign_in()), threading.Event()
    circle.fail_next(3, times=2)
    refuse = circle.next_answers.popleft()
    circle.next_answers.appendleft(lambda request: (is_asked.set(), time.sleep(0.5), refuse(request))[2])

    def be_refused():
        with pytest.raises(RequestRefusedError):
            refresh_user_token(**call, cache=TokenCache(store, clock=clock))

    first = threading.Thread(target=be_refused)
    first.start()
    is_asked.wait(5)
    be_refused()
    first.join()
    assert circle.knows(refresh_user_token(**call, cache=TokenCache(store, clock=clock)))
    assert len({request.json()["idempotencyKey"] for request in circle.requests}) == 3


def test_refusals_by_two_names(circle, clock, store):
    """Each is remembered, so that calls by both ask no more often than calls by one."""
    pair, asked = circle.sign_in(), []
    for minute in range(16):
        for name in ({"user_id": "user-1", "user_token": None}, {}):
            circle.next_answers.clear()
            circle.fail_next(155103)
            sent = len(circle.requests)
            with pytest.raises(SignInRequiredError):
                refresh_user_token(**call_with(circle, pair, **name), cache=TokenCache(store, clock=clock))
            asked += [minute] * (len(circle.requests) > sent)
        clock.advance(60)
    assert len(asked) <= 6


class SlowToConnect(Runtime):
    """A network that takes a while before anything is sent."""

    def send(self, request, *, caller, **others):
        late = attrs.evolve(caller, depart=lambda: depart_late(caller.depart))
        return super().send(request, caller=late, **others)


def depart_late(depart):
    time.sleep(0.4)
    depart()


def test_announcement_that_is_old_and_cannot_be_renewed(kuzzle, root, monkeypatch):
    """Nothing is sent on it: others would take it for given up."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    sent = []

    class Failing(SharedStore):
        def set(self, key, value, seconds):
            if key.endswith("-attempt"):
                sent.append(len(kuzzle.requests))
                if len(sent) == 2:
                    raise ConnectionError
            return super().set(key, value, seconds)

    refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(Failing(), runtime=SlowToConnect()))
    assert len(kuzzle.requests) == 1
    assert sent[:4] == [0, 0, 0, 0], "announced, not renewed, looked again, and renewed"


def test_refused_token_that_is_of_another_chain(kuzzle, store, root):
    """A refusal that is remembered is no verdict if the session goes on in a chain that the store cannot lead to."""
    second = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store)).jwt
    key = key_of("kuzzle:2", kuzzle.url, second)
    store.delete(f"{key}-alias")
    refresh_kuzzle_token(kuzzle.url, second, expires_in="2h", cache=TokenCache(store))
    attempt = Attempt(by="one", at=Instant(time.time(), Runtime().steady(), Runtime().boot))
    refused = attempt.refused(key_of(key, kuzzle.url), SignInRequiredError("no", provider="kuzzle"))
    store.set(f"{key}-attempt", refused.write(), HOUR)
    token = refresh_kuzzle_token(kuzzle.url, root, expires_in="3h", cache=TokenCache(store))
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 3


@pytest.mark.parametrize(
    ("is_silent", "timeout", "threads"),
    [
        pytest.param(False, 4, 2, id="cannot connect"),
        pytest.param(True, 4, 2, id="hears nothing"),
        pytest.param(True, 0.8, 2, id="hears nothing, and has short calls"),
        pytest.param(True, 0.8, 1, id="hears nothing, and gives up before that is certain"),
    ],
)
def test_machine_that_is_cut_off(circle, monkeypatch, is_silent, timeout, threads):
    """A machine that cannot reach the service lets another try, however many callers wait on it."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    monkeypatch.setattr(_rules, "SILENCE", 0.5 if timeout == 4 else 1)
    circle.clock.advance(-7200)
    pair = circle.sign_in("user-1", device_id="device-1")
    circle.clock.advance(7200)
    cut_off = requests.Session()
    cut_off.trust_env = False
    silent = socket.create_server(("127.0.0.1", 0))  # it never answers what it gets
    cut_off.proxies = {"http": f"http://127.0.0.1:{silent.getsockname()[1] if is_silent else 9}"}
    store, is_over = SharedStore(), threading.Event()
    caches = [TokenCache(store, runtime=Runtime()) for _ in range(2)]

    def call(number, **options):
        options |= {"device_id": "device-1", "api_key": circle.api_key, "base_url": circle.url, "cache": caches[number]}
        return refresh_user_token(user_token=pair.user_token, refresh_token=pair.refresh_token, **options)

    def insist():
        while not is_over.is_set():
            with contextlib.suppress(RefreshError):
                call(0, session=cut_off, timeout=timeout)

    with silent, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(insist) for _ in range(threads)]
        time.sleep(0.5)
        try:
            new = call(1, timeout=8)
        finally:
            is_over.set()
        assert call(0, session=cut_off, timeout=4) == new
        assert [each.result() for each in waiting] == [None] * threads


def test_lock_after_a_failure(kuzzle, store, root, monkeypatch):
    """Who has failed just now lets others try first."""
    monkeypatch.setattr(_rules, "LONGEST_POLL", 1.0)
    cache, key = TokenCache(store), key_of("kuzzle:2", kuzzle.url, root)
    kuzzle.stop()
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, queuable=False)
    kuzzle.start()
    with ThreadPoolExecutor() as pool:
        new = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache)
        time.sleep(0.2)
        assert store.acquire(key, "another", 5) == 0.0
        assert not new.done()
        store.release(key, "another")
        assert kuzzle.knows(new.result().jwt)


def test_short_call_after_a_failure(kuzzle, store, root, monkeypatch):
    """A call with little time has its attempt, too."""
    monkeypatch.setattr(_rules, "LONGEST_POLL", 1.0)
    cache = TokenCache(store)
    kuzzle.stop()
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, cache=cache, queuable=False)
    kuzzle.start()
    assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, root, cache=cache, timeout=2).jwt)


@pytest.mark.parametrize(
    ("make_store", "left", "fails"),
    [
        pytest.param(SharedStore, 1800, False, id="after a success"),
        pytest.param(MemoryStore, 1800, True, id="nobody shares the store"),
        pytest.param(SharedStore, 8, True, id="in a token's last moments"),
    ],
)
def test_lock_that_is_taken_at_once(monkeypatch, make_store, left, fails):
    """Otherwise nobody is let to try first."""
    monkeypatch.setattr(_rules, "LONGEST_POLL", 2.0)
    with FakeKuzzle() as kuzzle:
        jwt, cache = kuzzle.login(ago=HOUR - left), TokenCache(make_store())
        if fails:
            kuzzle.next_answers.append(Answer(503, b""))
        with contextlib.suppress(UnavailableError):
            refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, queuable=False)
        began = time.monotonic()
        assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, jwt, expires_in="2h", cache=cache, timeout=20).jwt)
        assert time.monotonic() - began < 2


def test_lock_that_is_held_in_vain():
    """Who goes on with a valid token, as another process holds the lock, waits for that once and not each time."""
    store = SharedStore()
    with FakeKuzzle() as kuzzle:
        root = kuzzle.login(ago=HOUR - 20)
        store.acquire(key_of("kuzzle:2", kuzzle.url, root), "another", 30)
        auth = KuzzleAuth(kuzzle.url, root, cache=TokenCache(store))
        began = time.monotonic()
        for _ in range(4):
            auth(requests.Request("GET", f"{kuzzle.url}/_me").prepare())
        assert _rules.BRIEFLY <= time.monotonic() - began < 2 * _rules.BRIEFLY
        assert not kuzzle.requests


def test_answer_that_is_lost_while_others_call(kuzzle):
    """Calls that come after a request was sent do not put off the next attempt, if its answer is lost."""
    is_over, jwt, cache = threading.Event(), kuzzle.login(ago=HOUR - 30), TokenCache(lease=0.5)
    kuzzle.next_answers.append(lambda request: is_over.wait(20) and kuzzle.refuse(request, "busy"))

    def call(_):
        return refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=1)

    with ThreadPoolExecutor() as pool:
        end = time.monotonic() + 10
        while len(kuzzle.requests) < 2 and time.monotonic() < end:
            pool.submit(call, 0)
            time.sleep(0.1)
        sent = len(kuzzle.requests)
        is_over.set()
    assert sent == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not drop what a full backlog gets")
def test_host_whose_first_address_is_dead(kuzzle, monkeypatch):
    """A host's first address may drop what it gets: there is time for the next one."""
    port, find = int(kuzzle.url.rpartition(":")[2]), socket.getaddrinfo

    def two(host, *args, **options):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ("127.0.0.2", "127.0.0.1")]
        return found if host == "kuzzle.test" else find(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with contextlib.ExitStack() as stack:
        dead = stack.enter_context(socket.socket())
        dead.bind(("127.0.0.2", port))
        dead.listen(0)
        for _ in range(4):
            full = stack.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(("127.0.0.2", port))
        url, jwt = f"http://kuzzle.test:{port}", kuzzle.login(ago=60)
        assert refresh_kuzzle_token(url, jwt, cache=None, timeout=3).kuid == "foo"


class Hours(Runtime):
    """A process whose hours pass quickly."""

    passed = 0.0

    def now(self):
        return super().now() + self.passed

    def steady(self):
        return super().steady() + self.passed


def test_later_token_that_was_used_for_days(kuzzle):
    """A later token that was used every hour for days is known a day after it was last used, in memory as well."""
    runtime = Hours()
    cache = TokenCache(MemoryStore(timer=runtime.steady), ahead=7200, runtime=runtime)

    def call(jwt, hours):
        runtime.passed += 3600.0 * hours
        kuzzle.clock.advance(3600 * hours)
        return refresh_kuzzle_token(kuzzle.url, jwt, expires_in="3d", cache=cache)

    later = call(kuzzle.login(ago=60), 0).jwt
    newest = [call(later, 1) for _ in range(100)][-1]
    for _ in range(22):  # the process is busy with others
        call(kuzzle.login("other", expires_in="2h"), 1)
    assert call(later, 1) == newest


UNWANTED = """
from refresher import KuzzleAuth, keep_alive

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 1.0)
try:
    list(keep_alive([KuzzleAuth(url, jwts[0], cache=TokenCache(lease=1), timeout=None)]))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signal here")
def test_process_that_is_interrupted_in_keep_alive():
    """It ends a lease later, though the answer is lost, and the session's timeout is None."""
    is_over = threading.Event()
    with FakeKuzzle() as kuzzle:
        kuzzle.next_answers.append(lambda request: is_over.wait(30) and kuzzle.truly(request))
        try:
            assert run(PRELUDE + UNWANTED, kuzzle.url, kuzzle.login(ago=HOUR - 10), seconds=15) == "interrupted\n"
        finally:
            is_over.set()


def test_a_store_that_stays_down_is_told_again(kuzzle, store, root, caplog, monkeypatch):
    """It is in the log every few seconds, and not just once."""
    store.is_down, cache = True, TokenCache(store)
    for cooldown, times in ((60.0, 1), (0.0, 2)):
        monkeypatch.setattr(_rules, "COOLDOWN", cooldown)
        with pytest.raises(UnavailableError):
            refresh_kuzzle_token(kuzzle.url, root, cache=cache, queuable=False, timeout=1)
        assert caplog.text.count("SharedStore cannot be read") == times


def test_no_second_attempt_at_a_store_that_is_down(kuzzle, store, root):
    """Who wants one attempt is told at once."""
    store.is_down, began = True, time.monotonic()
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(store), queuable=False, timeout=5)
    assert time.monotonic() - began < 1


def test_rejected_while_another_may_have_its_successor(kuzzle, store, root):
    """A token that is rejected though it is new is no verdict while another process may have spent it."""
    cache = TokenCache(store)
    auth = KuzzleAuth(kuzzle.url, root, cache=cache, timeout=1)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    put_open_attempt(store, key_of("kuzzle:2", kuzzle.url, token.jwt))
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(OutcomeUnknownError):
        requests.get(f"{kuzzle.url}/_me", auth=auth, timeout=10)


def test_longer_lifetime_than_that_of_a_refresh_under_way(kuzzle, cache, root):
    """A call that joins a refresh gets the life that it asks for."""
    kuzzle.delay_next(0.5)
    with ThreadPoolExecutor() as pool:
        one = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache)
        while not kuzzle.requests:
            time.sleep(0.01)
        two = pool.submit(refresh_kuzzle_token, kuzzle.url, root, expires_in="30d", cache=cache)
        assert (one.result().ttl.days, two.result().ttl.days) == (0, 30)


def test_longer_lifetime_during_downtime(kuzzle, cache, root):
    """A call that asks for a longer life goes on with the token that there is if Kuzzle is down."""
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    kuzzle.stop()
    assert refresh_kuzzle_token(kuzzle.url, root, expires_in="30d", timeout=1, cache=cache) == token


class Ages(SharedStore):
    """It takes two hours to write a token down."""

    def set(self, key, value, seconds):
        if '"token"' in value and self.takes_ages:
            self.takes_ages = False
            self.clock.advance(2 * HOUR)
        super().set(key, value, seconds)


def test_token_that_expires_while_it_is_written_down(clock):
    """What is handed out works."""
    store = Ages(clock)
    store.clock, store.takes_ages = clock, True
    with FakeCircle(clock=clock) as circle:
        pair = refresh_user_token(**call_with(circle, circle.sign_in()), cache=TokenCache(store, clock=clock))
        assert circle.knows(pair)


def test_entry_that_can_be_read_again(kuzzle, store, root, monkeypatch):
    """That one could not be read does not count any more once it has been replaced: who has to sign in is told."""
    monkeypatch.setattr(_rules, "SETTLED", 0.2)  # else the verdict takes as long as a call with a valid token waits
    store.set(key_of("kuzzle:2", kuzzle.url, root), "nonsense", HOUR)
    cache = TokenCache(store)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {token.jwt}"}, timeout=10)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(kuzzle.url, root, expires_in="30d", cache=cache, timeout=3)


class Connections(SharedStore):
    """Each thread that asks it has a connection, until it gives that back."""

    def __init__(self, clock=time.monotonic):
        super().__init__(clock)
        self.open = set()

    def _do(self, name, *arguments):
        self.open.add(threading.current_thread())
        return super()._do(name, *arguments)

    def end_thread(self):
        self.open.discard(threading.current_thread())


@pytest.mark.parametrize("what", ["look", "lead", "probe", "save later"])
def test_connections_of_threads(kuzzle, clock, root, what):
    """Each thread of ours gives its connection back, whatever it is for: a database has few."""
    store = Connections(clock)
    cache = TokenCache(store, clock=clock)
    spent = refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt
    refresh_kuzzle_token(kuzzle.url, root, expires_in="30d", cache=cache)
    if what == "look":
        other = TokenCache(store, clock=clock)
        other.peek(kuzzle.url, root)
        assert KuzzleAuth(kuzzle.url, root, cache=other).jwt != root
        other.forget(kuzzle.url, root)
    elif what == "lead":
        refresh_kuzzle_token(kuzzle.url, spent, cache=TokenCache(store, clock=clock))
    elif what == "probe":
        cache._ledger.runtime.start(cache._ledger._probe)
    else:
        (chain,), done = map(cache._ledger.chains.get, cache._ledger.chains.keys()), threading.Event()
        cache._ledger.unsaved[chain.key] = chain
        cache._ledger.save_later(done.set)
        assert done.wait(5)
    deadline = time.monotonic() + 5
    while store.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not store.open


def let_pairs_expire(circle, call, count):
    """Refresh a session again and again, each pair when the one before has expired, and tell nobody."""
    for _ in range(count):
        pair = refresh_user_token(**call, cache=None)
        call = call_with(circle, pair)
        circle.clock.advance(3600)


@pytest.mark.parametrize("call", [call_with, by_id], ids=["by user token", "by user id"])
@pytest.mark.parametrize("silent_at", [0, 3], ids=["busy at first", "silent later"])
def test_walk_that_takes_longer_than_a_lease(monkeypatch, clock, call, silent_at):
    """
    Answers that Circle replays are followed to the end, however long that takes. So is the exchange of a user id.

    What fails in between is repeated, and not all from the beginning.
    """
    monkeypatch.setattr(_rules, "LEASE", 0.4)
    monkeypatch.setattr(_rules, "SILENCE", 0.6)
    with FakeCircle(clock=clock) as circle:
        first = circle.sign_in("user-1")
        let_pairs_expire(circle, call(circle, first), 5)
        circle.requests.clear()
        circle.delay_next(0.15, times=silent_at)
        circle.next_answers.append(lambda request: time.sleep(silent_at / 2) or circle.refuse(request, "busy"))
        circle.delay_next(0.15, times=20)
        store = SharedStore()
        assert circle.knows(refresh_user_token(**call(circle, first), cache=TokenCache(store), timeout=10))
        assert len({request.body for request in circle.requests}) == len(circle.requests) - 1


def test_walk_whose_later_answers_are_lost(monkeypatch, clock):
    """That the service could be reached a while ago is no reason to keep the lock."""
    monkeypatch.setattr(_rules, "LEASE", 0.4)
    store = SharedStore()
    cache = TokenCache(store)
    with FakeCircle(clock=clock) as circle, ThreadPoolExecutor() as pool:
        first = circle.sign_in("user-1")
        let_pairs_expire(circle, call_with(circle, first), 7)
        circle.next_answers.extend([lambda request: circle.truly(request, after=0.2)] * 4 + [Answer(503, b"")] * 999)
        new = pool.submit(refresh_user_token, **call_with(circle, first), cache=cache, timeout=20)
        time.sleep(1)
        (key,) = cache._ledger.flights
        deadline = time.monotonic() + 9
        while (held := store.acquire(key, "another", 0.1)) and time.monotonic() < deadline:
            time.sleep(0.02)
        circle.next_answers.clear()
        assert not held
        assert circle.knows(new.result())


def test_short_call_that_is_in_vain(kuzzle, root, monkeypatch):
    """It lets others try as well, when it has tried for two leases."""
    monkeypatch.setattr(_rules, "LEASE", 0.1)
    store = SharedStore()
    kuzzle.next_answers.extend([Answer(503, b"")] * 999)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=TokenCache(store), timeout=0.95)
        while not kuzzle.requests:
            time.sleep(0.01)
        while (held := store.acquire(key_of("kuzzle:2", kuzzle.url, root), "another", 0.01)) and not call.done():
            time.sleep(0.01)
        assert not held
        assert not call.done()
        with pytest.raises(UnavailableError):
            call.result()


def test_pause_when_a_token_has_expired(kuzzle, root):
    """There is nothing to hurry for any more."""
    ledger = TokenCache()._ledger
    call = Call(credential=kuzzle_credential(kuzzle.url, root))
    flight = Flight(ledger, call.credential.keys[0], call, 60.0, None)
    flight.join(Waiter(REAL.event(), math.inf, True, lambda: True))
    began = REAL.steady()
    flight._urgent_at = began - _rules.LAST_MOMENTS
    flight.pause(1.0)
    assert REAL.steady() - began >= 1.0


class Slowest(Runtime):
    """It draws the longest pauses."""

    def pick(self, least, most):
        return most


def test_outage_that_ends_just_before_a_token_does():
    """Pauses between attempts grow longer, but not beyond the token's end."""
    cache = TokenCache(runtime=Slowest())
    with FakeKuzzle() as kuzzle:
        jwt, up_at = kuzzle.login(ago=HOUR - 6), time.monotonic() + 3.5
        answer = lambda request: kuzzle.truly(request) if time.monotonic() > up_at else Answer(503, b"")  # noqa: E731
        kuzzle.next_answers.extend([answer] * 99)
        assert kuzzle.knows(refresh_kuzzle_token(kuzzle.url, jwt, cache=cache).jwt)
        assert len(kuzzle.requests) < 30


def test_patient_call_beside_one_that_is_not(store):
    """It waits for a new token, though another that waits with it makes do with the old one."""
    cache = TokenCache(store)
    with FakeKuzzle() as kuzzle, ThreadPoolExecutor() as pool:
        auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 20), cache=cache)
        key = key_of("kuzzle:2", kuzzle.url, auth.jwt)
        store.acquire(key, "another", 9)
        view = pool.submit(auth._current, auth._sign_in)
        time.sleep(0.3)
        outcomes = pool.submit(lambda: [each.outcome for each in keep_alive([auth])])
        view.result()  # it has waited for two seconds
        time.sleep(0.5)
        store.release(key, "another")
        assert outcomes.result() == ["refreshed"]


class Late(Runtime):
    """Its threads begin late."""

    def start(self, work, *, daemon=False):
        super().start(lambda: time.sleep(0.3) or work(), daemon=daemon)


@pytest.mark.parametrize("runtime", [Runtime(), Late()], ids=["", "threads that begin late"])
def test_flight_that_two_find_stuck(monkeypatch, runtime):
    """One of them starts another. It sends the token once."""
    truly, both, found = Flight.is_stuck, threading.Barrier(2), []

    def is_stuck(flight):
        found.append(flight)
        if not truly(flight):
            return False
        if flight is found[0]:
            with contextlib.suppress(threading.BrokenBarrierError):
                time.sleep(0.2 * both.wait(2))
        return True

    monkeypatch.setattr(Flight, "is_stuck", is_stuck)
    store = SlowStore(time.monotonic)
    cache = TokenCache(store, runtime=runtime)
    with FakeKuzzle() as kuzzle, ThreadPoolExecutor() as pool:
        jwt = kuzzle.login(ago=HOUR - 3.5)
        store.silence = 30.0
        kuzzle.delay_next(0.5)
        auths = [KuzzleAuth(kuzzle.url, jwt, cache=cache, timeout=5) for _ in range(3)]
        calls = [pool.submit(auth._current, auth._sign_in) for auth in auths]
        assert {kuzzle.knows(call.result().secret.reveal()) for call in calls} == {True}
        store.silence = None
        store.over.set()
        wait_for_copies(cache)
        assert len(kuzzle.requests) == 1


def test_lock_that_is_taken_again_is_renewed(monkeypatch):
    """A flight that has let others try, and has the lock again, keeps it for as long as it needs."""
    monkeypatch.setattr(_rules, "LEASE", 0.3)
    store = SharedStore()
    ledger = Ledger(store, REAL, None, None)
    lease = Lease(ledger, 64 * "a", "me")
    for _ in range(2):
        lease.take()
        time.sleep(0.6)
        assert lease.is_ours()
        assert store.acquire(64 * "a", "another", 1.0) > 0
        lease.give_back()


PASSES_ON = """
cache = TokenCache(refresher.FileStore(jwts[1]))
refresh_kuzzle_token(url, jwts[0], cache=cache)
"""


def test_script_that_passes_a_later_token(kuzzle, root, tmp_path):
    """Each run of a script leads the later token that it is given to the newest, for a day and more."""
    cache = TokenCache(FileStore(tmp_path))
    later = refresh_kuzzle_token(kuzzle.url, root, cache=cache).jwt
    refresh_kuzzle_token(kuzzle.url, later, expires_in="30d", cache=cache)
    wait_for_copies(cache)
    key = key_of("kuzzle:2", kuzzle.url, later)
    (path,) = (tmp_path / "refresher").rglob(f"refresher-{key}-alias.entry")
    for _ in range(3):
        os.utime(path, (0, 0))
        run(PRELUDE + PASSES_ON, kuzzle.url, later, str(tmp_path))
        assert path.stat().st_mtime > 1.0
    assert not [*tmp_path.rglob("*.tmp")]


def test_answer_for_one_who_came_soon_after(kuzzle):
    """Who joins while a request is on its way has time for its answer, also if those for whom it was sent have none."""
    jwt, cache = kuzzle.login(ago=1800), TokenCache(lease=1)
    kuzzle.delay_next(2.5)

    def call(timeout):
        return refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=timeout)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, 1.5)
        while not kuzzle.requests:
            time.sleep(0.01)
        assert kuzzle.knows(call(10))
        assert isinstance(first.exception(), OutcomeUnknownError)
    assert len(kuzzle.requests) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signal here")
def test_answer_that_is_lost_while_others_are_interrupted(kuzzle):
    """Nor do calls that come later and are interrupted: a worker's time limits, say."""
    is_over, jwt, cache = threading.Event(), kuzzle.login(ago=HOUR - 30), TokenCache(lease=0.5)
    kuzzle.next_answers.append(lambda request: is_over.wait(20) and kuzzle.refuse(request, "busy"))

    def interrupt(*_):
        raise KeyboardInterrupt

    def call(timeout):
        return refresh_kuzzle_token(kuzzle.url, jwt, cache=cache, timeout=timeout)

    before, end = signal.signal(signal.SIGALRM, interrupt), time.monotonic() + 8
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, 0.6)
        try:
            while not kuzzle.requests:
                time.sleep(0.01)
            while len(kuzzle.requests) < 2 and time.monotonic() < end:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                with contextlib.suppress(KeyboardInterrupt):
                    call(5)
                signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            is_over.set()
        assert isinstance(first.exception(), OutcomeUnknownError)
    assert len(kuzzle.requests) == 2


def test_answer_that_is_lost_while_others_go_on(monkeypatch):
    """Who goes on with a valid token was not interrupted: the answer is not waited for any longer for that."""
    monkeypatch.setattr(_rules, "COOLDOWN", 0.0)
    is_over, cache = threading.Event(), TokenCache(lease=2)
    with FakeKuzzle() as kuzzle, ThreadPoolExecutor(64) as pool:
        auth = KuzzleAuth(kuzzle.url, kuzzle.login(ago=HOUR - 30), cache=cache, timeout=3)
        kuzzle.next_answers.append(lambda request: is_over.wait(20) and kuzzle.refuse(request, "busy"))
        end = time.monotonic() + 9.0  # then it would be sent again
        while time.monotonic() < end and len(kuzzle.requests) < 2:
            pool.submit(auth, requests.Request("GET", f"{kuzzle.url}/_me").prepare())
            time.sleep(0.2)
        sent = len(kuzzle.requests)
        is_over.set()
    assert sent == 2


def test_verdict_beside_a_machine_that_is_cut_off(kuzzle, root, monkeypatch):
    """What a machine tries in vain is over when it lets others try: they need not wait for its answer."""
    monkeypatch.setattr(_rules, "LEASE", 0.2)
    requests.post(f"{kuzzle.url}/_logout", headers={"Authorization": f"Bearer {root}"}, timeout=10)
    cut_off = requests.Session()
    cut_off.trust_env = False
    cut_off.proxies = {"http": "http://127.0.0.1:9"}
    store, is_over = SharedStore(), threading.Event()
    caches = [TokenCache(store, runtime=Runtime()) for _ in range(2)]

    def insist():
        while not is_over.is_set():
            with contextlib.suppress(RefreshError):
                refresh_kuzzle_token(kuzzle.url, root, cache=caches[0], session=cut_off, timeout=3)

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(insist) for _ in range(2)]
        time.sleep(0.5)
        try:
            with pytest.raises(SignInRequiredError):
                refresh_kuzzle_token(kuzzle.url, root, cache=caches[1], timeout=8)
        finally:
            is_over.set()
        assert [each.result() for each in waiting] == [None, None]


class Slow(Runtime):
    """It makes each pause as long as it may be."""

    def pick(self, least, most):
        return most


def test_last_attempt_of_a_machine_that_lets_others_try(kuzzle, root, monkeypatch):
    """It comes just before the deadline, as ever."""
    monkeypatch.setattr(_rules, "LEASE", 0.3)
    kuzzle.stop()
    cache = TokenCache(SharedStore(), runtime=Slow())
    with ThreadPoolExecutor() as pool:
        call = pool.submit(refresh_kuzzle_token, kuzzle.url, root, cache=cache, timeout=3)
        time.sleep(2.65)
        kuzzle.start()
        assert kuzzle.knows(call.result())
