"""
Uses a FileStore in a process that has what a Windows has, and not more.

What Windows forbids is forbidden: to replace or remove a file that is open. What it lacks is taken away.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import types
from pathlib import Path

BINARY = 1 << 29
LOCKED = set()


def opened(path):
    """Whether this process has a file open."""
    wanted = os.path.realpath(path)
    for handle in Path("/proc/self/fd").iterdir():
        try:
            if str(handle.readlink()) == wanted:
                return True
        except OSError:
            continue
    return False


def forbid(action, target):
    """Let an action fail on a file that is open."""

    def forbidding(*paths, **options):
        if opened(paths[target]):
            forbidden.append(paths)
            raise PermissionError(13, "Permission denied")
        return action(*paths, **options)

    return forbidding


def open_binary(path, flags, mode=0o777, *, dir_fd=None):
    if not flags & BINARY:
        assert Path(path).is_dir(), "a file was opened as text"
        raise PermissionError(13, "Permission denied")  # folders can't be opened
    return real_open(path, flags & ~BINARY, mode)


def locking(handle, mode, size):
    path = Path(f"/proc/self/fd/{handle}").readlink()
    if mode == 0:
        LOCKED.remove(path)
        return
    with mutex:
        if path in LOCKED:
            raise PermissionError(13, "Permission denied")
        LOCKED.add(path)


forbidden = []
mutex = threading.Lock()
real_open = os.open
for module, names in (
    (os, "O_NOFOLLOW O_DIRECTORY O_CLOEXEC O_NONBLOCK O_NOCTTY fchmod getuid geteuid fork register_at_fork"),
    (time, "clock_gettime CLOCK_BOOTTIME CLOCK_MONOTONIC"),
):
    for name in names.split():
        delattr(module, name)
sys.modules["fcntl"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, LK_UNLCK=0, locking=locking)
os.O_BINARY = BINARY
os.open = open_binary
os.replace = forbid(os.replace, 1)
os.unlink = forbid(os.unlink, 0)
Path.read_text = lambda *_: (_ for _ in ()).throw(FileNotFoundError(2, "no /proc here"))

from refresher.stores import FileStore, MemoryStore, file  # noqa: E402

file._SHARING_PATIENCE = 5.0
store = FileStore(sys.argv[1])
key = "ab" * 32
assert store.get(key) is None
store.check()


def write(number):
    for _ in range(50):
        store.set(key, f"{number}\r\n\x1a", 60)


def read():
    while not done:
        assert store.get(key) in (None, b"0\r\n\x1a", b"1\r\n\x1a", b"2\r\n\x1a")


def count():
    for _ in range(25):
        owner = f"{threading.get_ident()}"
        while store.acquire(key, owner, 5):
            time.sleep(0.001)
        counter.append(len(counter))
        assert store.renew(key, owner, 5)
        store.release(key, owner)


done, counter, failed = False, [], []
threading.excepthook = failed.append
reader = threading.Thread(target=read)
reader.start()
workers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
workers += [threading.Thread(target=count) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
done = True
reader.join()
assert not failed, failed
assert counter == list(range(75))
# A short lease counts by the wall clock here, and a dead owner's ends.
assert store.acquire(key, "dead", 0.2) == 0.0
assert 0 < store.acquire(key, "heir", 5) <= 0.2
time.sleep(0.25)
assert store.acquire(key, "heir", 5) == 0.0
store.delete(key)
assert store.get(key) is None
memory = MemoryStore()
memory.set(key, "value", 60)
assert memory.get(key) == "value"
print(len(forbidden))
