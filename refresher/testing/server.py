"""A server on the loopback, with a clock of its own, that answers as it is told."""

from __future__ import annotations

import abc
import base64
import contextlib
import hashlib
import hmac
import json
import os
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, ClassVar, Self, cast
from urllib.parse import parse_qs

import attrs


class Clock:
    """
    A clock that can be moved on.

    Args:
        now: What it shows, in seconds since 1970, until it is moved. None means the system's clock. While it stands
            still, so does a fake's second: a Kuzzle token that is refreshed in the second of its issue comes back, and
            dies. So begin with one that is older, as of ``login(ago=10)``.
    """

    def __init__(self, now: float | None = None) -> None:
        self._now = now
        self._moved = 0.0

    def __call__(self) -> float:
        """Read the clock, in seconds since 1970."""
        return (time.time() if self._now is None else self._now) + self._moved

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass."""
        self._moved += seconds


@attrs.frozen
class Received:
    """A request as it arrived. What may be secret is not in its ``repr()``."""

    method: str
    target: str = attrs.field(repr=False)
    headers: Message = attrs.field(repr=False)
    body: bytes = attrs.field(repr=False)
    version: str = "HTTP/1.1"

    @property
    def path(self) -> str:
        """The path, without the query."""
        return self.target.partition("#")[0].partition("?")[0]

    @property
    def query(self) -> dict[str, list[str]]:
        """The arguments of the query. A bare flag is an empty string."""
        return parse_qs(self.target.partition("#")[0].partition("?")[2], keep_blank_values=True)

    def json(self) -> dict[str, Any]:
        """Read the body as a JSON object. An empty body, or any other JSON, counts as an empty one."""
        value = json.loads(self.body or b"{}")
        return value if isinstance(value, dict) else {}


@attrs.frozen
class Answer:
    """
    An answer to send.

    Args:
        status: The HTTP status.
        body: Bytes, or something to be sent as JSON.
        headers: The headers.
        pace: Seconds to wait before each byte.
        reset: Whether to reset the connection instead.
        close: Whether to close the connection afterwards.
    """

    status: int = 200
    body: object = attrs.field(default=b"", repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    pace: float = 0.0
    reset: bool = False
    close: bool = False

    def to_bytes(self, *, with_body: bool = True) -> bytes:
        """Write the answer down as it goes over the wire."""
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        head = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in self.headers.items())]
        head += [f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(head).encode("latin-1") + (body if with_body else b"")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 11.0  # Kuzzle's own patience with an idle connection

    @property
    def _service(self) -> _Server:
        return cast("_Server", self.server)

    def setup(self) -> None:
        super().setup()
        self._service.connections.add(self.connection)

    def finish(self) -> None:
        self._service.connections.discard(self.connection)
        super().finish()

    def __getattr__(self, name: str) -> Callable[[], None]:
        # http.server looks for do_GET, do_POST and so on. The fakes have an answer to every method.
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        fake = self._service.fake
        answer: Answer | bytes
        try:
            body = self._body()
        except ValueError:
            answer = Answer(400, close=True)
        else:
            answer = fake.receive(Received(self.command, self.path, self.headers, body, self.request_version))
        if isinstance(answer, Answer) and answer.reset:
            linger = struct.pack("ii" if os.name == "posix" else "hh", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            socket.close(self.connection.detach())
            self.close_connection = True
            return
        # A connection stays open unless the client, or the answer's own `close`, ends it. The answer's header
        # doesn't count: Kuzzle always sends "Connection: close" and goes on serving.
        asked = self.headers.get("Connection", "").lower() == "close"
        self.close_connection = asked or isinstance(answer, bytes) or answer.close
        if isinstance(answer, bytes):
            self.wfile.write(answer)
        else:
            data = answer.to_bytes(with_body=self.command != "HEAD" or fake.head_has_body)
            step = 1 if answer.pace else len(data)
            for start in range(0, len(data), step):
                time.sleep(answer.pace)
                self.wfile.write(data[start : start + step])

    def _body(self) -> bytes:
        """Read the body. It is a ValueError if nobody can tell where it ends."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:size]
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, fake: Server) -> None:
        self.fake = fake
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client may hang up at any time. Anything else is a fault of the fake or of a test, and fails that.
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.fake.failure = self.fake.failure or error
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Server(abc.ABC):
    """
    A server on the loopback. It runs in a ``with`` statement, or from `start` to `stop`.

    Its clock is the real one, until it is moved: ``fake.clock.advance(3600)``.
    """

    head_has_body: ClassVar[bool] = False
    """Whether an answer to HEAD is followed by a body, which HTTP forbids."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or Clock()
        self.requests: list[Received] = []
        self.next_answers: deque[Answer | bytes | Callable[[Received], Answer | bytes]] = deque()
        self.failure: BaseException | None = None  # what a function in *next_answers* raised first
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0
        self._restart: threading.Timer | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start to answer; after a `stop`, on the same port."""
        if self._server is None:
            self._server = _Server(self._port, self)
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Close all connections and refuse new ones. What it knows, it keeps."""
        if self._restart is not None:
            self._restart.cancel()
            self._restart.join()
            self._restart = None
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._server.connections):
                with contextlib.suppress(OSError):  # the client may have closed it
                    connection.shutdown(socket.SHUT_RDWR)
            self._server = None

    def pause(self, seconds: float) -> None:
        """Stop, and start again by itself *seconds* later. Nothing happens if it doesn't run."""
        if self._server is not None:
            self.stop()
            self._restart = threading.Timer(seconds, self.start)
            self._restart.daemon = True
            self._restart.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        failure, self.failure = self.failure, None
        if failure is not None and error is None:
            raise failure

    def receive(self, request: Received) -> Answer | bytes:
        """
        Answer a request: with what waits in *next_answers*, else as the service would.

        Raises:
            TypeError: What waits is no answer. It is raised at the end of the ``with`` statement, too, as is whatever
                a function in *next_answers* raises: an assertion of a test, say.
        """
        with self._lock:
            self.requests.append(request)
            if not self.next_answers:
                return self._answer(request)
            answer = self.next_answers.popleft()
        # Not under the lock: it may take its time.
        try:
            answer = answer(request) if callable(answer) else answer
        except BaseException as error:  # also what pytest.fail() raises, which is no Exception
            self.failure = self.failure or error
            if isinstance(error, Exception):
                raise
            raise RuntimeError("a function in next_answers failed") from error  # a thread that dies of it is a warning
        if not isinstance(answer, (Answer, bytes)):
            raise TypeError("next_answers must hold Answers, bytes, or functions of a request that return one of them")
        return answer

    def truly(self, request: Received, *, after: float = 0.0) -> Answer:
        """Do what a request asks for, and answer *after* some seconds: for functions in *next_answers*."""
        with self._lock:
            answer = self._answer(request)
        time.sleep(after)
        return answer

    @abc.abstractmethod
    def _answer(self, request: Received) -> Answer: ...


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(payload: Mapping[str, object], key: bytes) -> str:
    """Make a JWT."""
    parts = ({"alg": "HS256", "typ": "JWT"}, payload)
    signed = ".".join(_base64url(json.dumps(part, separators=(",", ":")).encode()) for part in parts)
    return f"{signed}.{_base64url(hmac.digest(key, signed.encode(), hashlib.sha256))}"
