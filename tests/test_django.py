"""In a Django site: served by gunicorn, in Celery's workers, from cron, in its own tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from refresher.testing import Answer, Clock

SITE = Path(__file__).with_name("site")


@pytest.fixture
def clock():
    """A clock that goes on by itself, as the site's does."""
    return Clock()


@pytest.fixture
def old(kuzzle):
    """The site's token: good for ten seconds yet."""
    return kuzzle.login("foo", ago=3590)


@pytest.fixture
def environment(kuzzle, valkey_url, old, tmp_path):
    """What the settings read. The database is there."""
    environment = {
        **os.environ,
        "KUZZLE_URL": kuzzle.url,
        "KUZZLE_JWT": old,
        "SITE_REDIS": valkey_url,
        "SITE_DATABASE": str(tmp_path / "database"),
    }
    subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=SITE, env=environment, check=True)
    return environment


@pytest.fixture
def start(environment, tmp_path):
    """Start a program of the site's, which is ended after the test."""
    processes = []

    def start(*argv):
        with (tmp_path / "log").open("a") as log:
            command = [sys.executable, "-m", *argv]
            processes.append(subprocess.Popen(command, cwd=SITE, env=environment, stdout=log, stderr=log))

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)


@pytest.fixture
def serve(start):
    """Serve the site with gunicorn; get its URL."""

    def serve(*options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        start("gunicorn", "shop.wsgi", f"--bind=127.0.0.1:{port}", "--workers=4", "--threads=4", *options)
        deadline = time.monotonic() + 30
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/none", timeout=10)
                return f"http://127.0.0.1:{port}"
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    return serve


def refreshes(kuzzle):
    return [request for request in kuzzle.requests if request.path == "/_refreshToken"]


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_gunicorn(kuzzle, serve, preload, tmp_path):
    """4 workers of 4 threads, hit by 64 browsers at once, refresh once, and log that."""
    url = serve(*preload)
    kuzzle.delay_next(0.3)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: requests.get(f"{url}/site", timeout=20).json()["_id"], range(256)))
    assert set(answers) == {"foo"}
    assert len(refreshes(kuzzle)) == 1
    assert (tmp_path / "log").read_text().count(": ok, 1 attempt, 0.") == 1


def test_a_user(kuzzle, serve):
    """A user signs in, works on when the token is about to expire, and is asked to sign in when it's over."""
    url = serve("--workers=1")
    browser = requests.Session()
    assert browser.post(f"{url}/sign-in", {"username": "foo", "password": "wrong"}).status_code == 401
    assert browser.post(f"{url}/sign-in", {"username": "foo", "password": "bar"}).json()["_id"] == "foo"
    kuzzle.clock.advance(3500)
    assert [browser.get(f"{url}/me").json()["_id"] for _ in range(4)] == ["foo"] * 4
    assert len(refreshes(kuzzle)) == 1
    kuzzle.clock.advance(3700)
    answer = browser.get(f"{url}/me", allow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/sign-in")


def test_no_kuzzle(kuzzle, serve):
    """While something else answers, users are told to try again."""
    url, browser = serve("--workers=1"), requests.Session()
    kuzzle.clock.advance(-3700)
    browser.post(f"{url}/sign-in", {"username": "foo", "password": "bar"}, allow_redirects=False)
    kuzzle.next_answers.append(Answer(302))
    assert browser.get(f"{url}/me").status_code == 503


def test_atomic_requests(kuzzle, serve):
    """A request that refreshes and fails is undone in the database. The new token stays."""
    url = serve()
    browser = requests.Session()
    browser.post(f"{url}/sign-in", {"username": "foo", "password": "bar"})
    kuzzle.clock.advance(3500)
    assert browser.get(f"{url}/broken").status_code == 500
    assert browser.get(f"{url}/me").json()["_id"] == "foo"
    assert len(refreshes(kuzzle)) == 1


def test_celery(kuzzle, old, start, environment):
    """Tasks in several processes are given the first token, and refresh once."""
    start("celery", "--app=shop", "worker", "--concurrency=4", "--loglevel=WARNING")
    code = f"""
        from shop.tasks import count_documents
        results = [count_documents.delay({old!r}) for _ in range(32)]
        print({{result.get(timeout=30) for result in results}})
    """
    kuzzle.delay_next(0.3)
    assert run(environment, "-c", "\n".join(line.strip() for line in code.splitlines())) == "{'foo'}\n"
    assert len(refreshes(kuzzle)) == 1


def run(environment, *argv):
    return subprocess.run(
        [sys.executable, *argv], cwd=SITE, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_keepalive(kuzzle, environment):
    """The management command refreshes in time, and tells in a line if it can't."""
    assert run(environment, "manage.py", "keepalive").startswith("foo, till ")
    assert run(environment, "manage.py", "keepalive").startswith("foo, till ")
    assert len(refreshes(kuzzle)) == 1
    command = [sys.executable, "manage.py", "keepalive"]
    dead = {**environment, "KUZZLE_JWT": kuzzle.login("foo", ago=7200)}
    ended = subprocess.run(command, cwd=SITE, env=dead, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("CommandError: Kuzzle does not accept the token any more")
    assert "Traceback" not in ended.stderr


def test_the_sites_own_tests(environment):
    """The tests of the example pass."""
    options = ["-p", "no:cacheprovider", "-W", "error", "-c", os.devnull, "--rootdir", "."]
    assert "2 passed" in run(environment, "-m", "pytest", *options, "shop/tests.py")
