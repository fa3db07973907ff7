"""Never lose a session: faults made on purpose."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import urlsplit

import attrs
import pytest
import requests
from helpers import by_id, call_with, wait_until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from proxy import FaultProxy
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from refresher import (
    FileStore,
    MemoryStore,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    SignInRequiredError,
    TokenCache,
    UnavailableError,
    _http,
    _rules,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher._ledger import Lease
from refresher._runtime import Runtime
from refresher._text import claims
from refresher.services.kuzzle import credential as kuzzle_credential
from refresher.testing import Answer, Clock, FakeCircle, FakeKuzzle

JWT = "kauth-e30.e30.c2ln"
GOOD = {"_id": "foo", "expiresAt": -1, "jwt": "kauth-new", "ttl": -1}


@pytest.fixture
def quick(monkeypatch):
    """Let pauses be short."""
    monkeypatch.setattr("refresher._rules._SHORTEST_PAUSE", 0.001)
    monkeypatch.setattr("refresher._rules._LONGEST_PAUSE", 0.01)


@pytest.fixture
def root(kuzzle):
    return kuzzle.login(ago=1800)


@pytest.fixture
def proxy(kuzzle):
    with FaultProxy(urlsplit(kuzzle.url).port) as proxy:
        yield proxy


# The deadline


def peer(behave):
    """Accept connections, and behave."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    def serve(client):
        with client:
            try:
                behave(client)
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    return listener


def drip(client, data):
    client.recv(65536)
    for byte in data:
        client.sendall(bytes([byte]))
        time.sleep(0.1)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
PEERS = {
    "silence": lambda client: client.recv(65536) and client.recv(1),
    "dripping headers": lambda client: drip(client, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10),
    "a dripping body": lambda client: client.sendall(HEAD) or drip(client, b" " * 50),
    "an endless body": lambda client: drip(client, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 50),
    "half closed": lambda client: client.shutdown(socket.SHUT_WR) or (client.recv(65536) and time.sleep(3)),
    "reset": lambda client: client.recv(1) and client.close(),
}


@pytest.mark.parametrize("given", ["cache", "session", "neither"])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", PEERS)
def test_deadline(name, scheme, given):
    """Whatever the peer does, the caller has an error in time."""
    with peer(PEERS[name]) as listener, requests.Session() as session:
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises((OutcomeUnknownError, UnavailableError)) as caught:
            refresh_kuzzle_token(
                url,
                JWT,
                timeout=0.5,
                cache=TokenCache() if given == "cache" else None,
                session=session if given == "session" else None,
            )
        assert time.monotonic() - started < 0.5 + 0.25 + 0.5, "with a margin for a slow machine"
        assert caught.value.spent in (None, False)
        # A lent adapter whose time is up in the middle of a handshake does not say so.
        if scheme == "https" and name != "silence" and not (given == "session" and "timed out" in str(caught.value)):
            assert caught.value.spent is False


@pytest.mark.parametrize("cached", [True, False])
def test_names_that_hang(monkeypatch, cached):
    """A name server that hangs ends in time as well, and who it leads to in the end is sent nothing."""
    real, found = socket.getaddrinfo, threading.Event()

    def hang(host, *arguments, **options):
        if host == "hanging.example":
            assert found.wait(10)
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://hanging.example:{listener.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(RefreshError) as caught:
            refresh_kuzzle_token(url, JWT, timeout=0.3, cache=TokenCache(lease=0.3) if cached else None)
        assert time.monotonic() - started < 1.5
        assert caught.value.spent is False
        found.set()
        client, _ = listener.accept()
        with client:
            client.settimeout(5)
            assert client.recv(1) == b""


WAITER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us without
from refresher import refresh_kuzzle_token, TokenCache, FileStore, OutcomeUnknownError
url, jwt, timeout, folder = sys.argv[1:]
print("ready", flush=True)
try:
    refresh_kuzzle_token(url, jwt, timeout=eval(timeout), cache=TokenCache(FileStore(folder)))
except OutcomeUnknownError:
    print("gave up", flush=True)
"""


@pytest.fixture
def waiter(tmp_path):
    started = []

    def start(url, jwt, timeout):
        command = [sys.executable, "-P", "-c", WAITER, url, jwt, repr(timeout), str(tmp_path / "shelf")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_interrupt(kuzzle, root, waiter):
    """A call without a timeout is interrupted at once. Then the process waits, until it is told again."""
    kuzzle.next_answers.append(lambda request: time.sleep(5) or b"")
    process = waiter(kuzzle.url, root, None)
    while not kuzzle.requests:
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "KeyboardInterrupt" in line:
            break
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(3)
    assert time.monotonic() - started < 3


def test_process_that_ends_waits(kuzzle, root, waiter, tmp_path):
    """A process that ends normally waits for its exchange, and the next one finds the new token."""
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=2.0))
    process = waiter(kuzzle.url, root, 2.0)  # it is held for one of them
    out, _ = process.communicate(timeout=20)
    assert out == "gave up\n"
    token = refresh_kuzzle_token(kuzzle.url, root, cache=TokenCache(FileStore(tmp_path / "shelf")))
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 1


def test_slow_kuzzle(target):
    """A caller gives up on a slow Kuzzle; the next call has the good token, the old one is spent."""
    jwt, cache = target.login(), TokenCache(clock=lambda: time.time() + 3600)
    with FaultProxy(urlsplit(target.url).port) as proxy:
        proxy.faults.append(1.5)
        with pytest.raises(OutcomeUnknownError):
            refresh_kuzzle_token(proxy.url, jwt, timeout=0.3, cache=cache)
        token = refresh_kuzzle_token(proxy.url, jwt, cache=cache)
    target.wait(1.2)
    assert (target.me(jwt), target.me(token.jwt)) == (401, 200)
    assert proxy.connections == 1


def test_really_slow_kuzzle(slow_target):
    """The same where Kuzzle itself is slow: it does not stop for a client that has gone, and nor do we."""
    jwt, cache = slow_target.login(), TokenCache()
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(slow_target.url, jwt, timeout=0.3, cache=cache)
    token = refresh_kuzzle_token(slow_target.url, jwt, cache=cache)
    time.sleep(1.2)
    assert (slow_target.me(jwt), slow_target.me(token.jwt)) == (401, 200)


# The same second


@pytest.mark.holds
@pytest.mark.parametrize("off", [0, -30, 30])
def test_login_and_refresh_at_once(running_target, off):
    """50 sign-ins, refreshed at once to the same end or another, and again: all tokens are good 2 s later."""
    target, cache = running_target, TokenCache(clock=lambda: time.time() + off)

    def one(number):
        lifetime = f"{target.lifetimes()}s"
        jwt = target.login(lifetime)
        for _ in range(2):
            asked = lifetime if number % 2 else f"{target.lifetimes()}s"
            new = target.refresh(jwt, expires_in=asked, cache=cache).jwt
            cache.forget(target.url, jwt)
            jwt = new
        return jwt

    with ThreadPoolExecutor(50) as pool:
        tokens = list(pool.map(one, range(50)))
    time.sleep(2)
    assert [target.me(jwt) for jwt in tokens] == [200] * 50


@pytest.mark.holds
def test_old_tokens_are_not_held(kuzzle, root):
    """Once the service has told what time it is there, a token that is older than some seconds is refreshed at once."""
    cache, other = TokenCache(), kuzzle.login("foo", "2h", ago=7)
    refresh_kuzzle_token(kuzzle.url, root, cache=cache)
    started = time.monotonic()
    assert refresh_kuzzle_token(kuzzle.url, other, cache=cache).kuid == "foo"
    assert time.monotonic() - started < 0.9


@pytest.mark.holds
@pytest.mark.parametrize("off", [0, -7200, 7200])
def test_tokens_that_may_be_young_are_held(off, monkeypatch):
    """Whatever the local clock says, a token is not refreshed in the second of its birth, which would be fatal."""
    with FakeKuzzle(clock=Clock()) as kuzzle:
        now = time.time
        monkeypatch.setattr(Runtime, "now", lambda _: now() + off)
        for lifetime in (3600, 7200):
            token = refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", f"{lifetime}s"), cache=TokenCache())
            assert kuzzle.knows(token.jwt)


# Downtime


BUSY = [
    "api.process.overloaded",
    "api.process.shutting_down",
    "api.process.too_many_requests",
    "api.process.not_enough_nodes",
    "security.token.verification_error",
    "services.cache.write_failed",
]


@pytest.mark.parametrize("id", BUSY)
def test_busy(kuzzle, root, quick, caplog, id):
    """What passes is waited out, and the log says so; queuable=False fails at once."""
    kuzzle.fail_next(id)
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, root, queuable=False, cache=None)
    assert caught.value.spent is False
    kuzzle.fail_next(id, 3)
    assert refresh_kuzzle_token(kuzzle.url, root).kuid == "foo"
    assert caplog.text.count("Next try in 0.0 s") == 3
    assert len(kuzzle.requests) == 5


def test_downtime(kuzzle, quick):
    """Kuzzle is stopped and started again while calls wait: all of them succeed, none is lost."""
    jwts = [kuzzle.login("foo", f"{7200 + number}s", ago=1800) for number in range(8)]
    kuzzle.stop()
    with pytest.raises(UnavailableError, match="Connection refused"):
        refresh_kuzzle_token(kuzzle.url, jwts[0], queuable=False)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(refresh_kuzzle_token, kuzzle.url, jwt) for jwt in jwts]
        time.sleep(0.3)
        assert not any(each.done() for each in waiting)
        kuzzle.start()
        tokens = [each.result(20) for each in waiting]
    assert all(kuzzle.knows(token.jwt) for token in tokens)
    assert len(kuzzle.requests) == 8


def refuses_connections(url):
    with socket.socket() as probe:
        return probe.connect_ex((urlsplit(url).hostname, urlsplit(url).port)) == errno.ECONNREFUSED


def test_downtime_of_a_real_kuzzle(slow_target):
    """The same with a real Kuzzle, which takes its time to come back."""
    jwts = [slow_target.login() for _ in range(8)]
    subprocess.run(os.environ["REFRESHER_TEST_SLOW_KUZZLE_STOP"], shell=True, check=True)
    deadline = time.monotonic() + 30
    while not refuses_connections(slow_target.url):
        assert time.monotonic() < deadline, "another Kuzzle than ours is there"
        time.sleep(0.1)  # it takes a moment to die
    ahead = TokenCache(clock=lambda: time.time() + 3600)
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(slow_target.url, jwts[0], queuable=False, cache=ahead)
    assert caught.value.spent is False
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(refresh_kuzzle_token, slow_target.url, jwt, cache=ahead, timeout=120) for jwt in jwts]
        start = os.environ["REFRESHER_TEST_SLOW_KUZZLE_START"]
        subprocess.run(start, shell=True, check=True, stdout=subprocess.DEVNULL)
        tokens = [each.result(120) for each in waiting]
    time.sleep(1.2)
    assert [slow_target.me(token.jwt) for token in tokens] == [200] * 8
    assert [slow_target.me(jwt) for jwt in jwts] == [401] * 8


def test_downtime_that_lasts(kuzzle, root):
    """When time is up, the error says that nothing was spent."""
    kuzzle.stop()
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, root, timeout=0.5)
    assert caught.value.spent is False
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("after", ["1", "date"])
def test_retry_after_is_honoured(kuzzle, root, after):
    """A service that says when to come back is not asked before."""
    headers = {"Retry-After": after}
    if after == "date":  # by the service's own clock
        then = datetime(2020, 2, 2, tzinfo=UTC)
        dates = {"Date": then, "Retry-After": then + timedelta(seconds=1)}
        headers = {name: format_datetime(date, usegmt=True) for name, date in dates.items()}
    kuzzle.next_answers.append(Answer(429, b"", headers))
    times = []
    kuzzle.next_answers.append(lambda request: times.append(time.monotonic()) or kuzzle.truly(request))
    started = time.monotonic()
    refresh_kuzzle_token(kuzzle.url, root)
    assert times[0] - started > 0.9


def test_retry_after_beyond_the_deadline(kuzzle, root):
    """If that is too late, the caller is told at once, and when."""
    kuzzle.next_answers.append(Answer(503, b"", {"Retry-After": "3600"}))
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, root)
    assert caught.value.retry_after == 3600
    assert len(kuzzle.requests) == 1


# Lost answers


@pytest.mark.parametrize("fault", ["cut after", "reset"])
def test_answer_lost_on_kuzzle(target, fault):
    """An answer that is lost was the only one: the retry is refused, and so we know that the token is spent."""
    jwt = target.login()
    with FaultProxy(urlsplit(target.url).port) as proxy:
        proxy.faults.append(fault)
        with pytest.raises(SignInRequiredError) as caught:
            refresh_kuzzle_token(proxy.url, jwt, cache=TokenCache(clock=lambda: time.time() + 3600))
        assert caught.value.spent is True
        assert proxy.connections == 2
    target.wait(1.2)
    assert target.me(jwt) == 401


def test_answer_lost_on_kuzzle_in_one_attempt(kuzzle, root, proxy):
    """With one attempt nobody knows."""
    proxy.faults.append("cut after")
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_kuzzle_token(proxy.url, root, queuable=False)
    assert caught.value.spent is None


def test_request_lost_on_kuzzle(target):
    """A request that is lost is sent again, and nothing else happens."""
    jwt = target.login()
    with FaultProxy(urlsplit(target.url).port) as proxy:
        proxy.faults += ["cut before", "cut before"]
        token = refresh_kuzzle_token(proxy.url, jwt, cache=TokenCache(clock=lambda: time.time() + 3600))
    target.wait(1.2)
    assert target.me(token.jwt) == 200


def test_request_that_arrives_twice(kuzzle, root, proxy):
    """A request that the network doubles is refused the second time; what the caller gets says so."""
    proxy.faults.append("double")
    with pytest.raises(SignInRequiredError) as caught:
        refresh_kuzzle_token(proxy.url, root)
    assert caught.value.spent is None


def test_lost_and_then_down(kuzzle, root, proxy):
    """A lost answer and then a Kuzzle that is down: nobody knows, and the error does not say otherwise."""
    proxy.faults.append("cut after")

    def answer(request):
        kuzzle.next_answers.append(Answer(503, b"", {"Retry-After": "3600"}))
        return kuzzle.truly(request)

    kuzzle.next_answers.append(answer)
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_kuzzle_token(proxy.url, root)
    assert caught.value.spent is None
    assert proxy.connections == 2


def test_successor_that_another_process_saved(kuzzle, root):
    """A refusal is no error if another process has the successor and has saved it meanwhile."""
    store = MemoryStore()
    one, two = TokenCache(store), TokenCache(store)

    def answer(request):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryStore, "acquire", lambda *_: 0.0)
            refresh_kuzzle_token(kuzzle.url, root, cache=two)
        return kuzzle.truly(request)

    kuzzle.next_answers.append(answer)
    token = refresh_kuzzle_token(kuzzle.url, root, cache=one)
    assert kuzzle.knows(token.jwt)
    assert token == refresh_kuzzle_token(kuzzle.url, root, cache=two)
    assert len(kuzzle.requests) == 2


def test_a_bad_network_to_circle(quick):
    """30 % of answers lost, 10 % late, 10 % 5xx, 10 % 429: of 1,000 refreshes none is lost or done twice."""
    dice = random.Random(20260101)
    with FakeCircle(clock=Clock(time.time() - 3600)) as circle:
        first = pair = circle.sign_in()

        def network(request):
            circle.next_answers.append(network)
            luck = dice.random()
            if luck < 0.1:
                return Answer(429, b"")
            if luck < 0.15:
                return Answer(500, b"")
            answer = circle.truly(request, after=0.005 if luck > 0.9 else 0.0)
            return b"" if luck < 0.45 else Answer(502, b"") if luck < 0.5 else answer

        circle.next_answers.append(network)
        for _ in range(1000):
            pair = refresh_user_token(**call_with(circle, pair), cache=TokenCache())
            assert circle.knows(pair)
        assert len(circle._answered) == 1000
        assert len(circle.requests) > 1500
        assert circle.knows(pair)
        assert not circle.knows(first)


def test_one_key_through_all_attempts(circle, quick):
    """All attempts of one refresh carry one idempotency key."""
    pair = circle.sign_in()
    circle.next_answers.extend([b"", Answer(500, b""), Answer(429, b"")])
    refresh_user_token(**call_with(circle, pair))
    assert len({request.json()["idempotencyKey"] for request in circle.requests}) == 1
    assert len(circle.requests) == 4


def test_answer_that_nobody_took(circle, clock):
    """Hours after a crash the same call gets the old answer, sees that it's dead, and goes on from there."""
    pair = circle.sign_in()
    lost = refresh_user_token(**call_with(circle, pair), cache=None)
    clock.advance(7200)
    token = refresh_user_token(**call_with(circle, pair), cache=None)
    assert token != lost
    assert circle.knows(token)
    assert len(circle.requests) == 3


@pytest.mark.parametrize("date", ["Fri, 01 Jan 2100 00:00:00 GMT", "nonsense", ""])
def test_strange_dates(circle, date):
    """A date that makes all answers look dead does not make for a storm."""
    pair = circle.sign_in()

    def answer(request):
        circle.next_answers.append(answer)
        true = circle.truly(request)
        return Answer(true.status, true.body, {**true.headers, "Date": date})

    circle.next_answers.append(answer)
    assert circle.knows(refresh_user_token(**call_with(circle, pair)))
    assert len(circle.requests) <= 5


def test_drawn_key(circle):
    """A key that Circle wants no more is replaced by a drawn one, once; a given one is not."""
    pair = circle.sign_in()
    circle.fail_next(156020)
    assert refresh_user_token(**call_with(circle, pair), cache=None).user_id == "user-1"
    derived, drawn = [request.json()["idempotencyKey"] for request in circle.requests]
    assert derived != drawn
    circle.fail_next(156020, 2)
    with pytest.raises(RequestRefusedError, match="156020"):
        refresh_user_token(**call_with(circle, circle.sign_in()), cache=None)
    circle.fail_next(156020)
    key = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    with pytest.raises(RequestRefusedError, match="156020"):
        refresh_user_token(**call_with(circle, circle.sign_in(), idempotency_key=key), cache=None)
    assert len(circle.requests) == 5


def test_drawn_key_after_a_refusal(circle, clock):
    """After a definite refusal the next try has a drawn key: the derived one could bring the refusal back."""
    cache = TokenCache(MemoryStore(timer=clock), clock=clock)
    pair = circle.sign_in()
    circle.fail_next(155102)
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call_with(circle, pair), cache=cache)
    clock.advance(61)
    assert refresh_user_token(**call_with(circle, pair), cache=cache).user_id == "user-1"
    derived, drawn = [request.json()["idempotencyKey"] for request in circle.requests]
    assert derived != drawn


def test_given_key_after_a_refusal(circle, clock):
    """A key that was given is sent, whatever came of it before."""
    cache = TokenCache(MemoryStore(timer=clock), clock=clock)
    call = call_with(circle, circle.sign_in(), idempotency_key="a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")
    circle.fail_next(155102)
    with pytest.raises(SignInRequiredError):
        refresh_user_token(**call, cache=cache)
    clock.advance(61)
    refresh_user_token(**call, cache=cache)
    assert {request.json()["idempotencyKey"] for request in circle.requests} == {call["idempotency_key"]}


def test_failures_that_are_not_repeated(kuzzle, root):
    """A plugin that fails may have done so after the refresh: on Kuzzle that is not tried again."""
    kuzzle.fail_next("plugin.runtime.unexpected_error")
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, root)
    assert len(kuzzle.requests) == 1


# Hygiene, strangers


def test_retries_below_are_off(kuzzle, root):
    """An adapter that would send again is kept from it, and not changed."""
    session = requests.Session()
    adapter = HTTPAdapter(max_retries=Retry(3, allowed_methods=None, status_forcelist=[503]))
    session.mount("http://", adapter)
    kuzzle.next_answers.extend([Answer(503, b""), b"", b""])
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, root, queuable=False, session=session)
    assert len(kuzzle.requests) == 1
    assert adapter.max_retries.total == 3


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"action": "getCurrentUser"}, id="another request"),
        pytest.param({"result": {**GOOD, "_id": "bar"}}, id="another user"),
        pytest.param({"result": {**GOOD, "jwt": "kauth-e30.eyJfaWQiOiJiYXIifQ.c2ln"}}, id="another user's token"),
    ],
)
def test_answers_for_others(kuzzle, root, changes):
    """An answer to another request, or for another user, is none."""
    kuzzle.next_answers.append(Answer(200, {"result": GOOD, **changes}))
    with pytest.raises(ReplyError, match="another") as caught:
        refresh_kuzzle_token(kuzzle.url, root)
    assert caught.value.spent is None


def test_gateway_that_renames_requests(kuzzle, root):
    """An id that a gateway has put in place of ours is no reason to lose a token."""
    kuzzle.next_answers.append(Answer(200, {"action": "refreshToken", "requestId": "other", "result": GOOD}))
    assert refresh_kuzzle_token(kuzzle.url, root).jwt == "kauth-new"


# A campaign


class Campaign(RuleBasedStateMachine):
    """
    Whatever happens, a session stays alive, unless an answer was lost, and then the error says so.

    Two caches share a store, as two processes would.
    """

    def __init__(self):
        super().__init__()
        self.clock = Clock(time.time() - 10 * 86400)
        self.kuzzle = FakeKuzzle(clock=self.clock)
        self.kuzzle.start()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("refresher._rules._SHORTEST_PAUSE", 0.0001)
        self.patch.setattr("refresher._rules._LONGEST_PAUSE", 0.001)
        steady, start = time.clock_gettime, self.clock()
        self.patch.setattr(time, "clock_gettime", lambda which: steady(which) + self.clock() - start)
        store = MemoryStore(timer=self.clock)
        self.caches = [TokenCache(store, clock=self.clock), TokenCache(store, clock=self.clock)]
        self.sign_in()

    def sign_in(self):
        self.tokens = [self.kuzzle.login()]
        self.clock.advance(90)
        self.lost = False

    def teardown(self):
        self.kuzzle.stop()
        self.patch.undo()

    @rule(which=st.integers(0, 1), back=st.integers(0, 5), threads=st.integers(1, 4))
    def refresh(self, which, back, threads):
        """Refresh with any earlier token, from one or many threads."""
        jwt = self.tokens[max(0, len(self.tokens) - 1 - back)]

        def one(_):
            try:
                return refresh_kuzzle_token(self.kuzzle.url, jwt, cache=self.caches[which], timeout=5)
            except RefreshError as error:
                return error

        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(one, range(threads)))
        for result in results:
            if isinstance(result, RefreshError):
                assert self.lost, result
                assert result.spent in (True, None)
            elif result.jwt not in self.tokens:
                self.tokens.append(result.jwt)
        if self.lost and any(isinstance(result, RefreshError) for result in results):
            self.caches[0].clear()
            self.caches[1].clear()
            self.kuzzle.next_answers.clear()
            self.sign_in()

    @rule(id=st.sampled_from(BUSY), times=st.integers(1, 3))
    def be_busy(self, id, times):
        """Let Kuzzle be busy, or its token store be down."""
        self.kuzzle.fail_next(id, times)

    @rule()
    def lose_request(self):
        """Let a request be lost."""
        self.kuzzle.next_answers.append(b"")

    @rule()
    def lose_answer(self):
        """Let an answer be lost."""

        def lose(request):
            self.lost = True
            self.kuzzle.truly(request)
            return b""

        self.kuzzle.next_answers.append(lose)

    @rule(seconds=st.sampled_from([2, 60, 1800, 3400, 3550]))
    def wait(self, seconds):
        """Let time pass, but not so much that nobody could have refreshed."""
        for _ in range(seconds // 20 + 1):
            self.clock.advance(20)
            if self.kuzzle.clock() > self.ends() - 22:
                self.kuzzle.next_answers.clear()
                self.refresh(0, 0, 1)

    def ends(self):
        return claims(self.tokens[-1]).exp

    @rule()
    def restart(self):
        """Stop Kuzzle and start it again."""
        self.kuzzle.stop()
        self.kuzzle.start()

    @invariant()
    def alive(self):
        """The last token is good, or its successor was lost."""
        assert self.lost or self.kuzzle.knows(self.tokens[-1])


TestCampaign = Campaign.TestCase
TestCampaign.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("call", [call_with, by_id], ids=["the refresh", "the request before it"])
def test_a_request_that_hangs_is_sent_again(circle, monkeypatch, call):
    """Where asking again is safe, a call does not spend all of its time on one connection that is dead."""
    monkeypatch.setattr(_rules, "SILENCE", 0.3)
    pair = circle.sign_in("user-1")
    circle.delay_next(8.0)
    began = time.monotonic()
    assert circle.knows(refresh_user_token(**call(circle, pair), cache=TokenCache(), timeout=7))
    assert time.monotonic() - began < 4


class Silent:
    """Requests to a Kuzzle that are not answered, until the test says so, or ends."""

    def __init__(self, kuzzle):
        self.kuzzle, self.is_over, self.answers = kuzzle, threading.Event(), []

    def lose(self, request):
        """Let the request be lost."""
        self.is_over.wait(30)
        return b""

    def answer_late(self, request):
        """Let the request be carried out, and its answer come late."""
        answer = self.kuzzle.truly(request)
        self.is_over.wait(30)
        return answer

    def act_late(self, request):
        """Let the request be carried out late."""
        self.is_over.wait(30)
        return self.kuzzle.truly(request)

    def go_on(self, request):
        """Let what is late go on as soon as this one has been answered."""
        answer = self.kuzzle.truly(request)
        threading.Timer(1.5, self.is_over.set).start()
        return answer


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(_rules, "SILENCE", 0.3)
    with FakeKuzzle() as kuzzle:
        silent = Silent(kuzzle)
        yield silent
        silent.is_over.set()


@pytest.mark.parametrize("cached", [True, False])
def test_request_to_kuzzle_that_is_lost(silent, cached, caplog):
    """It is sent again, on another connection, while the token is still good."""
    caplog.set_level(logging.INFO)
    kuzzle, cache = silent.kuzzle, TokenCache() if cached else None
    kuzzle.next_answers.append(silent.lose)
    began = time.monotonic()
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache, timeout=20)
    assert time.monotonic() - began < 10
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 2
    assert "ok, 2 attempts" in caplog.text


def test_second_request_is_like_the_first(silent, capfd, monkeypatch):
    """It goes on a connection of our own, too, which prints nothing, and ends when the call does."""
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    monkeypatch.setattr(_http, "_send_on_lent", None)
    silent.kuzzle.next_answers.append(silent.lose)
    refresh_kuzzle_token(silent.kuzzle.url, silent.kuzzle.login(ago=1800), cache=None, timeout=20)
    assert "kauth" not in capfd.readouterr().out


@pytest.mark.parametrize("late", ["answer_late", "act_late"])
def test_answer_of_kuzzle_that_is_late(silent, late):
    """It counts, also if a second request has been refused meanwhile, or is refused later."""
    kuzzle = silent.kuzzle
    kuzzle.next_answers += [getattr(silent, late), silent.go_on if late == "answer_late" else silent.act_late]
    if late == "act_late":
        threading.Timer(2.0, silent.is_over.set).start()
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=TokenCache(), timeout=20)
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 2


@pytest.mark.parametrize("how", [{"queuable": False}, {"session": requests.Session()}], ids=["queuable", "session"])
@pytest.mark.parametrize("cached", [True, False])
def test_request_to_kuzzle_that_is_sent_once(silent, how, cached):
    """
    It is not sent again, however long its answer takes, if the caller wants one attempt.

    Nor on a caller's session: an adapter could keep it, and send it later, when nobody waits for it any more.
    """
    kuzzle, cache = silent.kuzzle, TokenCache() if cached else None
    kuzzle.next_answers.append(silent.lose)
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache, timeout=2, **how)
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize("first", [b"", 503, 401], ids=str)
def test_first_request_that_fails_while_the_second_is_under_way(silent, first):
    """The second one's answer is waited for: it may be the one with the token."""
    kuzzle, is_there = silent.kuzzle, threading.Event()

    def fail(request):
        assert is_there.wait(10)
        return first if first == b"" else Answer(503) if first == 503 else kuzzle.truly(request)

    def take(request):
        answer = kuzzle.truly(request)
        is_there.set()
        time.sleep(1.5)
        return answer

    kuzzle.next_answers += [fail, take]
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=TokenCache(), timeout=20)
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 2


@pytest.mark.parametrize("first", [b"", 503, 401], ids=str)
def test_two_requests_that_fail(silent, first):
    """A token that is refused after an answer was lost has been spent."""
    kuzzle = silent.kuzzle

    def fail(request):
        silent.is_over.wait(10)
        return first if first == b"" else Answer(503) if first == 503 else kuzzle.truly(request)

    def lose(request):
        kuzzle.truly(request)
        silent.is_over.set()
        return b""

    kuzzle.next_answers += [fail, lose]
    with pytest.raises(SignInRequiredError) as caught:
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=TokenCache(), timeout=20)
    assert caught.value.spent is True


@pytest.mark.parametrize("first", [b"", 503], ids=str)
def test_second_request_without_an_answer(silent, first):
    """Nobody knows what comes of it, whatever has come of the first."""
    kuzzle = silent.kuzzle

    def fail(_request):
        time.sleep(1)
        return Answer(503) if first == 503 else first

    kuzzle.next_answers += [fail, silent.lose]
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=None, timeout=2)
    assert len(kuzzle.requests) == 2


def test_second_request_whose_answer_would_come_too_late(silent):
    """It is not sent: its answer may be the one with the token."""
    kuzzle = silent.kuzzle
    kuzzle.next_answers.append(silent.lose)
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=None, timeout=0.7)
    assert len(kuzzle.requests) == 1


@pytest.mark.parametrize("cached", [True, False])
def test_second_request_when_the_first_has_its_answer(silent, cached):
    """Nobody waits for it any more."""
    kuzzle, threads = silent.kuzzle, set(threading.enumerate())
    gone, cache = threading.Event(), TokenCache() if cached else None

    def answer(request):
        time.sleep(1)
        return kuzzle.truly(request)

    kuzzle.next_answers += [answer, lambda request: gone.wait(60) and b""]
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache, timeout=60)
    wait_until(lambda: not any(each.name == "refresher" for each in {*threading.enumerate()} - threads))
    gone.set()
    assert kuzzle.knows(token.jwt)


def test_store_while_no_answer_comes(silent, tmp_path):
    """It is asked for news twice in a second, and has its connections back."""
    asked, ended = [], set()

    class Counting(FileStore):
        def get(self, key):
            asked.append(threading.current_thread())
            return super().get(key)

        def end_thread(self):
            ended.add(threading.current_thread())

    kuzzle = silent.kuzzle
    kuzzle.next_answers += [silent.lose, silent.lose]
    cache = TokenCache(Counting(tmp_path), lease=3)
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=cache, timeout=3)
    assert len(asked) < 40
    wait_until(lambda: {*asked} <= ended)


def test_request_to_kuzzle_whose_lock_is_lost(silent, monkeypatch):
    """It is not sent again: another process may be about to send it."""
    kuzzle = silent.kuzzle
    kuzzle.next_answers.append(
        lambda request: monkeypatch.setattr(Lease, "is_ours", lambda _: False) or silent.lose(request)
    )
    with pytest.raises(OutcomeUnknownError):
        refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=TokenCache(), timeout=2)
    assert len(kuzzle.requests) == 1


def test_second_request_that_kuzzle_has_no_time_for(silent):
    """It is left alone for as long as it asks, and sent another then."""
    kuzzle, began = silent.kuzzle, time.monotonic()
    kuzzle.next_answers += [silent.lose, Answer(503, b"", {"Retry-After": "2"})]
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=TokenCache(), timeout=20)
    assert time.monotonic() - began >= 2
    assert kuzzle.knows(token.jwt)
    assert len(kuzzle.requests) == 3


def test_second_request_that_fails_at_once(silent, monkeypatch):
    """A third is sent, and not before a while."""
    monkeypatch.setattr(_rules, "SILENCE", 1.5)
    kuzzle, sent = silent.kuzzle, []

    def fail(_request):
        sent.append(time.monotonic())
        return b""

    def answer(request):
        sent.append(time.monotonic())
        return kuzzle.truly(request)

    kuzzle.next_answers += [silent.lose, fail, answer]
    token = refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=TokenCache(), timeout=20)
    assert kuzzle.knows(token.jwt)
    failed, answered = sent
    assert answered - failed > 1.4


def test_second_request_for_callers_of_two_kinds(silent):
    """It is sent if one of them allows it, whoever came last."""
    kuzzle, cache, jwt = silent.kuzzle, TokenCache(), silent.kuzzle.login(ago=1800)
    kuzzle.next_answers.append(silent.lose)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=cache, timeout=10)
        wait_until(lambda: kuzzle.requests)
        last = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=cache, queuable=False, timeout=10)
        assert first.result() == last.result()
    assert len(kuzzle.requests) == 2


def test_news_while_an_answer_does_not_come(silent, tmp_path):
    """A token that another process has meanwhile is taken, and the answer is no longer waited for."""
    kuzzle, jwt = silent.kuzzle, silent.kuzzle.login(ago=1800)
    caches = [TokenCache(FileStore(tmp_path), runtime=Runtime()) for _ in range(2)]
    kuzzle.next_answers += [silent.lose, silent.lose]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(refresh_kuzzle_token, kuzzle.url, jwt, cache=caches[0], timeout=20)
        wait_until(lambda: len(kuzzle.requests) == 2)
        (flight,) = caches[0]._ledger.flights.values()
        credential = kuzzle_credential(kuzzle.url, jwt)
        newer = refresh_kuzzle_token(kuzzle.url, jwt, cache=None, timeout=20)
        chain = attrs.evolve(caches[1]._ledger.look(credential)[0], generation=1)
        chain = attrs.evolve(chain, newest=credential.following(newer), requested=caches[1]._ledger.now())
        caches[1]._ledger.keep(attrs.evolve(chain, lifetime=3600.0), credential, in_memory=False)
        assert waiting.result(10) == newer
    assert not flight.has_departed
    assert len(kuzzle.requests) == 3
