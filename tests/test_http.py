"""What crosses the network, and what does not."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPResponse

import refresher._connections
from refresher import (
    KuzzleToken,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    UnavailableError,
    UserToken,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher.testing import Answer, FakeCircle, FakeKuzzle

pytestmark = pytest.mark.usefixtures("single")

JWT = "kauth-e30.e30.c2ln"
GOOD = b'{"result": {"_id": "foo", "expiresAt": -1, "jwt": "kauth-new", "ttl": -1}}'


@pytest.fixture
def strangers_server():
    """Another server, which should not hear of anything."""
    with FakeKuzzle() as server:
        yield server


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(kuzzle, strangers_server, status):
    """A redirect is an odd reply, and the stranger it leads to hears nothing."""
    kuzzle.next_answers.append(Answer(status, b"", {"Location": strangers_server.url + "/planted"}))
    with pytest.raises(ReplyError, match="redirect, which is not followed") as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert (caught.value.status, caught.value.spent) == (status, False)
    assert "planted" not in str(caught.value)
    assert strangers_server.requests == []


class StandIn(HTTPAdapter):
    """Answers in place of Kuzzle."""

    def send(self, request, *args, **options):
        answer = requests.Response()
        answer.status_code = 429
        answer.raw = HTTPResponse(io.BytesIO(b""), status=429, preload_content=False)
        return answer


@pytest.mark.parametrize("what", ["send", "get_adapter"])
def test_stand_ins_for_requests(kuzzle, monkeypatch, what):
    """What stands in for requests in a test, as `responses` and `requests-mock` do, gets our requests."""
    if what == "send":
        monkeypatch.setattr(HTTPAdapter, "send", lambda adapter, request, **_: StandIn().send(request))
    else:
        monkeypatch.setattr(requests.Session, "get_adapter", lambda session, url: StandIn())
    with pytest.raises(UnavailableError):
        refresh_kuzzle_token(kuzzle.url, JWT, queuable=False)
    assert kuzzle.requests == []


def test_stand_ins_for_connections(kuzzle, monkeypatch):
    """So does what stands in for urllib3's connections, as `vcrpy` does."""
    real = HTTPConnectionPool.ConnectionCls
    made = []

    class Recorder:
        def __init__(self, *args, **options):
            made.append(self)
            self.real = real(*args, **options)

        def __getattr__(self, name):
            return getattr(self.real, name)

    refresher._connections._session_of.cache_clear()
    monkeypatch.setattr(HTTPConnectionPool, "ConnectionCls", Recorder)
    assert refresh_kuzzle_token(kuzzle.url, kuzzle.login(ago=1800)).kuid == "foo"
    assert made


def test_netrc_does_not_replace_the_token(kuzzle, tmp_path):
    """A .netrc entry for the host changes nothing."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login planted password planted\n")
    (tmp_path / ".netrc").chmod(0o600)
    kuzzle.next_answers.append(Answer(200, GOOD))
    refresh_kuzzle_token(kuzzle.url, JWT)
    assert kuzzle.requests[0].headers["Authorization"] == f"Bearer {JWT}"


def test_cookies_are_not_kept(kuzzle):
    """What one user's answer sets is not sent with the next user's request: neither our session nor theirs."""
    session = requests.Session()
    for each in (None, None, session, session):
        kuzzle.next_answers.append(Answer(200, GOOD, {"Set-Cookie": "planted=planted; Path=/"}))
        refresh_kuzzle_token(kuzzle.url, JWT, session=each)
    assert not any("Cookie" in request.headers for request in kuzzle.requests)
    assert not session.cookies


def test_session_is_used_as_it_is(kuzzle):
    """Headers, parameters, cookies and adapters of the caller's session count; its hooks see no token."""
    seen = []

    class Adapter(HTTPAdapter):
        def send(self, request, **kwargs):
            seen.append(request.url)
            return super().send(request, **kwargs)

    session = requests.Session()
    session.mount(kuzzle.url, Adapter())
    session.headers["X-Tenant"] = "tenant-1"
    session.headers["Accept-Encoding"] = None
    session.params = {"gateway": "key"}
    session.auth = ("user", "password")
    session.cookies.set("sticky", "node-1")
    session.hooks["response"].append(lambda *args, **kwargs: pytest.fail("a hook was called"))
    before = dict(vars(session), cookies=session.cookies.get_dict(), headers=dict(session.headers))
    kuzzle.next_answers.append(Answer(200, GOOD))
    refresh_kuzzle_token(kuzzle.url, JWT, expires_in="2h", session=session)
    (sent,) = kuzzle.requests
    assert seen == [f"{kuzzle.url}/_refreshToken?expiresIn=2h&gateway=key"]
    assert sent.headers["X-Tenant"] == "tenant-1"
    assert sent.headers["Cookie"] == "sticky=node-1"
    assert sent.headers["Authorization"] == f"Bearer {JWT}"
    assert sent.headers["Accept-Encoding"] == "identity"
    assert dict(vars(session), cookies=session.cookies.get_dict(), headers=dict(session.headers)) == before


class Proxy(BaseHTTPRequestHandler):
    """Notes what it is asked for, and refuses it."""

    def do_POST(self):
        self.server.asked.append(self.requestline)
        self.send_response(407)
        self.end_headers()

    do_CONNECT = do_POST  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def proxy():
    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield server
        server.shutdown()
        thread.join()


def test_proxy_from_the_environment(proxy, monkeypatch):
    """The environment's proxies are asked. One that refuses has spent nothing."""
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("https_proxy", proxy.url)
    with pytest.raises(ReplyError) as plain:
        refresh_kuzzle_token("http://kuzzle.example", JWT)
    with pytest.raises(UnavailableError, match="could not be reached: ") as tunnel:
        refresh_kuzzle_token("https://kuzzle.example", JWT)
    assert (plain.value.status, plain.value.spent) == (407, False)
    assert tunnel.value.spent is False
    assert proxy.asked == [
        "POST http://kuzzle.example/_refreshToken HTTP/1.1",
        "CONNECT kuzzle.example:443 HTTP/1.1"
        if proxy.asked[1].endswith("1")
        else "CONNECT kuzzle.example:443 HTTP/1.0",
    ]


def test_proxy_that_is_none(monkeypatch):
    """A proxy that can't be one is told, and nothing was spent."""
    monkeypatch.setenv("http_proxy", "http://")
    with pytest.raises(UnavailableError, match="could not be reached") as caught:
        refresh_kuzzle_token("http://kuzzle.example", JWT)
    assert caught.value.spent is False


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def tls_server(authority):
    """Serve FakeKuzzle over TLS with a certificate for the host names that a test asks for."""
    servers = []

    def start(*names, **certificate):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names, **certificate).configure_cert(context)
        fake = FakeKuzzle()
        fake.start()
        fake._server.socket = context.wrap_socket(
            fake._server.socket, server_side=True, do_handshake_on_connect=False
        )
        servers.append(fake)
        return fake, fake.url.replace("http:", "https:")

    yield start
    for fake in servers:
        fake.stop()


def test_authority_from_the_environment(tls_server, authority, tmp_path, monkeypatch):
    """REQUESTS_CA_BUNDLE names the authorities to trust."""
    fake, url = tls_server("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    fake.next_answers.append(Answer(200, GOOD))
    assert refresh_kuzzle_token(url, JWT).kuid == "foo"


class Tunnel(Proxy):
    """Opens tunnels."""

    def do_CONNECT(self):
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as inside:
            self.send_response(200)
            self.end_headers()
            self.server.asked.append(self.requestline)
            back = threading.Thread(target=self.relay, args=(inside, self.connection))
            back.start()
            self.relay(self.connection, inside)
            back.join()

    def relay(self, one, other):
        with contextlib.suppress(ConnectionError):  # who does not trust the certificate resets
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


def test_tunnel(proxy, tls_server, authority, tmp_path, monkeypatch):
    """A proxy opens a tunnel, and in it there is TLS as ever."""
    fake, url = tls_server("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    proxy.RequestHandlerClass = Tunnel
    for name, value in {"no_proxy": "", "NO_PROXY": "", "https_proxy": proxy.url}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnavailableError, match=r"self-signed|local issuer"):
        refresh_kuzzle_token(url, fake.login(ago=1800), queuable=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    assert refresh_kuzzle_token(url, fake.login(ago=1800)).kuid == "foo"
    assert len(proxy.asked) == 2


def test_deadline_within_tls(tls_server, authority, tmp_path, monkeypatch):
    """An answer that comes byte by byte through TLS ends in time too."""
    fake, url = tls_server("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    fake.drip_next(0.05)
    started = time.monotonic()
    with pytest.raises(OutcomeUnknownError, match="TimeoutError"):
        refresh_kuzzle_token(url, fake.login(ago=1800), timeout=0.7, cache=None, queuable=False)
    assert 0.4 < time.monotonic() - started < 1.5


@pytest.mark.parametrize("flaw", ["unknown authority", "another name", "expired"])
def test_certificates(tls_server, authority, tmp_path, monkeypatch, flaw):
    """A certificate that does not prove who answers ends it: nothing is sent, nothing spent, and it's told."""
    wrong = {
        "unknown authority": (["127.0.0.1"], {}, "unable to get local issuer certificate"),
        "another name": (["127.0.0.2"], {}, "certificate is not valid for '127.0.0.1'"),
        "expired": (["127.0.0.1"], {"not_after": datetime.now(UTC) - timedelta(1)}, "certificate has expired"),
    }
    names, certificate, complaint = wrong[flaw]
    fake, url = tls_server(*names, **certificate)
    (authority if flaw != "unknown authority" else trustme.CA()).cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with pytest.raises(UnavailableError, match=complaint) as caught:
        refresh_kuzzle_token(url, JWT)
    assert caught.value.spent is False
    assert fake.requests == []


def test_missing_authorities(tls_server, monkeypatch):
    """A CA bundle that is not there is told before anything is sent."""
    _, url = tls_server("127.0.0.1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(url, JWT)
    assert caught.value.spent is False


def test_no_tls_on_the_other_side(kuzzle):
    """A handshake that fails has sent nothing."""
    with pytest.raises(UnavailableError, match="could not be reached") as caught:
        refresh_kuzzle_token(kuzzle.url.replace("http:", "https:"), JWT)
    assert caught.value.spent is False


@pytest.fixture
def silent():
    """A server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_silence(silent):
    """A request without an answer leaves the outcome open."""
    with pytest.raises(OutcomeUnknownError, match="did not answer") as caught:
        refresh_kuzzle_token(silent, JWT, timeout=0.1)
    assert (caught.value.spent, caught.value.status) == (None, None)


def test_silence_in_the_handshake(silent):
    """A handshake without an answer has sent nothing."""
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(silent.replace("http:", "https:"), JWT, timeout=0.5)
    assert caught.value.spent is False


def test_timeout_is_for_both_of_circles_requests(circle, silent):
    """The exchange and the refresh share the timeout: what the first took is not there for the second."""
    started = time.monotonic()
    circle.next_answers.append(lambda request: time.sleep(0.3) or Answer(200, {"data": {"userToken": "u"}}))
    circle.next_answers.append(lambda request: time.sleep(0.3) or Answer(200, {"data": {"userToken": "u"}}))
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_user_token(
            user_id="user-1", refresh_token="r", device_id="d", api_key="k", base_url=circle.url, timeout=0.4
        )
    assert caught.value.idempotency_key
    assert len(circle.requests) == 2
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="hung up"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", id="half the body"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="a chunk of no size"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{", id="half a chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n{}", id="two lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n", id="many headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", id="a long header"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", id="no HTTP"),
        pytest.param(b"HTTP/1.1 abc\r\n\r\n", id="no status"),
    ],
)
def test_broken_answers(kuzzle, answer):
    """An answer that breaks off, or is none, leaves the outcome open."""
    kuzzle.next_answers.append(answer)
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert caught.value.spent is None


def bomb(size):
    return gzip.compress(b'{"padding": "' + b"x" * size + b'"}')


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(200, b"x" * 100_000_000), id="100 MB"),
        pytest.param(Answer(200, bomb(2**26), {"Content-Encoding": "gzip"}), id="a gzip bomb"),
        pytest.param(
            Answer(200, zlib.compress(b"x" * 2**26), {"Content-Encoding": "deflate"}), id="a deflate bomb"
        ),
        pytest.param(Answer(200, GOOD, {"Content-Encoding": "gzip"}), id="gzip that is none"),
        pytest.param(Answer(200, GOOD, {"Content-Encoding": "br"}), id="an unknown packing"),
        pytest.param(Answer(200, b"[" * 1_000_000), id="deep nesting"),
        pytest.param(Answer(200, b'{"result": ' + b"[" * 500_000), id="deep nesting inside"),
        pytest.param(Answer(200, b'{"result": ' + b"9" * 5000 + b"}"), id="a long number"),
        pytest.param(Answer(200, b'{"result": NaN}'), id="NaN"),
        pytest.param(Answer(200, b"\xff\xfe\xfd"), id="no text"),
        pytest.param(Answer(200, GOOD[:-1]), id="half a JSON"),
    ],
)
def test_strange_bodies(kuzzle, answer):
    """A body that can't be Kuzzle's is a ReplyError, however large, packed or nested it is."""
    kuzzle.next_answers.append(answer)
    with pytest.raises(ReplyError):
        refresh_kuzzle_token(kuzzle.url, JWT)


def test_bomb_is_not_unpacked(kuzzle):
    """A bomb takes no more memory than an answer may be long."""
    kuzzle.next_answers.append(Answer(200, bomb(2**27), {"Content-Encoding": "gzip"}))
    tracemalloc.start()
    try:
        with pytest.raises(ReplyError):
            refresh_kuzzle_token(kuzzle.url, JWT)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_connections_are_kept(circle):
    """Calls that follow one another use one connection."""
    seen = []
    for _ in range(2):
        circle.next_answers.append(Answer(200, {"data": {"userToken": "u"}}))
        refresh_user_token(user_token="u", refresh_token="r", device_id="d", api_key="k", base_url=circle.url)
        seen.append(set(circle._server.connections))
    assert len(seen[0]) == 1
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(200, b"\xef\xbb\xbf" + GOOD), id="a byte order mark"),
        pytest.param(Answer(200, GOOD.decode().encode("utf-16")), id="UTF-16"),
        pytest.param(Answer(200, gzip.compress(GOOD), {"Content-Encoding": "gzip"}), id="gzip"),
        pytest.param(Answer(200, zlib.compress(GOOD), {"Content-Encoding": "deflate"}), id="deflate"),
        pytest.param(Answer(200, GOOD, {"Content-Encoding": "identity"}), id="identity"),
        pytest.param(Answer(200, GOOD + b" " * (2**20 - len(GOOD))), id="1 MiB"),
        pytest.param(
            b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n4a\r\n" + GOOD + b"\r\n0\r\n\r\n", id="chunked"
        ),
        pytest.param(b"HTTP/1.1 200\r\n\r\n" + GOOD, id="till the end"),
    ],
)
def test_unusual_bodies(kuzzle, answer):
    """A new token is not lost over the way it is packed."""
    kuzzle.next_answers.append(answer)
    assert refresh_kuzzle_token(kuzzle.url, JWT).jwt == "kauth-new"


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        pytest.param("7", 7, 7, id="seconds"),
        pytest.param(" 0 ", 0, 0, id="none"),
        pytest.param(
            format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), 3000, 3600, id="a date"
        ),
        pytest.param("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0, id="a date long gone"),
    ],
)
def test_retry_after(kuzzle, value, low, high):
    """Retry-After is passed on in seconds."""
    kuzzle.next_answers.append(Answer(429, b"", {"Retry-After": value}))
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert low <= caught.value.retry_after <= high


@pytest.mark.parametrize("value", ["soon", "-1", "1e3", "9" * 40, "\u0667", "Wed, 99 Oct 2015", ""])
def test_odd_retry_after(kuzzle, value):
    """A Retry-After that says nothing is passed over."""
    kuzzle.next_answers.append(f"HTTP/1.1 429\r\nContent-Length: 0\r\nRetry-After: {value}\r\n\r\n".encode())
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert caught.value.retry_after is None


def test_request_id_of_the_service(circle):
    """If the service names the request itself, its name counts, unless it quotes what was sent."""
    theirs = "0b8af4c5-6a3b-4bb2-90f6-0a7a56d3ba6f"
    secret = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    got = []
    for answered in (theirs, secret, "no uuid"):
        circle.next_answers.append(Answer(429, b"", {"X-Request-Id": answered}))
        with pytest.raises(UnavailableError) as caught:
            refresh_user_token(
                user_token="u", refresh_token=secret, device_id="d", api_key="k", base_url=circle.url
            )
        got.append(caught.value.request_id)
    ours = [request.headers["X-Request-Id"] for request in circle.requests]
    assert got == [theirs, ours[1], ours[2]]


def refresh_each(kuzzle, circle, answer):
    """Let both services answer the same, and see that what comes of it is of the right kind."""
    kuzzle.next_answers.append(answer)
    circle.next_answers.append(answer)
    credential = {"user_token": "u", "refresh_token": "r", "device_id": "d", "api_key": "k"}
    for kind, call in (
        (KuzzleToken, lambda: refresh_kuzzle_token(kuzzle.url, JWT, timeout=5)),
        (UserToken, lambda: refresh_user_token(**credential, base_url=circle.url, timeout=5)),
    ):
        try:
            result = call()
        except RefreshError:
            continue
        assert type(result) is kind
        assert kind.from_dict(result.to_dict()) == result
    assert not kuzzle.next_answers
    assert not circle.next_answers


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


@fuzz
@given(answer=st.binary(max_size=300))
def test_any_bytes(fake_kuzzle, fake_circle, answer):
    """Any bytes whatsoever give a result or a RefreshError."""
    refresh_each(fake_kuzzle, fake_circle, answer)


latin = st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40)
names = st.sampled_from([
    "Retry-After", "X-Request-Id", "Set-Cookie", "Content-Encoding", "Location", "Content-Type",
    "Content-Length", "Transfer-Encoding", "Connection", "X",
])  # fmt: skip
values = st.one_of(latin, st.sampled_from(["gzip", "chunked", "5", "authToken=a", "authToken", "close", "é"]))


@fuzz
@given(status=st.integers(0, 1200), headers=st.dictionaries(names, values), body=st.binary(max_size=200))
def test_any_answer(fake_kuzzle, fake_circle, status, headers, body):
    """So does any status with any headers and any body."""
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    refresh_each(fake_kuzzle, fake_circle, f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just(JWT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
members = st.sampled_from([
    "result", "data", "error", "message", "code", "id", "status", "_id", "jwt", "expiresAt", "ttl",
    "userToken", "refreshToken", "userID", "encryptionKey",
])  # fmt: skip
likely = st.dictionaries(
    members, json_values | st.sampled_from([-1, 10**12, "kauth-x", "é", "\ud800"]), max_size=6
)
nested = st.dictionaries(st.sampled_from(["result", "data", "error"]), likely | json_values, max_size=3)


@fuzz
@given(status=st.sampled_from([200, 201, 400, 401, 403, 429, 500, 503]), body=nested | likely | json_values)
def test_any_json(fake_kuzzle, fake_circle, status, body):
    """So does any JSON, the service's own members with the wrong things in them included."""
    refresh_each(fake_kuzzle, fake_circle, Answer(status, body))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_own_session_is_made_anew_in_a_child():
    """A forked child does not share its parent's connections."""
    mine = refresher._connections.own_session()
    assert refresher._connections.own_session() is mine
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        same = refresher._connections.own_session() is mine
        os.write(write, b"same" if same else b"another")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"another"


def test_fake_circle_elsewhere():
    """FakeCircle knows its two paths and no other."""
    with FakeCircle() as fake:
        assert requests.get(fake.url + "/v1/w3s/users/token", timeout=5).status_code == 404
        assert requests.post(fake.url + "/elsewhere", timeout=5).status_code == 404
