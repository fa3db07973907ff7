"""A store that processes share: like a Redis, like files on one machine, like Django's cache."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from .world import Process, World

KINDS = ("redis", "file", "add", "memory")


class StoreError(OSError):
    """What a client library raises when its server does not answer, or refuses."""


class SharedStore:
    """
    The entries and the locks.

    Args:
        kind: "redis": a server with a clock of its own. "file": files on one machine, which outlive a restart.
            "add": as "redis", but a lock cannot tell how long its lease is. "memory": each process has its own.
    """

    def __init__(self, world: World, kind: str) -> None:
        self.world, self.kind = world, kind
        self.entries: dict[str, tuple[str, float]] = {}
        self.locks: dict[str, tuple[str, float]] = {}
        self.trouble = ""  # "", "is down", "is read-only", "is full", "hangs"
        self.victim: Process | None = None  # who alone has that trouble. None: all
        self.trouble_since, self.trouble_until, self.well_since = 0.0, 0.0, 0.0
        self.hung_until = -math.inf
        self.released_at = -math.inf  # when a lock last was
        self.disturbed_at = -math.inf  # when it last was out of order
        self.lost: list[str] = []  # what faults did to entries
        self.lost_at = -math.inf
        self.largest = 0  # the length of the longest entry

    def troubled(self) -> str:
        """Tell what is the matter with it now."""
        if self.trouble and self.world.time >= self.trouble_until:
            self.world.say(f"    the store is well again ({self.trouble} before)")
            self.trouble, self.well_since = "", self.world.time
        return self.trouble

    def suffer(self, what: str, seconds: float, victim: Process | None = None) -> None:
        """Be out of order for a while, maybe for one process alone."""
        if not self.troubled() or victim is not self.victim:
            self.trouble_since = self.world.time
        self.victim = victim
        self.trouble, self.trouble_until = what, self.world.time + seconds
        self.disturbed_at = max(self.disturbed_at, self.trouble_until)
        if what == "hangs":
            self.hung_until = self.trouble_until

    def holds(self, secret: str) -> bool:
        """Tell whether a living entry has a secret in it."""
        return any(secret in text and expires > self.world.time for text, expires in self.entries.values())

    def chains(self, secrets: Iterable[str]) -> list[str]:
        """List the chains that have one of these secrets in them."""
        entries = [(key, text) for key, (text, _) in self.entries.items() if re.fullmatch("[0-9a-f]{64}", key)]
        return [key for key, text in entries if any(secret in text for secret in secrets)]

    def _lose(self, how: str) -> None:
        self.lost.append(how)
        self.lost_at = self.world.time

    def flush(self) -> None:
        """Lose everything."""
        self._lose("flushed")
        self.entries.clear()
        self.locks.clear()

    def evict(self) -> None:
        """Lose one entry."""
        if self.entries:
            self._lose("evicted")
            del self.entries[self.world.random.choice(list(self.entries))]

    def swap(self) -> None:
        """Mix users up: a pointer leads to another's chain, or a chain's entry is that of another."""
        chains = [key for key in self.entries if re.fullmatch("[0-9a-f]{64}", key)]
        pointers = [key for key in self.entries if key.endswith("-alias")]
        key = self.world.random.choice(pointers if pointers and self.world.random.random() < 0.7 else chains or [""])
        others = [chain for chain in chains if chain != key and key and chain not in self.entries[key][0]]
        if others:
            self._lose("swapped")
            other, (text, expires) = self.world.random.choice(others), self.entries[key]
            text = re.sub("[0-9a-f]{64}", other, text, count=1) if key in pointers else self.entries[other][0]
            self.entries[key] = (text, expires)


class StoreClient:
    """A process's view of it: a `refresher.stores.Store`."""

    def __init__(self, store: SharedStore, process: Process) -> None:
        self._store, self._process, self._world = store, process, store.world

    def _command(self, name: str, key: str, work: Callable[[], Any], *, writes: bool = True) -> Any:
        """Carry out a command, unless something is wrong."""
        world, store = self._world, self._store
        world.step(name, key)
        world.park(world.random.uniform(0.0001, 0.002))
        trouble = store.troubled() if store.victim in (None, self._process) else ""
        fault = world.faults.of_command(self._process)
        if trouble == "hangs":
            world.say(f"{name} {key[:8]} hangs")
            world.park(min(world.random.uniform(1.0, 12.0), store.trouble_until - world.time))
        works = (trouble == "is read-only" and not writes) or (trouble == "is full" and name != "set")
        if (trouble and not works) or fault == "fails":
            world.say(f"{name} {key[:8]}{key[64:]} FAILS: the store {trouble or 'failed once'}")
            raise StoreError(trouble or "timed out")
        answer = work()
        if name == "set":
            self._process.wrote_at = world.time
        if world.keep_trace:
            shown = "" if answer is None or (name == "get" and answer) else f": {answer}"
            world.say(f"{name} {key[:8]}{key[64:]}{shown}")
        if fault == "answer lost":
            world.say(f"{name} {key[:8]}{key[64:]} is done, but its answer is LOST")
            raise StoreError("timed out")
        return answer

    def get(self, key: str) -> bytes | None:
        return self._command("get", key, lambda: self._read(key), writes=False)

    def _read(self, key: str) -> bytes | None:
        text, expires = self._store.entries.get(key, ("", 0.0))
        return text.encode() if expires > self._world.time else None

    def set(self, key: str, value: str, seconds: int) -> None:
        if not seconds > 0:
            raise AssertionError(f"an entry for {seconds} s")
        self._command("set", key, lambda: self._write(key, value, seconds))

    def _write(self, key: str, value: str, seconds: int) -> None:
        store, world = self._store, self._world
        store.entries[key] = (value, world.time + seconds)
        store.largest = max(store.largest, len(value))
        for session in world.sessions:
            if not session.kept and session.newest_secret in value:
                session.kept, session.kept_at = True, world.time

    def delete(self, key: str) -> None:
        self._command("delete", key, lambda: self._store.entries.pop(key, None) and None)

    def acquire(self, key: str, owner: str, lease: float) -> float:
        def take() -> float:
            holder, until = self._store.locks.get(key, (owner, 0.0))
            left = until - self._world.time
            if left > 0 and holder != owner:
                return lease if self._store.kind == "add" else left
            self._store.locks[key] = (owner, self._world.time + lease)
            return 0.0

        return self._command("acquire", key, take)

    def _mine(self, key: str, owner: str) -> bool:
        holder, until = self._store.locks.get(key, ("", 0.0))
        return holder == owner and until > self._world.time

    def renew(self, key: str, owner: str, lease: float) -> bool:
        def prolong() -> bool:
            if mine := self._mine(key, owner):
                self._store.locks[key] = (owner, self._world.time + lease)
            return mine

        return self._command("renew", key, prolong)

    def release(self, key: str, owner: str) -> None:
        def let_go() -> None:
            if self._mine(key, owner):
                del self._store.locks[key]
                self._store.released_at = self._world.time

        self._command("release", key, let_go)
