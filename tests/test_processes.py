"""Many processes, one request: on files, on Redis, on Django's cache."""

from __future__ import annotations

import signal
import time

import pytest


@pytest.fixture(params=["file", "redis", "django"])
def shelf(request, tmp_path):
    """A store that processes share: its kind, and where it is."""
    where = str(tmp_path / "shelf") if request.param == "file" else request.getfixturevalue("valkey_url")
    return {"kind": request.param, "where": where}


def test_fleet(fleet, shelf, kuzzle):
    """8 processes of 8 threads: one request, 64 equal results."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=0.3))
    fleet.start(8, url=kuzzle.url, jwt=jwt, threads=8, timeout=20, **shelf)
    fleet.go()
    results = fleet.results()
    assert len(results) == 64
    assert len(set(results)) == 1
    assert kuzzle.knows(results[0])
    assert len(kuzzle.requests) == 1


def test_refusal_in_a_fleet(fleet, shelf, kuzzle):
    """8 processes with a dead session: one request, 64 equal errors."""
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=0.3))
    fleet.start(8, url=kuzzle.url, jwt="kauth-dead", threads=8, timeout=20, **shelf)
    fleet.go()
    results = fleet.results()
    assert len(results) == 64
    assert {result.partition(":")[0] for result in results} == {"SignInRequiredError"}
    assert len(set(results)) == 1
    assert len(kuzzle.requests) == 1


def test_next_process(fleet, shelf, kuzzle):
    """What one process has refreshed, the next one finds."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    fleet.start(2, url=kuzzle.url, jwt=jwt, threads=1, timeout=20, **shelf)
    fleet.go(0)
    first = fleet.results(0)
    fleet.go(1)
    assert fleet.results(1) == first
    assert len(kuzzle.requests) == 1


def test_holder_is_killed(fleet, shelf, kuzzle):
    """The process that holds the lock is killed in mid-exchange: the others go on when its lease ends."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    kuzzle.next_answers.append(lambda request: time.sleep(1) or b"")
    fleet.start(1, url=kuzzle.url, jwt=jwt, threads=1, timeout=2, lease=2, **shelf)
    fleet.start(3, url=kuzzle.url, jwt=jwt, threads=4, timeout=20, **shelf)
    fleet.go(0)
    while not kuzzle.requests:
        time.sleep(0.01)
    fleet.processes[0].send_signal(signal.SIGKILL)
    fleet.go(1, 2, 3)
    results = fleet.results(1, 2, 3)
    assert len(set(results)) == 1
    assert kuzzle.knows(results[0])
    assert len(kuzzle.requests) == 2


def test_nobody_hangs(fleet, shelf, kuzzle):
    """While another process holds the lock for too long, each caller has an error after its own timeout."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=2.5))
    fleet.start(1, url=kuzzle.url, jwt=jwt, threads=1, timeout=20, **shelf)
    fleet.start(2, url=kuzzle.url, jwt=jwt, threads=4, timeout=1.5, lease=0.5, **shelf)
    fleet.go(0)
    while not kuzzle.requests:
        time.sleep(0.01)
    fleet.go(1, 2)
    results = fleet.results(1, 2)
    assert {result.partition(":")[0] for result in results} == {"OutcomeUnknownError"}
    assert kuzzle.knows(fleet.results(0)[0])
    assert len(kuzzle.requests) == 1


def test_fleet_on_each_kuzzle(fleet, target, tmp_path):
    """Where those who lose a race would be refused, nobody races."""
    jwt = target.login()
    task = {"kind": "file", "where": str(tmp_path / "shelf"), "threads": 8, "timeout": 20}
    fleet.start(4, url=target.url, jwt=jwt, **task)
    fleet.go()
    results = fleet.results()
    assert len(results) == 32
    assert len(set(results)) == 1
    target.wait(1.2)
    assert (target.me(jwt), target.me(results[0])) == (401, 200)
