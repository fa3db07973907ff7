"""What all tests share."""

from __future__ import annotations

import pytest

from refresher import refresh_kuzzle_token, refresh_user_token

pytest_plugins = ["refresher.testing"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No proxy, no key and no .netrc of whoever runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("CIRCLE_WEB3_API_KEY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def uncached(monkeypatch):
    """Let calls use no cache unless they are given one: each is a request."""
    for call in (refresh_kuzzle_token, refresh_user_token):
        monkeypatch.setitem(call.__kwdefaults__, "cache", None)


@pytest.fixture
def kuzzle(fake_kuzzle):
    """A FakeKuzzle."""
    return fake_kuzzle


@pytest.fixture
def circle(fake_circle):
    """A FakeCircle."""
    return fake_circle
