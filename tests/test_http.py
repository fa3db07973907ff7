"""What crosses the network, and what does not."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import gzip
import io
import itertools
import math
import os
import signal
import socket
import ssl
import struct
import threading
import time
import traceback
import tracemalloc
import weakref
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.client import ResponseNotReady
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import requests
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, Retry

from refresher import (
    KuzzleToken,
    OutcomeUnknownError,
    RefreshError,
    ReplyError,
    TokenCache,
    UnavailableError,
    UserToken,
    _http,
    refresh_kuzzle_token,
    refresh_user_token,
)
from refresher._text import Secret
from refresher.services import Caller, Request
from refresher.testing import Answer, FakeCircle, FakeKuzzle

JWT = "kauth-e30.e30.c2ln"
GOOD = b'{"result": {"_id": "foo", "expiresAt": -1, "jwt": "kauth-new", "ttl": -1}}'
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture(autouse=True)
def new_connections(monkeypatch):
    """No test has another's connections, or its environment. It has its own until it ends."""
    _http._pools.cache_clear()
    monkeypatch.setattr(_http, "_PERIOD", 1e9)


def post(url, *, seconds=5.0, connect=None, answer_by=None, depart=lambda: None, session=None, **parts):
    """Send a request, and wait for some seconds: for the answer, or for the connection alone."""
    ends, has_left = [time.monotonic() + (connect or seconds), time.monotonic() + seconds], []

    def leave():
        depart()
        has_left.append(True)

    parts = {"headers": {"Authorization": f"Bearer {JWT}"}, "secret": JWT, "request_id": "id-1", **parts}
    return _http.send(
        Request(service="kuzzle", url=url, **parts),
        session=session,
        caller=Caller(answer_by or (lambda: ends[len(has_left)]), leave),
        steady=time.monotonic,
    )


# After some errors Python and urllib3 leave it to the garbage collector to close a socket.
left_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Peer:
    """Accepts connections on the loopback, and behaves on each in a thread of its own."""

    def __init__(self, behave, context=None):
        self.behave, self.context = behave, context
        self.connections = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.url = f"{'https' if context else 'http'}://{self.address}/"

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        for sock in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        self.connections.append(client)
        with contextlib.suppress(OSError):
            if self.context:
                client = self.context.wrap_socket(client, server_side=True)
                self.connections.append(client)
            self.behave(client)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        client.close()


def read(client):
    """Read a request, to the end of its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := client.recv(65536)):
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body


def answering(*answers, then=None):
    """Give the answers to all requests on a connection in turn; then hang up, or behave."""

    def behave(client):
        for answer in answers:
            if not read(client):
                return
            for piece in [answer] if isinstance(answer, bytes) else answer:
                if isinstance(piece, bytes):
                    client.sendall(piece)
                else:
                    time.sleep(piece)
        (then or time.sleep)(client if then else 0.3)

    return behave


def reply(number, *, more=b""):
    """Write down a reply that has a number, and perhaps more than its length says."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n" + b'{"n":%d}' % number + more


# What is sent


@pytest.mark.parametrize("lent", [False, True])
def test_request(lent):
    """Head, cookies and body are sent as written down."""
    pieces = []
    behave = lambda client: pieces.append(read(client)) or client.sendall(EMPTY)  # noqa: E731
    with Peer(behave) as peer, requests.Session() as session:
        post(
            peer.url + "path?query=1",
            headers={"Authorization": "Bearer b", "X-User-Token": "u"},
            cookies={"authToken": "secret", "held back": None},
            body=b'{"refreshToken": "r"}',
            session=session if lent else None,
        )
    head, _, body = pieces[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert first == "POST /path?query=1 HTTP/1.1"
    assert headers["Authorization"] == "Bearer b"
    assert headers["X-User-Token"] == "u"
    assert headers["Cookie"] == "authToken=secret"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("refresher/")
    assert body == b'{"refreshToken": "r"}'


def test_large_request():
    """A request that does not fit into the system's buffers is sent to its end."""
    received = []
    with Peer(lambda client: time.sleep(0.8) or received.append(read(client)) or client.sendall(EMPTY)) as peer:
        post(peer.url, body=b"x" * 8_000_000)
    assert len(received[0]) > 8_000_000


def test_large_request_that_nobody_reads():
    """If the peer doesn't read it, the wait ends in time, and the outcome is open."""
    with Peer(lambda client: time.sleep(2)) as peer:
        started = time.monotonic()
        with pytest.raises(OutcomeUnknownError, match="timed out"):
            post(peer.url, body=b"x" * 8_000_000, seconds=0.3)
        assert time.monotonic() - started < 1


def test_large_request_that_is_read_in_part():
    """Its parts share the time that there is."""

    def behave(client):
        time.sleep(0.7)
        while b"\r\n\r\n" not in client.recv(65536):
            pass
        time.sleep(3)

    with Peer(behave) as peer:
        started = time.monotonic()
        with pytest.raises(OutcomeUnknownError, match="timed out"):
            post(peer.url, headers={"X-Large": "x" * 8_000_000}, body=b"x" * 8_000_000, seconds=1)
        assert time.monotonic() - started < 1.5


def test_words_for_a_name_that_is_unknown():
    """Some systems have numbers for that which are those of other errors."""
    assert _http._reason(socket.gaierror(8, "nodename nor servname provided")) == "unknown host name"


@pytest.fixture
def strangers_server():
    """Another server, which should not hear of anything."""
    with FakeKuzzle() as server:
        yield server


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("lent", [False, True])
def test_redirects_are_not_followed(kuzzle, strangers_server, status, lent):
    """A redirect is a reply like any other, and the stranger it leads to hears nothing."""
    kuzzle.next_answers.append(Answer(status, b"", {"Location": strangers_server.url + "/planted"}))
    with requests.Session() as session:
        assert post(kuzzle.url, session=session if lent else None).status == status
    assert strangers_server.requests == []


@pytest.mark.parametrize("lent", [False, True])
def test_netrc_does_not_replace_the_token(kuzzle, tmp_path, lent):
    """A .netrc entry for the host changes nothing."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login planted password planted\n")
    (tmp_path / ".netrc").chmod(0o600)
    kuzzle.next_answers.append(Answer(200, GOOD))
    with requests.Session() as session:
        post(kuzzle.url, session=session if lent else None)
    assert kuzzle.requests[0].headers["Authorization"] == f"Bearer {JWT}"


def test_cookies_are_not_kept(kuzzle):
    """What one user's answer sets is not sent with the next user's request: neither our session nor theirs."""
    with requests.Session() as session:
        for each in (None, None, session, session):
            kuzzle.next_answers.append(Answer(200, GOOD, {"Set-Cookie": "planted=planted; Path=/"}))
            assert post(kuzzle.url, session=each).cookies == {"planted": "planted"}
        assert not session.cookies
    assert not any("Cookie" in request.headers for request in kuzzle.requests)


def test_session_is_used_as_it_is(kuzzle):
    """Headers, parameters, cookies and adapters of the caller's session count; its hooks see no token."""
    seen = []

    class Adapter(HTTPAdapter):
        def send(self, request, **kwargs):
            seen.append(request.url)
            return super().send(request, **kwargs)

    with requests.Session() as session:
        session.mount(kuzzle.url, Adapter())
        session.headers["X-Tenant"] = "tenant-1"
        session.headers["Accept-Encoding"] = None
        session.headers["authorization"] = "planted"
        session.params = {"gateway": "key"}
        session.auth = ("user", "password")
        session.cookies.set("sticky", "node-1")
        session.cookies.set("authToken", "planted")
        session.hooks["response"].append(lambda *args, **kwargs: pytest.fail("a hook was called"))
        before = dict(vars(session), cookies=session.cookies.get_dict(), headers=dict(session.headers))
        kuzzle.next_answers.append(Answer(200, GOOD))
        post(f"{kuzzle.url}/_refreshToken?expiresIn=2h", session=session, cookies={"authToken": "a"})
        assert dict(vars(session), cookies=session.cookies.get_dict(), headers=dict(session.headers)) == before
    (sent,) = kuzzle.requests
    assert seen == [f"{kuzzle.url}/_refreshToken?expiresIn=2h&gateway=key"]
    assert sent.headers["X-Tenant"] == "tenant-1"
    assert sent.headers["Cookie"] == "sticky=node-1; authToken=a"
    assert sent.headers["Authorization"] == f"Bearer {JWT}"
    assert sent.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    "retries",
    [
        Retry(3, allowed_methods=None, status_forcelist=[503]),
        Retry(0, allowed_methods=None, status_forcelist=[503]),
        Retry(None, allowed_methods=None, read=3),
    ],
)
def test_retries_below_are_off(kuzzle, retries):
    """An adapter that would send again, or hide an answer, is kept from it, and not changed."""
    with requests.Session() as session:
        session.mount("http://", adapter := HTTPAdapter(max_retries=retries))
        kuzzle.next_answers.extend([Answer(503, b""), b"", b""])
        assert post(kuzzle.url, session=session).status == 503
        with pytest.raises(OutcomeUnknownError):
            post(kuzzle.url, session=session)
        assert adapter.max_retries is retries
    assert len(kuzzle.requests) == 2


# Proxies and TLS


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


@pytest.mark.parametrize("lent", [False, True])
def test_proxy_from_the_environment(proxy, monkeypatch, lent):
    """The environment's proxies are asked. One that refuses a tunnel has let nothing through."""
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("https_proxy", proxy.url)
    with requests.Session() as session:
        assert post("http://kuzzle.example/x", session=session if lent else None).status == 407
        with pytest.raises(UnavailableError, match="could not be reached: check the URL"):
            post("https://kuzzle.example", session=session if lent else None)
    assert [line.rpartition("/")[0] for line in proxy.asked] == [
        "POST http://kuzzle.example/x HTTP",
        "CONNECT kuzzle.example:443 HTTP",
    ]


def test_proxy_that_is_none(monkeypatch):
    """A proxy that can't be one is told, and nothing was sent."""
    monkeypatch.setenv("http_proxy", "http://")
    with pytest.raises(UnavailableError, match="could not be reached"):
        post("http://kuzzle.example")


def test_environment_is_read_once_for_a_while(kuzzle, proxy, monkeypatch):
    """The environment is read anew with new connections: in five seconds at the latest."""
    now = [1000.0]
    monkeypatch.setattr(_http, "_PERIOD", 5.0)
    send = functools.partial(post, kuzzle.url, answer_by=lambda: math.inf)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kuzzle.next_answers.append(Answer(200, GOOD))
    assert send().status == 200
    monkeypatch.setenv("http_proxy", proxy.url)
    now[0] += 4.9
    kuzzle.next_answers.append(Answer(200, GOOD))
    assert send().status == 200
    now[0] += 0.1
    assert send().status == 407


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    """The authority, named by the environment."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    return authority


def tls(authority, *names, **certificate):
    """Make a server's side of TLS, with a certificate for some host names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or ("127.0.0.1",)), **certificate).configure_cert(context)
    return context


@pytest.mark.parametrize("lent", [False, True])
def test_authority_from_the_environment(trusted, lent):
    """REQUESTS_CA_BUNDLE names the authorities to trust."""
    with Peer(answering(EMPTY), tls(trusted)) as peer, requests.Session() as session:
        assert post(peer.url, session=session if lent else None).body == b"{}"


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
        with contextlib.suppress(OSError):  # who does not trust the certificate resets
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", r"wrong version number|record layer failure"), (b"", "eof")],
)
def test_no_tls(answer, reason):
    """Who speaks no TLS, or ends it at once, is told of in words. Their numbers are not those of the system."""

    def behave(client):
        client.recv(65536)
        client.sendall(answer)

    with Peer(behave) as peer, pytest.raises(UnavailableError, match=reason):
        post(peer.url.replace("http:", "https:"))


@pytest.mark.parametrize(
    ("error", "reason"), [(ssl.SSLError("planted"), "TLS failed"), (ssl.SSLError(1, "planted"), "TLS failed")]
)
def test_tls_error_of_an_adapter(error, reason):
    """What OpenSSL did not make has no reason, and tells nothing else."""

    class Adapter(HTTPAdapter):
        def send(self, request, **options):
            raise error

    session = requests.Session()
    session.mount("https://", Adapter())
    with pytest.raises(OutcomeUnknownError, match=f"{reason}") as caught:
        post("https://kuzzle.example", session=session)
    assert "planted" not in str(caught.value)


def test_tunnel(proxy, authority, tmp_path, monkeypatch):
    """A proxy opens a tunnel, and in it there is TLS as ever. Another one is opened when the first is gone."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    proxy.RequestHandlerClass = Tunnel
    for name, value in {"no_proxy": "", "NO_PROXY": "", "https_proxy": proxy.url}.items():
        monkeypatch.setenv(name, value)
    with Peer(answering(EMPTY, then=lambda client: None), tls(authority)) as peer:
        departed = []
        with pytest.raises(UnavailableError, match=r"self-signed|local issuer"):
            post(peer.url, depart=lambda: departed.append(len(proxy.asked)))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        _http._pools.cache_clear()
        for _ in range(2):
            assert post(peer.url, depart=lambda: departed.append(len(proxy.asked))).body == b"{}"
            time.sleep(0.1)
    _http._pools.cache_clear()
    assert departed == [2, 3]


@pytest.mark.parametrize("through", ["", "a proxy"])
def test_slow_handshake(proxy, trusted, monkeypatch, through):
    """A handshake may take longer than connecting to one of several addresses, and than a slice of an answer."""
    monkeypatch.setattr(_http, "_ONE_ADDRESS", 0.3)
    proxy.RequestHandlerClass = Tunnel
    for name, value in {"no_proxy": "", "NO_PROXY": "", "https_proxy": proxy.url}.items() if through else ():
        monkeypatch.setenv(name, value)
    context = tls(trusted)
    context.sni_callback = lambda *_: time.sleep(0.8)
    _http._pools.cache_clear()
    with Peer(answering(EMPTY, then=lambda client: None), context) as peer:
        assert post(peer.url, connect=5).body == b"{}"
    _http._pools.cache_clear()
    assert len(proxy.asked) == bool(through)


def test_tunnel_through_silence(monkeypatch):
    """A proxy that says nothing ends in time, and nothing was sent."""
    with Peer(lambda client: time.sleep(3)) as peer:
        monkeypatch.setenv("https_proxy", f"http://{peer.address}")
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="timed out"):
            post("https://kuzzle.example", connect=0.3, depart=pytest.fail)
        assert time.monotonic() - started < 0.7


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("flaw", ["unknown authority", "another name", "expired"])
def test_certificates(authority, tmp_path, monkeypatch, flaw, lent):
    """A certificate that does not prove who answers ends it: nothing is sent, and it's told."""
    names, certificate, complaint = {
        "unknown authority": (["127.0.0.1"], {}, "unable to get local issuer certificate"),
        "another name": (["127.0.0.2"], {}, "certificate is not valid for '127.0.0.1'"),
        "expired": (["127.0.0.1"], {"not_after": datetime.now(UTC) - timedelta(1)}, "certificate has expired"),
    }[flaw]
    (authority if flaw != "unknown authority" else trustme.CA()).cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    received = []
    context = tls(authority, *names, **certificate)
    with (
        Peer(lambda client: received.append(client.recv(1)), context) as peer,
        requests.Session() as session,
        pytest.raises(UnavailableError, match=complaint) as caught,
    ):
        post(peer.url, session=session if lent else None)
    assert caught.value.spent is False
    assert received in ([], [b""])


@pytest.mark.parametrize("lent", [False, True])
def test_missing_authorities(monkeypatch, lent):
    """A CA bundle that is not there is told before anything is sent."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with requests.Session() as session, pytest.raises(UnavailableError):
        post("https://127.0.0.1:9", session=session if lent else None)


@pytest.mark.parametrize("lent", [False, True])
def test_no_tls_on_the_other_side(kuzzle, lent):
    """A handshake that fails has sent nothing."""
    with requests.Session() as session, pytest.raises(UnavailableError, match="could not be reached"):
        post(kuzzle.url.replace("http:", "https:"), session=session if lent else None)


def test_strange_kinds_of_connections():
    """A kind of connection that urllib3 has for a proxy stays what it is, and becomes patient, once."""

    class Socks(HTTPConnectionPool.ConnectionCls):
        pass

    kind = _http._patient(Socks)
    assert issubclass(kind, Socks)
    assert issubclass(kind, _http._Connection)
    assert _http._patient(kind) is kind


# How long it takes


def drip(client, data, pause=0.1):
    for byte in data:
        client.sendall(bytes([byte]))
        time.sleep(pause)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"
PEERS = {
    "silence": lambda client: read(client) and client.recv(1),
    "dripping headers": lambda client: read(client) and drip(client, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10),
    "a dripping body": lambda client: (read(client) and client.sendall(HEAD)) or drip(client, b" " * 30),
    "dripping chunks": lambda client: read(client) and drip(client, CHUNKED + b"1\r\n \r\n" * 10),
    "a flood of chunks": lambda client: read(client) and flood(client, CHUNKED, b"1\r\n \r\n" * 10_000),
    "an endless body": lambda client: read(client) and drip(client, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 20),
    "interim answers": lambda client: read(client) and drip(client, INTERIM * 2),
    "half closed": lambda client: client.shutdown(socket.SHUT_WR) or (read(client) and time.sleep(1.5)),
    "reset": lambda client: client.recv(1) and reset(client),
}


def flood(client, head, piece):
    end = time.monotonic() + 2
    client.sendall(head)
    while time.monotonic() < end:
        client.sendall(piece)


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(client)


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", PEERS)
def test_deadline(trusted, name, scheme, lent):
    """Whatever the peer does, the caller has an error in time: the outcome is open."""
    context = tls(trusted) if scheme == "https" else None
    with Peer(PEERS[name], context) as peer, requests.Session() as session:
        started = time.monotonic()
        with pytest.raises(OutcomeUnknownError) as caught:
            post(peer.url, seconds=0.5, session=session if lent else None)
        assert time.monotonic() - started < 0.5 + 0.1 + 0.2, "with a margin for a slow machine"
        assert (caught.value.spent, caught.value.status) == (None, None)
        assert caught.value.__context__ is None


@left_open
@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("behave", [pytest.param(lambda client: time.sleep(1.5), id="silence"), reset])
def test_no_handshake(behave, lent):
    """A handshake without an answer, or without an end, has sent nothing."""
    with Peer(behave) as peer, requests.Session() as session:
        started = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            post(f"https://{peer.address}", connect=0.4, session=session if lent else None)
        assert time.monotonic() - started < 0.9
        assert caught.value.spent is False
        assert caught.value.__context__ is None
    gc.collect()


def test_flood_of_chunks():
    """An answer in thousands of pieces is none: to read them all would take too long."""
    with pytest.raises(ResponseNotReady):
        _http._body(SimpleNamespace(stream=lambda *_, **__: itertools.repeat(b" "), headers={}))


def test_fast_drip():
    """Nor does a peer that drips so fast that there is always something to read have its way for long."""
    call = _http._Call(Caller(lambda: 0.0, never, never), lambda: 1.0, sent_at=1.0)
    one, other = socket.socketpair()
    other.sendall(bytes(1000))
    with one, other, pytest.raises(TimeoutError):
        assert sum(call.receive(one, bytearray(1)) for _ in range(1000)) == 0


def test_answer_that_came_while_suspended():
    """An answer that is there is taken, although the process slept past the deadline: it may be the last."""
    now = [0.0]

    def depart():
        now[0] = 1000.0

    with Peer(answering(EMPTY)) as peer:
        real = socket.socket.send

        def send(*arguments):
            try:
                return real(*arguments)
            finally:
                time.sleep(0.3)
                now[0] = 10_000.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "send", send)
            got = _http.send(
                Request(service="kuzzle", url=peer.url, headers={}, secret="s", request_id="id-1"),
                session=None,
                caller=Caller(lambda: 2000.0, depart, never),
                steady=lambda: now[0],
            )
    assert got.body == b"{}"


@pytest.mark.parametrize("lent", [False, True])
def test_longer_patience(lent):
    """While it waits the caller may decide to wait longer."""
    with Peer(answering([0.8, EMPTY])) as peer, requests.Session() as session:
        started = time.monotonic()
        patient = threading.Event()
        threading.Timer(0.2, patient.set).start()
        by = lambda: started + (3 if patient.is_set() else 0.4)  # noqa: E731
        assert post(peer.url, answer_by=by, session=session if lent else None).body == b"{}"
        assert time.monotonic() - started > 0.7


@pytest.mark.parametrize("lent", [False, True])
def test_shorter_patience(lent):
    """It may decide to wait less long, too. No limit is no promise."""
    with Peer(lambda client: time.sleep(3)) as peer, requests.Session() as session:
        started = time.monotonic()
        by = lambda: math.inf if time.monotonic() < started + 0.2 else started  # noqa: E731
        with pytest.raises(OutcomeUnknownError, match="timed out"):
            post(peer.url, answer_by=by, session=session if lent else None)
        assert 0.2 < time.monotonic() - started < 1.3


@pytest.fixture
def full():
    """A server that does not accept: its queue is full."""
    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def never():
    pytest.fail("it has left")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connecting_takes_too_long(full, scheme):
    """Until when to connect is one thing, until when to wait for an answer another."""
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="timed out") as caught:
        post(f"{scheme}://{full}", connect=0.3, depart=never)
    assert 0.25 < time.monotonic() - started < 0.5
    assert caught.value.spent is False


def test_connecting_takes_too_long_with_a_lent_session(full):
    """It's the same on a connection of the caller's, but for when it's told that the request leaves."""
    started = time.monotonic()
    with requests.Session() as session, pytest.raises(UnavailableError, match="timed out"):
        post(f"http://{full}", connect=0.3, session=session)
    assert 0.25 < time.monotonic() - started < 0.5


def test_an_address_needs_no_thread(kuzzle, monkeypatch):
    """To connect to a plain address mostly takes less time than to start a thread. To look up a name may take long."""
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name) or start(thread))
    for url, threads in ((kuzzle.url, 0), (kuzzle.url.replace("127.0.0.1", "localhost"), 1)):
        started.clear()
        assert post(url).status == 404
        assert started.count("refresher") == threads


def test_an_address_that_nobody_waits_for_any_more(kuzzle):
    """If the time is up while it connects, the connection is not used, and not kept."""
    times = iter([math.inf, math.inf])
    with pytest.raises(UnavailableError, match="timed out"):
        post(kuzzle.url, answer_by=lambda: next(times, -math.inf), depart=never)
    assert post(kuzzle.url).status == 404


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("when", [math.inf, 10.0])
def test_connecting_is_cancelled(full, scheme, when):
    """If nobody waits any more while it connects, it ends at once, and nothing was sent."""
    cancelled = []
    threading.Timer(0.3, lambda: cancelled.append(time.monotonic())).start()
    by = lambda: -math.inf if cancelled else time.monotonic() + when  # noqa: E731
    with pytest.raises(UnavailableError) as caught:
        post(f"{scheme}://{full}", answer_by=by, depart=never)
    assert time.monotonic() - cancelled[0] < 0.15, "0.1 s, with a margin for a slow machine"
    assert caught.value.spent is False


def test_handshake_is_cancelled():
    """A handshake is part of connecting."""
    with Peer(lambda client: time.sleep(2)) as peer:
        started = time.monotonic()
        by = lambda: math.inf if time.monotonic() < started + 0.2 else -math.inf  # noqa: E731
        with pytest.raises(UnavailableError):
            post(f"https://{peer.address}", answer_by=by, depart=never)
        assert time.monotonic() - started < 0.4


@pytest.mark.parametrize("lent", [False, True])
def test_nobody_waits(lent):
    """If nobody waits in the first place nothing is sent, also if there is a connection."""
    received = []

    def behave(client):
        while request := read(client):
            received.append(request)
            client.sendall(EMPTY)

    with Peer(behave) as peer, requests.Session() as session:
        post(peer.url, session=session if lent else None)
        with pytest.raises(UnavailableError, match="timed out"):
            post(peer.url, answer_by=lambda: -math.inf, depart=never, session=session if lent else None)
        time.sleep(0.1)
    assert len(received) == 1


def test_names_that_hang(monkeypatch):
    """A name server that hangs ends in time as well, and who it leads to in the end is sent nothing."""
    real, found = socket.getaddrinfo, threading.Event()

    def hang(host, *arguments, **options):
        if host == "hanging.example":
            assert found.wait(10)
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="timed out"):
            post(f"http://hanging.example:{listener.getsockname()[1]}", depart=never, seconds=0.3)
        assert time.monotonic() - started < 0.5
        found.set()
        client, _ = listener.accept()
        with client:
            client.settimeout(5)
            assert client.recv(1) == b""


def test_names_that_are_none():
    """A name that nobody has is told."""
    with pytest.raises(UnavailableError, match="unknown host name"):
        post("http://nobody.invalid")


@pytest.mark.parametrize("lent", [False, True])
def test_nobody_is_there(kuzzle, lent):
    """A server that is down is told, and nothing was sent."""
    kuzzle.stop()
    with requests.Session() as session, pytest.raises(UnavailableError, match="Connection refused"):
        post(kuzzle.url, session=session if lent else None)


@pytest.mark.parametrize("lent", [False, True])
def test_endless_patience(kuzzle, lent):
    """A caller may be more patient than a socket can be."""
    kuzzle.next_answers.append(Answer(200, GOOD))
    with requests.Session() as session:
        end = time.monotonic() + threading.TIMEOUT_MAX
        assert post(kuzzle.url, answer_by=lambda: end, session=session if lent else None).status == 200


def test_no_threads(kuzzle, monkeypatch):
    """Where no thread can be had to connect in, the caller's own connects."""

    start = threading.Thread.start

    def fail(thread):
        if thread.name == "refresher":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert post(kuzzle.url).status == 404


def test_context(monkeypatch):
    """Context variables are seen in the thread that connects, and in the one that watches over a session."""
    variable = contextvars.ContextVar("variable", default="unset")
    seen = []
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *each: seen.append(variable.get()) or real(*each))
    token = variable.set("trace-1")
    with Peer(answering(EMPTY)) as peer, requests.Session() as session:
        post(peer.url)
        post(peer.url, session=session)
    variable.reset(token)
    assert seen == ["trace-1", "trace-1"]


# Departure


def test_departure(trusted):
    """Its caller is told once that the request leaves: the connection stands, and nothing was sent."""
    happened = []

    def behave(client):
        happened.append("connected")
        for _ in range(2):
            read(client)
            happened.append("received")
            client.sendall(EMPTY)
        time.sleep(0.3)

    def depart():
        time.sleep(0.2)
        happened.append("departed")

    with Peer(behave, tls(trusted)) as peer:
        for _ in range(2):
            post(peer.url, depart=depart)
    assert happened == ["connected", "departed", "received", "departed", "received"]


@pytest.mark.parametrize("kind", [OSError, TimeoutError, ValueError, KeyError, UnavailableError, KeyboardInterrupt])
@pytest.mark.parametrize("lent", [False, True])
def test_departure_that_is_refused(kind, lent):
    """What it raises is raised, unchanged, and nothing was sent."""
    refusal, received = kind("no"), []

    def depart():
        raise refusal

    with Peer(lambda client: received.append(client.recv(1))) as peer, requests.Session() as session:
        with pytest.raises(kind) as caught:
            post(peer.url, depart=depart, session=session if lent else None)
        assert caught.value is refusal
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None
        time.sleep(0.05)
    assert received in ([], [b""])


@pytest.mark.parametrize("lent", [False, True])
def test_when_it_was_sent(lent):
    """A reply says when the request left: after all that had to be waited for."""
    with Peer(answering([0.2, EMPTY])) as peer, requests.Session() as session:
        before = time.time()
        sent_at = post(peer.url, depart=lambda: time.sleep(0.2), session=session if lent else None).requested_at
        assert before + 0.2 <= sent_at < time.time() - 0.15


# Answers that are none


@left_open
@pytest.mark.parametrize("lent", [False, True])
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
        pytest.param(b"HTTP/1.1 102 Processing\r\n\r\n", id="an interim answer alone"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\n\r\n{}", id="another protocol"),
    ],
)
def test_broken_answers(answer, lent):
    """An answer that breaks off, or is none, leaves the outcome open."""
    with (
        Peer(answering(answer, then=lambda client: None)) as peer,
        requests.Session() as session,
        pytest.raises(OutcomeUnknownError, match="did not answer") as caught,
    ):
        post(peer.url, session=session if lent else None)
    assert caught.value.spent is None
    gc.collect()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_headers_that_break_off(head):
    """Half of the headers are not taken for all of them."""
    peer = Peer(answering(head, then=lambda client: None))
    with peer, pytest.raises(OutcomeUnknownError, match="the response was incomplete"):
        post(peer.url)


def test_adapter_that_fails(kuzzle):
    """Whatever an adapter of the caller's raises, nobody knows what it sent."""

    class Adapter(HTTPAdapter):
        def send(self, request, **options):
            raise LookupError(request.headers["Authorization"])

    with requests.Session() as session:
        session.mount("http://", Adapter())
        with pytest.raises(OutcomeUnknownError, match="LookupError") as caught:
            post(kuzzle.url, session=session)
    assert JWT not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(ConnectionRefusedError(10061, "planted"), "ConnectionRefusedError", id="Windows"),
        pytest.param(ConnectionRefusedError(111, "planted"), os.strerror(111), id="elsewhere"),
        pytest.param(TimeoutError(110, "planted"), os.strerror(110), id="by the system"),
        pytest.param(TimeoutError("planted"), "timed out", id="by us"),
        pytest.param(socket.gaierror(-2, "planted"), "unknown host name", id="a name"),
        pytest.param(OSError("planted"), "OSError", id="no number"),
        pytest.param(KeyError("planted"), "KeyError", id="something else"),
    ],
)
def test_reasons(error, reason):
    """What the matter was is said in words that nobody else has written."""
    assert _http._reason(requests.ConnectionError(error)) == reason


def bomb(size):
    return gzip.compress(b'{"padding": "' + b"x" * size + b'"}')


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(200, b"x" * 100_000_000), id="100 MB"),
        pytest.param(Answer(200, bomb(2**26), {"Content-Encoding": "gzip"}), id="a gzip bomb"),
        pytest.param(Answer(200, zlib.compress(b"x" * 2**26), {"Content-Encoding": "deflate"}), id="a deflate bomb"),
    ],
)
def test_bodies_that_are_none(kuzzle, answer):
    """A body that is too large reads as empty, and the next answer is not its rest."""
    kuzzle.next_answers.extend([answer, Answer(200, GOOD)])
    assert post(kuzzle.url).body == b""
    assert post(kuzzle.url).body == GOOD


def test_bomb_is_not_unpacked(kuzzle):
    """A bomb takes no more memory than an answer may be long."""
    kuzzle.next_answers.append(Answer(200, bomb(2**27), {"Content-Encoding": "gzip"}))
    tracemalloc.start()
    try:
        assert post(kuzzle.url).body == b""
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(200, gzip.compress(GOOD), {"Content-Encoding": "gzip"}), id="gzip"),
        pytest.param(Answer(200, zlib.compress(GOOD), {"Content-Encoding": "deflate"}), id="deflate"),
        pytest.param(
            Answer(200, zlib.compress(GOOD, wbits=-15), {"Content-Encoding": "deflate"}), id="deflate without a header"
        ),
        pytest.param(Answer(200, gzip.compress(GOOD), {"Content-Encoding": "X-GZIP"}), id="gzip, spelled otherwise"),
        pytest.param(Answer(200, GOOD, {"Content-Encoding": "identity"}), id="identity"),
        pytest.param(Answer(200, GOOD, {"Content-Encoding": "gzip"}), id="gzip that is none"),
        pytest.param(Answer(200, GOOD, {"Content-Encoding": "utf-8"}), id="no packing at all"),
        pytest.param(Answer(200, GOOD, {"Content-Encoding": ""}), id="an empty header"),
        pytest.param(
            b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n4a\r\n" + GOOD + b"\r\n0\r\n\r\n", id="chunked"
        ),
        pytest.param(b"HTTP/1.1 200\r\n\r\n" + GOOD, id="till the end"),
    ],
)
def test_unusual_bodies(kuzzle, answer, lent):
    """A new token is not lost over the way it is packed."""
    kuzzle.next_answers.append(answer)
    with requests.Session() as session:
        assert post(kuzzle.url, session=session if lent else None).body == GOOD


@pytest.mark.parametrize("body", [b"{}", b"busy", b'{"a":1}'])
def test_short_bodies(kuzzle, body):
    """Some short texts begin as compressed data could. They are taken as they are."""
    kuzzle.next_answers.append(Answer(200, body, {"Content-Encoding": "gzip"}))
    assert post(kuzzle.url).body == body


class TimeLimitError(Exception):
    """Comes out of a signal handler, as Celery's SoftTimeLimitExceeded does."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("kind", [TimeLimitError, TimeoutError, ConnectionError])
def test_signal_handler_raises(kuzzle, lent, with_cache, kind):
    """What a signal handler raises is no lost answer: it ends the call, and nothing is sent again."""

    def end(*_):
        raise kind

    kuzzle.delay_next(1)
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with requests.Session() as session, pytest.raises(kind) as caught:
            refresh_kuzzle_token(
                kuzzle.url,
                kuzzle.login(ago=1800),
                cache=TokenCache() if with_cache else None,
                session=session if lent else None,
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert type(caught.value) is kind
    assert len(kuzzle.requests) == 1


class Handler:
    """A signal handler of another kind than a function."""

    def __call__(self, *_):
        raise TimeoutError

    def end(self, *_):
        raise TimeoutError


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that send signals")
@pytest.mark.parametrize("handler", [Handler(), Handler().end, functools.partial(Handler.end, None)])
@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_signal_handler_while_it_connects(full, handler, seconds):
    """It ends the call, too, of whatever kind the handler is."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(TimeoutError):
            post(f"http://{full}", connect=5, depart=never)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_address_that_refuses(kuzzle, monkeypatch):
    """It is tried once."""
    tried, connect = [], socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda sock, address: tried.append(address) or connect(sock, address))
    kuzzle.stop()
    with pytest.raises(UnavailableError, match="Connection refused"):
        post(kuzzle.url)
    assert len(tried) == 1


def test_largest_body(kuzzle):
    """1 MiB is still an answer."""
    kuzzle.next_answers.append(Answer(200, b" " * 2**20))
    assert len(post(kuzzle.url).body) == 2**20


# Whose answer it is


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connections_are_kept(trusted, scheme):
    """Calls that follow one another use one connection."""
    with Peer(answering(reply(1), reply(2), reply(3)), tls(trusted) if scheme == "https" else None) as peer:
        assert [post(peer.url).json().reveal() for _ in range(3)] == [{"n": 1}, {"n": 2}, {"n": 3}]
        assert len(peer.connections) == (2 if scheme == "https" else 1), "one for TLS, and one below it"


FULL = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
FULL = (FULL % (io.DEFAULT_BUFFER_SIZE - len(FULL) - 2) + b'{"n":1}').ljust(io.DEFAULT_BUFFER_SIZE)
ODD = {
    "102": [b"HTTP/1.1 102 Processing\r\n\r\n", reply(1)],
    "103": [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + reply(1)],
    "100": [b"HTTP/1.1 100 Continue\r\n\r\n" + reply(1)],
    "199, late": [b"HTTP/1.1 199 Odd\r\nX: y\r\n\r\n", 0.2, reply(1)],
    "several": [b"HTTP/1.1 100\r\n\r\n", b"HTTP/1.1 102\r\n\r\n" * 3, 0.1, b"HTTP/1.1 103\r\n\r\n", reply(1)],
    "two answers": [reply(1, more=reply(9))],
    "two answers, one after the other": [reply(1), 0.1, reply(9)],
    "a longer body": [reply(1, more=b"\r\n")],
    "a much longer body": [reply(1, more=b" " * 10_000 + reply(9))],
    "a body that fills the buffer": [FULL + reply(9)],
    "a chunk too many": [b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n{"n":1}\r\n0\r\n\r\n' + reply(9)],
    "a body where there is none": [b"HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n" + reply(9)],
}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", ODD)
def test_odd_answers(trusted, name, scheme):
    """Interim answers are read past, and a connection on which anything odd came is not used again."""
    context = tls(trusted) if scheme == "https" else None
    with Peer(answering(ODD[name], reply(9)), context) as peer:
        assert post(peer.url).json().reveal() in ({"n": 1}, {})
        time.sleep(0.2)
        peer.behave = answering(reply(2))
        assert post(peer.url).json().reveal() == {"n": 2}
        assert len(peer.connections) == (4 if scheme == "https" else 2)


def test_many_interim_answers():
    """There is an end to interim answers."""
    with Peer(answering(INTERIM * 1000)) as peer, pytest.raises(OutcomeUnknownError, match="ResponseNotReady"):
        post(peer.url)


@pytest.mark.parametrize("answer", [*(b"HTTP/1.1 102 Odd\r\n\r\n", b"HTTP/1.1 103 Odd\r\nLink: </x>\r\n\r\n" * 100)])
@pytest.mark.parametrize(
    "final", [reply(1), b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n{"n":1}\r\n0\r\n\r\n']
)
def test_interim_answers_to_a_session(answer, final):
    """requests takes an interim answer for the answer. What follows is read all the same, and only by us."""
    with Peer(answering([answer, 0.1, final])) as peer, requests.Session() as session:
        assert post(peer.url, session=session).json().reveal() == {"n": 1}
        peer.behave = answering(reply(2))
        assert session.post(peer.url).json() == {"n": 2}


LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 2097152\r\n\r\n" + b" " * 2**21


@pytest.mark.parametrize("answer", [b"HTTP/1.1 103 Odd\r\n\r\n" + reply(1), LONG])
def test_place_in_a_pool_that_blocks(answer):
    """Whatever comes, a request gives back the place that it took in the pool of a caller's session."""
    with Peer(answering([answer])) as peer, requests.Session() as session:
        session.mount("http://", HTTPAdapter(pool_maxsize=1, pool_block=True))
        for _ in range(3):
            post(peer.url, session=session)


@pytest.mark.parametrize("interim", [b"HTTP/1.1 101 Odd\r\n\r\n", b"HTTP/1.1 103 Odd\r\n\r\n" * 1000])
def test_endless_interim_answers_to_a_session(interim):
    """There is an end to them. Nobody else on the session gets what follows."""
    with Peer(answering([interim, 0.1, reply(1)])) as peer, requests.Session() as session:
        with pytest.raises(OutcomeUnknownError):
            post(peer.url, session=session)
        time.sleep(0.2)
        peer.behave = answering(reply(2))
        assert session.post(peer.url).json() == {"n": 2}
        assert len(peer.connections) == 2


def test_unread_answers_are_nobodys():
    """A call that did not wait for its answer leaves none behind for the next one."""
    with Peer(answering([0.4, reply(1)])) as peer:
        with pytest.raises(OutcomeUnknownError):
            post(peer.url, seconds=0.2)
        time.sleep(0.4)
        peer.behave = answering(reply(2))
        assert post(peer.url).json().reveal() == {"n": 2}


def test_idle_connections_are_not_used():
    """A connection that was idle for a few seconds is left behind, and closed."""
    first = _http._pools(os.getpid(), 200.0)
    assert _http._pools(os.getpid(), 200.0) is first
    pool, _ = first("http://127.0.0.1/")
    left = weakref.ref(pool)
    del pool, first
    _http._pools(os.getpid(), 201.0)
    gc.collect()
    assert left() is None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_children_have_their_own_connections():
    """A forked child does not share its parent's connections."""
    with Peer(answering(reply(1), reply(2))) as peer:
        post(peer.url)
        peer.behave = answering(reply(9))
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(write_end, post(peer.url).body)
            finally:
                os._exit(0)
        assert os.read(read_end, 10) == b'{"n":9}'
        os.waitpid(pid, 0)
        os.close(read_end)
        os.close(write_end)
        assert post(peer.url).json().reveal() == {"n": 2}
        assert len(peer.connections) == 2


def test_finished_calls_are_forgotten():
    """An idle connection keeps nothing of the call that it was used for."""

    def depart():
        pass

    left = weakref.ref(depart)
    with Peer(answering(EMPTY)) as peer:
        post(peer.url, depart=depart)
        del depart
        gc.collect()
        assert left() is None


# Secrets


def frames(error):
    """Render a traceback as a debugger does, with the local variables of our own frames."""
    rendered = traceback.TracebackException.from_exception(error, capture_locals=True)
    stack = [frame for frame in rendered.stack if frame.filename.endswith("refresher/_http.py")]
    return [f"{frame.name}: {name} = {value}" for frame in stack for name, value in (frame.locals or {}).items()]


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("how", ["unreached", "lost", "refused", "interrupted"])
def test_secrets(how, lent, monkeypatch):
    """No error, and no local variable of ours on its way, has a secret in it."""

    def depart():
        if how in ("refused", "interrupted"):
            raise {"refused": ZeroDivisionError, "interrupted": KeyboardInterrupt}[how]

    secrets = {
        "headers": {"Authorization": Secret("Bearer planted-1")},
        "secret": Secret("planted-1"),
        "cookies": {"a": Secret("planted-4")},
        "body": Secret(b"planted-2"),
    }
    with Peer(lambda client: client.recv(1)) as peer, requests.Session() as session:
        session.cookies.set("sticky", "planted-3")
        url = "http://nobody.invalid" if how == "unreached" else peer.url
        with pytest.raises((RefreshError, ZeroDivisionError, KeyboardInterrupt)) as caught:
            post(url, depart=depart, session=session if lent else None, **secrets)
    assert frames(caught.value)
    assert "planted" not in "\n".join(frames(caught.value))
    assert "planted" not in str(caught.value)
    assert "planted" not in repr(vars(caught.value))


# What the calls make of it


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.usefixtures("single")
def test_redirects_are_told(kuzzle, strangers_server, status):
    """A redirect is an odd reply."""
    kuzzle.next_answers.append(Answer(status, b"", {"Location": strangers_server.url + "/planted"}))
    with pytest.raises(ReplyError, match="redirect, which is not followed") as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert (caught.value.status, caught.value.spent) == (status, False)
    assert "planted" not in str(caught.value)
    assert strangers_server.requests == []


@pytest.mark.usefixtures("single")
def test_timeout_is_for_both_of_circles_requests(circle):
    """The exchange and the refresh share the timeout: what the first took is not there for the second."""
    started = time.monotonic()
    circle.next_answers.append(lambda request: time.sleep(1.0) or Answer(200, {"data": {"userToken": "u"}}))
    circle.next_answers.append(lambda request: time.sleep(1.0) or Answer(200, {"data": {"userToken": "u"}}))
    with pytest.raises(OutcomeUnknownError) as caught:
        refresh_user_token(
            user_id="user-1", refresh_token="r", device_id="d", api_key="k", base_url=circle.url, timeout=1.6
        )
    assert caught.value.idempotency_key
    assert len(circle.requests) == 2
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(200, b"x" * 100_000_000), id="100 MB"),
        pytest.param(Answer(200, b"[" * 1_000_000), id="deep nesting"),
        pytest.param(Answer(200, b'{"result": ' + b"[" * 500_000), id="deep nesting inside"),
        pytest.param(Answer(200, b'{"result": ' + b"9" * 5000 + b"}"), id="a long number"),
        pytest.param(Answer(200, b'{"result": NaN}'), id="NaN"),
        pytest.param(Answer(200, b"\xff\xfe\xfd"), id="no text"),
        pytest.param(Answer(200, GOOD[:-1]), id="half a JSON"),
    ],
)
@pytest.mark.usefixtures("single")
def test_strange_bodies(kuzzle, answer):
    """A body that can't be Kuzzle's is a ReplyError, however large, packed or nested it is."""
    kuzzle.next_answers.append(answer)
    with pytest.raises(ReplyError):
        refresh_kuzzle_token(kuzzle.url, JWT)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(200, b"\xef\xbb\xbf" + GOOD), id="a byte order mark"),
        pytest.param(Answer(200, GOOD.decode().encode("utf-16")), id="UTF-16"),
        pytest.param(Answer(200, GOOD + b" " * (2**20 - len(GOOD))), id="1 MiB"),
    ],
)
@pytest.mark.usefixtures("single")
def test_unusual_texts(kuzzle, answer):
    """A new token is not lost over the way it is written."""
    kuzzle.next_answers.append(answer)
    assert refresh_kuzzle_token(kuzzle.url, JWT).jwt == "kauth-new"


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        pytest.param("7", 7, 7, id="seconds"),
        pytest.param(" 0 ", 0, 0, id="none"),
        pytest.param("999999999", 3600, 3600, id="a slip"),
        pytest.param(timedelta(minutes=50), 2990, 3000, id="a date"),
        pytest.param(timedelta(days=900), 3600, 3600, id="a date far away"),
        pytest.param("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0, id="a date long gone"),
    ],
)
@pytest.mark.usefixtures("single")
def test_retry_after(kuzzle, value, low, high):
    """Retry-After is passed on in seconds, an hour at most."""
    now = datetime.now(UTC)
    if isinstance(value, timedelta):
        value = format_datetime(now + value, usegmt=True)
    kuzzle.next_answers.append(Answer(429, b"", {"Retry-After": value, "Date": format_datetime(now, usegmt=True)}))
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert low <= caught.value.retry_after <= high


@pytest.mark.parametrize("value", ["soon", "-1", "1e3", "9" * 40, "\u0667", "Wed, 99 Oct 2015", ""])
@pytest.mark.usefixtures("single")
def test_odd_retry_after(kuzzle, value):
    """A Retry-After that says nothing is passed over."""
    kuzzle.next_answers.append(f"HTTP/1.1 429\r\nContent-Length: 0\r\nRetry-After: {value}\r\n\r\n".encode())
    with pytest.raises(UnavailableError) as caught:
        refresh_kuzzle_token(kuzzle.url, JWT)
    assert caught.value.retry_after is None


@pytest.mark.usefixtures("single")
def test_request_id_of_the_service(circle):
    """If the service names the request itself, its name counts, unless it quotes what was sent."""
    theirs = "0b8af4c5-6a3b-4bb2-90f6-0a7a56d3ba6f"
    secret = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    got = []
    for answered in (theirs, secret, "no uuid"):
        circle.next_answers.append(Answer(429, b"", {"X-Request-Id": answered}))
        with pytest.raises(UnavailableError) as caught:
            refresh_user_token(user_token="u", refresh_token=secret, device_id="d", api_key="k", base_url=circle.url)
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


@pytest.mark.usefixtures("single")
@fuzz
@given(answer=st.binary(max_size=300))
def test_any_bytes(fake_kuzzle, fake_circle, answer):
    """Any bytes whatsoever give a result or a RefreshError."""
    refresh_each(fake_kuzzle, fake_circle, answer)


latin = st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40)
names = st.sampled_from([
    "X-Request-Id", "Set-Cookie", "Content-Encoding", "Location", "Content-Type",
    "Content-Length", "Transfer-Encoding", "Connection", "X",
])  # fmt: skip
values = st.one_of(latin, st.sampled_from(["gzip", "chunked", "5", "authToken=a", "authToken", "close", "é"]))


@pytest.mark.usefixtures("single")
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
likely = st.dictionaries(members, json_values | st.sampled_from([-1, 10**12, "kauth-x", "é", "\ud800"]), max_size=6)
nested = st.dictionaries(st.sampled_from(["result", "data", "error"]), likely | json_values, max_size=3)


@pytest.mark.usefixtures("single")
@fuzz
@given(status=st.sampled_from([200, 201, 400, 401, 403, 429, 500, 503]), body=nested | likely | json_values)
def test_any_json(fake_kuzzle, fake_circle, status, body):
    """So does any JSON, the service's own members with the wrong things in them included."""
    refresh_each(fake_kuzzle, fake_circle, Answer(status, body))


def test_fake_circle_elsewhere():
    """FakeCircle knows its two paths and no other."""
    with FakeCircle() as fake:
        assert requests.get(fake.url + "/v1/w3s/users/token", timeout=5).status_code == 404
        assert requests.post(fake.url + "/elsewhere", timeout=5).status_code == 404
