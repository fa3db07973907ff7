"""Entries in files of one folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

from .._system import find_clock, read_boot
from ..errors import InvalidArgumentError

_LARGEST_FILE = 1024 * 1024
# Seconds by which a wall clock may be wrong. An entry is rather kept for too long.
_LEEWAY = 86_400.0
# How long a file that is written aside may be there before it counts as left by a crash, in seconds.
_ABANDONED = 3600.0
# How long to wait for another process that changes a lock. That takes microseconds, unless it's suspended.
_PATIENCE = 1.0
# On Windows, a file that another process reads can't be replaced or removed at that moment.
_SHARING_PATIENCE = 1.0 if os.name == "nt" else 0.0
# How many files a write looks at to find expired ones, and `check` to find unreadable ones.
_SWEPT = 3
_CHECKED = 1000
# The names of our folders and files. No other file is ours to read or remove.
_FOLDER = re.compile(r"[0-9a-z-]{1,2}", re.ASCII)
_OURS = re.compile(r"refresher-[0-9a-z-]+\.(entry|lock|[0-9a-f]{16}\.tmp)", re.ASCII)
# Windows has none of the first three, and opens files as text by default.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
# The steady clock, and what it counts from.
_steady = find_clock()
_boot = functools.cache(read_boot)
_T = TypeVar("_T")


def _stamp(seconds: float) -> str:
    """Write down, by all clocks, when something ends that lasts for *seconds* from now."""
    return f"{_boot() or '-'} {_steady() + seconds!r} {time.time() + seconds!r} {float(seconds)!r}"


def _left(content: bytes, *, leeway: float = _LEEWAY) -> float:
    """
    Read a stamp: how many seconds are left.

    After a reboot, the wall clock counts. As that may be wrong, *leeway* is added.
    Without a leeway, a stamp that lasts longer than it can is over: the clock was set back.
    """
    try:
        boot, steady, wall, seconds = content.partition(b"\n")[0].decode("ascii").split()
        if boot == _boot():
            return float(steady) - _steady()
        left = float(wall) - time.time() + leeway
        return left if leeway or left <= float(seconds) else 0.0
    except ValueError:
        return 0.0  # we did not write this


def _open(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and nothing else. No link is followed, no pipe waited for."""
    handle = os.open(path, flags | _FLAGS, 0o600)
    try:
        if not all(stat.S_ISREG(status.st_mode) for status in (os.fstat(handle), path.lstat())):
            raise OSError(errno.EINVAL, "this is not a regular file", str(path))
        if flags & os.O_CREAT:
            path.chmod(0o600)  # whatever the umask
    except BaseException:
        os.close(handle)
        raise
    return handle


def _read(path: Path) -> bytes:
    with os.fdopen(_open(path), "rb") as file:
        return file.read(_LARGEST_FILE)


def _retry(action: Callable[[], _T], error: type[OSError], patience: float) -> _T:
    """Do what another process may hinder for a moment."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return action()
        except error:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.001)


def _share(action: Callable[[], _T]) -> _T:
    """Read, replace or remove a file, as soon as another process lets us."""
    return _retry(action, PermissionError, _SHARING_PATIENCE)


def _sync(folder: Path) -> None:
    """Let a folder's new names survive a loss of power, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _make(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)  # whatever the umask
        _sync(folder.parent)


def _system_lock() -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Return how to lock a file without waiting, and how to unlock it."""
    module: Any
    try:
        module = importlib.import_module("fcntl")
    except ImportError:  # on Windows
        module = importlib.import_module("msvcrt")
        return (
            lambda handle: module.locking(handle, module.LK_NBLCK, 1),
            lambda handle: module.locking(handle, module.LK_UNLCK, 1),
        )
    return (
        lambda handle: module.flock(handle, module.LOCK_EX | module.LOCK_NB),
        # Not just by closing it: a child that was forked just now has the file open as well.
        lambda handle: module.flock(handle, module.LOCK_UN),
    )


_lock, _unlock = _system_lock()


def _hold(path: Path, owner: str, lease: float) -> None:
    # Overwritten in its place: a full disk takes no lock from its owner.
    with os.fdopen(_open(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        file.write(f"{_stamp(lease)}\n{owner}".encode())
        file.truncate()


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Be the only one who changes locks of a folder, or puts entries in their place."""
    with os.fdopen(_open(folder / "refresher.guard", os.O_RDWR | os.O_CREAT), "rb") as file:
        _retry(lambda: _lock(file.fileno()), OSError, _PATIENCE)
        try:
            yield
        finally:
            _unlock(file.fileno())


def _is_over(file: Path) -> bool:
    """Whether an entry or a lock has expired, or what was written aside was left by a crash."""
    if file.suffix == ".tmp":
        guard = file.parent / "refresher.guard"
        os.utime(guard)  # by the clock that dates a folder's files: it's not always this machine's
        return file.lstat().st_mtime + _ABANDONED < guard.lstat().st_mtime
    return not _left(_read(file)) > 0


class FileStore:
    """
    Entries in files of one folder, for programs on one machine: each run finds what the last one refreshed.

    Everything is in a subfolder, ``refresher``, which is made with mode 0700; files have mode 0600 from their
    first byte. A file is written aside, synced and renamed: a crash leaves the old entry or the new one. Each
    write removes a few expired entries. Files that a FileStore did not name are never touched.

    An entry says itself when it expires: by a clock that nobody can set or, after a reboot, by the wall clock.
    As that may be wrong, the entry is kept for a day longer then. A file's own time does not count.

    A lock is a file that says who holds it and when its lease ends, so a holder that is killed or suspended
    delays others no longer than that.

    Args:
        path: The folder, on a local disk. ``~`` is the home of the user. It may be another user's, but not one that
            everybody may write to, unless that has the sticky bit, as ``/tmp`` has.

    Raises:
        InvalidArgumentError: *path* is empty, or no path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        if not isinstance(given, str) or not given or "\0" in given:
            raise InvalidArgumentError("path must be a str or a Path, not empty and without null characters")
        # A daemon changes the current folder.
        self._given = Path(given) if given.startswith("~") else Path(given).absolute()

    def __repr__(self) -> str:
        return f"FileStore({str(getattr(self, '_given', ''))!r})"  # also in the middle of a complaint

    @functools.cached_property
    def _path(self) -> Path:
        try:
            return self._given.expanduser() / "refresher"
        except RuntimeError:
            raise NotADirectoryError(errno.ENOTDIR, "there is no such home folder", str(self._given)) from None

    def _folder(self, key: str, *, make: bool = False) -> Path:
        """
        Return the folder of a key.

        Raises:
            PermissionError: Other users could have put something into it.
        """
        if make:
            for missing in reversed([*takewhile(lambda each: not each.exists(), self._path.parents)]):
                missing.mkdir(mode=0o755, exist_ok=True)  # or less: nobody else may write to it, whatever the umask
        user, parent = getattr(os, "geteuid", None), self._path.parent.stat()
        is_foreign = user and parent.st_uid not in (0, user()) and parent.st_mode & 0o1002 == 0o002
        if make and not is_foreign and not self._path.is_dir():
            _make(self._path)
        status = parent if is_foreign else self._path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "this is not a folder", str(self._path))
        if user and (is_foreign or status.st_uid != user() or status.st_mode & 0o022):
            message = "other users could replace the store's files"
            raise PermissionError(errno.EACCES, message, str(self._path.parent if is_foreign else self._path))
        folder = self._path / key[:2]
        if make and not folder.is_dir():
            _make(folder)
        return folder

    def get(self, key: str, /) -> bytes | None:
        """Return an entry. None if there is none, or it has expired."""
        try:
            content = _share(functools.partial(_read, self._folder(key) / f"refresher-{key}.entry"))
        except FileNotFoundError:
            return None
        return content.partition(b"\n")[2] if _left(content) > 0 else None

    def set(self, key: str, value: str, seconds: int, /) -> None:
        """Write an entry that expires after *seconds*."""
        content = f"{_stamp(seconds)}\n{value}".encode()
        if len(content) > _LARGEST_FILE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        folder = self._folder(key, make=True)
        aside = folder / f"refresher-{key}.{os.urandom(8).hex()}.tmp"
        try:
            with os.fdopen(_open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with _guard(folder):
                _share(functools.partial(aside.replace, folder / f"refresher-{key}.entry"))
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync(folder)
        with contextlib.suppress(OSError):  # the entry is written
            self._sweep()

    def delete(self, key: str, /) -> None:
        """Remove an entry, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            _share((self._folder(key) / f"refresher-{key}.entry").unlink)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[tuple[Path, str, float]]:
        """Yield the file of a lock, its owner and the seconds it has left. Nobody changes it meanwhile."""
        folder = self._folder(key, make=True)
        path, content = folder / f"refresher-{key}.lock", b""
        with _guard(folder):
            with contextlib.suppress(FileNotFoundError):
                content = _read(path)
            yield path, content.partition(b"\n")[2].decode(errors="replace"), _left(content, leeway=0.0)

    def acquire(self, key: str, owner: str, lease: float, /) -> float:
        """Take a lock: 0.0 if *owner* has it now, otherwise the seconds that another's lease has left."""
        with self._locked(key) as (path, holder, left):
            if left > 0 and holder != owner:
                return left
            _hold(path, owner, lease)
            return 0.0

    def renew(self, key: str, owner: str, lease: float, /) -> bool:
        """Restart a lock's lease. False if *owner* does not hold it any more."""
        with self._locked(key) as (path, holder, left):
            held = left > 0 and holder == owner
            if held:
                _hold(path, owner, lease)
            return held

    def release(self, key: str, owner: str, /) -> None:
        """Let others take a lock, if *owner* holds it."""
        with self._locked(key) as (path, holder, _):
            if holder == owner:
                _share(path.unlink)

    def check(self) -> None:
        """
        Make sure that entries can be read and written.

        Raises:
            OSError: They can't.
        """
        probe = f"probe-{os.urandom(8).hex()}"
        self.set(probe, "0" * 65536, 60)
        try:
            self.get(probe)
        finally:
            self.delete(probe)
        files = (file for folder in self._folders() for file in folder.iterdir() if _OURS.fullmatch(file.name))
        for file in islice(files, _CHECKED):
            with contextlib.suppress(FileNotFoundError):  # it was removed just now, or renamed
                os.close(_open(file))

    def _folders(self) -> list[Path]:
        return [folder for folder in self._path.iterdir() if _FOLDER.fullmatch(folder.name) and folder.is_dir()]

    def _sweep(self) -> None:
        """Look at a few files of one folder, and remove those that have expired."""
        # There may be many: whether they are ours is asked of few.
        folder = self._path / random.choice(os.listdir(self._path))  # noqa: PTH208, S311 - no secret
        if not _FOLDER.fullmatch(folder.name) or not folder.is_dir():
            return
        names = os.listdir(folder)  # noqa: PTH208
        for file in [folder / name for name in random.sample(names, min(_SWEPT, len(names)))]:
            # Keep the guard for short: while a process is suspended within it, others can't write.
            with contextlib.suppress(FileNotFoundError):
                if _OURS.fullmatch(file.name) and _is_over(file):
                    with _guard(folder):
                        if _is_over(file):
                            file.unlink()
