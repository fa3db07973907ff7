"""What stands in for HTTP in other people's tests gets our requests, with and without a session of theirs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import time
from unittest import mock

import pytest
import requests
import requests_mock
import responses
import urllib3
import vcr
from helpers import jwt_with
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPResponse

from refresher import KuzzleAuth, TokenCache, _http
from refresher._system import threadless
from refresher.errors import OutcomeUnknownError
from refresher.services import Caller, Request
from refresher.testing import Answer, FakeKuzzle

URL = "http://kuzzle.example/_refreshToken"
GOOD = {"result": {"jwt": "kauth-new"}}


def send(url=URL, session=None):
    """Send a request, and read the reply."""
    return _http.send(
        Request(service="kuzzle", url=url, headers={"Authorization": "Bearer b"}, secret="b", request_id="id-1"),
        session=session,
        caller=Caller(lambda: time.monotonic() + 5),
        steady=time.monotonic,
    )


@pytest.fixture(params=["without a session", "with a session"])
def session(request):
    """None, or a session."""
    with requests.Session() as session:
        yield session if request.param == "with a session" else None


def test_requests_mock(session):
    """requests-mock answers, and what it sets is in no jar."""
    with requests_mock.Mocker() as mocker:
        mocker.post(URL, json=GOOD, headers={"Set-Cookie": "authToken=planted", "Date": "now"})
        reply = send(session=session)
        assert (reply.json().reveal(), reply.headers["date"]) == (GOOD, "now")
        assert mocker.last_request.headers["Authorization"] == "Bearer b"
        assert mocker.call_count == 1
    assert session is None or not session.cookies


def test_requests_mock_as_a_fixture(session, requests_mock):
    """So does its fixture for pytest."""
    requests_mock.post(URL, json=GOOD, status_code=503)
    assert send(session=session).status == 503


def test_requests_mock_for_one_session(fake_kuzzle):
    """It can stand in for one session only, and only for a while."""
    with requests.Session() as session:
        with requests_mock.Mocker(session=session) as mocker:
            mocker.post(fake_kuzzle.url, json=GOOD, headers={"Set-Cookie": "authToken=planted"})
            assert send(fake_kuzzle.url, session).json().reveal() == GOOD
            assert not fake_kuzzle.requests
        fake_kuzzle.next_answers.extend([Answer(503, b""), Answer(503, b"")])
        assert send(fake_kuzzle.url, session).status == 503
        assert send(fake_kuzzle.url).status == 503
        assert not session.cookies


def test_requests_mock_for_an_auth_object():
    """An adapter of its own, on a session that refreshes use too, answers those that a 401 asks for."""
    url, now = "http://kuzzle.example", int(time.time())
    old, new = (jwt_with({"_id": "foo", "iat": now - age, "exp": now - age + 3600}) for age in (100, 0))
    adapter, refusal = requests_mock.Adapter(), {"error": {"id": "security.token.invalid", "status": 401}}
    token = {"_id": "foo", "jwt": new, "expiresAt": (now + 3600) * 1000, "ttl": 3_600_000}
    adapter.register_uri("POST", URL, json={"action": "refreshToken", "result": token})
    adapter.register_uri("GET", url, [{"status_code": 401, "json": refusal}, {"json": {}}])
    with requests.Session() as session:
        session.mount("http://", adapter)
        auth = KuzzleAuth(url, old, cache=TokenCache(), session=session, timeout=5)
        assert session.get(url, auth=auth, timeout=5).status_code == 200
    assert [request.method for request in adapter.request_history] == ["GET", "POST", "GET"]


@pytest.mark.parametrize("of", ["everything", "one session"])
def test_requests_mock_answers_a_401(of):
    """It has a lock while an answer is read, so the refresh that this asks for does not wait for another thread."""
    url, now = "http://kuzzle.example", int(time.time())
    old, new = (jwt_with({"_id": "foo", "iat": now - age, "exp": now - age + 3600}) for age in (100, 0))
    refusal = {"error": {"id": "security.token.invalid", "status": 401}}
    token = {"_id": "foo", "jwt": new, "expiresAt": (now + 3600) * 1000, "ttl": 3_600_000}
    with requests.Session() as session:
        mocked = session if of == "one session" else None
        with requests_mock.Mocker(session=mocked) as mocker:
            mocker.post(URL, json={"action": "refreshToken", "result": token})
            mocker.get(url, [{"status_code": 401, "json": refusal}, {"json": {}}])
            auth = KuzzleAuth(url, old, cache=TokenCache(), session=mocked, timeout=5)
            assert session.get(url, auth=auth, timeout=5).status_code == 200
    assert [request.method for request in mocker.request_history] == ["GET", "POST", "GET"]
    assert not threadless.get(), "other refreshes have threads of their own, as ever"


def test_requests_mock_does_not_know(session):
    """What it knows no answer to leads nowhere."""
    with requests_mock.Mocker(), pytest.raises(OutcomeUnknownError, match="NoMockAddress"):
        send(session=session)


def test_responses(session):
    """responses answers."""
    with responses.RequestsMock() as mocker:
        mocker.post(URL, json=GOOD, headers={"Set-Cookie": "authToken=planted"})
        reply = send(session=session)
        assert (reply.json().reveal(), reply.cookies) == (GOOD, {"authToken": "planted"})
        assert mocker.calls[0].request.headers["Authorization"] == "Bearer b"
    assert session is None or not session.cookies


@responses.activate
def test_responses_as_a_decorator(session):
    """So does its decorator. What is not mocked leads nowhere."""
    responses.post(URL, body=b"", status=429, headers={"Retry-After": "7"})
    assert send(session=session).headers["Retry-After"] == "7"
    with pytest.raises(OutcomeUnknownError):
        send("http://elsewhere.example", session)


def test_vcr(session, tmp_path):
    """A cassette records, right after other traffic too, and then plays without a server. Then it's gone."""
    cassette = str(tmp_path / "cassette.yaml")
    with FakeKuzzle() as kuzzle:
        kuzzle.next_answers.extend([Answer(200, {"n": number}, {"Set-Cookie": "a=b"}) for number in range(3)])
        url = kuzzle.url + "/_refreshToken"
        assert send(url, session).json().reveal() == {"n": 0}
        with vcr.use_cassette(cassette) as tape:
            reply = send(url, session)
            assert (reply.json().reveal(), reply.cookies) == ({"n": 1}, {"a": "b"})
            assert len(tape) == 1
        assert send(url, session).json().reveal() == {"n": 2}
        assert len(kuzzle.requests) == 3
    with vcr.use_cassette(cassette, record_mode="none") as tape:
        reply = send(url, session)
        assert (reply.json().reveal(), reply.cookies) == ({"n": 1}, {"a": "b"})
        assert tape.play_count == 1
        with pytest.raises(OutcomeUnknownError, match="CannotOverwriteExistingCassette"):
            send(url, session)


def test_vcr_over_tls(session, tmp_path):
    """A cassette plays what was recorded over TLS."""
    (tmp_path / "cassette.yaml").write_text(
        textwrap.dedent("""
            version: 1
            interactions:
            - request: {method: POST, uri: "https://kuzzle.example/_refreshToken", body: null, headers: {}}
              response: {status: {code: 200, message: OK}, headers: {}, body: {string: '{"n": 1}'}}
        """)
    )
    with vcr.use_cassette(str(tmp_path / "cassette.yaml"), record_mode="none"):
        assert send("https://kuzzle.example/_refreshToken", session).json().reveal() == {"n": 1}


def test_vcr_before_us(tmp_path):
    """It may stand in for urllib3 when our module is first imported, and real requests work afterwards."""
    program = """
        import sys
        import vcr
        from refresher.testing import Answer, FakeKuzzle

        with FakeKuzzle() as kuzzle:
            kuzzle.next_answers.extend([Answer(200, {"n": 1}), Answer(200, {"n": 2})])
            with vcr.use_cassette(sys.argv[1]) as tape:
                assert "refresher._http" not in sys.modules
                from test_stand_ins import send
                print(send(kuzzle.url).json().reveal(), len(tape))
            print(send(kuzzle.url).json().reveal(), len(tape))
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(program), str(tmp_path / "cassette.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == ("{'n': 1} 1\n{'n': 2} 1\n", "")


def test_pytest_httpserver(session, httpserver):
    """pytest-httpserver is a server like any other."""
    httpserver.expect_request("/_refreshToken", method="POST").respond_with_json(GOOD)
    assert send(httpserver.url_for("/_refreshToken"), session).json().reveal() == GOOD
    httpserver.check()


@pytest.mark.parametrize("how", ["replaced", "mocked", "specified"])
def test_adapters_that_are_replaced(session, how):
    """Whoever replaces what requests sends with gets our requests, too."""
    answer = requests.Response()
    answer.raw = HTTPResponse(io.BytesIO(b""), status=429, preload_content=False)
    options = {
        "replaced": {"new": mock.Mock(return_value=answer)},
        "mocked": {},
        "specified": {"autospec": True},
    }
    with mock.patch.object(HTTPAdapter, "send", **options[how]) as stand_in:
        stand_in.return_value = answer
        assert send(session=session).status == 429
        assert stand_in.called


@pytest.mark.parametrize("of", ["made up", "empty", "read before"])
def test_responses_without_a_connection(session, of):
    """A response that is made up, or was read before, has a status, headers and a content like any other."""
    answer = requests.Response()
    answer.status_code, answer.headers["Retry-After"] = 429, "7"
    if of == "made up":
        answer._content = b"busy"
    if of == "read before":
        answer.raw = HTTPResponse(io.BytesIO(b"busy"), status=429, preload_content=False)
        assert answer.content
    with mock.patch("requests.Session.send", return_value=answer):
        for _ in range(2):
            reply = send(session=session)
            assert (reply.status, reply.headers["Retry-After"]) == (429, "7")
            assert reply.body == (b"" if of == "empty" else b"busy")


@pytest.mark.parametrize("is_used", [False, True])
def test_pyopenssl(fake_kuzzle, monkeypatch, is_used):
    """Its sockets are requests' own affair, if it was put in place of Python's ``ssl``."""
    build, built = HTTPAdapter.build_response, []

    def build_response(*arguments):
        built.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(HTTPAdapter, "build_response", build_response)
    monkeypatch.setattr(urllib3.util, "IS_PYOPENSSL", is_used)
    fake_kuzzle.next_answers.append(Answer(200, GOOD))
    assert send(fake_kuzzle.url, None).json().reveal() == GOOD
    assert len(built) == is_used


@pytest.mark.parametrize("module", ["tests", "urllib3.connection"])
def test_connections_that_are_replaced(session, fake_kuzzle, monkeypatch, module):
    """So does whoever replaces urllib3's connections, or urllib3 itself: urllib3-future has names like it."""
    real, made = HTTPConnectionPool.ConnectionCls, []

    class Recorder:
        def __init__(self, *args, **options):
            made.append(self)
            self.real = real(*args, **options)

        def __getattr__(self, name):
            return getattr(self.real, name)

    Recorder.__module__ = module
    monkeypatch.setattr(HTTPConnectionPool, "ConnectionCls", Recorder)
    fake_kuzzle.next_answers.append(Answer(200, GOOD))
    assert send(fake_kuzzle.url, session).json().reveal() == GOOD
    assert made
