"""What can go wrong tells no secret, and survives a trip."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import logging
import pickle
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import requests
import urllib3
from helpers import jwt_with

import refresher
from refresher import (
    InvalidArgumentError,
    KuzzleToken,
    MemoryStore,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    RequestRefusedError,
    TokenCache,
    UserToken,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher._text import fingerprint
from refresher.testing import Answer

pytestmark = pytest.mark.usefixtures("single")

JWT = "kauth-planted.planted.planted"
CIRCLE = {
    "user_token": "planted-user-token",
    "refresh_token": "planted-refresh-token",
    "device_id": "planted-device",
    "api_key": "planted:api:key",
}
KINDS = [kind for kind in vars(refresher.errors).values() if isinstance(kind, type) and issubclass(kind, RefreshError)]


@pytest.mark.parametrize("kind", KINDS)
def test_trip(kind):
    """An error is the same after pickling and copying, with all it knows."""
    details = {
        "provider": "circle",
        "status": 429,
        "code": 5,
        "id": "x",
        "request_id": "y",
        "retry_after": 1.5,
        "spent": False,
        "idempotency_key": "z",
        "retryable": True,
    }
    error = kind("what happened", **details)
    for trip in (lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy):
        back = trip(error)
        assert type(back) is kind
        assert (str(back), vars(back)) == ("what happened", details)


def test_family():
    """All are RefreshErrors; a bad argument is a refused request and a ValueError as well."""
    assert {kind.__name__ for kind in KINDS} == {
        "InvalidArgumentError",
        "OutcomeUnknownError",
        "RefreshError",
        "ReplyError",
        "RequestRefusedError",
        "SignInRequiredError",
        "UnavailableError",
    }
    assert issubclass(InvalidArgumentError, (RequestRefusedError, ValueError))
    assert issubclass(InvalidArgumentError, ValueError)
    assert {name: value for name, value in vars(RefreshError("x")).items() if value is not None} == {"retryable": False}


def reachable(error):
    """Whatever hangs on an error, but for the frames of its traceback, types and modules."""
    stack, seen = [error], {}
    while stack:
        each = stack.pop()
        if id(each) in seen or isinstance(each, (type, types.ModuleType, types.TracebackType, types.FunctionType)):
            continue
        seen[id(each)] = each
        stack.extend(gc.get_referents(each))
    return list(seen.values())


def assert_tells_nothing(error, log):
    __tracebackhide__ = True
    assert error.__context__ is None
    assert error.__cause__ is None
    shown = [
        str(error),
        repr(error),
        repr(vars(error)),
        repr(error.args),
        pickle.dumps(error, 0).decode("latin-1"),
    ]
    shown += traceback.format_exception_only(error)
    shown += [record.getMessage() for record in log.records]
    assert [text for text in shown if "planted" in text] == []
    for each in reachable(error):
        assert not type(each).__module__.startswith(("requests", "urllib3", "http"))
        assert "planted" not in each if isinstance(each, str) else True


def echo(request):
    """Say back, wherever something can be said, what was sent."""
    sent = [value.removeprefix("Bearer ") for value in request.headers.values()]
    sent += [str(value) for value in json.loads(request.body or b"{}").values()]
    secret = next((value for value in sent if "planted" in value), "planted")
    members = {
        "id": secret,
        "code": secret,
        "message": secret,
        "status": secret,
        "props": sent,
        "stack": secret,
    }
    headers = dict.fromkeys(("X-Request-Id", "X-Kuzzle-Request-Id", "Retry-After", "Location", "X-Any"), secret)
    return lambda status: Answer(status, {**members, "error": members, "data": secret, "result": secret}, headers)


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404, 429, 500, 502, 503])
def test_echo(kuzzle, circle, caplog, status):
    """A service that says back all it heard does not get it into an error or a log."""
    caplog.set_level(logging.DEBUG)
    kuzzle.next_answers.append(lambda request: echo(request)(status))
    circle.next_answers.append(lambda request: echo(request)(status))
    with pytest.raises(RefreshError) as first:
        refresh_kuzzle_token(kuzzle.url, JWT)
    with pytest.raises(RefreshError) as second:
        refresh_user_token(**CIRCLE, base_url=circle.url)
    assert_tells_nothing(first.value, caplog)
    assert_tells_nothing(second.value, caplog)


@pytest.mark.parametrize("answer", [b"", b"planted", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nplanted"])
def test_lost(kuzzle, circle, caplog, answer):
    """Nor does the HTTP library, whose own errors hold the request."""
    caplog.set_level(logging.DEBUG)
    kuzzle.next_answers.append(answer)
    circle.next_answers.append(answer)
    with pytest.raises(OutcomeUnknownError) as first:
        refresh_kuzzle_token(kuzzle.url, JWT)
    with pytest.raises(OutcomeUnknownError) as second:
        refresh_user_token(**CIRCLE, base_url=circle.url)
    assert_tells_nothing(first.value, caplog)
    assert_tells_nothing(second.value, caplog)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: refresh_kuzzle_token("http://127.0.0.1:1", JWT), id="nobody there"),
        pytest.param(lambda: refresh_kuzzle_token("http://no.invalid", JWT), id="no such host"),
        pytest.param(lambda: refresh_kuzzle_token("http://u:planted@host", JWT), id="a password"),
        pytest.param(lambda: refresh_kuzzle_token("http://planted host", JWT), id="no URL"),
        pytest.param(lambda: refresh_kuzzle_token("http://host", JWT + "\n"), id="a line break"),
        pytest.param(lambda: refresh_kuzzle_token("http://host", [JWT]), id="no hash"),
        pytest.param(lambda: refresh_user_token(**{**CIRCLE, "api_key": [JWT]}), id="no hash in a key"),
        pytest.param(lambda: refresh_kuzzle_token("http://host", JWT, expires_in="planted"), id="no timespan"),
        pytest.param(lambda: refresh_user_token(**CIRCLE, base_url="http://planted"), id="no TLS"),
        pytest.param(lambda: refresh_user_token(**CIRCLE, idempotency_key="planted"), id="no UUID"),
        pytest.param(
            lambda: refresh_kuzzle_token(
                "http://127.0.0.1:1", session=session_with_cookie("planted token"), cookie_auth=True
            ),
            id="a cookie that is no token",
        ),
    ],
)
def test_not_sent(call, caplog):
    """Nor does anything that goes wrong before something is sent."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(RefreshError) as caught:
        call()
    assert_tells_nothing(caught.value, caplog)


def session_with_cookie(value):
    session = requests.Session()
    session.cookies.set("authToken", value)
    return session


def test_log(kuzzle, caplog):
    """The log has a line an exchange: who, old and new credential, what came of it, how often, how long."""
    caplog.set_level(logging.INFO, "refresher")
    jwt = kuzzle.login()
    kuzzle.clock.advance(1)
    new = refresh_kuzzle_token(kuzzle.url, jwt)
    with pytest.raises(RefreshError):
        refresh_kuzzle_token(kuzzle.url, jwt)
    good, bad = caplog.messages
    assert good.startswith(f"kuzzle {fingerprint(jwt)} -> {fingerprint(new.jwt)}: ok, 1 attempt, 0.")
    assert bad.startswith(f"kuzzle {fingerprint(jwt)}: Kuzzle no longer accepts this token: sign in again")
    assert "(401, security.token.invalid), 1 attempt, 0." in bad


def test_interrupted_exchange_is_logged(circle, caplog, monkeypatch):
    """An exchange that is broken off has its line too."""
    caplog.set_level(logging.INFO, "refresher")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(urllib3.HTTPConnectionPool, "urlopen", interrupt)
    with pytest.raises(KeyboardInterrupt):
        refresh_user_token(**CIRCLE, base_url=circle.url)
    assert f"circle {fingerprint('planted-refresh-token')}: interrupted" in caplog.text


OURS = Path(refresher.__file__).parent


def frames_of(error):
    """The frames of ours that a crash report would show, with those that attrs has generated for us."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if Path(file).is_relative_to(OURS) or (file.startswith("<attrs") and "refresher" in file):
            yield frame


def held(value):
    """What a crash report shows of a variable: it looks into what Python brings, and prints the rest."""
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from itertools.chain(*map(held, pair))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from itertools.chain(*map(held, value))
    elif isinstance(value, types.CellType):
        yield from held(value.cell_contents)
    else:
        with contextlib.suppress(AttributeError):  # it is being made
            yield str(value) if isinstance(value, (str, bytes)) else repr(value)


def variables_with_secrets(error):
    return [
        f"{frame.f_code.co_qualname}: {name}"
        for frame in frames_of(error)
        for name, value in frame.f_locals.items()
        if any("planted" in text for text in held(value))
    ]


def lent():
    session = requests.Session()
    session.cookies.set("authToken", JWT)
    return session


# A device is no secret.
SECRET = {**CIRCLE, "device_id": "device-1"}
FAILURES = {
    "refused": Answer(401, {"error": {"id": "security.token.invalid"}, "code": 155102, "message": "x"}),
    "busy": Answer(503, b""),
    "failed": Answer(500, b""),
    "strange": Answer(200, b"planted"),
    "lost": b"",
}


@pytest.mark.parametrize("cached", [pytest.param(True, id="cache"), pytest.param(False, id="no cache")])
@pytest.mark.parametrize("lend", [pytest.param(True, id="session"), pytest.param(False, id="no session")])
@pytest.mark.parametrize("failure", FAILURES)
def test_variables(kuzzle, circle, failure, lend, cached):
    """No variable of our frames shows a secret after a failed exchange, as crash reports would send it."""
    kuzzle.next_answers.extend([FAILURES[failure]] * 2)
    circle.next_answers.extend([FAILURES[failure]] * 2)
    options = {"cache": TokenCache() if cached else None, "session": lent() if lend else None}
    calls = [
        lambda: refresh_kuzzle_token(kuzzle.url, JWT, **options),
        lambda: refresh_user_token(**SECRET, base_url=circle.url, **options),
        lambda: refresh_user_token(**{**SECRET, "user_token": None}, user_id="user-1", base_url=circle.url, **options),
    ]
    if lend:
        calls.append(lambda: refresh_kuzzle_token(kuzzle.url, cookie_auth=True, **options))
    for call in calls:
        with pytest.raises(RefreshError) as caught:
            call()
        assert list(frames_of(caught.value))
        assert variables_with_secrets(caught.value) == []


@pytest.mark.parametrize("name", [*CIRCLE, "user_id", "idempotency_key", "request_id", "base_url"])
@pytest.mark.parametrize("value", ["planted \n", b"planted", ["planted"], {"planted": "planted"}], ids=repr)
def test_variables_of_circles_complaints(name, value):
    """No variable of our frames shows an argument that is wrong: it may be a secret in the wrong place."""
    arguments = {**SECRET, name: value}
    if name == "user_id":
        del arguments["user_token"]
    with pytest.raises(InvalidArgumentError) as caught:
        refresh_user_token(**arguments)
    assert variables_with_secrets(caught.value) == []


@pytest.mark.parametrize("cookie_auth", [pytest.param(True, id="cookie"), pytest.param(False, id="jwt")])
@pytest.mark.parametrize("name", ["url", "jwt", "expires_in", "strategy"])
@pytest.mark.parametrize("value", ["planted \n", b"planted", ["planted"], {"planted": "planted"}], ids=repr)
def test_variables_of_kuzzles_complaints(name, value, cookie_auth):
    """Nor does it for a call to Kuzzle."""
    session = lent() if cookie_auth else None
    arguments = {"url": "http://kuzzle", "jwt": JWT, "session": session, "cookie_auth": cookie_auth, name: value}
    with pytest.raises(InvalidArgumentError) as caught:
        refresh_kuzzle_token(**arguments)
    assert variables_with_secrets(caught.value) == []


@pytest.mark.parametrize("kind", [KuzzleToken, UserToken])
def test_variables_of_malformed_tokens(kind):
    """Nor does it for a token that is read from somewhere."""
    jwt = {"jwt": JWT, "userToken": JWT, "refreshToken": JWT, "_id": "foo", "ttl": 5}
    with pytest.raises(InvalidArgumentError) as caught:
        kind.from_dict({**jwt, "expiresAt": "planted"})
    assert variables_with_secrets(caught.value) == []


def test_variables_while_interrupted(circle, kuzzle, monkeypatch):
    """Nor does it when a program is interrupted in the middle of an exchange."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(urllib3.HTTPConnectionPool, "urlopen", interrupt)
    for call in (
        lambda: refresh_kuzzle_token(kuzzle.url, JWT),
        lambda: refresh_user_token(**SECRET, base_url=circle.url),
    ):
        with pytest.raises(KeyboardInterrupt) as caught:
            call()
        assert variables_with_secrets(caught.value) == []


@pytest.mark.parametrize("what", ["call", "hit"])
def test_variables_while_interrupted_before_anything_is_hidden(kuzzle, monkeypatch, what):
    """Nor does it while the arguments are looked at, which may take a while the first time."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    cache = TokenCache()
    monkeypatch.setattr(cache._ledger, what, interrupt)
    for call in (
        lambda: refresh_kuzzle_token(kuzzle.url, JWT, cache=cache),
        lambda: refresh_user_token(**SECRET, cache=cache),
    ):
        with pytest.raises(KeyboardInterrupt) as caught:
            call()
        assert variables_with_secrets(caught.value) == []
    assert not kuzzle.requests


@pytest.mark.parametrize("make", [lambda: TokenCache("x"), lambda: TokenCache(lease="x"), lambda: MemoryStore("x")])
def test_nothing_is_spent_by_a_wrong_argument(make):
    """Whatever complains of it says so."""
    with pytest.raises(InvalidArgumentError) as caught:
        make()
    assert caught.value.spent is False


class TimeLimitError(Exception):
    """What Celery raises in a task that takes too long."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeLimitError])
@pytest.mark.parametrize("lend", [False, True])
def test_variables_of_a_call_without_a_cache_that_is_interrupted(kuzzle, kind, lend):
    """Nor do urllib3's frames, which have the request: they are left out."""
    session = lent() if lend else None

    def interrupt(number, frame):
        raise kind

    before = signal.signal(signal.SIGALRM, interrupt)
    kuzzle.next_answers.append(lambda request: (signal.setitimer(signal.ITIMER_REAL, 0.2), time.sleep(1), b"")[2])
    jwt = jwt_with({"_id": "planted", "exp": 9e9, "iat": 1})
    try:
        with pytest.raises(kind) as caught:
            refresh_kuzzle_token(kuzzle.url, f"kauth-{jwt}", cache=None, session=session, queuable=False, timeout=3)
    finally:
        signal.signal(signal.SIGALRM, before)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    inner = [frame for frame in shown.stack if "/tests/" not in frame.filename]
    assert inner
    assert [frame.name for frame in inner if jwt in str(frame.locals)] == []


def test_bytes_are_not_taken_for_strings(kuzzle):
    """Python's strictest mode (-bb) finds nothing in a refusal either."""
    script = f"import refresher; refresher.refresh_kuzzle_token({kuzzle.url!r}, {kuzzle.login(ago=7200)!r}, timeout=2)"
    done = subprocess.run([sys.executable, "-bb", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("refresher.errors.SignInRequiredError: ")


def test_malformed_headers(kuzzle, caplog):
    """Urllib3 logs what follows a malformed header. With a new token in it, it does not."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n"
    head += b"no header\r\nSet-Cookie: authToken=planted\r\n\r\n{}"
    with requests.Session() as session:
        for options in ({}, {"session": session}, {"session": session, "cookie_auth": True}):
            kuzzle.next_answers.append(head)
            with pytest.raises(ReplyError):
                refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800), cache=None, queuable=False, **options)
        logged = [record for record in caplog.records if record.name == "urllib3.connection"]
        assert [record.getMessage() for record in logged] == ["Failed to parse headers"] * 3
        assert "planted" not in caplog.text
        kuzzle.next_answers.append(head)
        session.get(f"{kuzzle.url}/_me", timeout=5)
        assert "planted" in caplog.text, "a request of somebody else is none of our business"


def test_cache_shows_nothing(kuzzle):
    """Nor do a cache and what is in it."""
    jwt = kuzzle.login(ago=1800)
    store = MemoryStore()
    cache = TokenCache(store)
    token = refresh_kuzzle_token(kuzzle.url, jwt, cache=cache)
    for each in (cache, store, *vars(cache).values(), *vars(cache._ledger).values()):
        shown = repr(each)
        assert jwt not in shown
        assert token.jwt not in shown
    shown = repr(vars(cache))
    assert jwt not in shown
    assert token.jwt not in shown


def test_own_objects_show_nothing(kuzzle):
    """What the library hands around shows no secret in a frame's variables."""
    frames = []
    kuzzle.fail_next("security.token.invalid")
    with pytest.raises(RefreshError) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    for frame, _ in traceback.walk_tb(caught.value.__traceback__):
        values = [value for value in frame.f_locals.values() if type(value).__module__.startswith("refresher")]
        frames += values
        assert not any("planted" in repr(value) for value in values)
    assert any(type(value).__name__ == "Request" for value in frames)
    assert "planted" not in repr(kuzzle.requests)
