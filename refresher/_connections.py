"""Connections of our own, for callers who lend none: whatever the peer does, they keep to their timeouts."""

from __future__ import annotations

import functools
import io
import os
import time
from http.client import HTTPResponse
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError

from ._checks import address_of
from ._threads import within


class _Received(io.RawIOBase):
    """What a socket receives, for as long as its timeout in all: however many pieces it comes in."""

    def __init__(self, sock: Any, received: io.RawIOBase, timeout: float) -> None:
        self._sock = sock
        self._received = received
        self._end = time.monotonic() + timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(max(0.001, self._end - time.monotonic()))
        received: int = self._sock.recv_into(buffer)
        return received

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(HTTPResponse):
    """A response that has to be there, to its last byte, within the timeout of its socket."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        if (timeout := sock.gettimeout()) is not None:
            self.fp: Any = io.BufferedReader(_Received(sock, self.fp.detach(), timeout))


@functools.lru_cache
def _in_time(kind: type[HTTPConnection]) -> type[HTTPConnection]:
    """Make a kind of connection that keeps to its timeouts, whatever the peer does."""

    class InTime(kind):  # type: ignore[misc, valid-type]
        response_class = _Response
        _pieces: list[bytes] | None = None

        def connect(self) -> None:
            # Names are looked up without a timeout, and each address has one of its own, and so has TLS.
            is_in_time = kind is HTTPConnection and address_of(self.host) is not None
            is_late = False

            def connect() -> None:
                super(InTime, self).connect()
                if is_late:
                    self.close()

            try:
                within(None if is_in_time else self.timeout, connect)
            except TimeoutError as error:
                is_late = True
                raise ConnectTimeoutError(self, "timed out") from error

        def request(self, *arguments: Any, **options: Any) -> None:
            # Head and body go out as one piece: that's one packet instead of two.
            pieces = self._pieces = list[bytes]()
            super().request(*arguments, **options)
            self._pieces = None
            self.send(b"".join(pieces))

        def send(self, piece: Any) -> None:
            if self._pieces is None:
                super().send(piece)
            else:
                self._pieces.append(piece)

    return InTime


@functools.lru_cache(maxsize=1)
def _session_of(process: int, while_: int) -> requests.Session:  # noqa: ARG001
    _pool_of.cache_clear()
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=64))
    return session


def own_session() -> requests.Session:
    """
    Get the session that lends its connections to callers who have none.

    There is a new one every few seconds: a connection that was idle for longer may be dead, and a request on it
    be lost, where a new one tells that nothing was sent. And there is one for each process: a forked child that
    used its parent's connections would read its parent's answers.
    """
    return _session_of(os.getpid(), int(time.monotonic() / 5))


_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
# What proxies and CA bundles are read from.
_VARIABLES = (*_PROXIES, *map(str.upper, _PROXIES), "REQUEST_METHOD", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@functools.lru_cache(maxsize=64)
def _pool_of(
    session: requests.Session,
    url: str,
    *environment: str | None,  # noqa: ARG001
) -> tuple[HTTPConnectionPool, str]:
    # It takes as long as a request, so it's done anew only if the environment is another.
    request = requests.Request("POST", url).prepare()
    settings: Any = session.merge_environment_settings(url, {}, True, None, None)
    verify, proxies = settings["verify"], settings["proxies"]
    adapter: Any = session.get_adapter(url)
    pool: Any = adapter.get_connection_with_tls_context(request, verify, proxies)
    adapter.cert_verify(pool, url, verify, None)
    kind = pool.ConnectionCls
    # What stands in for it in tests is left as it is.
    if issubclass(kind, HTTPConnection) and not issubclass(kind.response_class, _Response):
        pool.ConnectionCls = _in_time(kind)
    return pool, adapter.request_url(request, proxies)


def pool_of(url: str) -> tuple[HTTPConnectionPool, str]:
    """Find the connections that lead to *url*, and what is asked for on them."""
    return _pool_of(own_session(), url, *map(os.environ.get, _VARIABLES))
