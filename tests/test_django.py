"""In a Django site, served by gunicorn."""

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


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_site(kuzzle, valkey_url, preload, tmp_path):
    """4 workers of 4 threads, hit by 64 browsers at once, refresh once."""
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    kuzzle.next_answers.append(lambda request: kuzzle.truly(request, after=0.3))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "django_site:application", f"--bind=127.0.0.1:{port}"]
    environment = {**os.environ, "SITE_CACHE": valkey_url, "SITE_KUZZLE": kuzzle.url, "SITE_JWT": jwt}
    with (tmp_path / "log").open("w") as log:
        site = subprocess.Popen(
            [*command, "--workers=4", "--threads=4", "--log-level=warning", *preload],
            cwd=Path(__file__).parent,
            env=environment,
            stderr=log,
        )
        try:
            answers = hit(f"http://127.0.0.1:{port}/who", 64)
        finally:
            site.terminate()
            site.wait(30)
    assert {answer["jwt"] for answer in answers} == {answers[0]["jwt"]}
    assert len({answer["pid"] for answer in answers}) == 4
    assert kuzzle.knows(answers[0]["jwt"])
    assert len(kuzzle.requests) == 1


def hit(url, browsers):
    deadline = time.monotonic() + 20
    while True:
        try:
            requests.get(url + "/../none", timeout=10)
            break
        except requests.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with ThreadPoolExecutor(browsers) as pool:
        found = list(pool.map(lambda _: requests.get(url, timeout=20).json(), range(browsers)))
        while len({answer["pid"] for answer in found}) < 4:
            assert time.monotonic() < deadline
            found += pool.map(lambda _: requests.get(url, timeout=20).json(), range(browsers))
    return found
