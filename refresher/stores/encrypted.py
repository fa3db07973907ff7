"""Entries that cannot be read without a key."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from .. import importing
from .._text import hide_all, reveal
from ..errors import InvalidArgumentError
from . import Store, check_store

T = TypeVar("T")
_log = logging.getLogger("refresher.keys")
# What a store may have beyond the protocol.
_EXTRAS = ("check", "close", "end_thread")
_KEY = re.compile(b"[A-Za-z0-9_-]{43}=")


class EncryptedStore:
    """
    Entries of another store, encrypted by Fernet. Locks and the names of entries pass through as they are.

    An entry that can't be decrypted, since it was written with another key, without one or under another name, counts
    as missing, but nobody is told to sign in as long as it's there. A warning is logged for the first one. To begin
    with encryption, get the newest tokens, and go on with those in an empty store. Needs ``refresher[crypto]``.

    Args:
        store: Where the entries are kept.
        keys: Fernet keys: make one with ``cryptography.fernet.Fernet.generate_key()``. The first one encrypts,
            all of them decrypt. To change keys, add the new one at the end, everywhere; then put it first, everywhere;
            remove the old one a month later, or when your longest-lived tokens have expired.

    Raises:
        InvalidArgumentError: *store* is no store, or *keys* are no keys.
        ModuleNotFoundError: ``cryptography`` is not installed.
    """

    def __init__(self, store: Store, keys: str | bytes | Iterable[str | bytes]) -> None:
        store, keys = hide_all(store, keys)  # both: they may be swapped, and a traceback shows what a frame has
        try:
            with importing:
                from cryptography.fernet import Fernet, InvalidToken, MultiFernet
        except ModuleNotFoundError:
            raise ModuleNotFoundError("EncryptedStore needs cryptography: pip install 'refresher[crypto]'") from None
        self._store = check_store(reveal(store))
        ciphers = _ciphers(Fernet, reveal(keys))
        if not ciphers:
            raise InvalidArgumentError("keys must be Fernet keys, one at least: use Fernet.generate_key()")
        self._cipher = MultiFernet(ciphers)
        self._invalid = InvalidToken
        self._told = False
        #: The keys of entries that are there, and could not be decrypted.
        self.unread: set[str] = set()

    def __repr__(self) -> str:
        return f"EncryptedStore({getattr(self, '_store', None)!r})"  # also in the middle of a complaint

    def __getattr__(self, name: str) -> object:
        if name in _EXTRAS:
            return getattr(self._store, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def get(self, key: str, /) -> bytes | None:
        """Return an entry. None if there is none that can be decrypted."""
        content = self._store.get(key)
        if content is None:
            (self.unread.add if key in getattr(self._store, "unread", ()) else self.unread.discard)(key)
            return None
        try:
            plain = self._cipher.decrypt(content.encode() if isinstance(content, str) else content)
        except self._invalid:
            plain = b""
        name, _, value = plain.partition(b"\n")
        if name == key.encode():
            self.unread.discard(key)
            return value
        del plain, value  # who keeps the stack of a log line keeps what its frames have
        self.unread.add(key)
        if not self._told:
            self._told = True
            _log.warning("EncryptedStore can't decrypt %s..., which counts as missing: was a key removed?", key[:8])
        return None

    def set(self, key: str, value: str, seconds: int, /) -> object:
        """Write an entry that expires after *seconds*."""
        value = self._cipher.encrypt(f"{key}\n{value}".encode()).decode()  # in this frame, too
        return self._store.set(key, value, seconds)

    def delete(self, key: str, /) -> object:
        """Remove an entry, if it is there."""
        return self._store.delete(key)

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        """Take a lock: 0.0 if *owner* has it now, otherwise the seconds that another's lease has left."""
        return self._store.acquire(key, owner, lease)

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        """Restart a lock's lease. False if *owner* does not hold it any more."""
        return self._store.renew(key, owner, lease)

    def release(self, key: str, owner: str, /) -> object:
        """Let others take a lock, if *owner* holds it."""
        return self._store.release(key, owner)


def _ciphers(make: Callable[[bytes], T], keys: str | bytes | Iterable[str | bytes]) -> list[T]:
    """Make a cipher of each key. None at all if one is wrong: Fernet passes over quotes, commas and what follows it."""
    try:
        several = [keys] if isinstance(keys, (str, bytes)) else keys
        texts = [key.encode() if isinstance(key, str) else key for key in several]
        return [make(text) for text in texts] if all(map(_KEY.fullmatch, texts)) else []
    except (TypeError, ValueError):
        return []
