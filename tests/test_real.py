"""The rule on real processes, files, Valkey and Kuzzle: nobody is told to sign in while a session lives."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from conftest import targets
from member import Member
from proxy import FaultProxy

from refresher.testing import Clock

POINTS = ("locked", "announced", "answered")
# How much longer than its timeout a call may take, on a machine that is busy.
SLACK = 1.0


@pytest.fixture
def members():
    """Start processes; they end with the test."""
    started = []

    def start(count):
        new = [Member() for _ in range(count)]
        started.extend(new)
        return new

    yield start
    for member in started:
        member.end()


@pytest.fixture
def chains(running_target, valkey_url, tmp_path):
    """A session for each store and each point at which a process may get stuck, each behind a proxy that counts."""
    with contextlib.ExitStack() as stack:
        yield {
            f"{kind}, {point}": Session(
                running_target,
                {"kind": kind, "where": where},
                point,
                stack.enter_context(FaultProxy(urlsplit(running_target.url).port)),
            )
            for kind, where in (("file", str(tmp_path / "store")), ("redis", valkey_url))
            for point in POINTS
        }


class Session:
    """A session that several processes use."""

    def __init__(self, target, store, point=None, proxy=None):
        self.target, self.store, self.point, self.proxy = target, store, point, proxy
        self.jwt = target.login()

    def call(self, *, stuck=False, lease=60.0, **options):
        """Say what a member calls. *stuck*: it gets stuck at the session's point."""
        store = {**self.store, "lease": lease, **({"point": self.point} if stuck else {})}
        url = self.proxy.url if self.proxy else self.target.url
        return {"url": url, "alive_at": self.target.url, "jwt": self.jwt, "store": store, **options}


def stick(holder, chains, **options):
    """Let a process get stuck in each chain at its point."""
    holder.tell(call={name: chain.call(stuck=True, **options) for name, chain in chains.items()})
    for _ in chains:
        assert holder.next()[0] == "stuck"


def errors(found):
    """What went wrong, by name. None: it is a token, and it works."""
    return {name: (one["error"] if one["jwt"] is None or one["alive"] else "dead token") for name, one in found.items()}


def tokens(found):
    return {name: one["jwt"] for name, one in found.items()}


def test_holder_is_killed(chains, members):
    """
    Of a process that is killed while it holds locks, others have a living token when the lease ends.

    The exception is an answer that nobody but the killed one had. That session has ended, and they say so when nobody
    can come back with the answer any more. Before that, they say that they do not know.
    """
    holder, *others = members(3)
    stick(holder, chains, timeout=30, lease=3)
    holder.signal(signal.SIGKILL)
    for other in others:  # the lease may end in three seconds
        other.tell(call={name: chain.call(timeout=1.5, lease=3) for name, chain in chains.items()})
    for found in [other.got(len(chains)) for other in others]:
        assert errors(found) == dict.fromkeys(chains, "OutcomeUnknownError")
        assert max(one["took"] for one in found.values()) < 1.5 + SLACK
    for other in others:
        other.tell(call={name: chain.call(timeout=15, lease=3) for name, chain in chains.items()})
    one, two = (other.got(len(chains)) for other in others)
    lost = {name: "SignInRequiredError" for name, chain in chains.items() if chain.point == "answered"}
    assert errors(one) == errors(two) == {**dict.fromkeys(chains), **lost}
    assert tokens(one) == tokens(two)
    assert max(found["took"] for found in (*one.values(), *two.values())) < 8
    assert {name: chain.proxy.connections for name, chain in chains.items()} == {
        name: 1 + (chain.point == "answered") for name, chain in chains.items()
    }


def test_holder_is_suspended(chains, members):
    """
    Of a process that is suspended while it holds locks, others have a living token when the lease ends.

    When it goes on, it looks again before it sends, and has their token. If it has the answer, they wait for that.
    """
    holder, *others = members(3)
    stick(holder, chains, timeout=60)
    holder.signal(signal.SIGSTOP)
    for other in others:
        other.tell(call={name: chain.call(timeout=8) for name, chain in chains.items()})
    one, two = (other.got(len(chains)) for other in others)
    for found in (one, two):
        for name, error in errors(found).items():
            expected = {"OutcomeUnknownError", "UnavailableError"} if chains[name].point == "answered" else {None}
            assert error in expected, (name, found[name])
    assert tokens(one) == tokens(two)
    holder.signal(signal.SIGCONT)
    holder.tell(release=True)
    theirs = holder.got(len(chains))
    assert errors(theirs) == dict.fromkeys(chains)
    again = [other.call(**{name: chain.call(timeout=8) for name, chain in chains.items()}) for other in others]
    for found in again:
        assert {name: each["jwt"] for name, each in found.items()} == {
            name: each["jwt"] for name, each in theirs.items()
        }
    assert {name: chain.proxy.connections for name, chain in chains.items() if chain.point != "answered"} == {
        name: 1 for name, chain in chains.items() if chain.point != "answered"
    }


def use(members, session, seconds, **options):
    """Let processes call again and again."""
    for member in members:
        member.tell(use={"": session.call(seconds=seconds, timeout=5, **options)})


def kept(found, last):
    """Nobody was told to sign in, every token worked, and in the *last* calls all have one and the same."""
    everything = [one for each in found for one in each]
    assert {one["error"] for one in everything} <= {None, "UnavailableError", "OutcomeUnknownError"}
    assert all(one["alive"] for one in everything if one["jwt"])
    assert max(one["took"] for one in everything) < 5 + SLACK
    assert [one["says"] for each in found for one in each[-last:] if one["error"]] == []


def test_valkey_is_stopped_and_started(running_target, own_valkey, members):
    """A Valkey that stops in mid-use and starts again, empty, costs no session, though tokens expire meanwhile."""
    session = Session(running_target, {"kind": "redis", "where": own_valkey.url})
    crew = members(3)
    use(crew, session, 10.5, expires_in="4s")
    time.sleep(2)
    own_valkey.stop()
    time.sleep(4)
    own_valkey.start()
    kept([member.next()[1] for member in crew], last=20)
    final = [member.call(now=session.call(timeout=5, expires_in="4s"))["now"] for member in (*crew, *members(1))]
    assert [one["error"] for one in final] == [None] * 4
    assert len({one["jwt"] for one in final}) == 1


@pytest.fixture
def fake_target():
    """A FakeKuzzle whose clock goes on by itself."""
    yield from targets("fake", Clock())


@pytest.fixture
def fake_session(fake_target, own_valkey):
    """A session at a FakeKuzzle, whose tokens own_valkey keeps."""
    with FaultProxy(urlsplit(fake_target.url).port) as proxy:
        yield Session(fake_target, {"kind": "redis", "where": own_valkey.url}, proxy=proxy)


def test_valkey_is_full(fake_session, own_valkey, members):
    """While a Valkey is full and refuses to be written, nothing is spent. What is known already goes on working."""
    known, session = fake_session, Session(fake_session.target, fake_session.store, proxy=fake_session.proxy)
    crew = members(2)
    before = [member.call(known=known.call(timeout=5))["known"] for member in crew]
    assert [one["error"] for one in before] == [None, None]
    sent = session.proxy.connections
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        for member in crew:
            found = member.call(known=known.call(timeout=5), new=session.call(timeout=1.5))
            assert found["known"]["jwt"] == before[0]["jwt"]
            assert (found["new"]["error"], found["new"]["spent"]) == ("UnavailableError", False)
            assert found["new"]["took"] < 1.5 + SLACK
        assert session.proxy.connections == sent
        client.config_set("maxmemory", 0)
    assert [member.call(new=session.call(timeout=5))["new"]["error"] for member in crew] == [None, None]
    assert session.proxy.connections == sent + 1


def test_valkey_evicts(fake_session, own_valkey, members):
    """A Valkey that evicts entries to make room costs no session while a process that uses it lives."""
    crew = members(3)
    with redis.Redis.from_url(own_valkey.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 400_000)
        use(crew, fake_session, 7, expires_in="4s")
        emptied = 0
        for round_ in range(10):
            time.sleep(0.3 + 0.07 * round_)  # not in step with those who put back what is lost, twice a second
            for number in range(100):
                client.set(f"filler:{round_}:{number}", b"x" * 10_000)
            emptied += not client.keys("refresher:*")
        client.config_set("maxmemory", 0)
    assert emptied
    kept([member.next()[1] for member in crew], last=5)


@pytest.fixture
def file_sessions(fake_target):
    """Make sessions at a FakeKuzzle by the real clock, whose tokens a folder keeps that anybody may reach."""
    with FaultProxy(urlsplit(fake_target.url).port) as proxy, tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield lambda: Session(fake_target, {"kind": "file", "where": folder}, proxy=proxy)


def test_disk_is_full(file_sessions, members):
    """However little there is room for on a disk: what cannot be kept is not spent, and the next run works."""
    member, next_run = members(2)
    known = file_sessions()
    first = member.call(known=known.call(timeout=5))["known"]
    sessions = {str(room): file_sessions() for room in range(1000, -1, -100)}
    time.sleep(1.1)  # none is too young to be refreshed
    refused = {}
    for room, session in sessions.items():
        member.tell(limit=int(room))
        member.next()
        sent = session.proxy.connections
        found = member.call(known=known.call(timeout=5), new=session.call(timeout=0.3))
        assert found["known"]["jwt"] == first["jwt"]
        if found["new"]["error"] is not None:
            refused[room] = found["new"]["error"], found["new"]["spent"], session.proxy.connections - sent
    assert set(refused.values()) == {("UnavailableError", False, 0)}
    found = next_run.call(**{name: session.call(timeout=8) for name, session in sessions.items()})
    assert errors(found) == dict.fromkeys(sessions)
    member.tell(limit=None)
    member.next()
    found = member.call(**{name: session.call(timeout=8) for name, session in sessions.items()})
    assert errors(found) == dict.fromkeys(sessions)


def test_folder_is_read_only(file_sessions, members, tmp_path):
    """In a folder that may be read only, nothing new is spent, and what is in it is used. Later, the next run works."""
    known, new = file_sessions(), file_sessions()
    user = 65_534 if os.geteuid() == 0 else os.geteuid()  # root may write anywhere
    crew = members(2)
    warm = {"kind": "file", "where": str(tmp_path)}  # it imports what it may not read later
    for member in crew:
        member.call(warm=Session(known.target, warm).call(timeout=5))
        member.tell(become=user)
        member.next()
    first = crew[0].call(known=known.call(timeout=5))["known"]
    assert first["error"] is None
    everything = [Path(known.store["where"]), *Path(known.store["where"]).rglob("*")]
    folders = {path: stat.S_IMODE(path.stat().st_mode) for path in everything if path.is_dir()}
    sent = new.proxy.connections
    for folder in folders:
        folder.chmod(0o555)
    try:
        for member in crew:
            found = member.call(known=known.call(timeout=5), new=new.call(timeout=1.5))
            assert found["known"]["jwt"] == first["jwt"]
            assert (found["new"]["error"], found["new"]["spent"]) == ("UnavailableError", False)
        assert new.proxy.connections == sent
    finally:
        for folder, mode in folders.items():
            folder.chmod(mode)
    assert [member.call(new=new.call(timeout=5))["new"]["error"] for member in crew] == [None, None]
