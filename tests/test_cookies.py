"""The cookie of a session in which a token travels."""

from __future__ import annotations

import contextlib
import functools
import http.cookiejar
import socket
import sys
from datetime import timedelta
from http.cookiejar import LWPCookieJar, MozillaCookieJar
from itertools import chain

import pytest
import requests

from refresher import SignInRequiredError, TokenCache, _api, _cookies, refresh_kuzzle_token
from refresher._text import Secret
from refresher.testing import FakeKuzzle


def test_cookie_of_a_session():
    """The cookie that would go to a URL is found, and replaced, wherever it came from; others stay."""
    with requests.Session() as session:
        session.cookies.set("authToken", "old", domain="kuzzle.example", path="/app")
        session.cookies.set("authToken", "strangers", domain="other.example")
        session.cookies.set("another", "x", domain="kuzzle.example")
        url = "https://kuzzle.example/app/_refreshToken"
        assert _cookies.find(session, url, "authToken") == Secret("old")
        assert _cookies.find(session, "https://kuzzle.example/", "authToken") is None
        _cookies.keep(session, url, "authToken", Secret("new"), Secret("old").__eq__)
        assert _cookies.find(session, url, "authToken") == Secret("new")
        assert _cookies.find(session, "https://kuzzle.example/", "authToken") is None
        assert sorted(cookie.value for cookie in session.cookies) == ["new", "strangers", "x"]


def test_cookies_of_two_services_on_one_host():
    """A proxy that gives each its path gives each a token of its own, also if one has all paths that are left."""
    urls = {"/": "https://kuzzle.example", "/a": "https://kuzzle.example/a", "/b": "https://kuzzle.example/b"}
    with requests.Session() as session:
        for path in urls:
            session.cookies.set("authToken", f"old of {path}", domain="kuzzle.example", path=path)
        for path, url in urls.items():
            assert _cookies.find(session, url, "authToken") == Secret(f"old of {path}")
            _cookies.keep(session, url, "authToken", Secret(f"new of {path}"), Secret(f"old of {path}").__eq__)
        assert {cookie.path: cookie.value for cookie in session.cookies} == {path: f"new of {path}" for path in urls}


@pytest.mark.parametrize("kind", [MozillaCookieJar, LWPCookieJar])
def test_jar_that_is_saved(tmp_path, kind):
    """A token that was put into it is saved with the others, and found again, more than once."""
    url = "https://kuzzle.example"
    for value in ("first", "second"):
        with requests.Session() as session:
            session.cookies = kind(tmp_path / "jar")
            if value == "second":
                session.cookies.load()
                assert _cookies.find(session, url, "authToken") == Secret("first")
            _cookies.keep(session, url, "authToken", Secret(value), Secret("first").__eq__)
            session.cookies.save()
    jar = kind(tmp_path / "jar")
    jar.load()
    assert [cookie.value for cookie in jar] == ["second"]


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_cookie_that_is_new(scheme):
    """A token that came by https is in a cookie that goes by https alone."""
    with requests.Session() as session:
        _cookies.keep(session, f"{scheme}://kuzzle.example", "authToken", Secret("new"), Secret("old").__eq__)
        assert [cookie.secure for cookie in session.cookies] == [scheme == "https"]


@pytest.mark.parametrize("secure", [True, False])
def test_cookie_that_is_secure(secure):
    """What takes its place goes no further than it."""
    with requests.Session() as session:
        session.cookies.set("authToken", "old", domain="kuzzle.example", secure=secure)
        _cookies.keep(session, "https://kuzzle.example", "authToken", Secret("new"), Secret("old").__eq__)
        assert [(cookie.value, cookie.secure) for cookie in session.cookies] == [("new", secure)]


@pytest.mark.holds
@pytest.mark.parametrize("order", [1, -1])
def test_cookies_of_a_host_and_of_its_subdomain(monkeypatch, order):
    """Each token goes to the host that set it. A jar would send one host's to the other as well."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *others, **named: look_up("127.0.0.1", *others, **named))
    with FakeKuzzle() as kuzzle, FakeKuzzle() as staging, requests.Session() as session:
        services = {"kuzzle.example": kuzzle, "staging.kuzzle.example": staging}
        urls = [service.url.replace("127.0.0.1", host) for host, service in services.items()][::order]
        for url in urls:
            login = {"username": "foo", "password": "bar"}
            session.cookies.update(requests.post(f"{url}/_login/local?cookieAuth", json=login, timeout=5).cookies)
        before = {cookie.domain: cookie.value for cookie in session.cookies}
        for url in (*urls, *urls):
            refresh_kuzzle_token(url, cookie_auth=True, session=session)
        after = {cookie.domain: cookie.value for cookie in session.cookies}
        assert before.keys() == after.keys() == services.keys()
        for host, service in services.items():
            assert after[host] != before[host]
            assert service.knows(after[host])


@pytest.mark.parametrize("what", ["_login/local?cookieAuth", "_logout?cookieAuth"])
def test_sign_in_or_out_during_a_refresh(what):
    """Its cookie stays, also if the refresh of the former user's token ends later."""
    there = []
    with FakeKuzzle({"foo": "", "bar": "pass"}) as kuzzle, requests.Session() as session:

        def meanwhile(request):
            session.post(f"{kuzzle.url}/{what}", json={"username": "bar", "password": "pass"}, timeout=5)
            there.append(session.cookies["authToken"])
            return kuzzle.truly(request)

        session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1")
        kuzzle.next_answers.append(meanwhile)
        with contextlib.suppress(SignInRequiredError):  # the refresh came after the sign-out
            refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session)
        assert [session.cookies["authToken"]] == there


@pytest.mark.parametrize("is_later", [False, True])
def test_two_threads_with_one_session(monkeypatch, is_later):
    """The newest token stays in the jar, or comes there, if one that was spent meanwhile comes late or early."""
    cache, keep = TokenCache(), _cookies.keep
    with FakeKuzzle() as kuzzle, requests.Session() as session:
        jwt = kuzzle.login("foo", ago=1800)
        session.cookies.set("authToken", jwt, domain="127.0.0.1")
        refresh = functools.partial(refresh_kuzzle_token, kuzzle.url, cookie_auth=True, session=session, cache=cache)
        spent = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache).jwt

        def late(*arguments):
            monkeypatch.undo()
            if is_later:
                refresh(expires_in="2h")
            else:
                session.cookies.set("authToken", spent, domain="127.0.0.1")
            keep(*arguments)

        monkeypatch.setattr(_cookies, "keep", late)
        assert refresh(expires_in=None if is_later else "2h").ttl == timedelta(hours=1 if is_later else 2)
        newest = session.cookies["authToken"]
        assert newest not in (jwt, spent)
        assert refresh_kuzzle_token(kuzzle.url, jwt, cache=cache).jwt == newest


def test_cookie_of_a_second_sign_in():
    """Of two sessions of one user, that of the cookie stays."""
    with FakeKuzzle() as kuzzle, requests.Session() as session:
        new = kuzzle.login("foo")

        def meanwhile(request):
            session.cookies.set("authToken", new, domain="127.0.0.1")
            return kuzzle.truly(request)

        for cache in (TokenCache(), None):
            session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1")
            kuzzle.next_answers.append(meanwhile)
            refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session, cache=cache)
            assert [cookie.value for cookie in session.cookies] == [new]


def test_jar_is_left_alone():
    """If the newest token is there nothing is put there: a cookie that comes just then stays."""
    with FakeKuzzle() as kuzzle, requests.Session() as session:
        session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1")
        token = refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session)
        session.cookies.set_cookie = pytest.fail
        assert refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session) == token


class Busy(requests.cookies.RequestsCookieJar):
    """A jar yields None for a cookie that another thread has just removed, if one looks without its lock."""

    def __iter__(self):
        is_locked = sys._getframe(1).f_code.co_filename == http.cookiejar.__file__
        return chain([] if is_locked else [None], super().__iter__())


def test_cookies_that_others_remove():
    """That hurts nobody."""
    with FakeKuzzle() as kuzzle, requests.Session() as session:
        session.cookies = Busy()
        session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1")
        refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session, cache=None)
        assert [cookie and kuzzle.knows(cookie.value) for cookie in session.cookies] == [None, True]


def test_variables_of_cookies(monkeypatch):
    """No local variable shows a token at any moment, whatever an interrupt may hit."""
    seen, files = {}, (_cookies.__file__, _api.__file__)

    def look(frame, event, argument):
        for name, value in frame.f_locals.items():
            seen[frame.f_code.co_name, name] = seen.get((frame.f_code.co_name, name), "") + repr(value)
        return look

    with FakeKuzzle() as kuzzle, requests.Session() as session:
        session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1")
        tracer = sys.gettrace()  # of coverage
        sys.settrace(lambda frame, event, argument: look if frame.f_code.co_filename in files else None)
        try:
            for _ in range(2):
                refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session)
        finally:
            sys.settrace(tracer)
        assert {("keep", "there"), ("_cookies_for", "numbered"), ("_in_cookie_mode", "there")} <= seen.keys()
        assert [where for where, shown in seen.items() if "eyJ" in shown] == []


def test_cookie_that_expires_during_a_refresh():
    """The new token takes its place."""
    with FakeKuzzle() as kuzzle, requests.Session() as session:

        def meanwhile(request):
            session.cookies.clear()
            return kuzzle.truly(request)

        session.cookies.set("authToken", kuzzle.login("foo", ago=1800), domain="127.0.0.1")
        kuzzle.next_answers.append(meanwhile)
        refresh_kuzzle_token(kuzzle.url, cookie_auth=True, session=session)
        assert kuzzle.knows(session.cookies["authToken"])
