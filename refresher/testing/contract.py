"""What a `Store` has to do, as a test class for your own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..stores import Store, check_store

# How long the processes of a test wait for each other at most, in seconds.
_PATIENCE = 60.0
# A longer text would not fit into Memcached.
_LONG = 200_000
# How long the entry of a token without an expiry lasts, in seconds: ten years and a day.
_LONGEST = 3651 * 86_400
_TEXTS = {
    "empty": "",
    "lines": "first\nsecond\r\n\n",
    "quotes": "\"'`$(){}[]\\%s%n",
    "controls": "\x00\x01\x1b[31m\x7f",
    "Unicode": "wälue \u2028 \N{KEY} \ufeff",
    "a number": "5",
    "long": "0123456789abcdef" * (_LONG // 16),
}


class StoreContract:
    """
    The tests of a store. With pytest, a subclass that says how to make a store runs them all.

    The tests use new keys each time, so the place need not be empty. Most of their time is waiting for leases.
    Where the system can fork, other processes are forks of this one. Elsewhere they import the class.

    Attributes:
        one_process: Whether the store is for one process only, as `MemoryStore` is. Then threads stand in for
            processes.
        tardiness: By how many seconds the store may be late to let an entry or a lease end.

    Example:
        >>> class TestMyStore(StoreContract):
        ...     def make(self):
        ...         return MyStore("redis.example")
    """

    one_process = False
    tardiness: float = 3.0

    def make(self) -> Store:
        """
        Make a store. It's called several times in a test, also in other processes.

        All that it makes have the same entries and locks. With *one_process* it's one and the same store.
        """
        raise NotImplementedError("StoreContract needs a method make() that returns a store")

    def make_unreachable(self) -> Store | None:
        """Make a store whose place is out of reach. None skips the test that needs one."""
        return None

    # Entries

    def test_is_a_store(self) -> None:
        """The store has all methods."""
        with self._store() as store:
            check_store(store)

    def test_entry(self) -> None:
        """An entry is there until it's deleted, and can be replaced."""
        with self._store() as store:
            key = _key()
            _expect(store.get(key) is None, "get() returned an entry that nobody wrote")
            store.delete(key)
            for value in ("first", "second"):
                store.set(key, value, 60)
                _expect(_text(store.get(key)) == value, "get() returned something else than what set() wrote")
            store.delete(key)
            _expect(store.get(key) is None, "get() returned a deleted entry")

    def test_keys(self) -> None:
        """Keys that are alike are different keys, and a lock is no entry."""
        with self._store() as store:
            key = _key()
            keys = [key, f"{key}-alias", f"{key}-attempt", f"{key}-lock", f"{key[:-1]}-"]
            _expect(store.acquire(key, "owner", 60) == 0.0, "a lock that nobody has could not be taken")
            for name in keys:
                _expect(store.get(name) is None, "get() returned an entry that nobody wrote")
                store.set(name, name, 60)
            _expect([_text(store.get(name)) for name in keys] == keys, "two keys share an entry")
            store.delete(key)
            _expect(store.get(key) is None, "get() returned a deleted entry")
            _expect(_text(store.get(keys[1])) == keys[1], "delete() removed another entry, too")
            _expect(store.acquire(key, "other", 60) > 0, "delete() removed a lock")
            store.release(key, "owner")

    def test_texts(self) -> None:
        """Any text comes back as it was."""
        with self._store() as store:
            for name, value in _TEXTS.items():
                key = _key()
                store.set(key, value, 60)
                _expect(_text(store.get(key)) == value, f"this text came back changed: {name}")
                store.delete(key)

    def test_expiry(self) -> None:
        """An entry expires, in time. Writing it again makes it last."""
        with self._store() as store:
            short, long, again, longest = _key(), _key(), _key(), _key()
            for key, seconds in ((short, 2), (long, 60), (again, 2), (again, 60), (longest, _LONGEST)):
                store.set(key, "value", seconds)
            _expect(_text(store.get(short)) == "value", "an entry expired at once")
            _wait(lambda: store.get(short) is None, 2 + self.tardiness, "an entry did not expire")
            _expect(_text(store.get(long)) == "value", "an entry expired early")
            _expect(_text(store.get(again)) == "value", "an entry that was written again expired early")
            _expect(_text(store.get(longest)) == "value", "an entry that lasts for years expired early")
            store.delete(longest)

    def test_threads(self) -> None:
        """Several threads may use the store at once."""
        with self._store() as store:
            results = _in_threads(8, lambda number: self._use(store, number))
            _expect(results == [True] * 8, "threads that use the store at once disturb each other")

    def _use(self, store: Store, number: int) -> bool:
        keys = [_key() for _ in range(20)]
        for key in keys:
            store.set(key, f"{key}-{number}", 60)
        found = [_text(store.get(key)) == f"{key}-{number}" for key in keys]
        for key in keys:
            store.delete(key)
        _close(store)
        return all(found)

    def test_other_process(self) -> None:
        """What one process writes, replaces or deletes, another one sees."""
        keys = [_key() for _ in range(3)]
        with self._store() as store:
            for key in keys[1:]:
                store.set(key, "mine", 60)
        self._run(1, self._write, keys)
        with self._store() as store:
            got = [_text(store.get(key)) for key in keys]
            _expect(got == ["theirs", "theirs", None], "a process does not see what another one wrote")

    def _write(self, store: Store, keys: list[str], _meet: Callable[[], object]) -> None:
        for key in keys[:2]:
            store.set(key, "theirs", 60)
        store.delete(keys[2])

    def test_whole(self) -> None:
        """While an entry is replaced, others see the old one or the new one."""
        keys = [_key() for _ in range(3)]
        seen = self._run(3, self._replace, keys)
        _expect(all(seen), "get() returned a part of an entry, or none, while another process replaced it")

    def _replace(self, store: Store, keys: list[str], meet: Callable[[], object]) -> bool:
        """Replace an entry that is this process's own many times, and read those of all. Says if they were whole."""
        mine, whole = next(key for key in keys if store.acquire(key, _key(), 60) == 0.0), []
        for number in range(30):
            store.set(mine, f"{number:08}" * (_LONG // 8), 60)
            if number == 0:
                meet()
            found = [_text(store.get(key)) or "" for key in keys]
            whole += [text == text[:8] * (_LONG // 8) for text in found]
        return all(whole)

    # Locks

    def test_lock(self) -> None:
        """A lock has one owner. It is renewed and released by that one only."""
        with self._store() as store:
            key, other = _key(), _key()
            _expect(store.acquire(key, "first", 60) == 0.0, "a lock that nobody has could not be taken")
            _expect(store.acquire(other, "second", 60) == 0.0, "the lock of one key locks another key")
            _expect(store.acquire(key, "second", 60) > 0.0, "a lock was taken that another owner has")
            _expect(store.acquire(key, "first", 60) == 0.0, "an owner could not take its own lock again")
            _expect(not store.renew(key, "second", 60), "a lock was renewed by someone who does not have it")
            store.release(key, "second")
            _expect(store.acquire(key, "second", 60) > 0.0, "a lock was released by someone else")
            _expect(bool(store.renew(key, "first", 60)), "an owner could not renew its lock")
            store.release(key, "first")
            _expect(not store.renew(key, "first", 60), "a lock was renewed after it was released")
            _expect(store.acquire(key, "second", 60) == 0.0, "a released lock could not be taken")
            store.release(key, "second")
            store.release(other, "second")
            store.release(_key(), "second")

    def test_lease(self) -> None:
        """A lock is held for its lease, and free soon after. Its former owner has no say then."""
        with self._store() as store:
            key, began = _key(), time.monotonic()
            _expect(store.acquire(key, "first", 1.5) == 0.0, "a lock that nobody has could not be taken")
            _wait(lambda: store.acquire(key, "second", 60) == 0.0, 1.5 + self.tardiness, "a lease did not end")
            _expect(time.monotonic() - began > 1.45, "a lease ended early")
            _expect(not store.renew(key, "first", 60), "a lock was renewed after another owner had taken it")
            store.release(key, "first")
            _expect(store.acquire(key, "first", 60) > 0.0, "a lock was released by a former owner")
            store.release(key, "second")

    def test_renewal(self) -> None:
        """A lock that is renewed is held on."""
        with self._store() as store:
            key = _key()
            store.acquire(key, "first", 1.5)
            for _ in range(8):
                time.sleep(0.5)
                _expect(bool(store.renew(key, "first", 1.5)), "an owner could not renew its lock")
                _expect(store.acquire(key, "second", 1.5) > 0.0, "a lock was taken that its owner renews")
            store.release(key, "first")

    def test_taken_again(self) -> None:
        """A lock that its owner takes again is held for the new lease."""
        with self._store() as store:
            key = _key()
            for lease in (1, 60):
                _expect(store.acquire(key, "first", lease) == 0.0, "an owner could not take its own lock again")
            time.sleep(1 + self.tardiness)
            _expect(store.acquire(key, "second", 60) > 0.0, "a lease did not start again")
            store.release(key, "first")

    def test_remaining(self) -> None:
        """Who does not get a lock learns for how long it may be held at most."""
        with self._store() as store:
            key = _key()
            store.acquire(key, "first", 5)
            began = time.monotonic()
            remaining = store.acquire(key, "second", 5)
            _expect(5 - (time.monotonic() - began) - 0.5 <= remaining <= 5 + self.tardiness, "acquire() is wrong")
            store.release(key, "first")

    def test_one_winner(self) -> None:
        """Of several processes that want a lock at the same moment, one gets it."""
        self._race([_key() for _ in range(60)])

    def test_one_heir(self) -> None:
        """Of several processes that find a lease ended at the same moment, one gets the lock."""
        keys = [_key() for _ in range(20)]
        with self._store() as store:
            for key in keys:
                store.acquire(key, "former", 0.1)
        time.sleep(0.1 + self.tardiness)
        self._race(keys)

    def _race(self, keys: list[str]) -> None:
        results = self._run(4, self._win, keys)
        for won in zip(*results, strict=True):
            _expect(sum(won) == 1, f"{sum(won)} processes got a lock at the same moment")

    def _win(self, store: Store, keys: list[str], meet: Callable[[], object]) -> list[bool]:
        owner, won = _key(), []
        for key in keys:
            meet()
            won.append(store.acquire(key, owner, 60) == 0.0)
        meet()
        for key in keys:
            store.release(key, owner)
        return won

    def test_death(self) -> None:
        """A lock whose owner was killed is free when its lease ends."""
        key = _key()
        self._run(1, self._take_and_wait, [key], kill=True)
        with self._store() as store:
            _expect(store.acquire(key, "heir", 60) > 0.0, "a lock was free before its lease ended")
            _wait(lambda: store.acquire(key, "heir", 60) == 0.0, 2 + self.tardiness, "a lock outlived its lease")
            store.release(key, "heir")

    def _take_and_wait(self, store: Store, keys: list[str], _meet: Callable[[], object]) -> bool:
        return store.acquire(keys[0], "killed", 2) == 0.0

    # Errors

    def test_unreachable(self) -> None:
        """If the place is out of reach, every method says so."""
        store = self.make_unreachable()
        if store is None:
            import pytest

            pytest.skip("make_unreachable() returns None")
        key = _key()
        actions: dict[str, Callable[[], object]] = {
            "get": lambda: store.get(key),
            "set": lambda: store.set(key, "value", 60),
            "delete": lambda: store.delete(key),
            "acquire": lambda: store.acquire(key, "owner", 60),
            "renew": lambda: store.renew(key, "owner", 60),
            "release": lambda: store.release(key, "owner"),
        }
        for name, action in actions.items():
            try:
                action()
            except Exception:  # noqa: S112 - whatever the store likes
                continue
            raise AssertionError(f"{name}() raised nothing, though the place is out of reach")

    # Processes

    @contextlib.contextmanager
    def _store(self) -> Iterator[Store]:
        store = self.make()
        try:
            yield store
        finally:
            _close(store)

    def _run(self, count: int, work: Callable[..., Any], keys: list[str], *, kill: bool = False) -> list[Any]:
        """Let processes work at the same time, and return what each came to."""
        if self.one_process:
            with self._store() as store:
                meet = threading.Barrier(count, timeout=_PATIENCE).wait
                return _in_threads(count, lambda _: work(store, keys, meet))
        fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        barrier, answers = context.Barrier(count, timeout=_PATIENCE), context.SimpleQueue()
        workers = [context.Process(target=self._work, args=(work, keys, barrier, answers, kill)) for _ in range(count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that threads do not exist in a fork
            for worker in workers:
                worker.start()
        results = [answers.get() for _ in workers]
        for worker in workers:
            if kill:
                worker.kill()
            worker.join()
        for _, error in results:
            _expect(not error, f"a process failed:\n{error}")
        return [result for result, _ in results]

    def _work(self, work: Callable[..., Any], keys: list[str], barrier: Any, answers: Any, kill: bool) -> None:
        try:
            with self._store() as store:
                answers.put((work(store, keys, barrier.wait), ""))
                time.sleep(_PATIENCE if kill else 0.0)  # and is killed meanwhile
        except BaseException:
            barrier.abort()
            answers.put((None, traceback.format_exc()))


def _key() -> str:
    return os.urandom(32).hex()


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _close(store: Store) -> None:
    # What is open can't be used on both sides of a fork.
    getattr(store, "end_thread", lambda: None)()


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise AssertionError(otherwise)


def _wait(until: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        _expect(time.monotonic() < deadline, otherwise)
        time.sleep(0.02)


def _in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))
