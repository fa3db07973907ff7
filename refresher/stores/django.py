"""Entries in Django's cache."""

from __future__ import annotations

import base64
import math
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from django.core import checks
from django.core.cache import caches
from django.core.cache.backends.db import BaseDatabaseCache
from django.core.cache.backends.dummy import DummyCache
from django.core.cache.backends.filebased import FileBasedCache
from django.core.cache.backends.locmem import LocMemCache
from django.core.cache.backends.memcached import BaseMemcachedCache, PyMemcacheCache
from django.core.cache.backends.redis import RedisCache
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import request_finished
from django.db import IntegrityError, connections, router, transaction
from django.utils import timezone

from ..errors import InvalidArgumentError
from . import Store
from .redis import LONGEST_LEASE, RedisStore

_PREFIX = "refresher:2:"
# The last second that Memcached can count.
_LAST = 2**31 - 1
# Of Memcached. A column for keys has five characters more.
_LONGEST_KEY = 250
# A cache that drops entries by their number has to have room for all sessions.
_LEAST_MAX_ENTRIES = 100_000
_UPDATE = "UPDATE {table} SET {value} = %s, {expires} = %s WHERE {cache_key} = %s"
_INSERT = "INSERT INTO {table} ({value}, {expires}, {cache_key}) VALUES (%s, %s, %s)"
_SWEEP = "DELETE FROM {table} WHERE {expires} < %s"
# What a transaction of the site has locked, by looking at it, would be waited for until that ends.
_SWEEP_UNLOCKED = (
    "DELETE FROM {table} WHERE {cache_key} IN "
    "(SELECT {cache_key} FROM {table} WHERE {expires} < %s FOR UPDATE SKIP LOCKED)"
)
# In seconds. Without them, a process would not end while its cache hangs.
_PATIENT_MEMCACHE = {"timeout": 5.0, "connect_timeout": 5.0}
# Without replies, anybody could take a lock. For a second after an error, or with ignore_exc, all entries would seem to
# be gone.
_PLAIN_MEMCACHE = {"default_noreply": False, "ignore_exc": False, "retry_attempts": 0, "dead_timeout": 0}
# Which caches the site uses, and whether by one process: what `manage.py check` looks at.
_used: dict[tuple[str, bool], None] = {}
# Each thread's caches, by process and alias, and the settings that they were made by.
_mine = threading.local()


def _problems(alias: str, single_process: bool) -> Iterator[tuple[str, str, str]]:
    """Find what is wrong with the settings of a cache: ids, messages, and what to do."""
    cache: Any = caches[alias]
    setting = f"settings.CACHES[{alias!r}]"
    shared = "Use a cache that all processes share: Redis, Memcached or a database"
    if isinstance(cache, DummyCache):
        yield "E001", f"{setting} is a DummyCache, which keeps nothing.", f"{shared}."
    if isinstance(cache, FileBasedCache):
        message = f"{setting} is a FileBasedCache: two processes could take one lock, and spend one token."
        yield "E002", message, f"{shared}, or refresher.FileStore on a single machine."
    if isinstance(cache, LocMemCache) and not single_process:
        message = f"{setting} is a LocMemCache, unseen by other processes: two of them could spend one token."
        yield "E003", message, f"{shared}, or DjangoStore(single_process=True) if there is one process only."
    for name in _dropping(alias, cache):
        culprit = setting if name == alias else f"settings.CACHES[{name!r}], in the same place as {setting},"
        message = f"{culprit} keeps {caches[name]._max_entries} entries, and drops valid sessions beyond that."
        yield "E004", message, f"Set its OPTIONS: {{'MAX_ENTRIES': {_LEAST_MAX_ENTRIES}}} or more."
    if isinstance(cache, BaseDatabaseCache | BaseMemcachedCache):
        key = cache.make_key(f"{_PREFIX}{64 * '0'}-attempt")
        if len(key) > _LONGEST_KEY or not key.isprintable() or " " in key:
            yield "E007", f"{setting} makes keys that it cannot store.", "Give it a short KEY_PREFIX without spaces."
    if isinstance(cache, RedisCache):
        try:
            cache._cache.get_client(write=True)  # which does not connect
        except Exception as error:  # redis-py may raise whatever it likes
            yield "E007", f"{setting} cannot be used ({type(error).__name__}).", "See its LOCATION and OPTIONS."
    if isinstance(cache, BaseDatabaseCache):
        connection = connections[_database(cache)]
        if not connection.settings_dict["AUTOCOMMIT"]:
            yield "E006", f"{setting} keeps nothing: its database has AUTOCOMMIT off.", "Give it one that has it on."
        if connection.vendor == "sqlite" and connection.settings_dict["ATOMIC_REQUESTS"]:
            message = f"{setting} is in an SQLite database, which each request locks (ATOMIC_REQUESTS)."
            yield "E005", message, "Give the cache a database of its own, or use Redis or Memcached."


def _dropping(alias: str, cache: Any) -> Iterator[str]:
    """Find the aliases that drop entries of a cache too early: each of those that share it has a limit of its own."""
    place = caches.settings[alias].get("LOCATION", "")
    for kind in (BaseDatabaseCache, LocMemCache):
        for name, options in caches.settings.items() if isinstance(cache, kind) else ():
            shares = options.get("LOCATION", "") == place and isinstance(caches[name], kind)
            if shares and caches[name]._max_entries < _LEAST_MAX_ENTRIES:
                yield name


def _check(**_: object) -> list[checks.CheckMessage]:
    return [
        checks.Error(message, hint=hint, obj="refresher.DjangoStore", id=f"refresher.{number}")
        for use in _used
        if use[0] in caches.settings
        for number, message, hint in _problems(*use)
    ]


checks.register(_check, checks.Tags.caches)


def _database(cache: Any) -> str:
    return str(router.db_for_write(cache.cache_model_class))


class _CacheStore:
    """Entries and locks by what every cache of Django's can do."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def get(self, key: str, /) -> str | None:
        value = self._cache.get(_PREFIX + key)
        return value if isinstance(value, str) else None

    def set(self, key: str, value: str, seconds: int, /) -> None:
        before = self._cache.get(_PREFIX + key)
        self._cache.set(_PREFIX + key, value, min(seconds, _LAST - int(time.time())))
        # Some caches say nothing when they can't. What is new there was written by another process since.
        if (there := self._cache.get(_PREFIX + key)) != value and there in (None, before):
            raise ConnectionError("the cache did not keep an entry")

    def delete(self, key: str, /) -> None:
        self._cache.delete(_PREFIX + key)

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        name, seconds = f"{_PREFIX}{key}:lock", _whole(lease)
        for _ in range(2):
            if self._cache.add(name, owner, seconds):
                return 0.0
            holder = self._cache.get(name)
            if holder == owner and self._replace(name, owner, seconds):
                return 0.0
            if holder is not None:
                return float(seconds)
            # It was released just now, or the cache is down and says nothing.
        raise ConnectionError("the cache neither gives a lock nor says who holds it")

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        return self._replace(f"{_PREFIX}{key}:lock", owner, _whole(lease))

    def release(self, key: str, owner: str, /) -> None:
        self._replace(f"{_PREFIX}{key}:lock", owner, 0)

    def _replace(self, name: str, owner: str, seconds: int) -> bool:
        """Let a lock last for *seconds* from now, if it's the owner's."""
        return self._cache.get(name) == owner and bool(self._cache.touch(name, seconds))


class _MemcacheStore(_CacheStore):
    """What Memcached can do in one step by pymemcache."""

    def _replace(self, name: str, owner: str, seconds: int) -> bool:
        client, name = self._cache._cache, self._cache.make_and_validate_key(name)
        holder, version = client.gets(name) or (None, None)
        return holder == owner and bool(client.cas(name, owner, version, seconds or -1))


class _DatabaseStore:
    """
    Entries and locks in the table of a database cache, each by one statement.

    Django's own methods give an expired lock to two processes at once, and say nothing if they could not write.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def get(self, key: str, /) -> bytes | None:
        statement = "SELECT {value} FROM {table} WHERE {cache_key} = %s AND {expires} > %s"
        _, rows = self._run(statement, self._name(key), timezone.now())
        return base64.b64decode(rows[0][0]) if rows else None

    def set(self, key: str, value: str, seconds: int, /) -> None:
        now = timezone.now()
        can_skip = connections[_database(self._cache)].vendor == "postgresql"
        self._run(_SWEEP_UNLOCKED if can_skip else _SWEEP, now)
        row = base64.b64encode(value.encode()).decode(), now + timedelta(seconds=seconds), self._name(key)
        if not self._run(_UPDATE, *row)[0]:
            try:
                self._run(_INSERT, *row)
            except IntegrityError:  # another process was faster
                self._run(_UPDATE, *row)

    def delete(self, key: str, /) -> None:
        self._run("DELETE FROM {table} WHERE {cache_key} = %s", self._name(key))

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        row = _lock(owner, lease), _tomorrow(), self._name(f"{key}:lock")
        if not self._run(_UPDATE + " AND (SUBSTR({value}, 20) = %s OR {value} < %s)", *row, owner, _lock())[0]:
            try:
                self._run(_INSERT, *row)
            except IntegrityError:
                return lease
        return 0.0

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        row = _lock(owner, lease), _tomorrow(), self._name(f"{key}:lock")
        return bool(self._run(_UPDATE + " AND SUBSTR({value}, 20) = %s AND {value} > %s", *row, owner, _lock())[0])

    def release(self, key: str, owner: str, /) -> None:
        statement = "DELETE FROM {table} WHERE {cache_key} = %s AND SUBSTR({value}, 20) = %s"
        self._run(statement, self._name(f"{key}:lock"), owner)

    def _name(self, key: str) -> str:
        return str(self._cache.make_and_validate_key(_PREFIX + key))

    def _run(self, statement: str, *values: str | datetime) -> tuple[int, list[Any]]:
        """Run a statement. Returns how many rows it found, and what it selected."""
        database = _database(self._cache)
        connection = connections[database]
        quote, adapt = connection.ops.quote_name, connection.ops.adapt_datetimefield_value
        names = {name: quote(name) for name in ("cache_key", "value", "expires")}
        with transaction.atomic(using=database), connection.cursor() as cursor:
            cursor.execute(
                statement.format(table=quote(self._cache._table), **names),
                [adapt(value) if isinstance(value, datetime) else value for value in values],
            )
            return cursor.rowcount, cursor.fetchall() if cursor.description else []


class DjangoStore:
    """
    Entries in one of Django's caches. Needs ``refresher[django]``.

    With Redis, with Memcached through ``PyMemcacheCache``, and with a database, a lock is taken, renewed and
    released in one step each. Machines that share a database need clocks that agree within a second or two. One that
    hangs delays no call past its timeout, but the thread that asked it waits on, and the process with that.

    Settings under which sessions would be lost are refused. If your module has ``tokens = TokenCache(DjangoStore())``,
    its import fails, and so does ``manage.py check``. Where the error is caught, ``manage.py check`` reports it with an
    id, ``refresher.E001`` to ``refresher.E007``.

    Args:
        alias: Which of ``settings.CACHES``.
        single_process: Whether one process is all there is. Then a ``LocMemCache`` will do as well.

    Raises:
        InvalidArgumentError: *alias* is no string, or *single_process* is no bool.
        django.core.exceptions.ImproperlyConfigured: The cache keeps nothing, is not shared, has no locks, or
            drops valid sessions. The message says what to set.
    """

    def __init__(self, alias: str = "default", *, single_process: bool = False) -> None:
        is_name = isinstance(alias, str) and alias in caches.settings
        if not is_name or not isinstance(single_process, bool):
            del alias, single_process  # an error's traceback shows what a frame has
            wanted = "single_process must be True or False"
            raise InvalidArgumentError(wanted if is_name else 'alias must be a name in settings.CACHES, like "default"')
        self._alias = alias
        _used[alias, single_process] = None
        for _, message, hint in _problems(alias, single_process):
            raise ImproperlyConfigured(f"{message} {hint}")

    def __repr__(self) -> str:
        return f"DjangoStore({getattr(self, '_alias', None)!r})"  # also in the middle of a complaint

    @property
    def _store(self) -> Store:
        cache = _cache(self._alias)
        # Of Django's own backend, or of django-redis. What they do with errors and replicas is not for us.
        holder: Any = getattr(cache, "client", None) or getattr(cache, "_cache", None)
        if hasattr(holder, "get_client"):
            return RedisStore(holder.get_client(write=True), prefix=str(cache.make_key(_PREFIX)))
        if isinstance(cache, BaseDatabaseCache):
            return _DatabaseStore(cache)
        return _MemcacheStore(cache) if isinstance(cache, PyMemcacheCache) else _CacheStore(cache)

    def get(self, key: str, /) -> str | bytes | None:
        """Return an entry. None if there is none, or it has expired."""
        return self._store.get(key)

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry that expires after *seconds*."""
        self._store.set(key, value, seconds)

    def delete(self, key: str, /) -> None:
        """Remove an entry, if it is there."""
        self._store.delete(key)

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        """Take a lock: 0.0 if *owner* has it now, otherwise how many seconds another has it at most."""
        return self._store.acquire(key, owner, lease)

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        """Restart a lock's lease. False if *owner* does not hold it any more."""
        return self._store.renew(key, owner, lease)

    def release(self, key: str, owner: str, /) -> None:
        """Let others take a lock, if *owner* holds it."""
        self._store.release(key, owner)

    @staticmethod
    def close() -> None:
        """Give back what this thread holds of caches and databases, except within a transaction of yours."""
        _close_caches()
        for connection in connections.all(initialized_only=True):
            # Django's own sign of a transaction that somebody began by set_autocommit(False).
            if not connection.in_atomic_block and connection.autocommit == connection.settings_dict["AUTOCOMMIT"]:
                connection.close()

    end_thread = close


def _cache(alias: str) -> Any:
    """
    Return this thread's own cache. Django's `caches` has one for each context, and a flight has that of its call: with
    asgiref before 3.12, two threads would read from one connection.
    """
    mine: dict[Any, Any] = vars(_mine)
    key = os.getpid(), alias
    if key not in mine or mine[key][0] is not caches.settings:  # which are replaced if a test overrides them
        cache: Any = caches.create_connection(alias)
        if isinstance(cache, PyMemcacheCache):
            vars(cache)["_options"] = {**_PATIENT_MEMCACHE, **vars(cache)["_options"], **_PLAIN_MEMCACHE}
        mine[key] = caches.settings, cache
    return mine[key][1]


def _close_caches(**_: object) -> None:
    mine: dict[Any, Any] = vars(_mine)
    for (process, _), (_, cache) in list(mine.items()):
        if process == os.getpid():
            cache.close()
            if isinstance(cache, RedisCache):  # which closes nothing
                for pool in cache._cache._pools.values():  # type: ignore[attr-defined]  # which typeshed does not know
                    pool.disconnect()


request_finished.connect(_close_caches)


def _lock(owner: str = "", lease: float = 0.0) -> str:
    """Write a lock down: when it ends, in 18 digits that sort like the time, a space, and whose it is."""
    return f"{time.time() + min(lease, LONGEST_LEASE):018.6f} {owner}"


def _tomorrow() -> datetime:
    """Return when a lock may be removed. A database may have local times, which are set twice a year."""
    return timezone.now() + timedelta(seconds=LONGEST_LEASE + 86_400)


def _whole(lease: float) -> int:
    """Round up. Memcached's clock ticks once a second, so it could end a lease a second early."""
    return math.ceil(min(lease, LONGEST_LEASE)) + 1
