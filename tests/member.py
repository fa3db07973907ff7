"""A process of several that use one store: what a test tells it to do, and what runs in it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path


class Member:
    """A test's end of such a process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.next()  # it is ready

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def tell(self, **command):
        """Give it a command: call, use, release, limit, become."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def next(self, timeout=60):
        """Return the next thing that it says."""
        return self._lines.get(timeout=timeout)

    def call(self, **calls):
        """Let it call, all at once. Returns what each call got, by its name."""
        self.tell(call=calls)
        return self.got(len(calls))

    def got(self, count):
        """Return what the next calls got that end, by their names."""
        return dict(self.next() for _ in range(count))

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdin.close()
        self.process.stdout.close()


class Stuck:
    """
    A store in which a process gets stuck at some point of a refresh, until that is over.

    The points: it is ``"locked"``, what is about to be spent is ``"announced"``, the service has ``"answered"``.
    """

    def __init__(self, store, point, over):
        self.store, self.point, self.over = store, point, over
        self.get, self.delete, self.renew, self.release = store.get, store.delete, store.renew, store.release

    def _reach(self, point):
        if point == self.point and not self.over.is_set():
            say("stuck", point)
            self.over.wait()

    def set(self, key, value, seconds):
        is_attempt = key.endswith("-attempt")
        if not is_attempt:
            self._reach("answered")
        self.store.set(key, value, seconds)
        if is_attempt and json.loads(value)["is_open"]:
            self._reach("announced")

    def acquire(self, key, owner, lease):
        held = self.store.acquire(key, owner, lease)
        if not held:
            self._reach("locked")
        return held


def say(*what):
    print(json.dumps(what) + "\n", end="", flush=True)  # in one piece: several threads do


def make_store(kind, where):
    from refresher import FileStore, RedisStore

    if kind == "file":
        return FileStore(where)
    import redis

    return RedisStore(redis.Redis.from_url(where, socket_timeout=2))


class Caller:
    """Makes calls, with one cache for each store that it is told of."""

    def __init__(self):
        self.over = threading.Event()
        self.caches = {}

    def cache(self, kind, where, point=None, **options):
        from refresher import TokenCache

        key = kind, where, point, *options.items()
        if key not in self.caches:
            store = make_store(kind, where)
            self.caches[key] = TokenCache(Stuck(store, point, self.over) if point else store, **options)
        return self.caches[key]

    def call(self, url, jwt, store, alive_at=None, **arguments):
        """Call, and see whether the token is alive. *alive_at*: where to ask, if not where it is refreshed."""
        import requests

        from refresher import RefreshError, refresh_kuzzle_token

        began = time.monotonic()
        found = {"error": None, "jwt": None, "spent": None, "says": ""}
        try:
            found["jwt"] = refresh_kuzzle_token(url, jwt, cache=self.cache(**store), **arguments).jwt
        except RefreshError as error:
            found |= {"error": type(error).__name__, "spent": error.spent, "says": str(error)}
        found["took"] = time.monotonic() - began
        if found["jwt"] is not None:
            headers = {"Authorization": f"Bearer {found['jwt']}"}
            found["alive"] = requests.get(f"{alive_at or url}/_me", headers=headers, timeout=30).status_code == 200
        return found

    def use(self, seconds, every=0.1, **call):
        """Call again and again."""
        end, found = time.monotonic() + seconds, []
        while time.monotonic() < end:
            found.append(self.call(**call))
            time.sleep(every)
        return found

    @staticmethod
    def ask(method, name, call):
        say(name, method(**call))

    def do(self, command, told):
        import resource
        import signal

        if command in ("call", "use"):
            for name, call in told.items():
                threading.Thread(target=self.ask, args=(getattr(self, command), name, call)).start()
        elif command == "release":
            self.over.set()
        elif command == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard if told is None else told, hard))
        elif command == "become":
            os.setresuid(told, told, told)
        if command in ("limit", "become"):
            say(command)


def main():
    import refresher._http  # noqa: F401  # before it may not read any more

    caller = Caller()
    say("ready")
    for line in sys.stdin:
        for command, told in json.loads(line).items():
            caller.do(command, told)


if __name__ == "__main__":
    main()
