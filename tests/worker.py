"""A process of a fleet: reads a task from standard input, refreshes with many threads, writes what each got."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import refresher._rules
from refresher import DjangoStore, FileStore, RedisStore, RefreshError, TokenCache, refresh_kuzzle_token

refresher._rules.BIRTH_SECOND = 0.0  # see clocks_agree in conftest.py


def make_store(kind, where):
    """Make the store of a task."""
    if kind == "file":
        return FileStore(where)
    if kind == "redis":
        import redis

        return RedisStore(redis.Redis.from_url(where, socket_timeout=2))
    import django
    from django.conf import settings

    cache = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": where}
    settings.configure(CACHES={"default": cache})
    django.setup()
    return DjangoStore()


def main():
    task = json.loads(sys.stdin.readline())
    cache = TokenCache(make_store(task["kind"], task["where"]), lease=task.get("lease", 60.0))
    threads = task["threads"]
    barrier = threading.Barrier(threads)

    def one(_):
        barrier.wait()
        try:
            return refresh_kuzzle_token(task["url"], task["jwt"], cache=cache, timeout=task["timeout"]).jwt
        except RefreshError as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(threads) as pool:
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(list(pool.map(one, range(threads)))), flush=True)


if __name__ == "__main__":
    main()
