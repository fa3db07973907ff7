"""
Where a `TokenCache` keeps its entries: in the process, in files, in Redis or Valkey, in Django's cache.

All processes that share a store share the newest tokens. On one machine a `FileStore` will do. A fleet of machines
needs a `RedisStore`, or a `DjangoStore` on a cache that all of them reach.

An entry is a text under a key, and expires after some seconds. Keys are hashes; the texts contain tokens, so anyone
who can read a store can use them, unless an `EncryptedStore` encrypts them. So can who reads what is traced of its
commands: Django's log of SQL at DEBUG, Sentry's spans of Redis with ``send_default_pii``.
"""

# What a Protocol asks for has no body.
# pyright: reportReturnType=false

from __future__ import annotations

import importlib
import inspect
import os
from typing import TYPE_CHECKING, NoReturn, Protocol, cast, runtime_checkable

from .. import importing
from ..errors import InvalidArgumentError
from .memory import MemoryStore

if TYPE_CHECKING:
    from .django import DjangoStore
    from .encrypted import EncryptedStore
    from .file import FileStore
    from .redis import RedisStore

__all__ = ["DjangoStore", "EncryptedStore", "FileStore", "MemoryStore", "RedisStore", "Store", "check_store"]

_MODULES = {"DjangoStore": "django", "EncryptedStore": "encrypted", "FileStore": "file", "RedisStore": "redis"}
_METHODS = ("get", "set", "delete", "acquire", "renew", "release")


@runtime_checkable
class Store(Protocol):
    """
    A place for entries, and for locks that all of its users share.

    Keys consist of ``0-9``, ``a-z`` and ``-``. An entry and a lock may have the same key: they have nothing to
    do with each other. A lock whose owner was killed is held until its lease ends, and not for much longer.

    Any method may raise whatever it likes when the place is out of reach, and may be called by several threads
    at once. An error in one call says nothing about the next one. Test your own store with
    `refresher.testing.StoreContract`.

    It may have two members besides, and one that wraps another store passes them on. Threads of ours call
    ``end_thread()`` when they have done with the store, so that it can give back what it holds for each of them, such
    as a connection. ``unread`` has the keys of entries that are there and cannot be read, such as one that was
    encrypted with another key: `get` returns None for them, and nobody is told to sign in meanwhile.
    """

    def get(self, key: str, /) -> str | bytes | None:
        """Return an entry. None if there is none, or it has expired."""

    def set(self, key: str, value: str, seconds: int, /) -> object:
        """
        Write an entry that expires after *seconds*, one or more.

        It is written as a whole, or not at all. An error is raised if it could not be written.
        """

    def delete(self, key: str, /) -> object:
        """Remove an entry, if it is there."""

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        """
        Take a lock, if nobody else holds it. It does not wait.

        Args:
            key: What is locked.
            owner: Who takes it: a name that nobody else has. If it's the present owner, the lease starts again.
            lease: Seconds after which others may take it, unless it is renewed.

        Returns:
            0.0 if *owner* holds the lock now. Otherwise the seconds, more than zero, until the lease of its
            present owner ends, or an upper bound of them.

        Raises:
            Exception: It is not known whether the lock is taken. That is not the same as "held".
        """

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        """Restart a lock's lease. False if *owner* does not hold it any more."""

    def release(self, key: str, owner: str, /) -> object:
        """Let others take a lock. Nothing happens if *owner* does not hold it any more."""


def check_store(value: object) -> Store:
    """
    Return *value* if it is a store.

    Raises:
        InvalidArgumentError: It's something else. The message says what to use instead.
    """
    methods = {name: getattr(value, name, None) for name in _METHODS}  # also found by a __getattr__, as of a proxy
    # What a subclass of `Store` lacks does nothing there.
    missing = [key for key, it in methods.items() if it is None or getattr(it, "__func__", None) is vars(Store)[key]]
    is_async = any(map(inspect.iscoroutinefunction, methods.values()))
    if isinstance(value, type):
        hint = "use an instance of this class, such as MemoryStore()"
    elif is_async:
        hint = "its methods must not be async"
    elif not missing:
        return cast("Store", value)
    elif isinstance(value, (str, os.PathLike)):
        hint = "use TokenCache(FileStore(path))"
    elif hasattr(value, "execute_command"):
        hint = "use TokenCache(RedisStore(client))"
    elif hasattr(value, "make_key"):
        hint = "use TokenCache(DjangoStore(alias)) for a cache of Django's"
    else:
        hint = f"{type(value).__name__} has no {', '.join(missing)}; for a store in memory, use TokenCache()"
    del value  # an error's traceback shows what a frame has
    raise InvalidArgumentError(f"store must be a Store: {hint}")


if not TYPE_CHECKING:  # with it, type checkers would accept any misspelled name

    def __getattr__(name: str) -> object:
        # Each store is imported when it's asked for: Django, for one, takes a while.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            with importing:
                return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            missing = str(error.name).partition(".")[0]
        problem = f"{name} needs {missing}: pip install 'refresher[{missing}]'"

        def fail(*_: object, **__: object) -> NoReturn:
            raise ModuleNotFoundError(problem, name=missing)

        return type(name, (), {"__doc__": problem, "__module__": __name__, "__init__": fail})


def __dir__() -> list[str]:
    return __all__
