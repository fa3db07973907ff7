"""
Where the cache keeps its entries: in the process, in files, in Redis or Valkey, in Django's cache.

An entry is a text under a key, and lives for some seconds. Keys are hashes; the texts hold tokens, so
whoever can read the store can use them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from cachetools import TLRUCache

from .errors import InvalidArgumentError

if TYPE_CHECKING:
    import redis

_LARGEST_FILE = 1024 * 1024
# How long a file that is written aside may be there before it counts as left by a crash, in seconds.
_ABANDONED = 3600.0
# The names of files that expire. No other file is ours to remove.
_OURS = re.compile(r"refresher-[\w-]+\.(entry|[0-9a-f]{16}\.(?P<aside>tmp))", re.ASCII)

# Guards what the threads of this process share. It is held to look at a dictionary, never during I/O.
mutex = threading.Lock()
_locks: WeakValueDictionary[tuple[int, str], threading.Lock] = WeakValueDictionary()


def _after_fork_in_child() -> None:
    # The threads that held these do not exist here.
    _locks.clear()
    mutex.release()


# No child is forked while a thread is in the middle of a change.
os.register_at_fork(before=mutex.acquire, after_in_parent=mutex.release, after_in_child=_after_fork_in_child)


def _drawn() -> str:
    """Draw a name that nobody else has."""
    return os.urandom(8).hex()


class Store(Protocol):
    """
    What `TokenCache` needs of a place for its entries. Any method may raise what it likes when the place
    is out of reach: the cache goes on in the memory of the process.
    """

    def get(self, key: str, /) -> str | bytes | None:
        """Read an entry. None: there is none, or it has expired."""

    def set(self, key: str, value: str, seconds: int, /) -> object:
        """Write an entry that lives for *seconds*."""

    def delete(self, key: str, /) -> object:
        """Remove an entry, if it is there."""

    def lock(self, key: str, lease: float, wait: float, /) -> AbstractContextManager[bool]:
        """
        Hold a lock that all users of the store share.

        Args:
            key: What is locked.
            lease: Seconds after which others may take it from a holder that has died.
            wait: Seconds to wait for it.

        Returns:
            A context manager that yields whether the lock was obtained.
        """


class MemoryStore:
    """
    Entries in the memory of this process. They are gone when it ends, and no other process sees them.

    Args:
        maxsize: How many entries there may be. Beyond, those go that have not been used for longest.
        timer: What time is told by, in seconds.

    Example:
        >>> store = MemoryStore()
        >>> store.set("key", "value", 60)
        >>> store.get("key")
        'value'
    """

    def __init__(self, maxsize: int = 65536, timer: Callable[[], float] = time.monotonic) -> None:
        self._entries: TLRUCache[str, tuple[str, int]] = TLRUCache(
            maxsize, lambda _, entry, now: now + entry[1], timer
        )
        self._arguments = maxsize, timer

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self._arguments  # a copy is another store, with nothing in it yet

    def get(self, key: str, /) -> str | None:
        """Read an entry."""
        with mutex:
            try:
                return self._entries[key][0]
            except KeyError:
                return None

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry."""
        with mutex:
            self._entries[key] = (value, seconds)

    def delete(self, key: str, /) -> None:
        """Remove an entry."""
        with mutex:
            self._entries.pop(key, None)

    def keys(self) -> list[str]:
        """List the keys of all living entries."""
        with mutex:
            return list(self._entries)

    @contextlib.contextmanager
    def lock(self, key: str, lease: float, wait: float, /) -> Iterator[bool]:  # noqa: ARG002
        """Hold a lock among the threads of this process. Its holder cannot die, so the lease never ends."""
        with mutex:
            lock = _locks.setdefault((id(self), key), threading.Lock())
        got = lock.acquire(timeout=min(wait, threading.TIMEOUT_MAX))
        try:
            yield got
        finally:
            if got:
                lock.release()


class FileStore:
    """
    Entries in files of one folder, for programs on one machine: what one run has refreshed, the next finds.

    Everything is in a subfolder, ``refresher``, which is made with mode 0700; files have mode 0600 from their
    first byte. A file is written aside, synced and renamed, so that a crash leaves the old entry or the new
    one. Expired entries are removed on the next write. Files that a FileStore did not name are never touched.
    Needs ``refresher[file]``.

    Args:
        path: The folder. ``~`` is the home of the user.

    Raises:
        InvalidArgumentError: *path* is empty.
        ModuleNotFoundError: ``filelock`` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Found out now, not when a token has to be saved. It takes a while to import.
        if importlib.util.find_spec("filelock") is None:
            raise ModuleNotFoundError("FileStore needs filelock: pip install 'refresher[file]'")
        if not os.fspath(path):
            raise InvalidArgumentError("path must not be empty")
        self._given = Path(path)

    @functools.cached_property
    def _path(self) -> Path:
        return self._given.expanduser() / "refresher"

    def _file(self, key: str) -> Path:
        return self._path / f"refresher-{key}.entry"

    def _folder(self) -> Path:
        folder = self._path
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)  # whatever the umask
        return folder

    def get(self, key: str, /) -> bytes | None:
        """Read an entry."""
        try:
            handle = os.open(self._file(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(handle)
            # A file's time is when it expires: what is in it is the entry and nothing else.
            return (
                os.read(handle, min(status.st_size, _LARGEST_FILE)) if status.st_mtime > time.time() else None
            )
        finally:
            os.close(handle)

    def check(self) -> None:
        """
        Make sure that entries can be read and written.

        Raises:
            OSError: They can't.
        """
        folder = self._folder()
        for entry in folder.iterdir():
            # One that is gone by now was swept away, or renamed.
            if (
                _OURS.fullmatch(entry.name)
                and not os.access(entry, os.R_OK | os.W_OK)
                and os.path.lexists(entry)
            ):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._path))
        probe = folder / f"refresher-probe.{_drawn()}.tmp"
        try:
            probe.write_bytes(bytes(65536))
        finally:
            probe.unlink(missing_ok=True)

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry."""
        folder = self._folder()
        aside = folder / f"refresher-{key}.{_drawn()}.tmp"
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o600)
                file.write(value.encode())
                file.flush()
                expires = time.time() + seconds
                os.utime(handle, (expires, expires))
                os.fsync(handle)
            aside.replace(self._file(key))
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        self._sync(folder)
        self._sweep(folder)

    def delete(self, key: str, /) -> None:
        """Remove an entry."""
        self._file(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, key: str, lease: float, wait: float, /) -> Iterator[bool]:  # noqa: ARG002
        """Hold a lock among the processes of this machine. The system frees it when its holder dies."""
        import filelock

        # A lock file cannot be removed safely. So there are 4096 of a kind at most, and keys rarely share one.
        lock = filelock.FileLock(self._folder() / f"refresher-{key[:-61]}.lock", mode=0o600, thread_local=False)
        try:
            lock.acquire(timeout=wait)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @staticmethod
    def _sync(folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @staticmethod
    def _sweep(folder: Path) -> None:
        """Remove what has expired, and what a crash has left half written."""
        now = time.time()
        for entry in os.scandir(folder):
            if not (named := _OURS.fullmatch(entry.name)):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                status = entry.stat(follow_symlinks=False)
                patience = _ABANDONED if named["aside"] else 0
                if stat.S_ISREG(status.st_mode) and status.st_mtime + patience < now:
                    Path(entry).unlink()


class RedisStore:
    """
    Entries in a Redis or Valkey, for many machines. Needs ``refresher[redis]``.

    Args:
        client: A client of redis-py or valkey-py, a cluster's too, with ``decode_responses`` or without. It's
            yours: timeouts, password and TLS are set on it. Give it a ``socket_timeout``, or a Redis
            that hangs will hang its callers.
        prefix: What all keys begin with.
    """

    def __init__(self, client: redis.Redis, prefix: str = "refresher:1:") -> None:
        self._client: Any = client
        self._prefix = prefix

    def get(self, key: str, /) -> str | bytes | None:
        """Read an entry."""
        value: str | bytes | None = self._client.get(self._prefix + key)
        return value

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry, which the server removes in time."""
        self._client.set(self._prefix + key, value, ex=seconds)

    def delete(self, key: str, /) -> None:
        """Remove an entry."""
        self._client.delete(self._prefix + key)

    @contextlib.contextmanager
    def lock(self, key: str, lease: float, wait: float, /) -> Iterator[bool]:
        """Hold a lock among all clients of the server."""
        lock = self._client.lock(
            f"{self._prefix}{key}:lock", timeout=lease, blocking_timeout=wait, sleep=0.02, thread_local=False
        )
        got = bool(lock.acquire())
        try:
            yield got
        finally:
            # When the lease has ended, the lock is another's.
            if got and lock.owned():
                lock.release()


class DjangoStore:
    """
    Entries in one of Django's caches, whatever its backend. Needs ``refresher[django]``.

    Args:
        alias: Which of ``settings.CACHES``.
        single_process: Whether one process is all there is. Then a cache that other processes don't see will
            do as well.

    Raises:
        django.core.exceptions.ImproperlyConfigured: The cache is a ``LocMemCache`` or a ``DummyCache``, which
            other processes do not see, and *single_process* is not set.
    """

    def __init__(self, alias: str = "default", *, single_process: bool = False) -> None:
        from django.core.cache.backends.dummy import DummyCache
        from django.core.cache.backends.locmem import LocMemCache
        from django.core.exceptions import ImproperlyConfigured

        self._alias = alias
        if isinstance(self._cache, (DummyCache, LocMemCache)) and not single_process:
            raise ImproperlyConfigured(
                f"settings.CACHES[{alias!r}] is a {type(self._cache).__name__}, unseen by other processes: "
                "two of them could spend one token. Use a cache they share (Redis, Memcached, a database), or "
                "DjangoStore(single_process=True) if there is one process only."
            )

    @property
    def _cache(self) -> Any:
        from django.core.cache import caches

        return caches[self._alias]

    def get(self, key: str, /) -> str | None:
        """Read an entry."""
        value = self._cache.get(f"refresher:1:{key}")
        return value if isinstance(value, str) else None

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry."""
        self._cache.set(f"refresher:1:{key}", value, seconds)

    def delete(self, key: str, /) -> None:
        """Remove an entry."""
        self._cache.delete(f"refresher:1:{key}")

    @contextlib.contextmanager
    def lock(self, key: str, lease: float, wait: float, /) -> Iterator[bool]:
        """Hold a lock among all processes that share the cache."""
        name, mine = f"refresher:1:{key}:lock", _drawn()
        deadline = time.monotonic() + wait
        while not (got := self._cache.add(name, mine, math.ceil(lease))) and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            yield bool(got)
        finally:
            # When the lease has ended, the lock is another's.
            if got and self._cache.get(name) == mine:
                self._cache.delete(name)

    @staticmethod
    def close() -> None:
        """Give back what this thread holds of caches and databases."""
        from django.core.cache import close_caches
        from django.db import connections

        close_caches()
        connections.close_all()
